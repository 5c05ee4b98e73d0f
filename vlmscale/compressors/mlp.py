"""LLaVA-1.5's projector (arXiv 2310.03744): every patch becomes a token, nothing is compressed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.layers import dense


class Projector(nn.Module):
    """`mlp2x_gelu`: Linear -> exact GELU -> Linear to the LLM's width, with biases, without a norm."""

    visual_tokens: int
    llm_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, V, D], one a patch in raster order, and their validity [B, V]."""
        del text_query
        tokens = project(features.selected, self.llm_width, self.dtype)
        return tokens, jnp.ones(tokens.shape[:2], bool)


def project(x: jax.Array, llm_width: int, dtype: jnp.dtype) -> jax.Array:
    """The projector's two layers, `up` and `down`, in the module that calls: [B, V, C] to [B, V, D]."""
    up = dense(llm_width, "up", dtype, ("embed", "mlp"))
    down = dense(llm_width, "down", dtype, ("mlp", "embed"))
    return down(nn.gelu(up(x.astype(dtype)), approximate=False))
