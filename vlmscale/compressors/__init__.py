"""Methods between encoder and LLM: one file a method, one interface, one static table.

A compressor is a Linen module called as `compressor(features, text_query) -> (tokens [N, V, D],
valid [N, V])` for N images. docs/add-a-compressor.md shows how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn

from vlmscale.compressors.fastervlm import FasterVLM
from vlmscale.compressors.features import Features
from vlmscale.compressors.grid import square_divisors, squares
from vlmscale.compressors.llava_mini import LLaVAMini
from vlmscale.compressors.m3 import Matryoshka, scales
from vlmscale.compressors.mlp import Projector
from vlmscale.compressors.mqt import MQT, trained_counts
from vlmscale.compressors.pool import Pool
from vlmscale.compressors.prumerge import PruMerge, PruMergePlus
from vlmscale.compressors.quecc import QueCC
from vlmscale.compressors.resampler import Resampler
from vlmscale.compressors.selection import SCORES, score_needs
from vlmscale.compressors.tokenpacker import TokenPacker
from vlmscale.compressors.vistog import VisToG
from vlmscale.errors import UserError
from vlmscale.models.sizes import TowerSize
from vlmscale.options import Options, label, parse

_CONTEXT = {"dtype", "attention", "decoder_size", "tower_size", "largest"}


def _selected_alone(tower: TowerSize, options: Options) -> frozenset[str]:
    return frozenset()


def _levels(tower: TowerSize, options: Options) -> frozenset[str]:
    return frozenset({"levels"})


def _inside_tower(tower: TowerSize, options: Options) -> frozenset[str]:
    return frozenset({"stack", "tower"})


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
      build: the module's class, made by `make_compressor`.
      counts: the token counts that it can give on a grid of a given side.
      needs: the fields of `Features` that it reads beside `selected`.
      options: the user's choices: name to allowed values, the default first; each is a field of the module.
      text: what it reads of the text: "" nothing, "query" an embedding of the question (`text_query` is
        [N, 1, D]), "fusion" the text's embeddings, which its method `fuse` rewrites.
      adaptive: whether the count depends on the picture, so that V is a maximum and `valid` is read.
      nested: for a method whose one model gives many counts: those that it is trained at, by its largest.
      trains_all: of a nested method: every step trains all of them (else one drawn at random).
    """

    build: type[nn.Module]
    counts: Callable[[int], Sequence[int]]
    needs: Callable[[TowerSize, Options], frozenset[str]] = _selected_alone
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text: str = ""
    adaptive: Callable[[Options], bool] = lambda options: False
    nested: Callable[[int], tuple[int, ...]] | None = None
    trains_all: bool = False


def all_patches(side: int) -> list[int]:
    """The one token count of a method that keeps every patch."""
    return [side * side]


def up_to_patches(side: int) -> list[int]:
    """Counts of a method that gives any number of tokens up to that of the patches."""
    return list(range(1, side * side + 1))


def merged_counts(side: int) -> list[int]:
    """Counts of PruMerge and PruMerge+: chosen patches, none to all, and the extra token."""
    return list(range(1, side * side + 2))


_merging = partial(
    Method,
    needs=score_needs("class_query", "keys"),
    options={"count": ("fixed", "adaptive"), "score": SCORES},
    adaptive=lambda options: options.get("count") == "adaptive",
)

COMPRESSORS: dict[str, Method] = {
    "mlp": Method(Projector, all_patches),
    "pool": Method(Pool, squares, options={"placement": ("before", "after")}),
    "m3": Method(Matryoshka, squares, nested=scales, trains_all=True),
    "tokenpacker": Method(TokenPacker, square_divisors, needs=_levels),
    "resampler": Method(Resampler, squares, options={"kind": ("qwen", "perceiver")}),
    "mqt": Method(MQT, squares, options={"keys": ("position", "image")}, nested=trained_counts),
    "llava_mini": Method(LLaVAMini, squares, text="fusion"),
    "quecc": Method(QueCC, square_divisors, needs=_levels, text="query"),
    "fastervlm": Method(
        FasterVLM, up_to_patches, needs=score_needs("class_attention"), options={"score": SCORES}
    ),
    "prumerge": _merging(PruMerge, merged_counts),
    "prumerge_plus": _merging(PruMergePlus, merged_counts),
    "vistog": Method(VisToG, up_to_patches, needs=_inside_tower),
}


def make_compressor(
    name: str, visual_tokens: int, llm_width: int, options: Options | None = None, **fields: Any
) -> nn.Module:
    """The module of a method.

    Args:
      name: of a row of the table.
      visual_tokens: how many tokens an image gives, V; of an adaptive method at most.
      llm_width: D.
      options: the user's choices, checked by `parse_options`.
      **fields: more fields of the module. Those that every caller gives are left out where the module does
        not declare them: `dtype`, `attention`, `decoder_size`, `tower_size`, and `largest`, the count that a
        nested method was made for.
    """
    build = COMPRESSORS[name].build
    spare = _CONTEXT - {part.name for part in dataclasses.fields(build)}
    fitting = {key: value for key, value in fields.items() if key not in spare}
    return build(visual_tokens, llm_width, **fitting, **(options or {}))


def parse_options(name: str, text: str) -> dict[str, str]:
    """The options of a method, written "key=value,key=value"; those that say the default are left out.

    Raises:
      UserError: naming the option or the value and what works.
    """
    return parse("compressor", COMPRESSORS, name, text)


def check_count(name: str, visual_tokens: int, side: int) -> None:
    """Refuse a token count that the method cannot give on a side x side patch grid.

    Raises:
      UserError: naming the counts that work.
    """
    counts = COMPRESSORS[name].counts(side)
    if visual_tokens not in counts:
        raise UserError(
            f"compressor.visual_tokens={visual_tokens}: {name} on {side}x{side} patches gives "
            f"{spoken(counts)} (or 0 for a blind model)"
        )


def spoken(counts: Sequence[int]) -> str:
    """A list of counts for a message; long ones with equal steps as their ends."""
    steps = {after - before for before, after in pairwise(counts)}
    if len(counts) > 8 and len(steps) == 1:
        every = "" if steps == {1} else f" in steps of {steps.pop()}"
        return f"{counts[0]} to {counts[-1]}{every}"
    return ", ".join(map(str, counts))


__all__ = [
    "COMPRESSORS",
    "Features",
    "Method",
    "check_count",
    "label",
    "make_compressor",
    "parse_options",
    "spoken",
]
