"""Average pooling of the patch grid, then LLaVA's two-layer projector."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.compressors.mlp import project


class Pool(nn.Module):
    """Mean over g x g equal windows, then Linear -> GELU -> Linear to the LLM's width.

    The projector is that of `mlp`, which this is with one patch a window.
    """

    visual_tokens: int
    llm_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, V, D] in raster order and their validity [B, V]; the text is not used."""
        del text_query
        x = features.selected
        batch, patches, channels = x.shape
        side, grid = round(patches**0.5), round(self.visual_tokens**0.5)
        window = side // grid
        x = x.reshape(batch, grid, window, grid, window, channels).mean((2, 4))
        x = x.reshape(batch, self.visual_tokens, channels)
        return project(x, self.llm_width, self.dtype), jnp.ones((batch, self.visual_tokens), bool)
