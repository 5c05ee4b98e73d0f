"""Average pooling with its projector, and what every method of the table must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vlmscale.compressors import COMPRESSORS, Features, check_count, make_compressor
from vlmscale.errors import UserError
from vlmscale.layers import abstract_params
from vlmscale.models.sizes import SIZES, TowerSize
from vlmscale.models.vision import VisionTower

SIDE, CHANNELS, LEVELS, WIDTH = 6, 16, 3, 16
TOWERS = {
    style: TowerSize(SIDE * 4, 4, CHANNELS, 3, 2, 32, select_layer=2, levels=(1, 2, 2), style=style)
    for style in ("clip", "siglip")
}
Weights = dict[str, dict[str, np.ndarray]]


def patches(side: int = SIDE) -> Features:
    rng = np.random.default_rng(0)
    return Features(jnp.asarray(rng.standard_normal((2, side * side, CHANNELS)), jnp.float32))


def two_layers(x: np.ndarray, weights: Weights) -> np.ndarray:
    x = x @ weights["up"]["kernel"] + weights["up"]["bias"]
    x = x * (1 + erf(x / np.sqrt(2))) / 2
    return x @ weights["down"]["kernel"] + weights["down"]["bias"]


@pytest.mark.parametrize("side, grid", [(6, 1), (6, 2), (6, 3), (6, 6), (5, 3), (7, 4)])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_pool_is_a_mean_over_windows_and_two_layers(
    side: int, grid: int, placement: str, random_params: Callable[..., Any]
) -> None:
    features = patches(side)
    module = make_compressor("pool", grid**2, WIDTH, {"placement": placement})
    params = random_params(module, features, None)
    tokens, valid = jax.jit(module.apply)(params, features, None)
    weights = jax.tree.map(np.asarray, params["params"])
    maps = np.asarray(features.selected).reshape(2, side, side, CHANNELS)
    for row, i, j in np.ndindex(2, grid, grid):
        rows = slice(i * side // grid, -(-(i + 1) * side // grid))
        columns = slice(j * side // grid, -(-(j + 1) * side // grid))
        window = maps[row, rows, columns].reshape(-1, CHANNELS)
        if placement == "before":
            wanted = two_layers(window.mean(0), weights)
        else:
            wanted = two_layers(window, weights).mean(0)
        np.testing.assert_allclose(tokens[row, i * grid + j], wanted, atol=2e-5)
    assert valid.shape == (2, grid * grid)
    assert valid.all()


def test_placements_differ_but_where_nothing_is_pooled(random_params: Callable[..., Any]) -> None:
    features = patches()

    def run(name: str, count: int, options: dict[str, str]) -> jax.Array:
        module = make_compressor(name, count, WIDTH, options)
        return module.apply(random_params(module, features, None), features, None)[0]

    before, after = ({"placement": placement} for placement in ("before", "after"))
    assert np.abs(run("pool", 9, before) - run("pool", 9, after)).max() > 1e-2
    for placement in (before, after):
        np.testing.assert_array_equal(run("pool", 36, placement), run("mlp", 36, {}))


@pytest.mark.parametrize("placement", ["before", "after"])
def test_gradient_reaches_every_parameter(placement: str, random_params: Callable[..., Any]) -> None:
    features = patches(5)
    module = make_compressor("pool", 9, WIDTH, {"placement": placement})
    params = random_params(module, features, None)
    grads = jax.jit(jax.grad(lambda p: (module.apply(p, features, None)[0] ** 2).sum()))(params)
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(grads))


def everything(size: TowerSize) -> Features:
    """Shapes of all that a tower can give to a compressor."""
    count, width, layers = size.num_patches, size.width, size.select_layer
    length = count + size.class_tokens

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *dims), jnp.float32)

    images = jax.ShapeDtypeStruct((2, size.image_size, size.image_size, 3), jnp.float32)
    blocks = jax.eval_shape(lambda x: VisionTower(size).init(jax.random.key(0), x, (layers,)), images)
    return Features(
        selected=shape(count, width),
        levels=shape(count, LEVELS * width),
        keys=shape(length, width),
        class_query=shape(width),
        class_attention=shape(count),
        mean_attention=shape(count),
        probe_attention=shape(count),
        stack=shape(layers, length, width),
        tower={name: part for name, part in blocks["params"].items() if name.startswith("block_")},
    )


@pytest.mark.parametrize("style", TOWERS)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_method_gives_as_many_tokens_as_it_says(name: str, style: str) -> None:
    """For each value of each option, from the features that its row names and no others."""
    method, size = COMPRESSORS[name], TOWERS[style]
    counts = list(method.counts(SIDE))
    assert counts == sorted(set(counts))
    choices = [{}, *({key: value} for key, values in method.options.items() for value in values[1:])]
    query = jax.ShapeDtypeStruct((2, 1, WIDTH), jnp.float32) if method.text == "query" else None
    for options in choices:
        try:
            read = {"selected", *method.needs(size, options)}
        except UserError:  # a choice that this style of tower cannot serve; the default must work on any
            assert options
            continue
        features = Features(**{key: x for key, x in everything(size)._asdict().items() if key in read})
        for count in counts[:: -(-len(counts) // 4)]:
            module = make_compressor(
                name, count, WIDTH, options, decoder_size=SIZES["toy-14k"], tower_size=size, largest=count
            )

            def run(features: Features, query: Any, module: Any = module) -> Any:
                return module.init_with_output(jax.random.key(0), features, query)[0]

            tokens, valid = jax.eval_shape(run, features, query)
            assert (tokens.shape, valid.shape, valid.dtype) == ((2, count, WIDTH), (2, count), bool)
            check_count(name, count, SIDE)


def test_counts_that_do_not_work_are_refused_with_those_that_do() -> None:
    said = r"visual_tokens=25: tokenpacker on 6x6 patches gives 1, 4, 9, 36"
    with pytest.raises(UserError, match=said):
        check_count("tokenpacker", 25, SIDE)
    check_count("pool", 25, SIDE)
    for count in (24, 49):
        with pytest.raises(UserError, match="gives 1, 4, 9, 16, 25, 36"):
            check_count("pool", count, SIDE)


@pytest.mark.parametrize("name", ["tokenpacker", "quecc"])
def test_levels_are_asked_for_where_they_are_read(name: str) -> None:
    assert COMPRESSORS[name].needs(TOWERS["clip"], {}) == {"levels"}
    assert not COMPRESSORS["pool"].needs(TOWERS["clip"], {})
    with pytest.raises(ValueError, match="levels"):
        abstract_params(make_compressor(name, 4, WIDTH), patches(), jnp.zeros((2, 1, 8)))
