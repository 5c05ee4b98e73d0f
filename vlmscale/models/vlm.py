"""The vision-language model: compressor, splice into the token stream, decoder."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import split_rows
from vlmscale.compressors import COMPRESSORS, Features, make_compressor
from vlmscale.compressors.features import FusionText
from vlmscale.models.cuts import Reduction, Soft, shares_left
from vlmscale.models.decoder import Decoder, KVCache, Rows
from vlmscale.models.hiding import CompressionTokens, Passes, last_readers, read_prompts, sight
from vlmscale.models.sizes import DecoderSize, TowerSize
from vlmscale.reducers import REDUCERS, ReducerSpec, make_reducer


class Inputs(NamedTuple):
    """What the model reads: B rows of T tokens, and N images.

    Images belong to *blocks* of G rows (`VLM.block_rows`, 1 but for packed rows): block b owns the
    I = N * G / B images from b * I on. So rows may hold 2.5 images on average without an empty slot.

    Attributes:
      tokens: [B, T] int32; the id in an image slot is not looked at.
      image_slots: [B, T] bool or int32: 0 for text, i for a slot of the block's i-th image, of which each has
        V slots in one row, or none.
      positions: [B, T] int32, counted from 0 inside each segment.
      segment_ids: [B, T] int32, 0 where there is padding; packed rows hold several samples, and no two of
        a block have one number.
      features: tower outputs of the images; None for a blind model or where no row has an image, but then
        not for a method that fuses the text.
      query_tokens: [N, Q] int32, right-padded ids of the question about each image, where it is embedded.
      query_length: [N] int32, how many of them are no padding.
      text_query: [N, 1, D] those embeddings, where they are known already (`VLM.embed_query`).
      answers: [B, T] bool, tokens that the model is to say: a method that fuses the text must not read them.
      visual_count: how many of the V visual tokens are used, an int32 scalar; None for all.
    """

    tokens: jax.Array
    image_slots: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    features: Features | None = None
    query_tokens: jax.Array | None = None
    query_length: jax.Array | None = None
    text_query: jax.Array | None = None
    answers: jax.Array | None = None
    visual_count: jax.Array | None = None

    @property
    def of_image(self) -> jax.Array:
        """[B, T, I] bool, which slots are whose, of blocks of one row."""
        assert self.features is not None
        per_row = self.features.selected.shape[0] // self.tokens.shape[0]
        return _of_image(self.image_slots, per_row)

    def blocks(self, rows: int) -> Inputs:
        """The same with so many rows behind one another in one: [B, T] becomes [B / rows, rows * T]."""
        if rows == 1:
            return self
        names = ("tokens", "image_slots", "positions", "segment_ids", "answers")
        given = {name: getattr(self, name) for name in names}
        wide: dict[str, Any] = {name: _join(x, rows) for name, x in given.items() if x is not None}
        return self._replace(**wide)


class Embedded(NamedTuple):
    """A batch as the decoder reads it; `holes` is whether slots may have been left empty."""

    embeddings: jax.Array  # [B, T, D]
    positions: jax.Array  # [B, T]
    segment_ids: jax.Array  # [B, T]
    holes: bool


class VLM(nn.Module):
    """Everything behind the frozen tower. `visual_tokens` = 0 is the blind model: no compressor at all.

    `layout`, `attention` and `remat` are the decoder's: "scan" to train, "loop" to generate. `options` are
    the compressor's; `largest` is the count that a nested one was made for, 0 for `visual_tokens` itself.
    `block_rows` is how many rows share their images (`Inputs`), `full_rows` whether rows without an image may
    be full (`narrow`). `reducer` drops visual tokens inside the decoder; one that needs no training does it
    in prefill and decoding alone.
    """

    decoder_size: DecoderSize
    vocab_size: int
    compressor_name: str
    visual_tokens: int
    dtype: jnp.dtype = jnp.float32
    layout: str = "scan"
    attention: str = "xla"
    remat: str = "block"
    options: tuple[tuple[str, str], ...] = ()
    tower_size: TowerSize | None = None
    largest: int = 0
    block_rows: int = 1
    full_rows: bool = False
    reducer: ReducerSpec | None = None

    def setup(self) -> None:
        """Declare the parts."""
        size, soften = self.decoder_size, None
        cuts: tuple[int, ...] = ()
        reducing: Any = None
        if self.appended:
            reducing = CompressionTokens(self.appended, size.width, self.dtype)
        elif self.reducer is not None:
            reducing = make_reducer(self.reducer, size.num_layers, self.visual_tokens)
            soft = REDUCERS[self.reducer.name].soft
            soften = None if soft is None else partial(soft.soften, visual_tokens=self.visual_tokens)
            cuts = reducing.layers
        self.reducing = reducing
        self.decoder = Decoder(
            size, self.vocab_size, self.dtype, self.layout, self.attention, self.remat, cuts, soften
        )
        if self.visual_tokens:
            self.compressor = make_compressor(
                self.compressor_name,
                self.visual_tokens,
                self.decoder_size.width,
                dict(self.options),
                dtype=self.dtype,
                attention=self.attention,
                decoder_size=self.decoder_size,
                tower_size=self.tower_size,
                largest=self.largest or self.visual_tokens,
            )

    @property
    def appended(self) -> int:
        """Compression tokens behind the visual tokens of each image."""
        return 0 if self.reducer is None else self.reducer.appended

    @property
    def image_slots(self) -> int:
        """Places that an image takes in a row."""
        return self.visual_tokens + self.appended

    def embed(self, inputs: Inputs) -> Embedded:
        """Token embeddings with the visual tokens in their slots.

        Slots beyond the tokens that an image gives (of an adaptive method, or above `visual_count`) become
        padding, and the positions behind them close up, as if they had never been there.

        Raises:
          ValueError: the features give another number of tokens than the model's, or what the compressor
            reads is missing.
        """
        embeddings, shape = self.decoder.embed(inputs.tokens), inputs.tokens.shape
        method = COMPRESSORS[self.compressor_name]
        if inputs.features is None and self.visual_tokens and method.text == "fusion":
            raise ValueError(f"{self.compressor_name} fuses the text also without an image: give features")
        if not self.visual_tokens or inputs.features is None:
            return Embedded(embeddings, inputs.positions, inputs.segment_ids, False)
        inputs, embeddings = inputs.blocks(self.block_rows), _join(embeddings, self.block_rows)
        positions, segment_ids = inputs.positions, inputs.segment_ids
        if method.text == "fusion":
            text = _fusion_text(inputs, embeddings)
            visual, valid, embeddings = self.compressor.fuse(inputs.features, text)
        else:
            query = self._query(inputs) if method.text == "query" else None
            visual, valid = self.compressor(inputs.features, query)
        if visual.shape[1] != self.visual_tokens:
            raise ValueError(f"the image gives {visual.shape[1]} tokens, the model has {self.visual_tokens}")
        chosen = self.choose_patches(inputs.features)
        valid = valid if chosen is None else valid & chosen
        slots, most = inputs.image_slots, inputs.visual_count
        holes = method.adaptive(dict(self.options)) or most is not None or chosen is not None
        if holes:
            visual, valid = holes_first(visual, valid, most)
        if self.appended:
            visual = jnp.concatenate([visual, self.reducing(len(visual)).astype(visual.dtype)], axis=1)
            valid = jnp.pad(valid, ((0, 0), (0, self.appended)), constant_values=True)
        embeddings, filled = splice(embeddings, split_rows(visual), valid, slots)
        if holes:
            dropped = slots.astype(bool) & ~filled
            positions, segment_ids = close_gaps(positions, segment_ids, dropped)
        parts = (embeddings.reshape(*shape, -1), positions.reshape(shape), segment_ids.reshape(shape))
        return Embedded(*parts, holes)

    def _query(self, inputs: Inputs) -> jax.Array:
        if inputs.text_query is not None:
            return inputs.text_query
        if inputs.query_tokens is None or inputs.query_length is None:
            raise ValueError(f"{self.compressor_name} reads the question: query_tokens and query_length")
        return self.embed_query(inputs.query_tokens, inputs.query_length)

    def embed_query(self, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """Questions as QueCC reads them (arXiv 2411.03312): the LLM's last state behind their last token.

        Behind the final norm, as released. No gradient flows through it into the LLM.

        Args:
          tokens: [N, Q] int32, right-padded.
          length: [N] int32, at least 1.

        Returns:
          [N, 1, D].
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        # Padding comes last, so that causal order alone hides it.
        hidden = self.decoder(self.decoder.embed(tokens), positions, None)
        return jax.lax.stop_gradient(jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1))

    def __call__(self, inputs: Inputs, target_positions: jax.Array) -> jax.Array:
        """Logits at chosen positions only: [B, T] tokens and [B, K] positions to float32 [B, K, vocab]."""
        return self.decoder.logits(self.states(inputs, target_positions))

    def states(self, inputs: Inputs, target_positions: jax.Array) -> jax.Array:
        """Final hidden states at chosen positions: [B, T] tokens and [B, K] positions to [B, K, D]."""
        return self.trained_states(inputs, target_positions)[0]

    def trained_states(
        self, inputs: Inputs, target_positions: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `states`; and of a reducer that trains its cuts the mean share of visual tokens behind each."""
        embedded = self.embed(inputs)
        mask, soft = None, None
        if self.appended and inputs.features is not None:
            mask = sight(last_readers(inputs.image_slots, self.appended))
        elif self.decoder.soften is not None and inputs.features is not None:
            soft = self._soft(inputs, embedded.segment_ids)
        rows = Rows(embedded.positions, embedded.segment_ids, mask, soft)
        hidden, left = self.decoder.run(embedded.embeddings, rows)
        shares = None if left is None or soft is None else shares_left(left, soft.visual)
        return jnp.take_along_axis(hidden, target_positions[:, :, None], axis=1), shares

    def _soft(self, inputs: Inputs, segment_ids: jax.Array) -> Soft:
        """What a reducer that trains reads: of each conversation's text what is between image and answer."""
        there, slots = segment_ids > 0, inputs.image_slots.astype(bool)
        place = jnp.arange(slots.shape[1])
        together = inputs.segment_ids[:, :, None] == inputs.segment_ids[:, None, :]
        first = jnp.min(jnp.where(together & slots[:, None], place, len(place)), axis=2)
        text = there & ~slots & (place > first)
        if inputs.answers is not None:
            answer = jnp.min(jnp.where(together & inputs.answers[:, None], place, len(place)), axis=2)
            text &= place < answer
        return Soft(self.reducing.params(), slots & there, text, self._ranks(inputs), segment_ids)

    def _ranks(self, inputs: Inputs) -> jax.Array:
        """Which slot of its image each slot is: [B, T] int32, 0 for text."""
        assert inputs.features is not None
        blocks = inputs.tokens.shape[0] // self.block_rows
        return _rank(_of_image(inputs.image_slots, inputs.features.selected.shape[0] // blocks))

    def visual_counts(self, inputs: Inputs) -> jax.Array:
        """How many tokens each image gives: [N] int32, of which only an adaptive method's differ."""
        query = self._query(inputs) if COMPRESSORS[self.compressor_name].text == "query" else None
        _, valid = self.compressor(inputs.features, query)
        chosen = self.choose_patches(inputs.features)
        return jnp.sum(valid if chosen is None else valid & chosen, axis=1)

    def choose_patches(self, features: Features | None) -> jax.Array | None:
        """Which visual tokens [N, V] a reducer lets into the LLM, of a compressor that passes patches on."""
        if self.reducer is None or self.reducer.patches is None or features is None:
            return None
        return self.reducer.patches(features.selected)

    def prefill(
        self,
        inputs: Inputs,
        slots: int,
        given: jax.Array | None = None,
        form: str = "compact",
        watch: bool = False,
        rooms: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        """Run the prompts into a new cache. Needs the "loop" layout, as `decode` does.

        Args:
          inputs: right-padded prompts of one segment a row. With a reducer each row has as many image slots
            as the row with the most, or is that much shorter than T.
          slots: length of the cache: T and the tokens to come; with what a reducer drops it is shorter.
          given: what the reducer takes from elsewhere, if anything.
          form: of the reduction, `vlmscale.models.cuts.FORMS`.
          rooms: of an adaptive reducer, as in `vlmscale.models.cuts.Reduction`; where there are compression
            tokens, `vlmscale.models.hiding.Passes`.
          watch: add up in the cache what attention tokens receive from the last visual one on.

        Returns:
          Float32 logits [B, vocab] behind each prompt's last token, the cache, and the position [B] of the
          token that comes next.
        """
        embedded = self.embed(inputs)
        embeddings, positions, segment_ids, holes = embedded
        valid = segment_ids > 0
        if self.appended and inputs.features is not None:
            readers = last_readers(inputs.image_slots, self.appended)
            passes = None if rooms is None else Passes(*rooms)
            new, shown = slots - valid.shape[1], inputs.image_slots.astype(bool)
            hidden, there, cache = read_prompts(self.decoder, embedded, readers, shown, new, form, passes)
            return self._behind(hidden, there), cache, jnp.sum(valid, axis=1)
        reduction = None
        if self.reducer is not None and inputs.features is not None:
            images = inputs.features.selected.shape[0] // inputs.tokens.shape[0]
            visual = inputs.image_slots.astype(bool)
            most = images * self.visual_tokens
            reduction = Reduction(self.reducing, visual, self._ranks(inputs), most, given, form, rooms)
        watched = None
        if watch:
            shown = inputs.image_slots.astype(bool) & valid
            index = jnp.arange(valid.shape[1])
            watched = index >= jnp.max(jnp.where(shown, index, -1), axis=1, keepdims=True)
        hidden, cache = self.decoder.prefill(embeddings, positions, valid, slots, holes, reduction, watched)
        there = cache.seen[-1][:, : hidden.shape[1]]  # of an image the last slot is never a hole
        return self._behind(hidden, there), cache, jnp.sum(valid, axis=1)

    def _behind(self, hidden: jax.Array, there: jax.Array) -> jax.Array:
        """Logits [B, vocab] behind the last token that is there [B, T], of final hidden states [B, T, D]."""
        last = jnp.max(jnp.where(there, jnp.arange(hidden.shape[1]), 0), axis=1)
        return self.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def decode(
        self, token: jax.Array, position: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """One more token a row: ids [B] at positions [B] into cache slot `slot`; logits [B, vocab]."""
        valid = jnp.ones((token.shape[0], 1), bool)
        logits, cache = self.read(token[:, None], position, valid, cache, slot)
        return logits[:, 0], cache

    def read(
        self, tokens: jax.Array, position: jax.Array, valid: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """More tokens a row at once: ids [B, T] from positions [B] on; logits [B, T, vocab] behind each.

        Those that are not `valid` [B, T] are seen by none.
        """
        positions = position[:, None] + jnp.arange(tokens.shape[1])
        hidden, cache = self.decoder.extend(self.decoder.embed(tokens), positions, valid, cache, slot)
        return self.decoder.logits(hidden), cache


def _join(rows: jax.Array, count: int) -> jax.Array:
    """Every `count` rows behind one another: [B, T, ...] to [B / count, count * T, ...]."""
    return rows.reshape(rows.shape[0] // count, count * rows.shape[1], *rows.shape[2:])


def splice(
    embeddings: jax.Array,
    visual: jax.Array,
    valid: jax.Array,
    image_slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Put visual tokens into their slots, in order.

    Args:
      embeddings: [B, T, D] of the text.
      visual: [N, V, D], N = B * I.
      valid: [N, V] bool.
      image_slots: [B, T], as in `Inputs`; the j-th slot of an image takes its visual token j.

    Returns:
      [B, T, D], and which slots [B, T] hold a valid token.
    """
    (rows, _, width), (images, tokens) = embeddings.shape, valid.shape
    per_row = images // rows
    image, rank = image_slots.astype(jnp.int32), _rank(_of_image(image_slots, per_row))
    order = jnp.clip((image - 1) * tokens + rank, 0, per_row * tokens - 1)
    spread = jnp.take_along_axis(visual.reshape(rows, per_row * tokens, width), order[:, :, None], axis=1)
    filled = jnp.take_along_axis(valid.reshape(rows, per_row * tokens), order, axis=1) & (image > 0)
    return jnp.where(filled[:, :, None], spread.astype(embeddings.dtype), embeddings), filled


def holes_first(visual: jax.Array, valid: jax.Array, count: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Visual tokens that are used behind those that are not, both in their order.

    The text right behind an image is predicted in its last slot, which must then hold a token.

    Args:
      visual: [N, V, D].
      valid: [N, V] bool.
      count: how many are used of each image, from the first on; None for all.
    """
    used = valid if count is None else valid & (jnp.arange(valid.shape[1]) < count)
    order = jnp.argsort(used, axis=1, stable=True)
    return jnp.take_along_axis(visual, order[:, :, None], axis=1), jnp.take_along_axis(used, order, axis=1)


def _of_image(image_slots: jax.Array, per_row: int) -> jax.Array:
    """Which slots belong to which of a row's images: [B, T] to bool [B, T, I]."""
    return image_slots.astype(jnp.int32)[:, :, None] == jnp.arange(1, per_row + 1)


def _rank(mine: jax.Array) -> jax.Array:
    """Which slot of its image each slot is: [B, T, I] bool to int32 [B, T], 0 for text."""
    return jnp.sum(jnp.where(mine, jnp.cumsum(mine, axis=1) - 1, 0), axis=-1)


def close_gaps(
    positions: jax.Array, segment_ids: jax.Array, dropped: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Make tokens padding and count the positions behind them as if they had never been there.

    Args:
      positions: [B, T] int32, from 0 in each segment.
      segment_ids: [B, T] int32.
      dropped: [B, T] bool.

    Returns:
      New positions and segment ids.
    """
    before = jnp.cumsum(dropped, axis=1) - dropped
    at_start = jax.lax.cummax(jnp.where(positions == 0, before, 0), axis=1)
    return positions - (before - at_start), jnp.where(dropped, 0, segment_ids)


def narrow(
    inputs: Inputs,
    target_positions: jax.Array,
    visual_tokens: int,
    count: int,
    block_rows: int = 1,
    full_rows: bool = False,
) -> tuple[Inputs, jax.Array]:
    """The same batch with fewer slots an image: what it would have been for another number of tokens.

    Rows of one image get shorter by the slots that fall away, so every row must have that many free: one
    whose image has `visual_tokens` slots, or one without an image that is no longer than its text
    (`Layout` of the pipeline sees to it). Where rows may be full, and in blocks of several images, those
    slots become padding.

    Args:
      inputs: with features.
      target_positions: [B, K], none of them a slot that falls away.
      visual_tokens: slots an image has.
      count: slots it is to have.
      block_rows: rows that share their images.
      full_rows: whether rows may be full.

    Returns:
      Inputs of T - (visual_tokens - count) tokens, or of T, and their target positions.
    """
    blocks = inputs.blocks(block_rows)
    mine = blocks.of_image
    kept = ~mine.any(axis=2) | (_rank(mine) >= visual_tokens - count)
    positions, segment_ids = close_gaps(blocks.positions, blocks.segment_ids, ~kept)
    if mine.shape[2] > 1 or block_rows > 1 or full_rows:
        changed = jnp.where(kept, blocks.image_slots, 0), positions, segment_ids
        slots, positions, segment_ids = (x.reshape(inputs.tokens.shape) for x in changed)
        left = inputs._replace(image_slots=slots, positions=positions, segment_ids=segment_ids)
        return left, target_positions
    length = inputs.tokens.shape[1] - (visual_tokens - count)
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :length]
    taken: dict[str, Any] = {
        name: jnp.take_along_axis(values, order, axis=1)
        for name, values in (
            ("tokens", inputs.tokens),
            ("image_slots", inputs.image_slots),
            ("positions", positions),
            ("segment_ids", segment_ids),
            ("answers", inputs.answers),
        )
        if values is not None
    }
    moved = jnp.take_along_axis(jnp.cumsum(kept, axis=1) - 1, target_positions, axis=1)
    return inputs._replace(**taken), moved


def _fusion_text(inputs: Inputs, embeddings: jax.Array) -> FusionText:
    """What a method that fuses the text may read of it, and to which sample each image belongs."""
    mine = inputs.of_image
    readable = ~mine.any(axis=2) & (inputs.segment_ids > 0)
    if inputs.answers is not None:
        readable &= ~inputs.answers
    image_segments = jnp.max(jnp.where(mine, inputs.segment_ids[:, :, None], 0), axis=1)
    return FusionText(embeddings, readable, inputs.segment_ids, image_segments)
