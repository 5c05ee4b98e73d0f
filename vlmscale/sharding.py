"""The device mesh and where arrays live on it: batches split over `data`, parameters on every device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlmscale.errors import UserError


def make_mesh() -> Mesh:
    """One axis, `data`, over all devices. Auto axes: Linen's constraints fail under Explicit ones."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuse a batch that does not divide over the devices.

    Raises:
      UserError: with the number of devices.
    """
    devices = mesh.shape["data"]
    if batch_size % devices:
        raise UserError(f"train.batch_size={batch_size}: must be a multiple of the {devices} devices")


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Host batch to devices, rows split over the data axis."""
    return jax.device_put(batch, batch_sharding(mesh))
