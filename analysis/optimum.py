"""What to run for a budget: the best (N, V) of a law, of the measured cells, and how sure that is.

The cost is the LLM's prefill, 2 N (Q + V) FLOPs (arXiv 2411.03312): N parameters, Q text tokens, V visual
tokens. The vision tower, decoding and memory traffic are not in it. For a law in a ln N + b ln V the best V
at a fixed cost is Q / (a/b - 1) whatever the budget, inside the range of V that was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.data import Table
from analysis.fit import Fit, percentile_interval


def prefill_flops(n: np.ndarray | float, v: np.ndarray | float, q: float) -> np.ndarray:
    """LLM prefill FLOPs 2 n (q + v): n parameters (a count), v visual and q text tokens; broadcasts."""
    return np.asarray(2.0 * np.asarray(n) * (q + np.asarray(v)))


def best_tokens(params: np.ndarray, q: float, v_min: float, v_max: float) -> np.ndarray:
    """V [...] in [v_min, v_max] that minimises the error at a fixed cost, for params [..., 3] of either law.

    Maximises b ln V - a ln(q + V) over the corners and the stationary point q / (a/b - 1); a and b may have
    any sign, as they do in a resample.
    """
    a, b = params[..., 1], params[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = b * q / (a - b)
    inner = np.where((inner > v_min) & (inner < v_max), inner, v_min)
    options = np.stack([np.full_like(inner, v_min), inner, np.full_like(inner, v_max)])
    gain = b * np.log(options) - a * np.log(q + options)
    return np.take_along_axis(options, gain.argmax(axis=0)[None], axis=0)[0]


@dataclass(frozen=True)
class TokenChoice:
    """V*(Q): the best token count, its 95% interval, and the corner it sits in ('V_min', 'V_max' or '')."""

    q: float
    v: float
    interval: tuple[float, float]
    corner: str


def token_choice(fit: Fit, q: float, v_min: float, v_max: float) -> TokenChoice:
    """V*(q) of a fit within the measured range, with the bootstrap interval and a flag for a corner."""
    v = float(best_tokens(fit.params, q, v_min, v_max))
    corner = "V_min" if v == v_min else "V_max" if v == v_max else ""
    return TokenChoice(q, v, percentile_interval(best_tokens(fit.replicates, q, v_min, v_max)), corner)


@dataclass(frozen=True)
class Optimum:
    """The law's best point for a budget, N free of any menu; `extrapolated` says N lies outside the measured
    sizes.
    """

    budget: float
    v: float
    n: float
    n_interval: tuple[float, float]
    error: float
    band: tuple[float, float]
    extrapolated: bool


def optimum(fit: Fit, table: Table, budget: float, q: float) -> Optimum:
    """The best V*(q) and N* = budget / (2 (q + V*)) in parameters, with the fitted error and its 95% band."""
    choice = token_choice(fit, q, float(table.v.min()), float(table.v.max()))
    v = choice.v
    n = budget / (2.0 * (q + v))
    n_low, n_high = (budget / (2.0 * (q + edge)) for edge in reversed(choice.interval))
    at = np.array([n]), np.array([v])
    low, high = fit.band(*at)
    outside = not table.n.min() * (1 - 1e-9) <= n <= table.n.max() * (1 + 1e-9)
    return Optimum(
        budget, v, n, (n_low, n_high), float(fit.predict(*at)[0]), (float(low[0]), float(high[0])), outside
    )


def optimal_path(fit: Fit, table: Table, budgets: np.ndarray, q: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, v), each [budgets]: the law's best point that spends each budget inside the measured ranges of N
    and V.
    """
    n_min, n_max, v_min, v_max = (
        float(x) for x in (table.n.min(), table.n.max(), table.v.min(), table.v.max())
    )
    least = np.maximum(v_min, budgets / (2 * n_max) - q)
    most = np.minimum(v_max, budgets / (2 * n_min) - q)
    v = np.clip(float(best_tokens(fit.params, q, v_min, v_max)), least, np.maximum(most, least))
    return budgets / (2 * (q + v)), v


def indifference(fit: Fit, q: float, budget: float, v_min: float, v_max: float) -> tuple[float, float]:
    """(low, high) V in [v_min, v_max] with fitted error at this cost within one residual sd of the best."""
    v = np.geomspace(v_min, v_max, 8001)
    error = fit.predict(budget / (2 * (q + v)), v)
    inside = v[error <= error.min() + fit.sd]
    return float(inside[0]), float(inside[-1])


@dataclass(frozen=True)
class Pick:
    """One (N, V) for a budget: its error and, for the law's pick, the band; `cost` in FLOPs."""

    llm_name: str
    n: float
    v: float
    cost: float
    error: float
    band: tuple[float, float] | None


def measured_pick(table: Table, budget: float, q: float) -> Pick | None:
    """The measured cell of least error whose cost is within `budget` (the cheaper one of equals), or None."""
    cost = prefill_flops(table.n, table.v, q)
    allowed = np.flatnonzero(cost <= budget * (1 + 1e-12))
    if allowed.size == 0:
        return None
    i = min(allowed, key=lambda j: (table.error[j], cost[j]))
    noise = float(table.sampling_sd[i])
    error = float(table.error[i])
    band = (error - 1.96 * noise, error + 1.96 * noise) if math.isfinite(noise) else None
    return Pick(table.llm_name[i], float(table.n[i]), float(table.v[i]), float(cost[i]), error, band)


def law_pick(fit: Fit, table: Table, budget: float, q: float) -> Pick | None:
    """The law's choice for `budget` among every measured LLM with every measured V, or None if none is cheap
    enough.
    """
    names = {float(n): name for n, name in zip(table.n, table.llm_name, strict=True)}
    n, v = (grid.ravel() for grid in np.meshgrid(table.sizes, table.token_counts, indexing="ij"))
    cost = prefill_flops(n, v, q)
    allowed = np.flatnonzero(cost <= budget * (1 + 1e-12))
    if allowed.size == 0:
        return None
    error = fit.predict(n, v)
    i = min(allowed, key=lambda j: (error[j], cost[j]))
    low, high = fit.band(n[i : i + 1], v[i : i + 1])
    band = (float(low[0]), float(high[0]))
    return Pick(names[float(n[i])], float(n[i]), float(v[i]), float(cost[i]), float(error[i]), band)


def pareto(table: Table, q: float) -> np.ndarray:
    """Indices of the measured cells that no cheaper or equally dear cell beats, in order of cost."""
    cost = prefill_flops(table.n, table.v, q)
    best, chosen = math.inf, []
    for i in sorted(range(cost.size), key=lambda j: (cost[j], table.error[j])):
        if table.error[i] < best:
            best = float(table.error[i])
            chosen.append(i)
    return np.array(chosen, dtype=int)


def round_budgets(table: Table, q: float) -> list[float]:
    """Three budgets in FLOPs inside the measured range of costs, evenly spaced in the logarithm and then
    rounded.
    """
    cost = prefill_flops(table.n, table.v, q)
    low, high = float(cost.min()), float(cost.max())
    budgets = []
    for share in (0.25, 0.5, 0.75):
        exact = math.exp((1 - share) * math.log(low) + share * math.log(high))
        unit = 10.0 ** math.floor(math.log10(exact))
        rounded = round(exact / unit) * unit
        budgets.append(float(rounded) if low <= rounded <= high else exact)
    return sorted(set(budgets))
