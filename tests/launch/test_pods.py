"""`vlmscale sweep run --on tpu`: jobs of a sweep, options, refusals. Nothing is prepared or submitted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmscale.cli import main

IMAGE = "us-docker.pkg.dev/PROJECT/vlmscale/vlmscale:1"
BUCKET = "gs://BUCKET/runs/demo"
TPU = ("--on", "tpu", "--topology", "v5e-16", "--image", IMAGE, "--bucket", BUCKET)


def run(tmp_path: Path, *words: str) -> int:
    return main(["sweep", "run", "configs/sweeps/demo.py", "--out", str(tmp_path / "out"), *words])


def test_a_dry_run_writes_a_manifest_a_cell_and_says_the_same_for_xpk(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "manifests"
    more = ("--slices", "2", "--spot", "--cache", "gs://BUCKET/programs", "--env", "A=b=c", "--queue", "mine")
    more = (*more, "--service-account", "robot", "--max-restarts", "3", "--grace", "60", "--no-privileged")
    assert run(tmp_path, *TPU, *more, "--dry-run", "--manifests", str(folder)) == 0
    told = capsys.readouterr().out
    paths = sorted(folder.glob("*.yaml"))
    assert len(paths) == told.count("xpk workload create") == told.count("  1 cell: ") > 10
    assert f"{len(paths)} manifests in {folder}: kubectl apply -f {folder}" in told
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
    words[words.index("manifests")] = str(tmp_path / "manifests")
    assert main(words) == 0
    assert list((tmp_path / "manifests").glob("demo-*.yaml"))


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
        ([*TPU, "--env", "A"], "--env A: give NAME=VALUE"),
        ([*TPU, "--env", "HF_TOKEN=x"], "manifests hold no secrets"),
        ([*TPU, "--slices", "0"], "--slices 0"),
        ([*TPU, "--site", "x.toml"], "--site is for --on slurm; here it is --on tpu"),
        ([*TPU, "--config.mesh.data=3"], "mesh.data=3: v5e-16 has 16 devices"),
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
