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
_NOTHING = "nothing is submitted"
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
_OTHERS = re.compile(r"(SLURM|SBATCH|SQUEUE|SCANCEL|SRUN|SALLOC)_")
# Of nodes that are down or reserved now: such a job waits in the queue.
_LATER = re.compile(r"node configuration|configuration not available", re.I)
# What sbatch says, and what to do; the first that matches.
_REASONS = (
    (
        r"unable to contact|connection refused|connect failure|timed out",
        "the controller does not answer; scontrol ping says who is up",
    ),
    (
        r"configuration source|fetch config",
        "Slurm is not set up on this machine; on a login node it is, or SLURM_CONF names its file",
    ),
    (r"invalid account|account/partition combination", "not your account; sacctmgr show assoc user=$USER"),
    (
        r"node config|configuration not available|feature|memory specification|cpu count",
        "no node has this; sinfo -o '%N %c %m %G %f' shows what they have",
    ),
    (r"invalid partition|partition name|no partition", "sinfo shows the partitions of this cluster"),
    (r"invalid qos", "no such quality of service; sacctmgr show qos"),
    (
        r"submit.*limit|QOS.*Limit|Assoc.*Limit|accounting/QOS policy|partition.*limit|limit.*partition",
        "over a limit of the cluster on jobs, size or time; submit fewer cells or ask for less",
    ),
    (r"access.*denied|permission|not permitted", "no permission on this cluster"),
    (r"generic resource|gres", "the cluster has no such gres; sinfo -o '%N %G' shows what it has"),
    (r"--time|time limit|time spec", "not a time as sbatch reads it, such as 12:00:00, or too long here"),
)


def program(words: Sequence[str]) -> str:
    """Run a program of Slurm; what it says.

    What the caller's own environment asks of Slurm is left out: variables such as SBATCH_PARTITION would win
    over the site's file, and those of a job that this runs in would reach the jobs that it submits.

    Raises:
      UserError: it is not there, fails, or does not answer.
    """
    env = {name: value for name, value in os.environ.items() if name in _KEPT or not _OTHERS.match(name)}
    options = {"capture_output": True, "text": True, "timeout": _TIMEOUT_S}
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, check=False, env=env, **options)  # type: ignore[call-overload]
    except FileNotFoundError:
        raise UserError(
            f"{words[0]}: not found; --on slurm submits from a login node of a Slurm cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer in {_TIMEOUT_S} s; scontrol ping says who is up") from None
    if done.returncode:
        raise UserError(f"{words[0]}: {_reason(done.stderr or done.stdout)}")
    return str(done.stdout).strip()


def queued(run: Runner) -> set[tuple[str, int | None]]:
    """Tasks that wait or run: job, and index of an array's task. Of all users, who may share a sweep."""
    found: set[tuple[str, int | None]] = set()
    for line in run(["squeue", "--noheader", "--all", "--array", "--format=%F %K"]).splitlines():
        job, index = line.split()[:2]
        found.add((job, int(index) if index.isdigit() else None))
    return found


def task_limit(run: Runner) -> int:
    """Indices that an array may have: the cluster's MaxArraySize."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", run(["scontrol", "show", "config"]))
    if found is None or not int(found[1]):
        raise UserError("scontrol show config: says no MaxArraySize; this cluster takes no job arrays")
    return int(found[1])


def submit_all(
    jobs: Sequence[Job],
    report: Path,
    before: Sequence[str],
    note: Callable[[Sequence[str]], None],
    tell: Callable[[str], None],
    run: Runner,
) -> list[str]:
    """Submit jobs, and a report behind them; the numbers that they got, that of the report last.

    Args:
      jobs: options and script of each.
      report: script of the job behind them.
      before: jobs submitted earlier that the report waits for as well.
      note: called with the numbers so far, after each.
      tell: called with a line about a job that has to wait for nodes.
      run: runs a program of Slurm.

    Raises:
      UserError: the cluster refuses one; those that it had taken are cancelled, or named where that fails.
    """
    for options, path in [*jobs, ([], report)]:
        try:
            run(["sbatch", "--test-only", *options, str(path)])
        except UserError as error:
            if not _LATER.search(str(error)):
                raise UserError(f"{error}; {_NOTHING}") from None
            tell(f"{error}; {path.name} waits until there are such nodes")
    numbers: list[str] = []
    try:
        for options, path in jobs:
            numbers.append(_submit([*options, str(path)], run))
            note(numbers)
        after = ":".join([*before, *numbers])
        numbers.append(_submit([f"--dependency=afterany:{after}", str(report)], run))
        note(numbers)
    except BaseException as error:
        state = _NOTHING
        if numbers:
            try:
                run(["scancel", *numbers])
                note([])
            except UserError:
                state = f"cancel these yourself: scancel {' '.join(numbers)}"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {state}") from None
        raise
    return numbers


def _submit(words: Sequence[str], run: Runner) -> str:
    return run(["sbatch", "--parsable", *words]).partition(";")[0]  # NUMBER;CLUSTER


def _reason(said: str) -> str:
    """One line about what went wrong: what to do, where that is known, and Slurm's own words."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in said.splitlines() if line.strip()]
    words = "; ".join(dict.fromkeys(lines[-2:])) or "it said nothing"
    known = next((text for pattern, text in _REASONS if re.search(pattern, words, re.I)), None)
    return f"{words} ({known})" if known else words
