"""QueCC (arXiv 2411.03312): coarse queries that know the question, each reading its own region."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.compressors.grid import split_regions
from vlmscale.compressors.mlp import normed_mlp, project
from vlmscale.compressors.multihead import MultiheadAttention, torch_linear
from vlmscale.layers import LayerNorm, dense, named


class QueCC(nn.Module):
    """Follows the released code, in front of LLaVA's two-layer projector.

    The question's embedding is mapped to the tower's width and added to every patch of the selected layer;
    an MLP and a depthwise convolution, whose kernel and stride are k = side / g, make g x g queries of them.
    Keys and values are MLPs of the concatenated levels; each query attends to the k x k patches of its own
    region, without a residual. All norms have an eps of 1e-6. The code allows a stride that differs from
    the kernel, with regions that are then not what the convolution sees; no published model has one.

    Kernels start as torch's Linear and Conv2d do, the projector's as in `mlp`; biases start at 0, where torch
    draws them. A region of one patch (V = P) leaves nothing to attend to: there the question has no effect.
    The embedding comes in as it is; who calls decides whether a gradient flows back into the LLM (in the
    released code none does).
    """

    visual_tokens: int
    llm_width: int
    num_heads: int = 8
    dtype: jnp.dtype = jnp.float32

    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in raster order and their validity [N, V].

        Args:
          features: `selected` and `levels` are read.
          text_query: [N, 1, E], an embedding of each image's question.

        Raises:
          ValueError: without `levels` or `text_query`.
        """
        return self._run(features, text_query, projected=True)

    def compress(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The same in front of the projector: [N, V, C] and [N, V]."""
        return self._run(features, text_query, projected=False)

    @nn.compact
    def _run(
        self, features: Features, text_query: jax.Array | None, projected: bool
    ) -> tuple[jax.Array, jax.Array]:
        if features.levels is None:
            raise ValueError("QueCC reads the concatenated levels of the tower")
        if text_query is None:
            raise ValueError("QueCC reads an embedding of the question")
        batch, _, width = features.selected.shape
        grid = math.isqrt(self.visual_tokens)

        def region_mlp(x: jax.Array, name: str) -> jax.Array:
            return split_regions(normed_mlp(x, width, name, self.dtype, torch_linear), grid)

        text = dense(width, "text", self.dtype, ("embed", "mlp"), kernel_init=torch_linear)(text_query)
        text = LayerNorm(1e-6, self.dtype, name="text_norm")(text)
        asked = region_mlp(features.selected.astype(self.dtype) + text, "q")
        q = RegionSum(self.dtype, name="downsample")(asked)
        k, v = (region_mlp(features.levels, name) for name in "kv")
        mixed = MultiheadAttention(self.num_heads, self.dtype, name="attention")(q, k, v)
        tokens = mixed.reshape(batch, self.visual_tokens, width)
        if projected:
            tokens = project(tokens, self.llm_width, self.dtype)
        return tokens, jnp.ones(tokens.shape[:2], bool)


class RegionSum(nn.Module):
    """A depthwise convolution whose stride is its kernel's side k, on a grid that is cut into regions."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, regions: jax.Array) -> jax.Array:
        """One weighted sum a region, in float32: [M, k * k, C] to [M, 1, C]."""
        side, channels = math.isqrt(regions.shape[1]), regions.shape[2]
        # torch_linear takes the fan-in of a kernel [k, k, C] to be k * k, as torch does of a depthwise one.
        kernel_init = named(torch_linear, (None, None, "embed"))
        kernel = self.param("kernel", kernel_init, (side, side, channels), jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, ("embed",)), (channels,), jnp.float32)
        weighted = regions.astype(jnp.float32) * kernel.reshape(side * side, channels)
        return (weighted.sum(1, keepdims=True) + bias).astype(self.dtype)
