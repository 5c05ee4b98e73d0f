"""Checkpoints onto a mesh: a process reads only its shards, one at a time, and accounts for every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vlmscale.errors import UserError
from vlmscale.weights.checkpoint import UNREADABLE, Checkpoint
from vlmscale.weights.tables import FORMS, Index, Row, Table

Progress = Callable[[str, int, int], None]


class Source(NamedTuple):
    """A checkpoint and the table that explains its names."""

    checkpoint: Checkpoint
    table: Table


@dataclass
class Report:
    """What became of every parameter and every tensor."""

    loaded: list[str] = field(default_factory=list)  # our paths
    initialised: list[str] = field(default_factory=list)  # our paths
    not_needed: list[str] = field(default_factory=list)  # their names
    num_params: int = 0

    def __str__(self) -> str:
        text = f"loaded {len(self.loaded)} parameters ({self.num_params:,} numbers)"
        text += f", initialised {len(self.initialised)}{_some(self.initialised)}"
        return f"{text}, not needed {len(self.not_needed)}{_some(self.not_needed)}"


def _some(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3])
    return f" ({shown}{', ...' if len(names) > 3 else ''})"


@dataclass(frozen=True)
class _Plan:
    """Where one of our leaves comes from: the tensor of each layer, or the one tensor."""

    checkpoint: Checkpoint
    names: tuple[str, ...]
    row: Row
    stacked: bool

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """Our part at `index` (slices with bounds), in C order; a stack holds one layer twice, not all."""
        form = FORMS[self.row.form]

        def part(name: str, index: Index) -> np.ndarray:
            taken = form.take(index, self.checkpoint.tensors[name].shape)
            return form.ours(self.checkpoint.read(name, taken), index)

        if not self.stacked:
            return np.ascontiguousarray(part(self.names[0], index), dtype)
        out = np.empty([cut.stop - cut.start for cut in index], dtype)
        for number, name in enumerate(self.names[index[0]]):
            out[number] = part(name, index[1:])
        return out


def load_params(
    places: dict[str, Any],
    sources: Sequence[Source],
    initialise: Callable[[], dict[str, Any]] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[dict[str, Any], Report]:
    """Read what the sources hold, then initialise only what is missing.

    Args:
      places: `jax.ShapeDtypeStruct` with sharding a parameter, as `vlmscale.sharding.place` gives them; what
        is read is cast to their dtypes.
      sources: checkpoints with their tables; no two may hold the same parameter.
      initialise: makes fresh parameters of the whole model, jitted here so that only the missing ones are
        computed, in place on the mesh; None where nothing may be missing.
      progress: called with (what, parameters done, parameters in all).

    Returns:
      The parameters, sharded, and the report.

    Raises:
      UserError: a tensor is missing, misshapen, no floating-point numbers, or claimed by no row of its table.
      ValueError: two sources hold the same parameter.
    """
    flat = flatten_dict(places, sep="/")
    plans: dict[str, _Plan] = {}
    report = Report()
    for source in sources:
        found = account_for(source, flat, report)
        if twice := sorted(found.keys() & plans.keys()):
            raise ValueError(f"parameter {twice[0]}: two sources hold it")
        plans |= found
    report.initialised = sorted(flat.keys() - plans.keys())
    if report.initialised and initialise is None:
        where = " and ".join(str(source.checkpoint.directory) for source in sources)
        raise UserError(f"{where}: parameter {report.initialised[0]} is not there, nor is it to be made anew")
    out: dict[str, jax.Array] = {}
    for number, (path, plan) in enumerate(plans.items()):
        out[path] = _read_onto(flat[path], plan)
        report.num_params += math.prod(flat[path].shape)
        progress("loading parameters", number + 1, len(plans))
    report.loaded = sorted(plans)
    if report.initialised and initialise is not None:
        missing = {path: flat[path] for path in report.initialised}
        out |= initialise_missing(initialise, missing)
    return unflatten_dict(out, sep="/"), report


def account_for(source: Source, flat: dict[str, Any], report: Report) -> dict[str, _Plan]:
    """Where the parameters that the source's table names come from, with every tensor accounted for.

    Args:
      source: a checkpoint and its table.
      flat: shapes of the model's parameters by path.
      report: what is not needed is noted there.

    Raises:
      UserError: a tensor is missing, misshapen, no floating-point numbers, there twice, or claimed by no row
        of the table.
    """
    checkpoint, table = source
    canonical: dict[str, str] = {}
    for name in sorted(checkpoint.tensors):
        spelt = table.canonical(name)
        if spelt in canonical:
            raise UserError(f"{checkpoint.directory}: {canonical[spelt]} and {name} are the same parameter")
        canonical[spelt] = name
    plans, used = {}, set()
    for path, leaf in flat.items():
        found = table.row_of(path)
        if found is None:
            continue
        row, layer = found
        stacked = "{i}" in row.theirs and layer is None
        numbers: list[int | None] = list(range(leaf.shape[0])) if stacked else [layer]
        wanted = [row.theirs.replace("{i}", str(number)) for number in numbers]
        for name in wanted:
            if name not in canonical:
                raise UserError(f"{checkpoint.directory}: tensor {name} is missing (it is our {path})")
        names = tuple(canonical[name] for name in wanted)
        for name in names:
            _check(checkpoint, name, row, leaf.shape[1:] if stacked else leaf.shape, path)
        used.update(wanted)
        plans[path] = _Plan(checkpoint, names, row, stacked)
    for spelt, name in canonical.items():
        if spelt in used:
            continue
        claiming = table.claims(spelt)
        if table.ignores(spelt) or (claiming is not None and claiming.spare):
            report.not_needed.append(name)
            continue
        file = checkpoint.tensors[name].file
        raise UserError(
            f"{file}: tensor {name} is unknown: the model that config.json describes has no such parameter"
        )
    return plans


def _check(checkpoint: Checkpoint, name: str, row: Row, shape: tuple[int, ...], path: str) -> None:
    """Compare shapes by asking what a parameter of ours would look like as their tensor; and see the type."""
    tensor = checkpoint.tensors[name]
    if tensor.dtype == UNREADABLE:
        checkpoint.read(name)  # raises, and says what it is stored as
    if not jax.numpy.issubdtype(tensor.dtype, np.floating):
        raise UserError(
            f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, not as floating-point numbers; "
            "quantised checkpoints are not read, take the model as it was before"
        )
    zero = np.broadcast_to(np.zeros((), np.int8), shape)  # takes no memory, whatever its shape
    wanted = FORMS[row.form].theirs(zero).shape
    if tensor.shape != wanted:
        raise UserError(
            f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
            f"{list(wanted)} (our {path})"
        )


def _read_onto(place: jax.ShapeDtypeStruct, plan: _Plan) -> jax.Array:
    """One parameter, shard by shard: no more than one of them is on the host at a time."""
    where = place.sharding.addressable_devices_indices_map(place.shape)
    by_index: dict[tuple, list[jax.Device]] = {}
    for device, index in where.items():
        bounds = tuple(part.indices(length)[:2] for part, length in zip(index, place.shape, strict=True))
        by_index.setdefault(bounds, []).append(device)
    shards: dict[jax.Device, jax.Array] = {}
    for bounds, devices in by_index.items():
        part = plan.read(tuple(slice(*pair) for pair in bounds), place.dtype)
        for device in devices:
            shards[device] = jax.device_put(part, device)
        jax.block_until_ready(list(shards.values()))
    return jax.make_array_from_single_device_arrays(
        place.shape, place.sharding, [shards[device] for device in where]
    )


def initialise_missing(
    initialise: Callable[[], dict[str, Any]], missing: dict[str, Any]
) -> dict[str, jax.Array]:
    """Fresh values of the missing parameters alone, born where they live.

    Args:
      initialise: makes fresh parameters of the whole model.
      missing: shapes with shardings by path.
    """

    def make() -> dict[str, jax.Array]:
        fresh = flatten_dict(initialise(), sep="/")
        return {path: fresh[path].astype(leaf.dtype) for path, leaf in missing.items()}

    return jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in missing.items()})()
