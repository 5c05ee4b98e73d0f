"""A small model in front of a large one (SGL, arXiv 2412.03324): it ranks visual tokens, or answers itself.

The small model answers every prompt and adds up the attention that visual tokens receive. Where its
confidence and its consistency are high enough together, its answer stands, and the large model never sees the
prompt; the large model answers the rest with the visual tokens that rank highest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmscale.evaluate.generation import Generate, prompt_inputs
from vlmscale.models.vlm import VLM
from vlmscale.reducers import ReducerSpec
from vlmscale.sharding import to_host
from vlmscale.train.step import Params

GUIDE_QUERY = "guide_query"
CONSISTENCY = ReducerSpec("sgl", 0, 0.05, ())  # of the consistency pass, as released
Batch = dict[str, jax.Array]


class Guidance(NamedTuple):
    """What the small model says.

    Attributes:
      ids: [B, T] int32, its greedy answers, which repeat their stop token.
      lengths: [B] int32, tokens of each, the stop token included.
      scores: [B, S] float32, attention that each token of the prompt received.
      confidence: [B] float32, geometric mean over the answer of the likeliest token's probability (c1).
    """

    ids: jax.Array
    lengths: jax.Array
    scores: jax.Array
    confidence: jax.Array


@functools.lru_cache(maxsize=64)
def make_guide(
    model: VLM, max_new_tokens: int, stop_ids: tuple[int, ...]
) -> Callable[[Params, Batch], Guidance]:
    """A jitted function from parameters and a prompt batch (`make_generate`) to `Guidance`.

    Args:
      model: the small one, in the "loop" layout and without a reducer.
      max_new_tokens: longest answer.
      stop_ids: any of them ends an answer.
    """
    stops = np.array(stop_ids, np.int32)

    @jax.jit
    def guide(params: Params, batch: Batch) -> Guidance:
        rows, length = batch["tokens"].shape
        logits, cache, following = model.apply(
            {"params": params}, prompt_inputs(batch), length + max_new_tokens, watch=True, method="prefill"
        )

        def likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            at_most = jax.nn.log_softmax(logits, axis=-1)
            return jnp.argmax(at_most, axis=-1).astype(jnp.int32), jnp.max(at_most, axis=-1)

        def ended(token: jax.Array) -> jax.Array:
            return jnp.any(token[:, None] == stops, axis=1)

        def unfinished(carry: Any) -> jax.Array:
            index, token, *_ = carry
            return (index < max_new_tokens) & ~jnp.all(ended(token))

        def one_more(carry: Any) -> Any:
            index, token, ids, count, log, cache = carry
            going = ~ended(token)
            logits, cache = model.apply(
                {"params": params},
                token[:, None],
                following + index - 1,
                going[:, None],
                cache,
                length + index - 1,
                method="read",
            )
            chosen, probability = likeliest(logits[:, 0])
            token = jnp.where(going, chosen, token)
            log = log + jnp.where(going, probability, 0)
            return index + 1, token, ids.at[:, index].set(token), count + going, log, cache

        token, log = likeliest(logits)
        ids = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(token)
        start = (jnp.int32(1), token, ids, jnp.ones(rows, jnp.int32), log, cache)
        steps, token, ids, count, log, cache = jax.lax.while_loop(unfinished, one_more, start)
        ids = jnp.where(jnp.arange(max_new_tokens) < steps, ids, token[:, None])
        return Guidance(ids, count, cache.received[:, :length], jnp.exp(log / count))

    return guide


@functools.lru_cache(maxsize=64)
def make_consistency(model: VLM) -> Callable[[Params, Batch, Guidance], jax.Array]:
    """A jitted function to c2 [B]: the probability of its own answer when almost all visual tokens are gone.

    One teacher-forced pass of the small model in which 5% of the visual tokens, at least one,
    are there from layer 0 on.

    Args:
      model: the small one, in the "loop" layout and without a reducer.
    """
    few = model.clone(reducer=CONSISTENCY)

    @jax.jit
    def consistency(params: Params, batch: Batch, guidance: Guidance) -> jax.Array:
        length, steps = batch["tokens"].shape[1], guidance.ids.shape[1]
        first, cache, following = few.apply(
            {"params": params}, prompt_inputs(batch), length + steps, guidance.scores, method="prefill"
        )
        there = jnp.arange(steps) < guidance.lengths[:, None]
        logits, _ = few.apply(
            {"params": params}, guidance.ids, following, there, cache, jnp.int32(length), method="read"
        )
        logits = jnp.concatenate([first[:, None], logits[:, :-1]], axis=1)
        log = jax.nn.log_softmax(logits, axis=-1)
        said = jnp.take_along_axis(log, guidance.ids[:, :, None], axis=2)[:, :, 0]
        return jnp.exp(jnp.sum(jnp.where(there, said, 0), axis=1))

    return consistency


class Reply(NamedTuple):
    """What was said to a batch, and how.

    Attributes:
      ids: [B, T] answers.
      guide_tokens: [B], tokens that a small model in front said.
      exited: [B] bool, whether its answer stands.
      kept: [B, cuts], visual tokens behind each cut of an adaptive reducer; of others no column.
    """

    ids: np.ndarray
    guide_tokens: np.ndarray
    exited: np.ndarray
    kept: np.ndarray

    @staticmethod
    def of(
        ids: np.ndarray, guide_tokens: np.ndarray | None = None, exited: np.ndarray | None = None
    ) -> Reply:
        """That of one model, or of two."""
        rows = len(ids)
        tokens = np.zeros(rows, int) if guide_tokens is None else guide_tokens
        return Reply(
            ids, tokens, np.zeros(rows, bool) if exited is None else exited, np.zeros((rows, 0), int)
        )


@dataclass(frozen=True)
class Guided:
    """Answers prompts with a large model behind a small one.

    Attributes:
      guide: the small model, in the "loop" layout.
      guide_params: its parameters.
      generate: of the large model, `make_generate`.
      max_new_tokens, stop_ids: of both.
      exit_above: where the mean of confidence and consistency is higher, the small model's answer stands; 1
        for nowhere, and then consistency is not computed.
      mesh: what batches lie on.
    """

    guide: VLM
    guide_params: Params
    generate: Generate
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    exit_above: float
    mesh: Mesh

    def __call__(self, params: Params, batch: Batch) -> Reply:
        """Answer a prompt batch (`make_generate`); `params` are the large model's.

        Where both read the question, `GUIDE_QUERY` in the batch is the small model's embedding of it.
        """
        own = {name: value for name, value in batch.items() if name != GUIDE_QUERY}
        small = own | ({"text_query": batch[GUIDE_QUERY]} if GUIDE_QUERY in batch else {})
        guidance = make_guide(self.guide, self.max_new_tokens, self.stop_ids)(self.guide_params, small)
        ids, count = to_host(guidance.ids, self.mesh).copy(), to_host(guidance.lengths, self.mesh)
        exited = np.zeros(len(ids), bool)
        if self.exit_above < 1:
            consistency = make_consistency(self.guide)(self.guide_params, small, guidance)
            certain = (guidance.confidence + consistency) / 2
            exited = to_host(certain, self.mesh) > self.exit_above
        rest = np.flatnonzero(~exited)
        if len(rest):
            ids[rest] = self._rest(params, own | {"given": guidance.scores}, rest)
        return Reply.of(ids, count, exited)

    def _rest(self, params: Params, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """The large model's answers to these rows, in a batch of few sizes, since each is compiled."""
        size = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        while size < len(rows):
            size *= 2
        if size >= batch["tokens"].shape[0]:
            return to_host(self.generate(params, batch), self.mesh)[rows]
        part = take_rows(batch, np.resize(rows, size))  # which repeats some
        return to_host(self.generate(params, part), self.mesh)[: len(rows)]


def take_rows(batch: Batch, rows: np.ndarray) -> Batch:
    """Some rows of a batch of prompts, by number, with their images; split over devices as the batch is."""
    count = batch["tokens"].shape[0]

    def take(values: jax.Array) -> jax.Array:
        each = values.shape[0] // count  # images of a row, or 1
        places = (rows[:, None] * each + np.arange(each)).reshape(-1)
        return jax.device_put(values[places], values.sharding)

    # "tower" holds parameters, which all rows share.
    return {name: values if name == "tower" else take(values) for name, values in batch.items()}
