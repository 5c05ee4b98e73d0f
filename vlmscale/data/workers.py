"""Worker processes: they leave signals to their parent, and end when it ends or no longer wants them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from multiprocessing import connection, parent_process
from pathlib import Path

_POLL_S = 0.1  # how often a worker looks whether it is still wanted
_TRACKER = "ignore:resource_tracker:UserWarning"
_GRACE_S = 1.0  # what it is given to end by itself


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_tracker() -> None:
    """Called before the first worker of any kind is started, as Python's resource tracker comes with it.

    It removes batches that lie in shared memory when nobody wants them any more, and warns of a leak.
    """
    if _TRACKER not in sys.warnoptions:  # which it is started with
        sys.warnoptions.append(_TRACKER)


def serve_parent(folder: Path | None = None) -> None:
    """Called first in a worker: it ignores Ctrl-C and SIGTERM, and ends with its parent.

    A signal to the whole process group is the parent's to handle: it may still want its batches in order to
    save. Whatever the worker is at, it is gone once its parent has died, however it died, or a second after
    the parent has removed `folder`, which it leaves to nobody.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(folder,), name="serve-parent", daemon=True).start()


def _watch(folder: Path | None) -> None:
    parent = parent_process()
    assert parent is not None
    while not connection.wait([parent.sentinel], _POLL_S):
        if folder is not None and not folder.exists():
            connection.wait([parent.sentinel], _GRACE_S)
            break
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)  # not 0, by which Grain would take it for one that goes on
