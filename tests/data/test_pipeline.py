"""Batches: what is in them, their order whoever makes them, resuming, errors, and how workers end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import vlmscale
from tests.data.prepared_files import COUNT
from vlmscale.data.conversation import Template, expand
from vlmscale.data.dataset import Dataset
from vlmscale.data.lengths import Lengths, Limits, measure, target_positions
from vlmscale.data.packing import Plan, Shape, one_per_row, plan
from vlmscale.data.pipeline import Batch, Layout, batches, fill, in_order
from vlmscale.data.plans import PlanOf, Plans
from vlmscale.data.sources import DatasetSource, Pixels, Source
from vlmscale.errors import UserError

V, BATCH, SIDE = 3, 8, 6
HALF = (0.5, 0.5, 0.5)


class Setup(NamedTuple):
    """All that batches are made of."""

    source: Source
    layout: Layout
    plan_of: PlanOf

    def take(self, steps: int, start: int = 0, **options: Any) -> list[Batch]:
        with batches(*self, BATCH, start, **options) as stream:
            return list(itertools.islice(stream, steps))


@pytest.fixture(scope="module")
def lengths(dataset: Dataset, template: Template) -> Lengths:
    return measure(dataset, template, 1000, workers=0)


@pytest.fixture(scope="module")
def unpacked(dataset: Dataset, template: Template, lengths: Lengths) -> Setup:
    source = DatasetSource(dataset, template, Pixels(SIDE, HALF, HALF, "pad"), Limits(1000))
    layout = Layout.one_per_row(lengths, V, pad_id=template.pad, image_id=template.image, queries=True)
    return Setup(source, layout, partial(one_per_row, COUNT, 5))


@pytest.fixture(scope="module")
def packed(unpacked: Setup, template: Template, lengths: Lengths) -> Setup:
    shape = Shape(2, 2 * unpacked.layout.shape.length, 5)
    layout = Layout.packed(shape, lengths, V, pad_id=template.pad, image_id=template.image, queries=True)
    return Setup(unpacked.source, layout, partial(plan, lengths.sizes(V), lengths.images, shape, 5))


@pytest.fixture(params=["unpacked", "packed"])
def setup(request: pytest.FixtureRequest) -> Setup:
    return request.getfixturevalue(request.param)


def equal(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert values.dtype == other[name].dtype
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def joined(parts: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Sample(NamedTuple):
    """What a batch holds of one conversation, wherever it stands."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    slots: tuple[int, ...]  # of its own images, from 1 on
    targets: tuple[tuple[int, int], ...]  # where, from its own start, and what
    pictures: bytes
    queries: tuple[tuple[int, ...], ...]


