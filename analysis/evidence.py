"""What the cells say without any law: does error fall with N, and with V, and are there suspicious cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.data import Table


@dataclass(frozen=True)
class Falling:
    """Neighbouring pairs of cells along one axis: how many there are and in how many the error falls."""

    pairs: int
    falling: int

    @property
    def share(self) -> float | None:
        """falling / pairs, or None without a pair."""
        return self.falling / self.pairs if self.pairs else None


def monotonicity(table: Table) -> dict[str, Falling]:
    """Keys 'n' and 'v': neighbours in N at the same V, and neighbours in V (>= 1) at the same N."""
    return {"n": _count(table.v, table.n, table.error), "v": _count(table.n, table.v, table.error)}


def _count(fixed: np.ndarray, moving: np.ndarray, error: np.ndarray) -> Falling:
    pairs = falling = 0
    for value in np.unique(fixed):
        line = np.flatnonzero(fixed == value)
        line = line[np.argsort(moving[line], kind="stable")]
        steps = np.diff(moving[line]) > 0
        pairs += int(steps.sum())
        falling += int(((np.diff(error[line]) < 0) & steps).sum())
    return Falling(pairs, falling)


def blind_gain(table: Table) -> tuple[int, int]:
    """(helped, cells): cells with a no-image reference of their LLM, and how many have less error."""
    known = [
        (e, table.blind[name])
        for e, name in zip(table.error, table.llm_name, strict=True)
        if name in table.blind
    ]
    return sum(1 for error, reference in known if error < reference), len(known)


def at_chance(table: Table) -> int | None:
    """How many cells are within two sampling sd of guessing, or None where chance or item counts are not
    recorded.
    """
    known = np.isfinite(table.chance) & np.isfinite(table.sampling_sd)
    if not known.any():
        return None
    score = 1 - table.error[known]
    return int((score <= table.chance[known] + 2 * table.sampling_sd[known]).sum())


def iso_cost_pairs(table: Table, price: np.ndarray, within: float = 0.15) -> Falling:
    """Pairs of cells of equal cost (within 15%), one with the larger LLM and the other with more visual
    tokens: how many there are, and in how many the larger LLM has less error. price: [cells].
    """
    n, v = table.n, table.v
    larger = (n[:, None] > n[None]) & (v[:, None] < v[None])
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.abs(np.log(price[:, None] / price[None])) <= np.log1p(within)
    both = larger & near
    return Falling(int(both.sum()), int((both & (table.error[:, None] < table.error[None])).sum()))
