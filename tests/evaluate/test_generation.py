"""Choosing the next token: temperature and nucleus against transformers, stop tokens, streams of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from vlmscale.errors import UserError
from vlmscale.evaluate.generation import Sampling, answer_length, choose, nucleus, pad_prompts


@given(st.integers(0, 1000), st.floats(0.05, 0.999), st.floats(0.2, 3.0))
def test_the_nucleus_is_that_of_transformers(seed: int, top_p: float, temperature: float) -> None:
    logits = 3 * np.random.default_rng(seed).standard_normal((4, 50)).astype(np.float32)
    ids = torch.zeros((4, 1), dtype=torch.long)
    warmed = TemperatureLogitsWarper(temperature)(ids, torch.tensor(logits))
    wanted = TopPLogitsWarper(top_p)(ids, warmed).numpy()
    ours = np.asarray(nucleus(jnp.asarray(logits) / temperature, top_p))
    # A token whose cumulative probability is top_p but for rounding may fall on either side.
    differ = np.isfinite(ours) != np.isfinite(wanted)
    assert differ.sum(1).max() <= 1
    both = np.isfinite(ours) & np.isfinite(wanted)
    np.testing.assert_allclose(ours[both], wanted[both], rtol=1e-6)
    assert np.isfinite(ours).any(1).all()


def test_samples_follow_the_probabilities() -> None:
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    rows = 20_000
    keys = jax.random.split(jax.random.key(0), rows)
    many = jnp.broadcast_to(logits, (rows, 4))

    def shares(sampling: Sampling) -> np.ndarray:
        chosen = choose(many, keys, jnp.int32(3), sampling)
        return np.bincount(np.asarray(chosen), minlength=4) / rows

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(shares(Sampling(1.0, 0.75)), [0.625, 0.375, 0, 0], atol=0.015)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(Sampling(0.5)), squared / squared.sum(), atol=0.015)
    assert shares(Sampling(0.0)).tolist() == [1, 0, 0, 0]


def test_rows_and_places_draw_from_streams_of_their_own() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    flat = jnp.zeros((2, 1000))
    at = [np.asarray(choose(flat, keys, jnp.int32(place), Sampling(1.0))) for place in range(3)]
    assert len({int(token) for tokens in at for token in tokens}) == 6
    alone = choose(flat[1:], keys[1:], jnp.int32(2), Sampling(1.0))
    assert int(alone[0]) == int(at[2][1])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampling(**options)  # type: ignore[arg-type]


def test_answers_end_with_the_first_of_several_stop_tokens() -> None:
    assert answer_length([5, 7, 3, 7], (7, 3)) == 2
    assert answer_length([5, 3, 7], (7, 3)) == 2
    assert answer_length([5, 6], (7,)) == 2


def test_padding_is_no_image_slot_even_where_it_has_the_id_of_one() -> None:
    batch = pad_prompts([[4, 9, 9, 1], [3]], image_id=9, pad_id=9, length=5)
    assert batch["image_slots"].tolist() == [[False, True, True, False, False], [False] * 5]
    assert batch["valid"].sum(1).tolist() == [4, 1]
