"""The decoder against transformers' Llama, packed and padded rows against plain ones, the KV cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmscale.evaluate.generation import make_generate
from vlmscale.models.decoder import Decoder, DecoderSize, RMSNorm, empty_cache
from vlmscale.models.vlm import VLM

VOCAB = 61
# Neither theta nor eps is a default of either side, so that a forgotten one shows.
COMMON = {"width": 32, "num_layers": 3, "mlp_width": 40, "rope_theta": 500.0, "norm_eps": 1e-3}
GROUPED = DecoderSize(num_heads=4, num_kv_heads=2, **COMMON)
PLAIN = DecoderSize(num_heads=4, num_kv_heads=4, **COMMON)


def llama(size: DecoderSize) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        rms_norm_eps=size.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name else 0.0
            parameter.normal_(around, 0.2 if "norm" in name else 0.15)
    return model


def params_of(model: LlamaForCausalLM) -> dict[str, Any]:
    """The torch weights as ours: kernels transposed, layers stacked for the scan."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    count = model.config.num_hidden_layers

    def stack(name: str) -> np.ndarray:
        return np.stack([state[f"model.layers.{i}.{name}.weight"].T for i in range(count)])

    theirs = {letter: f"self_attn.{letter}_proj" for letter in "qkvo"}
    theirs |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    layers: dict[str, Any] = {ours: {"kernel": stack(name)} for ours, name in theirs.items()}
    layers["attention_norm"] = {"scale": stack("input_layernorm")}
    layers["mlp_norm"] = {"scale": stack("post_attention_layernorm")}
    final_norm = {"scale": state["model.norm.weight"]}
    params = {"embedding": state["model.embed_tokens.weight"], "layers": layers, "final_norm": final_norm}
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def forward(size: DecoderSize) -> Any:
    """Tokens to final hidden states and logits, compiled once a shape."""
    decoder = Decoder(size, VOCAB)

    def run(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> tuple[jax.Array, jax.Array]:
        embeddings = decoder.apply({"params": params}, tokens, method="embed")
        hidden = decoder.apply({"params": params}, embeddings, positions, segment_ids)
        return hidden, decoder.apply({"params": params}, hidden, method="logits")

    return jax.jit(run)


def theirs(model: LlamaForCausalLM, tokens: np.ndarray, positions: np.ndarray) -> tuple[Any, Any]:
    """Final hidden states and logits; a mask of ones, or transformers would guess packing by itself."""
    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
        )
    return out.hidden_states[-1].numpy(), out.logits.numpy()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, (3, 11))


# A constant shift changes no rotary attention, so uneven positions are what tells right from wrong.
POSITIONS = {
    "plain": np.broadcast_to(np.arange(11), (3, 11)),
    "shifted": np.broadcast_to(np.arange(11) + 90, (3, 11)),
    "uneven": np.cumsum(np.random.default_rng(1).integers(1, 9, (3, 11)), axis=1),
}


