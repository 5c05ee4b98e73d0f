"""A full disk ends in one clear line that names the place, wherever it fills up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.tiny import DATA, SCENES, steps, train
from vlmscale.cli import main
from vlmscale.errors import disk_fault

Mount = Callable[[str], Path]


def check(code: int, error: str, place: Path) -> None:
    stages = ("token lengths", "tower features", "scenes (", "training,", "answering")
    told = [line for line in error.splitlines() if not line.startswith(stages)]
    assert code == 2, error
    assert len(told) == 1, error
    assert str(place) in told[0]
    assert "No space left on device" in told[0] or "MiB are free" in told[0]


def fill(place: Path, leave: int) -> None:
    """Fill a disk up to `leave` bytes."""
    with (place / "filler").open("wb") as file:
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        file.write(b"x" * max(0, free - leave))


@pytest.mark.parametrize("size", ["8k", "64k", "900k", "1500k"])
def test_data_preparation(size: str, mount: Mount, capsys: pytest.CaptureFixture[str]) -> None:
    out = mount(size) / "run"
    check(train(out, count=4), capsys.readouterr().err, out)
    assert not (out / "data" / "manifest.json").exists()


@pytest.mark.parametrize("leave", [0, 16 << 10, 100 << 10])
def test_training_and_then_it_goes_on(leave: int, mount: Mount, capfd: pytest.CaptureFixture[str]) -> None:
    """The disk is full when training begins; with room again the same command finishes the run."""
    place = mount("16m")
    out = place / "run"
    words = ("--config.train.checkpoint_every=2", "--config.train.learning_rate=0.001")
    assert train(out, *words, "--config.train.batch_size=12", count=8) == 2  # prepares, and trains nothing
    run = place / "other"
    run.mkdir()
    (out / "data").rename(run / "data")
    fill(place, leave)
    capfd.readouterr()
    code = train(run, *words, count=8)
    check(code, capfd.readouterr().err, run)
    assert not (run / "done.json").exists()
    (place / "filler").unlink()
    assert train(run, *words, count=8) == 0
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]


def test_evaluation(mount: Mount, capsys: pytest.CaptureFixture[str]) -> None:
    place = mount("16m")
    assert train(place / "run", count=4) == 0
    fill(place, 0)
    capsys.readouterr()
    code = main(["evaluate", "--run", str(place / "run")])
    check(code, capsys.readouterr().err, place / "run")


def test_other_commands(mount: Mount, capsys: pytest.CaptureFixture[str]) -> None:
    place = mount("64k")
    words = ["data", "scenes", "--out", str(place / "scenes"), "--validation", "1", "--test", "1"]
    check(main(words), capsys.readouterr().err, place)
    words = ["sweep", "run", "configs/sweeps/demo.py", "--out", str(place / "sweep"), *DATA, *steps(4)]
    check(main(words), capsys.readouterr().err, place)


def test_disk_faults_are_told_from_other_errors(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    assert disk_fault(full) is full
    save = ValueError("save failed")
    save.__cause__ = full
    assert disk_fault(save) is full
    told = disk_fault(ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [errno 28]"))
    assert told is not None
    assert told.errno == errno.ENOSPC
    assert disk_fault(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert disk_fault(KeyError("step")) is None
    (tmp_path / "file").write_text("")
    assert main(["train", "--config", SCENES, "--out", str(tmp_path / "file")]) == 2
