"""What this machine has to run cohorts on: a core for each, or as many GPUs as its mesh has devices."""

from __future__ import annotations

import os
import subprocess

from vlmscale.config import MeshConfig
from vlmscale.errors import UserError


def platform() -> str:
    """What cohorts run on: CPUs, unless JAX_PLATFORMS says otherwise."""
    return (os.environ.get("JAX_PLATFORMS") or "cpu").partition(",")[0]


def places() -> list[int] | list[None]:
    """The cores, or the GPUs by number, that cohorts take; None where one takes all there is, as on TPUs."""
    if platform() in ("cuda", "gpu"):
        return list(_gpus()) or [None]
    if platform() != "cpu":
        return [None]
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * max(1, (os.cpu_count() or 1) // 2)


def needed(mesh: MeshConfig, there: int, about: str) -> int:
    """How many of `there` places a cohort takes: on CPUs one, else the devices of its mesh.

    Args:
      mesh: of its config; data=0 is all.
      there: places of this machine.
      about: the cohort, for a message.

    Raises:
      UserError: more than there are.
    """
    if platform() == "cpu" or there == 1:
        return 1
    whole = _devices(mesh) or there
    if whole > there:
        raise UserError(
            f"{about}: its mesh has {whole} devices and this machine {there}; choose another mesh"
        )
    return whole


def environment(mesh: MeshConfig, taken: list[int] | list[None]) -> dict[str, str]:
    """Variables of a cohort's process, by which it sees what it was given and no more.

    One process drives all devices of a machine, so none of several is needed here; on a core the devices of a
    mesh are threads.
    """
    found = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cpu"}
    if platform() in ("cuda", "gpu") and taken != [None]:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, taken))
    if platform() == "cpu" and _devices(mesh) > 1:
        found["JAX_NUM_CPU_DEVICES"] = str(_devices(mesh))
    return found


def _devices(mesh: MeshConfig) -> int:
    """Of a mesh; 0 where its config leaves that open."""
    return mesh.data * max(mesh.fsdp, 1) * max(mesh.tensor, 1)


def _gpus() -> list[int]:
    """Numbers of the GPUs that this process may use; none where they cannot be told apart."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        words = visible.split(",")
        return [int(word) for word in words] if all(word.strip().isdecimal() for word in words) else []
    words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in said.split()]
