"""Run a sweep on this machine: one process a cell, each on a core of its own, as many as there are cores."""

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
from launch.state import CellDirectory, steps_done
from vlmscale.errors import EXIT_USER
from vlmscale.records import Status

_POLL_S = 0.25
_MAX_ATTEMPTS = 3


@dataclass
class Running:
    """A cell whose process is alive."""

    cell: CellDirectory
    process: subprocess.Popen
    core: int | None


def cores() -> list[int] | list[None]:
    """The cores this process may use; [None] where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * max(1, (os.cpu_count() or 1) // 2)


def run_cells(cells: list[CellDirectory], workers: int | None) -> tuple[list[CellDirectory], bool]:
    """Run all unfinished cells, the longest first.

    Args:
      cells: the whole sweep, finished cells included.
      workers: processes at a time; None for one a core.

    Returns:
      The cells that failed, and whether a signal stopped the sweep.
    """
    free: list[int | None] = [*cores()][: workers or None]
    waiting = sorted((c for c in cells if not c.finished), key=lambda c: -c.work)
    attempts: dict[str, int] = {}
    running: list[Running] = []
    failed: list[CellDirectory] = []
    told = False
    with _signals() as stopped, Bars(cells) as bars:
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
                attempts[item.cell.id] = attempts.get(item.cell.id, 0) + 1
                if stopped:
                    continue
                if _again(item, attempts[item.cell.id]):
                    waiting.append(item.cell)
                elif item.process.returncode:
                    failed.append(item.cell)
                bars.finished(item.cell, item.process.returncode)
            bars.update([(item.cell, steps_done(item.cell)) for item in running])
    return failed, bool(stopped)


def _again(item: Running, attempts: int) -> bool:
    code = item.process.returncode
    if code < 0:  # killed: the process could not write this itself
        Status(item.cell.path).update(state="failed", last_error=f"killed by signal {-code}")
    return code not in (0, EXIT_USER) and attempts < _MAX_ATTEMPTS


def _start(cell: CellDirectory, core: int | None) -> Running:
    log = (cell.path / "log.txt").open("a")
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}

    place = [] if core is None else [str(core)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.worker", str(cell.path), str(os.getpid()), *place],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
    )
    log.close()
    return Running(cell, process, core)


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
