"""What there is to choose from for an analysis: LLMs, and what their images cost before them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vlmscale.compressors import COMPRESSORS, check_count, parse_options
from vlmscale.config import Cell, CompressorConfig, LLMConfig, TowerConfig
from vlmscale.cost.answer import Served, served, vocab_rows
from vlmscale.cost.image import image_flops
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES, TOWERS

PAPER_ORIGIN, PAPER_FAMILY = "arXiv 2411.03312", "qwen1.5"
_NEAR = math.log(1.15)
Cells = Sequence[dict[str, Any]]


class Listed(NamedTuple):
    """An LLM on the menu.

    Attributes:
      name: of `SIZES`, or as the cells call it.
      n: parameters, as the cells count them where it was measured.
      llm: what its cost depends on; None where the name is unknown.
    """

    name: str
    n: float
    llm: Served | None


def known_name(name: str, n: float, origin: str) -> str | None:
    """The size that a cell's LLM of n parameters is, or None.

    The paper's LLMs are called by their size alone: the one of Qwen1.5 that is as large to within 15%.
    """
    if name.lower() in SIZES:
        return name.lower()
    family = [item for item in SIZES if origin == PAPER_ORIGIN and _family(item) == PAPER_FAMILY]
    near = [item for item in family if abs(math.log(_params(item) / n)) < _NEAR]
    return min(near, key=lambda item: abs(math.log(_params(item) / n)), default=None)


def _params(name: str) -> int:
    return SIZES[name].num_params(vocab_rows(name))


def list_llms(cells: Cells, origin: str, wanted: Sequence[str], itemsize: int) -> list[Listed]:
    """The measured LLMs and others of their families, smallest first; or those that are wanted.

    Args:
      cells: of a task group in analysis.json.
      origin: of its data.
      wanted: names; empty for the default.
      itemsize: bytes of a weight.

    Raises:
      UserError: a wanted name is neither measured nor known.
    """
    measured: dict[str, float] = {}
    for cell in cells:
        measured[known_name(cell["llm_name"], cell["n"], origin) or cell["llm_name"]] = cell["n"]
    families = {_family(name) for name in measured if name in SIZES}
    menu = list(measured) + [name for name in SIZES if _family(name) in families and name not in measured]
    for name in wanted:
        if name not in measured and name not in SIZES:
            known = ", ".join(dict.fromkeys([*measured, *SIZES]))
            raise UserError(f"--llm {name}: neither measured nor known (there are {known})")
    listed = []
    for name in wanted or menu:
        llm = served(SIZES[name], vocab_rows(name), itemsize) if name in SIZES else None
        listed.append(Listed(name, measured[name] if llm is None else measured.get(name, llm.params), llm))
    return sorted(listed, key=lambda item: item.n)


def _family(name: str) -> str:
    """What stands before the size: qwen1.5-7b is one of qwen1.5."""
    return re.split(r"-\d", name, maxsplit=1)[0]


class Image(NamedTuple):
    """FLOPs of an image before the LLM, and whether the compressor runs the LLM over the question."""

    flops: float
    query_pass: bool


def chosen_image(
    tower: str, compressor: str, listed: Listed, visual_tokens: int, text_tokens: float
) -> Image:
    """That of a tower and a compressor by name.

    Args:
      tower: of `TOWERS`.
      compressor: its name, with options behind a colon.
      listed: the LLM, whose width the compressor has.
      visual_tokens: V.
      text_tokens: Q, which a compressor that fuses the text runs over.

    Raises:
      UserError: something is unknown, or the compressor cannot give so many tokens.
    """
    if tower not in TOWERS:
        raise UserError(f"--tower {tower}: unknown (known: {', '.join(TOWERS)})")
    name, _, options = compressor.partition(":")
    parse_options(name, options)
    check_count(name, visual_tokens, TOWERS[tower].grid)
    llm = listed.name if listed.name in SIZES else _nearest(listed.n)
    chosen = CompressorConfig(name, visual_tokens, options)
    cell = Cell(tower=TowerConfig(tower), llm=LLMConfig(llm), compressor=chosen)
    flops = image_flops(cell, visual_tokens, round(text_tokens), 0)
    return Image(flops.tower + flops.compressor, COMPRESSORS[name].text == "query")


def _nearest(n: float) -> str:
    return min(SIZES, key=lambda name: abs(math.log(_params(name) / n)))


def measured_image(cells: Cells, visual_tokens: float) -> Image | None:
    """What the cells say of V visual tokens (the mean of those that do), or None."""
    own = [cell for cell in cells if cell["v"] == visual_tokens and cell.get("tower_flops") is not None]
    if not own:
        return None
    total = [cell["tower_flops"] + (cell.get("compressor_flops") or 0.0) for cell in own]
    return Image(math.fsum(total) / len(total), any(cell.get("query_flops") for cell in own))
