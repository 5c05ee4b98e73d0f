"""Processes that find each other, share a batch and part: layouts in one process, the rest in real ones."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests.integration.processes import Child, at_work, free_port, told
from tests.integration.tiny import wait_for
from vlmscale.cli import _run
from vlmscale.distributed import agree, barrier, host_part, leader, start, wait_for_leader
from vlmscale.errors import RetryableError, UserError
from vlmscale.sharding import AXES, batch_sharding

SECONDS = 60  # for the processes of one test together; few are needed, and jax itself would take 100
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def around(name: str) -> bool:
    """Whether a variable says where and among whom this process runs."""
    return name.startswith(
        ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD", "CUDA_VISIBLE", "KUBERNETES_")
    )


@pytest.fixture
def nothing_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(around, list(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, nothing_around: None) -> list[dict[str, Any]]:
    """With what jax was to start; it does not."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: calls.append(words))
    return calls


def joined(calls: list[dict[str, Any]]) -> tuple[str, int, int, list[int] | None]:
    """Address, count, index and devices of the one start."""
    (words,) = calls
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    assert words["cluster_detection_method"] == "deactivate"  # nothing around changes what is asked for
    return tuple(words[name] for name in names)  # type: ignore[return-value]


def test_a_process_alone_joins_nobody_and_agrees_with_itself(
    started: list[dict[str, Any]], tmp_path: Path
) -> None:
    start("")
    assert started == []
    assert leader()
    numbers = [0, -1, 2**31, 2**62 + 1, -(2**63)]
    assert [agree(number) for number in numbers] == numbers
    barrier("nobody else comes")
    wait_for_leader(tmp_path)
    with pytest.raises(OverflowError):
        agree(2**63)


@pytest.mark.parametrize("host", ["10.0.0.1", "node-3.cluster", "[fe80::1]"])
def test_a_plain_coordinator_is_taken_as_it_stands(host: str, started: list[dict[str, Any]]) -> None:
    start(f"{host}:8476,4,3")
    assert joined(started) == (f"{host}:8476", 4, 3, None)


@pytest.mark.parametrize(
    "spec",
    [
        *("Auto", " ", "10.0.0.1", "10.0.0.1:8476", "10.0.0.1:8476,4", "10.0.0.1,4,0", "10.0.0.1:0,4,0"),
        *(
            "a:70000,4,0",
            "a:8476,4,0,1",
            "a:8476,-4,0",
            "a:8476,4,-1",
            "a:8476,4,x",
            ":8476,4,0",
            "a:8476, 4,0",
        ),
    ],
)
def test_a_malformed_spec_is_one_line_with_an_example(spec: str, started: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"HOST:PORT,COUNT,INDEX such as 10.0.0.1:8476,4,0") as caught:
        start(spec)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)
    assert started == []


