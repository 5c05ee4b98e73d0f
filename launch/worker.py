"""One cohort in one process: `python -m launch.worker FOLDER --parent PID --cells DIR ...`.

Trains the cells together, then evaluates one after the other. Exit codes: 0 done, 2 never worth a retry, 42
saved and to be run again, anything else a fault.
"""

from __future__ import annotations

import argparse
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
    """Run the cohort named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--core", type=int)
    parser.add_argument("--cells", type=Path, nargs="+", required=True)
    words = parser.parse_args()
    _stop_with_parent(words.parent)
    if words.core is not None:  # before jax starts its threads, so that it starts one
        os.sched_setaffinity(0, {words.core})
    from vlmscale.train.loop import PreemptedError
    from vlmscale.train.run import exclusive

    with contextlib.ExitStack() as stack:
        for place in dict.fromkeys([words.folder, *words.cells]):
            # A worker whose launcher was killed may still be saving.
            stack.enter_context(exclusive(place, wait=True))
        try:
            _train_and_evaluate(words.folder, words.cells)
        except UserError as error:
            return _fail(words.cells, str(error), EXIT_USER)
        except PreemptedError as error:
            print(error, file=sys.stderr)
            return EXIT_AGAIN
        except FloatingPointError as error:
            return _fail(words.cells, str(error), EXIT_USER)  # again it would end the same
        except Exception as error:
            fault = disk_fault(error)
            if fault is not None:
                return _fail(words.cells, f"{fault.filename or words.folder}: {fault.strerror}", EXIT_USER)
            traceback.print_exc()
            return _fail(words.cells, f"{type(error).__name__}: {error}".splitlines()[0], 1)
    return 0


def _fail(cells: list[Path], line: str, code: int) -> int:
    print(line, file=sys.stderr)
    for run in cells:
        with contextlib.suppress(OSError):  # a full disk cannot even take the reason
            status = Status(run)
            known = status.read()
            if known["state"] != "done" and known.get("failed_at") is None:
                status.update(state="failed", last_error=line)
    return code


def _train_and_evaluate(folder: Path, runs: list[Path]) -> None:
    from vlmscale.evaluate.loaded import load_run
    from vlmscale.evaluate.runner import evaluate
    from vlmscale.train.cohort import Member
    from vlmscale.train.loop import train
    from vlmscale.train.run import keep_programs, load_prepared

    keep_programs()
    opened = [load_prepared(run) for run in runs]
    members = [Member(cell, run) for (cell, _), run in zip(opened, runs, strict=True)]
    train(members, folder, opened[0][1], lambda step, steps, text: None, _say)
    for run in runs:
        if Status(run).read()["state"] != "done" and (run / "done.json").exists():
            evaluate(load_run(run), tell=_say)
            Status(run).update(state="done", last_error=None)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop_with_parent(parent: int) -> None:
    """Ask this process to save and stop when the launcher is gone, even when it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
