"""The loss, the training step, its optimiser, and the step on eight devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlmscale.config import TrainConfig
from vlmscale.errors import UserError
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM
from vlmscale.sharding import check_batch, make_mesh, put_batch, replicated
from vlmscale.train.step import (
    TrainState,
    loss_sum,
    make_optimizer,
    make_schedule,
    make_train_step,
    model_inputs,
)
from vlmscale.weights import tree

SIZE = DecoderSize(width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24)
ROWS, LENGTH, TARGETS, VOCAB, VISUAL, CHANNELS = 8, 12, 5, 23, 4, 16


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Rows with none to five targets each, so that a mean of means is not the mean."""
    rng = np.random.default_rng(0)
    image_slots = np.zeros((ROWS, LENGTH), bool)
    image_slots[:6, 1 : 1 + VISUAL] = True
    lengths = rng.integers(8, LENGTH + 1, ROWS)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "image_slots": image_slots,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)).copy(),
        "segment_ids": (np.arange(LENGTH) < lengths[:, None]).astype(np.int32),
        "target_positions": rng.integers(4, 8, (ROWS, TARGETS)).astype(np.int32),
        "target_ids": rng.integers(0, VOCAB, (ROWS, TARGETS)).astype(np.int32),
        "target_mask": np.arange(TARGETS) < np.array([5, 0, 1, 3, 2, 1, 4, 1])[:, None],
        "selected": rng.standard_normal((ROWS, 16, CHANNELS)).astype(np.float32),
        "levels": rng.standard_normal((ROWS, 16, 2 * CHANNELS)).astype(np.float32),
    }


Steps = dict[str, tuple[VLM, Any, Any]]


@pytest.fixture(scope="module")
def steps(batch: dict[str, np.ndarray], random_params: Callable[..., Any]) -> Steps:
    """By compressor: the model, random parameters, and the jitted step of plain gradient descent.

    With a learning rate of 1 the step's update is the gradient.
    """
    out = {}
    for name in ("pool", "tokenpacker"):
        model = VLM(SIZE, VOCAB, name, VISUAL)
        params = random_params(model, model_inputs(batch), batch["target_positions"])["params"]
        out[name] = (model, params, jax.jit(make_train_step(model, optax.sgd(1.0))))
    return out


def first_state(params: Any) -> TrainState:
    return TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))


def gradients(params: Any, state: TrainState) -> dict[str, np.ndarray]:
    moved = jax.tree.map(lambda before, after: np.asarray(before) - np.asarray(after), params, state.params)
    return tree.flatten(moved)


def update_of_zeros(config: TrainConfig, params: Any) -> Any:
    """What the recipe's first update makes of zero gradients."""
    optimizer = make_optimizer(config)

    @jax.jit
    def update(params: Any) -> Any:
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    return update(params)


def test_loss_is_the_mean_over_supervised_tokens(batch: dict[str, np.ndarray], steps: Steps) -> None:
    model, params, step = steps["pool"]
    logits = jax.jit(model.apply)({"params": params}, model_inputs(batch), batch["target_positions"])
    total, count = 0.0, 0
    for row, number in np.argwhere(batch["target_mask"]):
        scores = np.asarray(logits[row, number], np.float64)
        total += np.log(np.exp(scores).sum()) - scores[batch["target_ids"][row, number]]
        count += 1
    state, metrics = step(first_state(params), batch)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["target_tokens"] == count == 17
    assert state.step == 1
    summed, counted = jax.jit(lambda params: loss_sum(model, params, batch))(params)
    assert (summed, counted) == (pytest.approx(total, rel=1e-5), count)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in gradients(params, state).values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_what_is_not_supervised_does_not_count(batch: dict[str, np.ndarray], steps: Steps) -> None:
    _, params, step = steps["pool"]
    loss = step(first_state(params), batch)[1]["loss"]
    unseen = batch["target_mask"]
    other = batch | {"target_ids": np.where(unseen, batch["target_ids"], 3)}
    assert step(first_state(params), other)[1]["loss"] == loss
    moved = batch | {"target_ids": np.where(unseen, (batch["target_ids"] + 1) % VOCAB, 3)}
    assert step(first_state(params), moved)[1]["loss"] != loss


