"""Which LLM and how many visual tokens for a budget, from a fit or from the measured cells alone.

A single-index law at a cost N (Qe + V) has a closed form: maximise b ln V - a ln(Qe + V), so V* = Qe / (a/b -
1) inside the allowed V, whatever the budget, and visual tokens take the share b/a of the prefill. Every other
law or cost is minimised on a fine grid of ln V, refined by a parabola.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.bootstrap import Replicates, percentile_interval
from analysis.cost import Cost, FlopsCost, LatencyCost
from analysis.data import Table
from analysis.fit import Fit

_GRID = 513
_BLOCK = 1024


def index_tokens(
    by_size: np.ndarray, by_tokens: np.ndarray, q: float, v_min: float, v_max: float
) -> np.ndarray:
    """V [...] in [v_min, v_max] that minimises a single-index law at cost N (q + V), for slopes [...] of any
    sign.

    Looks at both corners and the stationary point q / (a/b - 1).
    """
    a, b = np.asarray(by_size), np.asarray(by_tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = b * q / (a - b)
    inner = np.where((inner > v_min) & (inner < v_max), inner, v_min)
    options = np.stack([np.full_like(inner, v_min), inner, np.full_like(inner, v_max)])
    gain = b * np.log(options) - a * np.log(q + options)
    return np.asarray(np.take_along_axis(options, gain.argmax(axis=0)[None], axis=0)[0])


def best_tokens(
    fit: Fit, theta: np.ndarray, cost: Cost, budget: float, v_min: float, v_max: float
) -> np.ndarray:
    """V* [R] in [v_min, v_max] of theta [R, k] for `budget`; NaN where the budget buys no LLM at any V."""
    if fit.law.single_index and cost.plain and isinstance(cost, FlopsCost) and fit.cells.shift == 0:
        by_size, by_tokens = fit.law.slopes(theta)
        return index_tokens(by_size, by_tokens, cost.effective_tokens, v_min, v_max)
    if v_max <= v_min:
        return np.full(theta.shape[0], v_min)
    grid = np.linspace(math.log(v_min), math.log(v_max), _GRID)
    v = np.exp(grid)
    n = cost.size_for(budget, v)
    if not (n > 0).any():
        return np.full(theta.shape[0], np.nan)
    pieces = []
    for first in range(0, theta.shape[0], _BLOCK):
        error = fit.predict(np.maximum(n, 1.0), v, theta[first : first + _BLOCK])
        error = np.where((n > 0) & np.isfinite(error), error, np.inf)
        pieces.append(np.exp(_valley(grid, error)))
    return np.concatenate(pieces)


def _valley(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Place of the least y [R, G] on the even grid x [G], by the parabola through the lowest point."""
    low = y.argmin(axis=1)
    inner = (low > 0) & (low < x.size - 1)
    middle = np.clip(low, 1, x.size - 2)
    row = np.arange(y.shape[0])
    left, centre, right = (y[row, middle + d] for d in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = 0.5 * (left - right) / (left - 2 * centre + right)
    shift = np.where(inner & np.isfinite(shift), np.clip(shift, -1, 1), 0.0)
    return np.asarray(x[low] + shift * (x[1] - x[0]))


@dataclass(frozen=True)
class Optimum:
    """The best point of a law for one budget, V kept within the allowed range.

    v, n: V* and N*, with 95% bootstrap intervals (None without resamples). corner: 'V_min', 'V_max' or '' for
    an inner optimum. share: visual tokens over all prefill-equivalent tokens (None for a latency). error,
    band: the fitted error there. indifference: the V whose fitted error at this cost is within one residual
    sd of the best. extrapolated: N* lies outside the measured sizes.
    """

    budget: float
    v: float
    v_interval: tuple[float, float] | None
    n: float
    n_interval: tuple[float, float] | None
    corner: str
    share: float | None
    error: float
    band: tuple[float, float] | None
    indifference: tuple[float, float]
    extrapolated: bool


def optimum(
    fit: Fit,
    cost: Cost,
    budget: float,
    replicates: Replicates | None = None,
    v_range: tuple[float, float] | None = None,
) -> Optimum | None:
    """V*, N* and how flat the optimum is; V within `v_range`, by default the measured one.

    None where the budget buys no LLM (of one parameter or more) at any V.
    """
    table = fit.table
    v_min, v_max = v_range or (float(table.v.min()), float(table.v.max()))
    v = float(best_tokens(fit, fit.theta[None], cost, budget, v_min, v_max)[0])
    if not math.isfinite(v):
        return None
    n = float(cost.size_for(budget, v))
    if n < 1:
        return None
    v_interval = n_interval = band = None
    if replicates is not None and replicates.theta.size:
        spread = best_tokens(fit, replicates.theta, cost, budget, v_min, v_max)
        v_interval = percentile_interval(spread)
        n_interval = percentile_interval(cost.size_for(budget, spread))
        band = percentile_interval(fit.predict(np.array([n]), np.array([v]), replicates.theta)[:, 0])
    outside = not table.n.min() * (1 - 1e-9) <= n <= table.n.max() * (1 + 1e-9)
    return Optimum(
        budget,
        v,
        v_interval,
        n,
        n_interval,
        _corner(v, v_min, v_max),
        v / (cost.effective_tokens + v) if isinstance(cost, FlopsCost) else None,
        float(fit.predict(np.array([n]), np.array([v]))[0]),
        band,
        indifference(fit, cost, budget, v_min, v_max),
        outside,
    )


def _corner(v: float, v_min: float, v_max: float) -> str:
    near = 1e-9 * v
    return "V_min" if v <= v_min + near else "V_max" if v >= v_max - near else ""


def indifference(fit: Fit, cost: Cost, budget: float, v_min: float, v_max: float) -> tuple[float, float]:
    """(low, high) V in [v_min, v_max] with fitted error at this cost within one residual sd of the best."""
    v = np.geomspace(v_min, v_max, 8001)
    n = cost.size_for(budget, v)
    error = np.where(n > 0, fit.predict(np.maximum(n, 1.0), v), np.inf)
    inside = v[error <= error.min() + fit.sd]
    return float(inside[0]), float(inside[-1])


def multipliers(fit: Fit, cost: Cost, budget: float, v: np.ndarray) -> np.ndarray:
    """[V] how many times `budget` each v needs for the fitted error that the best V reaches with `budget`.

    NaN where no budget up to a million times as large does.
    """
    best = optimum(fit, cost, budget)
    if best is None:
        return np.full(v.size, np.nan)
    low, high = np.zeros(v.size), np.full(v.size, math.log(1e6))

    def error(factor: np.ndarray) -> np.ndarray:
        n = cost.size_for(budget * np.exp(factor), v)
        return np.where(n > 0, fit.predict(np.maximum(n, 1.0), v), np.inf)

    reachable = error(high) <= best.error
    for _ in range(60):
        middle = (low + high) / 2
        enough = error(middle) <= best.error
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(reachable, np.exp(high), np.nan)


@dataclass(frozen=True)
class Pick:
    """One (N, V) for a budget: its error and, where known, a 95% band."""

    llm_name: str
    n: float
    v: float
    cost: float
    error: float
    band: tuple[float, float] | None


def measured_pick(table: Table, budget: float, cost: Cost) -> Pick | None:
    """The measured cell of least error whose cost is within `budget` (the cheaper one of equals), or None."""
    price = measured_cost(table, cost)
    allowed = np.flatnonzero(price <= budget * (1 + 1e-12))
    if allowed.size == 0:
        return None
    i = min(allowed, key=lambda j: (table.error[j], price[j]))
    noise, error = float(table.sampling_sd[i]), float(table.error[i])
    band = (error - 1.96 * noise, error + 1.96 * noise) if math.isfinite(noise) else None
    return Pick(table.llm_name[i], float(table.n[i]), float(table.v[i]), float(price[i]), error, band)


def measured_cost(table: Table, cost: Cost) -> np.ndarray:
    """[cells] cost of each cell by the formula; of measured latency the cell's own where it has one."""
    price = cost(table.n, table.v)
    if not isinstance(cost, LatencyCost):
        return price
    return np.where(np.isfinite(table.latency_ms), table.latency_ms, price)


def law_pick(
    fit: Fit,
    budget: float,
    cost: Cost,
    replicates: Replicates | None = None,
    sizes: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> Pick | None:
    """The law's choice for `budget` from a menu of LLM sizes and token counts (by default the measured
    ones).
    """
    table = fit.table
    names = {float(n): name for n, name in zip(table.n, table.llm_name, strict=True)}
    sizes, counts = table.sizes if sizes is None else sizes, table.token_counts if counts is None else counts
    n, v = (grid.ravel() for grid in np.meshgrid(sizes, counts, indexing="ij"))
    price = cost(n, v)
    allowed = np.flatnonzero(price <= budget * (1 + 1e-12))
    if allowed.size == 0:
        return None
    error = fit.predict(n, v)
    i = min(allowed, key=lambda j: (error[j], price[j]))
    band = None
    if replicates is not None and replicates.theta.size:
        band = percentile_interval(fit.predict(n[i : i + 1], v[i : i + 1], replicates.theta)[:, 0])
    name = names.get(float(n[i]), "")
    return Pick(name, float(n[i]), float(v[i]), float(price[i]), float(error[i]), band)


def optimal_path(fit: Fit, cost: Cost, budgets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, v), each [budgets]: the law's best point that spends each budget inside the measured ranges of N
    and V.
    """
    table = fit.table
    counts = np.geomspace(table.v.min(), table.v.max(), _GRID)
    n = cost.size_for(budgets[:, None], counts[None])
    inside = (n >= table.n.min() * (1 - 1e-9)) & (n <= table.n.max() * (1 + 1e-9))
    error = np.where(inside, fit.predict(np.maximum(n, 1.0), np.broadcast_to(counts, n.shape)), np.inf)
    best = error.argmin(axis=1)
    row = np.arange(budgets.size)
    found = np.isfinite(error[row, best])
    return n[row, best][found], counts[best][found]


def pareto(table: Table, cost: Cost) -> np.ndarray:
    """Indices of the measured cells that no cheaper or equally dear cell beats, in order of cost."""
    price = measured_cost(table, cost)
    best, chosen = math.inf, []
    for i in np.lexsort((table.error, price)):
        if table.error[i] < best:
            best = float(table.error[i])
            chosen.append(int(i))
    return np.array(chosen, dtype=int)


def round_budgets(table: Table, cost: Cost) -> list[float]:
    """Three budgets inside the measured range of costs, evenly spaced in the logarithm and then rounded."""
    price = measured_cost(table, cost)
    low, high = float(price.min()), float(price.max())
    budgets = []
    for share in (0.25, 0.5, 0.75):
        exact = math.exp((1 - share) * math.log(low) + share * math.log(high))
        unit = 10.0 ** math.floor(math.log10(exact))
        rounded = round(exact / unit) * unit
        budgets.append(float(rounded) if low <= rounded <= high else exact)
    return sorted(set(budgets))
