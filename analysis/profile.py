"""Profile intervals: refit with one quantity held, and keep the values that an F test does not reject.

Held values are rows of the one solver. The ratio is held as an angle between the two slopes, each in units of
its own size, so that a slope of zero (a ratio of zero or infinity) is an inner point and not the end of the
line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri

from analysis.fit import MANY_CELLS, Cells, Fit, covariance, fit_rows
from analysis.laws import LAWS

_POINTS = 64
_ROUNDS = 4
_RETRIES = 4


@dataclass(frozen=True)
class RatioInterval:
    """95% profile-F interval of the ratio; an end is None where the data do not bound it on that side.

    Where both slopes are positive throughout, both ends exist. curve: (ratio, deviance) pairs for a plot,
    deviance = cells * ln(SSE / least SSE).
    """

    low: float | None
    high: float | None
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def ends(self) -> tuple[float, float] | None:
        """(low, high), or None unless both exist."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def _limit(fit: Fit, level: float) -> float:
    """The largest sum of squares that an F test with one degree of freedom does not reject."""
    return fit.objective * (1 + float(fdtri(1, fit.freedom, level)) / fit.freedom)


def _units(fit: Fit) -> tuple[float, float]:
    """A positive scale for each slope of theta: its size, or its standard error where that is larger."""
    slopes = np.array([float(x) for x in fit.law.slopes(fit.theta)])
    at = [int(i) for i in fit.law.slopes(np.arange(fit.law.size))]
    error = np.sqrt(np.clip(np.diag(covariance(fit)), 0, np.inf))[at]
    unit_n, unit_v = np.maximum(np.maximum(np.abs(slopes), error), 1e-12)
    return float(unit_n), float(unit_v)


def ratio_interval(fit: Fit, level: float = 0.95) -> RatioInterval:
    """The profile-F interval of the ratio of local slopes; needs freedom >= 1 and squared losses."""
    if fit.freedom < 1 or fit.loss == "huber":
        return RatioInterval(None, None)
    if fit.cells.u.size > MANY_CELLS:
        return _delta_interval(fit, level)
    unit_n, unit_v = _units(fit)
    slope_n, slope_v = (float(x) for x in fit.law.slopes(fit.theta))
    centre = math.atan2(slope_n / unit_n, slope_v / unit_v)

    def cost(angles: np.ndarray) -> np.ndarray:
        zero = np.zeros_like(angles)
        held = np.column_stack([np.cos(angles) / unit_n, -np.sin(angles) / unit_v, zero, zero])
        return _held_cost(fit, fit.cells, fit.theta, held)

    limit = _limit(fit, level)
    low, high = _crossings(cost, centre, (centre - math.pi / 2, centre + math.pi / 2), limit)
    positive = slope_n > 0 and slope_v > 0
    if not positive or low is None or low <= 0:
        low = None
    if not positive or high is None or high >= math.pi / 2:
        high = None
    scale = unit_n / unit_v
    return RatioInterval(
        None if low is None else math.tan(low) * scale,
        None if high is None else math.tan(high) * scale,
        _curve(fit, cost, scale, low, high) if low is not None and high is not None else (),
    )


def _delta_interval(fit: Fit, level: float) -> RatioInterval:
    """The large-sample interval of ln ratio, with which a profile over thousands of cells agrees."""
    by_size, by_tokens = (float(x) for x in fit.law.slopes(fit.theta))
    i, j = (int(x) for x in fit.law.slopes(np.arange(fit.law.size)))
    cov = covariance(fit)
    gradient = np.array([1 / by_size, -1 / by_tokens])
    reach = math.sqrt(fdtri(1, fit.freedom, level) * (gradient @ cov[np.ix_([i, j], [i, j])] @ gradient))
    clear = math.sqrt(fdtri(1, fit.freedom, level))
    if by_size < clear * math.sqrt(cov[i, i]) or by_tokens < clear * math.sqrt(cov[j, j]):
        return RatioInterval(None, None)
    return RatioInterval(by_size / by_tokens * math.exp(-reach), by_size / by_tokens * math.exp(reach))


def _held_cost(fit: Fit, cells: Cells, start: np.ndarray, held: np.ndarray) -> np.ndarray:
    """[R] least cost under each constraint, NaN where the solver does not arrive. Neighbouring rows are
    neighbouring constraints: a row that fails starts again from the optimum of the nearest one that did not.
    """
    targets, weights = cells.targets[None], cells.weights[None].repeat(len(held), 0)
    found = fit_rows(fit.law, cells, targets, weights, start=start[None], held=held)
    theta, cost, good = found.theta.copy(), found.cost.copy(), found.converged.copy()
    for _ in range(_RETRIES):
        lost, known = np.flatnonzero(~good), np.flatnonzero(good)
        if lost.size == 0 or known.size == 0:
            break
        nearest = known[np.abs(lost[:, None] - known[None]).argmin(axis=1)]
        again = fit_rows(fit.law, cells, targets, weights[lost], start=theta[nearest], held=held[lost])
        theta[lost], cost[lost], good[lost] = again.theta, again.cost, again.converged
    return np.where(good, cost, np.nan)


