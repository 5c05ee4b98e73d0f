"""One cohort in one process of this machine: `python -m launch.worker FOLDER --parent PID --cells DIR ...`.

Exit codes: as `launch.work`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from launch.work import run_cohort, say
from vlmscale.errors import EXIT_USER, UserError, disk_fault


def main() -> int:
    """Run the cohort named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--core", type=int)
    parser.add_argument("--cells", type=Path, nargs="+", required=True)
    words = parser.parse_args()
    if words.parent is not None:
        _stop_with_parent(words.parent)
    if words.core is not None:  # before jax starts its threads, so that it starts one
        os.sched_setaffinity(0, {words.core})
    try:
        return run_cohort(words.folder, words.cells, wait=False)
    except UserError as error:
        say(str(error))
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        say(f"{fault.filename or words.folder}: {fault.strerror}")
    return EXIT_USER


def _stop_with_parent(parent: int) -> None:
    """Ask this process to save and stop when the launcher is gone, even when it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
