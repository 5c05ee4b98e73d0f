"""Average pooling with its projector, and what every method of the table must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vlmscale.compressors import COMPRESSORS, Features, check_count
from vlmscale.errors import UserError

SIDE, CHANNELS, LEVELS, WIDTH = 6, 16, 3, 10


def random_features(side: int = SIDE) -> Features:
    rng = np.random.default_rng(0)
    selected = rng.standard_normal((2, side * side, CHANNELS))
    levels = rng.standard_normal((2, side * side, LEVELS * CHANNELS))
    return Features(jnp.asarray(selected, jnp.float32), jnp.asarray(levels, jnp.float32))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


@pytest.mark.parametrize("grid", [1, 2, 3, 6])
def test_pool_is_a_mean_over_windows_and_two_layers(grid: int, random_params: Callable[..., Any]) -> None:
    features = random_features()
    module = COMPRESSORS["pool"].build(grid**2, WIDTH)
    params = random_params(module, features, None)
    tokens, valid = jax.jit(module.apply)(params, features, None)
    weights = jax.tree.map(np.asarray, params["params"])
    maps = np.asarray(features.selected).reshape(2, SIDE, SIDE, CHANNELS)
    window = SIDE // grid
    for row, place in np.ndindex(2, grid * grid):
        top, left = place // grid * window, place % grid * window
        x = maps[row, top : top + window, left : left + window].mean((0, 1))
        x = gelu(x @ weights["up"]["kernel"] + weights["up"]["bias"])
        x = x @ weights["down"]["kernel"] + weights["down"]["bias"]
        np.testing.assert_allclose(tokens[row, place], x, atol=2e-5)
    assert valid.shape == (2, grid * grid)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_method_gives_as_many_tokens_as_it_says(name: str) -> None:
    method, features = COMPRESSORS[name], random_features()
    counts = method.counts(SIDE)
    assert counts == sorted(set(counts))
    for count in counts:
        module = method.build(count, WIDTH)

        def run(features: Features, module: Any = module) -> Any:
            return module.init_with_output(jax.random.key(0), features, None)[0]

        tokens, valid = jax.eval_shape(run, features)
        assert (tokens.shape, valid.shape, valid.dtype) == ((2, count, WIDTH), (2, count), bool)
        check_count(name, count, SIDE)


def test_counts_that_do_not_work_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"visual_tokens=25: pool on a 6x6 patch grid gives 1, 4, 9, 36"):
        check_count("pool", 25, SIDE)


def test_pool_does_not_ask_for_levels() -> None:
    assert not COMPRESSORS["pool"].needs_levels
    features = Features(random_features().selected)
    jax.eval_shape(lambda f: COMPRESSORS["pool"].build(4, WIDTH).init(jax.random.key(0), f, None), features)
    assert COMPRESSORS["tokenpacker"].needs_levels
    with pytest.raises(ValueError, match="levels"):
        COMPRESSORS["tokenpacker"].build(4, WIDTH).init(jax.random.key(0), features, None)
