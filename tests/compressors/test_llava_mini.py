"""LLaVA-Mini against torch's attention and transformers' Llama layers, packed rows, and what may be read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.pretrained import make_decoder
from vlmscale.compressors import COMPRESSORS, Features, make_compressor
from vlmscale.compressors.features import FusionText
from vlmscale.compressors.llava_mini import QueryCompressor
from vlmscale.compressors.positions import sincos_positions
from vlmscale.models.sizes import DecoderSize

CHANNELS, HEADS, WIDTH, SIDE, LAYERS = 16, 4, 32, 3, 2
SLOTS = 7  # of every row that holds one sample, so that one program serves them all
# That of `make_decoder("llama-grouped-tied")`.
SIZE = DecoderSize(WIDTH, LAYERS, 4, 2, 40, rope_theta=500.0, norm_eps=1e-3)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def build(count: int, **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"decoder_size": SIZE, "fusion_layers": LAYERS, "num_heads": HEADS}
    return make_compressor("llava_mini", count, WIDTH, **(sizes | options))


def single(length: int = SLOTS, unreadable: tuple[int, ...] = (), image: bool = True) -> FusionText:
    """A row of one sample and one image, padded to `SLOTS`."""
    slots = np.arange(SLOTS)
    readable = (slots < length) & ~np.isin(slots, unreadable)
    segments = (slots < length).astype(np.int32)
    rows = (draw(SLOTS, WIDTH, seed=3), readable, segments, np.array([int(image)], np.int32))
    return FusionText(*(jnp.asarray(row)[None] for row in rows))


def as_torch(x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def compress_with_torch(w: Any, x: jax.Array) -> torch.Tensor:
    """The published compressor, out of torch's own parts: [N, P, C] to [N, V, C]."""
    count, width = w["queries"].shape
    grid, side = round(count**0.5), round(x.shape[1] ** 0.5)
    attention = torch.nn.MultiheadAttention(width, HEADS, batch_first=True)
    norms = {name: torch.nn.LayerNorm(width) for name in ("q_norm", "kv_norm")}
    with torch.no_grad():
        parts = [w["attention"][letter] for letter in "qkv"]
        attention.in_proj_weight.copy_(torch.cat([as_torch(part["kernel"]).T for part in parts]))
        attention.in_proj_bias.copy_(torch.cat([as_torch(part["bias"]) for part in parts]))
        attention.out_proj.weight.copy_(as_torch(w["attention"]["o"]["kernel"]).T)
        attention.out_proj.bias.copy_(as_torch(w["attention"]["o"]["bias"]))
        for name, norm in norms.items():
            norm.weight.copy_(as_torch(w[name]["scale"]))
            norm.bias.copy_(as_torch(w[name]["bias"]))
        table = torch.tensor(sincos_positions(grid, width))
        maps = table.reshape(1, grid, grid, width).permute(0, 3, 1, 2)
        large = torch.nn.functional.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
        values = norms["kv_norm"](as_torch(x))
        queries = (norms["q_norm"](as_torch(w["queries"])) + table).expand(len(x), -1, -1)
        return attention(queries, values + large.flatten(2).transpose(1, 2), values)[0]


@pytest.mark.parametrize("count", [1, 4])
def test_compressor_is_the_reference(count: int, random_params: Callable[..., Any]) -> None:
    x = draw(2, SIDE**2, CHANNELS)
    module = QueryCompressor(count, HEADS)
    params = random_params(module, x)
    wanted = compress_with_torch(params["params"], x)
    np.testing.assert_allclose(jax.jit(module.apply)(params, x), wanted, atol=2e-5)


def test_one_query_gives_all_keys_the_same_position(random_params: Callable[..., Any]) -> None:
    """Its token does not know where patches are; four tokens do."""
    x = draw(1, SIDE**2, CHANNELS)
    for count in (1, 4):
        module = QueryCompressor(count, HEADS)
        params = random_params(module, x)
        run = jax.jit(lambda x, p=params, m=module: m.apply(p, x))
        moved = np.abs(run(x) - run(x[:, ::-1])).max()
        assert moved < 1e-5 if count == 1 else moved > 1e-3


