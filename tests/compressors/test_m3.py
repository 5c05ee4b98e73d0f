"""Matryoshka multimodal models: scales, the ends of their range, and what one program shares."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlmscale.compressors import COMPRESSORS, Features, make_compressor

SIDE, CHANNELS, WIDTH = 8, 6, 10
SCALES = (64, 16, 4, 1)


@pytest.fixture(scope="module")
def model(random_params: Callable[..., Any]) -> tuple[Any, Features]:
    """Parameters and random features."""
    selected = np.random.default_rng(0).standard_normal((2, SIDE**2, CHANNELS))
    features = Features(jnp.asarray(selected, jnp.float32))
    return random_params(make_compressor("m3", 1, WIDTH), features, None), features


def run(params: Any, features: Features, count: int, name: str = "m3", **fields: Any) -> jax.Array:
    tokens, valid = make_compressor(name, count, WIDTH, **fields).apply(params, features, None)
    assert valid.shape == tokens.shape[:2]
    return tokens


@pytest.mark.parametrize(
    "largest, wanted",
    [(576, (576, 144, 36, 9, 1)), (64, SCALES), (729, (729, 169, 36, 9, 1)), (1, (1,))],
)
def test_scales(largest: int, wanted: tuple[int, ...]) -> None:
    row = COMPRESSORS["m3"]
    assert row.trains_all
    assert row.nested(largest) == wanted
    assert set(wanted) <= set(row.counts(round(largest**0.5)))


def test_numbers_are_those_of_the_published_code(model: tuple[Any, Features]) -> None:
    """Its pooling of projected patches: kernel and stride int(sqrt(P / V)), flattened row by row."""
    params, features = model
    weights = {
        name: [torch.tensor(np.asarray(part["kernel"]).T), torch.tensor(np.asarray(part["bias"]))]
        for name, part in params["params"].items()
    }
    x = torch.tensor(np.asarray(features.selected))
    x = torch.nn.functional.gelu(torch.nn.functional.linear(x, *weights["up"]))
    x = torch.nn.functional.linear(x, *weights["down"]).permute(0, 2, 1).reshape(2, WIDTH, SIDE, SIDE)
    for count in SCALES:
        kernel = int((SIDE**2 / count) ** 0.5)
        wanted = torch.nn.functional.avg_pool2d(x, kernel, kernel).flatten(2).permute(0, 2, 1)
        np.testing.assert_allclose(run(params, features, count), wanted, atol=2e-5)


def test_ends_are_the_plain_projector_and_its_mean(model: tuple[Any, Features]) -> None:
    params, features = model
    projected = run(params, features, SIDE**2, "mlp")
    np.testing.assert_array_equal(run(params, features, SIDE**2), projected)
    np.testing.assert_allclose(run(params, features, 1)[:, 0], projected.mean(1), atol=1e-6)


def test_a_coarse_scale_is_the_mean_of_a_finer_one(model: tuple[Any, Features]) -> None:
    params, features = model
    for fine, coarse in pairwise(SCALES):
        grid = round(coarse**0.5)
        means = run(params, features, fine).reshape(2, grid, 2, grid, 2, WIDTH).mean((2, 4))
        np.testing.assert_allclose(run(params, features, coarse), means.reshape(2, coarse, -1), atol=1e-6)


def test_it_is_pooling_behind_the_projector(model: tuple[Any, Features]) -> None:
    params, features = model
    for count in (9, 16):
        pooled = run(params, features, count, "pool", options={"placement": "after"})
        np.testing.assert_array_equal(run(params, features, count), pooled)


def test_one_program_projects_once_for_all_scales(model: tuple[Any, Features]) -> None:
    params, features = model

    def all_scales(params: Any) -> list[jax.Array]:
        return [run(params, features, count) for count in SCALES]

    def loss(params: Any) -> jax.Array:
        return sum((tokens**2).sum() for tokens in all_scales(params))

    program = jax.jit(all_scales).lower(params)
    assert program.as_text().count("stablehlo.dot_general") == 2 * len(SCALES)
    compiled = program.compile().cost_analysis()["flops"]
    alone = jax.jit(lambda p: run(p, features, 64)).lower(params).compile().cost_analysis()["flops"]
    assert compiled < 1.5 * alone
    grads = jax.jit(jax.grad(loss))(params)
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(grads))


def test_a_count_that_was_not_trained_is_refused(model: tuple[Any, Features]) -> None:
    params, features = model
    assert run(params, features, 4, largest=16).shape == (2, 4, WIDTH)
    for count, largest in ((9, 64), (64, 16)):
        with pytest.raises(ValueError, match=rf"M3 made for {largest} tokens knows .*, not {count}"):
            run(params, features, count, largest=largest)
