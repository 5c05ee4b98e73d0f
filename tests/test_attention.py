"""Attention, masks and rotary positions against plain numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from vlmscale.attention import attend, rotate


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query, one head at a time; a head's keys are those of its group."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for row, place, head in np.ndindex(q.shape[:3]):
        keys, values = k[row, :, head // group], v[row, :, head // group]
        scores = keys @ q[row, place, head] / np.sqrt(q.shape[-1])
        weights = np.where(mask[row, place], np.exp(scores - scores.max()), 0)
        if not mask[row, place].any():
            weights = np.ones_like(scores)
        out[row, place, head] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_attend_is_grouped_query_attention(heads: int, kv_heads: int) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 3, heads, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 5, kv_heads, 8)).astype(np.float32)
    mask = rng.random((2, 3, 5)) < 0.5
    mask[0, 1] = False  # sees nothing: the mean of all values, not a NaN
    np.testing.assert_allclose(attend(q, k, v, mask), reference(q, k, v, mask), atol=1e-6)
    everything = np.ones_like(mask)
    np.testing.assert_allclose(attend(q, k, v, None), reference(q, k, v, everything), atol=1e-6)


def test_softmax_is_float32_and_the_output_has_the_values_dtype() -> None:
    # Scores of 100 and 100.25, which bfloat16 cannot tell apart.
    q = jnp.array([1, 1, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k = jnp.array([[200, 0, 0, 0], [200, 0.5, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([[0, 0, 0, 0], [1, 1, 1, 1]], jnp.bfloat16).reshape(1, 2, 1, 4)
    out = attend(q, k, v, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.25)), atol=4e-3)


def test_rotate_multiplies_halves_as_complex_numbers() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2], [5, 40, 300]])
    frequency = 100.0 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * positions[:, :, None, None] * frequency)
    wanted = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotate(x, positions, 100.0), wanted, atol=1e-4)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def product(first: int, second: int) -> float:
        turned = (rotate(x, np.array([[at]]), 10_000.0) for x, at in ((q, first), (k, second)))
        return float(np.sum(np.multiply(*turned)))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-5)
    assert abs(product(7, 3) - product(3, 7)) > 1e-3
