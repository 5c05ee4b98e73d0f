"""TokenPacker against a plain reference, its bilinear rule against torch, and its locality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import erf

from tests import golden
from vlmscale.compressors import Features, make_compressor
from vlmscale.compressors.tokenpacker import downsample_bilinear

Weights = dict[str, np.ndarray]
CHANNELS, LEVELS, HEADS, WIDTH = 8, 2, 2, 12


def torch_weights(rng: np.random.Generator) -> Weights:
    """Random parameters under the names and in the layouts of the published module."""
    c = CHANNELS
    shapes = {
        "q_proj_1.weight": (c, c),
        "clip_attn.in_proj_weight": (3 * c, c),
        "clip_attn.in_proj_bias": (3 * c,),
    }
    for name, out, into in (
        ("k_proj_1.0", c, LEVELS * c),
        ("k_proj_1.2", c, c),
        ("v_proj_1.0", c, LEVELS * c),
        ("v_proj_1.2", c, c),
        ("clip_attn.out_proj", c, c),
        ("mlp.0", WIDTH, c),
        ("mlp.2", WIDTH, WIDTH),
    ):
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    for letter in "qkv":
        shapes |= {f"ln_{letter}_1.weight": (c,), f"ln_{letter}_1.bias": (c,)}
    drawn = {name: rng.standard_normal(shape) * 0.4 for name, shape in shapes.items()}
    # What a norm reads is small, so that the norm's epsilon shows.
    small = ("q_proj_1.", "k_proj_1.2.", "v_proj_1.2.")
    return {n: (x * (0.02 if n.startswith(small) else 1)).astype(np.float32) for n, x in drawn.items()}


def reference(w: Weights, selected: np.ndarray, levels: np.ndarray, scale: int, heads: int) -> np.ndarray:
    """TokenPacker of one image, one region at a time: [P, C] and [P, L * C] to [V, D]."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    k, v = (norm(linear(gelu(linear(levels, f"{n}_proj_1.0")), f"{n}_proj_1.2"), f"ln_{n}_1") for n in "kv")
    side, width = round(len(selected) ** 0.5), selected.shape[1]
    w_q, w_k, w_v = np.split(w["clip_attn.in_proj_weight"], 3)
    b_q, b_k, b_v = np.split(w["clip_attn.in_proj_bias"], 3)
    maps, tokens = selected.reshape(side, side, width), []
    for top in range(0, side, scale):
        for left in range(0, side, scale):
            window = maps[top : top + scale, left : left + scale]
            middle = slice((scale - 1) // 2, scale // 2 + 1)  # one pixel if odd, four if even
            q = norm(linear(window[middle, middle].mean((0, 1)), "q_proj_1"), "ln_q_1") @ w_q.T + b_q
            inside = [r * side + c for r in range(top, top + scale) for c in range(left, left + scale)]
            keys, values = k[inside] @ w_k.T + b_k, v[inside] @ w_v.T + b_v
            out = []
            for head in np.split(np.arange(width), heads):
                scores = keys[:, head] @ q[head] / np.sqrt(len(head))
                share = np.exp(scores - scores.max())
                out.append(share @ values[:, head] / share.sum())
            tokens.append(linear(np.concatenate(out), "clip_attn.out_proj"))
    return linear(gelu(linear(np.stack(tokens), "mlp.0")), "mlp.2")


def case(side: int, scale: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A golden file's arrays, the output from the reference above."""
    rng = np.random.default_rng(seed)
    weights = torch_weights(rng)
    selected = rng.standard_normal((2, side**2, CHANNELS)).astype(np.float32)
    levels = rng.standard_normal((2, side**2, LEVELS * CHANNELS)).astype(np.float32)
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    output = [reference(wide, *pair, scale, HEADS) for pair in zip(selected, levels, strict=True)]
    return {f"param.{name}": value for name, value in weights.items()} | {
        "features": selected,
        "features_multi": levels,
        "output": np.stack(output).astype(np.float32),
        "meta": np.array([side, scale, CHANNELS, HEADS, WIDTH]),
    }


@pytest.mark.parametrize("side, scale", [(4, 2), (6, 3), (8, 4), (6, 6), (3, 1)])
def test_golden_files_pass_for_any_grid_and_scale(
    side: int, scale: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenpacker_x.npz"
    np.savez(path, **case(side, scale))
    assert golden.main([str(path)]) == 0
    name, error = capsys.readouterr().out.strip().split(" max_abs_err=")
    assert name == "tokenpacker_x"
    assert float(error) <= 2e-5


def test_golden_files_fail_where_anything_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = case(4, 2)
    wrong = {
        "output": right | {"output": right["output"] + np.float32(1e-4)},
        "nan": right | {"output": right["output"] * np.nan},
        "heads": right | {"meta": np.array([4, 2, CHANNELS, 4, WIDTH])},
        "shape": right | {"output": right["output"][:, :1]},
        "grid": right | {"meta": np.array([8, 2, CHANNELS, HEADS, WIDTH])},
        "key": {name: value for name, value in right.items() if name != "param.mlp.2.bias"},
    }
    for name, arrays in wrong.items():
        path = tmp_path / f"tokenpacker_{name}.npz"
        np.savez(path, **arrays)
        assert golden.main([str(path)]) == 1, name
    said = capsys.readouterr()
    assert said.out.count("max_abs_err=") == 3
    assert len(said.err.splitlines()) == 3
    good = tmp_path / "tokenpacker_good.npz"
    np.savez(good, **right)
    assert golden.main([str(tmp_path / "tokenpacker_key.npz"), str(good)]) == 1
    assert capsys.readouterr().out.startswith("tokenpacker_good max_abs_err=")


def test_golden_files_of_unknown_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "other_a.npz", **case(4, 2))
    assert golden.main([str(tmp_path / "other_a.npz")]) == 1
    known = ", ".join(golden.KINDS)
    assert capsys.readouterr().err == f"other_a.npz: of no known kind (known: {known})\n"
    (tmp_path / "tokenpacker_text.npz").write_text("text")
    for name in ("tokenpacker_text.npz", "tokenpacker_absent.npz"):
        assert golden.main([str(tmp_path / name)]) == 1
        assert "cannot be read" in capsys.readouterr().err
    assert golden.main([]) == 2


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 6])
def test_downsampling_is_that_of_torch(factor: int) -> None:
    grid = 2
    side = factor * grid
    x = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size=(grid, grid), mode="bilinear", align_corners=False
    )
    ours = downsample_bilinear(jnp.asarray(x.reshape(2, -1, 3)), grid)
    theirs = wanted.permute(0, 2, 3, 1).reshape(2, -1, 3).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.fixture(scope="module")