def test_hosts_of_a_pod_that_come_late_are_a_fault_and_no_mistake(
    nothing_around: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 2 a JobSet would fail for good."""
    over = threading.Event()
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: over.wait(60))
    try:
        with pytest.raises(RetryableError, match=r"auto found did not come together within 0 s"):
            start("auto", 0.1)
        with pytest.raises(UserError, match=r"the 4 processes did not come together at a:8476 within 0 s"):
            start("a:8476,4,3", 0.1)
        code = _run(Namespace(command="sweep", run=lambda *_: start("auto", 0.1)), [])
    finally:
        over.set()
    assert code == 1
    err = capsys.readouterr().err
    assert err.startswith("vlmscale sweep: the processes that --distributed=auto found")
    assert err.count("\n") == 1


@pytest.mark.parametrize("spec", ["a:8476,4,4", "a:8476,0,0", "a:8476,1,7"])
def test_an_index_beyond_the_count_is_refused(spec: str, started: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="INDEX must be less than COUNT"):
        start(spec)
    assert started == []


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, ("localhost:61441", 8, 5, [1])),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, ("localhost:61441", 2, 1, None)),
        ({"SLURM_NTASKS_PER_NODE": "1"}, ("localhost:61441", 8, 5, None)),
        ({"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "2,3"}, ("localhost:61441", 8, 5, None)),
        ({"CUDA_VISIBLE_DEVICES": "3"}, ("localhost:61441", 8, 5, None)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ("localhost:61441", 8, 5, [1])),
        ({"JAX_COORDINATOR_PORT": "1234"}, ("localhost:1234", 8, 5, [1])),
        ({"JAX_COORDINATOR_ADDRESS": "10.1.1.1:99"}, ("10.1.1.1:99", 8, 5, [1])),
    ],
    ids=["gpu-a-task", "one-task-a-node", "asked-for", "own-gpus", "own-gpu", "all-gpus", "port", "address"],
)
def test_a_task_of_slurm_knows_the_others_and_its_devices(
    changes: dict[str, str],
    wanted: tuple[str, int, int, list[int] | None],
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (SLURM | changes).items():
        monkeypatch.setenv(name, value)
    start("auto")
    assert joined(started) == wanted


def fake_scontrol(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("no-such-node", "no-such-node"),
        ("no-such-node,other", "no-such-node"),
        ("no-such-node[007-015,020],other", "no-such-node007"),
        ("no-such-node[3,5]-ib", "no-such-node3-ib"),
        ("no-such-rack[2-3]node[04-05]", "no-such-rack2node04"),
    ],
)
def test_a_node_whose_name_does_not_resolve_is_asked_of_slurm(
    nodes: str,
    first: str,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    line = "NodeName=$3 Arch=x86_64 CoresPerSocket=1 NodeAddr=10.7.0.9 NodeHostName=h Version=22.05.8"
    fake_scontrol(tmp_path / "bin", f'[ "$1 $2 $3 $4" = "show node {first} -o" ] && echo "{line}"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name, value in (SLURM | {"SLURM_STEP_NODELIST": nodes}).items():
        monkeypatch.setenv(name, value)
    start("auto")
    assert joined(started)[0] == "10.7.0.9:61441"


@pytest.mark.parametrize("script", [None, "exit 1", "echo Node no-such-node not found"])
def test_a_node_that_nobody_knows_is_one_line(
    script: str | None, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if script is not None:
        fake_scontrol(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name, value in (SLURM | {"SLURM_STEP_NODELIST": "no-such-node"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"no-such-node: .*JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        start("auto")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.1.1.1")
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS=10\.1\.1\.1: must be HOST:PORT"):
        start("auto")
    assert started == []


def mesh_of(devices: list[jax.Device], *shape: int) -> Mesh:
    return Mesh(np.array(devices, object).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def rows_held(mesh: Mesh, processes: int, size: int) -> list[list[int]]:
    """Rows of a batch of `size` that the devices of each process hold, as jax lays it out."""
    rows: list[set[int]] = [set() for _ in range(processes)]
    for device, index in batch_sharding(mesh).devices_indices_map((size,)).items():
        rows[device.id * processes // 8].update(range(size)[index[0]])
    return [sorted(own) for own in rows]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8), (4, 2, 1)]
)
def test_a_process_makes_the_rows_that_its_devices_hold(shape: tuple[int, ...], processes: int) -> None:
    """On every order of the devices: the block, or a refusal where there is none, alike on all processes."""
    order = random.Random(str((shape, processes)))
    size, whole, refused = 16, 0, 0
    for trial in range(60):
        groups = np.array(jax.devices(), object).reshape(processes, -1)
        if trial % 2:  # processes in any order, and so the devices of each
            groups = np.array(
                [order.sample(list(own), len(own)) for own in order.sample(list(groups), processes)]
            )
        devices = list(groups.flat)
        if trial % 4 == 3:
            order.shuffle(devices)
        mesh = mesh_of(devices, *shape)
        rows = rows_held(mesh, processes, size)
        length = len(rows[0])
        blocks = [list(range(own[0], own[0] + length)) for own in rows]
        good = rows == blocks and all(own[0] % length == 0 for own in rows)
        for process in range(processes):
            if good:
                index, count = host_part(mesh, process, lambda device: device.id * processes // 8)
                assert rows[process] == list(range(index * size // count, (index + 1) * size // count))
            else:
                with pytest.raises(
                    UserError, match=r"mesh.data=\d, mesh.fsdp=\d, mesh.tensor=\d: .*another mesh"
                ):
                    host_part(mesh, process, lambda device: device.id * processes // 8)
        whole, refused = whole + good, refused + (not good)
    assert whole >= 15  # at least all those in jax's order
    if shape in ((8, 1, 1), (1, 8, 1), (4, 2, 1)):  # a device a part: nothing mends what a shuffle tears
        assert (refused > 0) == (processes in (2, 4))


def test_processes_along_the_tensor_axis_make_the_same_rows() -> None:
    across = [device for pair in zip(jax.devices()[:4], jax.devices()[4:], strict=True) for device in pair]
    halves = [host_part(mesh_of(across, 4, 1, 2), p, lambda device: device.id // 4) for p in range(2)]
    assert halves == [(0, 1), (0, 1)]
    quarters = [
        host_part(mesh_of(jax.devices(), 1, 2, 4), p, lambda device: device.id // 2) for p in range(4)
    ]
    assert quarters == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_processes_of_unequal_parts_are_refused_on_all_of_them() -> None:
    """Three devices a process do not go into a tensor axis of four: the middle one is in both parts."""
    mesh, errors = mesh_of(jax.devices()[:8], 2, 1, 4), []
    for process in range(3):
        with pytest.raises(UserError) as caught:
            host_part(mesh, process, lambda device: device.id // 3)
        errors.append(str(caught.value))
    assert len(set(errors)) == 1
    assert "process 1 would hold [0, 1]" in errors[0]


# Of several processes one: what each test is about stands behind it. It ends at once where it fails, for
# jax's own exit would wait minutes for the others.
PROLOGUE = """
import json, os, signal, sys, time, traceback
from pathlib import Path
for name in ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD", "CUDA_VISIBLE", "KUBERNETES_"):
    for found in [key for key in os.environ if key.startswith(name)]:
        del os.environ[found]
if sys.argv[-1] == "gke":  # what a pod of a TPU slice of two hosts finds; jax looks when it is imported
    os.environ |= {"JAX_FORCE_TPU_INIT": "1", "TPU_SKIP_MDS_QUERY": "1", "MEGASCALE_NUM_SLICES": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "TPU_WORKER_ID": sys.argv[2]}
    os.environ |= {"MEGASCALE_SLICE_ID": "0", "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1"}
    os.environ["JAX_COORDINATOR_PORT"] = sys.argv[1].split(":")[1]
import jax
from vlmscale.distributed import agree, barrier, host_part, leader, leave, start, wait_for_leader
from vlmscale.errors import UserError

def fail(*error):
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)

