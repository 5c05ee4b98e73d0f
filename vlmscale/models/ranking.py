"""Attention that tokens receive, which reducers rank by, and how many tokens a share is."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.attention import attention_weights
from vlmscale.models.cuts import Heads, Prefix

_ROWS = 128  # queries whose attention is held at once


def last_query(tokens: Prefix, heads: Heads) -> jax.Array:
    """Attention that the last token of each prompt gives to every token, mean over heads: [B, T] float32.

    One row of the attention, so that the others are never computed: they would be a layer's whole scores.
    """
    q = jnp.take_along_axis(heads.q, tokens.last[:, None, None, None], axis=1)
    return jnp.mean(attention_weights(q, heads.k, tokens.valid[:, None]), axis=(1, 2))


def received(
    valid: jax.Array,
    heads: Heads,
    queries: jax.Array,
    itself: bool,
    segment_ids: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention that each token receives from chosen ones, mean over heads, summed over these.

    Args:
      valid: [B, T] bool, tokens that are seen.
      heads: of the layer.
      queries: [B, T], how much the attention of each token counts, bool or float32; [B, T, C] for C choices.
      itself: whether what a token gives to itself counts.
      segment_ids: [B, T] int32, where tokens see those of their own alone.
      bias: [B, T] float32, added to the scores of each key.

    Returns:
      [B, T] or [B, T, C] float32.
    """
    batch, length = valid.shape
    blocks = math.ceil(length / _ROWS)
    padding = blocks * _ROWS - length
    q = jnp.pad(heads.q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    more = [(0, 0)] * (queries.ndim - 2)
    counted = jnp.pad(
        queries * valid.reshape(batch, length, *(1,) * len(more)), ((0, 0), (0, padding), *more)
    )
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, padding)))

    def add(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        start = block * _ROWS
        rows = jax.lax.dynamic_slice_in_dim(q, start, _ROWS, axis=1)
        mine = jax.lax.dynamic_slice_in_dim(counted, start, _ROWS, axis=1)
        earlier = jnp.arange(length) <= start + jnp.arange(_ROWS)[:, None]
        seen = earlier & valid[:, None]
        if ids is not None and segment_ids is not None:
            own = jax.lax.dynamic_slice_in_dim(ids, start, _ROWS, axis=1)
            seen &= own[:, :, None] == segment_ids[:, None]
        weights = attention_weights(rows, heads.k, seen, bias)
        if not itself:
            weights = jnp.where(jnp.arange(length) == start + jnp.arange(_ROWS)[:, None], 0, weights)
        return total + jnp.einsum("bhts,bt...->bs...", weights, mine) / weights.shape[1], None

    return jax.lax.scan(add, jnp.zeros(queries.shape, jnp.float32), jnp.arange(blocks))[0]


def share_of(share: float, count: int, whole: float = 0.5) -> int:
    """A share of so many tokens as a whole number, of any at least one.

    Args:
      share: above 0, at most 1.
      count: of tokens.
      whole: what is added before the fraction is cut off: 0.5 for the nearest, 0 for what is below.
    """
    return min(max(math.floor(share * count + whole), 1), count)


def shares_of(share: float, counts: jax.Array, slots: int, whole: float = 0.5) -> jax.Array:
    """`share_of` each of [B] counts up to `slots`, by a table: float32 would round some of them elsewhere."""
    table = np.array([share_of(share, count, whole) for count in range(slots + 1)], np.int32)
    return jnp.asarray(table)[counts]
