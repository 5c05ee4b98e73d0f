"""The device mesh, and the one table that says which logical axis of an array lies on which mesh axis.

Three mesh axes: `data` and `fsdp` split the batch, `fsdp` and `tensor` split the parameters. Modules name
their parameters' logical axes beside the shapes (`vlmscale.layers`); nothing else knows the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlmscale.errors import UserError

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "patch": None,
    "position": None,
    "layers": None,
    "norm": None,
}
LARGE = 2**20  # bytes; a parameter above this may not lie whole on every device of a mesh that could split it


def make_mesh(
    data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, or over those given. Of several TPU slices `data` has each as a block.

    Args:
      data: devices along the batch; 0 for all that the other two leave.
      fsdp: devices that split batch and parameters.
      tensor: devices that split heads, MLPs and vocabulary.

    Raises:
      UserError: the product is not the number of devices (jax itself would leave some idle, silently), or
        fsdp or tensor would reach from one slice into another.
    """
    devices = jax.devices() if devices is None else devices
    data = data or max(len(devices) // (fsdp * tensor), 1)
    if data * fsdp * tensor != len(devices):
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor}: the product must be the number of devices, "
            f"{len(devices)}"
        )
    shape, kinds = (data, fsdp, tensor), (AxisType.Auto,) * 3  # Linen's constraints fail under Explicit axes
    slices = slice_count(devices)
    if data % slices:
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}: there are {slices} slices, and fsdp "
            f"and tensor may not reach from one into another; mesh.data must be a multiple of {slices}"
        )
    if slices == 1 and len({device.process_index for device in devices}) == 1:
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    # jax's own order follows the wires of a TPU pod, and tears the rows of a host apart on most of them; so
    # does mesh_utils.create_hybrid_device_mesh, which has that order in each slice.
    ordered = sorted(devices, key=lambda device: (_slice_of(device), device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=kinds)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices are of: what their own wires do not join, but a slower network does.

    Of GPUs jax calls each host a slice; their hosts' network carries fsdp as well, so that they count as one.
    """
    return len({_slice_of(device) for device in devices})


def _slice_of(device: jax.Device) -> int:
    return device.slice_index if device.platform == "tpu" and hasattr(device, "slice_index") else 0


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, block_rows: int = 1, accumulate: int = 1) -> None:
    """Refuse a batch whose parts of whole blocks of rows do not divide over the devices.

    Raises:
      UserError: with the number of devices.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (devices * block_rows * accumulate):
        blocks = f" times data.pack_rows={block_rows}" * (block_rows > 1)
        parts = f" times train.accumulate={accumulate}" * (accumulate > 1)
        raise UserError(
            f"train.batch_size={batch_size}: must be a multiple of the {devices} devices{blocks}{parts} "
            "(mesh.data times mesh.fsdp of them split a batch)"
        )


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, processes: int = 1, accumulate: int = 1
) -> dict[str, Any]:
    """This process's rows of a batch to the devices, rows split over the data and fsdp axes.

    Args:
      batch: arrays [b, ...] of this process.
      mesh: the devices.
      processes: how many processes make different rows (`vlmscale.distributed.host_part`); the whole batch
        has `processes` times as many.
      accumulate: parts that a batch is computed in; with several, arrays become [accumulate, b', ...].
        Rows that were neighbours stay neighbours, and none moves to another device for it.
    """
    rows = PartitionSpec(("data", "fsdp"))
    where = NamedSharding(mesh, rows if accumulate == 1 else PartitionSpec(None, *rows))
    out = {}
    for name, values in batch.items():
        if accumulate > 1:
            values = values.reshape(accumulate, len(values) // accumulate, *values.shape[1:])
        at = int(accumulate > 1)
        shape = (*values.shape[:at], values.shape[at] * processes, *values.shape[at + 1 :])
        out[name] = jax.make_array_from_process_local_data(where, values, shape)
    return out


def place(boxed: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """Where parameters live: abstract arrays with shardings from abstract arrays with logical axes.

    A dimension that its mesh axis does not divide stays whole, as do those without a mesh axis. A parameter
    above `LARGE` bytes that would lie whole on every device after that is split along any named dimension
    but `layers`, the longest first: a tower's position table, for one, has nothing on the tensor axis of a
    mesh without fsdp. Along `layers` it would not help, since a scan reads one layer at a time.

    Args:
      boxed: what `vlmscale.layers.abstract_params` returns.
      mesh: of `make_mesh`.
      dtype: of the parameters; None leaves it as the modules have it.

    Returns:
      The same tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      UserError: a parameter above `LARGE` bytes would lie whole on every device of a mesh with fsdp or
        tensor above 1, whether it has no axes or none that divides.
      ValueError: a logical axis that `RULES` does not know.
    """

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        array = leaf.value if isinstance(leaf, nn.LogicallyPartitioned) else leaf
        array = jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)
        spec = _spec(name, array.shape, axes, mesh)
        size, could = array.size * array.dtype.itemsize, mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
        if size > LARGE and could and _parts(spec, mesh) == 1:
            spec = _split_anywhere(array.shape, axes, mesh)
            if _parts(spec, mesh) == 1:
                raise UserError(
                    f"parameter {name} {tuple(array.shape)} is {size / 2**20:.1f} MiB and would lie whole on "
                    f"every device: none of its axes {axes} divides by fsdp={mesh.shape['fsdp']} or "
                    f"tensor={mesh.shape['tensor']}; choose another mesh"
                )
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def _spec(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    where: list[str | None] = []
    for length, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"parameter {name}: logical axis {axis} is not in sharding.RULES")
        on = RULES[axis] if axis is not None else None
        divides = on is not None and length % mesh.shape[on] == 0
        where.append(on if divides and on not in where else None)
    return PartitionSpec(*where)


def _split_anywhere(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """One named dimension, the longest that divides, over fsdp or else tensor; nowhere if none does."""
    for at in sorted(range(len(shape)), key=lambda at: -shape[at]):
        for on in ("fsdp", "tensor"):
            if axes[at] not in (None, "layers") and mesh.shape[on] > 1 and shape[at] % mesh.shape[on] == 0:
                return PartitionSpec(*(on if other == at else None for other in range(len(shape))))
    return PartitionSpec(*(None for _ in shape))


def _parts(spec: PartitionSpec, mesh: Mesh) -> int:
    """Into how many pieces a parameter is cut."""
    return math.prod(mesh.shape[axis] for axis in spec if axis is not None)


def to_host(array: jax.Array, mesh: Mesh) -> np.ndarray:
    """The whole of an array that may lie in parts on several devices, to every process."""
    return np.asarray(jax.device_put(array, replicated(mesh)))
