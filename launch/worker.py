"""One cell in one process: `python -m launch.worker CELL_DIR [CORE]` runs what spec.json says.

Exit codes: 0 done, 2 a user's mistake, 42 saved and to be run again, anything else a fault.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from vlmscale.errors import UserError, disk_fault
from vlmscale.records import Status

EXIT_USER, EXIT_AGAIN = 2, 42


def main() -> int:
    """Run the cell named on the command line."""
    run = Path(sys.argv[1])
    if len(sys.argv) > 2:  # before jax starts its threads, so that it starts one
        os.sched_setaffinity(0, {int(sys.argv[2])})
    _stop_with_parent()
    # Held until this process ends, however it ends: a second worker on the same cell waits here.
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = Status(run)
        try:
            _train_and_evaluate(run)
        except UserError as error:
            status.update(state="failed", last_error=str(error))
            print(error, file=sys.stderr)
            return EXIT_USER
        except Exception as error:
            if type(error).__name__ == "PreemptedError":
                print(error, file=sys.stderr)
                return EXIT_AGAIN
            fault = disk_fault(error)
            if fault is not None:
                line = f"{fault.filename or run}: {fault.strerror}"
                print(line, file=sys.stderr)
                with contextlib.suppress(OSError):
                    status.update(state="failed", last_error=line)
                return EXIT_USER
            status.update(state="failed", last_error=f"{type(error).__name__}: {error}".splitlines()[0])
            traceback.print_exc()
            return 1
        status.update(state="done", last_error=None)
    return 0


def _train_and_evaluate(run: Path) -> None:
    from vlmscale.evaluate.runner import evaluate, load_run
    from vlmscale.train.loop import load_prepared, train

    cell, prepared = load_prepared(run)
    train(cell, run, prepared, lambda step, steps, loss: None)
    evaluate(load_run(run), None, lambda done, total: None)


def _stop_with_parent() -> None:
    """Ask this process to save and stop when the launcher is gone, even when it was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
