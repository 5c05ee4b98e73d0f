"""Analytic FLOPs: two per multiply-add of every matrix product, attention included; norms are not counted.

Pure arithmetic on the size tables, no arrays.
"""

from __future__ import annotations

from vlmscale.models.sizes import DecoderSize, TowerSize


def decoder_flops(size: DecoderSize, new_tokens: float, context: float) -> float:
    """Forward FLOPs of `new_tokens` behind `context` tokens, without the head; causal attention."""
    q_width, kv_width = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    per_token = 2 * (2 * size.width * (q_width + kv_width) + 3 * size.width * size.mlp_width)
    seen = context * new_tokens + new_tokens * (new_tokens + 1) / 2
    return size.num_layers * (per_token * new_tokens + 4 * q_width * seen)


def head_flops(size: DecoderSize, vocab_size: int, positions: float) -> float:
    """Logits at so many positions."""
    return 2 * size.width * vocab_size * positions


def tower_flops(size: TowerSize) -> int:
    """Forward FLOPs of one image, up to the last layer that anything reads."""
    tokens, width = size.num_patches + size.class_tokens, size.width
    block = tokens * (8 * width**2 + 4 * width * size.mlp_width) + 4 * tokens**2 * width
    blocks = max(size.select_layer, *size.levels)
    return blocks * block + 2 * size.num_patches * size.patch_size**2 * 3 * width


def compressor_flops(name: str, visual_tokens: int, tower: TowerSize, llm_width: int) -> int:
    """Forward FLOPs of one image."""
    if visual_tokens == 0:
        return 0
    width = tower.width
    if name in ("mlp", "pool"):
        return 2 * visual_tokens * (width * llm_width + llm_width**2)
    if name == "tokenpacker":
        patches, levels = tower.num_patches, len(tower.levels)
        keys_values = 2 * 2 * patches * (levels * width * width + width * width)
        attention = 2 * 2 * patches * width**2 + 4 * patches * width
        queries = 2 * visual_tokens * 3 * width**2
        return keys_values + attention + queries + 2 * visual_tokens * (width * llm_width + llm_width**2)
    raise KeyError(name)


def inference_flops(size: DecoderSize, vocab_size: int, prompt: float, generated: float) -> float:
    """LLM FLOPs of one answer: prefill of the prompt, then `generated` tokens one at a time.

    The last generated token is not fed back.
    """
    fed_back = max(generated - 1, 0)
    layers = decoder_flops(size, prompt, 0) + decoder_flops(size, fed_back, prompt)
    return layers + head_flops(size, vocab_size, generated)


def training_flops(
    size: DecoderSize, vocab_size: int, tokens: float, targets: float, compressor: float
) -> float:
    """FLOPs of one sample: forward and twice that backward for LLM and compressor; the tower is frozen."""
    return 3 * (decoder_flops(size, tokens, 0) + head_flops(size, vocab_size, targets) + compressor)
