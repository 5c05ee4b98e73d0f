"""What surrounds a cohort within a Slurm job, with fake programs of Slurm; the real ones run elsewhere."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.outcome import tries_left
from tests.integration.tiny import wait_for
from vlmscale.records import Status, write_json

_FAKE = """#!/bin/sh
echo "{name} $*" >> {log}
{body}
"""


def job(tmp_path: Path, srun: str, state: str = "RUNNING") -> tuple[Path, dict[str, str]]:
    """A sweep of one cell, and the environment of a task in which srun does this, of a job in that state."""
    out, tools, log = tmp_path / "out", tmp_path / "bin", tmp_path / "asked.txt"
    run = out / "cells" / "c0"
    run.mkdir(parents=True)
    write_json(out / "sweep.json", {"name": "one", "cells": ["c0"], "cohorts": [["c0"]]})
    Status(run).update(state="running", attempts=1)
    tools.mkdir()
    # requeueing ends the script that asked for it, as Slurm does
    ends = f"END=$(/bin/cat {tmp_path}/end 2>/dev/null || echo Unknown)"
    shown = f'echo "JobId=1 JobState={state} EndTime=$END Reason=None"'
    scontrol = f'{ends}; case "$*" in *requeue*) kill -9 $PPID;; *) {shown};; esac'
    scancel = f"kill -TERM $(/bin/cat {tmp_path}/srun.pid)"
    for name, body in (("srun", srun), ("scontrol", scontrol), ("scancel", scancel)):
        path = tools / name
        path.write_text(_FAKE.format(name=name, log=log, body=body))
        path.chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    return out, os.environ | env | {"SLURM_JOB_ID": "9", "SLURM_CPUS_PER_TASK": "3"}


def shepherd(out: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    words = [sys.executable, "-P", "-m", "launch.shepherd", str(out), "--first", "0", "--signal-s", "60"]
    return subprocess.Popen(
        [*words, "--srun=--mpi=none", "--", "vlmscale"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "srun, ends, state, left, said",
    [
        ("exit 0", 0, "running", 3, ""),
        ("exit 2", -signal.SIGKILL, "failed", 2, "ended with code 2; the job is requeued"),  # not noted
        ("exit 143", -signal.SIGKILL, "running", 3, "stopped, to be run again; the job is requeued"),
        ("exit 42", -signal.SIGKILL, "running", 3, "saved, to be run again; the job is requeued"),
        ("kill -9 $$", -signal.SIGKILL, "failed", 2, "killed by signal 9; the job is requeued"),
        ("exit 137", -signal.SIGKILL, "failed", 2, "killed by signal 9; the job is requeued"),
        ("exit 127", -signal.SIGKILL, "failed", 2, "ended with code 127; the job is requeued"),
    ],
)
def test_how_a_task_goes_on(srun: str, ends: int, state: str, left: int, said: str, tmp_path: Path) -> None:
    out, env = job(tmp_path, srun)
    process = shepherd(out, env)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == ends, told
    assert said in told
    status = Status(out / "cells" / "c0").read()
    assert (status["state"], tries_left(status)) == (state, left)
    step = (
        "srun --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=0 --export=ALL --mpi=none vlmscale sweep work"
    )
    assert next(line for line in asked(tmp_path) if line.startswith("srun")) == f"{step} {out} --cohort c0"
    assert ("scontrol requeue 7_0" in asked(tmp_path)) == (ends < 0)


def test_a_mistake_that_the_cell_noted_ends_the_job(tmp_path: Path) -> None:
    note = json.dumps({"state": "failed", "tries_left": 0, "last_error": "bad data"})
    out, env = job(tmp_path, f"echo '{note}' > {tmp_path}/out/cells/c0/status.json; exit 2")
    process = shepherd(out, env)
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert not any("requeue" in line for line in asked(tmp_path))


def test_a_program_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    out, env = job(tmp_path, "exit 0")
    (tmp_path / "bin" / "srun").unlink()
    process = shepherd(out, env | {"PATH": f"{tmp_path}/bin"})
    told, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, told
    assert "No such file" in Status(out / "cells" / "c0").read()["last_error"]


@pytest.mark.parametrize("saves", [True, False])
def test_before_the_time_is_over_the_cell_saves_or_the_job_is_given_back(saves: bool, tmp_path: Path) -> None:
    on_term = "exit 42" if saves else ":"
    wait = f"echo $$ > {tmp_path}/srun.pid; trap '{on_term}' TERM; while :; do sleep .1; done"
    out, env = job(tmp_path, wait)
    seconds = 50 if saves else 22  # of the 60 before the end at which it is asked, without any signal
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    (tmp_path / "end").write_text(end.strftime("%FT%T"))
    process = shepherd(out, env)
    told, _ = process.communicate(timeout=60)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGKILL) if not saves else None
    assert process.returncode == -signal.SIGKILL
    assert ("saved, to be run again" if saves else "its time is over before it has saved") in told
    assert "scancel --signal=TERM 7_0.0" in asked(tmp_path)
    assert tries_left(Status(out / "cells" / "c0").read()) == 3


def test_tries_are_used_up_in_the_end(tmp_path: Path) -> None:
    out, env = job(tmp_path, "exit 137")
    ends = []
    for _ in range(3):
        process = shepherd(out, env)
        told, _ = process.communicate(timeout=60)
        ends.append(process.returncode)
    assert ends == [-signal.SIGKILL, -signal.SIGKILL, 2]
    assert "killed by signal 9; its 3 tries are used up" in told
    assert Status(out / "cells" / "c0").read()["last_error"] == "killed by signal 9"


def test_a_fault_that_was_noted_takes_no_second_try(tmp_path: Path) -> None:
    note = json.dumps({"state": "failed", "tries_left": 2, "last_error": "RuntimeError: own words"})
    out, env = job(tmp_path, f"echo '{note}' > {tmp_path}/out/cells/c0/status.json; exit 1")
    shepherd(out, env).communicate(timeout=60)
    status = Status(out / "cells" / "c0").read()
    assert (tries_left(status), status["last_error"]) == (2, "RuntimeError: own words")


def test_a_job_that_is_cancelled_is_not_brought_back(tmp_path: Path) -> None:
    out, env = job(tmp_path, "exit 42", state="COMPLETING")
    process = shepherd(out, env)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 42
    assert "the job is completing, so it is not run again" in told
    assert not any("requeue" in line for line in asked(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_passed_to_the_step(number: signal.Signals, tmp_path: Path) -> None:
    wait = f"echo $$ > {tmp_path}/srun.pid; trap 'exit 42' TERM; while :; do sleep .1; done"
    out, env = job(tmp_path, wait)
    process = shepherd(out, env)
    assert wait_for(lambda: (tmp_path / "srun.pid").exists())
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "scancel --signal=TERM 7_0.0" in asked(tmp_path)
    assert "scontrol requeue 7_0" in asked(tmp_path)


def test_srun_gets_the_cores_of_a_task_and_the_log_what_it_says(tmp_path: Path) -> None:
    out, env = job(tmp_path, "echo cores $SRUN_CPUS_PER_TASK")
    shepherd(out, env).communicate(timeout=60)
    assert (out / "cells" / "c0" / "log.txt").read_text() == "cores 3\n"


def test_several_nodes_find_the_first(tmp_path: Path) -> None:
    out, env = job(tmp_path, "echo $JAX_COORDINATOR_ADDRESS")
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,n[2-3]"}
    shepherd(out, env).communicate(timeout=60)
    host, _, port = (out / "cells" / "c0" / "log.txt").read_text().strip().partition(":")
    assert host == "localhost"
    assert 61440 <= int(port) < 65000
    [line] = [line for line in asked(tmp_path) if line.startswith("srun")]
    assert line.endswith("--cohort c0 --distributed auto")
    assert "--ntasks=2 " in line


def test_outside_a_job_it_says_so(tmp_path: Path) -> None:
    out, env = job(tmp_path, "exit 0")
    del env["SLURM_ARRAY_TASK_ID"]
    told, _ = shepherd(out, env).communicate(timeout=60)
    assert told == "launch.shepherd: runs within a task of a Slurm array\n"


def test_a_place_that_the_sweep_has_not(tmp_path: Path) -> None:
    out, env = job(tmp_path, "exit 0")
    process = shepherd(out, env | {"SLURM_ARRAY_TASK_ID": "5"})
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told == f"{out}: has no cell at place 5; it is another sweep than was submitted\n"
