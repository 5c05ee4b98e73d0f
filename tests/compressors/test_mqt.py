"""MQT against a plain reference, its static attention and its nested tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import golden
from vlmscale.compressors import COMPRESSORS, Features, make_compressor
from vlmscale.compressors.positions import sincos_positions

CHANNELS, HEADS, WIDTH = 16, 4, 12
Weights = dict[str, np.ndarray]


def torch_weights(rng: np.random.Generator, grid: int) -> Weights:
    """Random parameters under the names and in the layouts of the published module."""
    c = CHANNELS
    shapes = {
        "query": (grid**2, c),
        "proj": (c, WIDTH),
        "attn.in_proj_weight": (3 * c, c),
        "attn.in_proj_bias": (3 * c,),
        "attn.out_proj.weight": (c, c),
        "attn.out_proj.bias": (c,),
    }
    for letter in "qkv":
        shapes |= {f"ln_{letter}.weight": (c,), f"ln_{letter}.bias": (c,)}
    drawn = {name: (rng.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {"pos_embed": sincos_positions(grid, c).astype(np.float16).astype(np.float32)}


def reference(w: Weights, x: np.ndarray, count: int, image_keys: bool = False) -> np.ndarray:
    """MQT of one image: [P, C] to [m, D]."""

    def norm(x: np.ndarray, letter: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"ln_{letter}.weight"] + w[f"ln_{letter}.bias"]

    grid, side = round(len(w["pos_embed"]) ** 0.5), round(len(x) ** 0.5)
    maps = torch.tensor(w["pos_embed"]).reshape(1, grid, grid, CHANNELS).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
    keys = large.permute(0, 2, 3, 1).reshape(side**2, CHANNELS).numpy()
    inputs = {
        "q": norm(w["query"][:count] + w["pos_embed"][:count], "q"),
        "k": norm(x, "k") + keys if image_keys else norm(keys, "k"),
        "v": norm(x, "v"),
    }
    packed = zip(np.split(w["attn.in_proj_weight"], 3), np.split(w["attn.in_proj_bias"], 3), strict=True)
    q, k, v = (inputs[letter] @ weight.T + bias for letter, (weight, bias) in zip("qkv", packed, strict=True))
    out = np.empty(q.shape)
    for head in np.split(np.arange(CHANNELS), HEADS):
        for row in range(count):
            scores = k[:, head] @ q[row, head] / np.sqrt(len(head))
            share = np.exp(scores - scores.max())
            out[row, head] = share @ v[:, head] / share.sum()
    return (out @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]) @ w["proj"]


def case(grid: int, count: int, side: int) -> Weights:
    """A golden file's arrays, the output from the reference above."""
    rng = np.random.default_rng(0)
    weights = torch_weights(rng, grid)
    x = rng.standard_normal((2, side**2, CHANNELS)).astype(np.float32)
    return {f"param.{name}": value for name, value in weights.items()} | {
        "features": x,
        "output": np.stack([reference(weights, image, count) for image in x]).astype(np.float32),
        "meta": np.array([grid, WIDTH, CHANNELS, HEADS, count]),
    }


@pytest.mark.parametrize("grid, count, side", [(3, 5, 5), (3, 9, 3), (1, 1, 4), (5, 2, 4)])
def test_golden_files_pass_for_any_grid_and_count(
    grid: int, count: int, side: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "mqt_x.npz", **case(grid, count, side))
    assert golden.main([str(tmp_path / "mqt_x.npz")]) == 0
    assert float(capsys.readouterr().out.removeprefix("mqt_x max_abs_err=")) <= 2e-5


def test_golden_files_fail_where_anything_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = case(3, 5, 4)
    for name, key in (("a", "param.query"), ("b", "param.ln_k.weight"), ("c", "param.pos_embed")):
        np.savez(tmp_path / f"mqt_{name}.npz", **(right | {key: right[key][::-1]}))
        assert golden.main([str(tmp_path / f"mqt_{name}.npz")]) == 1, key
    assert "other positions" in capsys.readouterr().err


def build(count: int, largest: int, keys: str) -> Any:
    return make_compressor("mqt", count, WIDTH, {"keys": keys}, largest=largest, num_heads=HEADS)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, CHANNELS)), jnp.float32)


