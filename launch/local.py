"""Run a sweep on this machine: one process a cohort, each on a core of its own, on all cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from launch.bars import Bars
from launch.cohorts import Cohort
from vlmscale.errors import EXIT_USER
from vlmscale.records import Status, make_directory

_POLL_S = 0.25
_MAX_ATTEMPTS = 3


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
    attempts: dict[str, int] = {}
    running: list[Running] = []
    told = False
    with _signals() as stopped, Bars(cohorts) as bars:
        while running or (waiting and not stopped):
            while waiting and free and not stopped:
                running.append(_start(waiting.pop(0), free.pop(0)))
            if stopped and not told:
                told = True
                for item in running:
                    item.process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_S)
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                free.append(item.core)
                attempts[item.cohort.id] = attempts.get(item.cohort.id, 0) + 1
                if stopped:
                    continue
                if _again(item, attempts[item.cohort.id]):
                    waiting.append(item.cohort)
                bars.finished(item.cohort, item.process.returncode)
            bars.update([item.cohort for item in running])
    return bool(stopped)


def _again(item: Running, attempts: int) -> bool:
    code = item.process.returncode
    if code < 0:  # killed: the process could not write this itself
        for cell in item.cohort.cells:
            if not cell.finished and not cell.left_behind:
                Status(cell.path).update(state="failed", last_error=f"killed by signal {-code}")
    return code not in (0, EXIT_USER) and attempts < _MAX_ATTEMPTS


def _platform() -> str:
    """What cohorts run on: CPUs, unless JAX_PLATFORMS says otherwise."""
    return os.environ.get("JAX_PLATFORMS") or "cpu"


def _start(cohort: Cohort, core: int | None) -> Running:
    make_directory(cohort.path)
    log = (cohort.path / "log.txt").open("a")
    environment = os.environ | {"JAX_PLATFORMS": _platform()}
    place = [] if core is None else ["--core", str(core)]
    cells = [str(cell.path) for cell in cohort.cells]
    words = [str(cohort.path), "--parent", str(os.getpid()), *place, "--cells", *cells]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.worker", *words],
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
