"""Training is the same run, bit for bit, however often it was stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tiny import DATA, SCENES, lines, read, saved_steps, steps, train
from vlmscale.cli import main
from vlmscale.config import Cell
from vlmscale.loading import load_cell
from vlmscale.records import Metrics
from vlmscale.train.cohort import Member
from vlmscale.train.loop import PreemptedError
from vlmscale.train.loop import train as train_cohort
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.run import open_run

STEPS = 60
OFTEN = ("--config.train.checkpoint_every=2", "--config.train.heldout_every=30")


def nothing(*_: object) -> None:
    return None


def train_cell(cell: Cell, run: Path, data: Prepared, progress: Any) -> None:
    train_cohort([Member(cell, run)], run, data, progress)


@pytest.fixture(scope="module")
def cell() -> Cell:
    return load_cell(SCENES, [*DATA, *steps(STEPS), *OFTEN])


@pytest.fixture(scope="module")
def data(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare([cell], tmp_path_factory.mktemp("prepared") / "data", nothing)


@pytest.fixture(scope="module")
def straight(cell: Cell, data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    open_run(cell, run, data.path, "")
    train_cell(cell, run, data, nothing)
    return run


def check_same(run: Path, straight: Path) -> None:
    assert read(run / "done.json")["params_sha256"] == read(straight / "done.json")["params_sha256"]
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert numbers(run) == numbers(straight)


def numbers(run: Path) -> list[dict[str, Any]]:
    """What the steps gave, without what a clock said."""
    logged = lines(run / "metrics.jsonl")
    timed = [line for line in logged if "step_s" in line]  # a first step is mostly compilation
    assert len(timed) >= STEPS - 2
    assert all(line["step_s"] > 0 and line["input_wait_s"] >= 0 for line in timed)
    given = ("step", "loss", "grad_norm", "target_tokens", "learning_rate", "heldout_loss")
    return [{name: line[name] for name in given if name in line} for line in logged]


def test_a_straight_run_logs_every_step_once_and_keeps_its_last_state(straight: Path) -> None:
    logged = lines(straight / "metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert [line["step"] for line in logged if "heldout_loss" in line] == [30, 60]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert saved_steps(straight)[-1] == STEPS
    done = read(straight / "done.json")
    assert done["steps"] == STEPS
    assert done["resumed_from"] == []
    assert len(done["params_sha256"]) == 64


def test_stopped_and_resumed_is_the_same_run(
    cell: Cell, data: Prepared, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    open_run(cell, run, data.path, "")

    def stop_at_24(step: int, *_: object) -> None:
        if step == 24:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="step 24"):
        train_cell(cell, run, data, stop_at_24)
    assert signal.getsignal(signal.SIGTERM) is before
    assert read(run / "status.json")["state"] == "preempted"
    assert lines(run / "metrics.jsonl")[-1]["step"] == 24
    assert not (run / "done.json").exists()
    train_cell(cell, run, data, nothing)
    check_same(run, straight)
    assert read(run / "done.json")["resumed_from"] == [24]
    assert read(run / "status.json")["attempts"] == 2


def test_a_stop_during_the_last_step_is_answered_when_all_is_saved(
    cell: Cell, data: Prepared, straight: Path, tmp_path: Path
) -> None:
    """Else the caller would go on to evaluate, and whoever asked would kill it."""
    run = tmp_path / "run"
    open_run(cell, run, data.path, "")

    def stop_at_the_end(step: int, *_: object) -> None:
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="SIGTERM after the last step; saved"):
        train_cell(cell, run, data, stop_at_the_end)
    assert read(run / "status.json")["state"] == "preempted"
    check_same(run, straight)
    train_cell(cell, run, data, lambda *_: pytest.fail("trained again"))


def test_what_a_kill_leaves_does_not_matter(
    cell: Cell, data: Prepared, straight: Path, tmp_path: Path
) -> None:
    """A line cut in two, and a checkpoint that was never committed."""
    run = tmp_path / "run"
    open_run(cell, run, data.path, "")

    def stop_at_24(step: int, *_: object) -> None:
        if step == 24:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError):
        train_cell(cell, run, data, stop_at_24)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    torn = run / "checkpoints" / f"{STEPS - 1}.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "24", torn)
    next(path for path in sorted((torn / "params").rglob("*")) if path.is_file()).unlink()
    train_cell(cell, run, data, nothing)
    check_same(run, straight)
    assert not torn.exists()


def test_a_finished_run_exits_0_at_once_and_another_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    assert read(run / "status.json")["state"] == "trained"
    before = (run / "done.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("vlmscale.train.loop.train", lambda *_: pytest.fail("trained again"))
    assert train(run) == 0
    assert "already trained" in capsys.readouterr().out
    assert train(run, "--config.train.log_every=3") == 0, "a key that changes no result is no other config"
    capsys.readouterr()
    for other in ("--config.train.seed=1", "--config.data.seed=1", "--config.compressor.visual_tokens=1"):
        assert train(run, other) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "choose another --out" in error
    assert ((run / "done.json").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_the_same_seed_gives_the_same_parameters_and_scores(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for run, seed in ((first, 5), (second, 5), (other, 6)):
        assert train(run, f"--config.train.seed={seed}") == 0
    assert main(["evaluate", "--run", str(first)]) == 0
    assert main(["evaluate", "--run", str(second)]) == 0
    shas = [read(run / "done.json")["params_sha256"] for run in (first, second, other)]
    assert shas[0] == shas[1] != shas[2]
    clocks = {"wall_s": 0, "finished_at": ""}
    rows = [[row | clocks for row in lines(run / "result.jsonl")] for run in (first, second)]
    assert rows[0] == rows[1]
    for path in (first / "answers").iterdir():
        assert path.read_bytes() == (second / "answers" / path.name).read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "--config.train.learning_rate=1e30") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "loss or gradient is not finite at step 3 (records train/" in message
    assert "train.learning_rate" in message
    status = read(run / "status.json")
    assert status["state"] == "failed"
    assert status["last_error"] in message
    assert not (run / "done.json").exists()


def test_metrics_drop_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)) + '{"st')
    metrics = Metrics(path, 2)
    metrics.write(3, loss=2.0)
    metrics.close()
    assert lines(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}]
