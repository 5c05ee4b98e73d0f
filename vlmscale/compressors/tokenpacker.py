"""TokenPacker (arXiv 2407.02392): coarse queries that attend to the fine patches of their own region."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import split_rows
from vlmscale.compressors.features import Features
from vlmscale.compressors.grid import split_regions
from vlmscale.compressors.mlp import normed_mlp, project
from vlmscale.compressors.multihead import MultiheadAttention, small_normal
from vlmscale.layers import LayerNorm, dense


class TokenPacker(nn.Module):
    """Follows the released code (no residual from the query, unlike the paper's figure).

    Queries are the selected layer, reduced to g x g by bilinear interpolation without antialiasing;
    keys and values are MLPs of the concatenated levels; each query attends to the r x r patches of its
    region, r = side / g; a two-layer MLP maps to the LLM's width. All norms have an eps of 1e-6. Linears
    start from a truncated normal of 0.02, the attention's projections of q, k and v as torch's.
    """

    visual_tokens: int
    llm_width: int
    num_heads: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in raster order and their validity [N, V]; the text is not used.

        Raises:
          ValueError: without `levels`.
        """
        del text_query
        if features.levels is None:
            raise ValueError("TokenPacker reads the concatenated levels of the tower")
        batch, _, width = features.selected.shape
        grid = math.isqrt(self.visual_tokens)
        k, v = (
            split_regions(normed_mlp(features.levels, width, name, self.dtype, small_normal), grid)
            for name in "kv"
        )
        coarse = downsample_bilinear(features.selected.astype(jnp.float32), grid).astype(self.dtype)
        linear = dense(width, "q", self.dtype, ("embed", "mlp"), use_bias=False, kernel_init=small_normal)
        q = LayerNorm(1e-6, self.dtype, name="q_norm")(split_rows(linear(split_rows(coarse))))
        q = split_rows(q).reshape(batch * self.visual_tokens, 1, width)
        mixed = MultiheadAttention(self.num_heads, self.dtype, small_normal, name="attention")(q, k, v)
        mixed = mixed.reshape(batch, self.visual_tokens, width)
        tokens = project(mixed, self.llm_width, self.dtype, small_normal)
        return tokens, jnp.ones(tokens.shape[:2], bool)


def downsample_bilinear(x: jax.Array, grid: int) -> jax.Array:
    """Bilinear reduction of a square patch map by a whole factor, without antialiasing.

    torch's `interpolate(mode="bilinear", align_corners=False)`: for an even factor the mean of the
    central 2 x 2 patches of each window, for an odd one the centre patch.

    Args:
      x: [N, side * side, C] in raster order.
      grid: output side, a divisor of the input side.

    Returns:
      [N, grid * grid, C].
    """
    batch, patches, channels = x.shape
    side = round(patches**0.5)
    factor = side // grid
    x = x.reshape(batch, grid, factor, grid, factor, channels)
    low, high = (factor - 1) // 2, factor // 2
    return x[:, :, low : high + 1, :, low : high + 1].mean((2, 4)).reshape(batch, grid * grid, channels)
