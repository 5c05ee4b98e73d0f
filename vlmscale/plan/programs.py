"""The programs of a cell, ready to be compiled for devices that need not be here.

`train` is the step of the cell's stage; `tower` makes the outputs of a batch's pictures; `generate` answers a
batch of prompts.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from vlmscale.compressors.features import blocks_read
from vlmscale.config import Cell
from vlmscale.evaluate.generation import make_generate
from vlmscale.models.hiding import Passes
from vlmscale.models.sizes import TOWERS
from vlmscale.plan.abstract import (
    abstract_batch,
    abstract_knobs,
    abstract_pixels,
    abstract_prompts,
    abstract_tower,
    loop_layout,
    vocab_rows,
)
from vlmscale.sharding import place
from vlmscale.train.features import batch_size
from vlmscale.train.frozen import needs_of
from vlmscale.train.program import make_program
from vlmscale.train.recipe import compute_dtype
from vlmscale.train.state import Places, lay_out
from vlmscale.train.step import build_model
from vlmscale.train.together import tower_program
from vlmscale.weights import directory

PROGRAMS = ("tower", "train", "generate")


def programs_of(cell: Cell) -> list[str]:
    """Those that a cell runs."""
    sees, own = cell.compressor.visual_tokens > 0, not cell.train.tower_rate
    return [name for name in PROGRAMS if name != "tower" or (sees and own)]


def answering(cell: Cell, mesh: Mesh) -> Places:
    """Where the parameters of a cell's answers live, in the dtype of the computation."""
    model, dtype = build_model(cell, vocab_rows(cell)), compute_dtype(cell.train)
    trained, frozen = lay_out(cell, model, mesh, step_tower(cell), dtype)
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), trained)
    return Places(cast, frozen)


def lowered(program: str, cell: Cell, mesh: Mesh, length: int) -> Any:
    """A program, ready to be compiled.

    Args:
      program: of `PROGRAMS`.
      cell: the config, of the dtype and the attention that the devices would have.
      mesh: the devices.
      length: positions of a row or of a prompt; nothing to the tower.

    Raises:
      UserError: the mesh cannot hold the cell.
    """
    make = {"tower": _lower_tower, "train": _lower_train, "generate": _lower_generate}[program]
    return make(cell, mesh, length)


def step_tower(cell: Cell) -> Any:
    """Shapes of the tower's parameters where a step computes with them; None elsewhere."""
    needs = needs_of(cell)
    if not cell.compressor.visual_tokens or not (cell.train.tower_rate or "tower" in needs):
        return None
    return abstract_tower(cell, needs)


def _lower_train(cell: Cell, mesh: Mesh, length: int) -> Any:
    program = make_program(cell, vocab_rows(cell), mesh, step_tower(cell))
    batch, knobs = abstract_batch(cell, program.model, mesh, length), abstract_knobs(mesh)
    with jax.set_mesh(mesh):
        return program.step.lower(program.abstract, program.places.frozen, batch, knobs)


def tower_pictures(cell: Cell, devices: int) -> tuple[int, int]:
    """Pictures that go through the tower together on all devices, and in how many parts.

    Those of a batch where a step computes them, else as many a device as are stored together.
    """
    if cell.data.features == "computed":
        return cell.train.batch_size, cell.train.accumulate
    return devices * batch_size(TOWERS[cell.tower.name], needs_of(cell)), 1


def tower_places(cell: Cell, mesh: Mesh) -> Any:
    """Where the parameters of a frozen tower live."""
    size, needs = TOWERS[cell.tower.name], needs_of(cell)
    boxed = directory.abstract_tower(size, (blocks_read(size, needs),), probe="probe_attention" in needs)
    return place(boxed, mesh, compute_dtype(cell.train))


def _lower_tower(cell: Cell, mesh: Mesh, length: int) -> Any:
    count, parts = tower_pictures(cell, mesh.shape["data"] * mesh.shape["fsdp"])
    params, pixels = tower_places(cell, mesh), abstract_pixels(cell, mesh, count, parts)
    with jax.set_mesh(mesh):
        return tower_program([cell], parts).lower(params, pixels)


def _lower_generate(cell: Cell, mesh: Mesh, length: int) -> Any:
    model = build_model(cell, vocab_rows(cell), "loop").clone(dtype=compute_dtype(cell.train))
    trained, frozen = answering(cell, mesh)
    params = {**trained, **frozen}
    params["decoder"], tower = loop_layout(params["decoder"]), params.pop("tower", None)
    batch = abstract_prompts(cell, model, mesh, length)
    if tower is not None:
        batch["tower"] = tower
    rooms = None
    if model.appended:  # of prompts that begin with their picture
        rooms = Passes(model.image_slots, model.appended, max(length - model.image_slots, 1))
    generate: Any = make_generate(model, cell.evaluate.max_new_tokens, (0,), rooms=rooms)
    with jax.set_mesh(mesh):
        return generate.lower(params, batch)
