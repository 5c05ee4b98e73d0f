"""Attention and rotary positions: the one place that multiplies queries with keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Scaled dot-product attention with grouped keys; softmax in float32.

    Args:
      q: [B, T, H, D] queries.
      k: [B, S, K, D] keys, H a multiple of K (grouped-query attention).
      v: [B, S, K, D] values.
      mask: [B, T, S] bool, True where query t may see key s; None for full attention. A row without
        any True gives the mean of all values, never a NaN.

    Returns:
      [B, T, H, D] in the dtype of `v`.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads, slots = k.shape[2], k.shape[1]
    rows = batch * num_kv_heads
    # Heads that share a key become rows of one plain batched product: no key is repeated, and on CPU
    # this layout is about a third faster, gradient included, than a five-index contraction.
    q = (
        q.reshape(batch, length, num_kv_heads, -1, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(rows, -1, head_dim)
    )
    k, v = (x.swapaxes(1, 2).reshape(rows, slots, head_dim) for x in (k, v))
    scores = jnp.einsum("btd,bsd->bts", q, k, preferred_element_type=jnp.float32) * (head_dim**-0.5)
    if mask is not None:
        grouped = scores.reshape(batch, -1, length, slots)
        scores = jnp.where(mask[:, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    mixed = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return mixed.reshape(batch, num_heads, length, head_dim).swapaxes(1, 2)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """Causal attention inside each segment: [B, T] int (0 is padding) to [B, T, T] bool."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = segment_ids.shape[1]
    return same & jnp.tril(jnp.ones((length, length), bool))


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, rotate-half convention (pairs i, i + D/2), angles in float32.

    Args:
      x: [B, T, H, D] queries or keys.
      positions: [B, T] int32.
      theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
