"""Compression tokens behind each picture, and what they hide of it (VoCo-LLaMA, arXiv 2406.12275).

Two exact forms again. "masked" is one pass in which a mask hides the picture from what follows its
compression tokens; "compact" reads prompts in two passes and keeps of the first what the second may see.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.layers import named
from vlmscale.models.cuts import FORMS
from vlmscale.models.decoder import Decoder, KVCache

_STEP = 16  # positions; passes of about one length share a program


class CompressionTokens(nn.Module):
    """So many tokens behind the visual tokens of every image, all of one embedding (section 3.1).

    They differ by their position alone, as released. What is in front of them sees none of them; what follows
    sees them in place of the image.
    """

    count: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: int) -> jax.Array:
        """[images, count, D]."""
        init = named(nn.initializers.normal(0.02), (None, "embed"))
        embedding = self.param("embedding", init, (1, self.width), jnp.float32)
        shape = (images, self.count, self.width)
        return jnp.broadcast_to(embedding[None].astype(self.dtype), shape)


def last_readers(image_slots: jax.Array, count: int) -> jax.Array:
    """Up to which place of its row each token is seen: [B, T] int32, T where nothing hides it.

    A picture is seen up to its last compression token. The released `llava_llama_1stg.py` hides the text in
    front of it there, too, which is BOS alone, since the picture comes first. Here a template may put it
    behind other text, even the question, so text stays in sight. Of several pictures, which the release does
    not have, each hides itself.

    Args:
      image_slots: [B, T], as in `vlmscale.models.vlm.Inputs`.
      count: compression tokens, the last slots of each image.
    """
    slots, length = image_slots.astype(jnp.int32), image_slots.shape[1]
    place, shown = jnp.arange(length), image_slots.astype(bool)
    same = (slots[:, :, None] == slots[:, None, :]) & shown[:, None, :]
    last = jnp.max(jnp.where(same, place, -1), axis=2)
    is_image = shown & (jnp.sum(same & (place > place[:, None]), axis=2) >= count)
    return jnp.where(is_image, last, length)


def sight(readers: jax.Array) -> jax.Array:
    """Which query may see which key for `last_readers` [B, T]: [B, T, T] bool."""
    return jnp.arange(readers.shape[1])[None, :, None] <= readers[:, None, :]


class Passes(NamedTuple):
    """Static lengths of the two passes over a batch of prompts.

    Attributes:
      first: places of the first, up to the last compression token of a prompt.
      kept: places for those of its tokens that the second may see.
      second: places of the second.
    """

    first: int
    kept: int
    second: int

    @staticmethod
    def of(image_slots: np.ndarray, valid: np.ndarray, tokens: int, count: int) -> Passes:
        """Those that prompts need.

        Args:
          image_slots: [B, T].
          valid: [B, T] bool.
          tokens: visual tokens of an image.
          count: compression tokens of an image.
        """
        length, shown = image_slots.shape[1], image_slots > 0
        front = np.max(np.where(shown, np.arange(length) + 1, 0), axis=1)
        kept = front - shown.sum(1) // (tokens + count) * tokens
        return Passes(*(_room(int(x.max()), length) for x in (front, kept, valid.sum(1) - front)))


def _room(needed: int, most: int) -> int:
    return min(max(-(-needed // _STEP), 1) * _STEP, most)


def read_prompts(
    decoder: Decoder,
    embedded: Any,
    readers: jax.Array,
    visual: jax.Array,
    new: int,
    form: str,
    passes: Passes | None,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Run prompts whose images are hidden behind their compression tokens into a new cache.

    Args:
      decoder: in the "loop" layout.
      embedded: `vlmscale.models.vlm.Embedded`, prompts of one segment a row.
      readers: [B, T] of `last_readers`.
      visual: [B, T] bool, slots of images.
      new: places of the cache for tokens to come.
      form: "masked", or "compact" for two passes.
      passes: their lengths; None for room for anything.

    Returns:
      Final hidden states [B, T', D], which of them are of the prompt [B, T'], and the cache.
    """
    x, positions, segment_ids, _ = embedded
    valid, length = segment_ids > 0, x.shape[1]
    if form == "masked":
        hidden, cache = decoder.prefill(x, positions, valid, length + new, True, mask=sight(readers))
        visible = jnp.pad(readers == length, ((0, 0), (0, new)), constant_values=True)
        return hidden, valid, cache._replace(seen=(cache.seen[0] & visible,))
    if form != "compact":
        raise ValueError(f"reduction form {form}: one of {', '.join(FORMS)}")
    first, kept, second = passes or (length, length, length)
    front = jnp.max(jnp.where(visual, jnp.arange(length) + 1, 0), axis=1, keepdims=True)
    there = valid[:, :first] & (jnp.arange(first) < front)
    mask = sight(readers)[:, :first, :first]
    early, whole = decoder.prefill(x[:, :first], positions[:, :first], there, first, True, mask=mask)
    cache = _keep(whole, there & (readers[:, :first] == length), kept, second + new)

    place = front + jnp.arange(second)
    behind = jnp.minimum(place, length - 1)
    rest = jnp.take_along_axis(valid, behind, axis=1) & (place < length)
    late, cache = decoder.extend(
        jnp.take_along_axis(x, behind[:, :, None], axis=1),
        jnp.take_along_axis(positions, behind, axis=1),
        rest,
        cache,
        jnp.int32(kept),
    )
    # A prompt that ends with its image goes on from the first pass.
    return jnp.concatenate([early, late], axis=1), jnp.concatenate([there, rest], axis=1), cache


def _keep(cache: KVCache, wanted: jax.Array, count: int, free: int) -> KVCache:
    """The wanted [B, S] of a cache in front, in their order, with room for `free` more."""
    order = jnp.argsort(~wanted, axis=1, stable=True)[:, :count]

    def take(layers: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found = (jnp.take_along_axis(layer, order[:, None, :, None], axis=2) for layer in layers)
        return tuple(jnp.pad(layer, ((0, 0), (0, 0), (0, free), (0, 0))) for layer in found)

    seen = jnp.pad(jnp.take_along_axis(wanted, order, axis=1), ((0, 0), (0, free)))
    return KVCache(take(cache.k), take(cache.v), (seen,))
