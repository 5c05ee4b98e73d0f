"""What the cells of a cohort read together: one stream of samples, its pictures once, and rows for each V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlmscale.config import Cell
from vlmscale.data.pipeline import Batch, Batches, Layout, batches, in_order, of_layout
from vlmscale.data.schedule import Schedule
from vlmscale.data.sources import Source
from vlmscale.models.sizes import TOWERS
from vlmscale.sharding import put_batch
from vlmscale.train.frozen import needs_of
from vlmscale.train.prepared import Prepared
from vlmscale.train.recipe import compute_dtype
from vlmscale.train.samples import Samples
from vlmscale.train.step import Params, encode

Part = tuple[int, int]  # which part of every batch's rows a process makes, of how many


@dataclass(frozen=True)
class Reading:
    """A split as several cells read it.

    Attributes:
      cells: whose tower and order of samples are the same.
      samples: of each cell.
      layouts: the distinct ways of laying out rows, the first with the pictures if there are any.
      number: of each cell's layout.
      schedules: of each cell's training, in the same order; None for a split that is read in order.
    """

    cells: tuple[Cell, ...]
    samples: tuple[Samples, ...]
    layouts: tuple[tuple[Source, Layout], ...]
    number: tuple[int, ...]
    schedules: tuple[Schedule | None, ...]

    @property
    def layout(self) -> Layout:
        """The first."""
        return self.layouts[0][1]

    def training(self, batch_size: int, step: int, workers: int, part: Part) -> Batches:
        """Endless batches from a step on."""
        (source, layout), *also = self.layouts
        schedule = self.schedules[0]
        assert schedule is not None
        process, processes = part
        return batches(
            source,
            layout,
            schedule,
            batch_size,
            step,
            also=also,
            workers=workers,
            process=process,
            processes=processes,
        )

    def in_order(self, batch_size: int, part: Part) -> Iterator[Batch]:
        """Every usable sample once."""
        (source, layout), *also = self.layouts
        process, processes = part
        usable = self.samples[0].usable
        return in_order(
            source, layout, batch_size, samples=usable, also=also, process=process, processes=processes
        )

    def describe(self, index: int) -> dict[str, Any]:
        """How the first epoch is laid out for a cell, for data.json."""
        schedule = self.schedules[index]
        assert schedule is not None
        return self.samples[index].describe(self.layouts[self.number[index]][1], schedule)

    def of_cell(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        """What a cell reads of a batch, on the devices or the host."""
        cell = self.cells[index]
        reads = {"selected", "pixels", *needs_of(cell)} if cell.compressor.visual_tokens else set()
        return of_layout(batch, self.number[index], reads & batch.keys())


def read_together(prepared: Prepared, split: str, cells: Sequence[Cell], training: bool) -> Reading:
    """How cells read a split together.

    Args:
      prepared: their data.
      split: "train" or "validation".
      cells: that share tower and order of samples.
      training: in rows as they are trained on; else one conversation a row.

    Raises:
      UserError: nothing is left to train on.
      ValueError: the cells do not see the same samples in the same order.
    """
    readers = prepared.pictures(split, cells)
    blind: list[Any] = [None] * len(readers)
    found: dict[tuple[Any, ...], tuple[int, Source, Layout]] = {}
    samples, number, schedules = [], [], []
    # Cells with pictures first: the first layout carries them.
    order = sorted(range(len(cells)), key=lambda index: cells[index].compressor.visual_tokens == 0)
    for index in order:
        own = prepared.samples(split, cells[index], blind if found else readers)
        layout, schedule = own.training() if training else (own.one_per_row(), None)
        # How texts are cut depends on what the layout does not say.
        key = (layout, cells[index].data.row_length and cells[index].compressor.visual_tokens)
        found.setdefault(key, (len(found), own.source, layout))
        samples.append(own)
        number.append(found[key][0])
        schedules.append(schedule)
    first, schedule = samples[0], schedules[0]
    for own, other in zip(samples, schedules, strict=True):
        same = np.array_equal(own.usable, first.usable) and np.array_equal(
            own.lengths.images, first.lengths.images
        )
        if not same or (schedule is not None and other is not None and not schedule.same_order(other)):
            raise ValueError("cells of a cohort must read the same samples in the same order")
    back = np.argsort(order)
    return Reading(
        tuple(cells),
        tuple(samples[at] for at in back),
        tuple((source, layout) for _, source, layout in found.values()),
        tuple(number[at] for at in back),
        tuple(schedules[at] for at in back),
    )


Encode = Callable[[dict[str, Any]], dict[str, Any]]


def make_encode(cells: Sequence[Cell], tower: Params | None, accumulate: int = 1) -> Encode:
    """What makes tower outputs of a batch's pixels, once for all cells; nothing where there is nothing to do.

    Args:
      cells: that share the tower.
      tower: its parameters on the devices; None where it trains (then each step runs it) or is not needed.
      accumulate: parts that the batch comes in, computed one after the other.
    """
    seeing = [cell for cell in cells if cell.compressor.visual_tokens]
    if tower is None or not seeing or seeing[0].data.features != "computed":
        return lambda batch: batch
    outputs = tower_program(seeing, accumulate)

    def complete(batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: values for name, values in batch.items() if name != "pixels"}
        return rest | outputs(tower, batch["pixels"])

    return complete


def tower_program(cells: Sequence[Cell], accumulate: int = 1) -> Any:
    """The jitted function from (the tower's parameters, pixels) to its outputs.

    Args:
      cells: that share the tower, each with visual tokens.
      accumulate: as in `make_encode`.
    """
    size, needs = TOWERS[cells[0].tower.name], frozenset().union(*map(needs_of, cells)) - {"tower"}
    train = cells[0].train
    run = partial(encode, size, needs, dtype=compute_dtype(train), attention=train.attention)

    @jax.jit
    def outputs(tower: Params, pixels: jax.Array) -> dict[str, Any]:
        if accumulate == 1:
            return run(tower, {"pixels": pixels})
        made: dict[str, Any] = jax.lax.map(lambda part: run(tower, {"pixels": part}), pixels)
        return made

    return outputs


def make_put(mesh: Mesh, part: Part, accumulate: int = 1) -> Callable[[Batch], dict[str, Any]]:
    """What brings a host batch onto the devices."""
    return lambda batch: put_batch(batch, mesh, part[1], accumulate)
