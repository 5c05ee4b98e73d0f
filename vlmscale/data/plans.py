"""The plans of all epochs, behind one another, each made once and shared with worker processes."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlmscale.data.packing import Plan
from vlmscale.errors import UserError

PlanOf = Callable[[int], Plan]  # of an epoch; a pure function that can be pickled
_KNOWN = 3  # epochs whose plan is kept in memory


@runtime_checkable
class Counted(Protocol):
    """Plans whose rows can be counted before they are made."""

    def rows(self, epoch: int) -> int | None:
        """Rows of an epoch, each a block of its own; None where only the plan tells."""


class Plans:
    """The plans of all epochs, behind one another, each made once.

    A plan of a large data set takes seconds, so workers share them as files of a folder: whoever needs one
    first makes it, which is usually the parent, half an epoch ahead.
    """

    def __init__(self, plan_of: PlanOf, shared: bool = False, folder: Path | None = None) -> None:
        self.plan_of = plan_of
        self.folder = Path(tempfile.mkdtemp(prefix="vlmscale-")) if shared else folder
        self._known: dict[int, Plan] = {}
        self._ends: list[int] = []  # blocks up to the end of each epoch
        self._making, self._counting = threading.Lock(), threading.Lock()
        self._ahead = 0  # the last epoch that was asked for ahead

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, (self.plan_of, False, self.folder)

    def remove(self) -> None:
        """Remove the folder, which also sends the workers away (`serve_parent`)."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def block(self, number: int) -> list[np.ndarray]:
        """Sample numbers of each row of a block."""
        epoch, start, _ = self._locate(number)
        return self._epoch(epoch).block(number - start)

    def look_ahead(self, number: int) -> None:
        """Begin to make the next epoch's plan once block `number` lies in the second half of an epoch."""
        epoch, start, end = self._locate(number)
        if 2 * number >= start + end and self._ahead < epoch + 1:
            self._ahead = epoch + 1
            threading.Thread(target=self._make_ahead, args=(epoch + 1,), name="plan", daemon=True).start()

    def _make_ahead(self, epoch: int) -> None:
        with contextlib.suppress(Exception):  # whoever needs the plan makes it again, and meets the error
            self._epoch(epoch)

    def _locate(self, number: int) -> tuple[int, int, int]:
        """The epoch of a block, and the first block of that and of the next."""
        with self._counting:
            while not self._ends or self._ends[-1] <= number:
                blocks = self._blocks(len(self._ends))
                if not blocks:
                    raise UserError("no conversation is left to train on: all were set aside")
                self._ends.append(blocks + (self._ends[-1] if self._ends else 0))
            epoch = int(np.searchsorted(self._ends, number, side="right"))
            return epoch, self._ends[epoch - 1] if epoch else 0, self._ends[epoch]

    def _blocks(self, epoch: int) -> int:
        """Blocks of an epoch, without its plan where that can be: a resume passes all epochs before."""
        rows = self.plan_of.rows(epoch) if isinstance(self.plan_of, Counted) else None
        return self._epoch(epoch).blocks if rows is None else rows  # in blocks of one

    def _epoch(self, epoch: int) -> Plan:
        known = self._known.get(epoch)  # without the lock: another epoch may be in the making
        if known is not None:
            return known
        with self._making:
            if epoch not in self._known:
                self._known[epoch] = self.plan_of(epoch) if self.folder is None else self._share(epoch)
                for old in sorted(self._known)[:-_KNOWN]:
                    del self._known[old]
            return self._known[epoch]

    def _share(self, epoch: int) -> Plan:
        assert self.folder is not None
        path = self.folder / f"{epoch}.npz"
        with (self.folder / f"{epoch}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process that holds it
            if not path.exists():
                plan, temporary = self.plan_of(epoch), self.folder / f"{epoch}.tmp"
                with temporary.open("wb") as file:
                    np.savez(file, samples=plan.samples, row_offsets=plan.row_offsets, rows=plan.rows)
                temporary.replace(path)
        with np.load(path) as arrays:
            return Plan(arrays["samples"], arrays["row_offsets"], int(arrays["rows"]))