@pytest.mark.parametrize("keys", ["position", "image"])
def test_keys_are_positions_or_the_image_too(
    keys: str, images: jax.Array, random_params: Callable[..., Any]
) -> None:
    weights = torch_weights(np.random.default_rng(0), 3)
    arrays = {f"param.{name}": value for name, value in weights.items()}
    params = {
        "queries": weights["query"],
        "attention": golden.attention(arrays, "attn"),
        "proj": {"kernel": weights["proj"]},
        **{f"{letter}_norm": golden.norm(arrays, f"ln_{letter}") for letter in "qkv"},
    }
    module = build(5, 9, keys)
    drawn = random_params(module, Features(images), None)["params"]
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, params)
    tokens, valid = jax.jit(module.apply)({"params": params}, Features(images), None)
    for row in range(2):
        wanted = reference(weights, np.asarray(images[row]), 5, image_keys=keys == "image")
        np.testing.assert_allclose(tokens[row], wanted, atol=2e-5)
    assert valid.shape == (2, 5)
    assert valid.all()


@pytest.mark.parametrize("keys", ["position", "image"])
def test_released_attention_does_not_depend_on_the_image(
    keys: str, images: jax.Array, random_params: Callable[..., Any]
) -> None:
    """With weights that stay the same, what two patches change together is the sum of what each changes."""
    module = build(4, 4, keys)
    params = random_params(module, Features(images), None)
    run = jax.jit(lambda x: module.apply(params, Features(x[None]), None)[0][0])
    plain, other = images
    one, two = plain.at[3].set(other[3]), plain.at[9].set(other[9])
    both = one.at[9].set(other[9])
    excess = np.abs(run(both) - run(one) - run(two) + run(plain)).max()
    assert np.abs(run(one) - run(plain)).max() > 1e-2
    assert excess < 1e-5 if keys == "position" else excess > 1e-4


@pytest.mark.parametrize("keys", ["position", "image"])
def test_fewer_tokens_are_the_first_of_more(
    keys: str, images: jax.Array, random_params: Callable[..., Any]
) -> None:
    params = random_params(build(9, 9, keys), Features(images), None)
    every, *fewer = (jax.jit(build(m, 9, keys).apply)(params, Features(images), None)[0] for m in (9, 1, 4))
    for count, tokens in zip((1, 4), fewer, strict=True):
        np.testing.assert_allclose(tokens, every[:, :count], atol=1e-6)


@pytest.mark.parametrize("keys", ["position", "image"])
def test_gradient_reaches_every_parameter(
    keys: str, images: jax.Array, random_params: Callable[..., Any]
) -> None:
    module = build(4, 4, keys)
    params = random_params(module, Features(images), None)
    weights = np.random.default_rng(1).standard_normal((4, WIDTH))
    grads = jax.jit(jax.grad(lambda p: (module.apply(p, Features(images), None)[0] * weights).sum()))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # What shifts all keys alike adds the same to all scores of a query, which a softmax does not see.
        blind = name.endswith(("['attention']['k']['bias']", "['k_norm']['bias']"))
        assert (np.abs(leaf).max() > 1e-4) != blind, name


@pytest.mark.parametrize(
    "largest, counts", [(1, (1,)), (4, (2, 4)), (9, (2, 4, 6, 8, 9)), (256, tuple(range(2, 257, 2)))]
)
def test_counts_that_are_trained_end_with_all_queries(largest: int, counts: tuple[int, ...]) -> None:
    method = COMPRESSORS["mqt"]
    assert method.nested is not None
    assert method.nested(largest) == counts
    assert not method.trains_all


def test_what_does_not_work_is_refused(images: jax.Array) -> None:
    for options, said in (
        ({"largest": 8}, "8 queries"),
        ({"largest": 4, "visual_tokens": 5}, "use 1 to 4"),
        ({"visual_tokens": 0, "largest": 4}, "use 1 to 4"),
        ({"keys": "text"}, "unknown keys 'text'"),
        ({"num_heads": 3}, "3 heads"),
    ):
        module = COMPRESSORS["mqt"].build(**({"visual_tokens": 4, "llm_width": WIDTH} | options))
        with pytest.raises(ValueError, match=said):
            jax.eval_shape(lambda x, m=module: m.init(jax.random.key(0), Features(x), None), images)
