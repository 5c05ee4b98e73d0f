"""Prefill with visual tokens dropped inside the LLM, beside the same without: seconds and cache bytes.

    python benchmarks/reducers.py                             # CPU, float32, 0.5B, 576 + 64 tokens, batch 8
    python benchmarks/reducers.py --layers 6 --repeats 2      # quicker
    python benchmarks/reducers.py --dtype bfloat16 --sizes qwen1.5-0.5b,qwen1.5-1.8b --attention cudnn  # GPU

Settings are the published ones; weights are random, so that which tokens stay means nothing. `speed` is
the plain prefill's median seconds over the reduced one's, run in turn; `flops` what the FLOPs predict of it,
scores that rank included; `ratio` the one over the other. `cache` is the reduced cache's bytes over the plain
one's. `sgl` is given its scores: what its small model takes is not in it. The exit code is 1 if a ratio is
below 0.85.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.cost import flops
from vlmscale.cost.reduced import ranking_flops, tokens_by_layer
from vlmscale.evaluate.latency import random_params
from vlmscale.layers import abstract_params
from vlmscale.models.cuts import Reduction
from vlmscale.models.decoder import Decoder
from vlmscale.models.sizes import SIZES, DecoderSize
from vlmscale.reducers import ReducerSpec, make_reducer
from vlmscale.reducers.schedule import sigmoid_schedule

LEAST = 0.85
VOCAB, NEW = 32_000, 16


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
    return found


def make_prefill(
    size: DecoderSize, spec: ReducerSpec | None, visual_tokens: int, dtype: Any, attention: str
) -> Callable[..., Any]:
    """A jitted function of parameters, embeddings and given scores to the last hidden state and the cache."""
    reducer = None if spec is None else make_reducer(spec, size.num_layers)
    cuts = () if reducer is None else reducer.layers
    decoder = Decoder(size, VOCAB, dtype, layout="loop", attention=attention, cuts=cuts)

    @jax.jit
    def prefill(params: Any, embeddings: jax.Array, given: jax.Array) -> Any:
        rows, length, _ = embeddings.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        valid = jnp.ones((rows, length), bool)
        shown = valid & (jnp.arange(length) >= 35) & (jnp.arange(length) < 35 + visual_tokens)
        reduction = None if reducer is None else Reduction(reducer, shown, visual_tokens, given)
        hidden, cache = decoder.apply(
            {"params": params}, embeddings, positions, valid, length + NEW, False, reduction, method="prefill"
        )
        return hidden[:, -1], cache

    return prefill


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
    for method, spec in chosen.items():
        run = make_prefill(size, spec, options.visual_tokens, dtype, options.attention)
        runs[method] = partial(run, params, embeddings, given)
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    held: dict[str, int] = {}
    for number in range(options.repeats + 1):
        for method, run in runs.items():
            start = time.perf_counter()
            _, cache = jax.block_until_ready(run())
            taken = time.perf_counter() - start
            held[method] = sum(stored.nbytes for stored in (*cache.k, *cache.v))
            del cache
            if number:  # the first compiles
                seconds[method].append(taken)
    medians = {method: float(np.median(times)) for method, times in seconds.items()}
    rows = []
    for method, spec in chosen.items():
        layers = tokens_by_layer(spec, size.num_layers, options.text_tokens, options.visual_tokens)
        work = sum(flops.layer_flops(size, there, 0, options.attention != "xla") for there in layers)
        whole = flops.decoder_flops(size, length, 0, causal=options.attention != "xla")
        work += ranking_flops(spec, size, layers)
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
                "tokens": sum(layers) / len(layers),
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
        told = (f"{key} {value:.3f}" if isinstance(value, float) else value for key, value in row.items())
        print("  ".join(told))
    return int(min(row["ratio"] for row in rows) < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
