"""Slurm's own programs, asked: what is queued, what an array may have, and jobs submitted all or none."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from vlmscale.errors import UserError

Runner = Callable[[Sequence[str]], str]
Task = tuple[str, int]  # an array's job, and an index of it
Job = tuple[list[str], Path]

_TIMEOUT_S = 120  # programs of a Slurm whose controller is away try for minutes
# What sbatch says, and what to do; the first that matches.
_REASONS = (
    (
        r"configuration source|fetch config",
        "Slurm is not set up on this machine; on a login node it is, or SLURM_CONF names its file",
    ),
    (r"invalid account|account/partition combination", "not your account; sacctmgr show assoc user=$USER"),
    (r"partition", "no such partition, or not for you; sinfo shows those of this cluster"),
    (r"invalid qos", "no such quality of service; sacctmgr show qos"),
    (
        r"job submit limit|submit.*limit|QOS.*Limit|Assoc.*Limit|accounting/QOS policy",
        "over a limit of the cluster on jobs, size or time; submit fewer cells or ask for less",
    ),
    (r"access.*denied|permission|not permitted", "no permission on this cluster"),
    (r"generic resource|gres", "the cluster has no such gres; sinfo -o '%N %G' shows what it has"),
    (
        r"node config|feature|memory specification|cpu count",
        "no node has this; sinfo -o '%N %c %m %G %f'",
    ),
    (r"time", "not a time as sbatch reads it, or over the partition's limit, such as 12:00:00"),
    (r"unable to contact|connection refused|connect failure|timed out", "the controller does not answer"),
)


def program(words: Sequence[str]) -> str:
    """Run a program of Slurm; what it says.

    Raises:
      UserError: it is not there, fails, or does not answer.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"{words[0]}: not found; --on slurm submits from a login node of a Slurm cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]}: no answer in {_TIMEOUT_S} s; is the cluster up? (scontrol ping)"
        ) from None
    if done.returncode:
        raise UserError(f"{words[0]}: {_reason(done.stderr or done.stdout)}")
    return done.stdout.strip()


def queued(run: Runner) -> set[tuple[str, int | None]]:
    """This user's tasks that wait or run: job, and index of an array's task."""
    found: set[tuple[str, int | None]] = set()
    said = run(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F %K"])
    for job, index in (line.split()[:2] for line in said.splitlines()):
        found.add((job, int(index) if index.isdigit() else None))
    return found


def task_limit(run: Runner) -> int:
    """Indices that an array may have: the cluster's MaxArraySize."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", run(["scontrol", "show", "config"]))
    if found is None or not int(found[1]):
        raise UserError("scontrol show config: says no MaxArraySize; this cluster takes no job arrays")
    return int(found[1])


def submit_all(
    jobs: Sequence[Job], report: Path, before: Sequence[str], replaced: Sequence[str], run: Runner
) -> list[str]:
    """Submit jobs, and a report behind them; the numbers that they got, that of the report last.

    Args:
      jobs: options and script of each.
      report: script of the job behind them.
      before: jobs submitted earlier that the report waits for as well.
      replaced: reports of earlier submissions, which the new one makes idle.
      run: runs a program of Slurm.

    Raises:
      UserError: the cluster refuses one; those that it had taken are cancelled.
    """
    nothing = "nothing is submitted"
    for options, path in jobs:
        _telling(["sbatch", "--test-only", *options, str(path)], nothing, run)
    _telling(["sbatch", "--test-only", str(report)], nothing, run)
    numbers: list[str] = []
    try:
        for options, path in jobs:
            numbers.append(_submit([*options, str(path)], nothing, run))
        after = ":".join([*before, *numbers])
        numbers.append(_submit([f"--dependency=afterany:{after}", str(report)], nothing, run))
    except BaseException:
        if numbers:
            run(["scancel", *numbers])
        raise
    if replaced:
        run(["scancel", *replaced])
    return numbers


def _submit(words: Sequence[str], state: str, run: Runner) -> str:
    return _telling(["sbatch", "--parsable", *words], state, run).partition(";")[0]  # NUMBER;CLUSTER


def _telling(words: Sequence[str], state: str, run: Runner) -> str:
    try:
        return run(words)
    except UserError as error:
        raise UserError(f"{error}; {state}") from None


def _reason(said: str) -> str:
    """One line about what went wrong: what to do, where that is known, and Slurm's own words."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in said.splitlines() if line.strip()]
    words = "; ".join(dict.fromkeys(lines[-2:])) or "it said nothing"
    known = next((text for pattern, text in _REASONS if re.search(pattern, words, re.I)), None)
    return f"{words} ({known})" if known else words
