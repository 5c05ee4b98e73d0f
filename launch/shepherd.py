"""Within a Slurm job: runs one cohort by srun, has it save in time, and requeues the job where that helps.

`python -m launch.shepherd OUT --first N -- COMMAND ...` takes the cohort of the cell at place N plus the
task's index.

    a signal before the time limit, or preemption     the cohort saves, ends with 42
    42                                                 the job is requeued
    0, 2                                               the job ends so
    anything else, a kill among it                     takes one of three tries, and the job is requeued

It imports no jax (but for several nodes) and waits: what happens to the cohort's processes is not its own.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.directory import Crew, read_sweep
from launch.outcome import TRIES, tries_left, unfinished
from launch.work import note_death
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, UserError
from vlmscale.records import Status, make_directory

_POLL_S = 0.5
_PORTS = 61440, 65000  # above what most systems give to clients


def main() -> int:
    """Run the cohort of this task."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--srun", action="append", default=[])
    parser.add_argument("command", nargs="+")
    words = parser.parse_args()
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        print("launch.shepherd: runs within a task of a Slurm array", file=sys.stderr)
        return EXIT_USER
    try:
        crew = _crew(words.out, words.first + int(os.environ["SLURM_ARRAY_TASK_ID"]))
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    return _tend(crew, words.out, words.srun, words.command)


def _crew(out: Path, place: int) -> Crew:
    sweep = read_sweep(out)
    if place >= len(sweep.cells):
        raise UserError(f"{out}: has no cell at place {place}; it is another sweep than was submitted")
    run = sweep.run(sweep.cells[place])
    return next(crew for crew in sweep.crews() if run in crew.runs)


def _tend(crew: Crew, out: Path, srun: Sequence[str], command: Sequence[str]) -> int:
    tries = _tries(crew)
    code = _run(crew, out, srun, command)
    if code in (0, EXIT_USER):
        return code
    if not unfinished(crew.runs):
        return 0
    if code != EXIT_AGAIN:
        if _tries(crew) == tries:  # else it could say so itself
            note_death(crew.folder, crew.runs, _reason(code), code)
        if _tries(crew) < 1:
            _say(crew, f"{_reason(code)}; its {TRIES} tries are used up")
            return EXIT_USER
    return _requeue(crew, code)


def _run(crew: Crew, out: Path, srun: Sequence[str], command: Sequence[str]) -> int:
    """The cohort's exit code, behind one step of the job; what it prints goes to its log."""
    env, nodes = dict(os.environ), int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if "SLURM_CPUS_PER_TASK" in env:  # srun does not take it over from sbatch since 22.05
        env.setdefault("SRUN_CPUS_PER_TASK", env["SLURM_CPUS_PER_TASK"])
    work = ["sweep", "work", str(out), "--cohort", crew.id]
    if nodes > 1:
        env["JAX_COORDINATOR_ADDRESS"] = _coordinator(env)
        work += ["--distributed", "auto"]
    # Not at once to the others when one ends: they may be saving, and jax ends them if they cannot go on.
    step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", *srun]
    make_directory(crew.folder)
    with (crew.folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [*step, *command, *work],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
    # To the step, not to srun: on SIGTERM srun kills all tasks at once, and nothing is saved.
    save = ["scancel", "--signal=TERM", f"{_job(env)}.0"]
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    while (code := process.poll()) is None:
        if asked and subprocess.run(save, capture_output=True, check=False).returncode == 0:
            asked.clear()  # else the step does not exist yet
        time.sleep(_POLL_S)
    return code if code >= 0 else 128 - code


def _requeue(crew: Crew, code: int) -> int:
    """Give the job back to the queue, unless somebody is ending it; returns only where that is so."""
    job = _job(os.environ)
    if (state := _state(job)) != "RUNNING":  # one that is cancelled would come back to life
        _say(crew, f"{_reason(code)}; the job is {state.lower()}, so it is not run again")
        return code
    _say(crew, f"{_reason(code)}; the job is requeued")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["scontrol requeue fails"]
        _say(crew, f"{said[0]}; vlmscale sweep run goes on with it")
        return code
    while True:  # until Slurm ends this process, so that the job does not end by itself
        time.sleep(60)


def _state(job: str) -> str:
    said = subprocess.run(["scontrol", "show", "job", job, "-o"], capture_output=True, text=True, check=False)
    found = re.search(r"\bJobState=(\w+)", said.stdout)
    return found[1] if found else "unknown"


def _coordinator(env: Mapping[str, str]) -> str:
    """Address of this node, the first of the job, and a port that is free here."""
    from vlmscale.distributed import slurm_host

    start = _PORTS[0] + int(env["SLURM_JOB_ID"]) % 2048
    for port in range(start, _PORTS[1]):
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return f"{slurm_host(env['SLURM_JOB_NODELIST'])}:{port}"
    raise UserError(f"no port from {start} to {_PORTS[1]} is free on this node")


def _job(env: Mapping[str, str]) -> str:
    """This task's name; its plain number is the whole array's in one of the tasks."""
    return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"


def _tries(crew: Crew) -> int:
    """What is left of them; each cell of a cohort has as many, but those left behind."""
    return min((tries_left(_status(run)) for run in unfinished(crew.runs)), default=0)


def _status(run: Path) -> dict[str, Any]:
    return Status(run).read()


def _reason(code: int) -> str:
    if code == EXIT_AGAIN:
        return "saved, to be run again"
    return f"killed by signal {code - 128}" if code > 128 else f"ended with code {code}"


def _say(crew: Crew, line: str) -> None:
    print(f"{time.strftime('%F %T')} {crew.id}: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
