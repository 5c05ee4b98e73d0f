"""One sweep worked on by several: two launchers at once, and jobs that an engine starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.claims import FileClaims
from launch.directory import read_sweep
from tests.integration.processes import at_work, free_port, told
from tests.integration.tiny import DATA, lines, read, steps, wait_for
from vlmscale.cli import main

FILE = """
from vlmscale.config import Sweep
from vlmscale.loading import load_cell

def get_sweep(overrides=()):
    specs = [f"configs/scenes_tiny.py:toy-14k,{count}" for count in (0, 1)]
    return Sweep("pair", [load_cell(spec, overrides) for spec in specs])
"""
# As many devices as the processes of a job have together make one mesh.
PROGRAM = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 1)
from vlmscale.cli import main
sys.exit(main(sys.argv[1:]))
"""
LAUNCHER = "import sys; from vlmscale.cli import main; sys.exit(main(sys.argv[1:]))"


def command(tmp_path: Path, workers: int) -> list[str]:
    path = tmp_path / "pair.py"
    path.write_text(FILE)
    words = ["sweep", "run", str(path), "--out", str(tmp_path / "out"), "--workers", str(workers)]
    return [*words, *DATA, *steps(20)]


def kinds(folder: Path) -> list[str]:
    store = FileClaims(folder / "claims")
    return [store.read(number)["kind"] for number in range(1, store.last() + 1)]


@pytest.mark.slow
def test_two_launchers_share_a_sweep_and_run_each_cohort_once(tmp_path: Path) -> None:
    words, out = command(tmp_path, 1), tmp_path / "out"
    words += ["--memory", "0.000001"]  # so that each cell is a cohort
    with at_work(LAUNCHER, [words, words], tmp_path) as both:
        assert wait_for(lambda: all(child.poll() is not None for child, _ in both), 300), told(both)
    assert [child.returncode for child, _ in both] == [0, 0], told(both)
    crews = read_sweep(out).crews()
    assert [len(crew.runs) for crew in crews] == [1, 1]
    for crew in crews:
        assert kinds(crew.folder) == ["claim", "commit", "release"]
        status = read(crew.runs[0] / "status.json")
        assert (status["state"], status["attempts"], status["resumed_from"]) == ("done", 1, [])
    assert len(lines(out / "results.jsonl")) == 22


@pytest.mark.slow
def test_a_job_of_two_processes_works_on_a_cohort(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("launch.local.run_cohorts", lambda *_: True)  # an engine starts them instead
        assert main(command(tmp_path, 1)) == 42
    [crew] = read_sweep(out).crews()
    assert len(crew.runs) == 2
    place = f"127.0.0.1:{free_port()},2"
    words = ["sweep", "work", str(out), "--cohort", crew.id, "--distributed"]
    with at_work(PROGRAM, [[*words, f"{place},{index}"] for index in range(2)], tmp_path) as job:
        assert wait_for(lambda: all(child.poll() is not None for child, _ in job), 300), told(job)
    assert [child.returncode for child, _ in job] == [0, 0], told(job)
    assert kinds(crew.folder) == ["claim", "commit", "commit", "release"]
    for run in crew.runs:
        assert read(run / "status.json")["state"] == "done"
        assert read(run / "status.json")["attempts"] == 1
        assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, 21))
    assert main(["sweep", "work", str(out), "--cohort", crew.id]) == 0
    assert kinds(crew.folder)[-1] == "release"
    assert main(["sweep", "collect", str(out), "--out", str(tmp_path / "all.jsonl")]) == 0
    assert "22 rows of 2 finished cells" in capsys.readouterr().out
