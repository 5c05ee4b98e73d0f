"""FasterVLM (arXiv 2412.01818): the patches that the class token attends to most."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.compressors.mlp import project
from vlmscale.compressors.selection import read, score_field


class FasterVLM(nn.Module):
    """Follows the released code: the V patches of the highest score, in raster order, unchanged.

    The score is the attention of the block whose output is the selected layer; the paper's text says the last
    block. The code projects all patches and then drops; here the others are dropped first, which gives the
    same tokens for less work. It scores in half precision, where ties are common; here in float32, and of
    equal scores the lowest index wins. With V = P this is `mlp`, with the same parameters.

    Attributes:
      score: "class", attention from the class token; "mean", attention received from all tokens; "probe",
        attention from SigLIP's pooling probe; "auto", "class" where the tower has a class token, else "mean".
    """

    visual_tokens: int
    llm_width: int
    score: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in raster order and their validity [N, V]; the text is not used.

        Raises:
          ValueError: the attention that the score reads is not there.
        """
        del text_query
        field = score_field(self.score, "class_attention", features.class_attention is not None)
        scores = read(features, field, "FasterVLM").astype(jnp.float32)
        kept = jnp.sort(jax.lax.top_k(scores, self.visual_tokens)[1], axis=1)
        selected = jnp.take_along_axis(features.selected, kept[:, :, None], axis=1)
        tokens = project(selected, self.llm_width, self.dtype)
        return tokens, jnp.ones(tokens.shape[:2], bool)
