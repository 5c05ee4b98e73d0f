"""State, optimiser, loss and the training step: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlmscale import layers
from vlmscale.compressors import Features
from vlmscale.config import Cell, TrainConfig
from vlmscale.models.sizes import SIZES
from vlmscale.models.vlm import VLM

Params = dict[str, Any]
Arrays = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array  # int32 scalar: steps done
    params: Params
    opt_state: Any


def build_model(cell: Cell, vocab_size: int, layout: str = "scan") -> VLM:
    """The model of a cell, behind the tower; `layout` is the decoder's."""
    compressor = cell.compressor
    return VLM(SIZES[cell.llm.name], vocab_size, compressor.name, compressor.visual_tokens, layout=layout)


def features_of(batch: Arrays) -> Features | None:
    """Tower outputs in a batch; None for a blind model."""
    if "selected" not in batch:
        return None
    return Features(batch["selected"], batch.get("levels"))


def model_inputs(batch: Arrays) -> tuple[Any, ...]:
    """The batch as positional arguments of `VLM.__call__`."""
    names = ("tokens", "image_slots", "positions", "segment_ids")
    return (*(batch[name] for name in names), features_of(batch), batch["target_positions"])


def init_params(model: VLM, batch: Arrays, seed: int) -> Params:
    """Fresh parameters; `batch` gives shapes only."""
    return layers.init_params(model, jax.random.key(seed), *model_inputs(batch))


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


def loss_sum(model: VLM, params: Params, batch: Arrays) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy summed over supervised positions, and how many there are; float32."""
    logits = model.apply({"params": params}, *model_inputs(batch))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target_ids"])
    return jnp.sum(losses * batch["target_mask"]), jnp.sum(batch["target_mask"])


def make_train_step(
    model: VLM, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Arrays], tuple[TrainState, Arrays]]:
    """The step `(state, batch) -> (state, metrics)`; the loss is the mean over all supervised tokens.

    A batch without a supervised token gives loss 0 and zero gradients, never a NaN.
    """

    def train_step(state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        def mean_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            total, count = loss_sum(model, params, batch)
            return total / jnp.maximum(count, 1), count

        (loss, count), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "target_tokens": count}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
