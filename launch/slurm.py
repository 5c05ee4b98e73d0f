"""Cells of a sweep as arrays of a Slurm cluster, by its own sbatch, and behind them one job that reports.

A task of an array is one cohort, on one node or several with one process each; its index is the place of the
cohort's first cell in sweep.json. `launch.shepherd` runs it there: it has the cohort save before the time is
over, and the job requeued.

A cell with train.init_from in a sweep that is queued as well waits for that sweep's task alone: by
`aftercorr` where the two have one index, else by `afterok` on the task.

What was submitted lies in OUT/slurm/jobs.jsonl. It is for finding jobs again; what came of cells says their
status.json.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.directory import read_sweep
from launch.outcome import CANCELLED
from launch.sbatch import Runner, Task, queued, submit_all, task_limit
from launch.site import Site
from vlmscale.errors import UserError
from vlmscale.records import make_directory, read_rows, write_lines

if TYPE_CHECKING:
    from launch.cohorts import Cohort

FOLDER, _JOBS = "slurm", "jobs.jsonl"
# Tasks of a waiting array that Slurm looks at one by one (correspond_after_task_cnt): one behind them could
# find its own first stage purged meanwhile, and would wait for the whole array.
_CORRESPOND = 10
_ARRAY = 1001  # indices that an array has where a cluster's own limit is not set


@dataclass(frozen=True)
class Array:
    """Tasks that are submitted at once.

    Attributes:
      shape: nodes of a task, and accelerators of each.
      first: what is added to Slurm's index, which a cluster limits, for a cohort's place in the sweep.
      places: of the cohorts' first cells.
      after: the dependency as sbatch reads it, or "".
    """

    shape: tuple[int, int]
    first: int
    places: tuple[int, ...]
    after: str = ""

    @property
    def indices(self) -> str:
        """As sbatch reads them, such as 0-3,7."""
        runs = groupby(enumerate(place - self.first for place in self.places), lambda at: at[1] - at[0])
        ends = [[index for _, index in run] for _, run in runs]
        return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)

    def words(self, at_a_time: int | None) -> list[str]:
        """Options of sbatch beside the script's; at most so many tasks run at a time, None for all."""
        limit = f"%{at_a_time}" if at_a_time else ""
        behind = [f"--dependency={self.after}", "--kill-on-invalid-dep=yes"] if self.after else []
        return [f"--array={self.indices}{limit}", *behind]


@dataclass
class Submitted:
    """What a launch did.

    Attributes:
      jobs: each new job, and the cohorts it runs.
      queued: cohorts that wait or run since an earlier launch.
      report: the job behind all of them, or "".
    """

    jobs: dict[str, list[str]] = field(default_factory=dict)
    queued: list[str] = field(default_factory=list)
    report: str = ""


def arrays(
    cohorts: Mapping[int, Cohort], site: Site, most: int, after: Mapping[int, Sequence[Task]]
) -> list[Array]:
    """How cohorts are submitted.

    Args:
      cohorts: by their places.
      site: of the cluster.
      most: indices that one array may have.
      after: tasks that a cohort waits for, by its place.

    Raises:
      UserError: a mesh that does not fill whole nodes.
    """
    together: dict[tuple[tuple[int, int], int, str, int], list[int]] = {}
    count: Counter[Any] = Counter()
    for place, cohort in sorted(cohorts.items()):
        shape = site.shape(cohort.cells[0].cell.mesh, cohort.label)
        first, waits, part = place // most * most, after.get(place, ()), 0
        if [index for _, index in waits] == [place - first]:
            words = f"aftercorr:{waits[0][0]}"
            part = count[shape, first, words] // _CORRESPOND
            count[shape, first, words] += 1
        else:
            words = ",".join(f"afterok:{job}_{index}" for job, index in waits)
        together.setdefault((shape, first, words, part), []).append(place)
    return [
        Array(shape, first, tuple(places), words) for (shape, first, words, _), places in together.items()
    ]


