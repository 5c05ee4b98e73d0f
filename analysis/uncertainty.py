"""Every interval of one fit side by side: profile-F, the bootstraps, mixed effects, and the average over
laws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.bootstrap import SCHEMES, Replicates, percentile_interval, resample
from analysis.cost import Cost, FlopsCost
from analysis.fit import Fit
from analysis.mixed import Mixed
from analysis.optimum import best_tokens, index_tokens
from analysis.profile import RatioInterval
from analysis.verdict import local_slopes

Interval = tuple[float, float]


@dataclass(frozen=True)
class Method:
    """95% intervals by one method: ratio, local slopes (score per unit of ln N, ln V), V*, N* and the visual
    share for the study's cost and budget. None where the method does not give one; `note` says why, or warns.
    """

    name: str
    note: str = ""
    ratio: Interval | None = None
    slope_n: Interval | None = None
    slope_v: Interval | None = None
    visual_tokens: Interval | None = None
    n: Interval | None = None
    share: Interval | None = None


def methods(
    fit: Fit,
    residual: Replicates,
    profile: RatioInterval,
    mixed: Mixed | None,
    cost: Cost,
    budget: float,
    count: int,
    seed: int,
) -> tuple[Method, ...]:
    """All methods for one fit; `residual` are the resamples that are there already."""
    result = [_profile(fit, profile, cost, budget)]
    for scheme in SCHEMES:
        name = f"{scheme.replace('_n', ' by LLM').replace('_v', ' by V')} bootstrap"
        try:
            replicates = residual if scheme == "residual" else resample(fit, count, scheme=scheme, seed=seed)
        except ValueError as refusal:
            result.append(Method(name, f"refused: {refusal}"))
            continue
        result.append(_bootstrap(name, fit, replicates, cost, budget))
    result.append(_mixed(fit, mixed, cost, budget))
    return tuple(result)


def _range(fit: Fit) -> Interval:
    return float(fit.table.v.min()), float(fit.table.v.max())


def _choices(cost: Cost, budget: float, v: Interval) -> tuple[Interval, Interval | None]:
    """Intervals of N* and of the visual share that go with an interval of V*."""
    sizes = sorted(float(x) for x in cost.size_for(budget, np.array(v)))
    share = None
    if isinstance(cost, FlopsCost):
        share = v[0] / (cost.effective_tokens + v[0]), v[1] / (cost.effective_tokens + v[1])
    return (sizes[0], sizes[1]), share


def _profile(fit: Fit, profile: RatioInterval, cost: Cost, budget: float) -> Method:
    ratio = profile.ends
    if ratio is None:
        return Method("profile F", "the ratio is not bounded on both sides")
    if not (fit.law.single_index and cost.plain and isinstance(cost, FlopsCost)):
        return Method("profile F", ratio=ratio)
    # V* of a single-index law follows from the ratio alone, and falls with it.
    ends = index_tokens(np.array(ratio[::-1]), np.ones(2), cost.effective_tokens, *_range(fit))
    v = float(ends[0]), float(ends[1])
    sizes, share = _choices(cost, budget, v)
    return Method("profile F", ratio=ratio, visual_tokens=v, n=sizes, share=share)


def _bootstrap(name: str, fit: Fit, replicates: Replicates, cost: Cost, budget: float) -> Method:
    if replicates.theta.shape[0] == 0:
        return Method(name, "no resample converged")
    notes = [replicates.warning] if replicates.warning else []
    if replicates.failed:
        notes.append(f"{replicates.failed} resamples did not converge")
    if replicates.scheme == "normal":
        notes.append("so many cells that the large-sample normal distribution stands for the resamples")
    slopes = local_slopes(fit, replicates.theta)
    v = best_tokens(fit, replicates.theta, cost, budget, *_range(fit))
    n = cost.size_for(budget, v)
    share = percentile_interval(v / (cost.effective_tokens + v)) if isinstance(cost, FlopsCost) else None
    return Method(
        name,
        "; ".join(notes),
        percentile_interval(fit.law.ratio(replicates.theta)),
        percentile_interval(slopes[:, 0]),
        percentile_interval(slopes[:, 1]),
        percentile_interval(v),
        percentile_interval(n),
        share,
    )


def _mixed(fit: Fit, mixed: Mixed | None, cost: Cost, budget: float) -> Method:
    name = "mixed effects, t"
    if mixed is None:
        return Method(
            name, "needs a law that is a line on some scale, three LLM sizes and three token counts"
        )
    note = "LLMs and token counts as random effects: the one with right coverage at few LLMs"
    if mixed.ratio[0] is None or mixed.ratio[1] is None:
        return Method(name, f"{note}; the ratio is not bounded on both sides")
    ratio = mixed.ratio[0], mixed.ratio[1]
    if not (cost.plain and isinstance(cost, FlopsCost)):
        return Method(name, note, ratio=ratio)
    v = mixed.best_tokens(cost.effective_tokens, *_range(fit))
    sizes, share = _choices(cost, budget, v)
    return Method(name, note, ratio=ratio, visual_tokens=v, n=sizes, share=share)


@dataclass(frozen=True)
class Averaged:
    """V* averaged over laws by Akaike weight: the geometric mean, and a 95% interval that mixes their
    resamples.
    """

    visual_tokens: float
    interval: Interval
    weights: dict[str, float]


def averaged_tokens(
    fits: dict[str, Fit],
    replicates: dict[str, Replicates],
    weights: np.ndarray,
    cost: Cost,
    budget: float,
) -> Averaged | None:
    """The model average, None where no law has both a weight and resamples."""
    points, draws, used = [], [], {}
    for (name, fit), weight in zip(fits.items(), weights, strict=True):
        own = replicates[name].theta
        point = float(best_tokens(fit, fit.theta[None], cost, budget, *_range(fit))[0])
        if weight < 1e-4 or own.shape[0] == 0 or not np.isfinite(point):
            continue
        v = best_tokens(fit, own, cost, budget, *_range(fit))
        # Evenly spaced quantiles stand for the law's resamples, as many as its weight asks for.
        draws.append(
            np.quantile(v, (np.arange(round(10_000 * weight) or 1) + 0.5) / (round(10_000 * weight) or 1))
        )
        points.append((weight, np.log(point)))
        used[name] = float(weight)
    if not points:
        return None
    total = sum(weight for weight, _ in points)
    middle = float(np.exp(sum(weight * value for weight, value in points) / total))
    return Averaged(middle, percentile_interval(np.concatenate(draws)), used)