@pytest.mark.parametrize("size", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_hidden_states_and_logits_are_those_of_llama(size: DecoderSize, tokens: np.ndarray) -> None:
    model = llama(size)
    params = params_of(model)
    for positions in POSITIONS.values():
        hidden, logits = theirs(model, tokens, positions)
        ours, our_logits = forward(size)(params, tokens, positions, np.ones_like(tokens))
        np.testing.assert_allclose(ours, hidden, atol=1e-5, rtol=0)
        np.testing.assert_allclose(our_logits, logits, atol=1e-4, rtol=0)


def test_uneven_positions_matter(tokens: np.ndarray) -> None:
    params = params_of(llama(GROUPED))
    plain, shifted, uneven = (
        np.asarray(forward(GROUPED)(params, tokens, positions, np.ones_like(tokens))[0])
        for positions in POSITIONS.values()
    )
    np.testing.assert_allclose(shifted, plain, atol=2e-5)
    assert np.abs(uneven - plain).max() > 1e-2


def test_packed_segments_are_separate_rows(tokens: np.ndarray) -> None:
    model = llama(GROUPED)
    lengths = (4, 2, 3)  # and two places of padding
    segment_ids, positions = np.zeros((1, 11), int), np.zeros((1, 11), int)
    packed, start = np.zeros((1, 11), int), 0
    for number, length in enumerate(lengths):
        place = slice(start, start + length)
        segment_ids[0, place], positions[0, place] = number + 1, np.arange(length)
        packed[0, place] = tokens[number, :length]
        start += length
    # In a batch as large as the other tests', so that nothing is compiled anew.
    rows = (np.repeat(x, 3, 0) for x in (packed, positions, segment_ids))
    ours, _ = forward(GROUPED)(params_of(model), *rows)
    ours = np.asarray(ours)
    assert np.isfinite(ours).all()
    start = 0
    for number, length in enumerate(lengths):
        alone, _ = theirs(model, tokens[number : number + 1, :length], np.arange(length)[None])
        np.testing.assert_allclose(ours[0, start : start + length], alone[0], atol=1e-5, rtol=0)
        start += length


def test_cache_gives_the_full_forward_for_mixed_lengths(tokens: np.ndarray) -> None:
    """Right-padded prompts of 5, 2 and 7 tokens, then a chunk of three and two single tokens a row."""
    model = llama(GROUPED)
    params = params_of(model)
    decoder = Decoder(GROUPED, VOCAB)
    lengths, width = np.array([5, 2, 7]), 8
    everything = np.random.default_rng(2).integers(1, VOCAB, (3, 12))

    @jax.jit
    def extend(chunk: Any, positions: Any, valid: Any, cache: Any, slot: Any) -> Any:
        embeddings = decoder.apply({"params": params}, chunk, method="embed")
        return decoder.apply({"params": params}, embeddings, positions, valid, cache, slot, method="extend")

    def take(start: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        places = start[:, None] + np.arange(count)
        return np.take_along_axis(everything, places, 1), places

    valid = np.arange(width) < lengths[:, None]
    prompts = np.where(valid, everything[:, :width], 7)
    positions = np.broadcast_to(np.arange(width), (3, width))
    hidden, cache = extend(prompts, positions, valid, empty_cache(GROUPED, 3, width + 5), jnp.int32(0))
    parts = [np.asarray(hidden)]
    done, slot = lengths.copy(), width
    for count in (3, 1, 1):
        chunk, places = take(done, count)
        hidden, cache = extend(chunk, places, np.ones((3, count), bool), cache, jnp.int32(slot))
        parts.append(np.asarray(hidden))
        done, slot = done + count, slot + count
    for row, length in enumerate(lengths):
        total = length + 5
        whole, _ = theirs(model, everything[row : row + 1, :total], np.arange(total)[None])
        ours = np.concatenate([parts[0][row, :length], *(part[row] for part in parts[1:])])
        np.testing.assert_allclose(ours, whole[0], atol=1e-5, rtol=0)


def test_greedy_generation_is_that_of_transformers() -> None:
    """Mixed prompt lengths, and an end token that one row says early: tokens are the same ones."""
    model = llama(GROUPED)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, VOCAB, length) for length in (3, 9, 1, 6)]
    longest, new = 9, 12

    def reference(end: int | None) -> np.ndarray:
        left, mask = np.zeros((4, longest), int), np.zeros((4, longest), int)
        for row, prompt in enumerate(prompts):
            left[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        out = model.generate(
            torch.tensor(left),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=end,
            pad_token_id=0 if end is None else end,
        )[:, longest:].numpy()
        return np.pad(out, ((0, 0), (0, new - out.shape[1])), constant_values=end or 0)

    free = reference(None)
    assert len(np.unique(free)) > 12, "the model repeats itself, so the test would show little"
    end = int(free[1, 4])
    ended = (free == end).any(1)
    assert ended.any()
    assert not ended.all()
    batch = {
        "tokens": np.zeros((4, longest), np.int32),
        "image_slots": np.zeros((4, longest), bool),
        "valid": np.zeros((4, longest), bool),
    }
    for row, prompt in enumerate(prompts):
        batch["tokens"][row, : len(prompt)] = prompt
        batch["valid"][row, : len(prompt)] = True
    vlm = VLM(GROUPED, VOCAB, "pool", 0)
    answers = make_generate(vlm, new, end)({"decoder": params_of(model)}, batch)
    np.testing.assert_array_equal(answers, reference(end))


def test_bfloat16_keeps_logits_and_angles_in_float32(tokens: np.ndarray) -> None:
    params = params_of(llama(GROUPED))
    decoder, ones = Decoder(GROUPED, VOCAB, jnp.bfloat16), np.ones_like(tokens)
    far = POSITIONS["uneven"] + 1000  # bfloat16 cannot tell such positions apart

    @jax.jit
    def run(tokens: Any) -> tuple[jax.Array, jax.Array]:
        embeddings = decoder.apply({"params": params}, tokens, method="embed")
        hidden = decoder.apply({"params": params}, embeddings, far, ones)
        return hidden, decoder.apply({"params": params}, hidden, method="logits")

    hidden, logits = run(tokens)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact, _ = forward(GROUPED)(params, tokens, far, ones)
    assert np.abs(np.asarray(hidden, np.float32) - np.asarray(exact)).mean() < 0.02


def test_norm_is_float32_inside() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 64)).astype(jnp.bfloat16)
    scale = np.linspace(0.9, 1.1, 64, dtype=np.float32)
    ours = RMSNorm(1e-3).apply({"params": {"scale": scale}}, jnp.asarray(x))
    wide = x.astype(np.float32)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * scale
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(ours), wanted.astype(jnp.bfloat16))
