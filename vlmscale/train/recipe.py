"""The recipe of a cell: which parts train and how fast, schedule, optimiser, dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlmscale.config import Cell, TrainConfig, from_dict, trains_reducer
from vlmscale.models.vlm import VLM
from vlmscale.records import read_json
from vlmscale.train.step import Objective, build_model


def trained_parts(cell: Cell) -> dict[str, float]:
    """The parts of a cell that train, with what the learning rate is multiplied with in each."""
    train, sees = cell.train, cell.compressor.visual_tokens > 0
    rates = {
        "compressor": train.compressor_rate if sees else 0.0,
        "decoder": train.llm_rate,
        "tower": train.tower_rate,
        "reducing": train.reducer_rate if trains_reducer(cell) else 0.0,
    }
    return {part: rate for part, rate in rates.items() if rate}


def stages(cell: Cell) -> list[Cell]:
    """The cell behind those whose runs it starts from, the first stage first.

    Raises:
      UserError: such a run is gone.
    """
    found = [cell]
    while found[0].train.init_from:
        found.insert(0, from_dict(read_json(Path(found[0].train.init_from) / "spec.json")["config"]))
    return found


def tower_source(cell: Cell) -> str:
    """The run that trained the tower which a cell has frozen; "" for the one that it names itself."""
    while cell.train.init_from:
        earlier = from_dict(read_json(Path(cell.train.init_from) / "spec.json")["config"])
        if earlier.train.tower_rate:
            return cell.train.init_from
        cell = earlier
    return ""


def compute_dtype(train: TrainConfig) -> Any:
    """What a cell computes in on this machine."""
    if train.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(train.dtype)


def training_model(cell: Cell, vocab_size: int, block_rows: int = 1) -> VLM:
    """The model as it trains: the cell's dtype, remat policy and attention."""
    train = cell.train
    return build_model(cell, vocab_size).clone(
        dtype=compute_dtype(train), remat=train.remat, attention=train.attention, block_rows=block_rows
    )


def make_objective(cell: Cell, model: VLM) -> Objective:
    """What a cell makes smaller."""
    train = cell.train
    return Objective(model, train.loss_rows, train.loss_chunk, train.llm_rate > 0)


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to 1, then a cosine; the learning rate and the rates of parts multiply it."""
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, config.warmup_steps, config.steps, config.final_rate)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW for a learning rate of 1, behind clipping by the global norm if there is any.

    Matrices decay, norms and biases do not. LLaVA's scripts name a norm of 1 that never reaches DeepSpeed, so
    their recipe in effect is without clipping; configs/llava_*.py say `clip_norm=0`.
    """
    adam = optax.adamw(
        make_schedule(config),
        b1=0.9,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        # By name, because the scan over layers stacks norm scales into matrices.
        mask=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key not in ("scale", "bias"), params
        ),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam
