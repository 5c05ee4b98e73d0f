"""Training steps timed on the devices of this process, with random weights and batches, beside the roofline.

The first cell calibrates the efficiency of what bounds it; the others say how well that carries over.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.config import Cell, image_slots
from vlmscale.cost.peak import Device
from vlmscale.errors import UserError
from vlmscale.plan.abstract import abstract_batch, vocab_rows
from vlmscale.plan.fit import check_mesh, own_mesh
from vlmscale.plan.memory import predict_training
from vlmscale.plan.programs import step_tower
from vlmscale.plan.roofline import Efficiencies, StepTime, step_time
from vlmscale.plan.slices import GENERATIONS, Generation, Slice
from vlmscale.sharding import check_batch, make_mesh
from vlmscale.train.program import Program, make_program
from vlmscale.train.recipe import compute_dtype
from vlmscale.train.state import first_params, first_state
from vlmscale.train.step import Knobs
from vlmscale.validation import best_attention

_WARM_UP = 2  # steps that are not counted; the first compiles


@dataclass(frozen=True)
class Timed:
    """A cell that was timed.

    Attributes:
      cell: its config as it was run.
      mesh: data, fsdp, tensor.
      length: positions of a row.
      seconds: median of a step.
      bytes_: of a device, by this device's compiler: arguments and temporaries.
      peak: bytes that the device says were in use at most; None where it does not say.
      guess: bytes by arithmetic.
    """

    cell: Cell
    mesh: tuple[int, int, int]
    length: int
    seconds: float
    bytes_: int
    peak: int | None
    guess: int


def place_here() -> Slice:
    """The devices of this process as a slice; of a CPU with rates that are measured now.

    Raises:
      UserError: a device that no table here knows.
    """
    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    if devices[0].platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        flops, copied = ceilings()
        device = Device(kind, flops / count, copied / count)
        own = Generation(device, "", memory / count, copied, {count: str(count)}, host=count)
        return Slice(f"{kind}-{count}", own, str(count))
    for name, generation in GENERATIONS.items():
        if generation.device.kind == kind:
            chips = count // generation.devices
            return Slice(f"{name}-{count}", generation, str(chips))
    known = ", ".join(sorted({generation.device.kind for generation in GENERATIONS.values()}))
    raise UserError(f"this device is a {kind}, of which no rates are known here; there are {known}")


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large matrix product, bytes/s of a large copy, both float32, on one device."""
    side, rows = 2048, 2**25
    matrix, vector = jnp.ones((side, side)), jnp.ones(rows)
    seconds = []
    for run, array in ((jax.jit(lambda x: x @ x), matrix), (jax.jit(lambda x: x + 1), vector)):
        seconds.append(min(_times(lambda run=run, array=array: run(array), 5)))  # type: ignore[misc]
    return 2 * side**3 / seconds[0], 2 * vector.nbytes / seconds[1]


def time_step(cell: Cell, place: Slice, length: int, steps: int) -> Timed:
    """Train a cell for a few steps, on the mesh that it names or that training would choose.

    Args:
      cell: the config; starts from random numbers whatever it names.
      place: of `place_here`.
      length: positions of a row.
      steps: that count.

    Raises:
      UserError: its mesh or its batch does not divide over these devices.
    """
    platform = jax.devices()[0].platform
    check_mesh(cell, place)
    shape = own_mesh(cell, place)
    mesh = make_mesh(*shape)
    check_batch(cell.train.batch_size, mesh, cell.data.pack_rows, cell.train.accumulate)
    dtype = jnp.dtype(compute_dtype(cell.train)).name
    train = replace(
        cell.train,
        attention=best_attention(cell, platform),
        dtype=dtype,
        init_from="",
    )
    cell = replace(cell, train=train, llm=replace(cell.llm, checkpoint=""))
    program = make_program(cell, vocab_rows(cell), mesh, step_tower(cell))
    with jax.set_mesh(mesh):
        state, frozen, batch = _arrays(cell, program, mesh, length)
        knobs = Knobs(jnp.float32(1e-4), jnp.uint32(0))
        compiled = program.step.lower(state, frozen, batch, knobs).compile()
        held = [state]

        def step() -> Any:
            held[0], metrics = compiled(held[0], frozen, batch, knobs)
            return held[0], metrics

        seconds = statistics.median(_times(step, steps))
    stats = compiled.memory_analysis()
    bytes_ = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    bytes_ += stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    arguments, temporary, _ = predict_training(cell, shape, length)
    return Timed(cell, shape, length, seconds, bytes_, peak, arguments + temporary)


def _times(run: Callable[[], Any], count: int) -> list[float]:
    found = []
    for _ in range(_WARM_UP + count):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return found[_WARM_UP:]


def _arrays(cell: Cell, program: Program, mesh: Any, length: int) -> tuple[Any, Any, Any]:
    """A first state, what is frozen, and a batch of full rows with their picture in front."""
    shapes = step_tower(cell)
    tower = None
    if shapes is not None:
        tower = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes)
    params, _ = first_params(cell, program.model, program.places, tower)
    trained = {part: params[part] for part in program.places.trained}
    frozen = {part: params[part] for part in program.places.frozen}
    state = first_state(program.optimizer, trained, mesh)
    rng, visual, number = np.random.default_rng(0), image_slots(cell), np.arange(length)

    def fill(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values: Any
        if name in ("tokens", "target_ids", "query_tokens"):
            values = rng.integers(0, vocab_rows(cell), leaf.shape)
        elif name in ("positions", "target_positions"):
            values = np.broadcast_to(number, leaf.shape)
        elif name == "image_slots":
            values = np.broadcast_to(number < visual, leaf.shape)
        elif name == "target_mask":
            values = np.broadcast_to((number >= visual) & (number < length - 1), leaf.shape)
        elif name in ("segment_ids", "query_length"):
            values = np.ones(leaf.shape)
        elif name == "pixels":
            values = rng.integers(0, 256, leaf.shape)
        else:
            values = rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(np.asarray(values).astype(leaf.dtype), leaf.sharding)

    batch = abstract_batch(cell, program.model, mesh, length)
    return state, frozen, {name: fill(name, leaf) for name, leaf in batch.items()}


def predicted(timed: Timed, place: Slice, shares: Efficiencies) -> StepTime:
    """What the roofline says of a cell that was timed."""
    return step_time(timed.cell, place, timed.mesh, timed.length, timed.guess, shares)


def calibrate(timed: Timed, place: Slice) -> Efficiencies:
    """Efficiencies with which the roofline says of a cell what was timed, as far as a share of 1 goes."""
    shares = Efficiencies()
    told = predicted(timed, place, shares)
    share = float(getattr(shares, told.bound)) * told.seconds / timed.seconds
    return shares._replace(**{told.bound: min(1.0, share)})


def compare(timed: Sequence[Timed], place: Slice, shares: Efficiencies) -> list[dict[str, Any]]:
    """Predicted beside measured, a row for each cell; bytes are of a device."""
    rows = []
    for one in timed:
        told = predicted(one, place, shares)
        rows.append(
            {
                "llm": one.cell.llm.name,
                "visual_tokens": one.cell.compressor.visual_tokens,
                "batch_size": one.cell.train.batch_size,
                "length": one.length,
                "mesh": one.mesh,
                "measured_s": one.seconds,
                "predicted_s": told.seconds,
                "bound": told.bound,
                "flops": told.flops,
                "compiler_bytes": one.bytes_,
                "peak_bytes": one.peak,
                "predicted_bytes": one.guess,
            }
        )
    return rows
