"""Sweeps with real worker processes: run, resume after kills, leave no orphans, report what failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cohorts import make_cohort
from launch.local import run_cohorts
from launch.state import CellDirectory, open_sweep
from tests.integration.tiny import DATA, lines, read, saved_steps, steps, wait_for
from vlmscale.cli import main
from vlmscale.loading import load_cell, load_sweep

FILE = """
from vlmscale.config import Sweep
from vlmscale.loading import load_cell

def get_sweep(overrides=()):
    specs = [f"configs/scenes_tiny.py:toy-14k,{count}" for count in (0, 1)]
    return Sweep("pair", [load_cell(spec, overrides) for spec in specs])
"""


def words(tmp_path: Path, *overrides: str, count: int = 20) -> list[str]:
    """`vlmscale sweep run` of a blind and a seeing cell, each a cohort of its own."""
    path = tmp_path / "pair.py"
    path.write_text(FILE)
    command = ["sweep", "run", str(path), "--out", str(tmp_path / "out"), "--workers", "2"]
    return [*command, *DATA, *steps(count), *overrides]


def launcher(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlmscale.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cells(out: Path) -> dict[int, Path]:
    """Cell directories by their visual tokens."""
    folders = [out / "cells" / name for name in read(out / "sweep.json")["cells"]]
    return {read(p / "spec.json")["config"]["compressor"]["visual_tokens"]: p for p in folders}


def workers(out: Path) -> list[int]:
    """Processes that work on a cell below `out`."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
        except OSError:
            continue
        if b"launch.worker" in command and str(out).encode() in command:
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_a_sweep_runs_and_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = words(tmp_path), tmp_path / "out"
    assert main(command) == 0
    told = capsys.readouterr()
    assert told.out == f"results: {out / 'results.jsonl'}\n"
    assert told.err.count(": done\n") == 2
    rows = lines(out / "results.jsonl")
    blind = {row["task"]: row["score"] for row in rows if row["visual_tokens"] == 0}
    assert len(rows) == 2 * len(blind) > 10
    for row in rows:
        assert row["blind_score"] == blind[row["task"]]
        assert row["sweep"] == "pair"
        assert row["compressor"] == ("pool" if row["visual_tokens"] else "none")
    assert len({row["cell_id"] for row in rows}) == 2

    before = (out / "results.jsonl").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("vlmscale.train.prepared.prepare", lambda *_: pytest.fail("prepared again"))
        patch.setattr("launch.local.run_cohorts", lambda *_: pytest.fail("run again"))
        assert main(command) == 0
    assert "all 2 cells are done" in capsys.readouterr().out
    assert (out / "results.jsonl").stat().st_mtime_ns == before

    assert main(["sweep", "status", str(out), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)["cells"]
    assert {cell["cell"] for cell in status} == {"toy-14k blind", "toy-14k pool V=1"}
    for cell in status:
        assert (cell["state"], cell["step"], cell["steps"]) == ("done", 20, 20)
        assert (cell["attempts"], cell["last_error"]) == (1, None)
    assert main(["sweep", "status", str(out)]) == 0
    assert "2 cells: 2 done" in capsys.readouterr().out

    assert main([*command, "--config.train.seed=3"]) == 2
    assert "choose another --out" in capsys.readouterr().err

    (out / "results.jsonl").unlink()  # as if the launcher had been killed before it collected
    for path in cells(out).values():
        status = read(path / "status.json")
        (path / "status.json").write_text(json.dumps(status | {"state": "running"}))
    assert main(command) == 0
    assert [read(path / "status.json")["attempts"] for path in cells(out).values()] == [1, 1]
    assert {row["task"] for row in lines(out / "results.jsonl")} == set(blind)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes through /proc")
def test_kills_leave_no_orphans_and_the_next_run_goes_on(tmp_path: Path) -> None:
    often = ("--config.train.checkpoint_every=3", "--config.train.heldout_every=3000")
    # So many that no cell is done while another process starts, also on a busy machine.
    command, out = words(tmp_path, *often, count=1500), tmp_path / "out"

    def started() -> bool:
        return (out / "sweep.json").exists() and all(
            (path / "spec.json").exists() and saved_steps(path)
            for path in (out / "cells" / name for name in read(out / "sweep.json")["cells"])
        )

    first = launcher(command)
    assert wait_for(lambda: started() or first.poll() is not None), "no checkpoints"
    assert first.poll() is None, first.communicate()[1]
    running = workers(out)
    assert running
    os.kill(running[0], signal.SIGKILL)  # a worker dies alone: the launcher starts its cell again
    assert wait_for(lambda: len(set(workers(out)) - set(running)) == 1, 20)
    first.kill()
    first.communicate()
    assert wait_for(lambda: not workers(out), 20), "workers outlived their launcher"
    states = {read(path / "status.json")["state"] for path in cells(out).values()}
    assert "done" not in states
    before = {path: saved_steps(path)[-1] for path in cells(out).values()}

    second = launcher(command)
    assert wait_for(
        lambda: (
            any(saved_steps(path)[-1] > step for path, step in before.items()) or second.poll() is not None
        )
    )
    second.send_signal(signal.SIGTERM)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 42, errors
    assert "run again to go on" in errors
    assert "failed" not in errors
    assert not workers(out)
    assert {read(path / "status.json")["state"] for path in cells(out).values()} <= {"preempted", "running"}

    assert main([*command, "--config.train.checkpoint_every=1500"]) == 0  # the rest of it at once
    for path, step in before.items():
        done = read(path / "done.json")
        assert any(resumed >= step for resumed in done["resumed_from"])
        assert [line["step"] for line in lines(path / "metrics.jsonl")] == list(range(1, 1501))
    assert len(lines(out / "results.jsonl")) == 22


@pytest.mark.slow
def test_cells_of_a_sweep_train_together_and_are_resumed_together(tmp_path: Path) -> None:
    often = ("--config.train.checkpoint_every=3", "--config.train.heldout_every=3000")
    command, out = words(tmp_path, *often, count=1000), tmp_path / "out"
    command[command.index("--workers") + 1] = "1"

    def saved() -> list[int]:
        return [step for path in out.glob("cohorts/*") for step in saved_steps(path)]

    first = launcher(command)
    assert wait_for(lambda: bool(saved()) or first.poll() is not None), "no checkpoint"
    [worker] = workers(out)
    before = saved()[-1]
    os.kill(worker, signal.SIGKILL)
    assert wait_for(lambda: max(saved(), default=0) > before + 6 or first.poll() is not None)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 42, errors
    stopped = saved()[-1]
    assert main([*command, "--config.train.checkpoint_every=1000"]) == 0
    for path in cells(out).values():
        done = read(path / "done.json")
        assert done["resumed_from"][-1] == stopped
        assert done["resumed_from"][0] >= before
        assert [line["step"] for line in lines(path / "metrics.jsonl")] == list(range(1, 1001))
        assert saved_steps(path) == [1000]
    rows = lines(out / "results.jsonl")
    assert len(rows) == 22
    assert {row["cohort_id"] for row in rows} == {path.name for path in out.glob("cohorts/*")}
    assert main(["evaluate", "--run", str(cells(out)[1])]) == 0


@pytest.mark.slow
def test_a_failing_cell_is_reported_and_the_other_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = words(tmp_path, count=8), tmp_path / "out"
    sweep = load_sweep(command[2], [word for word in command if word.startswith("--config.")])
    opened = open_sweep(sweep, out)
    in_the_way = opened[1].path / "metrics.jsonl"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_bytes(b"\xff\xfe")
    assert main(command) == 1
    told = capsys.readouterr()
    assert f"toy-14k pool V=1 ({opened[1].id}) failed: UnicodeDecodeError: " in told.err
    assert "log.txt" in told.err
    assert "Traceback" not in told.err
    assert told.err.count("failed (exit 1)") == 3, "a fault is tried three times"
    assert {row["visual_tokens"] for row in lines(out / "results.jsonl")} == {0}
    status = read(opened[1].path / "status.json")
    assert status["state"] == "failed"
    assert status["last_error"].startswith("UnicodeDecodeError: ")
    assert "Traceback" in (opened[1].path / "log.txt").read_text()

    in_the_way.unlink()
    assert main(command) == 0
    assert {row["visual_tokens"] for row in lines(out / "results.jsonl")} == {0, 1}
    assert read(opened[1].path / "status.json")["last_error"] is None


def test_a_mistake_in_a_cell_is_not_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = CellDirectory("x", load_cell("configs/scenes_tiny.py:toy-14k,1", []), tmp_path / "x")
    cell.path.mkdir()
    (cell.path / "spec.json").write_text('{"cell_')
    assert not run_cohorts([make_cohort([cell], tmp_path)], 1)
    assert capsys.readouterr().err.count("failed (exit 2)") == 1
    status = read(cell.path / "status.json")
    assert status["state"] == "failed"
    assert "spec.json: unreadable" in status["last_error"]