def f_deviance(fit: Fit, level: float = 0.95) -> float:
    """The deviance cells * ln(SSE / least SSE) at which an F test with one degree of freedom rejects."""
    return fit.cells.u.size * math.log1p(float(fdtri(1, fit.freedom, level)) / fit.freedom)


def _curve(
    fit: Fit, cost: Callable[[np.ndarray], np.ndarray], scale: float, low: float, high: float
) -> tuple[tuple[float, float], ...]:
    margin = 0.5 * (high - low)
    angles = np.linspace(max(low - margin, 1e-3), min(high + margin, math.pi / 2 - 1e-3), _POINTS)
    deviance = fit.cells.u.size * np.log(np.maximum(cost(angles), fit.objective) / max(fit.objective, 1e-300))
    return tuple(
        (float(math.tan(a) * scale), float(d))
        for a, d in zip(angles, deviance, strict=True)
        if np.isfinite(d)
    )


def _crossings(
    cost: Callable[[np.ndarray], np.ndarray], centre: float, ends: tuple[float, float], limit: float
) -> list[float | None]:
    """For each end the first place from `centre` towards it where cost exceeds `limit`, or None where none
    does.
    """
    brackets: list[tuple[float, float] | None] = [(centre, end) for end in ends]
    for _ in range(_ROUNDS):
        live = [bracket for bracket in brackets if bracket is not None]
        if not live:
            break
        grids = [np.linspace(inside, outside, _POINTS + 1)[1:] for inside, outside in live]
        costs = iter(cost(np.concatenate(grids)).reshape(len(live), _POINTS))
        grid_of = iter(grids)
        brackets = [
            _narrowed(bracket, next(grid_of), next(costs), limit) if bracket else None for bracket in brackets
        ]
    return [None if bracket is None else (bracket[0] + bracket[1]) / 2 for bracket in brackets]


def _narrowed(
    bracket: tuple[float, float], grid: np.ndarray, cost: np.ndarray, limit: float
) -> tuple[float, float] | None:
    """The step of the grid in which `cost` first exceeds `limit`; None where it never does, or where a cost
    that is not known comes first: what was not computed is not rejected.
    """
    out = ~(cost <= limit)
    first = int(out.argmax())
    if not out[first] or np.isnan(cost[first]):
        return None
    return (float(grid[first - 1]) if first else bracket[0]), float(grid[first])


def bend_interval(best: Fit, level: float = 0.95) -> tuple[float | None, float | None]:
    """95% profile-F interval of lam, the curvature of a regular fit (0 is the log-linear law, 1/c is D = 0).

    lam belongs to N = 1 billion and V = 1, so the cells are described from there. None where it is unbounded.
    """
    cells = best.cells
    if best.freedom < 1 or best.loss == "huber" or cells.u.size > MANY_CELLS:
        return None, None
    plain = cells._replace(
        u=cells.u + cells.frame.ln_n, w=cells.w + cells.frame.ln_v, frame=type(cells.frame)(0.0, 0.0)
    )
    params = best.params
    centre = np.array([params["c"], params["a"], params["b"], params["lam"]])
    spread = _bend_error(best, plain, centre)

    def cost(values: np.ndarray) -> np.ndarray:
        held = np.column_stack(
            [np.zeros((values.size, 2)), np.full(values.size, 1 / spread), -values / spread]
        )
        return _held_cost(best, plain, centre, held)

    limit = _limit(best, level)
    for reach in (8 * spread, 64 * spread):
        low, high = _crossings(cost, centre[3], (centre[3] - reach, centre[3] + reach), limit)
        if low is not None and high is not None:
            break
    return low, high


def _bend_error(best: Fit, plain: Cells, centre: np.ndarray) -> float:
    moved = Fit(**{**best.__dict__, "cells": plain, "theta": centre})
    return float(np.sqrt(max(covariance(moved)[3, 3], 1e-24)))


def floor_ridge(best: Fit, floors: np.ndarray | None = None) -> list[dict[str, float]]:
    """For each D in `floors` below every error: the best K, alpha, beta of Y = K N^-alpha V^-beta + D, beside
    the regular fit `best` of which that is a slice.

    One row a D: {D, alpha, beta, ratio, deviance against the best regular law}. Shows what the paper's
    exponents are worth: they slide along this ridge while the ratio hardly moves.
    """
    cells, least = best.cells, float(best.table.error.min())
    if floors is None:
        floors = np.concatenate([-least * np.geomspace(200, 0.05, 24), least * np.linspace(0, 0.98, 30)])
    floors = floors[floors < least]
    if floors.size == 0:
        return []
    found = fit_rows(LAWS["power"], cells, cells.targets[None] - floors[:, None], cells.weights[None])
    deviance = cells.u.size * np.log(found.cost / max(best.sse, 1e-300))
    return [
        {
            "D": float(d),
            "alpha": float(t[1]),
            "beta": float(t[2]),
            "ratio": float(t[1] / t[2]),
            "deviance": float(x),
        }
        for d, t, x in zip(floors, found.theta, deviance, strict=True)
    ]
