"""The Grain pipeline: batches whose order is a function of (seed, step) alone.

A plan says which samples stand in which rows of an epoch; epochs follow one another without a seam, so a
batch may hold the end of one and the beginning of the next. Blocks of rows (`packing.Shape`) stay whole, and
a process makes its own contiguous part of every batch. Workers change who makes a batch, never what is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from vlmscale.data.conversation import expand
from vlmscale.data.lengths import Lengths, target_positions
from vlmscale.data.packing import Plan, Shape
from vlmscale.data.sources import Picture, Source
from vlmscale.data.workers import quiet_tracker, serve_parent
from vlmscale.errors import UserError

Batch = dict[str, np.ndarray]
Samples = Sequence[int] | np.ndarray  # numbers of those in one row
PlanOf = Callable[[int], Plan]  # of an epoch; a pure function that can be pickled
_BY_ROW = (
    "tokens",
    "image_slots",
    "positions",
    "segment_ids",
    "target_positions",
    "target_ids",
    "target_mask",
)
_BUFFERED = 2  # batches that wait, of each worker
_KNOWN = 3  # epochs whose plan is kept in memory


@runtime_checkable
class Counted(Protocol):
    """Plans whose rows can be counted before they are made."""

    def rows(self, epoch: int) -> int | None:
        """Rows of an epoch, each a block of its own; None where only the plan tells."""


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

    def __init__(self, parts: list[grain.DatasetIterator], plans: _Plans, start: int, blocks: int) -> None:
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


def _end(parts: list[grain.DatasetIterator], plans: _Plans) -> None:
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
      workers: processes that read and decode; 0 for a thread of this one.
      process, processes: rows [process * B / processes, (process + 1) * B / processes) are made here.

    Returns:
      Batches with tokens, image_slots, positions, segment_ids [B, T] int32; target_positions, target_ids
      [B, K] int32 and target_mask [B, K] bool, positions counted within the row; the arrays of pictures, and
      with questions query_tokens [N, Q] and query_length [N] int32, with N = B / G * P. image_slots is i in
      slots of the block's i-th image, from 1 on, and segment_ids are unique within a block; both are 0
      elsewhere. B is that of this process.

    Raises:
      UserError: the batch does not divide into whole blocks for every process.
    """
    per_process, rest = divmod(batch_size, layout.shape.rows * processes)
    if rest or not per_process:
        raise UserError(
            f"train.batch_size={batch_size}: must be a multiple of {layout.shape.rows * processes}, for "
            f"{processes} processes (hosts) and blocks of {layout.shape.rows} rows"
        )
    plans = _Plans(plan_of, shared=workers > 0)
    blocks = per_process * processes
    plans.look_ahead(start_step * blocks)
    mine = slice(process * per_process, (process + 1) * per_process)
    numbers = grain.MapDataset.range(sys.maxsize).batch(blocks).map(partial(_part, mine))
    chain = numbers.map(partial(_planned, source, layout, plans))[start_step:]
    if not workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return Batches([iter(chain.to_iter_dataset(options))], plans, start_step, blocks)
    if not flags.FLAGS.is_parsed():  # Grain reads its own even where no command line was parsed by absl
        flags.FLAGS.mark_as_parsed()
    quiet_tracker()
    parts = [_worker(chain[index::workers], plans) for index in range(workers)]
    return Batches(parts, plans, start_step, blocks)


