"""Several processes as one: how they find each other, what each supplies, and how they part.

One process needs none of this, and all of it works there too. What jax itself does, as measured with 0.10.2:
a process that cannot reach the coordinator ends with SIGABRT after twice the timeout, and pages of C++; when
process 0 dies the others end with SIGABRT at once, after any other's death within 100 s; and one that ends by
itself, whatever its exit code, waits 300 s for the others to end too and then aborts. Hence the own clock of
`start`, and `leave`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlmscale.errors import RetryableError, UserError

_ROW_AXES = ("data", "fsdp")  # mesh axes that split a batch, the first outermost
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"  # mpirun within a Slurm job: its ranks are not Slurm's tasks
_SHAPE = re.compile(r"(?P<address>[^,\s]+:\d+),(?P<count>\d+),(?P<index>\d+)")
_LATER_S = 60  # by which jax's own timeout, which aborts, comes after ours
_POLL_S = 0.2


def start(spec: str, timeout_s: float = 300.0) -> None:
    """Join the other processes. To be called before anything that asks jax for devices.

    Args:
      spec: "" for a process alone; "auto" for what Slurm, a TPU pod, GKE or Open MPI says;
        "HOST:PORT,COUNT,INDEX" with the address of process 0.
      timeout_s: seconds in which all processes have to be there.

    Raises:
      UserError: a malformed spec, nothing around that "auto" knows, a port that process 0 cannot have, or
        processes that do not come together in time at an address that was given.
      RetryableError: those of a pod do not: a host may have come up late. After this and the last of the
        others the process has to end.
    """
    if not spec:
        return
    # On CPUs two programs at a time may wait for each other's collectives, in another order in each process.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if spec == "auto":
        slurm = _OPEN_MPI not in os.environ and all(name in os.environ for name in _SLURM)
        words = _slurm(os.environ) if slurm else {}
    else:
        words = _coordinator(spec)
    if words and words["process_id"] == 0:
        _check_port(words["coordinator_address"])
    failed = _initialize(words, timeout_s)
    if isinstance(failed, ValueError) and not words:
        hint = "; within a Slurm job start with srun" if "SLURM_JOB_ID" in os.environ else ""
        raise UserError(
            "--distributed=auto: no Slurm step, TPU pod, GKE or Open MPI is found around this process; give "
            f"HOST:PORT,COUNT,INDEX{hint}"
        ) from failed
    if failed is not None:
        raise failed


def _coordinator(spec: str) -> dict[str, Any]:
    """Arguments of jax.distributed.initialize from HOST:PORT,COUNT,INDEX."""
    found = _SHAPE.fullmatch(spec)
    if found is None or not 0 < int(found["address"].rpartition(":")[2]) < 2**16:
        raise UserError(
            f"--distributed={spec}: give auto, or HOST:PORT,COUNT,INDEX such as 10.0.0.1:8476,4,0"
        )
    count, index = int(found["count"]), int(found["index"])
    if index >= count:
        raise UserError(f"--distributed={spec}: INDEX must be less than COUNT; the first process has INDEX 0")
    return _arguments(found["address"], count, index)


def _arguments(address: str, count: int, index: int, devices: list[int] | None = None) -> dict[str, Any]:
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "local_device_ids": devices,
        "cluster_detection_method": "deactivate",  # else a Slurm job around it would choose the devices
    }


def _slurm(env: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of jax.distributed.initialize from a task of srun.

    jax's own reading takes node names as they stand, which often are no host names, and gives every process
    one GPU, also one that has the node for itself.
    """
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        # jax's rule: above what most systems give to clients, and different for each job of an array.
        port = env.get("JAX_COORDINATOR_PORT") or str(61440 + int(env["SLURM_JOB_ID"]) % 4096)
        address = f"{slurm_host(env['SLURM_STEP_NODELIST'])}:{port}"
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT of process 0")
    count = int(env["SLURM_NTASKS"])
    alone = env.get("SLURM_NTASKS_PER_NODE") == "1" or env.get("SLURM_STEP_NUM_NODES") == str(count)
    # Where Slurm gives each task its own GPUs the task sees no others, and counts them from 0.
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    own = "SLURM_GPUS_PER_TASK" in env or (visible != "" and "," not in visible)
    devices = None if alone or own else [int(env["SLURM_LOCALID"])]
    return _arguments(address, count, int(env["SLURM_PROCID"]), devices)


def slurm_host(nodes: str) -> str:
    """A host name or address of the first of the nodes, such as `node[001-015,020],host2`.

    Raises:
      UserError: it is no host name here, and Slurm knows no address of it.
    """
    return _host(_first_node(nodes))


