"""ATP-LLaVA (arXiv 2412.00447): learned thresholds for each layer, predicted for each prompt. Trained.

Reconstruction from the abstract: no code is public. What is stated there: modules between layers; in each an
importance score and a threshold for every instance; a token stays for its importance or for its place in the
picture ("spatial augmented pruning"); masks that have a gradient; a budget. Assumed:

- Modules stand behind 4, 14 and 24 of 32 layers, and at the same shares of other depths.
- A token's importance is the mean of two numbers: of the attention that the picture's tokens, and that the
  question's tokens, give to it in the layer in front, mean over heads, each as a / (a + its mean over the
  tokens that are there). That is 1/2 for an average token, whatever the scale.
- Of the picture's grid every second row and column is sampled, where V is no square every fourth token. A
  sampled token has the place score 1/4, others 0.
- Both thresholds are sigmoids of linear functions of the shares of attention that the picture's tokens get.
- In training a token stays by the larger of the two sigmoids of 10 times what its scores are above the
  thresholds; the logarithm is added to its scores as a key, of this module and of those in front. Afterwards
  it stays where one score is above its threshold. In training the question ends where the first answer
  begins; afterwards it is all text of the prompt behind the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.layers import named
from vlmscale.models.cuts import Between, Heads, Ranking, Soft
from vlmscale.models.ranking import received

_PLACES = (4 / 32, 14 / 32, 24 / 32)  # of modules in the depth
_HIDDEN = 16
_STEEP = 10.0  # of the sigmoids in training
_SAMPLED = 0.25  # place score of a sampled token
_LEAST = 1e-6  # of a soft mask
_DEPTH, _BUDGET = 0.05, 2.0  # weights of the two penalties


class Looked(NamedTuple):
    """Attention that each token received [B, T], float32, and from how much each of it came [B, 1 or T]."""

    from_image: jax.Array
    from_text: jax.Array
    image: jax.Array
    text: jax.Array


class ATP(nn.Module):
    """The modules of an LLM of `num_layers` layers whose images have `visual_tokens` tokens each."""

    num_layers: int
    visual_tokens: int

    @property
    def layers(self) -> tuple[int, ...]:
        """In front of which layers tokens go."""
        return cut_layers(self.num_layers)

    def setup(self) -> None:
        """Declare the parameters: those of all modules along a first axis."""
        cuts = len(self.layers)
        spread = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0
        )
        axes = (None, None, None)
        self.mix = self.param("mix", named(spread, axes), (cuts, 2, _HIDDEN), jnp.float32)
        self.threshold = self.param("threshold", named(spread, axes), (cuts, _HIDDEN, 2), jnp.float32)
        # Nearly all tokens stay at first.
        self.bias = self.param(
            "bias", named(nn.initializers.constant(-2.0), (None, None)), (cuts, 2), jnp.float32
        )

    def params(self) -> dict[str, jax.Array]:
        """All parameters, for `soften`."""
        return {"mix": self.mix, "threshold": self.threshold, "bias": self.bias}

    def most(self, cut: int, slots: int) -> int:
        """Visual tokens behind a cut, of `slots`: that depends on the prompt."""
        return slots

    def __call__(self, cut: int, at: Between) -> Ranking:
        """Scores [B, T] and counts [B]."""
        assert at.heads is not None
        tokens = at.tokens
        text = tokens.question
        asked = jnp.stack([tokens.visual, text], axis=-1)
        own, other = jnp.moveaxis(received(tokens.valid, at.heads, asked, True), -1, 0)

        def total(values: jax.Array) -> jax.Array:
            return jnp.sum(values, axis=1, keepdims=True)

        there = tokens.visual.astype(jnp.float32)
        looked = Looked(own, other, total(there), total(text.astype(jnp.float32)))
        sampled = sample(tokens.rank, self.visual_tokens)
        of_cut = jax.tree.map(lambda leaf: leaf[cut], self.params())
        score = jnp.max(margins(of_cut, looked, there, sampled, total), axis=0)
        return Ranking(score, jnp.sum(tokens.visual & (score > 0), axis=1))


def cut_layers(num_layers: int) -> tuple[int, ...]:
    """In front of which layers of a decoder its modules stand."""
    places = (min(max(round(share * num_layers), 1), num_layers - 1) for share in _PLACES)
    return tuple(sorted(set(places)))


def sample(rank: jax.Array, visual_tokens: int) -> jax.Array:
    """Which visual tokens are sampled, by their rank [B, T] in an image: bool."""
    side = math.isqrt(visual_tokens)
    if side * side != visual_tokens:
        return rank % 4 == 0
    return (rank // side % 2 == 0) & (rank % side % 2 == 0)


def margins(
    params: Any,
    looked: Looked,
    there: jax.Array,
    sampled: jax.Array,
    total: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """How far importance and place score lie above their thresholds: [2, B, T] float32.

    Args:
      params: of one module.
      looked: attention of the layer in front.
      there: [B, T] float32, how much is left of each visual token; 0 for text.
      sampled: [B, T] bool.
      total: sums [B, T] over the tokens of a conversation: [B, 1], or [B, T] where a row has several.
    """
    count = jnp.maximum(total(there), _LEAST)
    shares, relative = [], []
    for got, askers in ((looked.from_image, looked.image), (looked.from_text, looked.text)):
        whole = total(jnp.where(there > 0, got, 0))
        shares.append(whole / jnp.maximum(askers, _LEAST))
        mean = whole / count
        relative.append(got / jnp.maximum(got + mean, _LEAST**2))
    hidden = jnp.stack(shares, axis=-1) @ params["mix"]
    thresholds = jax.nn.sigmoid(hidden @ params["threshold"] + params["bias"])
    place = jnp.where(sampled, _SAMPLED, 0.0)
    return jnp.stack([sum(relative) / 2 - thresholds[..., 0], place - thresholds[..., 1]])


def soften(cut: Any, heads: Heads, soft: Soft, left: jax.Array, visual_tokens: int) -> jax.Array:
    """The cut in training: the logarithm [B, T] of how much is left of each token behind it.

    Args:
      cut: its number.
      heads: of the layer in front.
      soft: the batch.
      left: the logarithm in front of the cut.
      visual_tokens: of an image.
    """
    ids, valid = soft.segment_ids, soft.segment_ids > 0
    together = (ids[:, :, None] == ids[:, None, :]).astype(jnp.float32)
    there = jnp.where(soft.visual, jnp.exp(left), 0.0)

    def total(values: jax.Array) -> jax.Array:
        return jnp.einsum("bts,bs->bt", together, values)

    asked = soft.text.astype(jnp.float32)
    who = jnp.stack([there, asked], axis=-1)
    own, other = jnp.moveaxis(received(valid, heads, who, True, ids, left), -1, 0)
    looked = Looked(own, other, total(there), total(asked))
    of_cut = jax.tree.map(lambda leaf: leaf[cut], soft.params)
    above = margins(of_cut, looked, there, sample(soft.rank, visual_tokens), total)
    stays = jnp.max(jax.nn.sigmoid(_STEEP * above), axis=0)
    return left + jnp.where(soft.visual, jnp.log(jnp.maximum(stays, _LEAST)), 0.0)


def penalty(shares: jax.Array, num_layers: int, keep: float) -> jax.Array:
    """What training pays for `shares_left`, float32.

    For tokens in deep layers, and for the distance of the mean over all layers from `keep`: the two terms
    that an implementation by others gives for the paper's budget, with weights of our own, since its weights
    are for counts of 576 tokens and would be most of a clipped gradient.
    """
    layers = cut_layers(num_layers)
    depths = jnp.array(layers) / num_layers
    widths = jnp.diff(jnp.array([*layers, num_layers])) / num_layers
    mean = layers[0] / num_layers + jnp.sum(shares * widths)
    return _DEPTH * jnp.sum(shares * depths) + _BUDGET * jnp.abs(mean - keep)
