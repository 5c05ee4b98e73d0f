"""FLOPs of a training step as its program multiplies: forward, gradients, and what is computed again.

The decoder's and the head's are arithmetic; a compressor's and a tower's are counted from the jaxprs of their
gradients. `vlmscale.cost.image.sample_flops` is what a step is worth, without recomputation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax

from vlmscale.compressors import COMPRESSORS, parse_options
from vlmscale.config import Cell
from vlmscale.cost import flops
from vlmscale.cost.count import count_flops
from vlmscale.cost.image import CompressorCall, Sample, compressor_call, tower_call, tower_flops
from vlmscale.models.sizes import SIZES, TOWERS, TowerSize


def step_flops(cell: Cell, vocab_size: int, sample: Sample) -> float:
    """FLOPs of a training step for an average sample: every product of the program.

    Attention counts all scores with the backend "xla", the causal half with those that skip what is masked;
    what fused kernels compute again inside is not counted. A method that trains many counts at once runs all
    that is behind the tower for each (XLA may merge the projectors' forward passes); one that draws a count
    runs all tokens, of which some are padding.

    Args:
      cell: the config; something in it trains.
      vocab_size: rows of the head.
      sample: what is trained on.
    """
    train, size, largest = cell.train, SIZES[cell.llm.name], cell.compressor.visual_tokens
    trained, causal = bool(train.llm_rate), train.attention != "xla"
    head = flops.head_step_flops(size, vocab_size, sample.targets, trained=trained)
    if not largest:
        return head + flops.decoder_step_flops(size, sample.text, train.remat, trained=trained, causal=causal)
    method, share = COMPRESSORS[cell.compressor.name], sample.with_image
    counts = method.nested(largest) if method.nested is not None and method.trains_all else (largest,)
    total = 0.0
    for count in counts:
        length = sample.text + share * count
        total += head + flops.decoder_step_flops(size, length, train.remat, trained=trained, causal=causal)
        if method.text == "query":
            total += share * flops.decoder_flops(size, sample.query, 0, causal=causal)
        call = compressor_call(cell, count, round(sample.text))
        total += share * _compressor_step(call, bool(train.compressor_rate), bool(train.tower_rate))
    tower, options = TOWERS[cell.tower.name], parse_options(cell.compressor.name, cell.compressor.options)
    needs = method.needs(tower, options)
    if train.tower_rate:
        return total + share * _tower_step(tower, needs)
    return total + share * (tower_flops(tower, needs) if cell.data.features == "computed" else 0)


@lru_cache(maxsize=256)
def _compressor_step(call: CompressorCall, trained: bool, below: bool) -> int:
    """FLOPs of a compressor, forward and backward, for one image.

    Args:
      call: what is called.
      trained: whether its parameters have gradients.
      below: whether the tower's outputs have.
    """
    run, *shapes = call.shapes()

    def outputs(params: Any, features: Any, text: Any) -> Any:
        """Tokens, and where the method fuses the text, its embeddings; not which tokens are valid."""
        made = run(params, features, text)
        return made[0], made[2:]

    def backward(params: Any, features: Any, text: Any, gradient: Any) -> Any:
        def of_wanted(wanted: Any) -> Any:
            return outputs(wanted[0] or params, wanted[1] or features, text)

        made, pull = jax.vjp(of_wanted, (params if trained else {}, features if below else ()))
        return made, pull(gradient)

    return count_flops(backward, *shapes, jax.eval_shape(outputs, *shapes))


@lru_cache(maxsize=64)
def _tower_step(size: TowerSize, needs: frozenset[str]) -> int:
    """FLOPs of a tower that trains, for one image: its blocks are computed again."""
    run, params, pixels = tower_call(size, needs)

    def backward(params: Any, pixels: Any, gradient: Any) -> Any:
        made, pull = jax.vjp(lambda params: run(params, pixels), params)
        return made, pull(gradient)

    return count_flops(backward, params, pixels, jax.eval_shape(run, params, pixels))