def script(out: Path, name: str, array: Array, site: Site) -> list[str]:
    """Lines of the batch script of an array: `sbatch --array=INDICES SCRIPT` submits it.

    Raises:
      UserError: a path that Slurm would read otherwise.
    """
    nodes, devices = array.shape
    cores, mem = site.share(devices)
    options = [
        *_common(out, name, site, "%A_%a"),
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([f"--gres={site.gres}:{devices}"] if site.gres else []),
        *([f"--cpus-per-task={cores}"] if cores else []),
        *([f"--mem={mem}"] if mem else []),
        "--requeue",
        f"--signal=B:USR1@{site.signal_s}",
    ]
    words = [sys.executable, "-P", "-m", "launch.shepherd", str(out.resolve()), "--first", str(array.first)]
    words += ["--signal-s", str(site.signal_s), *(f"--srun={word}" for word in site.srun)]
    # Else a cell whose GPUs are not found would take days on a CPU and say nothing.
    devices_of = "JAX_PLATFORMS=cuda,cpu" if site.gres else f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={devices}"
    lines = ["trap '' USR1 TERM  # which the last line takes", f"export {devices_of}"]
    return _script(options, lines, site, [*words, "--", *site.vlmscale])


def report_script(out: Path, name: str, site: Site) -> list[str]:
    """Lines of the batch script of the job that collects the results and writes the report."""
    options = [*_common(out, f"{name}-report", site, "%j"), *site.report]
    words = [*site.vlmscale, "sweep", "report", str(out.resolve())]
    return _script(options, ["export JAX_PLATFORMS=cpu"], site, words)


def submit(
    cohorts: Sequence[Cohort],
    out: Path,
    name: str,
    site: Site,
    at_a_time: int | None,
    tell: Callable[[str], None],
    run: Runner,
) -> Submitted:
    """Submit what is left of a sweep and is not queued already: all of it, or nothing.

    Args:
      cohorts: of the whole sweep.
      out: its directory, which the cluster's nodes see under the same path.
      name: of the sweep, for the queue.
      site: of the cluster.
      at_a_time: tasks of an array that may run at a time; None for all.
      tell: called with a line about what has to wait, or is left out.
      run: runs a program of Slurm, as `launch.sbatch.program` does.

    Raises:
      UserError: no Slurm here, a mesh that does not fit it, no cell whose stage 1 is done or queued, or
        something that sbatch refuses; no job of this launch is left then.
    """
    cells = read_sweep(out).cells
    planned, waiting = plan(cohorts, cells, out, site, tell, run)
    done = Submitted(queued=list(waiting))
    if not planned:
        return done
    make_directory(out / FOLDER)
    jobs = []
    for number, array in enumerate(planned):
        path = out / FOLDER / f"array-{number}.sh"
        write_lines(path, script(out, name, array, site))
        jobs.append((array.words(at_a_time), path))
    write_lines(report := out / FOLDER / "report.sh", report_script(out, name, site))
    known, alive = _records(out), queued(run)

    def note(numbers: Sequence[str]) -> None:
        """At once: a job that nobody knows of would be submitted again."""
        rows: list[dict[str, Any]] = [{"job": number} for number in numbers]
        for row, array in zip(rows, planned, strict=False):
            row |= {"first": array.first, "places": array.places}
        write_lines(out / FOLDER / _JOBS, [json.dumps(row) for row in [*known, *rows]])

    before = sorted({job for job, _ in waiting.values()})
    *numbers, done.report = submit_all(jobs, report, before, note, tell, run)
    by_place = numbered(cohorts, cells)
    for job, array in zip(numbers, planned, strict=True):
        done.jobs[job] = [by_place[place].id for place in array.places]
    old = [row["job"] for row in known if "places" not in row and (row["job"], None) in alive]
    if old:  # reports of earlier launches, which the new one makes idle
        try:
            run(["scancel", *old])
        except UserError as error:
            tell(str(error))
    return done


