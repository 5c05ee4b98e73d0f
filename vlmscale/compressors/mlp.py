"""LLaVA-1.5's projector (arXiv 2310.03744): every patch becomes a token, nothing is compressed.

Beside it the small networks that several methods are built from.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import split_rows
from vlmscale.compressors.features import Features
from vlmscale.layers import LayerNorm, dense


class Projector(nn.Module):
    """`mlp2x_gelu`: Linear -> exact GELU -> Linear to the LLM's width, with biases, without a norm."""

    visual_tokens: int
    llm_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D], one a patch in raster order, and their validity [N, V]."""
        del text_query
        tokens = project(features.selected, self.llm_width, self.dtype)
        return tokens, jnp.ones(tokens.shape[:2], bool)


def project(
    x: jax.Array,
    llm_width: int,
    dtype: jnp.dtype,
    kernel_init: Any = nn.linear.default_kernel_init,
) -> jax.Array:
    """The projector's two layers, `up` and `down`, in the module that calls: [N, V, C] to [N, V, D].

    By default kernels start with a variance of 1 / inputs, three times that of torch's Linear, and biases at
    0: for all methods the same, whose projectors their authors start by several rules.
    """
    up = dense(llm_width, "up", dtype, ("embed", "mlp"), kernel_init=kernel_init)
    down = dense(llm_width, "down", dtype, ("mlp", "embed"), kernel_init=kernel_init)
    return split_rows(down(nn.gelu(up(split_rows(x).astype(dtype)), approximate=False)))


def normed_mlp(x: jax.Array, width: int, name: str, dtype: jnp.dtype, kernel_init: Any) -> jax.Array:
    """Linear -> exact GELU -> Linear -> norm with eps 1e-6, in the module that calls: [..., C] to [..., E].

    The layers are `<name>_up`, `<name>_down` and `<name>_norm`; both Linears are `width` wide. TokenPacker
    makes its keys and values so, QueCC its queries too.
    """
    up = dense(width, f"{name}_up", dtype, ("embed", "mlp"), kernel_init=kernel_init)
    down = dense(width, f"{name}_down", dtype, ("mlp", "embed"), kernel_init=kernel_init)
    h = split_rows(down(nn.gelu(up(x), approximate=False)))
    return LayerNorm(1e-6, dtype, name=f"{name}_norm")(h)
