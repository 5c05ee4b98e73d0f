"""What is left of a prompt in each layer of an LLM with a reducer, and what choosing it costs."""

from __future__ import annotations

from collections.abc import Sequence

from vlmscale.cost.flops import head_flops, layer_flops, score_flops
from vlmscale.models.sizes import DecoderSize
from vlmscale.reducers import REDUCERS, ReducerSpec, cut_layers, make_reducer


def tokens_by_layer(
    spec: ReducerSpec | None, num_layers: int, text: float, visual: int, kept: Sequence[int] = ()
) -> list[float]:
    """Tokens of a prompt in each layer.

    Args:
      spec: of the reducer; None for the plain model.
      num_layers: of the LLM.
      text: tokens of the prompt's text.
      visual: tokens of its images, with compression tokens if there are any.
      kept: of an adaptive method how many of them stay behind each cut.
    """
    left = [visual] * num_layers
    if spec is not None and visual:
        reducer = make_reducer(spec, num_layers)
        for cut, layer in enumerate(cut_layers(spec, num_layers)):
            assert reducer is not None
            count = kept[cut] if kept else reducer.most(cut, visual)
            left[layer:] = [count] * (num_layers - layer)
    return [text + tokens for tokens in left]


def ranking_flops(spec: ReducerSpec | None, size: DecoderSize, tokens: list[float]) -> float:
    """FLOPs of the scores that a reducer ranks by: of one query a cut, or of a layer's whole attention.

    Args:
      spec: of the reducer.
      size: of the decoder.
      tokens: of the prompt in each layer.
    """
    if spec is None or REDUCERS[spec.name].given:
        return 0.0
    whole = spec.score == "received"
    found = 0.0
    for layer in cut_layers(spec, size.num_layers):
        there = tokens[layer - 1]
        found += score_flops(size, there, 0, True) if whole else score_flops(size, 1, there - 1, True)
    return found


def soft_flops(spec: ReducerSpec | None, size: DecoderSize, length: float, remat: str = "none") -> float:
    """FLOPs of a reducer's scores for a row of a training step, forward, backward and what is computed again.

    Args:
      spec: of the reducer; one that trains no cuts costs nothing there.
      size: of the decoder.
      length: positions of the row.
      remat: the policy; "none" computes nothing again.
    """
    if spec is None or REDUCERS[spec.name].soft is None:
        return 0.0
    passes = 3 + (remat != "none")
    return passes * len(cut_layers(spec, size.num_layers)) * score_flops(size, length, 0, False)


def two_pass_flops(
    size: DecoderSize, vocab_size: int, first: float, kept: float, second: float, generated: float
) -> float:
    """As `inference_flops`, of a prompt in two passes (`vlmscale.models.hiding`).

    Args:
      size: of the decoder.
      vocab_size: rows of its head.
      first: tokens of the first pass.
      kept: of these the second sees.
      second: tokens of the second pass.
      generated: tokens of the answer.
    """
    fed_back = max(generated - 1, 0)
    layer = layer_flops(size, first, 0) + layer_flops(size, second, kept)
    layer += layer_flops(size, fed_back, kept + second)
    return size.num_layers * layer + head_flops(size, vocab_size, generated)