def packed(random_params: Callable[..., Any]) -> tuple[Any, Any, Features]:
    """A jitted TokenPacker of 4 tokens on a 6 x 6 grid (windows of 3 x 3), and random features."""
    rng = np.random.default_rng(0)
    selected = jnp.asarray(rng.standard_normal((1, 36, CHANNELS)), jnp.float32)
    features = Features(selected, jnp.asarray(rng.standard_normal((1, 36, LEVELS * CHANNELS)), jnp.float32))
    module = make_compressor("tokenpacker", 4, WIDTH, num_heads=HEADS)
    params = random_params(module, features, None)
    return params, jax.jit(lambda p, f: module.apply(p, f, None)[0]), features


def test_query_of_an_odd_window_is_its_centre(packed: tuple[Any, Any, Features]) -> None:
    params, run, features = packed
    before = run(params, features)
    maps = np.array(features.selected).reshape(6, 6, CHANNELS)
    window = maps[:3, 3:].reshape(9, CHANNELS)
    window[[0, 1, 2, 3, 5, 6, 7, 8]] = window[[8, 0, 6, 2, 1, 3, 5, 7]]
    maps[:3, 3:] = window.reshape(3, 3, CHANNELS)
    around = features._replace(selected=jnp.asarray(maps.reshape(1, 36, CHANNELS)))
    np.testing.assert_array_equal(run(params, around), before)
    maps[1, 4] = -maps[1, 4]
    centre = features._replace(selected=jnp.asarray(maps.reshape(1, 36, CHANNELS)))
    moved = np.abs(run(params, centre) - before).max((0, 2))
    assert moved[1] > 1e-4
    assert not moved[[0, 2, 3]].any()


def test_query_of_a_2_by_2_window_is_its_mean() -> None:
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 3)).astype(np.float32)
    mean = x.reshape(1, 3, 2, 3, 2, 3).mean((2, 4)).reshape(1, 9, 3)
    np.testing.assert_allclose(downsample_bilinear(jnp.asarray(x.reshape(1, 36, 3)), 3), mean, atol=1e-6)


def test_a_token_sees_the_levels_of_its_own_region_alone(packed: tuple[Any, Any, Features]) -> None:
    params, run, features = packed
    weights = np.random.default_rng(1).standard_normal(WIDTH)

    @jax.jit
    def gradient(levels: jax.Array, token: jax.Array) -> jax.Array:
        return jax.grad(lambda x: run(params, features._replace(levels=x))[0, token] @ weights)(levels)

    for token in range(4):
        seen = np.abs(gradient(features.levels, token)).max((0, 2)).reshape(6, 6)
        region = np.zeros((6, 6), bool)
        region[token // 2 * 3 :, token % 2 * 3 :][:3, :3] = True
        assert (seen[region] > 0).all()
        assert not seen[~region].any()


def test_gradient_reaches_every_parameter(packed: tuple[Any, Any, Features]) -> None:
    """But for constants added to all keys of a softmax, which change nothing."""
    params, run, features = packed
    grads = jax.jit(jax.grad(lambda p: (run(p, features) ** 2).sum()))(params)
    still = {
        jax.tree_util.keystr(path[1:], simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if np.abs(leaf).min() < 1e-6
    }
    assert still == {"attention/k/bias", "k_norm/bias"}
