"""SGL (arXiv 2412.03324): a small model's attention says which visual tokens a large one needs, untrained.

The small model answers first; a visual token's score is the attention that it receives there, summed over
layers and heads, from the prompt's tokens behind the image and from all that was said. As in the released
code, and unlike its helper that nothing calls, the image's last token counts among those that attend; and the
fraction of a share is cut off. `vlmscale.evaluate.guided` runs the two.
"""

from __future__ import annotations

import flax.linen as nn

from vlmscale.models.cuts import Between, Ranking
from vlmscale.models.ranking import share_of, shares_of


class SGL(nn.Module):
    """Keeps the share `keep` of a prompt's visual tokens from layer `layer` on, by scores given [B, T]."""

    layer: int
    keep: float

    @property
    def layers(self) -> tuple[int, ...]:
        """In front of which layers tokens go."""
        return (self.layer,)

    def most(self, cut: int, slots: int) -> int:
        """Visual tokens behind the cut, of `slots`."""
        return share_of(self.keep, slots, 0)

    def __call__(self, cut: int, at: Between) -> Ranking:
        """Scores [B, T] and counts [B].

        Raises:
          ValueError: no scores are given.
        """
        if at.given is None:
            raise ValueError("sgl ranks by the scores of a guide: give them")
        return Ranking(at.given, shares_of(self.keep, at.tokens.whole, at.slots, 0))
