"""Every method of the table with each choice that it offers, on a tiny tower: cases, inputs and models."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vlmscale.compressors import COMPRESSORS
from vlmscale.compressors.features import tower_features
from vlmscale.layers import abstract_params
from vlmscale.models.sizes import DecoderSize, TowerSize
from vlmscale.models.vision import VisionTower
from vlmscale.models.vlm import VLM

TOWER = TowerSize(24, 6, 16, 3, 2, 24, select_layer=2, levels=(1, 2), style="clip", norm_eps=1e-5)
SIZE = DecoderSize(width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24)
ROWS, LENGTH, TARGETS, QUERY, VOCAB = 8, 14, 3, 5, 23
Batch = dict[str, Any]


class Case(NamedTuple):
    """A method with its choices and a number of visual tokens that it gives on the test's tower."""

    name: str
    options: tuple[tuple[str, str], ...]
    visual_tokens: int

    @property
    def label(self) -> str:
        """For the names of tests."""
        return "-".join([self.name, *(value for _, value in self.options)])

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of the tower."""
        return COMPRESSORS[self.name].needs(TOWER, dict(self.options))


def cases() -> Iterator[Case]:
    """Every method as it is, and with each other value of each option; of scores, which are inputs, one."""
    for name, method in COMPRESSORS.items():
        nearest = min(method.counts(TOWER.grid), key=lambda count: abs(count - 4))
        yield Case(name, (), nearest)
        for option, values in method.options.items():
            others = ("mean",) if option == "score" else values[1:]
            yield from (Case(name, ((option, value),), nearest) for value in others)


@functools.cache
def tower_params() -> Any:
    """Parameters of all blocks, random."""
    rng = np.random.default_rng(1)
    pixels = jax.ShapeDtypeStruct((1, 24, 24, 3), np.float32)
    shapes = nn.meta.unbox(abstract_params(VisionTower(TOWER), pixels, layers=(TOWER.num_layers,)))
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


@functools.cache
def tower_outputs(needs: frozenset[str], rows: int = ROWS) -> Batch:
    """What the tower makes of as many random pictures."""
    pixels = np.random.default_rng(2).standard_normal((rows, 24, 24, 3)).astype(np.float32)
    run = jax.jit(tower_features, static_argnums=(0, 3))
    return {name: np.asarray(x) for name, x in run(TOWER, tower_params(), pixels, needs - {"tower"}).items()}


def make_batch(case: Case, rows: int = ROWS, vocab: int = VOCAB) -> Batch:
    """Rows of different lengths with an image each but the last, whose text a fused method reads alone."""
    rng = np.random.default_rng(0)
    slots = np.zeros((rows, LENGTH + case.visual_tokens), bool)
    slots[:-1, 1 : 1 + case.visual_tokens] = True
    length = slots.shape[1]
    lengths = rng.integers(length - 4, length + 1, rows)
    places = np.stack(
        [rng.choice(np.arange(case.visual_tokens + 4, length - 5), TARGETS, False) for _ in range(rows)]
    )
    places[:, 0] = case.visual_tokens  # the last slot of the image predicts what stands right behind it
    batch: Batch = {
        "tokens": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "image_slots": slots,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": (np.arange(length) < lengths[:, None]).astype(np.int32),
        "target_positions": places.astype(np.int32),
        "target_ids": rng.integers(0, vocab, (rows, TARGETS)).astype(np.int32),
        "target_mask": np.ones((rows, TARGETS), bool),
        "query_tokens": rng.integers(0, vocab, (rows, QUERY)).astype(np.int32),
        "query_length": rng.integers(1, QUERY + 1, rows).astype(np.int32),
    }
    batch |= tower_outputs(case.needs, rows)
    return batch | ({"tower": tower_params()} if "tower" in case.needs else {})


def pack(batch: Batch) -> Batch:
    """Two samples a row: segments 1 and 2, their images 2 * row and 2 * row + 1."""
    rows, length = batch["tokens"].shape
    pairs = {name: values.reshape(rows // 2, -1) for name, values in batch.items() if name in _BY_TOKEN}
    second = np.arange(2 * length) >= length
    pairs["image_slots"] = pairs["image_slots"] * np.where(second, 2, 1)
    pairs["segment_ids"] = pairs["segment_ids"] * np.where(second, 2, 1)
    pairs["target_positions"] = pairs["target_positions"] + np.repeat([0, length], TARGETS)
    return batch | pairs


def share(packed: Batch) -> Batch:
    """Two packed rows a block, whose images they own together."""
    slots, segments = packed["image_slots"], packed["segment_ids"]
    second = np.arange(len(slots))[:, None] % 2 == 1
    numbered = {"image_slots": np.where(second & (slots > 0), slots + 2, slots)}
    return packed | numbered | {"segment_ids": np.where(second & (segments > 0), segments + 2, segments)}


_BY_TOKEN = (
    *("tokens", "image_slots", "positions", "segment_ids"),
    *("target_positions", "target_ids", "target_mask"),
)


def build(case: Case, size: DecoderSize = SIZE, vocab: int = VOCAB, **options: Any) -> VLM:
    """The model of a case."""
    return VLM(size, vocab, case.name, case.visual_tokens, options=case.options, tower_size=TOWER, **options)