def samples_of(batch: Batch, layout: Layout) -> list[list[Sample]]:
    """The conversations of each row, read from the arrays alone."""
    rows, images = layout.shape.rows, layout.shape.images
    return [
        [
            _sample(batch, row, segment, row // rows * images)
            for segment in sorted(set(batch["segment_ids"][row]) - {0})
        ]
        for row in range(len(batch["tokens"]))
    ]


def _sample(batch: Batch, row: int, segment: int, first_image: int) -> Sample:
    where = np.flatnonzero(batch["segment_ids"][row] == segment)
    assert (np.diff(where) == 1).all()
    slots = batch["image_slots"][row, where]
    numbers = sorted(set(slots) - {0})
    mask, places = batch["target_mask"][row], batch["target_positions"][row]
    mine = mask & (places >= where[0]) & (places < where[-1])
    owned = [first_image + number - 1 for number in numbers]
    return Sample(
        tuple(batch["tokens"][row, where]),
        tuple(batch["positions"][row, where]),
        tuple(np.where(slots, slots - numbers[0] + 1 if numbers else 0, 0)),
        tuple(zip(places[mine] - where[0], batch["target_ids"][row][mine], strict=True)),
        b"".join(batch["pixels"][image].tobytes() for image in owned),
        tuple(tuple(batch["query_tokens"][image, : batch["query_length"][image]]) for image in owned),
    )


def expected(setup: Setup) -> list[Sample]:
    """Every conversation as its source gives it."""
    out = []
    for index in range(len(setup.source)):
        encoded, pictures = setup.source.read(index)
        tokens, slots = expand(encoded.tokens, V, setup.layout.image_id)
        where = target_positions(encoded, V)
        pixels = b"".join(picture["pixels"].tobytes() for picture in pictures)
        targets = tuple(zip(where - 1, tokens[where], strict=True))
        queries = (tuple(encoded.query),) * len(pictures)
        out.append(Sample(tuple(tokens), tuple(range(len(tokens))), tuple(slots), targets, pixels, queries))
    return out


def epochs(setup: Setup, count: int) -> list[list[Sample]]:
    """The conversations of the first epochs, in their order."""
    blocks = [setup.plan_of(epoch).blocks for epoch in range(count)]
    rows = setup.layout.shape.rows
    steps = -(-sum(blocks) * rows // BATCH)
    stream = [row for batch in setup.take(steps) for row in samples_of(batch, setup.layout)]
    ends = [0, *(rows * end for end in itertools.accumulate(blocks))]
    return [list(itertools.chain(*stream[a:b])) for a, b in itertools.pairwise(ends)]


def test_every_conversation_comes_whole_and_once_an_epoch(setup: Setup) -> None:
    wanted = Counter(expected(setup))
    assert len(wanted) == COUNT
    found = epochs(setup, 3)
    assert [Counter(epoch) for epoch in found] == [wanted] * 3
    assert len({tuple(epoch) for epoch in found}) == 3


def test_a_batch_may_hold_the_end_of_an_epoch_and_the_beginning_of_the_next(unpacked: Setup) -> None:
    assert COUNT % BATCH
    batch = unpacked.take(1, COUNT // BATCH)[0]
    wanted = [int(sample) for epoch in (0, 1) for sample in unpacked.plan_of(epoch).samples]
    start = COUNT // BATCH * BATCH
    known = expected(unpacked)
    assert [row[0] for row in samples_of(batch, unpacked.layout)] == [
        known[sample] for sample in wanted[start : start + BATCH]
    ]


def test_what_is_not_a_conversation_is_padding(setup: Setup) -> None:
    layout, unused = setup.layout, 0
    for batch in setup.take(6):
        real = batch["segment_ids"] > 0
        assert (batch["tokens"][~real] == layout.pad_id).all()
        assert not batch["image_slots"][~real].any()
        for row, positions in enumerate(batch["positions"]):
            used = int(real[row].sum())
            assert real[row, :used].all()
            steps = np.diff(positions)
            assert (steps[max(used - 1, 0) :] == 1).all()  # padding counts on
        targets = [sum(len(sample.targets) for sample in row) for row in samples_of(batch, layout)]
        assert batch["target_mask"].sum(1).tolist() == targets
        for block in range(BATCH // layout.shape.rows):
            rows = slice(block * layout.shape.rows, (block + 1) * layout.shape.rows)
            segments = batch["segment_ids"][rows]
            assert set(segments[segments > 0]) == set(range(1, segments.max() + 1))
            shown = batch["image_slots"][rows].max()
            slots = slice(block * layout.shape.images + shown, (block + 1) * layout.shape.images)
            assert not batch["pixels"][slots].any()
            assert (batch["query_length"][slots] >= 1).all()
            unused += layout.shape.images - shown
    assert unused


def test_a_row_without_an_image_still_asks_its_question(unpacked: Setup) -> None:
    batch = next(in_order(unpacked.source, unpacked.layout, BATCH))
    per_row = unpacked.layout.shape.images
    for row in range(BATCH):
        query = unpacked.source.read(row)[0].query
        for slot in range(row * per_row, (row + 1) * per_row):
            assert batch["query_length"][slot] == len(query)
            np.testing.assert_array_equal(batch["query_tokens"][slot, : len(query)], query)
            assert (batch["query_tokens"][slot, len(query) :] == unpacked.layout.pad_id).all()


def test_an_empty_block_is_padding_that_can_be_computed(packed: Setup) -> None:
    batch = fill(packed.source, packed.layout, [[[], []], [[3], []]])
    assert not batch["segment_ids"][:2].any()
    assert not batch["target_mask"][:2].any()
    assert (batch["query_length"][: packed.layout.shape.images] == 1).all()
    assert (batch["query_tokens"][: packed.layout.shape.images] == packed.layout.pad_id).all()
    assert samples_of(batch, packed.layout)[2] == [expected(packed)[3]]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_the_parts_of_one_batch(processes: int, setup: Setup) -> None:
    parts = [setup.take(12, process=process, processes=processes) for process in range(processes)]
    equal([joined(step) for step in zip(*parts, strict=True)], setup.take(12))


def test_workers_change_nothing(packed: Setup) -> None:
    equal(packed.take(11, workers=2), packed.take(11))
    assert not multiprocessing.active_children()


def test_resumed_anywhere_with_anything_is_uninterrupted(setup: Setup) -> None:
    generator = random.Random(3)
    whole = setup.take(14)
    for processes in (1, 2, 4):
        start = generator.randrange(1, 13)
        parts = [
            setup.take(14 - start, start, process=process, processes=processes)
            for process in range(processes)
        ]
        equal([joined(step) for step in zip(*parts, strict=True)], whole[start:])


def test_resumed_in_an_epoch_with_other_workers_and_processes_is_uninterrupted(unpacked: Setup) -> None:
    start = 4
    assert start * BATCH % COUNT, "not at the end of an epoch"
    options = [{"workers": 1, "process": 0}, {"workers": 0, "process": 1}]
    parts = [unpacked.take(6, start, processes=2, **each) for each in options]
    equal([joined(step) for step in zip(*parts, strict=True)], unpacked.take(10)[start:])


def test_order_is_that_of_the_seed(unpacked: Setup) -> None:
    other = unpacked._replace(plan_of=partial(one_per_row, COUNT, 6))
    assert epochs(unpacked, 1) == epochs(unpacked, 1)
    assert epochs(unpacked, 1) != epochs(other, 1)


@pytest.mark.parametrize("size", [4, 6, 23, 24])
def test_in_order_covers_each_sample_once_and_filler_has_no_targets(size: int, unpacked: Setup) -> None:
    stream = list(in_order(unpacked.source, unpacked.layout, size))
    assert len(stream) == -(-COUNT // size)
    rows = [row for batch in stream for row in samples_of(batch, unpacked.layout)]
    known = expected(unpacked)
    assert rows[:COUNT] == [[sample] for sample in known]
    assert rows[COUNT:] == [[known[0]._replace(targets=())]] * (len(stream) * size - COUNT)
    if size % 2 == 0:
        parts = [in_order(unpacked.source, unpacked.layout, size, process=k, processes=2) for k in (0, 1)]
        equal([joined(step) for step in zip(*parts, strict=True)], stream)


def test_static_shapes_are_those_of_the_longest(lengths: Lengths) -> None:
    def made(tokens: int, **options: Any) -> Layout:
        return Layout.one_per_row(lengths, tokens, pad_id=0, image_id=1, **options)

    longest = int(lengths.sizes(V).max())
    assert made(V).shape == Shape(1, -(-longest // 8) * 8, 2)
    assert made(V).targets == lengths.supervised.max()
    assert (made(V).query_length, made(V, queries=True).query_length) == (0, lengths.query.max())
    assert made(V, row_length=128).shape.length == 128
    assert made(0).shape.images == 0
    text = lengths._replace(images=np.zeros_like(lengths.images))
    assert Layout.one_per_row(text, V, pad_id=0, image_id=1).shape.images == 1
    narrow = made(V, spare=40)
    assert lengths.text.max() + 40 <= narrow.shape.length < lengths.text.max() + 48
    wide = Layout.packed(Shape(4, 64, 7), lengths, V, pad_id=0, image_id=1)
    assert (wide.shape, wide.targets, wide.query_length) == (Shape(4, 64, 7), 64, 0)


def test_a_blind_model_has_no_slots_and_no_pictures(dataset: Dataset, template: Template) -> None:
    blind = measure(dataset, template, 1000, workers=0)
    layout = Layout.one_per_row(blind, 0, pad_id=template.pad, image_id=template.image)
    source = DatasetSource(dataset, template, None, Limits(1000))
    batch = next(in_order(source, layout, COUNT))
    assert set(batch) == {
        *("tokens", "image_slots", "positions", "segment_ids"),
        *("target_positions", "target_ids", "target_mask"),
    }
    assert not batch["image_slots"].any()
    assert batch["segment_ids"].sum() == blind.text.sum()
    assert batch["target_mask"].sum() == blind.supervised.sum()


def test_a_plan_that_does_not_fit_the_samples_is_told(packed: Setup) -> None:
    whole = list(range(COUNT))
    for block in ([whole, []], [[2], [5, 8]]):
        with pytest.raises(ValueError, match=r"sample \d+ has \d+ positions, \d images"):
            fill(packed.source, packed.layout, [block])


@pytest.mark.parametrize(
    "size, processes, message",
    [(7, 1, "multiple of 2, for 1 processes"), (8, 3, "multiple of 6, for 3 processes .* blocks of 2 rows")],
)
def test_batches_that_do_not_divide_are_refused(
    size: int, processes: int, message: str, packed: Setup
) -> None:
    with pytest.raises(UserError, match=f"train.batch_size={size}: .*{message}"):
        batches(*packed, size, processes=processes)


def test_nothing_to_train_on_is_refused(unpacked: Setup) -> None:
    empty = Plan(np.zeros(0, np.int64), np.zeros(1, np.int64), 1)
    with pytest.raises(UserError, match="no conversation is left"):
        batches(unpacked.source, unpacked.layout, lambda epoch: empty, BATCH)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_record_is_one_line_whoever_reads_it(
    workers: int, unpacked: Setup, dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(dataset.path, copy)
    shard = next(iter(sorted(copy.glob("*.array_record-*"))))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    source = DatasetSource(Dataset(copy, "train"), *_rest(unpacked.source))
    started = time.monotonic()
    with batches(source, *unpacked[1:], BATCH, workers=workers) as stream, pytest.raises(UserError) as caught:
        list(itertools.islice(stream, 20))
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "Traceback" not in capfd.readouterr().err
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 60


def _rest(source: Source) -> tuple[Any, ...]:
    assert isinstance(source, DatasetSource)
    return source.template, source.pictures, source.limits


def test_closing_frees_one_who_waits_and_ends_workers_and_folder(unpacked: Setup) -> None:
    stream = batches(*unpacked, BATCH, workers=2)
    folder, ended = stream._plans.folder, threading.Event()
    assert folder is not None
    assert folder.exists()

    def take() -> None:
        for _ in stream:
            pass
        ended.set()

    threading.Thread(target=take, daemon=True).start()
    time.sleep(0.2)  # the workers are still being started: they give nothing yet
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 15
    assert ended.wait(15)
    assert not multiprocessing.active_children()
    assert not folder.exists()
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()


class Counting:
    """A plan of one block an epoch that remembers which epochs were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, epoch: int) -> Plan:
        self.asked.append(epoch)
        return Plan(np.full(10, epoch), np.arange(11), 1)


@pytest.mark.parametrize("shared", [False, True])
def test_a_plan_is_made_once_and_the_next_half_an_epoch_ahead(shared: bool) -> None:
    counting = Counting()
    plans = Plans(counting, shared=shared)
    for number in range(10):
        plans.look_ahead(number)
        assert plans.block(number)[0].tolist() == [0]
        for _ in range(100):
            if len(counting.asked) > (number >= 5):
                break
            time.sleep(0.05)
        assert counting.asked == [0, 1][: 1 + (number >= 5)]
    assert plans.block(27)[0].tolist() == [2]
    assert plans.block(13)[0].tolist() == [1]
    assert counting.asked == [0, 1, 2]
    if shared:
        other = Counting()
        theirs = Plans(other, folder=plans.folder)
        assert [theirs.block(number)[0].tolist() for number in (5, 15, 25, 35)] == [[0], [1], [2], [3]]
        assert other.asked == [3]
        plans.remove()
        assert plans.folder is not None
        assert not plans.folder.exists()


SCRIPT = """
import multiprocessing, os, pickle, sys
from vlmscale.data.pipeline import batches

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        stream = batches(*pickle.load(file), 8, workers=1)
    next(stream)
    print(stream._plans.folder, *(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["killed", "forgotten"])
def test_workers_end_with_a_process_that_never_closed_them(end: str, packed: Setup, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "setup").write_bytes(pickle.dumps(tuple(packed)))
    env = os.environ | {"PYTHONPATH": str(Path(vlmscale.__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "setup"), end]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert run.returncode == (-signal.SIGKILL if end == "killed" else 0)
    folder, *workers = run.stdout.split()
    assert len(workers) == 1
    if end == "forgotten":
        assert run.stderr == ""
    deadline = time.monotonic() + 20
    while any(Path("/proc", worker).exists() for worker in workers) or Path(folder).exists():
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)
