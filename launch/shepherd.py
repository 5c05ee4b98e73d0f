"""Within a Slurm job: runs one cohort by srun, has it save in time, and requeues the job where that helps.

`python -m launch.shepherd OUT --first N -- COMMAND ...` takes the cohort of the cell at place N plus the
task's index.

    the time limit is near, or Slurm wants the node   the cohort saves, ends with 42
    42, or stopped by SIGTERM before it could save    the job is requeued
    0, or 2 for a mistake that it noted               the job ends so
    anything else, a kill among it                    takes one of three tries, and the job is requeued

It imports no jax (but for several nodes) and waits: what happens to the cohort's processes is not its own.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.directory import Crew, read_sweep
from launch.outcome import TRIES, held_back, tries_left, unfinished
from launch.work import note_death
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, UserError
from vlmscale.records import Status, make_directory

_POLL_S, _ASK_S = 0.5, 5.0
_LOOK_S = 60.0  # between two looks at when the job ends, which an administrator may change
_LAST_S = 20.0  # before that end at which the job is given back although the cohort has not saved
_AWAY_S = 600.0  # that Slurm's controller may be away
_PORTS = 61440, 65000  # above what most systems give to clients
_STOPPED = 128 + signal.SIGTERM


def main() -> int:
    """Run the cohort of this task."""
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--signal-s", type=int, required=True)
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
    return _tend(crew, words, asked)


def _crew(out: Path, place: int) -> Crew:
    sweep = read_sweep(out)
    if place >= len(sweep.cells):
        raise UserError(f"{out}: has no cell at place {place}; it is another sweep than was submitted")
    run = sweep.run(sweep.cells[place])
    return next(crew for crew in sweep.crews() if run in crew.runs)


def _tend(crew: Crew, words: argparse.Namespace, asked: list[int]) -> int:
    tries, job = _tries(crew), _job(os.environ)
    try:
        process = _start(crew, words.out, words.srun, words.command)
    except (UserError, OSError) as error:
        note_death(crew.folder, crew.runs, str(error))
        return _again(crew, job, str(error), 1)
    code = _wait(process, job, words.signal_s, asked)
    if not unfinished(crew.runs):
        return 0
    if code == 0 or (code == EXIT_USER and held_back(crew.runs)):
        return code
    if code is None:
        return _again(crew, job, "its time is over before it has saved", EXIT_AGAIN)
    if code == EXIT_AGAIN:
        return _again(crew, job, "saved, to be run again", code)
    if code == _STOPPED:  # at its start, before it could save
        return _again(crew, job, "stopped, to be run again", EXIT_AGAIN)
    why = f"killed by signal {code - 128}" if code > 128 else f"ended with code {code}"
    if _tries(crew) == tries:  # else it could say so itself
        note_death(crew.folder, crew.runs, why)
    return _again(crew, job, why, code)


def _start(crew: Crew, out: Path, srun: Sequence[str], command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the cohort as one step of the job; what it prints goes to its log.

    Raises:
      UserError: the first node has no address, or the log cannot be written.
      OSError: there is no srun.
    """
    env, nodes = dict(os.environ), int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if "SLURM_CPUS_PER_TASK" in env:  # srun does not take it over from sbatch since 22.05
        env["SRUN_CPUS_PER_TASK"] = env["SLURM_CPUS_PER_TASK"]
    work = ["sweep", "work", str(out), "--cohort", crew.id]
    if nodes > 1:
        env["JAX_COORDINATOR_ADDRESS"] = _coordinator(env)
        work += ["--distributed", "auto"]
    # Not at once to the others when one ends: they may be saving, and jax ends them if they cannot go on.
    step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--export=ALL", *srun]
    make_directory(crew.folder)
    with (crew.folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [*step, *command, *work],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes], job: str, signal_s: int, asked: list[int]) -> int | None:
    """The exit code of the step, as a shell has it; None where the job's time is over before.

    It is asked to save on a signal, or when the end is so near, in case the signal was lost.
    """
    # To the step, not to srun: on SIGTERM srun kills all tasks at once, and nothing is saved.
    save = ["scancel", "--signal=TERM", f"{job}.0"]
    looked, sent, end = 0.0, 0.0, float("inf")
    told = False
    while (code := process.poll()) is None:
        time.sleep(_POLL_S)
        now = time.monotonic()
        if now - looked > (_ASK_S if asked else _LOOK_S):
            looked, end = now, _end(job)
        if time.time() > end - signal_s and not asked:
            asked.append(0)
        if asked and not told and now - sent > _ASK_S:
            sent = now
            told = subprocess.run(save, capture_output=True, check=False).returncode == 0
        if asked and time.time() > end - _LAST_S:
            return None
    return code if code >= 0 else 128 - code


def _again(crew: Crew, job: str, why: str, code: int) -> int:
    """Give the job back to the queue, unless its tries are used up or somebody is ending it."""
    if code != EXIT_AGAIN and _tries(crew) < 1:
        _say(crew, f"{why}; its {TRIES} tries are used up")
        return EXIT_USER
    began = time.monotonic()
    while True:
        state = _field(_shown(job), "JobState")
        if state not in ("RUNNING", ""):  # one that is cancelled would come back to life
            _say(crew, f"{why}; the job is {state.lower()}, so it is not run again")
            return code
        if state:
            _say(crew, f"{why}; the job is requeued")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which Slurm ends this process
            words = ["scontrol", "requeue", job]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if not done.returncode:
                while True:  # until Slurm does, so that the job does not end by itself
                    time.sleep(60)
            said = (done.stderr.strip().splitlines() or ["scontrol requeue fails"])[-1]
        else:
            said = "Slurm's controller does not answer"
        if time.monotonic() - began > _AWAY_S:
            _say(crew, f"{said}; vlmscale sweep run goes on with it")
            return code
        time.sleep(_ASK_S)


def _shown(job: str) -> str:
    words = ["scontrol", "show", "job", job, "-o"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _field(shown: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", shown)
    return found[1] if found else ""


def _end(job: str) -> float:
    """When the job's time is over, in seconds since 1970; infinity where it has no limit or nobody says."""
    try:
        return datetime.datetime.fromisoformat(_field(_shown(job), "EndTime")).timestamp()
    except ValueError:
        return float("inf")


def _coordinator(env: Mapping[str, str]) -> str:
    """Address of this node, the first of the job, and a port that is free here.

    Raises:
      UserError: the node has no address that is known here, or no port is free.
    """
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
    return min((tries_left(Status(run).read()) for run in unfinished(crew.runs)), default=0)


def _say(crew: Crew, line: str) -> None:
    print(f"{time.strftime('%F %T')} {crew.id}: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
