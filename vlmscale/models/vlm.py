"""The vision-language model: compressor, splice into the token stream, decoder."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors import COMPRESSORS, Features
from vlmscale.models.decoder import Decoder, KVCache
from vlmscale.models.sizes import DecoderSize


class VLM(nn.Module):
    """Everything behind the frozen tower. `visual_tokens` = 0 is the blind model: no compressor at all.

    `layout`, `attention` and `remat` are the decoder's: "scan" to train, "loop" to generate.
    """

    decoder_size: DecoderSize
    vocab_size: int
    compressor_name: str
    visual_tokens: int
    dtype: jnp.dtype = jnp.float32
    layout: str = "scan"
    attention: str = "xla"
    remat: str = "block"

    def setup(self) -> None:
        """Declare the parts."""
        self.decoder = Decoder(
            self.decoder_size, self.vocab_size, self.dtype, self.layout, self.attention, self.remat
        )
        if self.visual_tokens:
            method = COMPRESSORS[self.compressor_name]
            self.compressor = method.build(self.visual_tokens, self.decoder_size.width, dtype=self.dtype)

    def embed(self, tokens: jax.Array, image_slots: jax.Array, features: Features | None) -> jax.Array:
        """Token embeddings with the visual tokens in their slots.

        Args:
          tokens: [B, T] int32; the id in an image slot is not looked at.
          image_slots: [B, T] bool, either V or no True in a row.
          features: tower outputs of the row's image; None for a blind model.

        Returns:
          [B, T, D].

        Raises:
          ValueError: the features give another number of tokens than the model's.
        """
        embeddings = self.decoder.embed(tokens)
        if not self.visual_tokens or features is None:
            return embeddings
        visual, _ = self.compressor(features, None)
        if visual.shape[1] != self.visual_tokens:
            raise ValueError(f"the image gives {visual.shape[1]} tokens, the model has {self.visual_tokens}")
        return splice(embeddings, visual, image_slots)

    def __call__(
        self,
        tokens: jax.Array,
        image_slots: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        features: Features | None,
        target_positions: jax.Array,
    ) -> jax.Array:
        """Logits at chosen positions only: [B, T] tokens and [B, K] positions to float32 [B, K, vocab]."""
        embeddings = self.embed(tokens, image_slots, features)
        hidden = self.decoder(embeddings, positions, segment_ids)
        chosen = jnp.take_along_axis(hidden, target_positions[:, :, None], axis=1)
        return self.decoder.logits(chosen)

    def prefill(
        self,
        tokens: jax.Array,
        image_slots: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        features: Features | None,
        slots: int,
    ) -> tuple[jax.Array, KVCache]:
        """Run the prompts into a new cache. Needs the "loop" layout, as `decode` does.

        Args:
          tokens: [B, T] int32, right-padded prompts.
          image_slots: [B, T] bool.
          positions: [B, T] int32.
          valid: [B, T] bool, False where there is padding.
          features: tower outputs; None for a blind model.
          slots: length of the cache: T and the tokens to come.

        Returns:
          Float32 logits [B, vocab] behind each prompt's last token, and the cache.
        """
        embeddings = self.embed(tokens, image_slots, features)
        hidden, cache = self.decoder.prefill(embeddings, positions, valid, slots)
        last = jnp.sum(valid, axis=1) - 1
        return self.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache

    def decode(
        self, token: jax.Array, position: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """One more token a row: ids [B] at positions [B] into cache slot `slot`; logits [B, vocab]."""
        valid = jnp.ones((token.shape[0], 1), bool)
        hidden, cache = self.decoder.extend(
            self.decoder.embed(token[:, None]), position[:, None], valid, cache, slot
        )
        return self.decoder.logits(hidden[:, 0]), cache


def splice(embeddings: jax.Array, visual: jax.Array, image_slots: jax.Array) -> jax.Array:
    """Put visual tokens into their slots, in order.

    Args:
      embeddings: [B, T, D] of the text.
      visual: [B, V, D].
      image_slots: [B, T] bool; the i-th True of a row takes visual token i.

    Returns:
      [B, T, D].
    """
    order = jnp.clip(jnp.cumsum(image_slots, axis=1) - 1, 0, visual.shape[1] - 1)
    spread = jnp.take_along_axis(visual, order[:, :, None], axis=1)
    return jnp.where(image_slots[:, :, None], spread.astype(embeddings.dtype), embeddings)
