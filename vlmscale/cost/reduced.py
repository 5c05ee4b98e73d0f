"""What is left of a prompt in each layer of an LLM with a reducer, and what choosing it costs."""

from __future__ import annotations

from collections.abc import Sequence

from vlmscale.cost.flops import score_flops
from vlmscale.models.sizes import DecoderSize
from vlmscale.reducers import REDUCERS, ReducerSpec, make_reducer


def tokens_by_layer(
    spec: ReducerSpec | None, num_layers: int, text: float, visual: int, kept: Sequence[int] = ()
) -> list[float]:
    """Tokens of a prompt in each layer.

    Args:
      spec: of the reducer; None for the plain model.
      num_layers: of the LLM.
      text: tokens of the prompt's text.
      visual: tokens of its images.
      kept: of an adaptive method how many of them stay behind each cut.
    """
    left = [visual] * num_layers
    if spec is not None and visual:
        reducer = make_reducer(spec, num_layers)
        for cut, layer in enumerate(reducer.layers):
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
    for layer in make_reducer(spec, size.num_layers).layers:
        there = tokens[layer - 1]
        found += score_flops(size, there, 0, True) if whole else score_flops(size, 1, there - 1, True)
    return found
