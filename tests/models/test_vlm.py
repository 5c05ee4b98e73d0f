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
from vlmscale.models.vlm import VLM, splice

ROWS, LENGTH, VISUAL, WIDTH = 3, 9, 4, 5
run = jax.jit(splice)


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
    grads = jax.grad(lambda v: splice(text, v, image_slots).sum())(visual)
    np.testing.assert_array_equal(grads, np.array([0, 1])[:, None, None] * np.ones_like(visual))


def test_visual_tokens_take_the_dtype_of_the_text() -> None:
    text, visual = jnp.zeros((1, LENGTH, WIDTH), jnp.bfloat16), jnp.ones((1, VISUAL, WIDTH))
    assert splice(text, visual, jnp.ones((1, LENGTH), bool)).dtype == jnp.bfloat16


def test_blind_model_has_no_compressor_and_any_id_may_fill_a_slot(
    random_params: Callable[..., Any],
) -> None:
    size = DecoderSize(width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=8)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (2, 7))
    image_slots = np.zeros((2, 7), bool)
    image_slots[0, 1:5] = True
    rest = (np.broadcast_to(np.arange(7), (2, 7)), np.ones((2, 7), int))
    targets = np.array([[4, 6], [0, 6]])
    features = Features(jnp.asarray(rng.standard_normal((2, 16, 6)), jnp.float32))
    model = VLM(size, 11, "pool", 4)
    params = random_params(model, tokens, image_slots, *rest, features, targets)
    apply = jax.jit(model.apply)
    logits = apply(params, tokens, image_slots, *rest, features, targets)
    assert logits.shape == (2, 2, 11)
    other = np.where(image_slots, (tokens + 3) % 11, tokens)
    np.testing.assert_array_equal(apply(params, other, image_slots, *rest, features, targets), logits)
    changed = Features(features.selected + 1)
    moved = np.abs(apply(params, tokens, image_slots, *rest, changed, targets) - logits).max((1, 2))
    assert moved[0] > 1e-4
    assert moved[1] == 0
    blind = VLM(size, 11, "pool", 0)
    blind_params = {"params": {"decoder": params["params"]["decoder"]}}
    alone = jax.jit(blind.apply)(blind_params, tokens, image_slots, *rest, None, targets)
    np.testing.assert_allclose(alone[1], logits[1], atol=1e-6)
    shapes = jax.eval_shape(lambda: blind.init(jax.random.key(0), tokens, image_slots, *rest, None, targets))
    assert set(shapes["params"]) == {"decoder"}
