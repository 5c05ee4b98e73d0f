"""QueCC against the published module in torch, what the question changes, and its locality."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from tests import golden
from vlmscale.compressors import COMPRESSORS, Features, make_compressor
from vlmscale.layers import init_params

CHANNELS, LEVELS, HEADS, TEXT, WIDTH = 8, 2, 2, 5, 12


def published(stride: int) -> nn.ModuleDict:
    """The layers of the published module under its names, with random weights."""
    torch.manual_seed(0)
    c = CHANNELS

    def mlp(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, c), nn.GELU(), nn.Linear(c, c), nn.LayerNorm(c, eps=1e-6))

    parts = nn.ModuleDict(
        {
            "text_projection": nn.Sequential(nn.Linear(TEXT, c), nn.LayerNorm(c, eps=1e-6)),
            "q_proj": mlp(c),
            "k_proj": mlp(LEVELS * c),
            "v_proj": mlp(LEVELS * c),
            "q_downsample": nn.Conv2d(c, c, stride, stride, groups=c),
            "clip_attn": nn.MultiheadAttention(c, HEADS),
        }
    )
    # What a norm reads is small, so that the norm's epsilon shows.
    small = {f"{letter}_proj.2" for letter in "qkv"} | {"text_projection.0"}
    with torch.no_grad():
        for name, weight in parts.named_parameters():
            weight.normal_(0, 0.4 * (0.02 if name.rpartition(".")[0] in small else 1))
    return parts


@torch.no_grad()
def reference(parts: nn.ModuleDict, selected: Any, levels: Any, text: Any, stride: int) -> np.ndarray:
    """QueCC of one image, one region at a time: [P, C], [P, L * C] and [1, E] to [V, C]."""
    side = round(len(selected) ** 0.5)
    queries = parts["q_proj"](selected + parts["text_projection"](text))
    queries = parts["q_downsample"](queries.T.reshape(1, CHANNELS, side, side))[0]
    keys, values = parts["k_proj"](levels), parts["v_proj"](levels)
    tokens = []
    for i in range(side // stride):
        for j in range(side // stride):
            rows, columns = (range(at * stride, (at + 1) * stride) for at in (i, j))
            inside = [row * side + column for row in rows for column in columns]
            mixed, _ = parts["clip_attn"](queries[None, :, i, j], keys[inside], values[inside])
            tokens.append(mixed[0])
    return torch.stack(tokens).numpy()


def case(side: int, stride: int) -> dict[str, np.ndarray]:
    """A golden file's arrays, the output from the reference above."""
    parts = published(stride)
    selected, levels = torch.randn(2, side**2, CHANNELS), torch.randn(2, side**2, LEVELS * CHANNELS)
    text = torch.randn(2, 1, TEXT)
    output = [reference(parts, *inputs, stride) for inputs in zip(selected, levels, text, strict=True)]
    weights = {f"param.{name}": value.numpy() for name, value in parts.state_dict().items()}
    return weights | {
        "features": selected.numpy(),
        "features_multi": levels.numpy(),
        "text": text.numpy(),
        "output": np.stack(output),
        "meta": np.array([side, stride, CHANNELS, TEXT, HEADS]),
    }


