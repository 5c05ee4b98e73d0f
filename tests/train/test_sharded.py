"""Training on eight devices is training on one: every method on every axis of the mesh, and every recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tests.compressors.cases import Case, cases, pack, share
from tests.train.sharded_cases import (
    MESHES,
    SIZE,
    Ran,
    Setup,
    assert_same,
    make_setup,
    recipe,
    run_alone,
    run_on,
    run_together,
    with_pixels,
)
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM
from vlmscale.sharding import RULES, make_mesh
from vlmscale.train.state import boxed_params

POOL = Case("pool", (), 4)
SHORT = 4  # steps of what differs in the recipe alone
INSIDE_THE_TOWER = ("block_0/attention/q/kernel", "block_1/mlp/down/kernel")


@pytest.fixture(scope="module", autouse=True)
def programs_are_compiled_quickly() -> Iterator[None]:
    """They run for less time than it takes to make them fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


Make = Callable[..., Setup]


@pytest.fixture(scope="module")
def make(random_params: Callable[..., Any]) -> Make:
    return functools.cache(lambda case, *options: make_setup(case, random_params, *options))


@pytest.fixture(scope="module")
def alone(make: Make) -> Callable[..., Ran]:
    """The run of a case on one device."""
    return functools.cache(lambda case, *options, steps=20: run_alone(make(case, *options), steps))


def mesh_of(name: str) -> Mesh:
    return make_mesh(*MESHES[name])


@functools.cache
def axes_of(model: VLM) -> dict[str, Any]:
    """Shapes and logical axes by path."""
    return flatten_dict(boxed_params(model), sep="/")


