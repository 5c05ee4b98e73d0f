"""Prefill with visual tokens dropped inside the LLM, beside the same without: seconds and cache bytes.

    python benchmarks/reducers.py                             # CPU, float32, 0.5B, 576 + 64 tokens, batch 8
    python benchmarks/reducers.py --layers 6 --repeats 2      # quicker
    python benchmarks/reducers.py --dtype bfloat16 --sizes qwen1.5-0.5b,qwen1.5-1.8b --attention cudnn  # GPU

Settings are the published ones; weights are random, so that which tokens stay means nothing. `speed` is
the plain prefill's median seconds over the reduced one's, run in turn; `flops` what the FLOPs predict of it,
scores that rank included; `ratio` the one over the other. `cache` is the reduced cache's bytes over the plain
one's. `sgl` is given its scores: what its small model takes is not in it. `sparsity_similarity` and `atp`
(all thresholds 1/2) keep what these random numbers say, in rooms of that size. `voco` reads in two passes,
both of which count. The exit code is 1 if a ratio of a method with fixed counts is below 0.85.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.cost import flops
from vlmscale.cost.reduced import ranking_flops, tokens_by_layer
from vlmscale.evaluate.latency import random_params
from vlmscale.evaluate.rooms import wide_enough
from vlmscale.layers import abstract_params
from vlmscale.models.cuts import Reduction
from vlmscale.models.decoder import Decoder
from vlmscale.models.hiding import Passes, last_readers, read_prompts
from vlmscale.models.sizes import SIZES, DecoderSize
from vlmscale.models.vlm import Embedded
from vlmscale.reducers import ReducerSpec, is_adaptive, make_reducer
from vlmscale.reducers.atp import ATP
from vlmscale.reducers.schedule import sigmoid_schedule

LEAST = 0.85
VOCAB, NEW = 32_000, 16
FRONT = 35  # tokens of text in front of the picture, as in the vicuna_v1 template


def specs(num_layers: int) -> dict[str, ReducerSpec | None]:
    """The methods at their published settings: FastV's K and R, SGL's three ratios; and a sigmoid."""
    found: dict[str, ReducerSpec | None] = {"plain": None}
    for layer, keep in ((2, 0.5), (3, 0.5), (2, 0.25)):
        found[f"fastv K={layer} keep={keep:g}"] = ReducerSpec("fastv", layer, keep, ())
    found["fastv K=2 keep=0.5 received"] = ReducerSpec("fastv", 2, 0.5, (), (("score", "received"),))
    for of_48, keep in ((19, 0.4), (9, 0.2), (2, 0.05)):  # of InternVL2-26B's 48 layers
        layer = max(1, round(num_layers * of_48 / 48))
        found[f"sgl K={layer} keep={keep:g}"] = ReducerSpec("sgl", layer, keep, ())
    curve = sigmoid_schedule(num_layers, 8 / num_layers, num_layers / 2, 0.05)
    found["g_search, a sigmoid"] = ReducerSpec("g_search", 0, 1.0, tuple(round(share, 2) for share in curve))
    found["voco tokens=1"] = ReducerSpec("voco", 2, 0.5, ())
    alone = (("patches", "all"),)
    found["sparsity_similarity K=2"] = ReducerSpec("sparsity_similarity", 2, 1.0, (), alone)
    found["atp"] = ReducerSpec("atp", 2, 0.5, ())
    return found


class Prefill(NamedTuple):
    """One method's program, and what FLOPs of a prompt it is to cost."""

    run: Callable[..., Any]
    work: float
    tokens: float  # mean over layers


class Prompts(NamedTuple):
    """Prompts of one length, 35 tokens of text in front of the picture."""

    embeddings: jax.Array
    given: jax.Array
    visual_tokens: int

    @property
    def text(self) -> int:
        """Tokens of text."""
        return self.embeddings.shape[1] - self.visual_tokens

    def shown(self, slots: int) -> jax.Array:
        """[B, T'] bool, the slots of the picture, where it has so many."""
        place = jnp.arange(self.text + slots)
        return jnp.broadcast_to(
            (place >= FRONT) & (place < FRONT + slots), (len(self.embeddings), len(place))
        )