def _worker(chain: grain.MapDataset, plans: _Plans) -> grain.DatasetIterator:
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
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in order, one a row; copies of the first without targets fill the last batch.

    Args:
      source, layout: as for `batches`, with blocks of one row.
      samples: numbers of those that are wanted; None for all.
      batch_size, process, processes: as for `batches`.
    """
    if layout.shape.rows != 1 or batch_size % processes:
        raise ValueError("in_order: blocks of one row, and as many for each process")
    local = batch_size // processes
    wanted = np.arange(len(source)) if samples is None else samples
    for start in range(0, len(wanted), batch_size):
        mine = range(start + process * local, start + (process + 1) * local)
        batch = fill(source, layout, [[[wanted[index if index < len(wanted) else 0]]] for index in mine])
        batch["target_mask"][[index >= len(wanted) for index in mine]] = False
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


def _planned(source: Source, layout: Layout, plans: _Plans, numbers: np.ndarray) -> Batch:
    return fill(source, layout, [plans.block(int(number)) for number in numbers])


def _start_worker(folder: Path | None, index: int, count: int) -> None:
    serve_parent(folder)


class _Plans:
    """The plans of all epochs, behind one another, each made once.

    A plan of a large data set takes seconds, so workers share them as files of a folder: whoever needs one
    first makes it, which is usually the parent, half an epoch ahead.
    """

    def __init__(self, plan_of: PlanOf, shared: bool = False, folder: Path | None = None) -> None:
        self.plan_of = plan_of
        self.folder = Path(tempfile.mkdtemp(prefix="vlmscale-")) if shared else folder
        self._known: dict[int, Plan] = {}
        self._ends: list[int] = []  # blocks up to the end of each epoch
        self._making, self._counting = threading.Lock(), threading.Lock()
        self._ahead = 0  # the last epoch that was asked for ahead

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plans, (self.plan_of, False, self.folder)

    def remove(self) -> None:
        """Remove the folder, which also sends the workers away (`serve_parent`)."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def block(self, number: int) -> list[np.ndarray]:
        """Sample numbers of each row of a block."""
        epoch, start, _ = self._locate(number)
        return self._epoch(epoch).block(number - start)

    def look_ahead(self, number: int) -> None:
        """Begin to make the next epoch's plan once block `number` lies in the second half of an epoch."""
        epoch, start, end = self._locate(number)
        if 2 * number >= start + end and self._ahead < epoch + 1:
            self._ahead = epoch + 1
            threading.Thread(target=self._make_ahead, args=(epoch + 1,), name="plan", daemon=True).start()

    def _make_ahead(self, epoch: int) -> None:
        with contextlib.suppress(Exception):  # whoever needs the plan makes it again, and meets the error
            self._epoch(epoch)

    def _locate(self, number: int) -> tuple[int, int, int]:
        """The epoch of a block, and the first block of that and of the next."""
        with self._counting:
            while not self._ends or self._ends[-1] <= number:
                blocks = self._blocks(len(self._ends))
                if not blocks:
                    raise UserError("no conversation is left to train on: all were set aside")
                self._ends.append(blocks + (self._ends[-1] if self._ends else 0))
            epoch = int(np.searchsorted(self._ends, number, side="right"))
            return epoch, self._ends[epoch - 1] if epoch else 0, self._ends[epoch]

    def _blocks(self, epoch: int) -> int:
        """Blocks of an epoch, without its plan where that can be: a resume passes all epochs before."""
        rows = self.plan_of.rows(epoch) if isinstance(self.plan_of, Counted) else None
        return self._epoch(epoch).blocks if rows is None else rows  # in blocks of one

    def _epoch(self, epoch: int) -> Plan:
        known = self._known.get(epoch)  # without the lock: another epoch may be in the making
        if known is not None:
            return known
        with self._making:
            if epoch not in self._known:
                self._known[epoch] = self.plan_of(epoch) if self.folder is None else self._share(epoch)
                for old in sorted(self._known)[:-_KNOWN]:
                    del self._known[old]
            return self._known[epoch]

    def _share(self, epoch: int) -> Plan:
        assert self.folder is not None
        path = self.folder / f"{epoch}.npz"
        with (self.folder / f"{epoch}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process that holds it
            if not path.exists():
                plan, temporary = self.plan_of(epoch), self.folder / f"{epoch}.tmp"
                with temporary.open("wb") as file:
                    np.savez(file, samples=plan.samples, row_offsets=plan.row_offsets, rows=plan.rows)
                temporary.replace(path)
        with np.load(path) as arrays:
            return Plan(arrays["samples"], arrays["row_offsets"], int(arrays["rows"]))
