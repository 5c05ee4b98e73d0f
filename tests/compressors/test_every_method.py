"""What holds for every method of the table, with every choice it offers, inside the whole model.

A method that is added is tested here without being named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compressors.cases import Batch, Case, build, cases, make_batch, pack, share
from vlmscale.compressors import COMPRESSORS, check_count
from vlmscale.cost.count import count_flops
from vlmscale.errors import UserError
from vlmscale.layers import abstract_params
from vlmscale.models.vlm import VLM
from vlmscale.sharding import make_mesh, place, put_batch, replicated
from vlmscale.train.step import loss_sum, model_inputs
from vlmscale.weights import tree

every_method = pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.label)


@pytest.fixture(scope="module")
def params_of(random_params: Callable[..., Any]) -> Callable[[Case], Any]:
    @functools.cache
    def make(case: Case) -> Any:
        batch = make_batch(case)
        return random_params(build(case), model_inputs(batch), batch["target_positions"])["params"]

    return make


def logits(model: VLM, params: Any, batch: Batch) -> jax.Array:
    return model.apply({"params": params}, model_inputs(batch), batch["target_positions"])


@every_method
def test_packed_and_sharded_and_eager_are_the_same(case: Case, params_of: Callable[[Case], Any]) -> None:
    model, params, batch = build(case), params_of(case), make_batch(case)
    run = jax.jit(logits, static_argnums=0)
    wanted = np.asarray(run(model, params, batch))
    assert np.isfinite(wanted).all()
    assert wanted.std() > 0.1
    np.testing.assert_allclose(logits(model, params, batch), wanted, atol=2e-5)
    packed = run(model, params, pack(batch))
    np.testing.assert_allclose(packed.reshape(wanted.shape), wanted, atol=2e-5)
    blocks = run(build(case, block_rows=2), params, share(pack(batch)))
    np.testing.assert_allclose(blocks.reshape(wanted.shape), wanted, atol=2e-5)
    if COMPRESSORS[case.name].nested is not None:  # what a step trains is then not these logits alone
        loss = jax.jit(lambda batch: loss_sum(model, params, batch, jnp.int32(3)))
        (single, count), (double, both) = loss(batch), loss(pack(batch))
        assert count == both
        assert double == pytest.approx(float(single), rel=1e-5)
        model_of_blocks, both_rows = build(case, block_rows=2), share(pack(batch))
        of_blocks = jax.jit(lambda batch: loss_sum(model_of_blocks, params, batch, jnp.int32(3)))(both_rows)[
            0
        ]
        assert of_blocks == pytest.approx(float(single), rel=1e-5)
    mesh = make_mesh(2, 2, 2)
    boxed = abstract_params(model, model_inputs(batch), batch["target_positions"])
    spread = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, place(boxed, mesh))
    shared = {name: jax.device_put(batch[name], replicated(mesh)) for name in ("tower",) if name in batch}
    rows = put_batch({name: x for name, x in batch.items() if name not in shared}, mesh)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(model, spread, rows | shared), wanted, atol=2e-5)


@every_method
def test_bfloat16_is_close(case: Case, params_of: Callable[[Case], Any]) -> None:
    params, batch = params_of(case), make_batch(case)
    run = jax.jit(logits, static_argnums=0)
    exact, rough = (np.asarray(run(build(case, dtype=d), params, batch)) for d in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).max() < 0.15 * exact.std() + 0.02 * np.abs(exact).max()


@every_method
def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(
    case: Case, params_of: Callable[[Case], Any]
) -> None:
    model, params, batch = build(case), params_of(case), make_batch(case)
    floats = {name: batch[name] for name in ("selected", "stack", "tower") if name in batch}

    def loss(params: Any, floats: Batch) -> jax.Array:
        return loss_sum(model, params, batch | floats)[0]

    grads, into_tower = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, floats)
    still = {path for path, leaf in tree.flatten(grads).items() if not np.abs(leaf).max() > 1e-7}
    # A constant added to all keys of a softmax changes nothing: their bias, and that of their norm.
    blind = {path for path in still if path.endswith(("k/bias", "k_norm/bias"))}
    assert not still - blind
    if "tower" in floats:
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(into_tower["tower"]))


@every_method
def test_its_flops_can_be_counted(case: Case, params_of: Callable[[Case], Any]) -> None:
    model, batch = build(case), make_batch(case)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params_of(case), batch))
    blind, alone = build(case._replace(visual_tokens=0)), {"decoder": shapes[0]["decoder"]}
    with_image = count_flops(functools.partial(logits, model), *shapes)
    assert with_image > count_flops(functools.partial(logits, blind), alone, shapes[1])
    if COMPRESSORS[case.name].text == "fusion":  # there is no such thing as no picture for it
        text = {name: x for name, x in shapes[1].items() if name != "selected"}
        with pytest.raises(ValueError, match="give features"):
            jax.eval_shape(functools.partial(logits, model), shapes[0], text)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("side", [4, 27])
def test_a_count_that_a_method_cannot_give_is_refused_with_those_that_work(name: str, side: int) -> None:
    counts = COMPRESSORS[name].counts(side)
    assert list(counts) == sorted(set(counts))
    assert counts[0] >= 1
    for count in (counts[0], counts[-1]):
        check_count(name, count, side)
    wrong = next(count for count in range(2, side * side + 3) if count not in counts)
    with pytest.raises(UserError, match=f"visual_tokens={wrong}: {name} on {side}x{side} .*{counts[-1]}"):
        check_count(name, wrong, side)
