"""Dropping visual tokens between two layers of a prefill: the mechanics that all reducers share.

Two exact forms. "compact" gathers what stays, so that later layers and their caches are shorter; "masked"
hides what goes and saves nothing. What stays keeps its position: holes in the positions remain, and a new
token's position does not depend on what was dropped. The forms agree but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from vlmscale.attention import split_rows

FORMS = ("compact", "masked")


class Prefix(NamedTuple):
    """Prompts between two layers.

    Attributes:
      x: [B, T, D] hidden states.
      positions: [B, T] int32, those of the whole prompt.
      valid: [B, T] bool, the tokens that later ones see.
      visual: [B, T] bool, those of them that show an image.
      whole: [B] int32, how many of these the row had before any cut.
      rank: [B, T] int32, which of its image's tokens a visual token is.
    """

    x: jax.Array
    positions: jax.Array
    valid: jax.Array
    visual: jax.Array
    whole: jax.Array
    rank: jax.Array

    @property
    def last(self) -> jax.Array:
        """[B] int32, where the last token of each prompt is."""
        return jnp.max(jnp.where(self.valid, jnp.arange(self.valid.shape[1]), 0), axis=1)

    @property
    def question(self) -> jax.Array:
        """[B, T] bool, text behind the first visual token."""
        index = jnp.arange(self.valid.shape[1])
        first = jnp.min(jnp.where(self.visual, index, len(index)), axis=1, keepdims=True)
        return self.valid & ~self.visual & (index > first)


class Heads(NamedTuple):
    """Rotated queries [B, T, H, D] and keys [B, T, K, D] of the layer in front of a cut."""

    q: jax.Array
    k: jax.Array


class Between(NamedTuple):
    """What a reducer may read at a cut.

    Attributes:
      tokens: the prompts.
      heads: of the layer in front; None in front of layer 0.
      given: what the method takes from elsewhere, if anything.
      slots: visual tokens that a row had at most before any cut.
    """

    tokens: Prefix
    heads: Heads | None
    given: jax.Array | None
    slots: int


class Ranking(NamedTuple):
    """Which visual tokens stay: those of the highest scores [B, T] (float32), `counts` [B] of each row."""

    score: jax.Array
    counts: jax.Array


class Reducer(Protocol):
    """A method that drops visual tokens in front of some layers."""

    @property
    def layers(self) -> tuple[int, ...]:
        """In front of which, counted from 0 and ascending."""

    def most(self, cut: int, slots: int) -> int:
        """How many visual tokens a row has at most behind a cut, of `slots` that it had at first."""

    def __call__(self, cut: int, at: Between) -> Ranking:
        """What stays behind a cut."""


class Soft(NamedTuple):
    """What a reducer that trains reads of a batch, the same at every cut.

    Attributes:
      params: its parameters, those of all cuts along a first axis.
      visual: [B, T] bool, tokens of images.
      text: [B, T] bool, tokens of the question.
      rank: [B, T] int32, as in `Prefix`.
      segment_ids: [B, T] int32.
    """

    params: Any
    visual: jax.Array
    text: jax.Array
    rank: jax.Array
    segment_ids: jax.Array


# (number of the cut, heads of the layer in front, batch, logarithm [B, T] of how much is left of each token)
# to that logarithm behind the cut.
Soften = Callable[[Any, Heads, Soft, jax.Array], jax.Array]


class Reduction(NamedTuple):
    """How one batch of prompts is reduced.

    Attributes:
      reducer: the method.
      visual: [B, T] bool, tokens of images.
      rank: [B, T] int32, as in `Prefix`.
      slots: image slots of a row. Each row has as many visual tokens, or is that much shorter than T.
      given: what the method takes from elsewhere, if anything.
      form: one of `FORMS`.
      rooms: places for visual tokens behind each cut, not growing from one to the next. Where a row keeps
        more, what the prefill gives is wrong: look at the counts. None for what the method keeps at most.
    """

    reducer: Reducer
    visual: jax.Array
    rank: jax.Array
    slots: int
    given: jax.Array | None = None
    form: str = "compact"
    rooms: tuple[int, ...] | None = None

    def cut(self, number: int, tokens: Prefix, heads: Heads | None) -> tuple[Prefix, jax.Array]:
        """Past one cut.

        Returns:
          The prompts, if "compact" shorter by what there is no room for, and all padding last; and how many
          visual tokens [B] of each stay.
        """
        keep = stays(tokens, self.reducer(number, Between(tokens, heads, self.given, self.slots)))
        count = jnp.sum(keep & tokens.visual, axis=1)
        if self.form == "masked":
            return tokens._replace(valid=keep, visual=tokens.visual & keep), count
        if self.form != "compact":
            raise ValueError(f"reduction form {self.form}: one of {', '.join(FORMS)}")
        rooms = [self.reducer.most(cut, self.slots) for cut in range(number + 1)]
        rooms = [self.slots, *(rooms if self.rooms is None else self.rooms)]
        return gather(tokens, keep, tokens.x.shape[1] - rooms[number] + rooms[number + 1]), count


def stays(tokens: Prefix, ranking: Ranking) -> jax.Array:
    """Which tokens are there behind a cut: all text, and of each row the `counts` best visual tokens.

    Of equal scores the earlier token is the better. A prompt's last token stays in any case, and counts: what
    comes next is predicted there.

    Returns:
      [B, T] bool.
    """
    is_last = jnp.arange(tokens.valid.shape[1]) == tokens.last[:, None]
    score = jnp.where(tokens.visual, ranking.score, -jnp.inf)
    score = jnp.where(tokens.visual & is_last, jnp.inf, score)
    # Visual tokens first, in order of their scores; a score may itself be infinite or no number.
    order = jnp.lexsort((-score, ~tokens.visual), axis=1)
    rank = jnp.argsort(order, axis=1)
    return tokens.valid & (~tokens.visual | (rank < ranking.counts[:, None]) | is_last)


def gather(tokens: Prefix, keep: jax.Array, length: int) -> Prefix:
    """The tokens that stay, in their order, in front of padding: [B, T] to [B, length]."""
    order = jnp.argsort(~keep, axis=1, stable=True)[:, :length]

    def take(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, order, axis=1)

    x = split_rows(jnp.take_along_axis(tokens.x, order[:, :, None], axis=1))
    visual = take(tokens.visual & keep)
    return Prefix(x, take(tokens.positions), take(keep), visual, tokens.whole, take(tokens.rank))


def shares_left(left: jax.Array, visual: jax.Array) -> jax.Array:
    """Mean share of visual tokens behind each cut, [cuts]: of what `Soften` left, [cuts, B, T].

    1 where there is none.
    """
    count = jnp.sum(visual)
    there = jnp.sum(jnp.where(visual, jnp.exp(left), 0.0), axis=(1, 2))
    return jnp.where(count > 0, there / jnp.maximum(count, 1), 1.0)
