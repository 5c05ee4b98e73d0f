"""The Grain pipeline: batches whose order is a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import grain
import numpy as np

from vlmscale.data.conversation import Row

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Training rows, the image each needs (-1: none), and the tower outputs by image.

    `features` maps a name ("selected", "levels", ...) to [images, ...] arrays, usually memory-mapped.
    `queries` is whether batches hold the question as well. `spare` is how many tokens a row without an image
    keeps free at least, so that it can be narrowed as one with an image can.
    """

    rows: list[Row]
    images: np.ndarray
    features: dict[str, np.ndarray]
    pad_id: int
    queries: bool = False
    spare: int = 0

    @property
    def length(self) -> int:
        """Static row length T: the longest row, rounded up to a multiple of 8."""
        longest = max(len(row.tokens) for row in self.rows)
        text = max(len(row.tokens) - int(row.image_slots.sum()) for row in self.rows)
        longest = max(longest, text + self.spare if self.spare else 0)
        return -(-longest // 8) * 8

    @cached_property  # asked for with every row
    def query_length(self) -> int:
        """Static length Q of the questions."""
        return max(len(row.query) for row in self.rows)

    @property
    def targets(self) -> int:
        """Static number of targets K: those of the row that has most."""
        return max(len(row.target_ids) for row in self.rows)


def pad_row(data: Rows, index: int, length: int, targets: int) -> Batch:
    """One row, padded: tokens, image_slots, positions, segment_ids [T]; target_* [K]; tower outputs.

    With questions also query_tokens [Q] and query_length.
    """
    row, image = data.rows[index], int(data.images[index])
    used, filled = len(row.tokens), len(row.target_ids)
    tokens = np.full(length, data.pad_id, np.int32)
    tokens[:used] = row.tokens
    image_slots = np.zeros(length, bool)
    image_slots[:used] = row.image_slots
    segment_ids = np.zeros(length, np.int32)
    segment_ids[:used] = 1
    out: Batch = {
        "tokens": tokens,
        "image_slots": image_slots,
        "positions": np.arange(length, dtype=np.int32),
        "segment_ids": segment_ids,
    }
    for name, values in (("target_positions", row.target_positions), ("target_ids", row.target_ids)):
        out[name] = np.zeros(targets, np.int32)
        out[name][:filled] = values
    out["target_mask"] = np.arange(targets) < filled
    if data.queries:
        out["query_tokens"] = np.full(data.query_length, data.pad_id, np.int32)
        out["query_tokens"][: len(row.query)] = row.query
        out["query_length"] = np.array(len(row.query), np.int32)
    for name, store in data.features.items():
        out[name] = np.array(store[image]) if image >= 0 else np.zeros(store.shape[1:], store.dtype)
    return out


def batches(data: Rows, batch_size: int, seed: int, start_step: int) -> Iterator[Batch]:
    """Endless training batches from `start_step` on; every row once an epoch, in a new order each epoch.

    Resuming needs the step alone: the order does not depend on how the run was interrupted.
    """
    length, targets = data.length, data.targets
    source = grain.MapDataset.source(np.arange(len(data.rows))).seed(seed).shuffle().repeat(None)
    chain = source.map(lambda index: pad_row(data, int(index), length, targets)).batch(batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(chain[start_step:].to_iter_dataset(options))


def in_order(data: Rows, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled with copies of row 0 without targets."""
    length, targets = data.length, data.targets
    for start in range(0, len(data.rows), batch_size):
        indices = range(start, min(start + batch_size, len(data.rows)))
        rows = [pad_row(data, index, length, targets) for index in indices]
        filler = pad_row(data, 0, length, targets) | {"target_mask": np.zeros(targets, bool)}
        rows += [filler] * (batch_size - len(rows))
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
