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
from vlmscale.train.recipe import make_optimizer, make_schedule
from vlmscale.train.step import (
    Knobs,
    Objective,
    TrainState,
    loss_sum,
    make_train_step,
    model_inputs,
    plain_loss_sum,
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
        out[name] = (model, params, sgd_step(model))
    return out


def sgd_step(model: VLM, **options: Any) -> Any:
    """(state, batch) to the next state and metrics."""
    objective = Objective(model, options.pop("loss_rows", 0))
    rates = {"decoder": 1.0, "compressor": 1.0}
    step = make_train_step(objective, optax.sgd(1.0), rates, options.pop("accumulate", 1))
    knobs = Knobs(jnp.float32(1), jnp.uint32(0))
    return jax.jit(lambda state, batch: step(state, {}, batch, knobs))


def first_state(params: Any) -> TrainState:
    return TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params), jnp.int32(0))


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
    config = TrainConfig(steps=100, warmup_steps=10)
    schedule = make_schedule(config)
    values = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    assert values == pytest.approx([0, 0.5, 1, (1 + 0.02) / 2, 0.02], abs=1e-6)


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


def nested_batch(batch: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The batch with so many slots an image, the first ones, and targets moved accordingly."""
    kept = ~(batch["image_slots"] & (np.cumsum(batch["image_slots"], 1) > count))
    rows = {}
    for name in ("tokens", "image_slots", "segment_ids"):
        rows[name] = np.zeros_like(batch[name])
        for row, keep in enumerate(kept):
            rows[name][row, : keep.sum()] = batch[name][row, keep]
    moved = np.cumsum(kept, 1) - 1
    return batch | rows | {"target_positions": np.take_along_axis(moved, batch["target_positions"], 1)}


def test_m3_trains_the_mean_of_its_scales(
    batch: dict[str, np.ndarray], random_params: Callable[..., Any]
) -> None:
    # Rows without an image leave the slots of one free, as the pipeline does.
    shown, early = batch["image_slots"].any(1)[:, None], np.arange(LENGTH) < LENGTH - VISUAL
    batch = batch | {"segment_ids": batch["segment_ids"] * (shown | early)}
    model = VLM(SIZE, VOCAB, "m3", VISUAL)
    params = random_params(model, model_inputs(batch), batch["target_positions"])["params"]
    total, count = jax.jit(lambda params: loss_sum(model, params, batch))(params)
    assert count == 17
    singles = []
    for scale in (1, 4):
        alone = VLM(SIZE, VOCAB, "pool", scale, options=(("placement", "after"),))
        singles.append(float(plain_loss_sum(alone, params, nested_batch(batch, scale))[0]))
    assert abs(singles[0] - singles[1]) > 0.1
    assert total == pytest.approx(np.mean(singles), rel=1e-5)


def test_mqt_trains_a_count_drawn_from_seed_and_step(
    batch: dict[str, np.ndarray], random_params: Callable[..., Any]
) -> None:
    batch = batch | {
        "target_positions": np.maximum(batch["target_positions"], 1 + VISUAL)
    }  # text alone predicts
    model = VLM(SIZE, VOCAB, "mqt", VISUAL)
    params = random_params(model, model_inputs(batch), batch["target_positions"])["params"]
    loss = jax.jit(lambda step, seed: loss_sum(model, params, batch, step, seed)[0], static_argnums=1)
    drawn = [float(loss(step, 0)) for step in range(12)]
    assert drawn == [float(loss(step, 0)) for step in range(12)]
    assert drawn != [float(loss(step, 1)) for step in range(12)]
    singles = []
    for count in (2, 4):
        alone = VLM(SIZE, VOCAB, "mqt", count, largest=VISUAL)
        singles.append(float(plain_loss_sum(alone, params, nested_batch(batch, count))[0]))
    assert abs(singles[0] - singles[1]) > 0.01
    nearest = [int(np.argmin(np.abs(np.subtract(singles, value)))) for value in drawn]
    assert set(nearest) == {0, 1}
    np.testing.assert_allclose(drawn, [singles[place] for place in nearest], rtol=1e-5)
    assert float(loss_sum(model, params, batch)[0]) == pytest.approx(singles[1], rel=1e-5)


def test_a_question_embedded_before_is_the_question_embedded_in_the_step(
    batch: dict[str, np.ndarray], random_params: Callable[..., Any]
) -> None:
    """And another question gives another loss, through tokens that its own length bounds."""
    rng = np.random.default_rng(3)
    asked = batch | {
        "query_tokens": rng.integers(0, VOCAB, (ROWS, 4)).astype(np.int32),
        "query_length": np.arange(ROWS, dtype=np.int32) % 4 + 1,
    }
    model = VLM(SIZE, VOCAB, "quecc", VISUAL)
    params = random_params(model, model_inputs(asked), batch["target_positions"])["params"]
    loss = jax.jit(lambda params, batch: loss_sum(model, params, batch)[0])
    wanted = loss(params, asked)
    query = model.apply(
        {"params": params}, asked["query_tokens"], asked["query_length"], method="embed_query"
    )
    assert loss(params, batch | {"text_query": query}) == pytest.approx(float(wanted), rel=1e-6)
    padding = np.arange(4) >= asked["query_length"][:, None]
    ids = asked["query_tokens"]
    assert loss(params, asked | {"query_tokens": np.where(padding, (ids + 1) % VOCAB, ids)}) == wanted
    assert loss(params, asked | {"query_tokens": np.where(padding, ids, (ids + 1) % VOCAB)}) != wanted

    def with_query(query: jax.Array) -> jax.Array:
        return loss(params, batch | {"text_query": query})

    assert np.abs(jax.grad(with_query)(query)).max() > 0  # it matters, and yet no gradient enters the LLM:

    def by_question(table: jax.Array) -> jax.Array:
        changed = params | {"decoder": params["decoder"] | {"embedding": table}}
        return model.apply({"params": changed}, ids, asked["query_length"], method="embed_query").sum()

    assert not np.asarray(jax.grad(by_question)(params["decoder"]["embedding"])).any()
