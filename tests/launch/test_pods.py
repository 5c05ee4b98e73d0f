"""`vlmscale sweep run --on tpu`: jobs of a sweep, options, refusals. Nothing is prepared or submitted."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.mirror import reached
from tests.integration.tiny import DATA, read, steps
from vlmscale.bucket import Bucket
from vlmscale.cli import main

IMAGE = "us-docker.pkg.dev/PROJECT/vlmscale/vlmscale:1"
BUCKET = "gs://BUCKET/runs/demo"
TPU = ("--on", "tpu", "--topology", "v5e-8", "--image", IMAGE, "--bucket", BUCKET)

THREE = """
from vlmscale.config import Sweep
from vlmscale.loading import load_cell

def get_sweep(overrides=()):
    specs = [f"configs/scenes_tiny.py:toy-14k,{count}" for count in (0, 1, 4)]
    return Sweep("three", [load_cell(spec, overrides) for spec in specs])
"""


def run(tmp_path: Path, *words: str) -> int:
    command = ["sweep", "run", "configs/sweeps/demo.py", "--config.train.batch_size=16"]
    return main([*command, "--out", str(tmp_path / "out"), *words])


def test_a_dry_run_writes_a_manifest_a_cell_and_says_the_same_for_xpk(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "manifests"
    more = ("--slices", "2", "--spot", "--cache", "gs://BUCKET/programs", "--env", "A=b=c", "--queue", "mine")
    more = (*more, "--service-account", "robot", "--max-restarts", "3", "--grace", "60", "--no-privileged")
    assert run(tmp_path, *TPU, *more, "--dry-run", "--manifests", str(folder)) == 0
    told = capsys.readouterr().out
    paths = sorted(folder.glob("*.yaml"))
    assert len(paths) == told.count("xpk workload create") == told.count("  1 cell: ") > 10
    assert f"{len(paths)} manifests in {folder}, to look at" in told
    assert not (tmp_path / "out").exists()
    for path in paths:
        job = yaml.safe_load(path.read_text())
        assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "mine"}
        assert job["spec"]["failurePolicy"]["maxRestarts"] == 3
        [group] = job["spec"]["replicatedJobs"]
        spec = group["template"]["spec"]["template"]["spec"]
        [container] = spec["containers"]
        *command, cohort, distributed, auto = container["command"]
        assert command == ["vlmscale", "sweep", "work", BUCKET, "--cohort"]
        assert path.stem.endswith(cohort)
        assert (distributed, auto) == ("--distributed", "auto")
        assert (group["replicas"], container["image"]) == (2, IMAGE)
        assert {"name": "A", "value": "b=c"} in container["env"]
        assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        assert (spec["serviceAccountName"], spec["terminationGracePeriodSeconds"]) == ("robot", 60)
        assert "securityContext" not in container


def test_the_page_launches_as_it_is_printed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    text = Path("docs/tpu.md").read_text(encoding="utf-8")
    options = re.search(r'^GRID="(.*?)"', text, re.S | re.M)
    command = re.search(r"^(vlmscale sweep run \$GRID --dry-run .*?)  +#", text, re.M)
    assert options is not None
    assert command is not None
    line = command[1].replace("$GRID", options[1]).replace("$IMAGE", IMAGE).replace("$BUCKET", "b")
    words = shlex.split(line.replace("paper_grid.py", "demo.py"))[1:]
    words += ["--config.train.batch_size=256"]
    words[words.index("manifests")] = str(tmp_path / "manifests")
    assert main(words) == 0
    assert list((tmp_path / "manifests").glob("demo-*.yaml"))


def test_a_launch_uploads_and_submits_and_the_next_leaves_out_what_is_over(
    bucket: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "bin").mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/log\necho "jobset/$3 created"\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    sweep, out = tmp_path / "three.py", tmp_path / "out"
    sweep.write_text(THREE)
    words = ["sweep", "run", str(sweep), *DATA, *steps(20), "--on", "tpu", "--topology", "v5e-4"]
    words += ["--image", IMAGE, "--bucket", bucket]
    assert main([*words, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    names = read(out / "sweep.json")["cells"]
    assert told.count(" created\n") == 3
    assert f"vlmscale sweep status {bucket} --watch" in told
    manifests = sorted((out / "manifests").glob("*.yaml"))
    assert sorted(path.stem.rpartition("-")[2] for path in manifests) == sorted(names)
    with reached(bucket, ("status.json", "spec.json")) as there:
        assert there.cells == names
        assert all((there.run(name) / "spec.json").exists() for name in names)

    for name, state in ((names[0], "done"), (names[1], "failed")):
        status = {
            "state": state,
            "attempts": 1,
            "resumed_from": [],
            "last_error": "bad data",
            "tries_left": 0,
        }
        Bucket(bucket).write(f"cells/{name}/status.json", json.dumps(status).encode())
    (tmp_path / "log").unlink()
    assert main([*words, "--out", str(tmp_path / "anew")]) == 0  # also from a directory that knows nothing
    told = capsys.readouterr().err
    assert f"({names[0]}) is left out: done" in told
    assert f"({names[1]}) is left out: {names[1]} failed: bad data; vlmscale sweep retry" in told
    submitted = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("apply -f")]
    assert [Path(line).stem.rpartition("-")[2] for line in submitted] == names[2:]


def test_a_bucket_that_does_not_answer_is_told_before_the_data_is_prepared(
    tmp_path: Path, monkeypatch: Any, capsys: Any, bucket: str
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Forbidden", bucket)

    monkeypatch.setattr("launch.kubectl.check_cluster", lambda: None)
    monkeypatch.setattr("vlmscale.bucket.Bucket.look", refuse)
    monkeypatch.setattr("vlmscale.train.prepared.prepare", lambda *_: pytest.fail("prepared"))
    assert run(tmp_path, *TPU[:-1], bucket) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"vlmscale sweep: {bucket}: Forbidden"


def test_a_slice_that_xpk_has_not_is_shown_without_it(tmp_path: Path, capsys: Any) -> None:
    assert run(tmp_path, *TPU, "--topology", "v5e-4", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "xpk has no v5e-4" in told
    assert "each slice is a node pool of 1 node of ct5lp-hightpu-4t, --tpu-topology=2x2" in told
    assert "--manifests DIR writes them" in told


def test_a_dry_run_without_a_folder_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    assert run(tmp_path, *TPU, "--dry-run") == 0
    assert "--manifests DIR writes them" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, told",
    [
        (["--on", "tpu"], "--on tpu needs --topology, such as --topology v5e-256"),
        ([*TPU[:4], "--bucket", BUCKET], "--on tpu needs --image"),
        ([*TPU[:6]], "--on tpu needs --bucket"),
        ([*TPU, "--topology", "v5e-7"], "v5e-7"),
        ([*TPU, "--topology", "h200-8"], "is no TPU slice"),
        ([*TPU, "--bucket", "runs/demo"], "--bucket runs/demo: pods share no disk"),
        ([*TPU, "--bucket", "gs://"], "pods share no disk"),
        ([*TPU, "--bucket", "gs:///x"], "pods share no disk"),
        ([*TPU, "--bucket", "gs://b/runs x"], "pods share no disk"),
        ([*TPU, "--out", "gs://b/runs/x"], "--out gs://b/runs/x: is a directory here"),
        ([*TPU, "--topology", "v5e-32"], "cannot run there: no mesh: 16 rows do not divide over 32 devices"),
        ([*TPU, "--env", "A"], "--env A: give NAME=VALUE"),
        ([*TPU, "--env", "HF_TOKEN=x"], "manifests hold no secrets"),
        ([*TPU, "--slices", "0"], "--slices 0"),
        ([*TPU, "--site", "x.toml"], "--site is for --on slurm; here it is --on tpu"),
        ([*TPU, "--config.mesh.data=3"], "mesh.data=3: v5e-8 has 8 devices"),
        (["--spot"], "--spot is for --on tpu; here it is --on local"),
        (["--no-privileged"], "--no-privileged is for --on tpu"),
        (["--on", "slurm", "--service-account", "x"], "--service-account is for --on tpu"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, tmp_path: Path, capsys: Any) -> None:
    assert run(tmp_path, *words, "--dry-run") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert told in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[*TPU], [*TPU, "--slices", "0"]])
def test_nothing_is_prepared_where_nothing_can_be_submitted(
    words: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("vlmscale.train.prepared.prepare", lambda *_: pytest.fail("prepared"))
    assert run(tmp_path, *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert ("kubectl: not found" in line) == (words == [*TPU])
