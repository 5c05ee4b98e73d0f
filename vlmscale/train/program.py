"""The program of a training step, in the abstract: what training compiles, here or for another machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from vlmscale.config import Cell
from vlmscale.models.vlm import VLM
from vlmscale.sharding import replicated
from vlmscale.train.recipe import make_objective, make_optimizer, trained_parts, training_model
from vlmscale.train.state import Places, abstract_state, lay_out, stacked
from vlmscale.train.step import Params, TrainState, make_train_step

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


class Program(NamedTuple):
    """A jitted step and the shapes and places of what it works on.

    Attributes:
      model: that trains.
      places: where parameters live, of one cell.
      step: from (state, frozen, batch, knobs) to (state, metrics); of several cells all but frozen and batch
        have a first axis for them.
      optimizer: of the state.
      abstract: shapes and places of the state.
    """

    model: VLM
    places: Places
    step: Any
    optimizer: Any
    abstract: TrainState


def make_program(
    cell: Cell, vocab_rows: int, mesh: Mesh, tower: Params | None, block_rows: int = 1, count: int = 1
) -> Program:
    """The step of a cell, or of several that differ in seed and learning rate alone; nothing is computed.

    Args:
      cell: the config.
      vocab_rows: of the embedding table.
      mesh: the devices, which need not be of this machine.
      tower: parameters of the tower where the cell computes with it, or their shapes.
      block_rows: rows that share their images.
      count: cells.

    Raises:
      UserError: a large parameter would lie whole on every device.
    """
    model = training_model(cell, vocab_rows, block_rows)
    places = lay_out(cell, model, mesh, tower)
    optimizer = make_optimizer(cell.train)
    objective = make_objective(cell, model)
    one = make_train_step(objective, optimizer, trained_parts(cell), cell.train.accumulate)
    abstract = stacked(abstract_state(optimizer, places.trained, mesh), count)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = jax.jit(
        jax.vmap(one, in_axes=(0, None, None, 0)) if count > 1 else one,
        donate_argnums=0,
        out_shardings=(where, replicated(mesh)),
    )
    return Program(model, places, step, optimizer, abstract)
