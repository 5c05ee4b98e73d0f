"""The two resamplers against plain references, and what tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import erf

from vlmscale.compressors import COMPRESSORS, Features, check_count, make_compressor, parse_options
from vlmscale.compressors.positions import sincos_positions
from vlmscale.compressors.resampler import qwen_heads
from vlmscale.errors import UserError

CHANNELS, WIDTH, SIDE = 12, 16, 4
Weights = dict[str, Any]


def images(side: int = SIDE, channels: int = CHANNELS) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, side**2, channels)), jnp.float32)


def norm(x: np.ndarray, w: Weights, eps: float) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * w["scale"] + w["bias"]


def linear(x: np.ndarray, w: Weights) -> np.ndarray:
    return x @ w["kernel"] + w.get("bias", 0)


def mix(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    """Attention of one image, a head and a query at a time."""
    out = np.empty(q.shape)
    for head in np.split(np.arange(q.shape[1]), heads):
        for row in range(len(q)):
            scores = k[:, head] @ q[row, head] / np.sqrt(len(head))
            share = np.exp(scores - scores.max())
            out[row, head] = share @ v[:, head] / share.sum()
    return out


def bicubic(table: np.ndarray, side: int) -> np.ndarray:
    grid, width = round(len(table) ** 0.5), table.shape[1]
    maps = torch.tensor(table).reshape(1, grid, grid, width).permute(0, 3, 1, 2)
    out = torch.nn.functional.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
    return out.permute(0, 2, 3, 1).reshape(side**2, width).numpy()


def qwen(w: Weights, x: np.ndarray, heads: int) -> np.ndarray:
    """Qwen-VL's resampler of one image: [P, C] to [V, D]."""
    table = sincos_positions(round(len(w["queries"]) ** 0.5), w["queries"].shape[1])
    if "kv_proj" in w:
        x = linear(x, w["kv_proj"])
    x = norm(x, w["kv_norm"], 1e-6)
    queries = norm(w["queries"], w["q_norm"], 1e-6) + table
    keys = x + bicubic(table, round(len(x) ** 0.5))
    of = w["attention"]
    out = mix(linear(queries, of["q"]), linear(keys, of["k"]), linear(x, of["v"]), heads)
    return norm(linear(out, of["o"]), w["post_norm"], 1e-6) @ w["proj"]["kernel"]


def perceiver(w: Weights, x: np.ndarray, heads: int) -> np.ndarray:
    """Flamingo's resampler of one image: [P, C] to [V, D]."""
    media, latents = linear(x, w["media"]), w["latents"]
    for layer in (w[f"layer_{i}"] for i in range(sum(name.startswith("layer_") for name in w))):
        seen = norm(latents, layer["latent_norm"], 1e-5)
        both = np.concatenate([norm(media, layer["media_norm"], 1e-5), seen])
        out = mix(linear(seen, layer["q"]), linear(both, layer["k"]), linear(both, layer["v"]), heads)
        latents = latents + linear(out, layer["o"])
        h = linear(norm(latents, layer["mlp_norm"], 1e-5), layer["up"])
        latents = latents + linear(h * (1 + erf(h / np.sqrt(2))) / 2, layer["down"])
    return norm(latents, w["final_norm"], 1e-5)


def wide(params: Any) -> Weights:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])


@pytest.mark.parametrize("count, channels, heads", [(4, CHANNELS, 4), (1, WIDTH, 2), (9, CHANNELS, 0)])
def test_qwen_is_the_reference(
    count: int, channels: int, heads: int, random_params: Callable[..., Any]
) -> None:
    x = images(channels=channels)
    module = make_compressor("resampler", count, WIDTH, num_heads=heads)
    params = random_params(module, Features(x), None)
    assert ("kv_proj" in params["params"]) == (channels != WIDTH)
    tokens, valid = jax.jit(module.apply)(params, Features(x), None)
    for row in range(2):
        wanted = qwen(wide(params), np.asarray(x[row], np.float64), heads or 1)
        np.testing.assert_allclose(tokens[row], wanted, atol=2e-5)
    assert valid.shape == (2, count)
    assert valid.all()