def make_prefill(
    size: DecoderSize, spec: ReducerSpec | None, params: Any, prompts: Prompts, dtype: Any, attention: str
) -> Prefill:
    """A jitted function without arguments to the last hidden state and the cache, with its FLOPs."""
    if spec is not None and spec.appended:
        return _two_passes(size, spec, params, prompts, dtype, attention)
    reducer = None if spec is None else make_reducer(spec, size.num_layers, prompts.visual_tokens)
    cuts = () if reducer is None else reducer.layers
    if isinstance(reducer, ATP):
        zeros = jax.tree.map(jnp.zeros_like, reducer.init(jax.random.key(0), method="params")["params"])
        reducer = reducer.bind({"params": zeros})
    decoder = Decoder(size, VOCAB, dtype, layout="loop", attention=attention, cuts=cuts)

    @partial(jax.jit, static_argnums=(3, 4))
    def prefill(params: Any, embeddings: jax.Array, given: jax.Array, form: str, rooms: Any) -> Any:
        rows, length, _ = embeddings.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        valid, shown = jnp.ones((rows, length), bool), prompts.shown(prompts.visual_tokens)
        rank = jnp.where(shown, positions - FRONT, 0)
        reduction = None
        if reducer is not None:
            reduction = Reduction(reducer, shown, rank, prompts.visual_tokens, given, form, rooms)
        hidden, cache = decoder.apply(
            {"params": params}, embeddings, positions, valid, length + NEW, False, reduction, method="prefill"
        )
        return hidden[:, -1], cache

    rooms, kept = None, ()
    if spec is not None and is_adaptive(spec):
        _, cache = prefill(params, *prompts[:2], "masked", None)
        kept = tuple(float(count.mean()) for count in cache.kept)
        rooms = wide_enough([int(count.max()) for count in cache.kept], prompts.visual_tokens)
    layers = tokens_by_layer(spec, size.num_layers, prompts.text, prompts.visual_tokens, kept)
    work = sum(flops.layer_flops(size, there, 0, attention != "xla") for there in layers)
    work += ranking_flops(spec, size, layers)
    run = partial(prefill, params, *prompts[:2], "compact", rooms)
    return Prefill(run, work, sum(layers) / len(layers))


def _two_passes(
    size: DecoderSize, spec: ReducerSpec, params: Any, prompts: Prompts, dtype: Any, attention: str
) -> Prefill:
    """With compression tokens; attention of the second pass is always "xla", over all places."""
    decoder = Decoder(size, VOCAB, dtype, layout="loop", attention=attention)
    slots, rows = prompts.visual_tokens + spec.appended, len(prompts.embeddings)
    shown = prompts.shown(slots)
    length = shown.shape[1]
    passes = Passes(FRONT + slots, FRONT + spec.appended, length - FRONT - slots)

    @jax.jit
    def prefill(params: Any, embeddings: jax.Array) -> Any:
        more = jnp.pad(embeddings, ((0, 0), (0, spec.appended), (0, 0)))
        ids = jnp.ones((rows, length), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        embedded = Embedded(more, positions, ids, False)
        readers = last_readers(shown, spec.appended)

        def read(decoder: Decoder) -> Any:
            return read_prompts(decoder, embedded, readers, shown, NEW, "compact", passes)

        hidden, _, cache = nn.apply(read, decoder)({"params": params})
        return hidden[:, -1], cache

    causal = attention != "xla"
    work = flops.layer_flops(size, passes.first, 0, causal)
    work += flops.layer_flops(size, passes.second, passes.kept + (0 if causal else NEW), causal=False)
    run = partial(prefill, params, prompts.embeddings)
    return Prefill(run, size.num_layers * work, float(length))


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method with one LLM."""
    size = SIZES[name]
    size = replace(size, num_layers=options.layers or size.num_layers)
    dtype = jnp.dtype(options.dtype)
    length = options.visual_tokens + options.text_tokens
    shape = jax.ShapeDtypeStruct((1, length, size.width), dtype)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    shapes = abstract_params(Decoder(size, VOCAB, layout="loop"), shape, ids, None)
    params = random_params(shapes, options.dtype)
    rng = np.random.default_rng(0)
    embeddings = jnp.asarray(rng.standard_normal((options.batch, length, size.width)), dtype)
    given = jnp.asarray(rng.random((options.batch, length)), jnp.float32)
    runs, chosen = {}, specs(size.num_layers)
    prompts = Prompts(embeddings, given, options.visual_tokens)
    for method, spec in chosen.items():
        runs[method] = make_prefill(size, spec, params, prompts, dtype, options.attention)
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    held: dict[str, int] = {}
    for number in range(options.repeats + 1):
        for method, program in runs.items():
            start = time.perf_counter()
            _, cache = jax.block_until_ready(program.run())
            taken = time.perf_counter() - start
            held[method] = sum(stored.nbytes for stored in (*cache.k, *cache.v))
            del cache
            if number:  # the first compiles
                seconds[method].append(taken)
    medians = {method: float(np.median(times)) for method, times in seconds.items()}
    rows = []
    whole = runs["plain"].work
    for method, spec in chosen.items():
        work = runs[method].work
        speed = medians["plain"] / medians[method]
        rows.append(
            {
                "llm": name,
                "method": method,
                "seconds": medians[method],
                "speed": speed,
                "flops": whole / work,
                "ratio": speed * work / whole,
                "cache": held[method] / held["plain"],
                "tokens": runs[method].tokens,
                "fixed": spec is None or not is_adaptive(spec),
            }
        )
    return rows


def main() -> int:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="qwen1.5-0.5b", help="LLMs, separated by commas")
    parser.add_argument("--layers", type=int, help="of each, instead of all")
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", default="xla", help="of the prefill")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = [row for name in options.sizes.split(",") for row in measure(name, options)]
    for row in rows:
        shown = {key: value for key, value in row.items() if key != "fixed"}
        told = (f"{key} {value:.3f}" if isinstance(value, float) else value for key, value in shown.items())
        print("  ".join(told))
    return int(min(row["ratio"] for row in rows if row["fixed"]) < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
