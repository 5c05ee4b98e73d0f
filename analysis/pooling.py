"""Slopes of each task, and partial pooling between tasks: an average of tasks hides how far they differ.

Each task is fitted alone (least squares of its error on ln N and ln V); its slopes are then drawn towards
their mean as far as their standard errors, against the spread between tasks, allow (a normal random-effects
model with the Paule-Mandel variance).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.data import Table


@dataclass(frozen=True)
class Slope:
    """A fall of error per unit of ln N or ln V (in units of score): estimate, standard error, 95% t interval,
    and the same after partial pooling (normal interval).
    """

    value: float
    error: float
    interval: tuple[float, float]
    pooled: float
    pooled_interval: tuple[float, float]


@dataclass(frozen=True)
class TaskSlopes:
    """One task: its slopes along ln N and ln V (None where that axis has one level) and their pooled
    ratio.
    """

    task: str
    cells: int
    slope_n: Slope | None
    slope_v: Slope | None

    @property
    def ratio(self) -> float | None:
        """Pooled slope along ln N over pooled slope along ln V, or None where one is missing or not
        positive.
        """
        if self.slope_n is None or self.slope_v is None or min(self.slope_n.pooled, self.slope_v.pooled) <= 0:
            return None
        return self.slope_n.pooled / self.slope_v.pooled


@dataclass(frozen=True)
class Pooled:
    """All tasks of a group. mean_n, mean_v: (mean slope over tasks, its standard error); spread_n, spread_v:
    sd of the true slopes between tasks.
    """

    tasks: tuple[TaskSlopes, ...]
    mean_n: tuple[float, float] | None
    mean_v: tuple[float, float] | None
    spread_n: float
    spread_v: float

    @property
    def ratio(self) -> float | None:
        """Ratio of the mean slopes."""
        return self.mean_n[0] / self.mean_v[0] if self.mean_n and self.mean_v and self.mean_v[0] > 0 else None


def pool(tables: tuple[Table, ...]) -> Pooled | None:
    """Slopes of every task that has enough cells, pooled; None where none has."""
    known = [(table, _task_slopes(table)) for table in tables]
    usable = [(table, slopes) for table, slopes in known if slopes is not None]
    if not usable:
        return None
    by_n = _partial([slopes[0] for _, slopes in usable])
    by_v = _partial([slopes[1] for _, slopes in usable])
    tasks = tuple(
        TaskSlopes(table.group, table.n.size, n, v)
        for (table, _), n, v in zip(usable, by_n.slopes, by_v.slopes, strict=True)
    )
    return Pooled(tasks, by_n.mean, by_v.mean, by_n.spread, by_v.spread)


_Raw = tuple[float, float, int] | None


def _task_slopes(table: Table) -> tuple[_Raw, _Raw] | None:
    """(estimate, standard error, freedom) along ln N and ln V by least squares, None for an axis with one
    level.
    """
    axes = [np.log(table.n), np.log(table.v)]
    varies = [np.unique(axis).size > 1 for axis in axes]
    x = np.column_stack(
        [np.ones(table.n.size), *(-axis for axis, moves in zip(axes, varies, strict=True) if moves)]
    )
    freedom = table.n.size - x.shape[1]
    if x.shape[1] == 1 or freedom < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
        return None
    found = np.linalg.lstsq(x, table.error, rcond=None)[0]
    noise = float(((table.error - x @ found) ** 2).sum()) / freedom
    errors = np.sqrt(noise * np.diag(np.linalg.inv(x.T @ x)))
    places = iter(range(1, x.shape[1]))
    result: list[_Raw] = []
    for moves in varies:
        i = next(places) if moves else 0
        result.append((float(found[i]), float(errors[i]), freedom) if moves else None)
    return result[0], result[1]


@dataclass(frozen=True)
class _Partial:
    slopes: list[Slope | None]
    mean: tuple[float, float] | None
    spread: float


def _partial(raw: list[_Raw]) -> _Partial:
    known = [item for item in raw if item is not None]
    if not known:
        return _Partial([None] * len(raw), None, 0.0)
    value = np.array([item[0] for item in known])
    variance = np.maximum(np.array([item[1] for item in known]) ** 2, 1e-18)
    between = _between(value, variance)
    weight = 1 / (variance + between)
    mean = float(weight @ value / weight.sum())
    pooled = mean + between / (between + variance) * (value - mean)
    # The uncertainty of the mean reaches each task as far as it was drawn towards it.
    left = np.sqrt(
        between * variance / (between + variance) + (variance / (between + variance)) ** 2 / weight.sum()
    )
    slopes: list[Slope | None] = []
    position = iter(range(len(known)))
    for item in raw:
        if item is None:
            slopes.append(None)
            continue
        i = next(position)
        reach = float(stdtrit(item[2], 0.975)) * item[1]
        slopes.append(
            Slope(
                item[0],
                item[1],
                (item[0] - reach, item[0] + reach),
                float(pooled[i]),
                (float(pooled[i] - 1.96 * left[i]), float(pooled[i] + 1.96 * left[i])),
            )
        )
    return _Partial(slopes, (mean, float(1 / math.sqrt(weight.sum()))), math.sqrt(between))


def _between(value: np.ndarray, variance: np.ndarray) -> float:
    """Paule and Mandel's variance between tasks: the t >= 0 with sum (x - mean)^2 / (variance + t) = tasks -
    1.
    """
    if value.size < 2:
        return 0.0

    def excess(t: float) -> float:
        weight = 1 / (variance + t)
        mean = weight @ value / weight.sum()
        return float(weight @ (value - mean) ** 2) - (value.size - 1)

    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, float(np.ptp(value) ** 2 + variance.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high
