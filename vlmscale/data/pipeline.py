"""The Grain pipeline: batches whose order is a function of (seed, step) alone.

A plan says which samples stand in which rows of an epoch; epochs follow one another without a seam, so a
batch may hold the end of one and the beginning of the next. Blocks of rows (`packing.Shape`) stay whole, and
a process makes its own contiguous part of every batch. Workers change who makes a batch, never what is in it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from vlmscale.data.conversation import expand
from vlmscale.data.lengths import Lengths, target_positions
from vlmscale.data.packing import Shape
from vlmscale.data.plans import PlanOf, Plans
from vlmscale.data.sources import Picture, Source
from vlmscale.data.workers import quiet_tracker, serve_parent
from vlmscale.errors import UserError

Batch = dict[str, np.ndarray]
Samples = Sequence[int] | np.ndarray  # numbers of those in one row
_BY_ROW = (
    "tokens",
    "image_slots",
    "positions",
    "segment_ids",
    "target_positions",
    "target_ids",
    "target_mask",
)
_QUESTIONS = ("query_tokens", "query_length")
_ENDLESS = 2**62  # blocks; Grain counts batches in float64, and sys.maxsize batches of one overflow


@dataclass(frozen=True)
class Layout:
    """The static shapes of batches, and what fills them where there is nothing.

    Attributes:
      shape: of a block: rows G, their length T, and the image slots P that they own together.
      visual_tokens: V, positions that an image takes; 0 of a blind model.
      targets: K, supervised tokens of a row at most.
      query_length: Q, tokens of a question at most; 0 where batches hold no questions.
      pad_id: token of padding.
      image_id: token in image slots.
    """

    shape: Shape
    visual_tokens: int
    targets: int
    query_length: int
    pad_id: int
    image_id: int

    @classmethod
    def one_per_row(
        cls,
        lengths: Lengths,
        visual_tokens: int,
        *,
        pad_id: int,
        image_id: int,
        row_length: int = 0,
        queries: bool = False,
        spare: int = 0,
    ) -> Layout:
        """For a conversation a row: rows as long as the longest needs, rounded up to a multiple of 8.

        Args:
          lengths: of all conversations that may come.
          visual_tokens: positions that an image takes.
          pad_id, image_id: tokens where there is no text.
          row_length: of rows, where it is given; else 0.
          queries: whether batches hold the questions.
          spare: tokens that a row without an image keeps free at least, so that it can be narrowed as one
            with an image can.
        """
        longest = int(lengths.sizes(visual_tokens).max())
        longest = max(longest, int(lengths.text.max()) + spare if spare else 0)
        images = max(1, int(lengths.images.max())) if visual_tokens else 0
        shape = Shape(1, row_length or -(-longest // 8) * 8, images)
        targets, query_length = int(lengths.supervised.max()), int(lengths.query.max()) if queries else 0
        return cls(shape, visual_tokens, targets, query_length, pad_id, image_id)

    @classmethod
    def packed(
        cls,
        shape: Shape,
        lengths: Lengths,
        visual_tokens: int,
        *,
        pad_id: int,
        image_id: int,
        queries: bool = False,
    ) -> Layout:
        """For packed rows: every position may be a target."""
        query_length = int(lengths.query.max()) if queries else 0
        return cls(shape, visual_tokens, shape.length, query_length, pad_id, image_id)


class Batches:
    """Endless batches. Close it, or use it in a `with`: then its workers end, whatever they are at."""

    def __init__(self, parts: list[grain.DatasetIterator], plans: Plans, start: int, blocks: int) -> None:
        """Iterate over parts in turn.

        Args:
          parts: one a worker, each with every len(parts)-th batch.
          plans: of all epochs.
          start: number of the first batch.
          blocks: of a batch of all processes.
        """
        self._parts, self._plans, self._blocks = parts, plans, blocks
        self._workers, self._turn, self._number = len(parts), 0, start
        self._taking, self._closed = threading.Lock(), False
        # Also when it is forgotten, and when the interpreter ends: before that takes Grain's modules apart.
        self._close = weakref.finalize(self, _end, parts, plans)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          StopIteration: it was closed.
          UserError: a record or a picture of it is damaged.
        """
        with self._taking:
            if self._closed:
                raise StopIteration
            try:
                batch = next(self._parts[self._turn])
                self._turn = (self._turn + 1) % self._workers
                self._number += 1
                self._plans.look_ahead(self._number * self._blocks)
            except Exception as error:
                if self._closed:
                    raise StopIteration from None
                if isinstance(error, UserError):
                    raise UserError(str(error)) from None  # without the worker's traceback
                raise
            return batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; from any thread, also while another waits for a batch.

        That takes two seconds at most, or as long as a worker needs to start or this process for a batch.
        """
        self._closed = True
        self._plans.remove()
        # One who waits must be out before: Grain would leave it waiting. The workers' end wakes it.
        with self._taking:
            self._close()


def _end(parts: list[grain.DatasetIterator], plans: Plans) -> None:
    plans.remove()
    threads = []
    while parts:  # emptied, so that nothing is left of them when the interpreter ends
        part = parts.pop()
        try:  # together, for each takes up to half a second
            threads.append(threading.Thread(target=part.close, daemon=True))
            threads[-1].start()
        except RuntimeError:  # the interpreter is ending and starts no more
            threads.pop()
            part.close()
    for thread in threads:
        thread.join()


def batches(
    source: Source,
    layout: Layout,
    plan_of: PlanOf,
    batch_size: int,
    start_step: int = 0,
    *,
    also: Sequence[tuple[Source, Layout]] = (),
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Batches:
    """Endless training batches from `start_step` on, or this process's rows of them.

    Args:
      source: the samples.
      layout: static shapes.
      plan_of: which samples stand in which rows of an epoch. It is called in the background, once an epoch.
      batch_size: rows B of a whole batch, of all processes.
      start_step: resuming needs nothing else: neither how often a run was interrupted nor what its workers
        and processes were changes what comes.
      also: more ways to read and lay out the same samples in the same rows, such as other numbers of visual
        tokens; with the same blocks and image slots.
      workers: processes that read and decode; 0 for a thread of this one.
      process, processes: rows [process * B / processes, (process + 1) * B / processes) are made here.

    Returns:
      Batches with tokens, image_slots, positions, segment_ids [B, T] int32; target_positions, target_ids
      [B, K] int32 and target_mask [B, K] bool, positions counted within the row; the arrays of pictures, and
      with questions query_tokens [N, Q] and query_length [N] int32, with N = B / G * P. image_slots is i in
      slots of the block's i-th image, from 1 on, and segment_ids are unique within a block; both are 0
      elsewhere. B is that of this process. Arrays of the i-th of `also` are named "i/tokens", from 1 on, and
      have no pictures: those of the first are theirs too.

    Raises:
      UserError: the batch does not divide into whole blocks for every process.
    """
    per_process, rest = divmod(batch_size, layout.shape.rows * processes)
    if rest or not per_process:
        raise UserError(
            f"train.batch_size={batch_size}: must be a multiple of {layout.shape.rows * processes}, for "
            f"{processes} processes (hosts) and blocks of {layout.shape.rows} rows"
        )
    plans = Plans(plan_of, shared=workers > 0)
    blocks = per_process * processes
    plans.look_ahead(start_step * blocks)
    mine = slice(process * per_process, (process + 1) * per_process)
    numbers = grain.MapDataset.range(_ENDLESS).batch(blocks).map(partial(_part, mine))
    chain = numbers.map(partial(_planned, source, layout, tuple(also), plans))[start_step:]
    if not workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return Batches([iter(chain.to_iter_dataset(options))], plans, start_step, blocks)
    if not flags.FLAGS.is_parsed():  # Grain reads its own even where no command line was parsed by absl
        flags.FLAGS.mark_as_parsed()
    quiet_tracker()
    parts = [_worker(chain[index::workers], plans) for index in range(workers)]
    return Batches(parts, plans, start_step, blocks)


def _worker(chain: grain.MapDataset, plans: Plans) -> grain.DatasetIterator:
    """A process that makes these batches from now on.

    One iterator a worker, not one for all: closing Grain's own for several leaves those behind that have not
    given a batch yet, and ends the others one after the other.
    """
    dataset = chain.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=1)
    part = iter(dataset.mp_prefetch(options, worker_init_fn=partial(_start_worker, plans.folder)))
    part.get_state()  # makes the iterator that prefetching starts
    part.start_prefetch()
    return part


def in_order(
    source: Source,
    layout: Layout,
    batch_size: int,
    *,
    samples: np.ndarray | None = None,
    also: Sequence[tuple[Source, Layout]] = (),
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in order, one a row; copies of the first without targets fill the last batch.

    Args:
      source, layout: as for `batches`, with blocks of one row.
      samples: numbers of those that are wanted; None for all.
      batch_size, also, process, processes: as for `batches`.
    """
    if layout.shape.rows != 1 or batch_size % processes:
        raise ValueError("in_order: blocks of one row, and as many for each process")
    local = batch_size // processes
    wanted = np.arange(len(source)) if samples is None else samples
    for start in range(0, len(wanted), batch_size):
        mine = range(start + process * local, start + (process + 1) * local)
        blocks = [[[wanted[index if index < len(wanted) else 0]]] for index in mine]
        batch, spare = fill_all(source, layout, also, blocks), [index >= len(wanted) for index in mine]
        for name, values in batch.items():
            if name.endswith("target_mask"):
                values[spare] = False
        yield batch


