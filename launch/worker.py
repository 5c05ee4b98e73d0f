"""One cell in one process: `python -m launch.worker CELL_DIR LAUNCHER_PID [CORE]` runs what spec.json says.

Exit codes: 0 done, 2 a user's mistake, 42 saved and to be run again, anything else a fault.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from vlmscale.errors import EXIT_AGAIN, EXIT_USER, UserError, disk_fault
from vlmscale.records import Status


def main() -> int:
    """Run the cell named on the command line."""
    run = Path(sys.argv[1])
    _stop_with_parent(int(sys.argv[2]))
    if len(sys.argv) > 3:  # before jax starts its threads, so that it starts one
        os.sched_setaffinity(0, {int(sys.argv[3])})
    from vlmscale.train.loop import PreemptedError, exclusive

    status = Status(run)
    with exclusive(run, wait=True):  # a worker whose launcher was killed may still be saving
        try:
            _train_and_evaluate(run)
        except UserError as error:
            return _fail(status, str(error), EXIT_USER)
        except PreemptedError as error:
            print(error, file=sys.stderr)
            return EXIT_AGAIN
        except Exception as error:
            fault = disk_fault(error)
            if fault is not None:
                return _fail(status, f"{fault.filename or run}: {fault.strerror}", EXIT_USER)
            traceback.print_exc()
            return _fail(status, f"{type(error).__name__}: {error}".splitlines()[0], 1)
        status.update(state="done", last_error=None)
    return 0


def _fail(status: Status, line: str, code: int) -> int:
    print(line, file=sys.stderr)
    with contextlib.suppress(OSError):  # a full disk cannot even take the reason
        status.update(state="failed", last_error=line)
    return code


def _train_and_evaluate(run: Path) -> None:
    from vlmscale.evaluate.runner import evaluate, load_run
    from vlmscale.train.loop import load_prepared, train

    cell, prepared = load_prepared(run)
    train(cell, run, prepared, lambda step, steps, loss: None)
    evaluate(load_run(run), None, lambda done, total: None)


def _stop_with_parent(parent: int) -> None:
    """Ask this process to save and stop when the launcher is gone, even when it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
