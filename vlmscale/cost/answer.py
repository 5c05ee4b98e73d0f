"""What one answer of an LLM takes: FLOPs, and the least time on a device. Pure arithmetic, no arrays."""

from __future__ import annotations

from typing import NamedTuple

from vlmscale.config import DataConfig
from vlmscale.cost.peak import Device
from vlmscale.models.sizes import SIZES, DecoderSize


class Served(NamedTuple):
    """What of an LLM its cost depends on.

    Attributes:
      params: all parameters.
      linear: parameters of the layers' matrices, which every token passes.
      head: parameters of the head's matrix, read for every token that is predicted.
      attention: width of all queries of a layer, summed over layers.
      kv_bytes: what the cache keeps of a token.
    """

    params: float
    linear: float
    head: float
    attention: float
    kv_bytes: float


class Asked(NamedTuple):
    """An answer: tokens of the prompt (text and image), tokens said, answers at once, FLOPs of the image.

    `query` are tokens that the LLM runs over beforehand for a compressor that reads the question.
    """

    prompt: float
    generated: float
    batch: float = 1.0
    image_flops: float = 0.0
    query: float = 0.0


def vocab_rows(name: str) -> int:
    """Rows of a named LLM's embedding table; of a toy size the default of `data.vocab_size`."""
    return SIZES[name].vocab_size or DataConfig().vocab_size


def served(size: DecoderSize, vocab_size: int, itemsize: int) -> Served:
    """That of a named size.

    Args:
      size: of the decoder.
      vocab_size: rows of its head.
      itemsize: bytes of a weight.
    """
    q_width, kv_width = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    layer = 2 * size.width * (q_width + kv_width) + 3 * size.width * size.mlp_width
    return Served(
        size.num_params(vocab_size),
        size.num_layers * layer,
        size.width * vocab_size,
        size.num_layers * q_width,
        size.num_layers * 2 * kv_width * itemsize,
    )


def answer_flops(llm: Served, asked: Asked) -> float:
    """FLOPs of one answer as `flops.inference_flops` counts them, with the image and the query pass."""
    fed = max(asked.generated - 1, 0)
    layers = _layers(llm, asked.prompt, 0) + _layers(llm, fed, asked.prompt) + _layers(llm, asked.query, 0)
    return layers + 2 * llm.head * asked.generated + asked.image_flops


def roofline_ms(llm: Served, asked: Asked, device: Device, itemsize: int) -> float:
    """Least milliseconds of a batch of answers: of each pass the longer of its products and what it reads.

    No program reaches a device's published rates, so that this is a bound, not a prediction.

    Args:
      llm: the LLM.
      asked: of every answer.
      device: its rates.
      itemsize: bytes of a weight.
    """
    weights = (llm.linear + llm.head) * itemsize
    steps = max(asked.generated - 1, 0)
    products = asked.batch * (_layers(llm, asked.prompt, 0) + 2 * llm.head * min(asked.generated, 1))
    passes = [(products, weights), (asked.batch * asked.image_flops, 0.0)]
    if asked.query:
        passes.append((asked.batch * _layers(llm, asked.query, 0), weights))
    total = sum(max(flops / device.flops, read / device.bandwidth) for flops, read in passes)
    if steps:
        products = asked.batch * (_layers(llm, steps, asked.prompt) / steps + 2 * llm.head)
        read = weights + asked.batch * llm.kv_bytes * (asked.prompt + (steps + 1) / 2)
        total += steps * max(products / device.flops, read / device.bandwidth)
    return 1e3 * total


def _layers(llm: Served, new_tokens: float, context: float) -> float:
    """Forward FLOPs of the layers on `new_tokens` behind `context`; causal attention."""
    seen = context * new_tokens + new_tokens * (new_tokens + 1) / 2
    return 2 * llm.linear * new_tokens + 4 * llm.attention * seen