def fill(source: Source, layout: Layout, blocks: Sequence[Sequence[Samples]]) -> Batch:
    """A batch of blocks of rows of sample numbers, as `batches` describes it.

    Padding counts its positions on, and stands in segment 0. An image slot that is not used holds zeros, and
    asks what the first sample of its block asks.

    Raises:
      UserError: a sample is damaged.
      ValueError: a sample does not fit where the plan has it.
    """
    (rows, length, images), count = layout.shape, len(blocks)
    batch: Batch = {
        "tokens": np.full((count * rows, length), layout.pad_id, np.int32),
        "image_slots": np.zeros((count * rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (count * rows, 1)),
        "segment_ids": np.zeros((count * rows, length), np.int32),
        "target_positions": np.zeros((count * rows, layout.targets), np.int32),
        "target_ids": np.zeros((count * rows, layout.targets), np.int32),
        "target_mask": np.zeros((count * rows, layout.targets), bool),
    }
    if images and layout.query_length:
        batch["query_tokens"] = np.full((count * images, layout.query_length), layout.pad_id, np.int32)
        batch["query_length"] = np.ones(count * images, np.int32)  # of no sample: one token of padding
    if images:
        for name, zeros in source.blank.items():
            batch[name] = np.zeros((count * images, *zeros.shape), zeros.dtype)
    for number, block in enumerate(blocks):
        _fill_block(source, layout, block, _rows_of(batch, layout, number))
    return batch


def _rows_of(batch: Batch, layout: Layout, number: int) -> Batch:
    """The part of a batch that belongs to one block, as views."""
    by_row = slice(number * layout.shape.rows, (number + 1) * layout.shape.rows)
    by_image = slice(number * layout.shape.images, (number + 1) * layout.shape.images)
    return {name: values[by_row if name in _BY_ROW else by_image] for name, values in batch.items()}


def _fill_block(source: Source, layout: Layout, block: Sequence[Samples], out: Batch) -> None:
    segment, shown = 0, 0
    for row, samples in enumerate(block):
        at, targets = 0, 0
        for sample in samples:
            encoded, pictures = source.read(int(sample))
            tokens, slots = expand(encoded.tokens, layout.visual_tokens, layout.image_id)
            where = target_positions(encoded, layout.visual_tokens)
            images = int(slots.max(initial=0))
            behind, last = at + len(tokens), targets + len(where)
            if behind > layout.shape.length or last > layout.targets or shown + images > layout.shape.images:
                raise ValueError(
                    f"sample {sample} has {len(tokens)} positions, {images} images and {len(where)} targets, "
                    f"which do not fit behind {at}, {shown} and {targets} in a block of {layout}"
                )
            out["tokens"][row, at:behind] = tokens
            out["image_slots"][row, at:behind] = np.where(slots, slots + shown, 0)
            out["positions"][row, at:] = np.arange(layout.shape.length - at)
            out["segment_ids"][row, at:behind] = segment = segment + 1
            out["target_positions"][row, targets:last] = at + where - 1
            out["target_ids"][row, targets:last] = tokens[where]
            out["target_mask"][row, targets:last] = True
            if "query_tokens" in out:
                # The first fills all slots of the block: those that stay empty ask what it asks.
                asking = slice(shown, shown + images if segment > 1 else None)
                _ask(out, asking, encoded.query[: layout.query_length], layout.pad_id)
            _show(out, source.blank, shown, pictures)
            at, targets, shown = behind, last, shown + images


def _ask(out: Batch, slots: slice, query: np.ndarray, pad_id: int) -> None:
    out["query_tokens"][slots, : len(query)] = query
    out["query_tokens"][slots, len(query) :] = pad_id
    out["query_length"][slots] = len(query)


def _show(out: Batch, blank: Picture, first: int, pictures: Sequence[Picture]) -> None:
    for slot, picture in enumerate(pictures, first):
        for name in blank:
            out[name][slot] = picture[name]


def _part(mine: slice, numbers: np.ndarray) -> np.ndarray:
    return numbers[mine]


def _planned(
    source: Source,
    layout: Layout,
    also: tuple[tuple[Source, Layout], ...],
    plans: Plans,
    numbers: np.ndarray,
) -> Batch:
    return fill_all(source, layout, also, [plans.block(int(number)) for number in numbers])


def fill_all(
    source: Source,
    layout: Layout,
    also: Sequence[tuple[Source, Layout]],
    blocks: Sequence[Sequence[Samples]],
) -> Batch:
    """`fill`, and the same rows as others read and lay them out, as `batches` describes it."""
    batch = fill(source, layout, blocks)
    for number, other in enumerate(also, 1):
        batch |= {f"{number}/{name}": values for name, values in fill(*other, blocks).items()}
    return batch


def of_layout(batch: dict[str, Any], number: int, pictures: Iterable[str]) -> dict[str, Any]:
    """The arrays of one way of laying out rows: of the first, 0, or of the i-th of `also`.

    Args:
      batch: of `batches` or `fill_all`.
      number: of the way.
      pictures: names of arrays that all share, as far as it reads them.
    """
    prefix = f"{number}/" if number else ""
    own = {name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(prefix)}
    rows = {name: x for name, x in own.items() if name in (*_BY_ROW, *_QUESTIONS)}
    return rows | {name: batch[name] for name in pictures}


def _start_worker(folder: Path | None, index: int, count: int) -> None:
    serve_parent(folder)