def by_the_rules(setup: Setup, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Shapes of what a device has to hold of each parameter behind the tower."""
    held = {}
    for path, leaf in axes_of(setup.model).items():
        axes = [RULES[name] if name else None for name in leaf.names]
        pieces = [mesh.shape[axis] if axis else 1 for axis in axes]
        lengths = zip(leaf.value.shape, pieces, strict=True)
        held[path] = tuple(length if length % count else length // count for length, count in lengths)
    return held


# Each method along all axes at once; those that differ most, along each alone.
ALONE = ("mlp", "quecc", "llava_mini", "vistog")
ON = [
    pytest.param(case, mesh, id=f"{case.label}-{mesh}")
    for case in cases()
    for mesh in MESHES
    if mesh == "all" or (case.name in ALONE and not case.options)
]


@pytest.mark.parametrize("case, mesh", ON)
def test_every_method_trains_on_a_mesh_as_alone(
    case: Case, mesh: str, make: Make, alone: Callable[..., Ran]
) -> None:
    wanted, found = alone(case), run_on(make(case), mesh_of(mesh))
    assert wanted.losses[-1] < 0.9 * wanted.losses[0]
    assert found.held == by_the_rules(make(case), mesh_of(mesh))
    assert_same(found, wanted)


@pytest.mark.parametrize("mesh, pieces", [("data", 1), ("fsdp", 8), ("tensor", 8), ("all", 4)])
def test_no_matrix_of_the_decoder_lies_whole_where_it_can_be_split(
    mesh: str, pieces: int, make: Make
) -> None:
    """What the other tests call split is."""
    setup = make(POOL)
    for path, held in by_the_rules(setup, mesh_of(mesh)).items():
        whole = flatten_dict(setup.params, sep="/")[path].size
        if path.startswith("decoder/") and path.endswith(("weight", "embedding")):
            assert np.prod(held) * pieces == whole, path


def varied(setup: Setup, remat: str = "block", **options: Any) -> Setup:
    """The same trained by another recipe."""
    return replace(setup, model=setup.model.clone(remat=remat), train=recipe(**options))


@pytest.mark.parametrize("mesh", ["", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2, "remat": "none", "loss_chunk": 5},
        {"accumulate": 4, "remat": "dots", "loss_chunk": 1},
    ],
    ids=["2-parts", "4-parts"],
)
def test_how_a_step_is_computed_changes_nothing(
    options: dict[str, Any], mesh: str, make: Make, alone: Callable[..., Ran]
) -> None:
    """Parts that a batch comes in, what the backward pass computes again, and chunks of the loss."""
    setup = varied(make(POOL, SIZE, 16), **options)
    found = run_on(setup, mesh_of(mesh), SHORT) if mesh else run_alone(setup, SHORT)
    assert_same(found, alone(POOL, SIZE, 16, steps=SHORT))


@pytest.mark.parametrize(
    "case",
    [Case("quecc", (), 4), Case("prumerge", (("count", "adaptive"),), 4)],
    ids=lambda case: case.label,
)
def test_packed_rows_that_share_their_images_train_as_single_rows_do(
    case: Case, make: Make, alone: Callable[..., Ran]
) -> None:
    """In blocks of two rows, each of two samples; one block lies on one device."""
    single = make(case, SIZE, 16)
    batches = tuple(share(pack(batch)) for batch in single.batches)
    setup = replace(single, model=single.model.clone(block_rows=2), batches=batches)
    assert_same(run_on(setup, mesh_of("all"), SHORT), alone(case, SIZE, 16, steps=SHORT))


@pytest.mark.parametrize("mesh, parts", [("data", 1), ("all", 2)])
def test_a_mean_of_means_is_that_of_one_device(
    mesh: str, parts: int, make: Make, alone: Callable[..., Ran]
) -> None:
    """Its groups lie across devices, or in parts of a batch."""
    setup = make(POOL, SIZE, 16)
    wanted = run_alone(varied(setup, loss_rows=4), SHORT)
    assert abs(wanted.losses[0] - alone(POOL, SIZE, 16, steps=SHORT).losses[0]) > 1e-3
    assert_same(run_on(varied(setup, loss_rows=4, accumulate=parts), mesh_of(mesh), SHORT), wanted)


def test_a_frozen_decoder_leaves_the_gradient_of_the_compressor(
    make: Make, alone: Callable[..., Ran]
) -> None:
    """LLaVA's first stage."""
    setup = varied(make(POOL), llm_rate=0.0)
    wanted, found = run_alone(setup, SHORT), run_on(setup, mesh_of("all"), SHORT)
    assert found.params.keys() == {path for path in alone(POOL).params if path.startswith("compressor/")}
    assert_same(found, wanted)
    for path, leaf in wanted.gradient.items():
        np.testing.assert_allclose(leaf, alone(POOL).gradient[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("mesh", ["tensor", "all"])
def test_a_tower_trains_on_a_mesh_as_alone(mesh: str, make: Make) -> None:
    """From pixels, with all that makes tokens of them."""
    setup = with_pixels(varied(make(POOL), tower_rate=1.0))
    wanted, found = run_alone(setup, SHORT), run_on(setup, mesh_of(mesh), SHORT)
    split = {path for path, held in found.held.items() if np.prod(held) < wanted.params[path].size}
    assert {f"tower/{name}" for name in INSIDE_THE_TOWER} <= split
    assert all(np.abs(wanted.gradient[f"tower/{name}"]).max() > 1e-4 for name in INSIDE_THE_TOWER)
    assert_same(found, wanted)


def test_cells_of_one_shape_train_together_as_each_alone(make: Make) -> None:
    """Two, whose parameters, learning rates and drawn numbers of tokens differ."""
    first = make(Case("mqt", (), 4))
    rng = np.random.default_rng(9)
    params = jax.tree.map(lambda x: (x + 0.1 * rng.standard_normal(x.shape)).astype(x.dtype), first.params)
    second = replace(first, params=params, train=recipe(learning_rate=0.003, seed=7))
    wanted = [run_alone(cell, SHORT) for cell in (first, second)]
    together = run_together([first, second], mesh_of("all"), SHORT)
    for mine, theirs in zip(together, wanted, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("mesh", ["tensor", "all"])
@pytest.mark.parametrize(
    "size",
    [
        DecoderSize(32, 2, 8, 8, 48, head_dim=8, family="qwen3", tied_embeddings=False),
        DecoderSize(20, 2, 6, 2, 30, head_dim=4),
    ],
    ids=["qwen3-untied", "heads-cut"],
)
def test_other_decoders_train_on_a_mesh_as_alone(
    size: DecoderSize, mesh: str, make: Make, alone: Callable[..., Ran]
) -> None:
    """With norms in heads and a head of its own; with heads and an MLP that eight devices split unevenly."""
    setup = make(POOL, size)
    found = run_on(setup, mesh_of(mesh), SHORT)
    assert found.held == by_the_rules(setup, mesh_of(mesh))
    assert_same(found, alone(POOL, size, steps=SHORT))
