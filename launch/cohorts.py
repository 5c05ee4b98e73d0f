"""Which cells of a sweep one process trains together: decided at the first launch, from then on fixed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.directory import cohort_folder, cohort_id
from launch.outcome import held_back, unfinished
from launch.state import CellDirectory
from launch.status import steps_done
from vlmscale.config import Cell, leaves
from vlmscale.records import read_json, write_json
from vlmscale.train.cohort import alike
from vlmscale.train.prepared import Prepared
from vlmscale.train.recipe import tower_source
from vlmscale.train.state import activation_bytes, state_bytes
from vlmscale.train.together import read_together

# Fields that cells of a cohort need not share. The others decide what a batch holds, and when something
# happens to all of them.
_OWN: dict[str, set[str] | None] = {
    "compressor": None,
    "llm": None,
    "evaluate": None,
    "train": {
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "clip_norm",
        "seed",
        "order_seed",
        "init_from",
        "compressor_rate",
        "llm_rate",
        "tower_rate",
        "final_rate",
        "beta2",
        "nonfinite",
        "remat",
        "loss_chunk",
    },
}
_MEMORY_SHARE = 0.7  # of what is free that cohorts may plan for


@dataclass(frozen=True)
class Cohort:
    """Cells that one process trains together, and its directory: of a cohort of one the cell's own."""

    id: str
    cells: tuple[CellDirectory, ...]
    path: Path

    @property
    def label(self) -> str:
        """Short name for progress."""
        first = self.cells[0].label
        return first if len(self.cells) == 1 else f"{len(self.cells)} cells, {first} ..."

    @property
    def finished(self) -> bool:
        """Nothing is left to do: each cell is done, or was left behind by the others."""
        return not unfinished(self.runs)

    @property
    def held_back(self) -> str:
        """Why what is left is not to be run until it is retried, or ""."""
        return held_back(self.runs)

    @property
    def runs(self) -> list[Path]:
        """Directories of its cells."""
        return [cell.path for cell in self.cells]

    @property
    def work(self) -> float:
        """Predicted work of all cells, in arbitrary units."""
        return sum(cell.work for cell in self.cells)

    @property
    def steps(self) -> int:
        """Steps that its cells train for."""
        return self.cells[0].cell.train.steps

    @property
    def done(self) -> int:
        """Steps done so far."""
        return max(map(steps_done, self.runs))


def fix_cohorts(
    cells: list[CellDirectory], out: Path, prepared: Prepared, workers: int, memory: float | None = None
) -> list[Cohort]:
    """The cohorts of a sweep: those that sweep.json holds, or planned now and written there.

    Args:
      cells: the whole sweep.
      out: its directory.
      prepared: the data of all cells.
      workers: processes that will run at a time; no fewer cohorts are made where there are cells for them.
      memory: bytes that a process may take; None for an equal share of what this machine has free.
    """
    path = out / "sweep.json"
    known = read_json(path)
    by_id = {cell.id: cell for cell in cells}
    if not known["cohorts"]:
        most = memory if memory is not None else _free_bytes() * _MEMORY_SHARE / workers
        planned = plan_cohorts(cells, prepared, workers, most)
        known["cohorts"] = [[cell.id for cell in cohort] for cohort in planned]
        write_json(path, known)
    return [make_cohort([by_id[name] for name in names], out) for names in known["cohorts"]]


def make_cohort(cells: Sequence[CellDirectory], out: Path) -> Cohort:
    """The cohort of these cells."""
    ids = [cell.id for cell in cells]
    folder = cells[0].path if len(cells) == 1 else cohort_folder(out, ids)
    return Cohort(cohort_id(ids), tuple(cells), folder)


def plan_cohorts(
    cells: Sequence[CellDirectory], prepared: Prepared, workers: int, memory: float
) -> list[list[CellDirectory]]:
    """Cells that can train together, in as many cohorts as keep all workers busy and fit into memory.

    Cells that share a cohort read the same samples in the same order. The longest come first, each to the
    cohort with the least work that still has room for it.

    Args:
      cells: the whole sweep.
      prepared: their data.
      workers: processes that will run at a time.
      memory: bytes that one may take.
    """
    every: list[list[CellDirectory]] = []
    for group in sharing(cells):
        for part in _by_order(group, prepared):
            every += _split(part, prepared, min(workers, len(part)), memory)
    return every


