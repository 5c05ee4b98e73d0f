"""Analytic FLOPs of a decoder: two per multiply-add of every matrix product, with attention, without norms.

Pure arithmetic on the size tables, no arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmscale.models.sizes import DecoderSize


def decoder_flops(size: DecoderSize, new_tokens: float, context: float, *, causal: bool = True) -> float:
    """Forward FLOPs of `new_tokens` behind `context` tokens, without the head.

    Args:
      size: of the decoder.
      new_tokens: that run.
      context: tokens in the cache.
      causal: counts of the scores those that a token may see alone, the useful half; False all of them, as
        the attention backend "xla" multiplies them.
    """
    return size.num_layers * layer_flops(size, new_tokens, context, causal)


def layer_flops(size: DecoderSize, new_tokens: float, context: float, causal: bool = True) -> float:
    """One layer of `decoder_flops`."""
    return linear_flops(size, new_tokens) + 2 * score_flops(size, new_tokens, context, causal)


def linear_flops(size: DecoderSize, tokens: float) -> float:
    """One layer's seven products with weights."""
    q_width, kv_width = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    return tokens * 2 * (2 * size.width * (q_width + kv_width) + 3 * size.width * size.mlp_width)


def score_flops(size: DecoderSize, new_tokens: float, context: float, causal: bool) -> float:
    """One layer's product of queries and keys; that of probabilities and values costs the same."""
    behind = (new_tokens + 1) / 2 if causal else new_tokens
    return 2 * size.num_heads * size.head_dim * new_tokens * (context + behind)


def head_flops(size: DecoderSize, vocab_size: int, positions: float) -> float:
    """Logits at so many positions."""
    return 2 * size.width * vocab_size * positions


def inference_flops(
    size: DecoderSize, vocab_size: int, prompt: float | Sequence[float], generated: float
) -> float:
    """LLM FLOPs of one answer: prefill of the prompt, then `generated` tokens one at a time.

    The last generated token is not fed back.

    Args:
      size: of the decoder.
      vocab_size: rows of its head.
      prompt: tokens of the prompt; of each layer, where a reducer drops some of them.
      generated: tokens of the answer.
    """
    fed_back = max(generated - 1, 0)
    each = [prompt] * size.num_layers if isinstance(prompt, (int, float)) else prompt
    layers = sum(layer_flops(size, there, 0) + layer_flops(size, fed_back, there) for there in each)
    return layers + head_flops(size, vocab_size, generated)


def decoder_step_flops(
    size: DecoderSize, length: float, remat: str = "none", *, trained: bool = True, causal: bool = True
) -> float:
    """FLOPs of the layers for one row of a training step: forward, backward, and what is computed again.

    A product with a weight has one more for the gradient of its input, and another for the weight's where it
    trains. Both products of attention have two more in any case, since both of their factors are activations.
    Computed again are, under "dots", the scores, and where the output projection trains, its input; under
    "block" everything but the last product, whose result no gradient reads.

    Args:
      size: of the decoder.
      length: positions of the row.
      remat: the policy, from `vlmscale.models.decoder.REMAT`; "none" computes nothing again.
      trained: whether the decoder trains; if not, gradients only pass through it.
      causal: as in `decoder_flops`.
    """
    linear, scores = linear_flops(size, length), score_flops(size, length, 0, causal)
    last = 2 * length * size.mlp_width * size.width
    again = {"none": 0.0, "dots": (1 + trained) * scores, "block": linear - last + 2 * scores}
    return size.num_layers * ((2 + trained) * linear + 6 * scores + again[remat])


def head_step_flops(size: DecoderSize, vocab_size: int, positions: float, *, trained: bool = True) -> float:
    """FLOPs of the loss: logits, the gradient of the hidden states, and of the table where it trains.

    Logits are not computed again (`vlmscale.train.loss`).
    """
    return (2 + trained) * head_flops(size, vocab_size, positions)
