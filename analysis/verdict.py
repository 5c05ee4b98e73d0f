"""What a fit is worth: identified, a bound active, or unidentified, with the reason in one clause."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.bootstrap import Replicates, percentile_interval
from analysis.fit import Fit
from analysis.profile import RatioInterval

MIN_FREEDOM = 3
IDENTIFIED, BOUND, UNIDENTIFIED = "identified", "bound active", "unidentified"


@dataclass(frozen=True)
class Verdict:
    """kind: about the law's parameters. ratio, interval: of the two local slopes, None unless known.

    The two differ: the exponents of a power law with an offset may be unidentified while their ratio is
    sharp. flags: short names for programs (not_converged, few_cells, resampling_failed, bound_active,
    parameters_unidentified, ratio_unidentified, wrong_sign).
    """

    kind: str
    reason: str
    flags: tuple[str, ...]
    ratio: float | None
    interval: tuple[float, float] | None

    @property
    def identified(self) -> bool:
        """Whether the ratio is known."""
        return self.ratio is not None


def judge(
    fit: Fit,
    replicates: Replicates,
    profile: RatioInterval,
    bend: tuple[float | None, float | None] | None = None,
) -> Verdict:
    """The verdict on a fit. bend: interval of lam, for the regular law."""
    trouble = _trouble(fit, replicates)
    if trouble is not None:
        return Verdict(UNIDENTIFIED, *trouble, None, None)
    ratio, reason, flags = _ratio(fit, replicates, profile)
    pair = profile.ends if ratio is not None else None
    if fit.bounds:
        where = " and ".join(fit.bounds)
        text = (
            f"the best fit sits on the bound {where}: the data ask for less, so its uncertainty is hidden; "
            f"{reason}"
        )
        return Verdict(BOUND, text, ("bound_active", *flags), ratio, pair)
    if bend is not None and (bend[0] is None or bend[1] is None or bend[0] <= 0 <= bend[1]):
        ends = [f"{end:.2f}" if end is not None else "unbounded" for end in bend]
        text = (
            f"K, alpha, beta and D cannot be told: the 95% interval of lam [{', '.join(ends)}] contains 0; "
            f"{reason}"
        )
        return Verdict(UNIDENTIFIED, text, ("parameters_unidentified", *flags), ratio, pair)
    return Verdict(UNIDENTIFIED if ratio is None else IDENTIFIED, reason, flags, ratio, pair)


def _trouble(fit: Fit, replicates: Replicates) -> tuple[str, tuple[str, ...]] | None:
    """(reason, flags) why the fit says nothing, or None."""
    if not fit.converged:
        text = "the fit runs away: some cells are at 0 or 1, or the slopes have no finite best value"
        return text, ("not_converged", "ratio_unidentified")
    if fit.freedom < MIN_FREEDOM:
        text = f"{fit.cells.u.size} cells leave {fit.freedom} degrees of freedom, too few for an interval"
        return text, ("few_cells", "ratio_unidentified")
    if not replicates.usable:
        run = replicates.failed + replicates.theta.shape[0]
        text = f"{replicates.failed} of {run} resamples run away: noise like this leaves no finite best value"
        return text, ("resampling_failed", "ratio_unidentified")
    return None


def _ratio(
    fit: Fit, replicates: Replicates, profile: RatioInterval
) -> tuple[float | None, str, tuple[str, ...]]:
    """(ratio or None, reason, flags)."""
    spread = local_slopes(fit, replicates.theta)
    for index, what in ((1, "visual tokens"), (0, "LLM size")):
        value, (low, high) = fit.slopes[index], percentile_interval(spread[:, index])
        text = f"{value:.3g} [{low:.3g}, {high:.3g}] per unit of ln {'NV'[index]}"
        if high < 0:
            return None, f"error rises with {what}: it falls by {text}", ("ratio_unidentified", "wrong_sign")
        if low <= 0:
            return None, f"the effect of {what} cannot be told from zero: {text}", ("ratio_unidentified",)
    if profile.ends is None:
        return None, "the interval of the ratio is not finite and positive", ("ratio_unidentified",)
    if profile.ends[0] > 1:
        return fit.ratio, "LLM size matters more than visual tokens", ()
    if profile.ends[1] < 1:
        return fit.ratio, "visual tokens matter more than LLM size", ()
    return fit.ratio, "whether size or tokens matter more is open: the ratio's interval contains 1", ()


def local_slopes(fit: Fit, theta: np.ndarray) -> np.ndarray:
    """[R, 2] fall of the prediction per unit of ln N and ln V at the centre, for theta [R, k], in units of
    score.
    """
    step = 1e-5
    ends = fit.law.predict(theta, np.array([-step, step, 0.0, 0.0]), np.array([0.0, 0.0, -step, step]))
    return np.stack([ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 3]], axis=1) / (2 * step)