sys.excepthook = fail
"""


def codes(children: list[Child]) -> list[int | None]:
    return [child.returncode for child, _ in children]


def finish(program: str, words: list[list[str]], folder: Path) -> tuple[list[int | None], list[str], str]:
    """Run to the end: how the processes ended, what each printed, and all of it as a story for a message."""
    with at_work(PROLOGUE + program, words, folder) as children:
        in_time = wait_for(lambda: all(child.poll() is not None for child, _ in children), SECONDS)
        story = told(children)
        assert in_time, f"not done after {SECONDS} s\n{story}"
        return codes(children), [log.read_text() for _, log in children], story


JOIN = """
spec, timeout = sys.argv[1:]
try:
    start(spec, float(timeout))
except UserError as error:
    print(f"said: {error}")
    sys.exit(2)
"""


@pytest.mark.slow
def test_processes_that_nobody_joins_end_with_one_line(tmp_path: Path) -> None:
    """In time, and with 2: jax would abort. Among them one alone that "auto" finds nothing for."""
    missing, silent, taken = (f"127.0.0.1:{free_port()}" for _ in range(3))
    with socket.create_server(("", int(taken.rpartition(":")[2]))):
        words = [[f"{missing},2,1", "2"], [f"{silent},2,0", "2"], [f"{taken},2,0", "2"], ["auto", "2"]]
        ended, outputs, story = finish(JOIN, words, tmp_path)
    assert ended == [2, 2, 2, 2], story
    said = [output.partition("said: ")[2].splitlines()[0] for output in outputs]
    for where, line in zip((missing, silent), said[:2], strict=True):
        assert f"the 2 processes did not come together at {where} within 2 s; check" in line
    assert f"{taken}: process 0 cannot listen on this port" in said[2]
    assert "--distributed=auto: no Slurm step, TPU pod, GKE or Open MPI is found" in said[3]


SHARE = """
import numpy as np
from jax.sharding import AxisType, Mesh
from vlmscale.sharding import AXES, batch_sharding, make_mesh

