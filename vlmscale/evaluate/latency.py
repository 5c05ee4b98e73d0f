"""How long prefill, decoding, tower and compressor take on the device that is here, with random weights.

Compilation is not counted: every program runs once before it is timed. One LLM's parameters are held at a
time.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmscale import __version__
from vlmscale.compressors import COMPRESSORS, check_count, make_compressor, parse_options
from vlmscale.compressors.features import Features, abstract_tower_params, tower_features
from vlmscale.cost.answer import served, vocab_rows
from vlmscale.cost.image import compressor_text
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import prompt_inputs
from vlmscale.layers import abstract_params
from vlmscale.models.decoder import KVCache
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize
from vlmscale.models.vlm import VLM

Params = dict[str, Any]
Progress = Callable[[int, int], None]
_SPREAD = 0.02  # of random weights


@dataclass(frozen=True)
class Grid:
    """What to time: every combination.

    Attributes:
      llms: names of `SIZES`.
      visual_tokens, text_tokens, batches: counts; a prompt is as long as the two former together.
      gen_tokens: tokens of an answer, at least 2.
      tower, compressor: names (the latter with options behind a colon); "" for the LLM alone.
      dtype: of weights and computation.
      attention: backend of the prefill and the tower.
      repeats: timings of which the median counts.

    Raises:
      UserError: something is unknown, not positive, or the compressor cannot give a count.
    """

    llms: tuple[str, ...]
    visual_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    batches: tuple[int, ...]
    gen_tokens: int = 8
    tower: str = ""
    compressor: str = ""
    dtype: str = "float32"
    attention: str = "xla"
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in self.llms:
            if name not in SIZES:
                raise UserError(f"--llm {name}: unknown (known: {', '.join(SIZES)})")
        for key in ("visual_tokens", "text_tokens", "batches"):
            if min(getattr(self, key)) < 1:
                raise UserError(
                    f"--{key.replace('_', '-').replace('batches', 'batch')}: counts must be above 0"
                )
        if self.gen_tokens < 2:
            raise UserError(
                f"--gen-tokens {self.gen_tokens}: at least 2, for the first comes with the prefill"
            )
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: must be above 0")
        if bool(self.tower) != bool(self.compressor):
            raise UserError("--tower and --compressor: an image needs both; give both, or neither")
        if self.tower:
            if self.tower not in TOWERS:
                raise UserError(f"--tower {self.tower}: unknown (known: {', '.join(TOWERS)})")
            name = self.method[0]
            for count in self.visual_tokens:
                check_count(name, count, TOWERS[self.tower].grid)

    @property
    def method(self) -> tuple[str, dict[str, str]]:
        """Name and options of the compressor."""
        name, _, options = self.compressor.partition(":")
        return name, parse_options(name, options)

    @property
    def cells(self) -> list[tuple[str, int, int, int]]:
        """(LLM, visual tokens, text tokens, batch), an LLM after the other."""
        return list(itertools.product(self.llms, self.visual_tokens, self.text_tokens, self.batches))


def measure(grid: Grid, progress: Progress) -> dict[str, Any]:
    """Time the grid; what a latency file holds but for the fit.

    A cell that does not fit the LLM's context or the device's memory is listed under `failures`, and the rest
    goes on.

    Args:
      grid: what to time.
      progress: called with (timings done, timings in all).

    Raises:
      UserError: the attention backend cannot run here.
    """
    run = _Run(grid, progress)
    images = _measure_images(run) if grid.tower else None
    cells: list[dict[str, Any]] = []
    for name in grid.llms:
        cells += _measure_llm(run, name)
    itemsize = jnp.dtype(grid.dtype).itemsize
    llms = {name: served(SIZES[name], vocab_rows(name), itemsize)._asdict() for name in grid.llms}
    device = jax.devices()[0]
    return {
        "device": {"kind": device.device_kind, "platform": device.platform},
        "dtype": grid.dtype,
        "attention": grid.attention,
        "repeats": grid.repeats,
        "versions": _versions(),
        "llms": llms,
        "cells": cells,
        "images": images,
        "failures": run.failures,
    }


def _versions() -> dict[str, str]:
    libraries = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"vlmscale": __version__, "python": platform.python_version(), **libraries}


class _Run:
    """What the parts share: the grid, failures so far, and how far it is."""

    def __init__(self, grid: Grid, progress: Progress) -> None:
        self.grid, self._progress, self._done = grid, progress, 0
        self.failures: list[dict[str, Any]] = []
        of_images = len(grid.batches) * (1 + len(grid.llms) * len(grid.visual_tokens)) if grid.tower else 0
        self._total = len(grid.cells) + of_images

    def step(self, what: dict[str, Any], work: Callable[[], Any]) -> Any:
        """Do one timing; None, and a failure of `what`, where it does not fit."""
        found = None
        try:
            found = work()
        except _TooLongError as error:
            self.failures.append({**what, "reason": str(error)})
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not _out_of_memory(error):
                raise
            self.failures.append({**what, "reason": "out of memory"})
        except ValueError as error:  # of the attention backend: another platform or dtype than it needs
            if self.grid.attention == "xla":
                raise
            raise UserError(f"--attention {self.grid.attention}: {error}") from error
        self._done += 1
        self._progress(self._done, self._total)
        return found


class _TooLongError(Exception):
    """A prompt and its answer do not fit the LLM's context."""


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")
    )


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return _SPREAD * jax.random.normal(key, shape, dtype)