def fuse_with_torch(w: Any, x: jax.Array, text: FusionText) -> tuple[np.ndarray, np.ndarray]:
    """Pre-fusion of one sample by transformers' Llama layers: visual tokens [V, D] and text [T, D]."""
    decoder = make_decoder("llama-grouped-tied", num_hidden_layers=LAYERS).model
    decoder.norm = torch.nn.Identity()
    names = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    with torch.no_grad():
        for index, layer in enumerate(decoder.layers):
            for path, parameter in layer.named_parameters():
                (value,) = w[f"fusion_{index}"][names[path.split(".")[-2]]].values()
                parameter.copy_(as_torch(value))

        def project(x: torch.Tensor) -> torch.Tensor:
            up, down = w["projector"]["up"], w["projector"]["down"]
            h = torch.nn.functional.gelu(x @ as_torch(up["kernel"]) + as_torch(up["bias"]))
            return h @ as_torch(down["kernel"]) + as_torch(down["bias"])

        patches, compressed = project(as_torch(x)), project(compress_with_torch(w["compressor"], x))
        readable = as_torch(text.readable)
        visual = torch.ones(1, patches.shape[1] + compressed.shape[1], dtype=torch.bool)
        mask = torch.cat([visual, readable], dim=1).long()
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        raw = as_torch(text.embeddings)
        fused = decoder(
            inputs_embeds=torch.cat([patches, compressed, raw], dim=1),
            attention_mask=mask,
            position_ids=positions,
        ).last_hidden_state
    before, behind = patches.shape[1], visual.shape[1]
    text_out = torch.where(readable[:, :, None], fused[:, behind:], raw)
    return fused[0, before:behind].numpy(), text_out[0].numpy()


@pytest.fixture(scope="module")
def fusing(random_params: Callable[..., Any]) -> Callable[[int], tuple[Any, Any]]:
    """By the count: parameters of a module, and its jitted `fuse`."""

    @functools.cache
    def of(count: int) -> tuple[Any, Any]:
        module = build(count)
        params = random_params(module, Features(draw(1, SIDE**2, CHANNELS)), None)
        return params, jax.jit(lambda p, x, text: module.apply(p, Features(x), text, method="fuse"))

    return of


Fusing = Callable[[int], tuple[Any, Any]]


@pytest.mark.parametrize("count", [1, 4])
def test_fusion_is_the_reference(count: int, fusing: Fusing) -> None:
    x, text = draw(1, SIDE**2, CHANNELS), single(6, unreadable=(1, 3, 4))
    params, run = fusing(count)
    tokens, valid, fused = run(params, x, text)
    wanted_tokens, wanted_text = fuse_with_torch(params["params"], x, text)
    np.testing.assert_allclose(tokens[0], wanted_tokens, atol=2e-5)
    np.testing.assert_allclose(fused[0], wanted_text, atol=2e-5)
    np.testing.assert_array_equal(fused[~text.readable], text.embeddings[~text.readable])
    assert valid.shape == (1, count)
    assert valid.all()


def test_visual_tokens_are_the_same_without_text(fusing: Fusing) -> None:
    """They stand before the text, so a call without any gives them."""
    params, run = fusing(1)
    x = draw(1, SIDE**2, CHANNELS)
    alone, valid = jax.jit(build(1).apply)(params, Features(x), None)
    np.testing.assert_allclose(alone, run(params, x, single())[0], atol=1e-5)
    assert valid.tolist() == [[True]]


def test_packed_samples_do_not_see_each_other(fusing: Fusing) -> None:
    """A row of two samples with an image each, one without and padding, against rows of their own."""
    params, run = fusing(1)
    x = draw(3, SIDE**2, CHANNELS)
    samples = [single(5, unreadable=(1, 4)), single(4), single(3, unreadable=(2,), image=False)]
    own = list(zip(samples, (5, 4, 3), strict=True))
    packed = FusionText(
        jnp.concatenate([*(s.embeddings[:, :n] for s, n in own), draw(1, 2, WIDTH, seed=5)], axis=1),
        jnp.concatenate([*(s.readable[:, :n] for s, n in own), jnp.zeros((1, 2), bool)], axis=1),
        jnp.asarray([[1] * 5 + [2] * 4 + [3] * 3 + [0] * 2], jnp.int32),
        jnp.asarray([[2, 1, 0]], jnp.int32),  # the first image is the second sample's
    )
    tokens, valid, fused = run(params, x, packed)
    assert valid[:, 0].tolist() == [True, True, False]
    assert np.isfinite(tokens).all()
    start = 0
    for (sample, length), image in zip(own, (1, 0, 2), strict=True):  # the last is not there
        wanted, there, alone = run(params, x[image : image + 1], sample)
        np.testing.assert_allclose(fused[:, start : start + length], alone[:, :length], atol=1e-5)
        if there.all():
            np.testing.assert_allclose(tokens[image], wanted[0], atol=1e-5)
        start += length
    # Text that sees no image is changed all the same: the layers run over it alone.
    assert np.abs(alone - samples[2].embeddings)[0, :2].max(axis=-1).min() > 1e-2
    np.testing.assert_array_equal(fused[:, start:], packed.embeddings[:, start:])


