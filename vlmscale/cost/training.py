"""FLOPs of a training step as its program multiplies: forward, gradients, and what is computed again.

The decoder's and the head's are arithmetic; a compressor's and a tower's are counted from the jaxpr of their
gradients. `vlmscale.cost.image.sample_flops` is what a step is worth, without recomputation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax

from vlmscale.compressors import COMPRESSORS, Features, parse_options
from vlmscale.config import Cell, image_slots, reducer_of
from vlmscale.cost import flops
from vlmscale.cost.count import count_flops
from vlmscale.cost.image import CompressorCall, Sample, compressor_call, tower_call
from vlmscale.cost.reduced import soft_flops
from vlmscale.models.sizes import SIZES, TOWERS


def step_flops(cell: Cell, vocab_size: int, sample: Sample) -> float:
    """FLOPs of a training step for an average sample: every product of the program.

    Attention counts all scores with the backend "xla", the causal half with those that skip what is masked;
    what fused kernels compute again inside is not counted. A method that trains many counts at once runs all
    that is behind the tower for each (XLA may merge the projectors' forward passes); one that draws a count
    runs all tokens, of which some are padding. Products that a batch shares count for every image (of learned
    queries with weights).

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
    total, calls = 0.0, []
    for count in counts:
        length = sample.text + share * (count + image_slots(cell) - largest)
        total += head + flops.decoder_step_flops(size, length, train.remat, trained=trained, causal=causal)
        total += soft_flops(reducer_of(cell), size, length, train.remat)
        if method.text == "query":
            total += share * flops.decoder_flops(size, sample.query, 0, causal=causal)
        calls.append(compressor_call(cell, count, round(length)))  # text is fused in all slots of a row
    parts = {"compressor": train.compressor_rate, "tower": train.tower_rate}
    below = tuple(part for part, rate in parts.items() if rate)
    stored = not train.tower_rate and cell.data.features != "computed"
    return total + share * _image_step(tuple(calls), below, stored)


@lru_cache(maxsize=256)
def _image_step(calls: tuple[CompressorCall, ...], trained: tuple[str, ...], stored: bool) -> int:
    """FLOPs of what stands below the LLM for one image, forward and backward.

    Args:
      calls: of the compressor, one for each count; they share parameters and the tower's outputs.
      trained: which of "compressor" and "tower" have gradients.
      stored: whether the tower's outputs are given, not computed.
    """
    shapes = [call.shapes() for call in calls]
    _, params, features, _ = shapes[0]
    arrays: dict[str, Any] = {"compressor": params, "texts": [text for *_, text in shapes]}
    size, options = TOWERS[calls[0].tower], parse_options(calls[0].name, calls[0].options)
    needs = COMPRESSORS[calls[0].name].needs(size, options)
    run_tower, tower, pixels = tower_call(size, needs)
    arrays |= {"features": features} if stored else {"tower": tower, "pixels": pixels}

    def outputs(arrays: dict[str, Any]) -> Any:
        """Tokens, and where the text is fused, its embeddings; not which tokens are valid."""
        if stored:
            features = arrays["features"]
        else:
            blocks = {"tower": arrays["tower"]} if "tower" in needs else {}
            features = Features(**run_tower(arrays["tower"], arrays["pixels"]) | blocks)
        made = [
            run(arrays["compressor"], features, text)
            for (run, *_), text in zip(shapes, arrays["texts"], strict=True)
        ]
        return [(one[0], one[2:]) for one in made]

    def step(arrays: dict[str, Any], gradient: Any) -> Any:
        wanted = {part: arrays[part] for part in trained}
        made, pull = jax.vjp(lambda wanted: outputs(arrays | wanted), wanted)
        return made, pull(gradient)

    return count_flops(step, arrays, jax.eval_shape(outputs, arrays))
