"""Batches: their order, resuming, padding, and what fills the last one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from vlmscale.data.conversation import Row
from vlmscale.data.pipeline import Batch, Rows, batches, in_order, pad_row

COUNT, BATCH = 12, 4


@pytest.fixture(scope="module")
def data() -> Rows:
    """Row i says 100 + i first, shows picture i (every third none) and has i % 3 + 1 targets."""
    rows, images = [], []
    for index in range(COUNT):
        length = 3 + index % 7
        tokens = np.arange(length, dtype=np.int32)
        tokens[0] = 100 + index
        slots = np.zeros(length, bool)
        slots[1] = index % 3 > 0
        targets = np.arange(index % 3 + 1, dtype=np.int32)
        rows.append(Row(tokens, slots, targets, targets + 50, np.full(index % 4 + 1, index, np.int32)))
        images.append(index if index % 3 else -1)
    features = np.arange(COUNT * 2 * 3, dtype=np.float32).reshape(COUNT, 2, 3) + 1
    return Rows(rows, np.array(images), {"selected": features}, pad_id=7)


def taken(data: Rows, steps: int, start: int = 0, seed: int = 0, size: int = BATCH) -> list[Batch]:
    return list(itertools.islice(batches(data, size, seed, start), steps))


def order(stream: list[Batch]) -> list[int]:
    return [int(token) - 100 for batch in stream for token in batch["tokens"][:, 0]]


def test_every_row_comes_once_an_epoch_and_epochs_differ(data: Rows) -> None:
    ids = order(taken(data, 9))
    epochs = [tuple(ids[start : start + COUNT]) for start in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len(set(epochs)) == 3


def test_epochs_are_whole_where_batches_do_not_divide_them(data: Rows) -> None:
    ids = order(taken(data, 12, size=5))
    for start in range(0, 5 * COUNT, COUNT):
        assert sorted(ids[start : start + COUNT]) == list(range(COUNT))


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 11])
def test_resumed_at_a_step_is_uninterrupted(start: int, data: Rows) -> None:
    whole, resumed = taken(data, 13), taken(data, 13 - start, start)
    for ours, theirs in zip(resumed, whole[start:], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_order_is_that_of_the_seed(data: Rows) -> None:
    assert order(taken(data, 6, seed=1)) == order(taken(data, 6, seed=1))
    assert order(taken(data, 6, seed=1)) != order(taken(data, 6, seed=2))


def test_rows_are_padded_so_that_nothing_sees_the_padding(data: Rows) -> None:
    assert (data.length, data.targets) == (16, 3)
    for index, row in enumerate(data.rows):
        out = pad_row(data, index, 16, 3)
        used = len(row.tokens)
        np.testing.assert_array_equal(out["tokens"][:used], row.tokens)
        assert (out["tokens"][used:] == 7).all()
        np.testing.assert_array_equal(out["image_slots"], np.pad(row.image_slots, (0, 16 - used)))
        np.testing.assert_array_equal(out["segment_ids"], np.arange(16) < used)
        np.testing.assert_array_equal(out["positions"], np.arange(16))
        assert out["target_mask"].sum() == len(row.target_ids)
        np.testing.assert_array_equal(out["target_ids"][out["target_mask"]], row.target_ids)
        np.testing.assert_array_equal(out["target_positions"][out["target_mask"]], row.target_positions)
        shown = data.features["selected"][index] if index % 3 else np.zeros((2, 3))
        np.testing.assert_array_equal(out["selected"], shown)


def test_batches_hold_the_padded_rows(data: Rows) -> None:
    for batch in taken(data, 3):
        for row, index in enumerate(order([batch])):
            for name, value in pad_row(data, index, 16, 3).items():
                assert batch[name].dtype == value.dtype
                np.testing.assert_array_equal(batch[name][row], value)


@pytest.mark.parametrize("size", [4, 5, 12, 20])
def test_in_order_covers_each_row_once_and_filler_has_no_targets(size: int, data: Rows) -> None:
    stream = list(in_order(data, size))
    assert all(len(batch["tokens"]) == size for batch in stream)
    assert len(stream) == -(-COUNT // size)
    ids = order(stream)
    assert ids[:COUNT] == list(range(COUNT))
    masks = np.concatenate([batch["target_mask"] for batch in stream])
    assert not masks[COUNT:].any()
    assert masks.sum() == sum(len(row.target_ids) for row in data.rows)
    assert ids[COUNT:] == [0] * (len(stream) * size - COUNT)


def test_length_is_the_longest_row_rounded_up(data: Rows) -> None:
    exact = row_of(8, 0)
    assert Rows([exact], np.array([-1]), {}, 0).length == 8


def row_of(length: int, slots: int) -> Row:
    one = np.zeros(1, np.int32)
    return Row(np.zeros(length, np.int32), np.arange(length) < slots, one, one, one)


def test_rows_that_may_be_narrowed_keep_the_room_of_an_image_free() -> None:
    """Whatever rows there are: of text alone, too, nothing may be cut off."""
    for rows in ([row_of(8, 0)], [row_of(8, 0), row_of(7, 4)], [row_of(8, 4)]):
        text = max(len(row.tokens) - int(row.image_slots.sum()) for row in rows)
        spare = Rows(rows, np.full(len(rows), -1), {}, 0, spare=4)
        assert text + 4 <= spare.length < text + 4 + 8


def test_questions_are_in_the_batch_where_they_are_read(data: Rows) -> None:
    assert "query_tokens" not in pad_row(data, 0, 16, 3)
    asking = replace(data, queries=True)
    for batch in in_order(asking, 5):
        for tokens, query, length in zip(
            batch["tokens"], batch["query_tokens"], batch["query_length"], strict=True
        ):
            index = int(tokens[0]) - 100
            assert query.tolist() == [index] * (index % 4 + 1) + [7] * (3 - index % 4)
            assert length == index % 4 + 1