@pytest.mark.parametrize("side, stride", [(4, 2), (6, 3), (4, 4), (3, 1)])
def test_golden_files_pass_for_any_grid_and_stride(
    side: int, stride: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quecc_x.npz"
    right = case(side, stride)
    np.savez(path, **right)
    assert golden.main([str(path)]) == 0
    assert float(capsys.readouterr().out.strip().removeprefix("quecc_x max_abs_err=")) <= 2e-5
    np.savez(path, **right | {"text": -right["text"]})
    assert golden.main([str(path)]) == (1 if stride > 1 else 0)  # one patch a region: the query is idle


@pytest.fixture(scope="module")
def model(random_params: Callable[..., Any]) -> tuple[Any, Any, Features, jax.Array]:
    """QueCC of 4 tokens on a 6 x 6 grid (windows of 3 x 3): a jitted run that also gives what layers made."""
    rng = np.random.default_rng(0)
    selected, levels = (
        jnp.asarray(rng.standard_normal((2, 36, n * CHANNELS)), jnp.float32) for n in (1, LEVELS)
    )
    features, text = Features(selected, levels), jnp.asarray(rng.standard_normal((2, 1, TEXT)), jnp.float32)
    module = make_compressor("quecc", 4, WIDTH, num_heads=HEADS)
    params = random_params(module, features, text)

    @jax.jit
    def run(params: Any, features: Features, text: jax.Array) -> tuple[jax.Array, Any]:
        (tokens, _), made = module.apply(
            params, features, text, capture_intermediates=True, mutable=["intermediates"]
        )
        return tokens, made["intermediates"]

    return params, run, features, text


def test_an_even_kernel_makes_the_query_the_mean_of_its_region(model: tuple[Any, ...]) -> None:
    """With the text's part at 0: the mean of the queries' MLP, computed here from the selected layer."""
    params, run, features, text = model
    weights = dict(params["params"])
    weights["text_norm"] = {"scale": jnp.zeros(CHANNELS), "bias": jnp.zeros(CHANNELS)}
    weights["downsample"] = {"kernel": jnp.full((3, 3, CHANNELS), 1 / 9), "bias": jnp.zeros(CHANNELS)}
    _, made = run({"params": weights}, features, text)
    w = jax.tree.map(np.asarray, weights)
    x = np.asarray(features.selected) @ w["q_up"]["kernel"] + w["q_up"]["bias"]
    x = x * (1 + erf(x / np.sqrt(2))) / 2 @ w["q_down"]["kernel"] + w["q_down"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * w["q_norm"]["scale"] + w["q_norm"]["bias"]
    wanted = x.reshape(2, 2, 3, 2, 3, CHANNELS).mean((2, 4)).reshape(8, 1, CHANNELS)
    np.testing.assert_allclose(made["downsample"]["__call__"][0], wanted, atol=2e-5)


def test_the_question_changes_queries_and_tokens_and_nothing_else(model: tuple[Any, ...]) -> None:
    params, run, features, text = model
    tokens, made = run(params, features, text)
    other_tokens, other = run(params, features, text.at[0].multiply(-1))
    assert (np.abs(tokens - other_tokens).max((1, 2)) > 1e-4).tolist() == [True, False]
    for name in "kv":
        mine, theirs = made["attention"][name]["__call__"][0], other["attention"][name]["__call__"][0]
        np.testing.assert_array_equal(mine, theirs)
    moved = np.abs(made["attention"]["q"]["__call__"][0] - other["attention"]["q"]["__call__"][0])
    assert moved[:4].max() > 1e-3
    np.testing.assert_array_equal(tokens[1], other_tokens[1])


def test_a_token_sees_its_own_region_alone(model: tuple[Any, ...]) -> None:
    params, run, features, text = model
    weights = np.random.default_rng(1).standard_normal(WIDTH)

    @jax.jit
    def gradient(features: Features, token: jax.Array) -> Features:
        return jax.grad(lambda f: run(params, f, text)[0][0, token] @ weights)(features)

    for token in range(4):
        region = np.zeros((6, 6), bool)
        region[token // 2 * 3 :, token % 2 * 3 :][:3, :3] = True
        gradients = gradient(features, token)
        for leaf in (gradients.selected, gradients.levels):
            seen = np.abs(leaf[0]).max(1).reshape(6, 6)
            assert (seen[region] > 0).all()
            assert not seen[~region].any()
            assert not leaf[1].any()


def test_gradient_reaches_every_parameter_and_the_question(model: tuple[Any, ...]) -> None:
    """But for constants added to all keys of a softmax, which change nothing."""
    params, run, features, text = model
    loss = jax.jit(jax.grad(lambda p, t: (run(p, features, t)[0] ** 2).sum(), (0, 1)))
    grads, of_text = loss(params, text)
    still = {
        jax.tree_util.keystr(path[1:], simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if np.abs(leaf).min() < 1e-6
    }
    assert still == {"attention/k/bias", "k_norm/bias"}
    assert of_text.all()  # who calls stops it


def test_compress_is_what_the_projector_reads(model: tuple[Any, ...]) -> None:
    params, run, features, text = model
    module = make_compressor("quecc", 4, WIDTH, num_heads=HEADS)
    before, valid = jax.jit(partial(module.apply, method="compress"))(params, features, text)
    assert (before.shape, valid.shape) == ((2, 4, CHANNELS), (2, 4))
    w = jax.tree.map(np.asarray, params["params"])
    x = before @ w["up"]["kernel"] + w["up"]["bias"]
    x = x * (1 + erf(x / np.sqrt(2))) / 2 @ w["down"]["kernel"] + w["down"]["bias"]
    np.testing.assert_allclose(run(params, features, text)[0], x, atol=2e-5)


def test_parameters_and_what_they_start_from() -> None:
    """As many as in the published module, whose kernels' bounds they fill."""
    features = Features(jnp.zeros((1, 36, CHANNELS)), jnp.zeros((1, 36, LEVELS * CHANNELS)))
    module = make_compressor("quecc", 4, WIDTH, num_heads=HEADS)
    key = jax.random.key(0, impl="rbg")  # compiles in a tenth of the time
    params = jax.jit(partial(init_params, module))(key, features, jnp.zeros((1, 1, TEXT)))
    projector = sum(x.size for name in ("up", "down") for x in params.pop(name).values())
    assert projector == (CHANNELS + 1) * WIDTH + (WIDTH + 1) * WIDTH
    wanted = sum(weight.numel() for weight in published(3).parameters())
    assert sum(x.size for x in jax.tree.leaves(params)) == wanted
    for name, fan_in in (("text", TEXT), ("q_up", CHANNELS), ("k_up", LEVELS * CHANNELS), ("downsample", 9)):
        largest = float(jnp.abs(params[name]["kernel"]).max())
        assert 0.9 * fan_in**-0.5 < largest <= fan_in**-0.5, name


def test_inputs_that_are_missing_are_named() -> None:
    row = COMPRESSORS["quecc"]
    assert row.text == "query"
    assert row.counts(24) == [1, 4, 9, 16, 36, 64, 144, 576]
    selected, levels = jnp.zeros((1, 36, CHANNELS)), jnp.zeros((1, 36, LEVELS * CHANNELS))
    module = make_compressor("quecc", 4, WIDTH)
    with pytest.raises(ValueError, match="levels"):
        module.init(jax.random.key(0), Features(selected), jnp.zeros((1, 1, TEXT)))
    with pytest.raises(ValueError, match="question"):
        module.init(jax.random.key(0), Features(selected, levels), None)
