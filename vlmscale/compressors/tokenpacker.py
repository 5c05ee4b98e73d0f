"""TokenPacker (arXiv 2407.02392): coarse queries that attend to the fine patches of their own region."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import attend
from vlmscale.compressors.features import Features
from vlmscale.layers import LayerNorm, dense

_NORM_EPS = 1e-6  # the published code's, not torch's default


class TokenPacker(nn.Module):
    """Follows the released code (no residual from the query, unlike the paper's figure).

    Queries are the selected layer, reduced to g x g by bilinear interpolation without antialiasing;
    keys and values are MLPs of the concatenated levels; each query attends to the r x r patches of its
    region, r = side / g; a two-layer MLP maps to the LLM's width.
    """

    visual_tokens: int
    llm_width: int
    num_heads: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, V, D] in raster order and their validity [B, V]; the text is not used."""
        del text_query
        if features.levels is None:
            raise ValueError("TokenPacker reads the concatenated levels of the tower")
        batch, patches, width = features.selected.shape
        side, grid = round(patches**0.5), round(self.visual_tokens**0.5)
        region = side // grid
        dense, norm = self._dense, self._norm

        def regions(x: jax.Array) -> jax.Array:
            x = x.reshape(batch, grid, region, grid, region, width).swapaxes(2, 3)
            return x.reshape(batch * grid * grid, region * region, width)

        def keys_or_values(name: str) -> jax.Array:
            h = nn.gelu(dense(width, f"{name}_up")(features.levels), approximate=False)
            return regions(norm(f"{name}_norm")(dense(width, f"{name}_down")(h)))

        k, v = keys_or_values("k"), keys_or_values("v")
        coarse = downsample_bilinear(features.selected.astype(jnp.float32), grid).astype(self.dtype)
        q = norm("q_norm")(dense(width, "q", use_bias=False)(coarse))
        q = q.reshape(batch * grid * grid, 1, width)
        out = self._attention(q, k, v).reshape(batch, self.visual_tokens, width)
        h = nn.gelu(dense(self.llm_width, "up")(out), approximate=False)
        return dense(self.llm_width, "down")(h), jnp.ones((batch, self.visual_tokens), bool)

    def _attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """torch's `nn.MultiheadAttention`: one projection for each of q, k, v, one for the output."""

        def heads(x: jax.Array, name: str) -> jax.Array:
            width = x.shape[-1]
            init = nn.initializers.xavier_uniform()
            y = dense(width, f"attention_{name}", self.dtype, ("embed", "heads"), kernel_init=init)(x)
            return y.reshape(*x.shape[:2], self.num_heads, width // self.num_heads)

        mixed = attend(heads(q, "q"), heads(k, "k"), heads(v, "v"), None).reshape(q.shape)
        return self._dense(q.shape[-1], "attention_o")(mixed)

    def _dense(self, features: int, name: str, use_bias: bool = True) -> nn.Dense:
        init = nn.initializers.truncated_normal(0.02)
        axes = ("mlp", "embed") if name.endswith(("down", "_o")) else ("embed", "mlp")
        return dense(features, name, self.dtype, axes, use_bias=use_bias, kernel_init=init)

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(_NORM_EPS, self.dtype, name=name)


def downsample_bilinear(x: jax.Array, grid: int) -> jax.Array:
    """Bilinear reduction of a square patch map by a whole factor, without antialiasing.

    torch's `interpolate(mode="bilinear", align_corners=False)`: for an even factor the mean of the
    central 2 x 2 patches of each window, for an odd one the centre patch.

    Args:
      x: [B, side * side, C] in raster order.
      grid: output side, a divisor of the input side.

    Returns:
      [B, grid * grid, C].
    """
    batch, patches, channels = x.shape
    side = round(patches**0.5)
    factor = side // grid
    x = x.reshape(batch, grid, factor, grid, factor, channels)
    low, high = (factor - 1) // 2, factor // 2
    return x[:, :, low : high + 1, :, low : high + 1].mean((2, 4)).reshape(batch, grid * grid, channels)
