"""Splicing visual tokens into the token stream, and the blind model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlmscale.compressors import Features
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM, Inputs, close_gaps, holes_first, narrow, splice

ROWS, LENGTH, VISUAL, WIDTH = 3, 9, 4, 5
run = jax.jit(lambda text, visual, slots: splice(text, visual, jnp.ones(visual.shape[:2], bool), slots)[0])


places = st.sets(st.integers(0, LENGTH - 1), min_size=VISUAL, max_size=VISUAL)


@given(st.lists(places | st.just(set()), min_size=ROWS, max_size=ROWS))
def test_slots_take_visual_tokens_in_order_and_nothing_else_changes(slots: list[set[int]]) -> None:
    text = np.arange(ROWS * LENGTH * WIDTH, dtype=np.float32).reshape(ROWS, LENGTH, WIDTH)
    visual = -1 - np.arange(ROWS * VISUAL * WIDTH, dtype=np.float32).reshape(ROWS, VISUAL, WIDTH)
    image_slots = np.zeros((ROWS, LENGTH), bool)
    wanted = text.copy()
    for row, places in enumerate(slots):
        for number, place in enumerate(sorted(places)):
            image_slots[row, place] = True
            wanted[row, place] = visual[row, number]
    np.testing.assert_array_equal(run(text, visual, image_slots), wanted)


def test_text_rows_take_no_gradient_into_visual_tokens() -> None:
    text, visual = jnp.ones((2, LENGTH, WIDTH)), jnp.ones((2, VISUAL, WIDTH))
    image_slots = np.zeros((2, LENGTH), bool)
    image_slots[1, 1 : 1 + VISUAL] = True
    grads = jax.grad(lambda v: run(text, v, image_slots).sum())(visual)
    np.testing.assert_array_equal(grads, np.array([0, 1])[:, None, None] * np.ones_like(visual))


def test_visual_tokens_take_the_dtype_of_the_text() -> None:
    text, visual = jnp.zeros((1, LENGTH, WIDTH), jnp.bfloat16), jnp.ones((1, VISUAL, WIDTH))
    assert run(text, visual, jnp.ones((1, LENGTH), bool)).dtype == jnp.bfloat16


def test_blind_model_has_no_compressor_and_any_id_may_fill_a_slot(
    random_params: Callable[..., Any],
) -> None:
    size = DecoderSize(width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=8)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (2, 7))
    image_slots = np.zeros((2, 7), bool)
    image_slots[0, 1:5] = True
    positions = np.broadcast_to(np.arange(7), (2, 7))
    targets = np.array([[4, 6], [0, 6]])
    features = Features(jnp.asarray(rng.standard_normal((2, 16, 6)), jnp.float32))
    inputs = Inputs(tokens, image_slots, positions, np.ones((2, 7), int), features)
    model = VLM(size, 11, "pool", 4)
    params = random_params(model, inputs, targets)
    apply = jax.jit(model.apply)
    logits = apply(params, inputs, targets)
    assert logits.shape == (2, 2, 11)
    other = np.where(image_slots, (tokens + 3) % 11, tokens)
    np.testing.assert_array_equal(apply(params, inputs._replace(tokens=other), targets), logits)
    changed = inputs._replace(features=Features(features.selected + 1))
    moved = np.abs(apply(params, changed, targets) - logits).max((1, 2))
    assert moved[0] > 1e-4
    assert moved[1] == 0
    blind = VLM(size, 11, "pool", 0)
    blind_params = {"params": {"decoder": params["params"]["decoder"]}}
    alone = jax.jit(blind.apply)(blind_params, inputs._replace(features=None), targets)
    np.testing.assert_allclose(alone[1], logits[1], atol=1e-6)
    shapes = jax.eval_shape(lambda: blind.init(jax.random.key(0), inputs._replace(features=None), targets))
    assert set(shapes["params"]) == {"decoder"}


def test_slots_of_several_images_a_row_take_the_tokens_of_their_own() -> None:
    visual = -1 - np.arange(4 * VISUAL * WIDTH, dtype=np.float32).reshape(4, VISUAL, WIDTH)
    text = np.ones((2, 12, WIDTH), np.float32)
    slots = np.zeros((2, 12), np.int32)
    slots[0, [1, 2, 3, 4]], slots[0, [6, 7, 9, 10]], slots[1, [2, 3, 4, 5]] = 1, 2, 2
    valid = np.ones((4, VISUAL), bool)
    valid[1, 2:] = False
    made, filled = jax.jit(splice)(text, visual, valid, slots)
    np.testing.assert_array_equal(made[0, 1:5], visual[0])
    np.testing.assert_array_equal(made[0, 6:8], visual[1, :2])
    np.testing.assert_array_equal(made[1, 2:6], visual[3])
    assert np.flatnonzero(filled[0]).tolist() == [1, 2, 3, 4, 6, 7]
    np.testing.assert_array_equal(made[0, 9:11], 1)  # what is not valid leaves the slot as it was
    # What is used of an image stands in its last slots, in order.
    moved, used = jax.jit(holes_first)(visual, valid, jnp.int32(3))
    assert used.sum(axis=1).tolist() == [3, 2, 3, 3]
    assert used[:, -1].all()
    np.testing.assert_array_equal(moved[0, 1:], visual[0, :3])
    np.testing.assert_array_equal(moved[1, 2:], visual[1, :2])
    _, three = splice(text, moved, used, slots)
    assert np.flatnonzero(three[1]).tolist() == [3, 4, 5]
    assert np.flatnonzero(three[0]).tolist() == [2, 3, 4, 9, 10]


closed_up = jax.jit(close_gaps)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4))
def test_positions_close_up_inside_each_segment(segments: list[list[bool]]) -> None:
    """Each segment is a list of which of its tokens are dropped."""
    padding = 26 - sum(map(len, segments))
    positions = [place for dropped in segments for place in range(len(dropped))] + list(range(padding))
    ids = [number + 1 for number, dropped in enumerate(segments) for _ in dropped] + [0] * padding
    dropped = [flag for flags in segments for flag in flags] + [False] * padding
    closed, left = closed_up(*(np.array([x]) for x in (positions, ids, dropped)))
    for number, flags in enumerate(segments):
        mine = np.asarray(left[0]) == number + 1
        assert mine.sum() == flags.count(False)
        assert closed[0][mine].tolist() == list(range(flags.count(False)))


def test_a_narrowed_batch_is_the_one_with_fewer_slots() -> None:
    rows = [(3, 4), (0, 5), (4, 1)]  # tokens of text before the image (0: none) and behind it

    def batch(visual_tokens: int, length: int) -> tuple[Inputs, np.ndarray]:
        names = ("tokens", "image_slots", "positions", "segment_ids", "answers")
        out = {name: np.zeros((len(rows), length), np.int32) for name in names}
        targets = np.zeros((len(rows), 2), np.int32)
        for row, (before, behind) in enumerate(rows):
            slots = visual_tokens if before else 0
            used = before + slots + behind
            out["tokens"][row, :used] = [*range(1, before + 1), *[0] * slots, *range(20, 20 + behind)]
            out["image_slots"][row, before : before + slots] = 1
            out["segment_ids"][row, :used] = 1
            out["answers"][row, used - 1] = 1
            targets[row] = [used - 1, max(before - 1, 0)]
        out["positions"][:] = np.arange(length)
        return Inputs(**out, features=Features(np.zeros((len(rows), 1, 1)))), targets

    wide, places = batch(6, 14)
    for count in (1, 3, 6):
        narrowed, moved = jax.jit(narrow, static_argnums=(2, 3))(wide, places, 6, count)
        wanted, where = batch(count, 14 - 6 + count)
        np.testing.assert_array_equal(moved, where)
        for name in ("tokens", "image_slots", "segment_ids", "answers"):
            np.testing.assert_array_equal(getattr(narrowed, name), getattr(wanted, name), err_msg=name)
        kept = wanted.segment_ids > 0
        np.testing.assert_array_equal(narrowed.positions[kept], wanted.positions[kept])
