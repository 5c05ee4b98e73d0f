"""Methods beside each other on one LLM: error against visual tokens and against FLOPs, without any law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.data import Table

_Z = 1.96
_GROUPS = {"reasoning": 0, "ocr": 1}


@dataclass(frozen=True)
class Point:
    """One method at one V. What the data lack is NaN.

    interval: 95%, from the sampling noise of the test items alone; None where item counts are not known.
    by_group: the error of each task group. infer_flops: a whole answer. without_tower: the same without the
    vision tower. best_at_v, best_at_flops: Pareto-best, for no point of the LLM with as few tokens (FLOPs)
    has as low an error.
    """

    method: str
    v: float
    error: float
    interval: tuple[float, float] | None
    by_group: dict[str, float]
    n_items: float
    seeds: float
    infer_flops: float
    without_tower: float
    tower_flops: float
    compressor_flops: float
    query_flops: float
    compressor_params: float
    best_at_v: bool
    best_at_flops: bool


@dataclass(frozen=True)
class Comparison:
    """The methods measured on one LLM.

    methods: by name, in the order of the data. points: by V, then error. tasks: over which the error is a
    plain mean. groups: of tasks; empty where there is only one. blind: the error without an image, or None.
    """

    llm_name: str
    n: float
    methods: tuple[str, ...]
    points: tuple[Point, ...]
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    blind: float | None

    def of(self, method: str) -> list[Point]:
        """The points of one method, by V."""
        return [point for point in self.points if point.method == method]


def compare(tables: Sequence[Table]) -> tuple[Comparison, ...]:
    """One comparison an LLM that has several methods, smallest LLM first; see `Dataset.methods`."""
    sizes = {name: n for table in tables for name, n in zip(table.llm_name, table.n.tolist(), strict=True)}
    groups = [{part.group for part in table.by_task} for table in tables if table.n.size]
    shared = (
        sorted(set.intersection(*groups), key=lambda name: (_GROUPS.get(name, 2), name)) if groups else []
    )
    found = []
    for name, n in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        own = [table for table in tables if name in table.llm_name]
        if len(own) < 2:
            continue
        blind = next((table.blind[name] for table in own if name in table.blind), None)
        columns = tuple(shared) if len(shared) > 1 else ()
        methods = tuple(table.group for table in own)
        points = _points(own, name, columns)
        found.append(Comparison(name, n, methods, points, own[0].tasks, columns, blind))
    return tuple(found)


def _points(tables: list[Table], llm_name: str, groups: tuple[str, ...]) -> tuple[Point, ...]:
    cells = [(table, i) for table in tables for i, name in enumerate(table.llm_name) if name == llm_name]
    error = np.array([table.error[i] for table, i in cells])
    best_v = _unbeaten(np.array([table.v[i] for table, i in cells]), error)
    best_flops = _unbeaten(np.array([table.infer_flops[i] for table, i in cells]), error)
    points = [
        Point(
            method=table.group,
            v=float(table.v[i]),
            error=float(table.error[i]),
            interval=_interval(float(table.error[i]), float(table.sampling_sd[i])),
            by_group={
                part.group: _error_at(part, llm_name, float(table.v[i]))
                for part in table.by_task
                if part.group in groups
            },
            n_items=float(table.n_items[i]),
            seeds=float(table.seeds[i]),
            infer_flops=float(table.infer_flops[i]),
            without_tower=float(table.infer_flops[i] - table.tower_flops[i]),
            tower_flops=float(table.tower_flops[i]),
            compressor_flops=float(table.compressor_flops[i]),
            query_flops=float(table.query_flops[i]),
            compressor_params=float(table.compressor_params[i]),
            best_at_v=bool(best_v[k]),
            best_at_flops=bool(best_flops[k]),
        )
        for k, (table, i) in enumerate(cells)
    ]
    return tuple(sorted(points, key=lambda point: (point.v, point.error, point.method)))


def _interval(error: float, noise: float) -> tuple[float, float] | None:
    if not math.isfinite(noise) or noise == 0:  # all items right or all wrong: nothing to tell the noise by
        return None
    return max(0.0, error - _Z * noise), min(1.0, error + _Z * noise)


def _error_at(table: Table, llm_name: str, v: float) -> float:
    """The error of one cell of a group; NaN where the group lacks it."""
    for i, name in enumerate(table.llm_name):
        if name == llm_name and table.v[i] == v:
            return float(table.error[i])
    return math.nan


def _unbeaten(price: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[points] whether no point is at most as dear and at most as wrong, and better in one of the two."""
    with np.errstate(invalid="ignore"):
        no_dearer, no_worse = price[None] <= price[:, None], error[None] <= error[:, None]
        better = (price[None] < price[:, None]) | (error[None] < error[:, None])
    return np.isfinite(price) & ~(no_dearer & no_worse & better).any(axis=1)