def sharing(cells: Sequence[CellDirectory]) -> list[list[CellDirectory]]:
    """Cells that may train together, as far as their configs tell."""
    groups: dict[str, list[CellDirectory]] = {}
    for cell in cells:
        groups.setdefault(_shared(cell), []).append(cell)
    return list(groups.values())


def _shared(cell: CellDirectory) -> str:
    """What cells of a cohort have in common, as far as the config tells."""
    config, train = cell.cell, cell.cell.train
    own = {
        name: value
        for name, value, _ in leaves(config)
        if (section := name.partition(".")[0]) not in _OWN
        or (_OWN[section] is not None and name.partition(".")[2] not in (_OWN[section] or ()))
    }
    order = train.seed if train.order_seed < 0 else train.order_seed
    alone = cell.id if train.tower_rate else tower_source(config)
    return json.dumps([own, order, alone], sort_keys=True)


def _by_order(cells: list[CellDirectory], prepared: Prepared) -> list[list[CellDirectory]]:
    """Cells that the data leaves in one order: where rows are packed, or texts cut, V has a say in it."""
    data = cells[0].cell.data
    by_count: dict[int, list[CellDirectory]] = {}
    for cell in cells:
        by_count.setdefault(cell.cell.compressor.visual_tokens, []).append(cell)
    if data.packing == "pack":
        return list(by_count.values())
    if data.packing == "none" and not data.row_length:
        return [cells]
    found: list[list[CellDirectory]] = []
    for same in by_count.values():
        for part in found:
            try:
                read_together(prepared, "train", [part[0].cell, same[0].cell], training=True)
            except ValueError:
                continue
            part.extend(same)
            break
        else:
            found.append(list(same))
    return found


def _split(
    cells: list[CellDirectory], prepared: Prepared, parts: int, memory: float
) -> list[list[CellDirectory]]:
    bins: list[list[CellDirectory]] = [[] for _ in range(parts)]
    needs = {cell.id: _bytes(cell.cell, prepared) for cell in cells}
    for bundle in sorted(_bundles(cells, needs, parts, memory), key=lambda bundle: -_work(bundle)):
        room = [part for part in bins if not part or _fits([*part, *bundle], needs, memory)]
        if not room:
            bins.append([])
            room = bins[-1:]
        min(room, key=_work).extend(bundle)
    order = {cell.id: number for number, cell in enumerate(cells)}
    return [sorted(part, key=lambda cell: order[cell.id]) for part in bins if part]


def _bundles(
    cells: list[CellDirectory], needs: dict[str, tuple[float, float]], parts: int, memory: float
) -> list[list[CellDirectory]]:
    """Cells that could run as one batched program stay together, if there is room and work for all parts."""
    found = [[cells[index] for index in indices] for indices in alike([cell.cell for cell in cells])]
    if len(found) < parts:
        return [[cell] for cell in cells]
    every = []
    for same in found:
        every += [same] if _fits(same, needs, memory) else [[cell] for cell in same]
    return every


def _work(cells: list[CellDirectory]) -> float:
    return sum(cell.work for cell in cells)


def _bytes(cell: Cell, prepared: Prepared) -> tuple[float, float]:
    """Memory of a cell's state, and of its activations, about."""
    rows = prepared.vocab_rows(cell)
    length = prepared.samples("train", cell).one_per_row().shape.length
    return state_bytes(cell, rows), activation_bytes(cell, rows, length)


def _fits(cells: list[CellDirectory], needs: dict[str, tuple[float, float]], memory: float) -> bool:
    """Whether the states of all cells and the activations of the largest have room: groups take turns."""
    states, activations = zip(*(needs[cell.id] for cell in cells), strict=True)
    return sum(states) + max(activations) <= memory


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
