"""What all cells of a sweep take together: apart, in cohorts, and with tower outputs that are stored once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlmscale.config import Cell
from vlmscale.models.sizes import TOWERS
from vlmscale.plan.fit import Fit
from vlmscale.plan.memory import device_bytes, training_places
from vlmscale.plan.roofline import Efficiencies, step_time, tower_time
from vlmscale.plan.slices import Slice
from vlmscale.train.features import stored_arrays
from vlmscale.train.frozen import needs_of
from vlmscale.train.recipe import trained_parts


@dataclass(frozen=True)
class Totals:
    """A sweep on a slice, in chip-hours.

    Attributes:
      topology: name of the slice.
      cells: how many fit.
      apart: each cell a run of its own that computes its tower in every step.
      towers: of these in towers.
      cohorts: how many, where cells of one LLM and stage train together as far as their states fit.
      together: the same cells in them, the tower once a batch for each cohort.
      stored: the same with a tower that runs once for all cells that read the same pictures.
      store_tib: what those outputs take on disk in bfloat16.
    """

    topology: str
    cells: int
    apart: float
    towers: float
    cohorts: int
    together: float
    stored: float
    store_tib: float


def totals(
    planned: Sequence[tuple[Cell, Fit | None]], place: Slice, shares: Efficiencies | None = None
) -> Totals:
    """Of cells that fit on a slice.

    Args:
      planned: cells, each with its fit.
      place: the slice.
      shares: efficiencies; None for those that are assumed.
    """
    fits = [(cell, fit) for cell, fit in planned if fit is not None and fit.fits]
    chips = place.chips / 3600

    def training(cell: Cell, fit: Fit) -> float:
        request = fit.train.request
        told = step_time(request.cell, place, request.mesh, request.length, fit.train.told.needed, shares)
        return chips * cell.train.steps * told.seconds

    def tower(cell: Cell, fit: Fit) -> float:
        return chips * cell.train.steps * tower_time(cell, place, shares) if "tower" in fit.parts else 0.0

    trained = sum(training(*pair) for pair in fits)
    towers = sum(tower(*pair) for pair in fits)
    groups = cohorts(fits)
    once = sum(max(tower(*pair) for pair in group) for group in groups)
    reading: dict[str, list[tuple[Cell, Fit]]] = {}
    for cell, fit in fits:
        reading.setdefault(pictures_key(cell), []).append((cell, fit))
    stored = sum(max(tower(*pair) for pair in group) for group in reading.values())
    nbytes = sum(store_bytes([cell for cell, _ in group]) for group in reading.values())
    return Totals(
        place.name,
        len(fits),
        trained + towers,
        towers,
        len(groups),
        trained + once,
        trained + stored,
        nbytes / 2**40,
    )


def cohorts(fits: Sequence[tuple[Cell, Fit]]) -> list[list[tuple[Cell, Fit]]]:
    """Cells that could train together: of one LLM, stage, data and mesh, as many as fit by their states.

    What does not train lies on the devices once; of the temporaries the largest counts.
    """
    alike: dict[str, list[tuple[Cell, Fit]]] = {}
    for cell, fit in fits:
        key = [cell.llm.name, sorted(trained_parts(cell)), pictures_key(cell), fit.train.request.mesh]
        alike.setdefault(json.dumps(key), []).append((cell, fit))
    found = []
    for cells in alike.values():
        group: list[tuple[Cell, Fit]] = []
        for pair in cells:
            if group and not _together([*group, pair]):
                found.append(group)
                group = []
            group.append(pair)
        found.append(group)
    return found


def _together(group: Sequence[tuple[Cell, Fit]]) -> bool:
    """Whether the states of cells fit beside the largest of their temporaries."""
    parts = [fit.train for _, fit in group]
    request = parts[0].request
    shared = device_bytes(training_places(request.cell, request.mesh).frozen)
    states = shared + sum(part.told.arguments - shared for part in parts)
    rest = max(part.told.needed - part.told.arguments + part.beside for part in parts)
    return states + rest <= parts[0].told.limit


def pictures_key(cell: Cell) -> str:
    """What cells share that can read the same tower outputs in the same order."""
    parts: dict[str, Any] = {"data": asdict(cell.data), "tower": cell.tower.name}
    parts["steps"] = [cell.train.steps, cell.train.batch_size, cell.train.order_seed]
    return json.dumps(parts, sort_keys=True)


def store_bytes(cells: Sequence[Cell]) -> int:
    """Of the outputs that cells read of the tower they share, one picture a row of every batch; bfloat16."""
    seeing = [cell for cell in cells if cell.compressor.visual_tokens and not cell.train.tower_rate]
    if not seeing:
        return 0
    first, needs = seeing[0], frozenset().union(*map(needs_of, seeing))
    arrays = stored_arrays(TOWERS[first.tower.name], needs, "bfloat16")
    return first.train.steps * first.train.batch_size * sum(spec.nbytes for spec in arrays.values())
