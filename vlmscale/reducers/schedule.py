"""G-Search and P-Sigmoid (arXiv 2412.00556): a share of the visual tokens for every layer. Training-free.

Reconstruction from the abstract: no code is public, and the row that ranks, the calibration and the form of
the sigmoid are not said there. Assumed: tokens are ranked as FastV ranks them, by the attention of the layer
in front, among those still there; positions stay; shares never grow with depth; layer 0 sees all, since its
ranking is the one that the paper finds to disagree with the others.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp

from vlmscale.models.cuts import Between, Ranking
from vlmscale.models.ranking import share_of, shares_of
from vlmscale.reducers.fastv import rank_by


class Schedule(nn.Module):
    """Keeps the share `schedule[l]` of the visual tokens in layer l; the last holds for further layers.

    There is a cut wherever a share is smaller than the one before. With an empty schedule there is one in
    front of every layer, and how many tokens stay is an argument, `given` [L] int32 of all slots: so that a
    search compiles one program, in the masked form. `score` as in FastV.
    """

    schedule: tuple[float, ...]
    num_layers: int
    score: str = "last"

    @property
    def layers(self) -> tuple[int, ...]:
        """In front of which layers tokens go."""
        shares = self.schedule or tuple(range(self.num_layers, 0, -1))
        return tuple(index for index in range(1, len(shares)) if shares[index] < shares[index - 1])

    def most(self, cut: int, slots: int) -> int:
        """Visual tokens behind a cut, of `slots`."""
        return share_of(self.schedule[self.layers[cut]], slots) if self.schedule else slots

    def __call__(self, cut: int, at: Between) -> Ranking:
        """Scores [B, T] and counts [B]."""
        assert at.heads is not None
        if self.schedule:
            counts = shares_of(self.schedule[self.layers[cut]], at.tokens.whole, at.slots)
        else:
            assert at.given is not None
            # `share_of` in whole numbers.
            counts = (2 * at.given[self.layers[cut]] * at.tokens.whole + at.slots) // (2 * at.slots)
            counts = jnp.maximum(counts, jnp.minimum(at.tokens.whole, 1))
        return Ranking(rank_by(self.score, at.tokens, at.heads), counts)


def sigmoid_schedule(num_layers: int, steepness: float, middle: float, least: float) -> tuple[float, ...]:
    """P-Sigmoid: in layer l > 0 the share least + (1 - least) / (1 + exp(steepness * (l - middle))).

    Args:
      num_layers: of the LLM.
      steepness: k; above 0.
      middle: l0, the layer at which half of the rest is gone.
      least: r_min, the share that is left at last.
    """
    shares = [1.0]
    for layer in range(1, num_layers):
        share = least + (1 - least) / (1 + math.exp(min(steepness * (layer - middle), 700.0)))
        shares.append(min(share, shares[-1]))
    return tuple(shares)
