"""Two stages of six cells on a real Slurm, disturbed on the way, against the same sweeps on this machine."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.claims import FileClaims, holder
from launch.outcome import CLAIMS, tries_left
from tests.absent import refuse
from tests.integration.tiny import DATA, lines, read, saved_steps, wait_for
from tests.launch.cluster import Cluster, cluster, missing
from vlmscale.cli import main
from vlmscale.records import Status

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

FILE = """
from pathlib import Path

from vlmscale.config import Sweep
from vlmscale.loading import load_cell
from vlmscale.records import read_json

def get_sweep(overrides=(), arg=""):
    specs = [f"configs/scenes_tiny.py:toy-14k,{count}" for count in (0, 1, 4, 9, 16, 36)]
    cells = [load_cell(spec, overrides) for spec in specs]
    if (word := cells[0].train.init_from):
        for cell, name in zip(cells, read_json(Path(word) / "sweep.json")["cells"]):
            cell.train.init_from = str(Path(word) / "cells" / name)
    for cell in cells[4:]:  # these are left alone, and have time
        cell.train.steps = min(cell.train.steps, 60)
    if arg == "nodes":
        cells[-1].mesh.data = 2
    return Sweep("six", cells)
"""
STEPS = 4000
SITE = 'time = "60"\nsignal_s = 60\n'
WIDE = 5  # the place of the cell on two nodes


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes that run two tasks each."""
    if why := missing():
        refuse(why)
    with cluster(tmp_path / "slurm", cpus=2) as made:
        monkeypatch.setenv("SLURM_CONF", made.env["SLURM_CONF"])
        yield made


def sweep(folder: Path, out: str, *overrides: str, on: tuple[str, ...] = (), arg: str = "") -> int:
    """`vlmscale sweep run` of the six cells."""
    path = folder / "six.py"
    path.write_text(FILE)
    often = f"--config.train.checkpoint_every={20 if '--on' in on else STEPS}"  # where something is to happen
    words = ["sweep", "run", f"{path}{arg}", "--out", str(folder / out), *on]
    rest = ("--config.train.heldout_every=4000", "--config.train.warmup_steps=2")
    return main([*words, *DATA, often, *rest, *overrides])


def cells(out: Path) -> list[Path]:
    return [out / "cells" / name for name in read(out / "sweep.json")["cells"]]


