"""FastV (arXiv 2403.06764): half of the visual tokens go behind the second layer. Training-free.

Visual tokens are ranked once, by the attention of layer K - 1, and the best of them stay from layer K on with
their positions: as the released port to transformers has it, in which decoding sees the same set.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from vlmscale.models.cuts import Between, Heads, Prefix, Ranking
from vlmscale.models.ranking import last_query, received, share_of, shares_of

SCORES = ("last", "received")


class FastV(nn.Module):
    """Keeps the share `keep` of a prompt's visual tokens, of all its images together, from `layer` on.

    `score`: "last" ranks by the attention that the prompt's last token gives, as the released code does;
    "received" by the mean attention that a token receives from all others, as the paper says (section 4.1).
    """

    layer: int
    keep: float
    score: str = "last"

    @property
    def layers(self) -> tuple[int, ...]:
        """In front of which layers tokens go."""
        return (self.layer,)

    def most(self, cut: int, slots: int) -> int:
        """Visual tokens behind the cut, of `slots`."""
        return share_of(self.keep, slots)

    def __call__(self, cut: int, at: Between) -> Ranking:
        """Scores [B, T] and counts [B]."""
        assert at.heads is not None
        return Ranking(
            rank_by(self.score, at.tokens, at.heads), shares_of(self.keep, at.tokens.whole, at.slots)
        )


def rank_by(score: str, tokens: Prefix, heads: Heads) -> jnp.ndarray:
    """One of `SCORES`: [B, T] float32."""
    if score == "last":
        return last_query(tokens, heads)
    return received(tokens.valid, heads, tokens.valid, itself=False)
