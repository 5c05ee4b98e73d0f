"""Run a sweep on this machine: one process a cohort, each on a core or GPUs of its own, on all of them.

Other launchers may run the same directory, here or elsewhere: what they hold is left to them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from launch.bars import Bars
from launch.claims import FileClaims, holder
from launch.cohorts import Cohort
from launch.devices import environment, needed, platform, units
from launch.outcome import CLAIMS, TRIES
from launch.work import note_death
from vlmscale.config import MeshConfig
from vlmscale.errors import EXIT_AGAIN, EXIT_USER
from vlmscale.records import make_directory

_POLL_S = 0.25
_LOOK_S = 2.0


@dataclass
class Running:
    """A cohort whose process is alive."""

    cohort: Cohort
    process: subprocess.Popen
    taken: list[str | None]


def run_cohorts(cohorts: list[Cohort], workers: int | None) -> bool:
    """Run all unfinished cohorts, the longest first; what became of each cell says its status.

    Returns when none is left, those of other launchers included, or all that are cannot be run.

    Args:
      cohorts: the whole sweep, finished ones included.
      workers: processes at a time; None for as many as there is room for.

    Returns:
      Whether a signal stopped the sweep.

    Raises:
      UserError: a mesh that is larger than this machine.
    """
    free: list[str | None] = [*units()]
    needs = {cohort.id: needed(_mesh(cohort), free, cohort.label) for cohort in cohorts}
    if workers is not None and free[0] is None:
        free = [None] * workers
    waiting = sorted((c for c in cohorts if not c.finished), key=lambda c: -c.work)
    faults: Counter[str] = Counter()  # also in status.json, if that can be written
    running: list[Running] = []
    elsewhere: dict[str, float] = {}  # when a cohort of others is looked at again
    told = False
    with _signals() as stopped, Bars(cohorts) as bars:
        while running or (waiting and not stopped):
            while free and not stopped and (workers is None or len(running) < workers):
                if (cohort := _next(waiting, elsewhere, needs, len(free))) is None:
                    break
                running.append(_start(cohort, [free.pop(0) for _ in range(needs[cohort.id])]))
            if stopped and not told:
                told = True
                for item in running:
                    item.process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_S)
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                free += item.taken
                if stopped:
                    continue
                faults[item.cohort.id] += item.process.returncode not in (0, EXIT_USER, EXIT_AGAIN)
                if _again(item, faults[item.cohort.id]):
                    waiting.append(item.cohort)
                bars.finished(item.cohort, item.process.returncode)
            bars.update([item.cohort for item in running])
    return bool(stopped)


def command(cohort: Cohort, core: str | None, parent: int | None = None) -> list[str]:
    """What runs a cohort: the words of its process.

    Args:
      cohort: it.
      core: that it is bound to, if any.
      parent: the launcher with which it stops, if any.
    """
    words = [sys.executable, "-P", "-m", "launch.worker", str(cohort.path)]
    words += [] if parent is None else ["--parent", str(parent)]
    words += [] if core is None else ["--core", core]
    return [*words, "--cells", *map(str, cohort.runs)]


def _next(
    waiting: list[Cohort], elsewhere: dict[str, float], needs: dict[str, int], free: int
) -> Cohort | None:
    """Take the first cohort out of `waiting` that has room and can be started, and all that need not be."""
    now = time.monotonic()
    for cohort in list(waiting):
        if elsewhere.get(cohort.id, now) > now:
            continue
        if cohort.finished or cohort.held_back:
            waiting.remove(cohort)
        elif needs[cohort.id] > free:
            continue
        elif holder(FileClaims(cohort.path / CLAIMS)) is None:
            waiting.remove(cohort)
            return cohort
        else:
            elsewhere[cohort.id] = now + _LOOK_S
    return None


def _again(item: Running, faults: int) -> bool:
    code = item.process.returncode
    if code < 0:  # killed: the process could not write this itself
        note_death(item.cohort.path, item.cohort.runs, f"killed by signal {-code}")
    return code not in (0, EXIT_USER) and faults < TRIES


def _mesh(cohort: Cohort) -> MeshConfig:
    return cohort.cells[0].cell.mesh


def _start(cohort: Cohort, taken: list[str | None]) -> Running:
    make_directory(cohort.path)
    log = (cohort.path / "log.txt").open("a")
    core = taken[0] if platform() == "cpu" else None
    process = subprocess.Popen(
        command(cohort, core, os.getpid()),
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment(_mesh(cohort), taken),
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
    )
    log.close()
    return Running(cohort, process, taken)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
