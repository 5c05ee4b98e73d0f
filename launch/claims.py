"""Who works on a cohort: claims that expire, so that no two launchers run it and each result counts once.

Claims are entries numbered from 1, and the last one is the truth: a `claim` (its writer holds the cohort), a
`commit` (the same, and one more cell is done) or a `release` (nobody holds it). An entry is made only if none
has its number yet, which a store decides atomically. So of two that see a claim expired one makes the next
entry, and a holder that was taken over meanwhile can commit nothing any more: its next number is gone.

The holder renews its last entry. It has expired when it was not renewed for `LIFE_S` by the store's own
clock; clocks of machines are never read. A holder on this machine whose process is gone has expired at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIFE_S = 120.0
_RENEWALS = 4  # in a claim's life
_LOOK_S = 2.0
_WAIT_S = 0.5


class LostError(Exception):
    """The claim expired and another took it over: what was worked out under it must not be written."""


class ClaimStore(ABC):
    """Where the entries of one cohort lie. `create` has to be atomic; entries are never removed."""

    @abstractmethod
    def last(self) -> int:
        """Number of the last entry; 0 where there is none."""

    @abstractmethod
    def read(self, number: int) -> dict[str, Any]:
        """What an entry says."""

    @abstractmethod
    def create(self, number: int, entry: dict[str, Any]) -> bool:
        """Make an entry; False, and nothing is changed, where that number exists."""

    @abstractmethod
    def renew(self, number: int) -> None:
        """Note that the holder lives."""

    @abstractmethod
    def age_s(self, number: int) -> float:
        """Seconds since an entry was made or renewed, by the store's clock at both ends."""


