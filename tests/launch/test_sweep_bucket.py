"""A real cohort of a sweep in a bucket: killed, gone on with elsewhere, and as one that ran on a disk."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from launch.directory import Crew, read_sweep
from launch.upload import upload
from tests.integration.processes import at_work, free_port, told
from tests.integration.tiny import DATA, lines, read, steps, wait_for
from tests.launch.test_sweep_shared import FILE, PROGRAM
from vlmscale.bucket import Bucket
from vlmscale.cli import main

STEPS = 40
OFTEN = ("--config.train.checkpoint_every=5",)
# The same devices as a job of two processes has together.
ALONE = PROGRAM.replace("1)", "2)", 1)
MOVES = {"wall_s", "finished_at", "run_id", "latency_ms"}  # of rows: what no two runs have in common


def launched(tmp_path: Path, monkeypatch: Any) -> tuple[Path, Crew]:
    """A sweep of one cohort that is ready to be worked on."""
    path, out = tmp_path / "pair.py", tmp_path / "out"
    path.write_text(FILE)
    words = ["sweep", "run", str(path), "--out", str(out), "--workers", "1", *DATA, *steps(STEPS), *OFTEN]
    with monkeypatch.context() as patch:
        patch.setattr("launch.local.run_cohorts", lambda *_: True)
        assert main(words) == 42
    [crew] = read_sweep(out).crews()
    return out, crew


def rows(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if name not in MOVES} for row in found]


def check_same(address: str, crew: Crew) -> None:
    """The cells in a bucket have the results of those on the disk."""
    place = Bucket(address)
    for run in crew.runs:
        there = f"cells/{run.name}"
        done = json.loads(place.read(f"{there}/done.json"))
        assert done["params_sha256"] == read(run / "done.json")["params_sha256"]
        assert rows(place.read(f"{there}/result.jsonl").decode()) == rows((run / "result.jsonl").read_text())
        assert json.loads(place.read(f"{there}/status.json"))["state"] == "done"
        metrics = [json.loads(line) for line in place.read(f"{there}/metrics.jsonl").splitlines()]
        assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in metrics] == [line["loss"] for line in lines(run / "metrics.jsonl")]
        assert f"{there}/checkpoints/{STEPS}/commit_success.txt" in place.entries(f"{there}/checkpoints/")


@pytest.mark.slow
def test_a_cohort_in_a_bucket_is_killed_and_gone_on_with(
    bucket: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out, crew = launched(tmp_path, monkeypatch)
    upload(out, bucket)
    place, folder = Bucket(bucket), f"cohorts/{crew.id}"
    words = ["sweep", "work", bucket, "--cohort", crew.id]
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with at_work(ALONE, [[*words, "--scratch", str(first / "scratch")]], first) as job:
        [(child, _)] = job
        # From the second on: what came before it is to be found again.
        assert wait_for(
            lambda: f"{folder}/checkpoints/10/commit_success.txt" in place.entries(folder), 300
        ), told(job)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not place.entries(f"cells/{crew.runs[0].name}/done.json"), "it was over before it was killed"
    with at_work(ALONE, [words], second) as job:
        [(child, _)] = job
        assert wait_for(lambda: child.poll() is not None, 300), told(job)
        assert child.returncode == 0, told(job)
    with at_work(ALONE, [["sweep", "work", str(out), "--cohort", crew.id]], tmp_path) as job:
        [(child, _)] = job
        assert wait_for(lambda: child.poll() is not None, 300), told(job)
        assert child.returncode == 0, told(job)
    check_same(bucket, crew)
    for run in crew.runs:
        status = json.loads(place.read(f"cells/{run.name}/status.json"))
        assert status["attempts"] == 2
        assert status["resumed_from"][0] >= 10
    assert main(["sweep", "collect", bucket, "--out", str(tmp_path / "all.jsonl")]) == 0
    assert "22 rows of 2 finished cells" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_that_share_no_disk_work_on_a_cohort_in_a_bucket(
    bucket: str, tmp_path: Path, monkeypatch: Any
) -> None:
    out, crew = launched(tmp_path, monkeypatch)
    upload(out, bucket)
    words = ["sweep", "work", bucket, "--cohort", crew.id, "--distributed"]
    place = f"127.0.0.1:{free_port()},2"
    each = [
        [*words, f"{place},{index}", "--scratch", str(tmp_path / f"scratch{index}")] for index in range(2)
    ]
    with at_work(PROGRAM, each, tmp_path) as job:
        assert wait_for(lambda: all(child.poll() is not None for child, _ in job), 400), told(job)
    assert [child.returncode for child, _ in job] == [0, 0], told(job)
    local = tmp_path / "local"
    local.mkdir()
    place = f"127.0.0.1:{free_port()},2"
    each = [
        ["sweep", "work", str(out), "--cohort", crew.id, "--distributed", f"{place},{index}"]
        for index in range(2)
    ]
    with at_work(PROGRAM, each, local) as job:
        assert wait_for(lambda: all(child.poll() is not None for child, _ in job), 400), told(job)
    assert [child.returncode for child, _ in job] == [0, 0], told(job)
    check_same(bucket, crew)
