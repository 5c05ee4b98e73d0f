"""Generation with a KV cache: prefill once, then one token a step for the whole batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.data.conversation import Template, expand
from vlmscale.errors import UserError
from vlmscale.models.decoder import KVCache
from vlmscale.models.vlm import VLM, Inputs
from vlmscale.train.step import Params, model_inputs

Generate = Callable[..., Any]  # to answer ids
_COLDEST = 1e-4  # below it logits over the temperature could overflow
# Number of the next token, the last one, answers so far, cache, tokens said so far.
_Carry = tuple[jax.Array, jax.Array, jax.Array, KVCache, jax.Array]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy.

    Otherwise: logits over the temperature, then of the most likely tokens the fewest that together have
    probability `top_p` (transformers' order of the two). Rows draw from streams of their own. Before either,
    logits of tokens that the prompt or the answer holds are divided (below 0: multiplied) by
    `repetition_penalty` (arXiv 1909.05858, section 4.1), as some checkpoints ask for.

    Raises:
      UserError: a temperature that is neither 0 nor sensible, top_p not in (0, 1], or a penalty not above 0.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _COLDEST <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: must be 0 (greedy), or {_COLDEST} or above, and finite"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty={self.repetition_penalty}: must be above 0 and finite")


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """What a model said: its text, and the new ids with the stop token, if there was one."""

    text: str
    token_ids: list[int]


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that is empty or no text.

    Raises:
      UserError: saying which.
    """
    if not prompt.strip():
        raise UserError("--prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8") from None


