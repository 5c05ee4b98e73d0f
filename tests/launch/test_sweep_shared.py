"""One sweep worked on by several: two launchers at once, and jobs that an engine starts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from launch.claims import FileClaims
from launch.directory import read_sweep
from tests.integration.processes import at_work, free_port, told
from tests.integration.tiny import DATA, lines, read, saved_steps, steps, wait_for
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
# A worker whose claims expire soon.
WORKER = """
import sys
from pathlib import Path
import launch.work
launch.work.LIFE_S = 10.0
sys.exit(launch.work.run_cohort(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]], wait=True))
"""


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


@pytest.mark.slow
def test_a_worker_that_was_paused_for_too_long_leaves_its_cohort_to_the_next(
    tmp_path: Path, monkeypatch: Any
) -> None:
    out, often = tmp_path / "out", ["--config.train.checkpoint_every=5", "--config.train.heldout_every=1000"]
    with monkeypatch.context() as patch:
        patch.setattr("launch.local.run_cohorts", lambda *_: True)
        assert main([*command(tmp_path, 1), *steps(300), *often]) == 42
    [crew] = read_sweep(out).crews()
    words = [str(crew.folder), *map(str, crew.runs)]
    logs = [tmp_path / name for name in ("late", "next")]
    for folder in logs:
        folder.mkdir()
    with at_work(WORKER, [words], logs[0]) as late, at_work(WORKER, [words], logs[1]) as following:
        [(first, _)], [(second, _)] = late, following
        assert wait_for(lambda: bool(saved_steps(crew.folder)), 120), told(late + following)
        assert wait_for(lambda: second.poll() is not None or first.poll() is not None, 120)
        # The one that came second saw that the first was alive.
        loser, paused = (second, first) if second.poll() is not None else (first, second)
        assert loser.returncode == 42, told(late + following)
        paused.send_signal(signal.SIGSTOP)
        saved = saved_steps(crew.folder)[-1]
        (tmp_path / "third").mkdir()
        with at_work(WORKER, [words], tmp_path / "third") as third:
            [(successor, _)] = third
            assert wait_for(lambda: kinds(crew.folder) == ["claim", "claim"], 120), told(third)
            paused.send_signal(signal.SIGCONT)
            assert wait_for(lambda: paused.poll() is not None and successor.poll() is not None, 200), told(
                third
            )
        assert paused.returncode == 42, told(late + following)
        assert successor.returncode == 0, told(third)
    assert "expired and was taken over" in told(late) + told(following)
    assert kinds(crew.folder) == ["claim", "claim", "commit", "commit", "release"]
    for run in crew.runs:
        assert read(run / "done.json")["resumed_from"][0] >= saved
        assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, 301))
