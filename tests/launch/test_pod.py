"""A cohort on a TPU pod of two slices of two hosts, each host a process that finds what GKE would tell it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.claims import FileClaims
from launch.directory import read_sweep
from tests.integration.processes import at_work, free_port, told
from tests.integration.tiny import DATA, lines, read, steps, wait_for
from tests.train.sharded_cases import CLOSE
from vlmscale.cli import main

SLICES, HOSTS, STEPS = 2, 2, 10
PAIR = """
from vlmscale.config import Sweep
from vlmscale.loading import load_cell

def get_sweep(overrides=()):
    words = [[*overrides, f"--config.train.seed={seed}", "--config.train.order_seed=0"] for seed in (0, 1)]
    return Sweep("pair", [load_cell("configs/scenes_tiny.py:toy-14k,1", own) for own in words])
"""
# A host: the variables of GKE, which jax reads when it is imported, and two of the pod's eight devices. A CPU
# has no slices: each process is taken to be of the slice that GKE told it. It writes down what mesh it got.
HOST = """
import json, os, sys
from pathlib import Path
part, host, port, folder, *words = sys.argv[1:]
for name in ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD", "KUBERNETES_"):
    for found in [key for key in os.environ if key.startswith(name)]:
        del os.environ[found]
os.environ |= {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "TPU_WORKER_ID": host}
os.environ |= {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": part, "JAX_COORDINATOR_PORT": port}
os.environ |= {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080"}
os.environ |= {"JAX_FORCE_TPU_INIT": "1", "TPU_SKIP_MDS_QUERY": "1"}  # no TPU and no metadata server here
import jax
jax.config.update("jax_num_cpu_devices", 2)
from vlmscale import sharding
from vlmscale.cli import main
from vlmscale.distributed import host_part
from vlmscale.train import state

def noted(*shape):
    mesh = make_mesh(*shape)
    found = {
        "process": [jax.process_index(), jax.process_count()],
        "mesh": [mesh.shape[name] for name in ("data", "fsdp", "tensor")],
        "processes": [device.process_index for device in mesh.devices.flat],
        "rows": host_part(mesh),
    }
    path = Path(folder) / f"{part}-{host}.json"
    if not path.exists():  # the first is that of training
        path.write_text(json.dumps(found))
    return mesh

sharding._slice_of = lambda device: device.process_index // 2
make_mesh, state.make_mesh = state.make_mesh, noted
sys.exit(main(words))
"""


def kinds(folder: Path) -> list[str]:
    store = FileClaims(folder / "claims")
    return [store.read(number)["kind"] for number in range(1, store.last() + 1)]


def check_same(run: Path, one: Path) -> None:
    """Curves and answers of a pod, as of one process with all devices."""
    mine, theirs = lines(run / "metrics.jsonl"), lines(one / "metrics.jsonl")
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == [*range(1, STEPS + 1)]
    for name in ("loss", "grad_norm", "target_tokens", "learning_rate"):
        np.testing.assert_allclose(
            [line[name] for line in mine], [line[name] for line in theirs], rtol=CLOSE, err_msg=name
        )
    assert mine[-1]["heldout_loss"] == pytest.approx(theirs[-1]["heldout_loss"], rel=CLOSE)
    rows, others = lines(run / "result.jsonl"), lines(one / "result.jsonl")
    assert [row["task"] for row in rows] == [row["task"] for row in others]
    assert [row["n_items"] for row in rows] == [row["n_items"] for row in others]
    for path in sorted((one / "answers").iterdir()):
        said, wanted = lines(run / "answers" / path.name), lines(path)
        assert [line["id"] for line in said] == [line["id"] for line in wanted]
        assert sum(a["answer"] == b["answer"] for a, b in zip(said, wanted, strict=True)) >= 0.95 * len(said)


@pytest.mark.slow
def test_a_cohort_on_two_slices_of_two_hosts_is_as_in_one_process(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "pair.py").write_text(PAIR)
    out, alone = tmp_path / "out", tmp_path / "alone"
    words = ["sweep", "run", str(tmp_path / "pair.py"), "--out", str(out), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("launch.local.run_cohorts", lambda *_: True)  # the pod does that
        short = ("--config.mesh.fsdp=4", "--config.evaluate.max_new_tokens=4")
        assert main([*words, *DATA, *steps(STEPS), *short]) == 42
    [crew] = read_sweep(out).crews()
    shutil.copytree(out, alone)
    port, work = str(free_port()), ["sweep", "work", str(out), "--cohort", crew.id, "--distributed", "auto"]
    hosts = [(part, host) for part in range(SLICES) for host in range(HOSTS)]
    notes = tmp_path / "notes"
    notes.mkdir()
    started = [[str(part), str(host), port, str(notes), *work] for part, host in hosts[::-1]]  # in any order
    with at_work(HOST, started, tmp_path) as pod:
        assert main(["sweep", "work", str(alone), "--cohort", crew.id]) == 0
        assert wait_for(lambda: all(child.poll() is not None for child, _ in pod), 300), told(pod)
        assert [child.returncode for child, _ in pod] == [0] * 4, told(pod)
    for number, (part, host) in enumerate(hosts):
        found = read(notes / f"{part}-{host}.json")
        assert found == {
            "process": [number, 4],
            "mesh": [2, 4, 1],
            "processes": [0, 0, 1, 1, 2, 2, 3, 3],  # fsdp inside a slice, a host's devices side by side
            "rows": [number, 4],
        }
    assert kinds(crew.folder) == ["claim", "commit", "commit", "release"]
    for run in crew.runs:
        assert (read(run / "status.json")["state"], read(run / "status.json")["attempts"]) == ("done", 1)
        check_same(run, alone / run.relative_to(out))