class FileClaims(ClaimStore):
    """Entries as files of a directory, on a local disk or NFS.

    A file appears by `link`, complete and only if its name is free, which NFS decides on the server. Its age
    is its own time and that of a file written now, both the server's.
    """

    def __init__(self, folder: Path) -> None:
        """Entries of `folder`, which need not exist."""
        self.folder = folder

    def last(self) -> int:
        """As `ClaimStore`."""
        try:
            names = [name.partition(".") for name in os.listdir(self.folder)]
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return max((int(stem) for stem, _, end in names if stem.isdecimal() and end == "json"), default=0)

    def read(self, number: int) -> dict[str, Any]:
        """As `ClaimStore`; of a file that was cut by a crash nothing."""
        try:
            entry = json.loads(self._path(number).read_text(encoding="utf-8"))
        except ValueError:
            return {}
        return entry if isinstance(entry, dict) else {}

    def create(self, number: int, entry: dict[str, Any]) -> bool:
        """As `ClaimStore`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self._path(number), json.dumps(entry) + "\n"
        with self._written(text) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                # An answer that NFS lost is asked for again, and then it is our own link that exists.
                return temporary.stat().st_nlink == 2
            except OSError:  # no hard links on this disk
                return _create_alone(path, text)
        return True

    def renew(self, number: int) -> None:
        """As `ClaimStore`."""
        os.utime(self._path(number))  # without a time: the server sets its own

    def age_s(self, number: int) -> float:
        """As `ClaimStore`."""
        with self._written("") as temporary:
            now = temporary.stat().st_mtime_ns
        with self._path(number).open("rb") as file:  # NFS asks the server when a file is opened
            return (now - os.fstat(file.fileno()).st_mtime_ns) / 1e9

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    @contextmanager
    def _written(self, text: str) -> Iterator[Path]:
        """A file of its own name, for as long as the block runs."""
        path = self.folder / f".{uuid.uuid4().hex}.tmp"
        try:
            path.write_text(text, encoding="utf-8")
            os.utime(path)
            yield path
        finally:
            path.unlink(missing_ok=True)


class Claim:
    """A cohort that this process holds, until it releases it or loses it."""

    def __init__(self, store: ClaimStore, number: int) -> None:
        """Of the entry that was made."""
        self.store, self.number = store, number
        self._lock = threading.Lock()  # a thread renews what another commits

    def renew(self) -> None:
        """Keep it.

        Raises:
          LostError: another has taken it over.
        """
        with self._lock:
            if self.store.last() > self.number:
                raise LostError(self._lost())
            self.store.renew(self.number)

    def commit(self, cell: str) -> None:
        """Note for good that a cell is done; what is said by no more than one holder.

        Raises:
          LostError: another has taken it over; nothing is committed.
        """
        self._next({"kind": "commit", "cell": cell, **_self()})

    def release(self) -> None:
        """Give it back; nothing happens where it is lost."""
        with contextlib.suppress(LostError):
            self._next({"kind": "release"})

    @contextmanager
    def kept(self, life_s: float, lost: Callable[[], None], look: Callable[[], None]) -> Iterator[None]:
        """Renew it in a thread while the block runs.

        Args:
          life_s: seconds after which it expires.
          lost: called once in that thread when another has it.
          look: called in that thread every two seconds.
        """
        due, every = time.monotonic(), life_s / _RENEWALS

        def keep() -> None:
            nonlocal due
            look()
            if time.monotonic() >= due:
                self.renew()
                due = time.monotonic() + every

        with repeated("claim", min(_LOOK_S, every), keep, lost):
            yield

    def _next(self, entry: dict[str, Any]) -> None:
        with self._lock:
            if not self.store.create(self.number + 1, entry):
                raise LostError(self._lost())
            self.number += 1

    def _lost(self) -> str:
        return f"claim {self.number} expired, and {describe(self.store.read(self.store.last()))} took it over"


@contextmanager
def repeated(
    name: str, every_s: float, action: Callable[[], None], lost: Callable[[], None]
) -> Iterator[None]:
    """Do something again and again in a thread while the block runs.

    Args:
      name: of the thread.
      every_s: seconds before each time.
      action: what is done; also after an OSError, as of a disk or a bucket that is away for a moment.
      lost: called once in that thread, which then ends, when the action raises LostError.
    """
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_s):
            try:
                action()
            except LostError:
                lost()
                return
            except OSError:
                continue

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def take(store: ClaimStore, life_s: float = LIFE_S) -> Claim | None:
    """Claim a cohort that nobody holds; None where somebody does, or was faster.

    Args:
      store: of its entries.
      life_s: seconds after which a claim that is not renewed has expired; the same for all.
    """
    number = store.last()
    if _living(store, number, life_s) is not None:
        return None
    return Claim(store, number + 1) if store.create(number + 1, {"kind": "claim", **_self()}) else None


def wait_and_take(store: ClaimStore, life_s: float = LIFE_S) -> Claim | None:
    """Claim a cohort, waiting for a holder to show life or to expire; None where it shows life."""
    seen: tuple[int, float] | None = None
    while (claim := take(store, life_s)) is None:
        number = store.last()
        age, free = store.age_s(number), store.read(number).get("kind") == "release"
        if seen is not None and not free and (number != seen[0] or age < seen[1]):
            return None
        seen = number, age
        time.sleep(min(_WAIT_S, life_s / _RENEWALS))
    return claim


def holder(store: ClaimStore, life_s: float = LIFE_S) -> dict[str, Any] | None:
    """The last entry, where it is of a holder that has not expired."""
    return _living(store, store.last(), life_s)


def committed(store: ClaimStore) -> set[str]:
    """Cells whose results were committed."""
    entries = [store.read(number) for number in range(1, store.last() + 1)]
    return {entry["cell"] for entry in entries if entry.get("kind") == "commit"}


def describe(entry: dict[str, Any]) -> str:
    """Who made an entry, for a message."""
    return f"process {entry['pid']} on {entry['host']}" if "pid" in entry else "another launcher"


def _create_alone(path: Path, text: str) -> bool:
    """Write a file if there is none; False where there is. What a full disk cuts holds until it expires."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _living(store: ClaimStore, number: int, life_s: float) -> dict[str, Any] | None:
    if not number:
        return None
    entry = store.read(number)
    if entry.get("kind") == "release" or _gone(entry) or store.age_s(number) > life_s:
        return None
    return entry


def _self() -> dict[str, Any]:
    """This process, as an entry names it."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "begun": _begun(pid), "machine": _machine()}


def _machine() -> str | None:
    """What two processes share that see each other's numbers; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _begun(pid: int) -> str | None:
    """When a living process began, in ticks of its machine; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _gone(entry: dict[str, Any]) -> bool:
    """Whether the writer was a process of this machine that has ended."""
    machine = entry.get("machine")
    return machine is not None and machine == _machine() and _begun(entry["pid"]) != entry["begun"]
