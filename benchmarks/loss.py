"""The chunked loss beside the naive one: memory as compiled, and time in the same run; gradients included.

    python benchmarks/loss.py                                   # CPU; needs the [test] extra
    python benchmarks/loss.py --chunk 64,128,256,512            # which chunk: one row each
    python benchmarks/loss.py --time 151936,4096,1024 --dtype bfloat16 --chunk 256,1024,2048     # GPU

Sizes are V,N,D: words, target positions, width. The naive loss is a product with the head and optax's
cross-entropy. A memory row compiles and runs nothing: bytes beside the inputs, without and with the outputs,
which are the gradients; its ratio is naive over ours. A time row has the ratio of medians, also naive over
ours, of seconds and of the process's own CPU seconds, which other work on the machine changes less; the given
share of positions is supervised. `error` is the largest difference of a gradient over its largest entry. The
exit code is 1 if the default chunk takes more than 1/8 of the naive loss's memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer

from vlmscale.train.loss import DEFAULT_CHUNK, chunked_cross_entropy

Size = tuple[int, int, int]  # V, N, D
LEAST = 8  # times the memory


def naive(hidden: jax.Array, table: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """The same sum, with all logits at once."""
    head = table.astype(hidden.dtype)
    logits = jnp.einsum("bkd,vd->bkv", hidden, head, preferred_element_type=jnp.float32)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, ids))


def compiled_bytes(function: Callable[..., jax.Array], size: Size, dtype: Any, trained: bool) -> np.ndarray:
    """What the compiled loss with its gradients takes beside its inputs: without and with its outputs."""
    vocab, positions, width = size
    inputs = (
        jax.ShapeDtypeStruct((1, positions, width), dtype),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((1, positions), jnp.int32),
        jax.ShapeDtypeStruct((1, positions), jnp.float32),
    )
    gradients = jax.value_and_grad(function, (0, 1) if trained else (0,))
    found = jax.jit(gradients).lower(*inputs).compile().memory_analysis()
    return np.array([found.temp_size_in_bytes, found.temp_size_in_bytes + found.output_size_in_bytes])


def memory(size: Size, dtype: str, chunk: int, trained: bool) -> dict[str, Any]:
    """A row: megabytes of the chunked loss, and the naive one's over them."""
    ours = compiled_bytes(
        partial(chunked_cross_entropy, chunk=chunk, train_table=trained), size, peer.DTYPES[dtype][0], trained
    )
    theirs = compiled_bytes(naive, size, peer.DTYPES[dtype][0], trained)
    return {
        "memory": ",".join(map(str, size)),
        "dtype": dtype,
        "head": "trained" if trained else "frozen",
        "chunk": chunk,
        "MB": ours[0] / 1e6,
        "ratio": theirs[0] / ours[0],
        "MB with outputs": ours[1] / 1e6,
        "ratio with outputs": theirs[1] / ours[1],
    }


def in_turn(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, np.ndarray]:
    """Median seconds and CPU seconds of each, run one after the other in rounds; the first is not counted."""
    clocks: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = np.array([time.perf_counter(), time.process_time()])
            run()
            if number:
                clocks[name].append(np.array([time.perf_counter(), time.process_time()]) - start)
    return {name: np.median(values, axis=0) for name, values in clocks.items()}


def seconds(size: Size, dtype: str, chunk: int, share: float, repeats: int) -> dict[str, Any]:
    """A row: seconds of the chunked loss with both gradients, and the naive one's over them."""
    vocab, positions, width = size
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, positions, width)), peer.DTYPES[dtype][0])
    table = jnp.asarray(rng.standard_normal((vocab, width)) * width**-0.5, jnp.float32)
    ids = jnp.asarray(rng.integers(0, vocab, (1, positions)), jnp.int32)
    weights = jnp.asarray(rng.random((1, positions)) < share, jnp.float32)
    out: dict[str, Any] = {}

    def run(name: str, function: Callable[..., jax.Array]) -> Callable[[], None]:
        gradients = jax.jit(jax.value_and_grad(function, (0, 1)))

        def once() -> None:
            out[name] = None  # its memory is needed
            out[name] = jax.block_until_ready(gradients(hidden, table, ids, weights))

        return once

    ours = run("ours", partial(chunked_cross_entropy, chunk=chunk))
    median = in_turn({"ours": ours, "naive": run("naive", naive)}, repeats)
    pairs = zip(*(jax.tree.leaves(out[name]) for name in ("ours", "naive")), strict=True)
    return {
        "time": ",".join(map(str, size)),
        "dtype": dtype,
        "supervised": share,
        "chunk": chunk,
        "seconds": median["ours"][0],
        "ratio": median["naive"][0] / median["ours"][0],
        "ratio of CPU seconds": median["naive"][1] / median["ours"][1],
        "error": max(float(jnp.max(jnp.abs(one - two)) / jnp.max(jnp.abs(two))) for one, two in pairs),
    }


def size_of(text: str) -> Size:
    """V,N,D of an option."""
    vocab, positions, width = (int(part) for part in text.split(","))
    return vocab, positions, width


def main() -> int:
    """Parse, measure, show; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", type=size_of, default=(151_936, 4_096, 1_024), metavar="V,N,D")
    parser.add_argument("--time", type=size_of, default=(32_768, 2_048, 512), metavar="V,N,D")
    parser.add_argument("--chunk", default=str(DEFAULT_CHUNK), help="one or several, by commas")
    parser.add_argument(
        "--dtype", choices=peer.DTYPES, default="float32", help="of the hidden states, to time"
    )
    parser.add_argument("--supervised", type=float, nargs="+", default=[1.0, 0.5], help="shares of positions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chunks, missed = [int(chunk) for chunk in options.chunk.split(",")], []

    def rows() -> Iterator[dict[str, Any]]:
        for chunk in chunks:
            for dtype in peer.DTYPES:
                for trained in (True, False):
                    row = memory(options.memory, dtype, chunk, trained)
                    if chunk == DEFAULT_CHUNK and row["ratio"] < LEAST:
                        missed.append(row)
                    yield row
        for chunk in chunks:
            for share in options.supervised:
                yield seconds(options.time, options.dtype, chunk, share, options.repeats)

    peer.show(rows(), options.json)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
