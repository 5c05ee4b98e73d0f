"""Average pooling of the patch grid and LLaVA's two-layer projector, in either order."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.compressors.grid import pool_grid
from vlmscale.compressors.mlp import project


class Pool(nn.Module):
    """Mean over a g x g grid of windows: equal ones where g divides the side, else torch's adaptive ones.

    The projector is that of `mlp`, which this is with one patch a window. `placement` says what comes
    first: "before" pools the tower's patches and projects the means; "after" projects every patch and pools
    the results. The two differ, since the projector is not linear, and "after" runs it on every patch.
    """

    visual_tokens: int
    llm_width: int
    placement: str = "before"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in raster order and their validity [N, V]; the text is not used."""
        del text_query
        if self.placement == "after":
            tokens = project_then_pool(features.selected, self.visual_tokens, self.llm_width, self.dtype)
        else:
            tokens = project(pool_grid(features.selected, self.visual_tokens), self.llm_width, self.dtype)
        return tokens, jnp.ones(tokens.shape[:2], bool)


def project_then_pool(x: jax.Array, visual_tokens: int, llm_width: int, dtype: jnp.dtype) -> jax.Array:
    """Means of projected patches, the projector in the module that calls: [N, P, C] to [N, V, D]."""
    return pool_grid(project(x, llm_width, dtype), visual_tokens)