def plan(
    cohorts: Sequence[Cohort],
    cells: Sequence[str],
    out: Path,
    site: Site,
    tell: Callable[[str], None],
    run: Runner | None,
) -> tuple[list[Array], dict[str, Task]]:
    """What is to be submitted, and by the cohort's id what is queued already.

    Args:
      cohorts: of the sweep.
      cells: ids of the whole sweep, in its order.
      out: its directory.
      site: of the cluster.
      tell: called with a line about each cohort that is left out: cancelled, or behind a stage 1 that is
        neither trained nor queued.
      run: runs a program of Slurm; None where there is none to ask, as for a look at what would be.

    Raises:
      UserError: as `submit`.
    """
    alive, most = (queued(run), task_limit(run)) if run else (set(), _ARRAY)
    by_place, known = numbered(cohorts, cells), _waiting(out, alive)
    left, after, why = {}, {}, ""
    stages = _Stages(alive)
    for place, cohort in by_place.items():
        if place in known or cohort.finished:
            continue
        # A launch gives failed cells their tries again.
        if cohort.held_back.endswith(CANCELLED):
            tell(f"{cohort.label} ({cohort.id}) is left out: {cohort.held_back}; vlmscale sweep retry {out}")
            continue
        try:
            after[place] = stages.before(cohort)
            left[place] = cohort
        except UserError as error:
            why = str(error)
            tell(f"{cohort.label} ({cohort.id}) is left out: {why}")
    if why and not left:
        raise UserError(f"{why}; nothing is submitted")
    waiting = {by_place[place].id: task for place, task in known.items() if place in by_place}
    return arrays(left, site, most, after), waiting


def numbered(cohorts: Sequence[Cohort], cells: Sequence[str]) -> dict[int, Cohort]:
    """Cohorts by the place of their first cell, which stays the same when cohorts are parted."""
    return {cells.index(cohort.cells[0].id): cohort for cohort in cohorts}


def _records(out: Path) -> list[dict[str, Any]]:
    path = out / FOLDER / _JOBS
    return read_rows(path) if path.exists() else []


def _waiting(out: Path, alive: set[tuple[str, int | None]]) -> dict[int, Task]:
    """The task of each place of a sweep that is in the queue."""
    found = {}
    for row in _records(out):
        for place in row.get("places", ()):
            if (row["job"], place - row["first"]) in alive:
                found[place] = (row["job"], place - row["first"])
    return found


class _Stages:
    """The queued tasks that cells of other sweeps wait for; each sweep is read once."""

    def __init__(self, alive: set[tuple[str, int | None]]) -> None:
        self._alive = alive
        self._tasks: dict[Path, dict[str, Task]] = {}

    def before(self, cohort: Cohort) -> list[Task]:
        """The tasks whose cells this cohort's start from and which are not trained.

        Raises:
          UserError: such a cell is neither trained nor queued.
        """
        found: set[Task] = set()
        for cell in cohort.cells:
            run = Path(cell.cell.train.init_from).resolve()
            if not cell.cell.train.init_from or (run / "done.json").exists():
                continue
            task = self._of(run.parent.parent).get(run.name)
            if task is None:
                raise UserError(f"train.init_from={run}: is neither trained nor in the queue; run that first")
            found.add(task)
        return sorted(found)

    def _of(self, out: Path) -> dict[str, Task]:
        """The queued task of each cell of a sweep."""
        if out not in self._tasks:
            sweep = read_sweep(out) if (out / "sweep.json").exists() else None
            tasks = _waiting(out, self._alive) if sweep else {}
            crews = sweep.crews() if sweep and sweep.cohorts else []
            self._tasks[out] = {
                run.name: tasks[place]
                for crew in crews
                for run in crew.runs
                if sweep and (place := sweep.cells.index(crew.runs[0].name)) in tasks
            }
        return self._tasks[out]


def _common(out: Path, name: str, site: Site, job: str) -> list[str]:
    path = str(out.resolve() / FOLDER)
    if any(mark in path for mark in '%"\\\n'):
        raise UserError(
            f'--out {out}: its path has one of % " \\, which Slurm reads otherwise; choose another'
        )
    return [
        f"--job-name={name}",
        f"--output={path}/{job}.txt",
        "--open-mode=append",
        *site.options,
    ]


def _script(options: Sequence[str], lines: Sequence[str], site: Site, command: Sequence[str]) -> list[str]:
    head = [f"#SBATCH {_quoted(word)}" for word in options]
    # exec: Slurm signals the process that the script became, which bash would not pass on.
    last = f"exec {shlex.join(command)}"
    return ["#!/bin/bash", *head, *lines, "set -e", f"cd {shlex.quote(os.getcwd())}", *site.setup, last]


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script, where a blank ends a word.

    Raises:
      UserError: it has a quotation mark.
    """
    name, equals, value = option.partition("=")
    if '"' in option:
        raise UserError(f"option of sbatch {option}: a quotation mark cannot be passed on; leave it out")
    return f'{name}="{value}"' if equals and re.search(r"[\s#']", value) else option
