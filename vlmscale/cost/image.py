"""What an image costs before the LLM, and what a training sample costs with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vlmscale.compressors import COMPRESSORS, make_compressor, parse_options
from vlmscale.compressors.features import (
    Features,
    FusionText,
    abstract_features,
    abstract_tower_params,
    tower_features,
)
from vlmscale.config import Cell, image_slots, reducer_of
from vlmscale.cost import flops
from vlmscale.cost.count import count_flops
from vlmscale.cost.reduced import soft_flops
from vlmscale.layers import abstract_params
from vlmscale.models.sizes import SIZES, TOWERS, TowerSize


class ImageFlops(NamedTuple):
    """Forward FLOPs of one image."""

    tower: int
    compressor: int
    query_pass: int  # of the LLM over the question, where the compressor reads it


def image_flops(cell: Cell, visual_tokens: int, text_tokens: int, query_tokens: float) -> ImageFlops:
    """What one image costs before the LLM's own pass.

    Args:
      cell: the config.
      visual_tokens: tokens it gives, of an adaptive method their mean; 0 for a blind model.
      text_tokens: of the prompt, which a compressor that fuses the text runs over.
      query_tokens: of the question, which QueCC runs the LLM over.
    """
    if not visual_tokens:
        return ImageFlops(0, 0, 0)
    name, text = cell.compressor.name, cell.compressor.options
    method = COMPRESSORS[name]
    needs = method.needs(TOWERS[cell.tower.name], parse_options(name, text))
    compressor = _compressor(compressor_call(cell, visual_tokens, text_tokens))
    query = flops.decoder_flops(SIZES[cell.llm.name], query_tokens, 0) if method.text == "query" else 0
    return ImageFlops(tower_flops(TOWERS[cell.tower.name], needs), compressor, round(query))


class Sample(NamedTuple):
    """Means over training samples."""

    text: float  # tokens of text
    targets: float  # supervised tokens
    query: float  # tokens of the question
    with_image: float  # images shown


def sample_flops(cell: Cell, vocab_size: int, sample: Sample, visual_tokens: float | None = None) -> float:
    """FLOPs of an average training sample.

    Forward, and backward once for gradients of activations and once for those of parameters, each where it is
    needed for what trains; recomputation is not counted, but by `vlmscale.cost.training.step_flops`. A frozen
    tower is computed once in advance unless `data.features` says "computed"; no gradient flows through the
    pass over the question. A method that trains many counts runs the LLM for each of them in every step, or
    for the one drawn; in the former case the gradient of what the counts share is computed once for each.

    Args:
      cell: the config.
      vocab_size: rows of the head.
      sample: what is trained on.
      visual_tokens: mean tokens of an image, of an adaptive method; None for the config's.
    """
    size, largest, share = SIZES[cell.llm.name], cell.compressor.visual_tokens, sample.with_image
    method = COMPRESSORS[cell.compressor.name]
    counts: tuple[float, ...] = (largest if visual_tokens is None else visual_tokens,)
    if largest and method.nested is not None:
        counts = method.nested(largest)
    train, trained = cell.train, bool(cell.train.llm_rate)
    below = largest and (train.compressor_rate or train.tower_rate)  # what the decoder's gradient goes on to
    lengths = [sample.text + share * (count + image_slots(cell) - largest) for count in counts]
    layers = sum(flops.decoder_step_flops(size, length, trained=trained) for length in lengths)
    layers += sum(soft_flops(reducer_of(cell), size, length) for length in lengths)
    head = flops.head_step_flops(size, vocab_size, sample.targets, trained=trained)
    decoder = (layers + len(counts) * head) / (1 if method.trains_all else len(counts))
    compressed = (bool(train.compressor_rate) + bool(below)) * (len(counts) if method.trains_all else 1)
    image = image_flops(cell, round(max(counts)), round(sample.text), sample.query)
    return decoder + share * (
        (1 + compressed) * image.compressor + image.query_pass + tower_passes(cell) * image.tower
    )


def tower_passes(cell: Cell) -> int:
    """How often a step pays a tower's forward pass: three times where it trains, as backward is two."""
    if cell.train.tower_rate:
        return 3
    return 1 if cell.data.features == "computed" else 0


@lru_cache(maxsize=64)
def tower_flops(size: TowerSize, needs: frozenset[str] = frozenset()) -> int:
    """Forward FLOPs of the tower for one image: what `tower_features` runs for these needs."""
    return count_flops(*tower_call(size, needs))


def tower_call(size: TowerSize, needs: frozenset[str]) -> tuple[Callable[..., Any], Any, Any]:
    """`tower_features` as a function of parameters and pixels, and their shapes for one image."""
    pixels = jax.ShapeDtypeStruct((1, size.image_size, size.image_size, 3), np.float32)

    def run(params: dict[str, Any], pixels: jax.Array) -> dict[str, jax.Array]:
        return tower_features(size, params, pixels, needs)

    return run, abstract_tower_params(size), pixels


class CompressorCall(NamedTuple):
    """A compressor and what it is called with, for one image."""

    name: str
    options: str
    visual_tokens: int
    largest: int
    tower: str
    llm: str
    text_tokens: int

    def shapes(self) -> tuple[Callable[..., Any], Any, Features, Any]:
        """A function of parameters, features and text, and the shapes of these three."""
        chosen, size, decoder = parse_options(self.name, self.options), TOWERS[self.tower], SIZES[self.llm]
        module = make_compressor(
            self.name,
            self.visual_tokens,
            decoder.width,
            chosen,
            decoder_size=decoder,
            tower_size=size,
            largest=self.largest,
        )
        method = COMPRESSORS[self.name]
        features = abstract_features(size, method.needs(size, chosen))
        text, call = compressor_text(method.text, 1, self.text_tokens, decoder.width, np.float32)

        def run(params: dict[str, Any], features: Features, text: Any) -> Any:
            return module.apply({"params": params}, features, text, method=call)

        return run, nn.meta.unbox(abstract_params(module, features, text, method=call)), features, text


def compressor_call(cell: Cell, visual_tokens: int, text_tokens: int) -> CompressorCall:
    """A cell's compressor at a number of visual tokens, in front of so many tokens of text."""
    own, fuses = cell.compressor, COMPRESSORS[cell.compressor.name].text == "fusion"
    text = text_tokens if fuses else 0  # which the others do not see, so that their calls are alike
    return CompressorCall(
        own.name, own.options, visual_tokens, own.visual_tokens, cell.tower.name, cell.llm.name, text
    )


def compressor_text(kind: str, rows: int, text_tokens: int, width: int, dtype: Any) -> tuple[Any, str]:
    """Shapes of what a compressor reads beside the features of one image a row, and the method to call.

    Args:
      kind: `Method.text`.
      rows: of the batch.
      text_tokens: T, of each row.
      width: D of the LLM.
      dtype: of embeddings.
    """
    if kind == "query":
        return jax.ShapeDtypeStruct((rows, 1, width), dtype), "__call__"
    if kind != "fusion":
        return None, "__call__"
    ids: Any = jax.ShapeDtypeStruct((rows, text_tokens), np.int32)
    embeddings: Any = jax.ShapeDtypeStruct((rows, text_tokens, width), dtype)
    readable: Any = jax.ShapeDtypeStruct(ids.shape, bool)
    images: Any = jax.ShapeDtypeStruct((rows, 1), np.int32)
    return FusionText(embeddings, readable, ids, images), "fuse"


@lru_cache(maxsize=256)
def _compressor(call: CompressorCall) -> int:
    """FLOPs of the module for one image, from its jaxpr."""
    return count_flops(*call.shapes())
