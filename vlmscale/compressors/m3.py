"""Matryoshka Multimodal Models (M3, arXiv 2405.17430): one model for several token counts."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.compressors.pool import project_then_pool


def scales(largest: int) -> tuple[int, ...]:
    """Token counts that a model is trained at: the grid's side is halved, rounding down, until it is 1.

    576 gives the 576, 144, 36, 9 and 1 of the release; 729 gives 729, 169, 36, 9 and 1.
    """
    side = math.isqrt(largest)
    return tuple((side >> step) ** 2 for step in range(side.bit_length()))


class Matryoshka(nn.Module):
    """Average pooling behind the projector, as `pool` with placement "after" and with its parameters.

    What differs is the training: the loss is the mean over all scales of one batch, so that one set of
    parameters serves all of them. This module gives the scale `visual_tokens`; clones of it that differ in
    that field alone share their parameters, and within one compiled program XLA merges what they compute
    alike: the projector runs once on every patch, though its gradient is computed once a scale. The released
    code picks a scale by the kernel int(sqrt(576 / V)), which gives another count than asked for where V is
    not one of the five; here windows adapt. The paper tunes the tower as well, which the released code does
    not (its forward pass records no gradient); neither does this.

    Attributes:
      largest: the count that the model was made for, hence the scales that it knows; 0 to allow every count.
    """

    visual_tokens: int
    llm_width: int
    largest: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in raster order and their validity [N, V]; the text is not used.

        Raises:
          ValueError: a count that a model made for `largest` is not trained at.
        """
        del text_query
        if self.largest and self.visual_tokens not in scales(self.largest):
            known = ", ".join(map(str, scales(self.largest)))
            raise ValueError(f"M3 made for {self.largest} tokens knows {known}, not {self.visual_tokens}")
        tokens = project_then_pool(features.selected, self.visual_tokens, self.llm_width, self.dtype)
        return tokens, jnp.ones(tokens.shape[:2], bool)