where, number, folder, how = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
if how == "slurm":
    bin = Path(folder) / f"bin{number}"
    bin.mkdir()
    (bin / "scontrol").write_text("#!/bin/sh\\necho NodeName=$3 NodeAddr=127.0.0.1 NodeHostName=h")
    (bin / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{bin}:{os.environ['PATH']}"
    os.environ |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "no-such-node[1-2]", "SLURM_NTASKS": "2"}
    os.environ |= {"SLURM_PROCID": number, "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": where.split(":")[1]}
start(f"{where},2,{number}" if how == "plain" else "auto", 20)
assert (jax.process_index(), jax.process_count(), jax.device_count()) == (int(number), 2, 8)
assert leader() == (number == "0")
assert agree(2**40 + 7 + int(number)) == 2**40 + 7
assert agree(-5 - int(number)) == -5
first = Path(folder) / "first"
if leader():
    time.sleep(1)
    first.write_text("")
barrier("one")
assert first.exists()

devices = jax.devices()
across = [device for pair in zip(devices[:4], devices[4:]) for device in pair]
layouts = {
    "data": (devices, (8, 1, 1)),
    "fsdp": (devices, (1, 8, 1)),
    "all": (devices, (2, 2, 2)),
    "second first": (devices[::-1], (2, 2, 2)),
    "tensor across": (across, (2, 2, 2)),
    "tensor everywhere": (devices, (1, 1, 8)),
}
found = {}
for name, (order, shape) in layouts.items():
    mesh = Mesh(np.array(order, object).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
    index, count = host_part(mesh)
    whole = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    mine = whole[index * 16 // count : (index + 1) * 16 // count]
    batch = jax.make_array_from_process_local_data(batch_sharding(mesh), mine)
    assert batch.shape == whole.shape, (name, batch.shape)
    for shard in batch.addressable_shards:
        assert (np.asarray(shard.data) == whole[shard.index]).all(), (name, shard.index)
    total = jax.jit(lambda x: (x * (1 + np.arange(16)[:, None])).sum())(batch)
    assert int(total) == (whole * (1 + np.arange(16)[:, None])).sum(), name
    found[name] = [index, count]
(Path(folder) / f"{number}.json").write_text(json.dumps(found))
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "slurm", "gke"])
def test_two_processes_agree_and_every_row_lands_where_it_belongs(how: str, tmp_path: Path) -> None:
    where = f"127.0.0.1:{free_port()}"
    words = [[where, str(number), str(tmp_path), how] for number in range(2)]
    ended, _, story = finish(SHARE, words, tmp_path)
    assert ended == [0, 0], story
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    halves = ["data", "fsdp", "all"]
    assert first == {name: [0, 2] for name in halves} | {
        "second first": [1, 2],
        "tensor across": [0, 1],
        "tensor everywhere": [0, 1],
    }
    assert second == {name: [1, 2] for name in halves} | {
        "second first": [0, 2],
        "tensor across": [0, 1],
        "tensor everywhere": [0, 1],
    }


PART = """
where, number, folder, how = sys.argv[1:]
start(f"{where},2,{number}", 20)
barrier("both are here")
wanted = Path(folder) / "wanted"
if leader():
    time.sleep(1)
    if how == "writes":
        (Path(folder) / "part").write_text("all of it")
        os.replace(Path(folder) / "part", wanted)
    elif how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "leaves":
        leave(2, 1.0)
else:
    if how != "both leave":
        wait_for_leader(wanted)
        print("found:", wanted.read_text())
if how == "both leave":
    time.sleep(int(number))
    leave(2 + int(number))
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, wanted",
    [
        ("writes", [0, 0]),
        ("is killed", [-signal.SIGKILL, -signal.SIGABRT]),
        ("leaves", [2, -signal.SIGABRT]),
        ("both leave", [2, 3]),
    ],
)
def test_who_waits_for_the_leader_ends_with_it(how: str, wanted: list[int], tmp_path: Path) -> None:
    """Within seconds, also where it fails by itself: jax would wait 300 s and abort, whatever the code."""
    words = [[f"127.0.0.1:{free_port()}", str(number), str(tmp_path), how] for number in range(2)]
    words[1][0] = words[0][0]
    began = time.monotonic()
    ended, outputs, story = finish(PART, words, tmp_path)
    assert ended == wanted, story
    assert ("found: all of it" in outputs[1]) == (how == "writes"), story
    assert time.monotonic() - began < SECONDS, story