def random_params(shapes: Any, dtype: str) -> Params:
    """Random matrices, and ones for vectors (norms), of a tree of shapes; made on the device, one by one."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def make(leaf: Any) -> jax.Array:
        key = next(keys)
        return _draw(key, leaf.shape, dtype) if len(leaf.shape) > 1 else jnp.ones(leaf.shape, dtype)

    params: Params = jax.tree.map(make, nn.meta.unbox(shapes))
    return params


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of `run`, whose result is waited for, after one call that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


class _Programs(NamedTuple):
    """Of one LLM: (params, inputs) to token, position and cache; and those again after more tokens."""

    prefill: Callable[..., tuple[jax.Array, jax.Array, KVCache]]
    decode: Callable[..., tuple[jax.Array, KVCache]]


def _programs(model: VLM, gen_tokens: int) -> _Programs:
    @jax.jit
    def prefill(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, KVCache]:
        length = batch["tokens"].shape[1]
        logits, cache, position = model.apply(
            {"params": params}, prompt_inputs(batch), length + gen_tokens, method="prefill"
        )
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), position, cache

    @partial(jax.jit, donate_argnames="cache")  # as inside one program of generation: no copy of it
    def decode(
        params: Params, token: jax.Array, position: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        first = cache.slots - gen_tokens

        def one_more(index: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            token, cache = carry
            logits, cache = model.apply(
                {"params": params}, token, position + index, cache, first + index, method="decode"
            )
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, gen_tokens - 1, one_more, (token, cache))

    return _Programs(prefill, decode)


def _measure_llm(run: _Run, name: str) -> list[dict[str, Any]]:
    """The cells of one LLM; its parameters are freed with the return."""
    grid, size = run.grid, SIZES[name]
    model = VLM(
        size, vocab_rows(name), "mlp", 0, jnp.dtype(grid.dtype), layout="loop", attention=grid.attention
    )
    programs, params, cells = _programs(model, grid.gen_tokens), None, []
    for _, v, q, batch in (cell for cell in grid.cells if cell[0] == name):
        key = {"llm_name": name, "visual_tokens": v, "text_tokens": q, "batch": batch}

        def work(length: int = q + v, batch: int = batch) -> tuple[float, float]:
            nonlocal params
            _check_length(size, length, grid.gen_tokens)
            if params is None:
                params = random_params(_decoder_shapes(model), grid.dtype)
            return _time_cell(programs, params, length, batch, grid)

        found = run.step(key, work)
        if found is not None:
            prefill, decode = found
            cells.append({**key, "gen_tokens": grid.gen_tokens, "prefill_ms": prefill, "decode_ms": decode})
    return cells


def _check_length(size: DecoderSize, prompt: int, generated: int) -> None:
    if prompt + generated > size.context:
        raise _TooLongError(
            f"{prompt} tokens of prompt and {generated} of answer; the LLM's context is {size.context}"
        )


def _decoder_shapes(model: VLM) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    inputs = {"tokens": tokens, "image_slots": tokens, "valid": jax.ShapeDtypeStruct((1, 1), bool)}
    return abstract_params(model, jax.eval_shape(prompt_inputs, inputs), tokens)


def _time_cell(
    programs: _Programs, params: Params, length: int, batch: int, grid: Grid
) -> tuple[float, float]:
    """(milliseconds of the prefill, milliseconds of a decoded token), of the whole batch."""
    ids = np.random.default_rng(0).integers(0, params["decoder"]["embedding"].shape[0], (batch, length))
    prompt = jax.device_put(
        {
            "tokens": ids.astype(np.int32),
            "image_slots": np.zeros((batch, length), np.int32),
            "valid": np.ones((batch, length), bool),
        }
    )
    prefills, decodes = [], []
    for number in range(grid.repeats + 1):
        start = time.perf_counter()
        token, position, cache = jax.block_until_ready(programs.prefill(params, prompt))
        between = time.perf_counter()
        done = programs.decode(params, token, position, cache)
        del cache  # given away
        jax.block_until_ready(done)
        end = time.perf_counter()
        del done
        if number:  # the first compiles
            prefills.append(between - start)
            decodes.append((end - between) / (grid.gen_tokens - 1))
    return 1e3 * statistics.median(prefills), 1e3 * statistics.median(decodes)


def _measure_images(run: _Run) -> dict[str, Any]:
    """Milliseconds of tower and compressor, of batches of images."""
    grid, (name, options) = run.grid, run.grid.method
    size, dtype = TOWERS[grid.tower], jnp.dtype(grid.dtype)
    needs = COMPRESSORS[name].needs(size, options)
    params = random_params(abstract_tower_params(size), grid.dtype)

    @jax.jit
    def tower(params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        return tower_features(size, params, pixels, needs, dtype, grid.attention)

    def features(pixels: jax.Array) -> Features:
        return Features(**tower(params, pixels), tower=params if "tower" in needs else None)

    towers: list[dict[str, Any]] = []
    compressors: list[dict[str, Any]] = []
    for batch in grid.batches:
        pixels = jnp.zeros((batch, size.image_size, size.image_size, 3), dtype)
        one = partial(tower, params, pixels)
        ms = run.step({"tower": grid.tower, "batch": batch}, partial(median_ms, one, grid.repeats))
        if ms is not None:
            towers.append({"batch": batch, "ms": ms})
        for llm, v in itertools.product(grid.llms, grid.visual_tokens):
            key = {"llm_name": llm, "visual_tokens": v, "batch": batch}
            make = partial(features, pixels)
            ms = run.step({**key, "compressor": name}, partial(_time_compressor, grid, llm, v, make))
            if ms is not None:
                compressors.append({**key, "ms": ms})
    return {
        "tower": grid.tower,
        "compressor": grid.compressor,
        "query_pass": COMPRESSORS[name].text == "query",
        "tower_ms": towers,
        "compressor_ms": compressors,
    }


def _time_compressor(grid: Grid, llm: str, visual_tokens: int, make: Callable[[], Features]) -> float:
    """Milliseconds of one batch of what `make` makes; what fuses the text reads the longest asked for."""
    name, options = grid.method
    decoder, tower = SIZES[llm], TOWERS[grid.tower]
    module = make_compressor(
        name,
        visual_tokens,
        decoder.width,
        options,
        dtype=jnp.dtype(grid.dtype),
        attention=grid.attention,
        decoder_size=decoder,
        tower_size=tower,
        largest=visual_tokens,
    )
    features = make()
    rows = features.selected.shape[0]
    text, call = compressor_text(
        COMPRESSORS[name].text, rows, max(grid.text_tokens), decoder.width, jnp.dtype(grid.dtype)
    )
    text = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), text)
    params = random_params(abstract_params(module, features, text, method=call), grid.dtype)
    compress = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method=call))
    return median_ms(lambda: compress(params, features, text), grid.repeats)
