"""The fault drill: whatever happens to a run, its parameters are those of one that nothing disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.integration.tiny import DATA, SCENES, child, lines, read, saved_steps, steps, wait_for
from vlmscale.cli import main
from vlmscale.config import Cell
from vlmscale.loading import load_cell
from vlmscale.sharding import make_mesh
from vlmscale.train import loop
from vlmscale.train.cohort import Member
from vlmscale.train.loop import PreemptedError, train
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.run import open_run

STEPS, KILLS = 1500, 8
WORDS = [*DATA, *steps(STEPS), "--config.train.heldout_every=750"]
OFTEN, ONCE = (
    f"--config.train.checkpoint_every={steps}" for steps in (4, STEPS)
)  # has no part in the result


def nothing(*_: object) -> None:
    return None


def words_of(run: Path, saving: str = OFTEN) -> list[str]:
    return ["train", "--config", SCENES, "--out", str(run), *WORDS, saving]


class Drill:
    """One run that is started and stopped again and again."""

    def __init__(self, run: Path, programs: Path, seed: int) -> None:
        self.run, self.draw = run, random.Random(seed)
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any("tmp" in path.name for path in (self.run / "checkpoints").glob("*"))

    def resumed_from(self) -> list[int]:
        """Steps that attempts went on from."""
        path = self.run / "status.json"
        return list(read(path)["resumed_from"]) if path.exists() else []

    def attempt(
        self, how: signal.Signals, during_save: bool = False, good: int | None = None
    ) -> tuple[int, str]:
        """Go on from step `good`, or the newest, for a few checkpoints, then stop; exit code and errors."""
        before = max(saved_steps(self.run), default=0) if good is None else good
        known, goal = self.resumed_from(), before + self.draw.randrange(1, 5) * 4
        process = child(words_of(self.run), env=self.environment)

        def reached() -> bool:
            resumed = not before or len(self.resumed_from()) > len(known)
            return process.poll() is not None or (resumed and max(saved_steps(self.run), default=0) >= goal)

        wait_for(reached, 120)
        if during_save:
            wait_for(lambda: self.saving() or process.poll() is not None)
        time.sleep(self.draw.uniform(0, 0.004 if during_save else 0.1))
        process.send_signal(how)
        said = process.communicate(timeout=120)[1]
        if before:  # a save that was committed counts, whatever came behind it
            assert self.resumed_from()[len(known) :] == [before], said
        return process.returncode, said

    def newest(self) -> Path:
        """The largest file of the newest checkpoint."""
        folder = self.run / "checkpoints" / str(saved_steps(self.run)[-1])
        return max(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )


@pytest.mark.slow
def test_a_run_survives_everything(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    straight, seed = tmp_path / "straight", time.time_ns() % 10_000
    print("seed of the moments:", seed)
    assert main(words_of(straight, ONCE)) == 0
    place = tmp_path
    if os.geteuid() == 0:
        place = request.getfixturevalue("mount")("200m")
    run = place / "run"
    run.mkdir()
    shutil.copytree(straight / "data", run / "data")
    drill = Drill(run, tmp_path / "programs", seed)

    for number in range(KILLS):
        code, said = drill.attempt(signal.SIGKILL, during_save=number % 2 == 1)
        assert code == -signal.SIGKILL, said
    assert max(saved_steps(run)) < STEPS, "it was over before the drill was"

    code, said = drill.attempt(signal.SIGTERM)
    assert code == 42, said
    assert "stopped by SIGTERM at step" in said

    for damage in ("cut", "gone"):
        good, bad = saved_steps(run)[-2:]
        file = drill.newest()
        if damage == "cut":
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size // 2)
        else:
            file.unlink()
        code, said = drill.attempt(signal.SIGTERM, good=good)
        assert code == 42, said
        assert any(str(bad) in line and "damaged" in line for line in said.splitlines()), said

    if place != tmp_path:
        filler = place / "filler"
        with filler.open("wb") as opened:
            free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
            opened.write(b"x" * max(0, free - (64 << 10)))
        process = child(words_of(run), env=drill.environment)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2, said
        assert "No space left on device" in said.splitlines()[-1]
        assert "Traceback" not in said
        filler.unlink()

    last = saved_steps(run)[-1]
    assert main(words_of(run, ONCE)) == 0
    done, wanted = read(run / "done.json"), read(straight / "done.json")
    assert done["params_sha256"] == wanted["params_sha256"]
    assert done["resumed_from"][-1] == last
    assert all(step > 0 for step in done["resumed_from"][1:])
    assert len(done["resumed_from"]) >= KILLS + 3
    given = ("step", "loss", "grad_norm", "target_tokens", "learning_rate", "heldout_loss")
    curves = [
        [{name: line[name] for name in given if name in line} for line in lines(folder / "metrics.jsonl")]
        for folder in (run, straight)
    ]
    assert curves[0] == curves[1]


@pytest.fixture(scope="module")
def cell() -> Cell:
    return load_cell(SCENES, [*DATA, *steps(30), "--config.train.checkpoint_every=10"])


@pytest.fixture(scope="module")
def data(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare([cell], tmp_path_factory.mktemp("prepared") / "data", nothing)


@pytest.mark.parametrize("later", [2, 8])
def test_a_run_goes_on_with_half_and_with_twice_the_devices(
    later: int, cell: Cell, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_devices(count: int, run: Path, progress: Callable[..., Any] = nothing) -> None:
        mesh = make_mesh(fsdp=2, devices=jax.devices()[:count])
        monkeypatch.setattr(loop, "choose_mesh", lambda *_: mesh)
        train([Member(cell, run)], run, data, progress)

    def stop(step: int, *_: object) -> None:
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    straight, moved = tmp_path / "straight", tmp_path / "moved"
    for run in (straight, moved):
        open_run(cell, run, data.path, "")
    with_devices(4, straight)
    with pytest.raises(PreemptedError, match="step 10"):
        with_devices(4, moved, stop)
    with_devices(later, moved)
    assert read(moved / "done.json")["resumed_from"] == [10]
    curves = [[line["loss"] for line in lines(run / "metrics.jsonl")] for run in (moved, straight)]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
