"""Sparsity Meets Similarity (arXiv 2409.01162): two cuts whose sizes depend on the picture. Training-free.

Reconstruction from the abstract: no code is public, and the similarity, the inflection, the layer and the
score of the text are not said there. Assumed: in front of the LLM a patch's similarity is its cosine with the
mean of all patches, because towers without a class token, and stored outputs of those with one, have nothing
else. In it a token's score is the attention that it receives from the text behind the picture, mean over
heads, in the layer in front of the cut. Both curves, sorted downwards, are cut at their knee.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.models.cuts import Between, Ranking
from vlmscale.models.ranking import received


class SparsitySimilarity(nn.Module):
    """The second cut: of visual tokens, in front of `layer`."""

    layer: int

    @property
    def layers(self) -> tuple[int, ...]:
        """In front of which layers tokens go."""
        return (self.layer,)

    def most(self, cut: int, slots: int) -> int:
        """Visual tokens behind the cut, of `slots`: that depends on the picture."""
        return slots

    def __call__(self, cut: int, at: Between) -> Ranking:
        """Scores [B, T] and counts [B]."""
        assert at.heads is not None
        tokens = at.tokens
        score = received(tokens.valid, at.heads, tokens.question, itself=False)
        return Ranking(score, knee(score, tokens.visual))


def similar_patches(patches: jax.Array) -> jax.Array:
    """The first cut: which patches [N, P] (bool) of tower outputs [N, P, C] go on to the LLM."""
    x = patches.astype(jnp.float32)
    mean = jnp.mean(x, axis=1, keepdims=True)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(mean, axis=-1)
    similarity = jnp.sum(x * mean, axis=-1) / jnp.maximum(lengths, 1e-12)
    count = knee(similarity, jnp.ones(similarity.shape, bool))
    rank = jnp.argsort(jnp.argsort(-similarity, axis=1, stable=True), axis=1)
    return rank < count[:, None]


def knee(scores: jax.Array, counted: jax.Array) -> jax.Array:
    """How many of the highest scores lie in front of the knee of their falling curve, and on it.

    The knee is the point farthest below the chord from the highest score to the lowest; the first of several.
    A curve that is nowhere below its chord has none, and all are in front of it.

    Args:
      scores: [B, T].
      counted: [B, T] bool, those that are looked at.

    Returns:
      [B] int32, of rows with any at least one.
    """
    total = jnp.sum(counted, axis=1, keepdims=True)
    index = jnp.arange(scores.shape[1])
    falling = -jnp.sort(jnp.where(counted, -scores, jnp.inf), axis=1)
    inside = index < total
    falling = jnp.where(inside, falling, 0)
    last = jnp.take_along_axis(falling, jnp.maximum(total - 1, 0), axis=1)
    chord = falling[:, :1] + (last - falling[:, :1]) * index / jnp.maximum(total - 1, 1)
    below = jnp.where(inside, chord - falling, -jnp.inf)
    # Rounding alone must not make a knee of a straight line.
    bend = jnp.max(below, axis=1) > 1e-6 * jnp.maximum(jnp.abs(falling[:, 0]), jnp.abs(last[:, 0]))
    return jnp.where(bend, jnp.argmax(below, axis=1) + 1, total[:, 0]).astype(jnp.int32)