def test_a_batch_without_a_target_has_loss_0_and_finite_zero_gradients(
    batch: dict[str, np.ndarray], steps: Steps
) -> None:
    _, params, step = steps["tokenpacker"]
    empty = batch | {"target_mask": np.zeros_like(batch["target_mask"])}
    state, metrics = step(first_state(params), empty)
    assert (metrics["loss"], metrics["grad_norm"], metrics["target_tokens"]) == (0, 0, 0)
    assert all((leaf == 0).all() for leaf in gradients(params, state).values())
    updates = update_of_zeros(TrainConfig(), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["pool", "tokenpacker"])
def test_eight_devices_do_the_step_of_one(name: str, batch: dict[str, np.ndarray], steps: Steps) -> None:
    _, params, step = steps[name]
    mesh = make_mesh()
    assert mesh.size == 8
    alone, metrics = step(first_state(params), batch)
    spread = put_batch(batch, mesh)
    assert len(spread["tokens"].sharding.device_set) == 8
    assert spread["tokens"].addressable_shards[0].data.shape == (1, LENGTH)
    state = jax.device_put(first_state(params), replicated(mesh))
    together, metrics_of_8 = step(state, spread)
    assert metrics_of_8["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-5)
    ones, eights = gradients(params, alone), gradients(params, together)
    for path, leaf in ones.items():
        np.testing.assert_allclose(eights[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["pool", "tokenpacker"])
def test_gradient_reaches_every_parameter(name: str, batch: dict[str, np.ndarray], steps: Steps) -> None:
    _, params, step = steps[name]
    state, _ = step(first_state(params), batch)
    grads = gradients(params, state)
    still = {path for path, leaf in grads.items() if np.abs(leaf).max() < 1e-6}
    # A constant added to all keys of a softmax changes nothing.
    constants = {"compressor/attention/k/bias", "compressor/k_norm/bias"}
    assert still == (constants if name == "tokenpacker" else set())
    for path, leaf in grads.items():
        if path.startswith("decoder/layers/"):
            assert (np.abs(leaf).reshape(SIZE.num_layers, -1).max(1) > 1e-6).all(), path


def test_text_rows_give_the_compressor_no_gradient(batch: dict[str, np.ndarray], steps: Steps) -> None:
    _, params, step = steps["pool"]
    blind = batch | {"image_slots": np.zeros_like(batch["image_slots"])}
    state, metrics = step(first_state(params), blind)
    assert metrics["grad_norm"] > 0
    grads = gradients(params, state)
    assert not any(leaf.any() for path, leaf in grads.items() if path.startswith("compressor/"))


def test_schedule_warms_up_and_falls_to_2_percent() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=0.5)
    schedule = make_schedule(config)
    values = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    assert values == pytest.approx([0, 0.25, 0.5, (0.5 + 0.01) / 2, 0.01], abs=1e-6)


def test_matrices_decay_and_norms_and_biases_do_not(steps: Steps) -> None:
    """Also where the scan over layers has stacked norm scales into a matrix."""
    _, params, _ = steps["tokenpacker"]
    updates = update_of_zeros(
        TrainConfig(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.5), params
    )
    names = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = path[-1].key
        names.add(name)
        assert leaf.any() == (name in ("kernel", "weight", "embedding")), jax.tree_util.keystr(path)
    assert names == {"kernel", "weight", "embedding", "scale", "bias"}


def test_clipping_bounds_the_update_by_the_global_norm() -> None:
    # Adam forgets the scale of a constant gradient, so clipping shows only between two of them.
    config = TrainConfig(steps=10, warmup_steps=0, learning_rate=1.0, weight_decay=0.0, clip_norm=1.0)
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.zeros(2)}

    @jax.jit
    def second_update(size: float) -> Any:
        _, state = optimizer.update({"kernel": jnp.array([0.6, 0.8])}, optimizer.init(params), params)
        return optimizer.update({"kernel": jnp.array([1.0, 0.0]) * size}, state, params)[0]["kernel"]

    np.testing.assert_allclose(second_update(3.0), second_update(3000.0), rtol=1e-5)
    assert np.abs(second_update(0.5) - second_update(3.0)).max() > 1e-2


def test_batches_must_divide_over_the_devices() -> None:
    check_batch(16, make_mesh())
    with pytest.raises(UserError, match="batch_size=12: must be a multiple of the 8 devices"):
        check_batch(12, make_mesh())
