"""The decoders against transformers' Llama, Qwen2 and Qwen3, read from directories it saved."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.pretrained import DECODERS, VOCAB, load_decoder, make_decoder
from vlmscale.evaluate.generation import make_generate, pad_prompts
from vlmscale.layers import RMSNorm
from vlmscale.models.decoder import Decoder, stack, unstack
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM

GROUPED = "llama-grouped-tied"
Loaded = tuple[torch.nn.Module, DecoderSize, dict[str, Any]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each tiny decoder once: theirs, our size, our parameters in the "scan" layout."""

    @functools.cache
    def of(name: str) -> Loaded:
        model = make_decoder(name)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        size, params, report = load_decoder(directory)
        assert not report.initialised
        return model, size, params

    return of


@functools.cache
def forward(size: DecoderSize) -> Any:
    """Tokens to hidden states of every layer and logits, compiled once a shape."""
    decoder = Decoder(size, VOCAB, layout="loop")

    def run(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> tuple[list[jax.Array], jax.Array]:
        apply = functools.partial(decoder.apply, {"params": params})
        embeddings = apply(tokens, method="embed")
        states = apply(embeddings, positions, segment_ids, method="hidden_states")
        return states, apply(states[-1], method="logits")

    return jax.jit(run)


def theirs(model: Any, tokens: np.ndarray, positions: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Hidden states and logits; a mask of ones, or transformers would guess packing by itself."""
    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
        )
    return [state.numpy() for state in out.hidden_states], out.logits.numpy()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, (3, 11))


# A constant shift changes no rotary attention, so uneven positions are what tells right from wrong.
POSITIONS = {
    "plain": np.broadcast_to(np.arange(11), (3, 11)),
    "shifted": np.broadcast_to(np.arange(11) + 90, (3, 11)),
    "uneven": np.cumsum(np.random.default_rng(1).integers(1, 9, (3, 11)), axis=1),
}


@pytest.mark.parametrize("name", DECODERS)
def test_hidden_states_and_logits_are_theirs(name: str, loaded: Any, tokens: np.ndarray) -> None:
    model, size, params = loaded(name)
    for positions in POSITIONS.values():
        wanted, logits = theirs(model, tokens, positions)
        ours, our_logits = forward(size)(unstack(params), tokens, positions, np.ones_like(tokens))
        assert len(ours) == len(wanted)
        for layer, state in enumerate(wanted):
            np.testing.assert_allclose(ours[layer], state, atol=1e-5, rtol=0, err_msg=str(layer))
        np.testing.assert_allclose(our_logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_scan_and_loop_are_the_same_model(remat: str, loaded: Any, tokens: np.ndarray) -> None:
    """Values and gradients, under every remat policy; and the layouts lead to each other."""
    _, size, params = loaded("qwen3-grouped-untied")
    again = stack(unstack(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, params))

    def loss(params: Any, layout: str) -> jax.Array:
        decoder = Decoder(size, VOCAB, layout=layout, remat=remat)
        embeddings = decoder.apply({"params": params}, tokens, method="embed")
        hidden = decoder.apply({"params": params}, embeddings, POSITIONS["uneven"], np.ones_like(tokens))
        return (decoder.apply({"params": params}, hidden, method="logits") ** 2).mean()

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, "scan")
    other, other_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(unstack(params), "loop")
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), unstack(grads), other_grads)


def test_uneven_positions_matter(loaded: Any, tokens: np.ndarray) -> None:
    _, size, params = loaded(GROUPED)
    plain, shifted, uneven = (
        np.asarray(forward(size)(unstack(params), tokens, positions, np.ones_like(tokens))[0][-1])
        for positions in POSITIONS.values()
    )
    np.testing.assert_allclose(shifted, plain, atol=2e-5)
    assert np.abs(uneven - plain).max() > 1e-2


@pytest.mark.parametrize("name", [GROUPED, "qwen2-grouped-untied", "qwen3-grouped-tied"])
def test_packed_segments_are_separate_rows(name: str, loaded: Any, tokens: np.ndarray) -> None:
    model, size, params = loaded(name)
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
    states, logits = forward(size)(unstack(params), *rows)
    ours = np.asarray(states[-1])
    assert np.isfinite(ours).all()
    start = 0
    for number, length in enumerate(lengths):
        alone, their_logits = theirs(model, tokens[number : number + 1, :length], np.arange(length)[None])
        place = slice(start, start + length)
        np.testing.assert_allclose(ours[0, place], alone[-1][0], atol=1e-5, rtol=0)
        np.testing.assert_allclose(logits[0, place], their_logits[0], atol=1e-4, rtol=0)
        start += length


@pytest.mark.parametrize("name", [GROUPED, "qwen3-grouped-untied"])
def test_cache_gives_the_full_forward_for_mixed_lengths(name: str, loaded: Any) -> None:
    """Right-padded prompts of 5, 2 and 7 tokens, then a chunk of three and two single tokens a row."""
    model, size, stacked = loaded(name)
    params = unstack(stacked)
    decoder = Decoder(size, VOCAB, layout="loop")
    lengths, width = np.array([5, 2, 7]), 8
    everything = np.random.default_rng(2).integers(1, VOCAB, (3, 12))

    @jax.jit
    def prefill(chunk: Any, positions: Any, valid: Any) -> Any:
        embeddings = decoder.apply({"params": params}, chunk, method="embed")
        return decoder.apply({"params": params}, embeddings, positions, valid, width + 5, method="prefill")

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
    hidden, cache = prefill(prompts, positions, valid)
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
        np.testing.assert_allclose(ours, whole[-1][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_is_that_of_transformers(name: str, loaded: Any) -> None:
    """64 tokens on 20 prompts of mixed lengths in one batch; one row's token is made the stop token."""
    model, size, params = loaded(name)
    rng = np.random.default_rng(3)
    lengths = [1, 2, 40, *rng.integers(3, 40, 17)]
    prompts = [rng.integers(1, VOCAB, length) for length in lengths]
    rows, longest, new = len(prompts), max(lengths), 64

    def reference(end: int | None) -> np.ndarray:
        left, mask = np.zeros((rows, longest), int), np.zeros((rows, longest), int)
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

    batch = pad_prompts([prompt.tolist() for prompt in prompts], -1, 0, longest)
    vlm = VLM(size, VOCAB, "pool", 0, layout="loop")
    ours = {"decoder": unstack(params)}
    free = reference(None)
    assert len(np.unique(free)) > 8, "the model repeats itself, so the test would show little"
    np.testing.assert_array_equal(make_generate(vlm, new, ())(ours, batch), free)
    end = int(free[1, 4])
    ended = (free == end).any(1)
    assert ended.any()
    assert not (free[:, 0] == end).all()
    np.testing.assert_array_equal(make_generate(vlm, new, (end, VOCAB + 5))(ours, batch), reference(end))


def test_bfloat16_keeps_logits_and_angles_in_float32(loaded: Any, tokens: np.ndarray) -> None:
    _, size, params = loaded(GROUPED)
    decoder, ones = Decoder(size, VOCAB, jnp.bfloat16), np.ones_like(tokens)
    far = POSITIONS["uneven"] + 1000  # bfloat16 cannot tell such positions apart

    @jax.jit
    def run(tokens: Any) -> tuple[jax.Array, jax.Array]:
        embeddings = decoder.apply({"params": params}, tokens, method="embed")
        hidden = decoder.apply({"params": params}, embeddings, far, ones)
        return hidden, decoder.apply({"params": params}, hidden, method="logits")

    hidden, logits = run(tokens)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact, _ = forward(size)(unstack(params), tokens, far, ones)
    assert np.abs(np.asarray(hidden, np.float32) - np.asarray(exact[-1])).mean() < 0.02


def test_norm_is_float32_inside() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 64)).astype(jnp.bfloat16)
    scale = np.linspace(0.9, 1.1, 64, dtype=np.float32)
    ours = RMSNorm(1e-3).apply({"params": {"scale": scale}}, jnp.asarray(x))
    wide = x.astype(np.float32)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * scale
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(ours), wanted.astype(jnp.bfloat16))


def test_unknown_layouts_are_refused(tmp_path: Path) -> None:
    size = DecoderSize(width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=8)
    with pytest.raises(ValueError, match="layout stacked: one of scan, loop"):
        Decoder(size, 11, layout="stacked").init(jax.random.key(0), jnp.zeros((1, 2), int), method="embed")
