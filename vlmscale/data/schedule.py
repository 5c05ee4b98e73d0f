"""Which conversations stand in which rows of an epoch: a pure function of it, for each way of packing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmscale.data.packing import (
    Plan,
    Shape,
    epoch_samples,
    group_by_modality_length,
    one_per_row,
    plan,
)


@dataclass(frozen=True)
class Schedule:
    """The plan of every epoch, for the pipeline; picklable.

    Samples are numbered over all data sets of a mixture, one behind the other.

    Attributes:
      packing: "none", "pack" or "modality_length", as in `DataConfig`.
      shape: of a block.
      sizes: [n] positions that each sample takes in a row.
      images: [n] images that each shows.
      words: [n] LLaVA's lengths, read by "modality_length".
      usable: of each data set the samples that have something to learn.
      weights: how often each data set is shown in an epoch.
      batch_size: rows of a batch, within which "modality_length" sorts.
      seed: of the order.
      device_rows: rows that have a mean of their own in the loss, as those of a device in LLaVA:
        "modality_length" deals conversations to them so that each group has about as many words; 0: all rows.
    """

    packing: str
    shape: Shape
    sizes: np.ndarray
    images: np.ndarray
    words: np.ndarray
    usable: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    batch_size: int
    seed: int
    device_rows: int = 0

    def __call__(self, epoch: int) -> Plan:
        """The plan of an epoch."""
        chosen = self.chosen(epoch)
        ends = np.arange(len(chosen) + 1)
        if self.packing == "pack":
            return plan(self.sizes, self.images, self.shape, self.seed, epoch, chosen)
        if self.packing == "modality_length":
            shown = self.images[chosen] > 0
            rows = self.device_rows or self.batch_size
            devices = self.batch_size // rows
            order = group_by_modality_length(self.words[chosen], shown, rows, devices, self.seed, epoch)
            # Empty rows fill the last batch, or no batch of the next epoch would be one of the sampler's.
            ends = np.append(ends, np.full(-len(chosen) % self.batch_size, len(chosen)))
        else:
            order = one_per_row(len(chosen), self.seed, epoch).samples
        return Plan(chosen[order], ends, 1)

    def rows(self, epoch: int) -> int | None:
        """How many rows the plan of an epoch has; None where it must be made to know."""
        if self.packing == "pack":
            return None
        count = len(self.chosen(epoch))
        return count if self.packing == "none" else -(-count // self.batch_size) * self.batch_size

    def chosen(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, [m]; of a mixture some may be there several times."""
        every = np.concatenate(self.usable)
        if all(weight == 1 for weight in self.weights):
            return every
        return every[epoch_samples([len(part) for part in self.usable], self.weights, self.seed, epoch)]

    def same_order(self, other: Schedule) -> bool:
        """Whether the same samples stand in the same rows of every epoch, whatever positions they take."""
        shared = ["words", "images"] if self.packing == "modality_length" else []
        shared += ["sizes", "images"] if self.packing == "pack" else []
        mine, theirs = (
            (each.packing, each.shape.rows, each.weights, each.batch_size, each.seed)
            for each in (self, other)
        )
        return (
            mine == theirs
            and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in shared)
            and all(np.array_equal(a, b) for a, b in zip(self.usable, other.usable, strict=True))
        )
