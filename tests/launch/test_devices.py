"""What a machine has for cohorts: cores, or GPUs by the devices of their meshes. No GPU is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cohorts import Cohort, make_cohort
from launch.devices import environment, needed, units
from launch.local import run_cohorts
from launch.state import directories
from tests.integration.tiny import DATA, lines, steps
from vlmscale.config import MeshConfig, Sweep
from vlmscale.errors import UserError
from vlmscale.loading import load_cell

# Notes what it sees and when, then finishes.
JOB = """
import json, os, sys, time
from pathlib import Path
from launch.work import work
run = Path(sys.argv[1])
def once(commit):
    began = time.monotonic()
    time.sleep(0.3)
    line = {"began": began, "ended": time.monotonic(), "sees": os.environ["CUDA_VISIBLE_DEVICES"]}
    with (run.parent / "log.jsonl").open("a") as file:
        print(json.dumps(line), file=file)
    commit(run)
sys.exit(work(run, [run], once))
"""


def cohorts(out: Path, meshes: list[MeshConfig]) -> list[Cohort]:
    cells = [
        load_cell("configs/scenes_tiny.py:toy-14k,4", [*DATA, *steps(20), f"--config.train.seed={n}"])
        for n in range(len(meshes))
    ]
    for cell, mesh in zip(cells, meshes, strict=True):
        cell.mesh = mesh
    return [make_cohort([cell], out) for cell in directories(Sweep("meshes", cells), out)]


def test_cohorts_share_the_gpus_by_their_meshes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    words: Any = lambda cohort, *_: [sys.executable, "-c", JOB, str(cohort.path)]  # noqa: E731
    monkeypatch.setattr("launch.local.command", words)
    one, two, all_of_them = MeshConfig(data=1), MeshConfig(data=1, fsdp=2), MeshConfig()
    assert not run_cohorts(cohorts(tmp_path, [one, all_of_them, two, one, one, two]), None)
    ran = lines(tmp_path / "cells" / "log.jsonl")
    seen = [set(line["sees"].split(",")) for line in ran]
    assert sorted(map(len, seen)) == [1, 1, 1, 2, 2, 4]
    assert set().union(*seen) == {"4", "5", "6", "7"}
    together = 0
    for number, (line, own) in enumerate(zip(ran, seen, strict=True)):
        for other, theirs in zip(ran[:number], seen[:number], strict=True):
            if line["began"] < other["ended"] and other["began"] < line["ended"]:
                together += 1
                assert not own & theirs, "two at a time on one GPU"
    assert together


def test_a_mesh_larger_than_the_machine_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="its mesh has 8 devices and this machine 2"):
        run_cohorts(cohorts(tmp_path, [MeshConfig(data=2, fsdp=4)]), None)
    with pytest.raises(UserError, match=r"mesh\.fsdp=3 and mesh\.tensor=0 do not divide 2 devices"):
        run_cohorts(cohorts(tmp_path, [MeshConfig(fsdp=3)]), None)


@pytest.mark.parametrize(
    "platform, visible, found",
    [
        ("cuda", "0,1,3", ["0", "1", "3"]),
        ("cuda", "GPU-8932f937,MIG-2", ["GPU-8932f937", "MIG-2"]),
        ("cuda", "", [None]),
        ("tpu", "", [None]),
    ],
)
def test_units(platform: str, visible: str, found: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert units() == found


def test_gpus_are_asked_of_the_driver(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert units() == [None]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0\necho 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert units() == ["0", "1"]


@pytest.mark.parametrize(
    "platform, mesh, need, variables",
    [
        ("cpu", MeshConfig(), 1, {}),
        ("cpu", MeshConfig(data=2, fsdp=2), 1, {"JAX_NUM_CPU_DEVICES": "4"}),
        ("cuda", MeshConfig(), 8, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}),
        ("cuda", MeshConfig(fsdp=4), 8, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}),
        ("cuda", MeshConfig(data=1, tensor=2), 2, {"CUDA_VISIBLE_DEVICES": "0,1"}),
    ],
)
def test_what_a_cohort_takes_and_sees(
    platform: str, mesh: MeshConfig, need: int, variables: dict[str, str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    there = [str(number) for number in range(8)]
    assert needed(mesh, there, "cell") == need
    assert environment(mesh, there[:need]) == {"JAX_PLATFORMS": platform} | variables