@functools.lru_cache(maxsize=64)  # the same arguments, the same compiled function
def make_generate(
    model: VLM,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling = GREEDY,
    form: str = "compact",
    rooms: tuple[int, ...] | None = None,
) -> Generate:
    """A jitted function from (params, prompt batch[, seed]) to answer ids [B, max_new_tokens].

    The prompt batch holds tokens, image_slots and valid [B, T] (right-padded) and, unless the model is
    blind, the tower outputs, what else its compressor reads (`Inputs`), and `given` where its reducer takes
    something from elsewhere. Behind the first of its `stop_ids` a row repeats it. Rows do not see each other,
    so an answer does not depend on what else is in the batch.

    Args:
      model: in the "loop" layout.
      max_new_tokens: length of every row.
      stop_ids: any of them ends a row; empty for rows of full length.
      sampling: greedy unless told otherwise.
      form: of what a reducer does, `vlmscale.models.cuts.FORMS`.
      rooms: static lengths of the model's reducer, as in `VLM.prefill`. With those of an adaptive one the
        function gives beside the ids how many visual tokens each prompt kept behind each cut, [B, cuts]; the
        ids are right where there was room for them.

    Raises:
      UserError: max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be above 0")
    stops = np.array(stop_ids, np.int32)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == stops, axis=1)

    def note(said: jax.Array, token: jax.Array) -> jax.Array:
        return said.at[jnp.arange(len(token)), token].set(True)

    @jax.jit
    def generate(params: Params, batch: dict[str, jax.Array], seed: int = 0) -> Any:
        rows, length = batch["tokens"].shape
        given = batch.get("given")
        inputs = prompt_inputs({name: value for name, value in batch.items() if name != "given"})
        logits, cache, prompt_length = model.apply(
            {"params": params}, inputs, length + max_new_tokens, given, form, rooms=rooms, method="prefill"
        )
        keys = jax.random.split(jax.random.key(seed), rows)
        said = (
            _said(batch, model.vocab_size) if sampling.repetition_penalty != 1 else jnp.zeros((rows, 0), bool)
        )
        token = choose(penalise(logits, said, sampling), keys, jnp.int32(0), sampling)
        answers = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(token)

        def unfinished(carry: _Carry) -> jax.Array:
            index, token, *_ = carry
            return (index < max_new_tokens) & ~jnp.all(ended(token))

        def one_more(carry: _Carry) -> _Carry:
            index, token, answers, cache, said = carry
            said = note(said, token) if said.size else said
            logits, cache = model.apply(
                {"params": params},
                token,
                prompt_length + index - 1,
                cache,
                cache.slots - max_new_tokens + index - 1,
                method="decode",
            )
            chosen = choose(penalise(logits, said, sampling), keys, index, sampling)
            token = jnp.where(ended(token), token, chosen)
            return index + 1, token, answers.at[:, index].set(token), cache, said

        kept = cache.kept
        count, token, answers, *_ = jax.lax.while_loop(
            unfinished, one_more, (jnp.int32(1), token, answers, cache, said)
        )
        answers = jnp.where(jnp.arange(max_new_tokens) < count, answers, token[:, None])
        return (answers, jnp.stack(kept, axis=1)) if rooms is not None and kept else answers

    return generate


def prompt_inputs(batch: dict[str, jax.Array]) -> Inputs:
    """A prompt batch as the model reads it: positions from 0 on, one segment a row."""
    positions = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
    return model_inputs(batch | {"positions": positions, "segment_ids": batch["valid"].astype(jnp.int32)})


def _said(batch: dict[str, jax.Array], vocab_size: int) -> jax.Array:
    """Which tokens each prompt holds: [B, vocab] bool."""
    tokens, rows = batch["tokens"], jnp.arange(batch["tokens"].shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, tokens].max(batch["valid"])


def penalise(logits: jax.Array, said: jax.Array, sampling: Sampling) -> jax.Array:
    """Make tokens less likely that were said before.

    Args:
      logits: float32 [B, vocab].
      said: [B, vocab] bool; not looked at where the penalty is 1.
      sampling: with the penalty.

    Returns:
      [B, vocab].
    """
    penalty = sampling.repetition_penalty
    if penalty == 1:
        return logits
    return jnp.where(said, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def choose(logits: jax.Array, keys: jax.Array, index: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row.

    Args:
      logits: float32 [B, vocab].
      keys: [B] typed random keys, one a row.
      index: number of the token within its answer.
      sampling: how.

    Returns:
      Ids [B], int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = nucleus(logits / sampling.temperature, sampling.top_p)
    at_index = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(jax.random.categorical)(at_index, kept).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits [B, vocab] with -inf for all but the fewest most likely tokens that reach `top_p` together.

    As transformers' TopPLogitsWarper; the most likely token always stays.
    """
    if top_p >= 1:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.where(before < top_p, 0.0, -jnp.inf)
    return logits + jnp.take_along_axis(threshold, jnp.argsort(order, axis=-1), axis=-1)


def answer_length(ids: list[int], stop_ids: tuple[int, ...]) -> int:
    """Tokens of a generated row up to and with its first stop token."""
    return next((place + 1 for place, token in enumerate(ids) if token in stop_ids), len(ids))


def prompt_batch(
    prompts: list[list[int]], template: Template, visual_tokens: int, length: int
) -> dict[str, np.ndarray]:
    """Right-padded prompts with image slots: tokens, image_slots (int32), valid [B, length].

    Args:
      prompts: ids of each prompt, with a mark for each image.
      template: for the ids of padding and image slots.
      visual_tokens: slots an image takes.
      length: static length, at least that of the longest prompt with its slots.
    """
    tokens = np.full((len(prompts), length), template.pad, np.int32)
    slots, valid = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, ids in enumerate(prompts):
        filled, of_image = expand(np.array(ids, np.int32), visual_tokens, template.image)
        tokens[row, : len(filled)], slots[row, : len(filled)] = filled, of_image
        valid[row, : len(filled)] = True
    return {"tokens": tokens, "image_slots": slots, "valid": valid}


def pad_prompts(prompts: list[list[int]], image_id: int, pad_id: int, length: int) -> dict[str, np.ndarray]:
    """Prompts whose image slots hold `image_id`, right-padded: tokens, image_slots, valid [B, length]."""
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        valid[row, : len(ids)] = True
    return {"tokens": tokens, "image_slots": (tokens == image_id) & valid, "valid": valid}
