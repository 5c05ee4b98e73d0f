"""Run a sweep on this machine: one process a cohort, each on a core of its own, on all cores.

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
from launch.outcome import CLAIMS, TRIES
from launch.work import note_death
from vlmscale.errors import EXIT_AGAIN, EXIT_USER
from vlmscale.records import make_directory

_POLL_S = 0.25
_LOOK_S = 2.0


@dataclass
class Running:
    """A cohort whose process is alive."""

    cohort: Cohort
    process: subprocess.Popen
    core: int | None


def cores() -> list[int] | list[None]:
    """The cores this process may use, one for each cohort at a time; None where one gets no core of its own.

    So it is where the system does not say, and on an accelerator: there a cohort has all cores to feed it.
    """
    if _platform() != "cpu":
        return [None]
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * max(1, (os.cpu_count() or 1) // 2)


def run_cohorts(cohorts: list[Cohort], workers: int | None) -> bool:
    """Run all unfinished cohorts, the longest first; what became of each cell says its status.

    Returns when none is left, those of other launchers included, or all that are cannot be run.

    Args:
      cohorts: the whole sweep, finished ones included.
      workers: processes at a time; None for one a core.

    Returns:
      Whether a signal stopped the sweep.
    """
    free: list[int | None] = [*cores()]
    if workers is not None:
        free = free[:workers] if free[0] is not None else [None] * workers
    waiting = sorted((c for c in cohorts if not c.finished), key=lambda c: -c.work)
    faults: Counter[str] = Counter()  # also in status.json, if that can be written
    running: list[Running] = []
    elsewhere: dict[str, float] = {}  # when a cohort of others is looked at again
    told = False
    with _signals() as stopped, Bars(cohorts) as bars:
        while running or (waiting and not stopped):
            while free and not stopped and (cohort := _next(waiting, elsewhere)) is not None:
                running.append(_start(cohort, free.pop(0)))
            if stopped and not told:
                told = True
                for item in running:
                    item.process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_S)
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                free.append(item.core)
                if stopped:
                    continue
                faults[item.cohort.id] += item.process.returncode not in (0, EXIT_USER, EXIT_AGAIN)
                if _again(item, faults[item.cohort.id]):
                    waiting.append(item.cohort)
                bars.finished(item.cohort, item.process.returncode)
            bars.update([item.cohort for item in running])
    return bool(stopped)


def command(cohort: Cohort, core: int | None, parent: int | None = None) -> list[str]:
    """What runs a cohort: the words of its process.

    Args:
      cohort: it.
      core: that it is bound to, if any.
      parent: the launcher with which it stops, if any.
    """
    words = [sys.executable, "-P", "-m", "launch.worker", str(cohort.path)]
    words += [] if parent is None else ["--parent", str(parent)]
    words += [] if core is None else ["--core", str(core)]
    return [*words, "--cells", *map(str, cohort.runs)]


def _next(waiting: list[Cohort], elsewhere: dict[str, float]) -> Cohort | None:
    """Take the first cohort out of `waiting` that can be started now, and all that need not be any more."""
    now = time.monotonic()
    for cohort in list(waiting):
        if elsewhere.get(cohort.id, now) > now:
            continue
        if cohort.finished or cohort.held_back:
            waiting.remove(cohort)
        elif holder(FileClaims(cohort.path / CLAIMS)) is None:
            waiting.remove(cohort)
            return cohort
        else:
            elsewhere[cohort.id] = now + _LOOK_S
    return None


def _again(item: Running, faults: int) -> bool:
    code = item.process.returncode
    if code < 0:  # killed: the process could not write this itself
        note_death(item.cohort.path, item.cohort.runs, f"killed by signal {-code}", code)
    return code not in (0, EXIT_USER) and faults < TRIES


def _platform() -> str:
    """What cohorts run on: CPUs, unless JAX_PLATFORMS says otherwise."""
    return os.environ.get("JAX_PLATFORMS") or "cpu"


def _start(cohort: Cohort, core: int | None) -> Running:
    make_directory(cohort.path)
    log = (cohort.path / "log.txt").open("a")
    environment = os.environ | {"JAX_PLATFORMS": _platform()}
    process = subprocess.Popen(
        command(cohort, core, os.getpid()),
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
    )
    log.close()
    return Running(cohort, process, core)


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
