"""What the benchmarks beside transformers share: the same random weights on both sides, timing, ceilings."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before jax starts: it would take three quarters of a GPU's memory, and leave torch the rest.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize
from vlmscale.sharding import make_mesh
from vlmscale.weights.directory import load_directory
from vlmscale.weights.hf_config import decoder_config, tower_config

transformers.utils.logging.disable_progress_bar()
DTYPES = {"float32": (jnp.float32, torch.float32), "bfloat16": (jnp.bfloat16, torch.bfloat16)}


def decoder_row(name: str, num_layers: int | None) -> DecoderSize:
    """A row of the size table, with fewer layers if told so."""
    return SIZES[name] if num_layers is None else replace(SIZES[name], num_layers=num_layers)


def tower_row(name: str) -> TowerSize:
    """A row of the tower table, read at its last layer, as transformers' whole forward is."""
    return replace(TOWERS[name], select_layer=TOWERS[name].num_layers)


def both_decoders(size: DecoderSize, dtype: str, device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A random decoder of theirs on `device`, and its parameters as ours, through a checkpoint on disk."""
    config = decoder_config(size, size.vocab_size)
    name = config["architectures"][0]
    kind = getattr(transformers, name.replace("ForCausalLM", "Config"))
    return _both(getattr(transformers, name), kind(**config), dtype, device)


def both_towers(size: TowerSize, dtype: str, device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A random tower of theirs, and its parameters as ours."""
    config = tower_config(size, size.num_layers)
    name = config["architectures"][0]
    kind = getattr(transformers, name.replace("Model", "Config"))
    return _both(getattr(transformers, name), kind(**config), dtype, device)


class PooledProjector(torch.nn.Module):
    """Means over windows of patches, then the projector."""

    def __init__(self, projector: torch.nn.Module, visual_tokens: int) -> None:
        super().__init__()
        self.projector, self.grid = projector, math.isqrt(visual_tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, P, C] to [N, V, D]."""
        side = math.isqrt(x.shape[1])
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.mT.unflatten(2, (side, side)), self.grid)
        return self.projector(pooled.flatten(2).mT)


def both_llavas(
    decoder: DecoderSize, tower: TowerSize, visual_tokens: int, image_id: int, device: str
) -> tuple[Any, dict[str, Any]]:
    """A random LLaVA of theirs in float32, and its parameters as ours in the layout to train, "scan".

    Its tower ends at the layer that the projector reads, so that it computes none for nothing.
    """
    vision, text = tower_config(tower, tower.select_layer), decoder_config(decoder, decoder.vocab_size)
    style, family = (part["architectures"][0] for part in (vision, text))
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, style.replace("Model", "Config"))(**vision),
        text_config=getattr(transformers, family.replace("ForCausalLM", "Config"))(**text),
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if tower.class_tokens else "full",
        tie_word_embeddings=decoder.tied_embeddings,
    )
    theirs: Any
    theirs, ours = _both(transformers.LlavaForConditionalGeneration, config, "float32", device, "scan")
    if visual_tokens < tower.num_patches:
        theirs.model.multi_modal_projector = PooledProjector(
            theirs.model.multi_modal_projector, visual_tokens
        )
    return theirs, ours


def _both(
    model: Any, config: Any, dtype: str, device: str, layout: str = "loop"
) -> tuple[torch.nn.Module, dict[str, Any]]:
    jax_dtype, torch_dtype = DTYPES[dtype]
    torch.manual_seed(0)
    theirs = model(config).to(torch_dtype).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        mesh = make_mesh(devices=jax.devices()[:1])
        _, ours, _ = load_directory(Path(directory), mesh, jax_dtype, layout, whole_tower=True)
    return theirs.to(device), ours


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run one after the other in rounds, after one round that is not counted."""
    return {name: statistics.median(values) for name, values in rounds(runs, repeats).items()}


def rounds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """As `in_turn`, but the seconds of every round that counts."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def torch_done(device: str) -> None:
    """Wait for a GPU's queue."""
    if device == "cuda":
        torch.cuda.synchronize()


def ceilings(dtype: str) -> dict[str, float]:
    """What this device does at most: FLOP/s of a large matrix product, bytes/s of a large copy."""
    jax_dtype, _ = DTYPES[dtype]
    on_cpu = jax.default_backend() == "cpu"
    side, rows = (2048, 2**26) if on_cpu else (8192, 2**30)
    matrix = jnp.ones((side, side), jax_dtype)
    product = jax.jit(lambda x: x @ x)
    vector = jnp.ones(rows, jax_dtype)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    seconds = in_turn(
        {
            "product": lambda: jax.block_until_ready(product(matrix)),
            "copy": lambda: jax.block_until_ready(copy(vector)),
        },
        10,
    )
    moved = 2 * vector.size * vector.dtype.itemsize
    return {"flops": 2 * side**3 / seconds["product"], "bytes": moved / seconds["copy"]}


def params_bytes(params: dict[str, Any]) -> int:
    """Bytes of all parameters."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def show(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Each measurement as it comes; or all as one JSON object."""
    done = []
    for row in rows:
        done.append(row)
        if not as_json:
            parts = (
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.items()
            )
            print("  ".join(parts), flush=True)
    if as_json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "rows": done}))


def random_ids(size: DecoderSize, batch: int, length: int) -> np.ndarray:
    """Prompts [batch, length]."""
    return np.random.default_rng(0).integers(0, size.vocab_size, (batch, length))