@pytest.mark.parametrize("count, depth, heads, head_dim", [(4, 2, 2, 6), (1, 6, 0, 4)])
def test_perceiver_is_the_reference(
    count: int, depth: int, heads: int, head_dim: int, random_params: Callable[..., Any]
) -> None:
    module = make_compressor(
        "resampler", count, WIDTH, {"kind": "perceiver"}, depth=depth, num_heads=heads, head_dim=head_dim
    )
    x = images()
    params = random_params(module, Features(x), None)
    layers = [layer for name, layer in params["params"].items() if name.startswith("layer_")]
    assert len(layers) == depth
    assert all("bias" not in layer[part] for layer in layers for part in ("q", "k", "v", "o", "up", "down"))
    tokens, valid = jax.jit(module.apply)(params, Features(x), None)
    for row in range(2):
        wanted = perceiver(wide(params), np.asarray(x[row], np.float64), heads or 8)
        np.testing.assert_allclose(tokens[row], wanted, atol=2e-5)
    assert valid.shape == (2, count)


def test_published_sizes_are_the_defaults() -> None:
    module = make_compressor("resampler", 64, 32, {"kind": "perceiver"})
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), Features(x), None), images())["params"]
    assert sum(name.startswith("layer_") for name in shapes) == 6
    assert jax.tree.leaves(shapes["layer_5"]["q"])[0].shape == (32, 8 * 64)
    assert jax.tree.leaves(shapes["layer_5"]["up"])[0].shape == (32, 4 * 32)


@pytest.mark.parametrize("kind, sees_places", [("qwen", True), ("perceiver", False)])
def test_qwen_knows_where_a_patch_is_and_perceiver_does_not(
    kind: str, sees_places: bool, random_params: Callable[..., Any]
) -> None:
    x = images()
    module = make_compressor("resampler", 4, WIDTH, {"kind": kind}, depth=1)
    params = random_params(module, Features(x), None)
    run = jax.jit(lambda x: module.apply(params, Features(x), None)[0])
    moved = np.abs(run(x) - run(x[:, ::-1])).max()
    assert moved > 1e-2 if sees_places else moved < 1e-5


@pytest.mark.parametrize("kind", ["qwen", "perceiver"])
def test_gradient_reaches_every_parameter(kind: str, random_params: Callable[..., Any]) -> None:
    x = images()
    module = make_compressor("resampler", 4, WIDTH, {"kind": kind}, depth=2, num_heads=2, head_dim=4)
    params = random_params(module, Features(x), None)
    weights = np.random.default_rng(1).standard_normal((4, WIDTH))
    grads = jax.jit(jax.grad(lambda p: (module.apply(p, Features(x), None)[0] * weights).sum()))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # A bias of all keys adds the same to all scores of a query, which a softmax does not see.
        assert (np.abs(leaf).max() > 1e-4) == ("['attention']['k']['bias']" not in name), name


@pytest.mark.parametrize("width, heads", [(16, 1), (96, 1), (896, 7), (960, 6), (1024, 8), (4096, 32)])
def test_heads_of_qwen_are_128_wide_where_they_can(width: int, heads: int) -> None:
    assert qwen_heads(width) == heads
    assert width % heads == 0


def test_what_does_not_work_is_refused() -> None:
    def shapes(**options: Any) -> Any:
        module = COMPRESSORS["resampler"].build(**({"visual_tokens": 4, "llm_width": WIDTH} | options))
        return jax.eval_shape(lambda x: module.init(jax.random.key(0), Features(x), None), images())

    for options, said in (
        ({"kind": "bert"}, "unknown resampler 'bert'"),
        ({"visual_tokens": 5}, "5 queries"),
        ({"llm_width": 10}, "multiple of 4"),
        ({"num_heads": 3}, "3 heads"),
    ):
        with pytest.raises(ValueError, match=said):
            shapes(**options)
    assert shapes(kind="perceiver", visual_tokens=5)
    assert parse_options("resampler", "kind=perceiver") == {"kind": "perceiver"}
    with pytest.raises(UserError, match="kind=bert"):
        parse_options("resampler", "kind=bert")
    check_count("resampler", 9, SIDE)
    with pytest.raises(UserError, match="gives 1, 4, 9, 16 "):
        check_count("resampler", 5, SIDE)
