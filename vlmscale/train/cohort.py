"""Cells that one program trains: their groups, and what each group runs on a batch that all share.

A *group* is a cell, or several of one shape that differ in seed and learning rate alone and are batched with
vmap. Groups take the same batch one after the other; what does not train lies on the devices once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vlmscale.config import Cell, leaves
from vlmscale.models.vlm import VLM
from vlmscale.sharding import replicated
from vlmscale.train.prepared import Prepared
from vlmscale.train.program import Step, make_program
from vlmscale.train.recipe import tower_source, trained_parts
from vlmscale.train.state import Places, first_params, first_state, stack_states, unstack_params
from vlmscale.train.step import Knobs, Params, TrainState

_TRIALS = 3  # timed steps of each way to run cells of one shape


class Member(NamedTuple):
    """A cell of a cohort and its run directory."""

    cell: Cell
    run: Path


@dataclass
class Group:
    """Cells of one program and their state.

    Attributes:
      indices: of its cells in the cohort.
      members: those cells.
      model: that they have.
      places: where parameters live, of one cell.
      step: from (state, frozen, batch, knobs) to (state, metrics); of several cells all but frozen and batch
        have a first axis for them.
      abstract: shapes and places of the state.
      knobs: what tells the cells apart.
      frozen: parameters that do not train.
      state: set before the first step.
      failed: step at which a cell's numbers stopped being finite, by place in the group.
    """

    indices: tuple[int, ...]
    members: tuple[Member, ...]
    model: VLM
    places: Places
    step: Step
    optimizer: Any
    abstract: TrainState
    knobs: Knobs
    frozen: Params = field(default_factory=dict)
    state: TrainState | None = None
    failed: dict[int, int] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """One of them; all are alike but for seed and learning rate."""
        return self.members[0].cell

    @property
    def alive(self) -> bool:
        """Whether any of its cells still trains."""
        return len(self.failed) < len(self.members)

    def params(self, place: int) -> Params:
        """What one of its cells has trained."""
        assert self.state is not None
        return unstack_params(self.state, place, len(self.members))

    def of_cell(self, values: Any, place: int) -> Any:
        """Metrics of one of its cells, fetched ones."""
        return jax.tree.map(lambda x: x[place], values) if len(self.members) > 1 else values


class Groups:
    """The groups of a cohort on a mesh, with what they share."""

    def __init__(
        self,
        members: Sequence[Member],
        prepared: Prepared,
        mesh: Mesh,
        block_rows: int,
        batched: Callable[[Sequence[int]], bool],
    ) -> None:
        """Lay everything out; nothing is computed yet.

        Args:
          members: the cells.
          prepared: their data.
          mesh: the devices.
          block_rows: rows that share their images.
          batched: whether cells of one shape, given by number, run as one program.

        Raises:
          UserError: a large parameter would lie whole on every device.
        """
        self.members, self.mesh, self.prepared = members, mesh, prepared
        tower_cell = next((m.cell for m in members if prepared.needs_tower(m.cell)), None)
        self.tower = prepared.tower(tower_cell) if tower_cell is not None else None
        self.block_rows = block_rows
        self.groups: list[Group] = []
        self._frozen: dict[Any, Any] = {}
        for indices in alike([member.cell for member in members]):
            together = len(indices) > 1 and batched(indices)
            for part in [indices] if together else [(index,) for index in indices]:
                self.groups.append(self.lay_out(part, [members[index] for index in part]))

    def lay_out(self, indices: Sequence[int], members: Sequence[Member]) -> Group:
        """A group of these cells, without a state."""
        cell, mesh, count = members[0].cell, self.mesh, len(members)
        vocab = self.prepared.vocab_rows(cell)
        program = make_program(cell, vocab, mesh, self.host_tower(cell), self.block_rows, count)
        rates: Any = np.array([member.cell.train.learning_rate for member in members], np.float32)
        seeds: Any = np.array([member.cell.train.seed for member in members], np.uint32)
        knobs = Knobs(rates, seeds) if count > 1 else Knobs(rates[0], seeds[0])
        placed: Knobs = jax.device_put(knobs, replicated(mesh))
        return Group(tuple(indices), tuple(members), *program, placed)

    @property
    def shared_tower(self) -> Params | None:
        """The frozen tower on the devices, once all groups have begun; None where none computes with one."""
        found: Params | None = next((x for (part, *_), x in self._frozen.items() if part == "tower"), None)
        return found

    def host_tower(self, cell: Cell) -> Params | None:
        """The tower's parameters on the host where a cell computes with them."""
        return self.tower if self.prepared.needs_tower(cell) else None

    def begin(self, group: Group, tell: Callable[[str], None]) -> None:
        """Set a group's first state, and what of it is frozen."""
        states = []
        for member in group.members:
            only = group.places.trained
            params, told = first_params(
                member.cell, group.model, group.places, self.host_tower(member.cell), only
            )
            states.append(first_state(group.optimizer, params, self.mesh))
            for line in told:
                tell(line)
        group.state = stack_states(states)
        self.set_frozen(group, tell)

    def set_frozen(self, group: Group, tell: Callable[[str], None]) -> None:
        """Bring what a group does not train onto the devices, once for all groups that have it in common."""
        frozen: Params = {}
        for part in group.places.frozen:
            key = frozen_key(group.cell, part)
            if key not in self._frozen:
                made, told = first_params(
                    group.cell, group.model, group.places, self.host_tower(group.cell), [part]
                )
                self._frozen[key] = made[part]
                for line in told:
                    tell(line)
            frozen[part] = self._frozen[key]
        group.frozen = frozen