def disturb(slurm: Cluster, out: Path, job: str) -> dict[str, int]:
    """Take one task's node away, end another's time, and kill a third's process; places of the three."""
    runs = cells(out)
    began = time.monotonic()
    assert wait_for(lambda: all(saved_steps(run) for run in runs[:4]), 240), slurm.logs()
    told = [out / "slurm" / f"{job}_{place}.txt" for place in range(4)]

    def requeued() -> list[int]:
        return [place for place, path in enumerate(told) if "the job is requeued" in path.read_text()]

    node = slurm.ask("squeue", "-h", "-r", f"--jobs={job}_0", "-o", "%N")
    slurm.ask("sbatch", "-p", "hi", "-w", node, "-n1", "-o", "/dev/null", "--wrap", "sleep 1")
    assert wait_for(lambda: len(requeued()) == 1, 90), slurm.logs()
    [preempted] = requeued()
    killed, late = [place for place in range(4) if place != preempted][:2]
    entry = holder(FileClaims(runs[killed] / CLAIMS))
    assert entry is not None, "its steps are done already"
    os.kill(entry["pid"], signal.SIGKILL)
    # What is left then is less than the 60 s before the end at which a cell is told to save, but not nothing.
    minutes = int((time.monotonic() - began + 45) // 60) + 1
    slurm.ask("scontrol", "update", f"JobId={job}_{late}", f"TimeLimit={minutes}")
    assert wait_for(lambda: len(requeued()) == 3, 150), slurm.logs()
    slurm.ask("scontrol", "update", f"JobId={job}_{late}", "TimeLimit=60")
    return {"preempted": preempted, "late": late, "killed": killed}


@pytest.mark.timeout(1500)  # 24 trainings, and what Slurm waits before it runs a job again
def test_two_stages_run_to_the_end_whatever_happens(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(SITE)
    on = ("--on", "slurm", "--site", str(site))
    long, short = f"--config.train.steps={STEPS}", "--config.train.steps=20"
    behind = f"--config.train.init_from={tmp_path / 'first'}"
    assert sweep(tmp_path, "first", long, on=on, arg=":nodes") == 0
    [job, wide, report] = re.findall(r"^job (\d+):", capsys.readouterr().out, re.M)
    assert sweep(tmp_path, "second", short, behind, on=on, arg=":nodes") == 0
    later = re.findall(r"^job (\d+):", capsys.readouterr().out, re.M)
    waits = slurm.ask("squeue", "-h", "-r", "-o", "%i %E")
    assert f"{later[0]}_1 aftercorr:{job}_*(unfulfilled)" in waits
    assert f"{later[1]}_{WIDE} aftercorr:{wide}_*(unfulfilled)" in waits
    assert sweep(tmp_path, "first", long, on=on, arg=":nodes") == 0  # once more: all is queued
    assert "nothing new to submit" in capsys.readouterr().out

    first, second = tmp_path / "first", tmp_path / "second"
    hit = disturb(slurm, first, job)
    assert wait_for(lambda: not slurm.ask("squeue", "-h"), 600), slurm.logs()
    for out in (first, second):
        states = [Status(run).read() for run in cells(out)]
        logs = [path.read_text() for path in sorted((out / "slurm").glob("*.txt"))]
        assert {status["state"] for status in states} == {"done"}, "\n".join(logs)
    states = [Status(run).read() for run in cells(first)]
    for what, place in hit.items():
        assert states[place]["attempts"] == 2, what
        assert states[place]["resumed_from"], what
        assert tries_left(states[place]) == (2 if what == "killed" else 3), what
        told = (first / "slurm" / f"{job}_{place}.txt").read_text()
        assert ("killed by signal 9" if what == "killed" else "saved, to be run again") in told
    for run in cells(first)[:4]:
        assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert f"results: {first / 'results.jsonl'}" in (first / "slurm" / f"{report}.txt").read_text()
    assert "Rank 1 is connected to 1 peer ranks" in (cells(first)[WIDE] / "log.txt").read_text()

    alone = ("--workers", "6")  # a cell a process, as there: in cohorts numbers agree up to rounding
    assert sweep(tmp_path, "here", long, on=alone) == 0
    again = f"--config.train.init_from={tmp_path / 'here'}"
    assert sweep(tmp_path, "here2", short, again, on=alone) == 0
    for out, same in ((first, tmp_path / "here"), (second, tmp_path / "here2")):
        assert [run.name for run in cells(out)] == [run.name for run in cells(same)]
        for place, (run, other) in enumerate(zip(cells(out), cells(same), strict=True)):
            if place != WIDE:
                digests = [read(path / "done.json")["params_sha256"] for path in (run, other)]
                assert digests[0] == digests[1], run
            rows, others = lines(run / "result.jsonl"), lines(other / "result.jsonl")
            assert [row["task"] for row in rows] == [row["task"] for row in others]
            losses = [[row["heldout_loss"] for row in found] for found in (rows, others)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_cancelled_job_ends_and_what_the_cluster_refuses_is_one_line(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, out = tmp_path / "site.toml", tmp_path / "out"
    on = ("--on", "slurm", "--site", str(site))
    for wanted, told in (
        ('partition = "none"', "invalid partition specified: none"),
        ('partition = "brief"\ntime = "60"', "limit"),
        ('sbatch = ["--reservation=none"]', "reservation is invalid"),
        ('constraint = "h100"', "Invalid feature"),
        ('gres = "gpu"', "Invalid generic resource"),
    ):
        site.write_text(wanted)
        assert sweep(tmp_path, "out", f"--config.train.steps={STEPS}", on=on) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlmscale sweep")]
        assert len(said) == 1, said
        assert told in said[0]
        assert not slurm.ask("squeue", "-h")
        assert not list(out.glob("slurm/jobs.jsonl"))

    site.write_text(SITE)
    assert sweep(tmp_path, "out", f"--config.train.steps={STEPS}", on=on) == 0
    job = re.findall(r"^job (\d+):", capsys.readouterr().out, re.M)[0]
    assert wait_for(lambda: bool(saved_steps(cells(out)[0])), 240), slurm.logs()
    slurm.ask("scancel", f"--user={os.getuid()}")
    assert wait_for(lambda: not slurm.ask("squeue", "-h"), 120), slurm.logs()
    told = (out / "slurm" / f"{job}_0.txt").read_text()
    assert "so it is not run again" in told
    assert "requeued" not in told
    status = Status(cells(out)[0]).read()
    assert (status["state"], tries_left(status)) == ("preempted", 3)
