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


def copied_cells(table: Table) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of different cells whose errors agree in eight or more decimals: likely a copy.

    Only where item counts are unknown: a score counted over a few items repeats honestly.
    """
    seen: dict[float, int] = {}
    pairs = []
    for i, error in enumerate(table.error):
        score = round(1 - float(error), 12)
        if np.isfinite(table.n_items[i]) or abs(score * 1e7 - round(score * 1e7)) < 1e-3:
            continue
        if score in seen:
            pairs.append((seen[score], i))
        seen.setdefault(score, i)
    return pairs
