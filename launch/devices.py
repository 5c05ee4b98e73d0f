"""What this machine has to run cohorts on: a core for each, or as many GPUs as its mesh has devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from vlmscale.config import MeshConfig
from vlmscale.errors import UserError


def platform() -> str:
    """What cohorts run on: CPUs, unless JAX_PLATFORMS says otherwise."""
    return (os.environ.get("JAX_PLATFORMS") or "cpu").partition(",")[0]


def units() -> list[str] | list[None]:
    """The cores, or the GPUs by name, that cohorts take; None where one takes all there is, as on TPUs."""
    if platform() in ("cuda", "gpu"):
        return _gpus() or [None]
    if platform() != "cpu":
        return [None]
    if hasattr(os, "sched_getaffinity"):
        return [str(core) for core in sorted(os.sched_getaffinity(0))]
    return [None] * max(1, (os.cpu_count() or 1) // 2)


def mesh_devices(mesh: MeshConfig, there: int, about: str) -> int:
    """Devices that a mesh takes of so many; data=0 is all.

    Args:
      mesh: of a config; an axis of 0 but data may be chosen later, and counts as 1.
      there: devices.
      about: the cell, for a message.

    Raises:
      UserError: it does not divide them.
    """
    inner = max(mesh.fsdp, 1) * max(mesh.tensor, 1)
    whole = mesh.data * inner or there
    if whole % inner:
        raise UserError(
            f"{about}: mesh.fsdp={mesh.fsdp} and mesh.tensor={mesh.tensor} do not divide {whole} devices; "
            "choose another mesh"
        )
    return whole


def needed(mesh: MeshConfig, there: Sequence[str | None], about: str) -> int:
    """How many of the units a cohort takes: on CPUs one, else the devices of its mesh.

    Args:
      mesh: of its config.
      there: units of this machine.
      about: the cohort, for a message.

    Raises:
      UserError: more than there are, or a mesh that does not divide them.
    """
    if platform() == "cpu" or there[0] is None:
        return 1
    whole = mesh_devices(mesh, len(there), about)
    if whole > len(there):
        raise UserError(
            f"{about}: its mesh has {whole} devices and this machine {len(there)}; choose another mesh"
        )
    return whole


def environment(mesh: MeshConfig, taken: Sequence[str | None]) -> dict[str, str]:
    """Variables of a cohort's process, by which it sees what it was given and no more.

    One process drives all devices of a machine, so none of several is needed here; on a core the devices of a
    mesh are threads.
    """
    found = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cpu"}
    if platform() in ("cuda", "gpu") and taken[0] is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, taken))
    if platform() == "cpu" and (whole := mesh_devices(mesh, 1, "") if mesh.data else 1) > 1:
        found["JAX_NUM_CPU_DEVICES"] = str(whole)
    return found


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use; none where they cannot be told apart."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [word.strip() for word in visible.split(",") if word.strip()]
    words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.split()
