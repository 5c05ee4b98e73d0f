"""Least squares on the raw error, batched over targets: one fit and its residual bootstrap are the same code.

Source of the method: Levenberg-Marquardt with diagonal damping (Marquardt 1963); AICc counts the noise
variance as a parameter; the bootstrap resamples centred residuals scaled by sqrt(n / (n - k)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.data import Table
from analysis.laws import LAWS, Law, features

MIN_FREEDOM = 3
_EXACT = 1e-20  # a sum of squares below this is rounding: AICc has no meaning
_STEEP = 30.0  # a logit that moves this much over one standard deviation of ln N or ln V is a step, not a law


@dataclass(frozen=True)
class Fit:
    """One law fitted to one table.

    params: [3]. sse: sum of squared residuals in error units. r2 and aicc: None where undefined. sd: residual
    standard deviation sqrt(sse / freedom). replicates: [resamples that converged, 3]. failed: the others'
    count.
    """

    law: Law
    cells: int
    params: np.ndarray
    sse: float
    r2: float | None
    aicc: float | None
    sd: float
    freedom: int
    converged: bool
    replicates: np.ndarray
    failed: int

    def interval(self, index: int) -> tuple[float, float]:
        """95% bootstrap interval of parameter `index`."""
        return percentile_interval(self.replicates[:, index])

    def predict(self, n: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Fitted error [cells] at n (a parameter count) and v (>= 1)."""
        return self.law.predict(self.params, features(n, v))

    def band(self, n: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each [cells]: 95% bootstrap band of the fitted error (not of a new measurement)."""
        spread = self.law.predict(self.replicates, features(n, v))
        low, high = np.percentile(spread, [2.5, 97.5], axis=0)
        return low, high

    @property
    def size_beats_tokens(self) -> float:
        """Share of the resamples in which ln N has the larger coefficient than ln V."""
        return float(np.mean(self.replicates[:, 1] > self.replicates[:, 2]))


@dataclass(frozen=True)
class Verdict:
    """Whether the data tell the ratio of the two slopes; otherwise ratio and interval are None."""

    identified: bool
    reason: str
    ratio: float | None
    interval: tuple[float, float] | None


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """2.5% and 97.5% percentiles of values [resamples]."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def why_no_fit(table: Table) -> str | None:
    """Why no law can be fitted to `table`, in one clause, or None where one can."""
    sizes, counts = table.sizes.size, table.token_counts.size
    if sizes < 2 or counts < 2:
        return f"{_plural(sizes, 'LLM size')} and {_plural(counts, 'token count')}; a law needs two of each"
    if table.n.size <= 3:
        return f"{table.n.size} cells measured; a law with three parameters needs at least four"
    if np.linalg.matrix_rank(features(table.n, table.v)) < 3:
        return "LLM size and token count change together in every cell, so their effects cannot be told apart"
    return None


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def least_squares(
    law: Law, x: np.ndarray, targets: np.ndarray, max_steps: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Parameters [R, 3] and converged [R] that minimise sum (target - prediction)^2 for targets [R, cells].

    x: [cells, 3] of `features`, of full rank. The log-linear law is solved in closed form; the logit-linear
    law by damped Gauss-Newton from the linear fit of the clipped logits, in standardised coordinates.
    """
    middle, scale = x[:, 1:].mean(axis=0), x[:, 1:].std(axis=0)
    z = np.column_stack([np.ones(len(x)), (x[:, 1:] - middle) / scale])
    if law.logistic:
        clipped = np.clip(targets, 1e-3, 1 - 1e-3)
        start = np.linalg.lstsq(z, np.log((1 - clipped) / clipped).T, rcond=None)[0].T
        params, converged = _damped(law, z, targets, start, max_steps)
    else:
        params = np.linalg.lstsq(law.jacobian(np.zeros(3), z), targets.T, rcond=None)[0].T
        converged = np.isfinite(params).all(axis=1)
    slopes = params[:, 1:] / scale
    shift = slopes @ middle
    level = params[:, 0] - shift if law.logistic else params[:, 0] + shift
    return np.column_stack([level, slopes]), converged


def _damped(
    law: Law, z: np.ndarray, targets: np.ndarray, start: np.ndarray, max_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    params = start.copy()
    residual = targets - law.predict(params, z)
    cost = (residual**2).sum(axis=1)
    damping = np.full(len(targets), 1e-3)
    converged = np.zeros(len(targets), dtype=bool)
    for _ in range(max_steps):
        active = np.flatnonzero(~converged)
        if active.size == 0:
            break
        jac = law.jacobian(params[active], z)
        normal = np.einsum("rci,rcj->rij", jac, jac)
        gradient = np.einsum("rci,rc->ri", jac, residual[active])
        diagonal = np.einsum("rii->ri", normal)
        shift = damping[active, None] * diagonal + 1e-14 * diagonal.max(axis=1, keepdims=True) + 1e-300
        step = np.linalg.solve(normal + shift[:, :, None] * np.eye(3), gradient[..., None])[..., 0]
        trial = params[active] + step
        trial_residual = targets[active] - law.predict(trial, z)
        trial_cost = (trial_residual**2).sum(axis=1)
        better = trial_cost <= cost[active]
        small = np.abs(step).max(axis=1) <= 1e-11 * (1.0 + np.abs(params[active]).max(axis=1))
        accepted = active[better]
        params[accepted], residual[accepted] = trial[better], trial_residual[better]
        cost[accepted] = trial_cost[better]
        damping[active] = np.where(better, np.maximum(damping[active] * 0.2, 1e-14), damping[active] * 8.0)
        gain = np.einsum("ri,ri->r", gradient, step)
        small |= gain <= 1e-13 * cost[active]
        # A tiny step means an optimum only while the damping is low: elsewhere it means a stall.
        converged[active] = small & (damping[active] < 1e3) & np.isfinite(trial_cost)
    return params, converged & (np.abs(params) < _STEEP).all(axis=1)


def fit_law(law: Law, table: Table, bootstrap: int = 2000, seed: int = 0) -> Fit:
    """Fit `law` to `table` and resample its residuals `bootstrap` times from `seed`.

    The table must satisfy `why_no_fit(table) is None`; raises ValueError otherwise or for bootstrap < 1.
    """
    reason = why_no_fit(table)
    if reason is not None:
        raise ValueError(reason)
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}")
    x, y = features(table.n, table.v), table.error
    found, converged = least_squares(law, x, y[None])
    params = found[0]
    fitted = law.predict(params, x)
    residual = y - fitted
    cells, freedom = y.size, y.size - 3
    sse, spread = float(residual @ residual), float(((y - y.mean()) ** 2).sum())
    draws = np.random.default_rng(seed).integers(0, cells, size=(bootstrap, cells))
    noise = (residual - residual.mean()) * math.sqrt(cells / freedom)
    replicates, good = least_squares(law, x, fitted + noise[draws])
    return Fit(
        law=law,
        cells=cells,
        params=params,
        sse=sse,
        r2=1 - sse / spread if spread > 0 else None,
        aicc=_aicc(sse, cells),
        sd=math.sqrt(sse / freedom),
        freedom=freedom,
        converged=bool(converged[0]),
        replicates=replicates[good],
        failed=int((~good).sum()),
    )


def _aicc(sse: float, cells: int, parameters: int = 4) -> float | None:
    """Corrected Akaike criterion with the noise variance counted; None for too few cells or an exact fit."""
    if cells <= parameters + 1 or sse <= _EXACT:
        return None
    penalty = 2 * parameters + 2 * parameters * (parameters + 1) / (cells - parameters - 1)
    return cells * math.log(sse / cells) + penalty


def judge(fit: Fit) -> Verdict:
    """The verdict on a fit: identified only if the 95% intervals of both slopes and of their ratio are
    positive.

    Otherwise the verdict says what fails, and gives no ratio.
    """
    size, token = fit.law.parameters[1:]
    if not fit.converged or fit.replicates.shape[0] < 0.99 * (fit.replicates.shape[0] + fit.failed):
        return _unknown(
            "the fit runs away: some cells are at 0 or 1, so the slopes have no finite best value"
        )
    if fit.r2 is None:
        return _unknown("every cell has the same error")
    if fit.freedom < MIN_FREEDOM:
        return _unknown(f"{fit.cells} cells leave {fit.freedom} degrees of freedom, too few for an interval")
    for index, name, what in ((2, token, "visual tokens"), (1, size, "LLM size")):
        low, high = fit.interval(index)
        if high < 0:
            return _unknown(
                f"error rises with {what}: {name} = {fit.params[index]:.3g} [{low:.3g}, {high:.3g}]"
            )
        if low <= 0:
            return _unknown(
                f"the effect of {what} cannot be told from zero: {name} = {fit.params[index]:.3g} "
                f"[{low:.3g}, {high:.3g}]"
            )
    # By angle, so that a resample with a slope of token count below zero counts as a ratio beyond infinity.
    low, high = percentile_interval(np.arctan2(fit.replicates[:, 1], fit.replicates[:, 2]))
    if low <= 0 or high >= math.pi / 2:
        return _unknown(f"the interval of {size}/{token} is not finite and positive")
    low, high = math.tan(low), math.tan(high)
    return Verdict(True, _reading(low, high), float(fit.params[1] / fit.params[2]), (low, high))


def _unknown(reason: str) -> Verdict:
    return Verdict(False, reason, None, None)


def _reading(low: float, high: float) -> str:
    if low > 1:
        return "identified: LLM size matters more than visual tokens"
    if high < 1:
        return "identified: visual tokens matter more than LLM size"
    return "identified, but whether size or tokens matter more is open: the interval contains 1"


def fit_all(table: Table, bootstrap: int = 2000, seed: int = 0) -> dict[str, Fit]:
    """Every law of `LAWS` fitted to `table`, best first (AICc, or the sum of squares if undefined)."""
    fits = [fit_law(law, table, bootstrap, seed) for law in LAWS.values()]
    fits.sort(key=lambda fit: (not fit.converged, fit.aicc if fit.aicc is not None else -math.inf, fit.sse))
    return {fit.law.name: fit for fit in fits}
