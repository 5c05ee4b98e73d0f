"""Analytic FLOPs of a decoder: two per multiply-add of every matrix product, with attention, without norms.

Pure arithmetic on the size tables, no arrays.
"""

from __future__ import annotations

from vlmscale.models.sizes import DecoderSize


def decoder_flops(size: DecoderSize, new_tokens: float, context: float) -> float:
    """Forward FLOPs of `new_tokens` behind `context` tokens, without the head; causal attention."""
    q_width, kv_width = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    per_token = 2 * (2 * size.width * (q_width + kv_width) + 3 * size.width * size.mlp_width)
    seen = context * new_tokens + new_tokens * (new_tokens + 1) / 2
    return size.num_layers * (per_token * new_tokens + 4 * q_width * seen)


def head_flops(size: DecoderSize, vocab_size: int, positions: float) -> float:
    """Logits at so many positions."""
    return 2 * size.width * vocab_size * positions


def inference_flops(size: DecoderSize, vocab_size: int, prompt: float, generated: float) -> float:
    """LLM FLOPs of one answer: prefill of the prompt, then `generated` tokens one at a time.

    The last generated token is not fed back.
    """
    fed_back = max(generated - 1, 0)
    layers = decoder_flops(size, prompt, 0) + decoder_flops(size, fed_back, prompt)
    return layers + head_flops(size, vocab_size, generated)
