"""What came of cells, as their status.json says, and whether they are to be run again.

Written by whoever holds the claim on their cohort. A cell has three tries: a fault takes one, a mistake all,
and being saved to be run again none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmscale.errors import EXIT_USER
from vlmscale.records import Status

TRIES = 3
CANCEL = "cancel"  # file in a cell's directory: its holder is to save and stop
CANCELLED = "cancelled"  # a state
CLAIMS = "claims"  # folder of a cohort's entries


def unfinished(runs: Sequence[Path]) -> list[Path]:
    """Cells that are still to be done; of a cohort that the others finished none that they left behind."""
    left = {run: status for run in runs if (status := Status(run).read())["state"] != "done"}
    behind = [run for run, status in left.items() if status.get("failed_at") is not None]
    if len(behind) == len(left):
        return [] if len(left) < len(runs) else list(left)
    return [run for run in left if run not in behind]


def held_back(runs: Sequence[Path]) -> str:
    """Why a cohort's unfinished cells are not to be run, or ""."""
    for run in unfinished(runs):
        status = Status(run).read()
        if status["state"] == CANCELLED:
            return f"{run.name} is {CANCELLED}"
        if tries_left(status) < 1:
            return f"{run.name} failed: {status['last_error']}"
    return ""


def tries_left(status: dict[str, Any]) -> int:
    """How often a cell may still be run."""
    left: int = status.get("tries_left", TRIES)
    return left


def fail(runs: Sequence[Path], line: str, code: int) -> None:
    """Note why an attempt ended: unfinished cells have a try less, or none where it is a mistake."""
    for run in runs:
        with contextlib.suppress(OSError):  # a full disk cannot even take the reason
            status = Status(run)
            known = status.read()
            left = 0 if code == EXIT_USER else max(0, tries_left(known) - 1)
            if known["state"] == "done":
                continue
            if known.get("failed_at") is not None:
                status.update(tries_left=left)  # it has its own reason
            else:
                status.update(state="failed", last_error=line, tries_left=left)


def forgive(runs: Sequence[Path]) -> None:
    """Give failed cells all their tries again."""
    for run in runs:
        status = Status(run)
        if status.read()["state"] == "failed":
            status.update(tries_left=TRIES)


def cancel_asked(runs: Sequence[Path]) -> bool:
    """Whether somebody asked for a cell of the cohort to be stopped."""
    return any((run / CANCEL).exists() for run in runs)


def settle_cancel(runs: Sequence[Path]) -> bool:
    """Do what was asked for, unless all is done: whether unfinished cells are cancelled now."""
    asked = cancel_asked(runs)
    left = unfinished(runs) if asked else []
    for run in left:
        Status(run).update(state=CANCELLED)
    for run in runs:
        (run / CANCEL).unlink(missing_ok=True)
    return bool(left)