def frozen_key(cell: Cell, part: str) -> Any:
    """What a part that does not train depends on: cells with the same key share it."""
    train, compressor = cell.train, cell.compressor
    if part == "tower":
        return part, tower_source(cell), train.dtype
    of_part = (
        (cell.llm.name, cell.llm.checkpoint)
        if part == "decoder"
        else (compressor.name, compressor.visual_tokens, compressor.options, cell.llm.name)
    )
    drawn = None if part == "decoder" and cell.llm.checkpoint else train.seed
    return part, train.init_from, train.dtype, drawn, *of_part


def alike(cells: Sequence[Cell]) -> list[tuple[int, ...]]:
    """Numbers of cells that one batched program could train, those that no other is like alone."""
    found: dict[Any, list[int]] = {}
    for index, cell in enumerate(cells):
        own = {name: value for name, value, _ in leaves(cell)}
        for name in ("train.seed", "train.learning_rate"):
            del own[name]
        parts = ("decoder", "compressor", "tower")  # a reducer has parameters only where it trains
        frozen = tuple(frozen_key(cell, part) for part in parts if part not in trained_parts(cell))
        found.setdefault((json.dumps(own, sort_keys=True), frozen), []).append(index)
    return [tuple(indices) for indices in found.values()]


def faster_together(
    make: Callable[[Sequence[int]], Group], indices: Sequence[int], batch: Callable[[int], dict[str, Any]]
) -> dict[str, float]:
    """Measure both ways to run cells of one shape on one batch.

    Args:
      make: gives a group of cells with a first state.
      indices: the cells.
      batch: what a cell reads of the batch.

    Returns:
      Seconds of a step of all of them, "batched" and "apart"; the fastest of a few.
    """
    ways: dict[str, list[tuple[int, ...]]] = {
        "batched": [tuple(indices)],
        "apart": [(index,) for index in indices],
    }
    seconds = {}
    for name, parts in ways.items():
        groups = [make(part) for part in parts]
        times = []
        for _ in range(_TRIALS + 1):  # the first compiles
            start = time.perf_counter()
            for group in groups:
                group.state, _ = group.step(group.state, group.frozen, batch(group.indices[0]), group.knobs)
            jax.block_until_ready([group.state for group in groups])
            times.append(time.perf_counter() - start)
        seconds[name] = min(times[1:])
    return seconds