def _first_node(nodes: str) -> str:
    """First name of a list such as `node[001-015,020],host2`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: names no node; set JAX_COORDINATOR_ADDRESS=HOST:PORT")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _host(node: str) -> str:
    """A host name or address of a Slurm node: its name where that resolves, else what Slurm knows."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except (OSError, UnicodeError):
        pass
    try:
        words = ["scontrol", "show", "node", node, "-o"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    found = re.search(r"\bNodeAddr=(\S+)", said)
    if found is None:
        raise UserError(
            f"Slurm node {node}: is no host name here and scontrol knows no address of it; set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT of the first node"
        )
    return found[1]


def _check_port(address: str) -> None:
    """Refuse a port that this machine cannot give: jaxlib crashes on one, or shares it with another run."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(
            f"{address}: process 0 cannot listen on this port of its machine ({error.strerror}); another run "
            "may have it, choose another port"
        ) from error


def _initialize(words: dict[str, Any], timeout_s: float) -> Exception | None:
    """Call jax.distributed.initialize within `timeout_s`; returns what it raised, or raises as `start` does.

    It runs in a thread, for jax ends the whole process where its own timeout passes.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            jax.distributed.initialize(**words, initialization_timeout=int(timeout_s) + _LATER_S)
        except Exception as error:  # raised in the thread of the caller
            failed.append(error)

    thread = threading.Thread(target=run, name="start", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive() and not words:
        raise RetryableError(
            f"the processes that --distributed=auto found did not come together within {timeout_s:.0f} s; if "
            "that happens again, check that all hosts run and reach the port of the first one"
        )
    if thread.is_alive():
        raise UserError(
            f"the {words['num_processes']} processes did not come together at {words['coordinator_address']} "
            f"within {timeout_s:.0f} s; check that process 0 runs on that machine, that the others reach its "
            "port, and that all were started with the same address and count, each with its own index"
        )
    return failed[0] if failed else None


def leader() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """The leader's number, on all processes; each has to call it.

    Raises:
      OverflowError: the number takes more than 64 bits.
    """
    # As bytes: jax would make 32 bits of a number without a word.
    whole = np.frombuffer(int(value).to_bytes(8, "little", signed=True), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(whole), np.uint8)
    return int.from_bytes(told.tobytes(), "little", signed=True)


def barrier(name: str) -> None:
    """Wait until every process is here.

    Raises:
      AssertionError: another process waits at a barrier of another name.
    """
    multihost_utils.sync_global_devices(name)


def wait_for_leader(path: Path) -> None:
    """Wait, however long it takes, until the leader has put a file on the shared disk.

    The leader writes it under another name and renames it. Should it die meanwhile, jax ends this process.
    """
    while not path.exists():
        time.sleep(_POLL_S)


def host_part(
    mesh: Mesh,
    process: int | None = None,
    owner: Callable[[jax.Device], int] = lambda device: device.process_index,
) -> tuple[int, int]:
    """Which rows of a batch a process has to supply, when rows lie over the mesh axes data and fsdp.

    Args:
      mesh: of `vlmscale.sharding.make_mesh`.
      process: its number; None for this one.
      owner: number of the process that a device belongs to.

    Returns:
      (index, count): of B rows the process makes [index * B / count, (index + 1) * B / count). Processes
      whose devices hold the same rows, as those along the tensor axis do, have the same index.

    Raises:
      UserError: the rows of some process are not one block, or not one that divides the batch evenly; it is
        raised on all processes.
    """
    process = jax.process_index() if process is None else process
    axes = [mesh.axis_names.index(axis) for axis in _ROW_AXES]
    parts = np.moveaxis(mesh.devices, axes, range(len(axes)))
    parts = parts.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held: dict[int, list[int]] = {}  # parts of the batch, ascending, by process
    for part, devices in enumerate(parts):
        for number in {owner(device) for device in devices}:
            held.setdefault(number, []).append(part)
    size = len(next(iter(held.values())))
    for number, own in sorted(held.items()):
        if own != list(range(own[0], own[0] + size)) or own[0] % size:
            shape = ", ".join(f"mesh.{name}={length}" for name, length in mesh.shape.items())
            raise UserError(
                f"{shape}: of {len(parts)} parts of a batch process {number} would hold {own}, and each "
                "process must hold one block of the same size; choose another mesh"
            )
    return held[process][0] // size, len(parts) // size


def leave(code: int, patience_s: float = 10.0) -> NoReturn:
    """End this process with `code` although the others may go on: for failures that may be of this one alone.

    Those that fail alike within `patience_s` part in order, each with its own code. If this is the leader,
    jax ends the others at once after that; else they notice within 100 s. Nothing that is registered with
    atexit runs.
    """
    parting = threading.Thread(target=jax.distributed.shutdown, name="leave", daemon=True)
    parting.start()
    parting.join(patience_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
