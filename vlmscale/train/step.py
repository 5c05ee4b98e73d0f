"""State, optimiser, loss and the training step: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlmscale import layers
from vlmscale.compressors import COMPRESSORS, Features, parse_options
from vlmscale.compressors.features import tower_features
from vlmscale.config import Cell, TrainConfig
from vlmscale.data import images
from vlmscale.models.sizes import SIZES, TOWERS, TowerSize
from vlmscale.models.vlm import VLM, Inputs, narrow

Params = dict[str, Any]
Arrays = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array  # int32 scalar: steps done
    params: Params
    opt_state: Any


def build_model(cell: Cell, vocab_size: int, layout: str = "scan", visual_tokens: int | None = None) -> VLM:
    """The model of a cell, behind the tower.

    Args:
      cell: the config.
      vocab_size: rows of the embedding table.
      layout: the decoder's.
      visual_tokens: tokens of an image, for a nested compressor fewer than it was made for; None for all.
    """
    compressor = cell.compressor
    return VLM(
        SIZES[cell.llm.name],
        vocab_size,
        compressor.name,
        compressor.visual_tokens if visual_tokens is None else visual_tokens,
        layout=layout,
        options=tuple(parse_options(compressor.name, compressor.options).items()),
        tower_size=TOWERS[cell.tower.name],
        largest=compressor.visual_tokens,
        full_rows=cell.data.row_length > 0,
    )


def with_tower_outputs(model: VLM, batch: dict[str, Any]) -> Arrays:
    """The batch with what the frozen tower makes of its "pixels" (uint8 [N, S, S, 3]), if it holds any.

    "frozen" are the tower's parameters; no gradient is asked of them.
    """
    if "pixels" not in batch:
        return batch
    size = model.tower_size
    assert size is not None
    needs = COMPRESSORS[model.compressor_name].needs(size, dict(model.options))
    made = tower_features(size, batch["frozen"], normalise(batch["pixels"], size), needs)
    left = {name: values for name, values in batch.items() if name not in ("pixels", "frozen")}
    return left | jax.lax.stop_gradient(made)


def normalise(pixels: jax.Array, size: TowerSize) -> jax.Array:
    """Pictures, uint8 [N, S, S, 3], as the tower's input, float32: what `images.preprocess` gives.

    Looked up, not computed: XLA's own product, difference and quotient may round otherwise than numpy's.
    """
    levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    table = images.normalise(levels, 1 / 255, size.mean, size.std)
    return jnp.asarray(table)[pixels, jnp.arange(3)]


def features_of(batch: Arrays) -> Features | None:
    """Tower outputs in a batch; None for a blind model."""
    if "selected" not in batch:
        return None
    given: dict[str, Any] = {name: batch[name] for name in Features._fields if name in batch}
    return Features(**given)


def model_inputs(batch: Arrays) -> Inputs:
    """The batch as the model reads it; it may lack what belongs to no prompt, or what the method ignores."""
    given: dict[str, Any] = {name: batch[name] for name in Inputs._fields if name in batch}
    return Inputs(**given | {"features": features_of(batch), "answers": _answers(batch)})


def _answers(batch: Arrays) -> jax.Array | None:
    """Which tokens are to be said: each stands behind the position that predicts it."""
    if "target_mask" not in batch:
        return None
    rows = jnp.arange(batch["tokens"].shape[0])[:, None]
    none = jnp.zeros(batch["tokens"].shape, bool)
    # A target that is padding has position 0, and its mask says no.
    return none.at[rows, batch["target_positions"] + 1].max(batch["target_mask"])


def init_params(model: VLM, batch: Arrays, seed: int) -> Params:
    """Fresh parameters; `batch` gives shapes only."""
    inputs = model_inputs(with_tower_outputs(model, batch))
    return layers.init_params(model, jax.random.key(seed), inputs, batch["target_positions"])


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then cosine to 2 percent of the peak."""
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, config.steps, 0.02 * peak)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm; matrices decay, norms and biases do not."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=0.9,
            b2=0.98,
            weight_decay=config.weight_decay,
            # By name, because the scan over layers stacks norm scales into matrices.
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: path[-1].key not in ("scale", "bias"), params
            ),
        ),
    )


def init_state(model: VLM, optimizer: optax.GradientTransformation, batch: Arrays, seed: int) -> TrainState:
    """State before the first step."""
    params = init_params(model, batch, seed)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def loss_sum(
    model: VLM, params: Params, batch: Arrays, step: jax.Array | None = None, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy summed over supervised positions, and how many there are; float32.

    A nested compressor that trains all of its counts gives the mean of their sums (M3, arXiv 2405.17430), one
    that trains a drawn count the sum at that of `step`, or at all tokens where `step` is None (MQT, arXiv
    2405.19315, draws from its second stage on).
    """
    batch = with_tower_outputs(model, batch)
    inputs, places = model_inputs(batch), batch["target_positions"]
    method = COMPRESSORS[model.compressor_name]
    if inputs.features is None or method.nested is None:
        return _sum(model, params, inputs, places, batch), jnp.sum(batch["target_mask"])
    largest, counts = model.visual_tokens, method.nested(model.visual_tokens)
    if method.trains_all:
        total = jnp.float32(0)
        for count in counts:
            shorter, moved = narrow(inputs, places, largest, count, model.block_rows, model.full_rows)
            total += _sum(model.clone(visual_tokens=count, largest=largest), params, shorter, moved, batch)
        return total / len(counts), jnp.sum(batch["target_mask"])
    if step is not None:
        drawn = jax.random.randint(jax.random.fold_in(jax.random.key(seed), step), (), 0, len(counts))
        inputs = inputs._replace(visual_count=jnp.asarray(counts, jnp.int32)[drawn])
    return _sum(model, params, inputs, places, batch), jnp.sum(batch["target_mask"])


def plain_loss_sum(model: VLM, params: Params, batch: Arrays) -> tuple[jax.Array, jax.Array]:
    """As `loss_sum`, at the model's own number of visual tokens whatever the method trains."""
    batch = with_tower_outputs(model, batch)
    total = _sum(model, params, model_inputs(batch), batch["target_positions"], batch)
    return total, jnp.sum(batch["target_mask"])


def _sum(model: VLM, params: Params, inputs: Inputs, places: jax.Array, batch: Arrays) -> jax.Array:
    logits = model.apply({"params": params}, inputs, places)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target_ids"])
    return jnp.sum(losses * batch["target_mask"])


def make_train_step(
    model: VLM, optimizer: optax.GradientTransformation, seed: int = 0
) -> Callable[[TrainState, Arrays], tuple[TrainState, Arrays]]:
    """The step `(state, batch) -> (state, metrics)`; the loss is the mean over all supervised tokens.

    A batch without a supervised token gives loss 0 and zero gradients, never a NaN. What a step draws at
    random depends on `seed` and the number of the step alone.
    """

    def train_step(state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        def mean_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            total, count = loss_sum(model, params, batch, state.step, seed)
            return total / jnp.maximum(count, 1), count

        (loss, count), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "target_tokens": count}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
