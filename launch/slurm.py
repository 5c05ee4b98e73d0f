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
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.directory import read_sweep
from launch.sbatch import Runner, Task, queued, submit_all, task_limit
from launch.site import Site
from vlmscale.errors import UserError
from vlmscale.records import make_directory, read_rows, write_lines

if TYPE_CHECKING:
    from launch.cohorts import Cohort

FOLDER, _JOBS = "slurm", "jobs.jsonl"
_ARRAY = 1001  # indices that an array has where a cluster's own limit is not set


@dataclass(frozen=True)
class Array:
    """Tasks that are submitted at once.

    Attributes:
      shape: nodes of a task, and accelerators of each.
      first: what is added to Slurm's index, which a cluster limits, for a cohort's place in the sweep.
      places: of the cohorts.
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
    together: dict[tuple[tuple[int, int], int, str], list[int]] = {}
    for place, cohort in sorted(cohorts.items()):
        shape = site.shape(cohort.cells[0].cell.mesh, cohort.label)
        first = place // most * most
        waits = after.get(place, ())
        if [index for _, index in waits] == [place - first]:
            words = f"aftercorr:{waits[0][0]}"
        else:
            words = ",".join(f"afterok:{job}_{index}" for job, index in waits)
        together.setdefault((shape, first, words), []).append(place)
    return [Array(shape, first, tuple(places), words) for (shape, first, words), places in together.items()]


def script(out: Path, name: str, array: Array, site: Site) -> list[str]:
    """Lines of the batch script of an array: `sbatch --array=INDICES SCRIPT` submits it.

    Raises:
      UserError: a path that Slurm would read otherwise.
    """
    nodes, devices = array.shape
    options = [
        *_common(out, name, site, "%A_%a"),
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([f"--gres={site.gres}:{devices}"] if site.gres else []),
        *([f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []),
        "--requeue",
        f"--signal=B:USR1@{site.signal_s}",
    ]
    words = [sys.executable, "-P", "-m", "launch.shepherd", str(out.resolve()), "--first", str(array.first)]
    words += [f"--srun={word}" for word in site.srun]
    return _script(options, site, [*words, "--", *site.vlmscale])


def report_script(out: Path, name: str, site: Site) -> list[str]:
    """Lines of the batch script of the job that collects the results and writes the report."""
    options = [*_common(out, f"{name}-report", site, "%j"), *site.report]
    return _script(options, site, [*site.vlmscale, "sweep", "report", str(out.resolve())])


def submit(
    cohorts: Sequence[Cohort], out: Path, name: str, site: Site, at_a_time: int | None, run: Runner
) -> Submitted:
    """Submit what is left of a sweep and is not queued already: all of it, or nothing.

    Args:
      cohorts: of the whole sweep.
      out: its directory, which the cluster's nodes see under the same path.
      name: of the sweep, for the queue.
      site: of the cluster.
      at_a_time: tasks of an array that may run at a time; None for all.
      run: runs a program of Slurm, as `launch.sbatch.program` does.

    Raises:
      UserError: no Slurm here, a mesh that does not fit it, a stage 1 that is neither done nor queued, or
        something that sbatch refuses; no job of this launch is left then.
    """
    planned, waiting = plan(cohorts, read_sweep(out).cells, out, site, run)
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
    alive = queued(run)
    old = [row["job"] for row in _records(out) if "places" not in row and (row["job"], None) in alive]
    before = sorted({job for job, _ in waiting.values()})
    *numbers, done.report = submit_all(jobs, report, before, old, run)
    by_place = places(cohorts, read_sweep(out).cells)
    rows: list[dict[str, Any]] = []
    for job, array in zip(numbers, planned, strict=True):
        rows.append({"job": job, "first": array.first, "places": array.places})
        done.jobs[job] = [by_place[place].id for place in array.places]
    lines = [json.dumps(row) for row in [*_records(out), *rows, {"job": done.report}]]
    write_lines(out / FOLDER / _JOBS, lines)
    return done


def plan(
    cohorts: Sequence[Cohort], cells: Sequence[str], out: Path, site: Site, run: Runner | None
) -> tuple[list[Array], dict[str, Task]]:
    """What is to be submitted, and by the cohort's id what is queued already.

    Args:
      cohorts: of the sweep.
      cells: ids of the whole sweep, in its order.
      out: its directory.
      site: of the cluster.
      run: runs a program of Slurm; None where there is none to ask, as for a look at what would be.

    Raises:
      UserError: as `submit`.
    """
    alive, most = (queued(run), task_limit(run)) if run else (set(), _ARRAY)
    by_place, known = places(cohorts, cells), _waiting(out, alive)
    left = {
        place: cohort
        for place, cohort in by_place.items()
        if place not in known and not cohort.finished and not cohort.held_back
    }
    planned = arrays(left, site, most, {place: _waits_for(c, alive) for place, c in left.items()})
    return planned, {by_place[place].id: task for place, task in known.items() if place in by_place}


def places(cohorts: Sequence[Cohort], cells: Sequence[str]) -> dict[int, Cohort]:
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


def _waits_for(cohort: Cohort, alive: set[tuple[str, int | None]]) -> list[Task]:
    """The tasks whose cells this cohort's start from and which are not done.

    Raises:
      UserError: such a cell is neither done nor queued.
    """
    found: set[Task] = set()
    for cell in cohort.cells:
        run = Path(cell.cell.train.init_from).resolve()
        if not cell.cell.train.init_from or (run / "done.json").exists():
            continue
        task = _task_of(run, alive)
        if task is None:
            raise UserError(f"train.init_from={run}: is neither trained nor in the queue; run that first")
        found.add(task)
    return sorted(found)


def _task_of(run: Path, alive: set[tuple[str, int | None]]) -> Task | None:
    """The queued task that trains a cell, if any."""
    out = run.parent.parent
    if not (out / "sweep.json").exists():
        return None
    sweep = read_sweep(out)
    crew = next((crew for crew in sweep.crews() if run in [own.resolve() for own in crew.runs]), None)
    return None if crew is None else _waiting(out, alive).get(sweep.cells.index(crew.runs[0].name))


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


def _script(options: Sequence[str], site: Site, command: Sequence[str]) -> list[str]:
    head = [f"#SBATCH {_quoted(word)}" for word in options]
    # exec: Slurm signals the process that the script became, which bash would not pass on.
    last = f"exec {shlex.join(command)}"
    return ["#!/bin/bash", *head, f"cd {shlex.quote(os.getcwd())}", *site.setup, last]


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script, where a blank ends a word."""
    name, equals, value = option.partition("=")
    return f'{name}="{value}"' if equals and (" " in value or "#" in value) else option
