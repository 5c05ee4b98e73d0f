"""Llama-type decoder: the named size table, the Linen module, its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import attend, causal_mask, rotate


@dataclass(frozen=True)
class DecoderSize:
    """One row of the size table. The vocabulary is the tokenizer's, so it is not part of a size."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads


# Named by total parameters with the demo's tokenizer, embeddings (tied) counted once.
SIZES: dict[str, DecoderSize] = {
    "toy-14k": DecoderSize(width=16, num_layers=2, num_heads=1, num_kv_heads=1, mlp_width=48),
    "toy-40k": DecoderSize(width=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=96),
    "toy-135k": DecoderSize(width=64, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=192),
    "toy-375k": DecoderSize(width=96, num_layers=3, num_heads=3, num_kv_heads=3, mlp_width=256),
}


class KVCache(NamedTuple):
    """Keys and values of all layers, and which slots hold a token that may be seen."""

    k: jax.Array  # [L, B, S, K, D]
    v: jax.Array  # [L, B, S, K, D]
    seen: jax.Array  # [B, S] bool


def empty_cache(size: DecoderSize, batch: int, slots: int, dtype: jnp.dtype = jnp.float32) -> KVCache:
    """A cache with room for `slots` tokens a row and nothing in it."""
    shape = (size.num_layers, batch, slots, size.num_kv_heads, size.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), bool))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


def _dense(features: int, name: str, dtype: jnp.dtype, gain: float = 1.0) -> nn.Dense:
    init = nn.initializers.variance_scaling(gain, "fan_in", "normal")
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class Block(nn.Module):
    """One pre-norm decoder layer; the body of the scan over layers."""

    size: DecoderSize
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        positions: jax.Array,
        mask: jax.Array,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, T, D]; with a cache, keys and values are written at `slot` and all slots are attended."""
        size = self.size
        batch, length, _ = x.shape
        kv_width = size.num_kv_heads * size.head_dim
        h = RMSNorm(size.norm_eps, name="attention_norm")(x)
        q = _dense(size.width, "q", self.dtype)(h).reshape(batch, length, size.num_heads, size.head_dim)
        k = _dense(kv_width, "k", self.dtype)(h).reshape(batch, length, size.num_kv_heads, size.head_dim)
        v = _dense(kv_width, "v", self.dtype)(h).reshape(batch, length, size.num_kv_heads, size.head_dim)
        q, k = rotate(q, positions, size.rope_theta), rotate(k, positions, size.rope_theta)
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, slot, 0, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, slot, 0, 0))
            cache = (k, v)
        mixed = attend(q, k, v, mask).reshape(batch, length, size.width)
        gain = 0.5 / size.num_layers  # keeps the residual stream's variance at 1 for any depth
        x = x + _dense(size.width, "o", self.dtype, gain)(mixed)
        h = RMSNorm(size.norm_eps, name="mlp_norm")(x)
        gate = nn.silu(_dense(size.mlp_width, "gate", self.dtype)(h))
        h = gate * _dense(size.mlp_width, "up", self.dtype)(h)
        x = x + _dense(size.width, "down", self.dtype, gain)(h)
        return x, cache


class Decoder(nn.Module):
    """Embeddings, scanned layers, final norm, tied head.

    Positions and segments are explicit, so that packed rows, padded rows and cached decoding are one
    code path.
    """

    size: DecoderSize
    vocab_size: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Declare the parameters."""
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(self.size.width**-0.5),
            (self.vocab_size, self.size.width),
            jnp.float32,
        )
        # Recomputing a layer in the backward pass is faster than keeping its intermediates, also on CPU,
        # where the scan would copy each of them into a stacked array.
        scan = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.size.num_layers,
        )
        self.layers = scan(self.size, self.dtype)
        self.final_norm = RMSNorm(self.size.norm_eps)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] to embeddings [B, T, D]."""
        return self.embedding[tokens].astype(self.dtype)

    def __call__(self, embeddings: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Final hidden states, after the last norm.

        Args:
          embeddings: [B, T, D].
          positions: [B, T] int32, counted inside each segment.
          segment_ids: [B, T] int32, 0 where there is padding.

        Returns:
          [B, T, D].
        """
        x, _ = self.layers(embeddings, None, positions, causal_mask(segment_ids), 0)
        return self.final_norm(x)

    def extend(
        self, embeddings: jax.Array, positions: jax.Array, valid: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Run T new tokens behind what the cache holds (prefill when it is empty, decode when T = 1).

        Args:
          embeddings: [B, T, D] of the new tokens.
          positions: [B, T] int32.
          valid: [B, T] bool; False marks padding, which no later token sees.
          cache: what came before.
          slot: first cache slot to write, the same for all rows.

        Returns:
          Hidden states [B, T, D] after the final norm, and the longer cache.
        """
        length = embeddings.shape[1]
        seen = jax.lax.dynamic_update_slice(cache.seen, valid, (0, slot))
        slots = jnp.arange(cache.seen.shape[1])
        causal = slots[None, :] <= slot + jnp.arange(length)[:, None]
        mask = seen[:, None, :] & causal[None]
        x, (k, v) = self.layers(embeddings, (cache.k, cache.v), positions, mask, slot)
        return self.final_norm(x), KVCache(k, v, seen)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to float32 logits [..., vocab] through the tied embedding."""
        return jnp.einsum(
            "...d,vd->...v", hidden, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32
        )
