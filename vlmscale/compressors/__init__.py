"""Methods between encoder and LLM: one file a method, one interface, one static table.

A compressor is a Linen module called as `compressor(features, text_query) -> (tokens [B, V, D],
valid [B, V])`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn

from vlmscale.compressors.features import Features
from vlmscale.compressors.mlp import Projector
from vlmscale.compressors.pool import Pool
from vlmscale.compressors.tokenpacker import TokenPacker
from vlmscale.errors import UserError


@dataclass(frozen=True)
class Method:
    """One row of the table: the module, the token counts it can give, the tower outputs it reads.

    `build(visual_tokens, llm_width, **options)` makes the module; options are fields of its own.
    """

    build: Callable[..., nn.Module]
    counts: Callable[[int], list[int]]
    needs_levels: bool


def square_divisors(side: int) -> list[int]:
    """Token counts g * g for every g that divides the side of the patch grid."""
    return [g * g for g in range(1, side + 1) if side % g == 0]


def all_patches(side: int) -> list[int]:
    """The one token count of a method that keeps every patch."""
    return [side * side]


COMPRESSORS: dict[str, Method] = {
    "mlp": Method(Projector, all_patches, needs_levels=False),
    "pool": Method(Pool, square_divisors, needs_levels=False),
    "tokenpacker": Method(TokenPacker, square_divisors, needs_levels=True),
}


def check_count(name: str, visual_tokens: int, side: int) -> None:
    """Refuse a token count that the method cannot give on a side x side patch grid.

    Raises:
      UserError: naming the counts that work.
    """
    counts = COMPRESSORS[name].counts(side)
    if visual_tokens not in counts:
        raise UserError(
            f"compressor.visual_tokens={visual_tokens}: {name} on a {side}x{side} patch grid gives "
            f"{', '.join(map(str, counts))} (or 0 for a blind model)"
        )


__all__ = ["COMPRESSORS", "Features", "Method", "check_count"]
