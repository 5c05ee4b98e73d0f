"""Small models and batches of prompts with pictures, for the tests of reducers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.compressors.cases import TOWER, Case, tower_outputs
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM
from vlmscale.reducers import REDUCERS, ReducerSpec

VOCAB, LONGEST, TEXTS = 23, 9, (9, 6, 8, 4)
SIZES = {
    "grouped": DecoderSize(width=16, num_layers=5, num_heads=4, num_kv_heads=2, mlp_width=24),
    "qwen2": DecoderSize(
        width=16,
        num_layers=5,
        num_heads=4,
        num_kv_heads=1,
        mlp_width=24,
        family="qwen2",
        tied_embeddings=False,
    ),
    "qwen3": DecoderSize(width=16, num_layers=5, num_heads=4, num_kv_heads=2, mlp_width=24, family="qwen3"),
}
MLP = Case("mlp", (), 16)
ADAPTIVE = Case("prumerge", (("count", "adaptive"),), 9)


def fastv(layer: int = 2, keep: float = 0.4, **options: str) -> ReducerSpec:
    return ReducerSpec("fastv", layer, keep, (), tuple(options.items()))


def scheduled(*shares: float, **options: str) -> ReducerSpec:
    return ReducerSpec("g_search", 0, 1.0, shares, tuple(options.items()))


def sparse(layer: int = 2, **options: str) -> ReducerSpec:
    return ReducerSpec("sparsity_similarity", layer, 1.0, (), tuple(options.items()))


def voco(tokens: int = 1) -> ReducerSpec:
    return ReducerSpec("voco", 2, 0.5, (), () if tokens == 1 else (("tokens", str(tokens)),))


def atp(keep: float = 0.5) -> ReducerSpec:
    return ReducerSpec("atp", 2, keep, ())


SPECS = {
    "fastv": fastv(),
    "fastv-received": fastv(3, 0.5, score="received"),
    "g_search": scheduled(1, 0.8, 0.8, 0.3),
    "sparsity": sparse(),
    "sparsity-inside": sparse(3, patches="all"),
    "g_search-received": scheduled(1, 1, 0.5, 0.2, 0.1, score="received"),
    "voco": voco(2),
    "atp": atp(),
}
TRAINED = [name for name, spec in SPECS.items() if REDUCERS[spec.name].trained]


def make_model(spec: ReducerSpec | None, case: Case = MLP, size: str = "grouped", **more: Any) -> VLM:
    return VLM(
        SIZES[size],
        VOCAB,
        case.name,
        case.visual_tokens,
        layout="loop",
        options=case.options,
        tower_size=TOWER,
        largest=case.visual_tokens,
        reducer=spec,
        **more,
    )


def make_prompts(case: Case = MLP, rows: int = len(TEXTS), appended: int = 0) -> dict[str, Any]:
    """Right-padded prompts of different lengths, two tokens of text in front of the picture of each.

    Every fourth has no picture, and is shorter by that. `appended` compression tokens stand behind a picture.
    """
    rng = np.random.default_rng(5)
    length = LONGEST + case.visual_tokens + appended
    tokens = rng.integers(1, VOCAB, (rows, length)).astype(np.int32)
    slots, valid = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        text = TEXTS[row % len(TEXTS)]
        shown = case.visual_tokens + appended if text != TEXTS[-1] else 0
        slots[row, 2 : 2 + shown] = 1
        valid[row, : text + shown] = True
    return {"tokens": tokens, "image_slots": slots, "valid": valid, **tower_outputs(case.needs, rows)}
