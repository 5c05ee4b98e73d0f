"""A sweep whose directory lies in a bucket: each process works on a copy in a scratch directory of its own.

Checkpoints are written to the bucket by Orbax, and claims are made there (`launch.bucket_claims`); all other
files are written here and sent by the process that holds the claim: every half minute, before a checkpoint
counts, and before a commit. So

  - what a checkpoint continues (metrics.jsonl) and what a commit stands for (result.jsonl) is in the bucket
    before it;
  - who claims a cohort fetches what its last holder sent, and loses half a minute of answers at most;
  - files are written under the generation that was seen last. A holder that was taken over and comes late is
    refused where its successor has written, asks for its claim and ends; what it wrote before its successor
    did is written over.

The store has to keep what `vlmscale.bucket` names; nothing relies on a rename or on two writes at once.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from launch.bucket_claims import BucketClaims
from launch.claims import Claim, ClaimStore, repeated
from launch.directory import SweepDirectory, read_sweep
from launch.outcome import CANCEL, CLAIMS
from launch.place import Place
from vlmscale.bucket import ABSENT, SCHEME, Bucket, Entry, at_once, is_bucket
from vlmscale.errors import UserError
from vlmscale.records import ADDRESS, CHECKPOINTS, make_directory, write_json

SEND_S = 30.0
_LOOK_S = 10.0
_APART = (CHECKPOINTS, CLAIMS)  # folders that lie in the bucket alone
_STATUS = "status.json"
_INDEX = ".mirror.json"  # in the scratch directory: what is there already
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class _Known(NamedTuple):
    """A file as it was fetched or sent: the object's generation, and the file's time and bytes."""

    generation: str
    time: int
    size: int


class Mirror(Place):
    """The files of a sweep at an address, as one process has them in a scratch directory."""

    shared = False

    def __init__(self, address: str, root: Path) -> None:
        """Of an address and a directory, which may hold what was fetched earlier.

        Raises:
          UserError: as `Bucket`.
        """
        self.bucket, self.root = Bucket(address), root
        self._lock = threading.RLock()  # a thread sends what another commits
        self._looked = 0.0
        self._asked: tuple[Collection[str], Collection[str], int] | None = None
        self._known: dict[str, _Known] = {}
        index = root / _INDEX
        if index.exists():
            self._known = {name: _Known(*known) for name, known in json.loads(index.read_text()).items()}

    def claims(self, folder: Path) -> ClaimStore:
        """As `Place`."""
        return BucketClaims(self.bucket / self._name(folder / CLAIMS))

    def each(self, make: Callable[[_Item], _Made], items: Iterable[_Item]) -> list[_Made]:
        """As `Place`, many at a time."""
        return at_once(make, items)

    def fetch(self, places: Sequence[Path]) -> None:
        """As `Place`; files that the bucket does not have go: they are of a process that died here.

        Raises:
          OSError: the bucket cannot be read.
        """
        names = {self._name(place): place for place in places}
        listed = at_once(lambda name: self.bucket.entries(f"{name}/"), names)
        found = {name: entry for some in listed for name, entry in some.items() if not _apart(name)}
        here = {self._name(path) for place in places for path in below(place)}
        with self._lock:
            self._fetch(found, here - found.keys())
        for name, place in names.items():
            if name.partition("/")[0] in ("cells", "cohorts"):
                place.mkdir(parents=True, exist_ok=True)
                (place / ADDRESS).write_text(f"{self.bucket.address}/{name}/{CHECKPOINTS}\n")

    def refresh(self, runs: Sequence[Path]) -> None:
        """As `Place`."""
        names = [self._name(run / file) for run in runs for file in (_STATUS, CANCEL)]
        looked = dict(zip(names, at_once(self.bucket.look, names), strict=True))
        found = {name: entry for name, entry in looked.items() if entry is not None}
        with self._lock:
            self._fetch(found, looked.keys() - found.keys())

    def fetch_files(self, names: Collection[str], tails: Collection[str] = (), last: int = 0) -> None:
        """Bring sweep.json, and of all cells only some files.

        Args:
          names: of the files.
          tails: of those of which the last bytes are enough. A mirror with such must not send.
          last: how many.

        Raises:
          UserError: there is no sweep.
          OSError: the bucket cannot be read.
        """
        self._asked = names, tails, last
        every = ",".join((*names, *tails))
        found = self.bucket.entries(pattern=f"cells/*/{{{every}}}") if every else {}
        sweep = self.bucket.look("sweep.json")
        if sweep is None:
            raise UserError(f"{self.bucket.address}/sweep.json: not found; is a sweep there?")
        found["sweep.json"] = sweep
        whole = {name: entry for name, entry in found.items() if name.rpartition("/")[2] not in tails}
        with self._lock:
            gone = [name for name in self._known if name not in found and name.rpartition("/")[2] in names]
            self._fetch(whole, gone)
            ends = {n: e for n, e in found.items() if n not in whole and self._differs(n, e, size=None)}

            def bring(name: str) -> None:
                path = self.root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                    path.write_bytes(self.bucket.read(name, max(0, ends[name].size - last)))
                    self._note(name, ends[name])

            at_once(bring, ends)

    def again(self) -> None:
        """As `Place`."""
        if self._asked is not None:
            self.fetch_files(*self._asked)

    def send(self, places: Sequence[Path], claim: Claim | None) -> None:
        """As `Place`; of a folder all files below it that have changed, or a file."""
        with self._lock:
            files = [path for place in dict.fromkeys(places) for path in below(place)]
            names = {self._name(path): path for path in files}
            under = tuple(f"{self._name(place)}/" for place in places)
            gone = [name for name in list(self._known) if name.startswith(under) and name not in names]
            changed = [name for name, path in names.items() if self._changed(name, path)]
            if not gone and not changed:
                return
            if claim is not None:
                claim.renew()  # raises where it is lost
            at_once(lambda name: self._send(name, names[name], claim), changed)
            at_once(self.bucket.delete, gone)
            for name in gone:
                del self._known[name]

    @contextmanager
    def kept(self, places: Sequence[Path], claim: Claim) -> Iterator[None]:
        """As `Place`, every half minute."""
        # Of a claim that is lost the thread that keeps it tells.
        with repeated("mirror", SEND_S, lambda: self.send(places, claim), lambda: None):
            yield

    def look(self, runs: Sequence[Path], *, now: bool = False) -> None:
        """As `Place`, every ten seconds."""
        if not now and time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        names = [self._name(run / CANCEL) for run in runs]
        for name, entry in zip(names, at_once(self.bucket.look, names), strict=True):
            if entry is not None:  # not under the lock: who keeps the claim must not wait for a long sending
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                (self.root / name).touch()
                self._note(name, entry)

    def _fetch(self, found: dict[str, Entry], gone: Collection[str]) -> None:
        """Bring objects that are not here as they are there; remove the files of those that are gone."""
        wanted = [name for name, entry in found.items() if self._differs(name, entry, entry.size)]

        def bring(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                self.bucket.download(name, self.root / name, found[name].size)
                self._note(name, found[name])

        at_once(bring, wanted)
        for name in gone:
            (self.root / name).unlink(missing_ok=True)
            self._known.pop(name, None)
        if wanted or gone:
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(self.root / _INDEX, dict(self._known))

    def _differs(self, name: str, entry: Entry, size: int | None) -> bool:
        """Whether an object is not what is here; its file has to be as it was left, of `size` where given."""
        known = self._known.get(name)
        if known is None or known.generation != entry.generation:
            return True
        return self._changed(name, self.root / name) or size not in (None, known.size)

    def _changed(self, name: str, path: Path) -> bool:
        known = self._known.get(name)
        try:
            about = path.stat()
        except FileNotFoundError:
            return known is not None
        return known is None or (known.time, known.size) != (about.st_mtime_ns, about.st_size)

    def _note(self, name: str, entry: Entry) -> None:
        about = (self.root / name).stat()
        self._known[name] = _Known(entry.generation, about.st_mtime_ns, about.st_size)

    def _send(self, name: str, path: Path, claim: Claim | None) -> None:
        try:
            about, content = path.stat(), path.read_bytes()  # what is appended meanwhile is seen next time
        except FileNotFoundError:
            return  # one that was there for a moment
        known = self._known.get(name)
        try:
            entry = self.bucket.write(name, content, known.generation if known else ABSENT)
        except FileExistsError:
            there = self.bucket.look(name)
            if there is not None and there.checksums[1] == _md5(content):
                entry = there  # our own, whose answer was lost
            elif claim is None:
                raise UserError(f"{self.bucket.address}/{name}: has changed meanwhile; try again") from None
            else:
                claim.renew()  # raises where a successor wrote it
                entry = self.bucket.write(name, content, ABSENT if there is None else there.generation)
        self._known[name] = _Known(entry.generation, about.st_mtime_ns, about.st_size)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def below(place: Path) -> Iterator[Path]:
    """The files of a folder that the bucket is to have, or a file itself."""
    if place.is_file():
        yield place
    for path in sorted(place.rglob("*")) if place.is_dir() else ():
        parts = path.relative_to(place).parts
        hidden = any(part.startswith(".") for part in parts)  # locks, and what is being written
        if path.is_file() and not hidden and parts[0] not in (*_APART, ADDRESS):
            yield path


def _apart(name: str) -> bool:
    """Whether an object is of a folder that lies in the bucket alone."""
    parts = name.split("/")
    return parts[0] in ("cells", "cohorts") and len(parts) > 3 and parts[2] in _APART


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


@contextmanager
def reached(
    where: Path | str,
    files: Collection[str] = (),
    tails: Collection[str] = (),
    last: int = 0,
    scratch: Path | None = None,
) -> Iterator[SweepDirectory]:
    """A sweep's directory, or a copy for the block of one in a bucket, with some files of each cell.

    Args:
      where: a directory, or an address.
      files: names of the files that the copy has to have.
      tails: as `Mirror.fetch_files`; so `last`. With such nothing is to be changed.
      scratch: directory of the copy, which stays and spares fetching again; None for one that goes.

    Raises:
      UserError: there is no sweep, or another process has the scratch directory.
      OSError: the bucket cannot be read.
    """
    if not is_bucket(where):
        yield read_sweep(Path(where))
        return
    with ExitStack() as stack:
        if scratch is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlmscale-")))
        else:
            folder = scratch.resolve()
            stack.enter_context(_held(folder))
        # The bucket's name stands in what is said of a file.
        mirror = Mirror(str(where), folder / str(where).removeprefix(SCHEME).strip("/"))
        mirror.fetch_files(files, tails, last)
        with _addressed(mirror):
            yield read_sweep(mirror.root, mirror)


@contextmanager
def _addressed(mirror: Mirror) -> Iterator[None]:
    """Let messages name the address that the user gave, not its copy, which may be gone by then."""
    try:
        yield
    except UserError as error:
        text = str(error).replace(str(mirror.root), mirror.bucket.address)
        if text == str(error):
            raise
        raise UserError(text) from error


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    make_directory(folder)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--scratch {folder}: another process has it; give each its own") from error
        yield


@contextmanager
def told() -> Iterator[None]:
    """Make one line of what a bucket refused; not for jobs, which try again."""
    try:
        yield
    except OSError as error:
        if not is_bucket(error.filename or ""):
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error
