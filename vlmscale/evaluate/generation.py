"""Greedy generation with a KV cache: prefill once, then one token a step for the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.data.conversation import Template, with_image
from vlmscale.models.decoder import empty_cache
from vlmscale.models.vlm import VLM
from vlmscale.train.step import Params, features_of

Generate = Callable[[Params, dict[str, jax.Array]], jax.Array]


def make_generate(model: VLM, max_new_tokens: int, end_id: int) -> Generate:
    """A jitted function from (params, prompt batch) to answer ids [B, max_new_tokens].

    The prompt batch holds tokens, image_slots and valid [B, T] (right-padded) and, unless the model is
    blind, the tower outputs. Behind its `end_id` a row repeats `end_id`. Rows do not see each other, so
    an answer does not depend on what else is in the batch.
    """

    @jax.jit
    def generate(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        rows, length = batch["tokens"].shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        cache = empty_cache(model.decoder_size, rows, length + max_new_tokens, model.dtype)
        logits, cache = model.apply(
            {"params": params},
            batch["tokens"],
            batch["image_slots"],
            positions,
            batch["valid"],
            features_of(batch),
            cache,
            method="prefill",
        )
        prompt_length = jnp.sum(batch["valid"], axis=1)
        token = jnp.argmax(logits, axis=-1)
        answers = jnp.full((rows, max_new_tokens), end_id, token.dtype).at[:, 0].set(token)

        def unfinished(carry: tuple) -> jax.Array:
            index, token, _, _ = carry
            return (index < max_new_tokens) & jnp.any(token != end_id)

        def one_more(carry: tuple) -> tuple:
            index, token, answers, cache = carry
            logits, cache = model.apply(
                {"params": params},
                token,
                prompt_length + index - 1,
                cache,
                length + index - 1,
                method="decode",
            )
            token = jnp.where(token == end_id, end_id, jnp.argmax(logits, axis=-1))
            return index + 1, token, answers.at[:, index].set(token), cache

        return jax.lax.while_loop(unfinished, one_more, (jnp.int32(1), token, answers, cache))[2]

    return generate


def prompt_batch(
    prompts: list[list[int]], images: list[bool], template: Template, visual_tokens: int, length: int
) -> dict[str, np.ndarray]:
    """Right-padded prompts with image slots: tokens, image_slots, valid [B, length].

    Args:
      prompts: ids of each prompt, without image slots.
      images: which prompts have an image.
      template: for the ids of padding and image slots.
      visual_tokens: slots an image takes.
      length: static length, at least that of the longest prompt with its slots.
    """
    tokens = np.full((len(prompts), length), template.pad, np.int32)
    image_slots = np.zeros((len(prompts), length), bool)
    valid = np.zeros((len(prompts), length), bool)
    for row, (ids, has_image) in enumerate(zip(prompts, images, strict=True)):
        filled, slots = with_image(ids, template, visual_tokens if has_image else 0)
        tokens[row, : len(filled)] = filled
        image_slots[row, : len(filled)] = slots
        valid[row, : len(filled)] = True
    return {"tokens": tokens, "image_slots": image_slots, "valid": valid}