def test_batches_of_rows_own_their_images_in_order(fusing: Fusing) -> None:
    params, run = fusing(1)
    x, one = draw(4, SIDE**2, CHANNELS), single()
    text = FusionText(
        *(jnp.concatenate([part, part]) for part in one[:3]), jnp.asarray([[1, 0], [0, 1]], jnp.int32)
    )
    tokens, valid, fused = run(params, x, text)
    assert valid[:, 0].tolist() == [True, False, False, True]
    for row, image in ((0, 0), (1, 3)):
        own, _, alone = run(params, x[image : image + 1], one)
        np.testing.assert_allclose(tokens[image], own[0], atol=1e-5)
        np.testing.assert_allclose(fused[row], alone[0], atol=1e-5)
    assert np.abs(fused[0] - fused[1]).max() > 1e-2


def test_answers_change_no_question_and_no_visual_token(fusing: Fusing) -> None:
    params, run = fusing(1)
    x, text = draw(1, SIDE**2, CHANNELS), single(unreadable=(3, 4))
    other = text._replace(embeddings=text.embeddings.at[:, 3:5].add(1.0))
    before, after = run(params, x, text), run(params, x, other)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[2][text.readable], after[2][text.readable])
    # A question that comes first does change what follows it.
    other = text._replace(embeddings=text.embeddings.at[:, 0].add(1.0))
    assert np.abs(run(params, x, other)[2] - before[2])[0, 5:].max() > 1e-3


def test_gradient_reaches_every_parameter_and_no_embedding(fusing: Fusing) -> None:
    params, run = fusing(1)
    x, text = draw(1, SIDE**2, CHANNELS), single(unreadable=(3,))
    weights = draw(SLOTS, WIDTH, seed=7)

    def loss(params: Any, embeddings: jax.Array) -> jax.Array:
        tokens, _, fused = run(params, x, text._replace(embeddings=embeddings))
        return (tokens * weights[:1]).sum() + (fused * weights).sum()

    grads, into_text = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, text.embeddings)
    assert not np.any(into_text)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # A bias of all keys adds the same to all scores of a query, which a softmax does not see.
        assert (np.abs(leaf).max() > 1e-4) == ("['attention']['k']['bias']" not in name), name


def test_patches_and_tokens_share_one_projector(fusing: Fusing) -> None:
    params, _ = fusing(1)
    assert set(params["params"]) == {"compressor", "projector", "fusion_0", "fusion_1"}
    module = build(1, decoder_size=None)
    x = draw(1, SIDE**2, CHANNELS)
    tokens, valid = jax.jit(module.apply)(params, Features(x), None)
    compressed = compress_with_torch(params["params"]["compressor"], x).numpy()
    up, down = params["params"]["projector"]["up"], params["params"]["projector"]["down"]
    h = jax.nn.gelu(compressed @ up["kernel"] + up["bias"], approximate=False)
    np.testing.assert_allclose(tokens, h @ down["kernel"] + down["bias"], atol=2e-5)
    assert valid.shape == (1, 1)
    with pytest.raises(ValueError, match="decoder_size"):
        module.apply(params, Features(x), single(), method="fuse")


def test_what_does_not_work_is_refused() -> None:
    assert COMPRESSORS["llava_mini"].text == "fusion"
    assert COMPRESSORS["llava_mini"].counts(SIDE) == [1, 4, 9]
    x = draw(1, SIDE**2, CHANNELS)
    for module, said in ((build(2), "2 queries"), (build(1, num_heads=3), "3 heads")):
        with pytest.raises(ValueError, match=said):
            jax.eval_shape(lambda x, m=module: m.init(jax.random.key(0), Features(x), None), x)
