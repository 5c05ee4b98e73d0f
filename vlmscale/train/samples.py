"""The conversations of a split as one cell reads them, and how they are laid out in rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlmscale.compressors import COMPRESSORS
from vlmscale.config import Cell, image_slots, parse_mixture
from vlmscale.cost.image import Sample
from vlmscale.data.conversation import Template
from vlmscale.data.dataset import Dataset
from vlmscale.data.lengths import Lengths, concatenate
from vlmscale.data.packing import Shape, choose_images
from vlmscale.data.pipeline import Layout
from vlmscale.data.schedule import Schedule
from vlmscale.data.sources import Source
from vlmscale.errors import UserError


@dataclass(frozen=True)
class Samples:
    """The conversations of a split as one cell reads them: cut to its rows, with its pictures.

    `cut` is how many are longer than `data.row_length`, `emptied` how many of these have nothing to learn
    from within it and are left out.
    """

    cell: Cell
    source: Source
    datasets: list[Dataset]
    by_dataset: list[Lengths]
    template: Template
    cut: int
    emptied: int

    @cached_property
    def lengths(self) -> Lengths:
        """Of all of them."""
        return concatenate(self.by_dataset)

    @cached_property
    def usable(self) -> np.ndarray:
        """Numbers of those that have something to learn from.

        Raises:
          UserError: there is none.
        """
        found = np.flatnonzero(self.lengths.supervised)
        if not len(found):
            raise UserError(
                f"data.row_length={self.cell.data.row_length}: no conversation has a word of an answer "
                f"within it, with {image_slots(self.cell)} tokens a picture; raise it"
            )
        return found

    def _used(self) -> Lengths:
        """Of those that are usable: others must not set the size of every batch."""
        return Lengths(*(column[self.usable] for column in self.lengths))

    def one_per_row(self) -> Layout:
        """Rows of one conversation each, as those of an evaluation are."""
        method, tokens = COMPRESSORS[self.cell.compressor.name], image_slots(self.cell)
        return Layout.one_per_row(
            self._used(),
            tokens,
            pad_id=self.template.pad,
            image_id=self.template.image,
            row_length=self.cell.data.row_length,
            queries=method.text == "query" and tokens > 0,
            spare=tokens if method.trains_all else 0,
        )

    def training(self) -> tuple[Layout, Schedule]:
        """Static shapes of training batches, and which conversations come when.

        Raises:
          UserError: nothing is left to train on.
        """
        data, tokens = self.cell.data, image_slots(self.cell)
        starts = np.cumsum([0, *map(len, self.datasets)])
        usable = tuple(
            start + np.flatnonzero(lengths.supervised)
            for start, lengths in zip(starts, self.by_dataset, strict=False)
        )
        lengths, layout = self.lengths, self.one_per_row()
        sizes, images = lengths.sizes(tokens), lengths.images if tokens else np.zeros_like(lengths.images)
        if data.packing == "pack":
            every = self.usable
            slots = choose_images(sizes[every], images[every], data.pack_rows, data.row_length)
            layout = Layout.packed(
                Shape(data.pack_rows, data.row_length, slots if tokens else 0),
                self._used(),
                tokens,
                pad_id=layout.pad_id,
                image_id=layout.image_id,
                queries=layout.query_length > 0,
            )
        weights = tuple(weight for _, weight in parse_mixture(data.prepared)) or (1.0,)
        words = np.concatenate([dataset.index.words for dataset in self.datasets])
        train = self.cell.train
        seed = train.seed if train.order_seed < 0 else train.order_seed
        schedule = Schedule(
            data.packing,
            layout.shape,
            sizes,
            images,
            words,
            usable,
            weights,
            train.batch_size,
            seed,
            train.loss_rows,
        )
        return layout, schedule

    def record_id(self, number: int) -> str:
        """Id of the record that a sample, numbered over all data sets, is made of."""
        for dataset in self.datasets:
            if number < len(dataset):
                return dataset.record(number).id
            number -= len(dataset)
        raise IndexError(number)

    def average(self) -> Sample:
        """The average conversation that training is shown; padding is not counted."""
        weights, sums = [weight for _, weight in parse_mixture(self.cell.data.prepared)] or [1.0], []
        for weight, lengths in zip(weights, self.by_dataset, strict=True):
            used = lengths.supervised > 0
            columns = (lengths.text, lengths.supervised, lengths.query, lengths.images)
            sums.append([weight * used.sum(), *(weight * column[used].sum() for column in columns)])
        count, text, targets, query, images = np.sum(sums, axis=0)
        return Sample(
            float(text / count), float(targets / count), float(query / count), float(images / count)
        )

    def describe(self, layout: Layout, schedule: Schedule) -> dict[str, Any]:
        """How the first epoch is laid out, for data.json: shapes, and what of them is real."""
        shape, chosen = layout.shape, schedule.chosen(0)
        rows = schedule.rows(0) or len(schedule(0).row_offsets) - 1
        slots = rows // shape.rows * shape.images
        return {
            "conversations": len(chosen),
            "cut": self.cut,
            "left_out": self.emptied,
            "rows": rows,
            "row_length": shape.length,
            "rows_a_block": shape.rows,
            "image_slots_a_block": shape.images,
            "positions_used": float(schedule.sizes[chosen].sum() / (rows * shape.length)),
            "image_slots_used": float(schedule.images[chosen].sum() / slots) if slots else 1.0,
        }
