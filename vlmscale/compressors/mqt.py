"""Matryoshka Query Transformer (arXiv 2405.19315): the first m of M learned queries give m tokens."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.attention import split_rows
from vlmscale.compressors.features import Features
from vlmscale.compressors.multihead import MultiheadAttention, small_normal
from vlmscale.compressors.positions import grid_side, resize_grid, sincos_positions
from vlmscale.layers import LayerNorm, dense, named

_NORM_EPS = 1e-6  # the published code's, not torch's default


class MQT(nn.Module):
    """One cross-attention of the first m queries at the tower's width, and a linear map to the LLM's.

    Follows the released code, which has neither the residual nor the norm behind the attention that other
    resamplers have. Its keys are normed positions alone, without the patches: how a token mixes the patches
    is learned but the same for every image. The paper describes attention to the image; `keys` = "image" is
    that, as in other resamplers: normed patches, to which the positions are added. Query i stands in cell i
    of a grid of M cells in raster order, so the first few all stand in its top row. Positions went through
    float16 in the released weights, and do here, for the rounding shows in the output.

    `largest` = M, a square, is the model's; `visual_tokens` = m <= M is how many tokens it gives now, and
    the first m of a larger number. `largest` = 0 stands for m itself.
    """

    visual_tokens: int
    llm_width: int
    keys: str = "position"
    largest: int = 0
    num_heads: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, m, D] in the order of the queries and their validity [N, m]; the text is not used.

        Raises:
          ValueError: M is no square, m is not between 1 and M, `keys` is unknown, or the heads do not divide
            the tower's width or 4 does not.
        """
        del text_query
        largest, count = self.largest or self.visual_tokens, self.visual_tokens
        if not 1 <= count <= largest:
            raise ValueError(f"{count} tokens of an MQT with {largest} queries: use 1 to {largest}")
        if self.keys not in ("position", "image"):
            raise ValueError(f"unknown keys {self.keys!r}: use position or image")
        x = features.selected.astype(self.dtype)
        width = x.shape[-1]
        table = sincos_positions(grid_side(largest), width).astype(np.float16).astype(np.float32)
        init = named(small_normal, (None, "embed"))
        queries = self.param("queries", init, (largest, width), jnp.float32)[:count] + table[:count]
        norm, places = self._norm, resize_grid(table, features.side)
        # A patch dimension in front of the batch, so that what is the same for all images is computed once.
        if self.keys == "image":
            keys = norm("k_norm")(x)[:, None] + places.astype(self.dtype)
        else:
            keys = norm("k_norm")(places[None])
        attention = nn.vmap(
            MultiheadAttention,
            in_axes=(None, 0 if self.keys == "image" else None, 0),
            variable_axes={"params": None},
            split_rngs={"params": False},
        )(self.num_heads, self.dtype, small_normal, name="attention")
        out = attention(norm("q_norm")(queries)[None], keys, norm("v_norm")(x)[:, None])
        init, axes = nn.initializers.normal(self.llm_width**-0.5), ("mlp", "embed")
        project = dense(self.llm_width, "proj", self.dtype, axes, use_bias=False, kernel_init=init)
        tokens = project(split_rows(out[:, 0]))
        return tokens, jnp.ones(tokens.shape[:2], bool)

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(_NORM_EPS, self.dtype, name=name)


def trained_counts(largest: int) -> tuple[int, ...]:
    """The counts that a model of M queries is trained at: even numbers below M as published, and M itself.

    M is even in the published model (256); with an odd one, even numbers alone would leave its last query
    untrained.
    """
    return (*range(2, largest, 2), largest)
