"""Objects at gs://, by their names below one address: listed, read, and written under conditions.

What is relied on, all of it promised by Google Cloud Storage: an object is written as a whole or not at all;
who lists or reads sees every write that was answered before; and a write under `ifGenerationMatch` is refused
unless the object is of that generation, 0 meaning that there is none.

gcsfs (the extra `gcs`) is imported when a first address is opened. It repeats what a network lost, so a write
may have been made and be told as refused: who writes under a condition looks at what is there.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vlmscale.errors import UserError

SCHEME = "gs://"
_ADDRESS = re.compile(r"gs://(?P<name>[\w.-]+)(?:/(?P<prefix>[\w.=+@~-]+(?:/[\w.=+@~-]+)*))?")
_SMALL = 2**23  # bytes of an object that is written in one request
ABSENT = "0"  # generation of an object that does not exist
_AT_ONCE = 32  # requests
_CLOCK_S = 300.0  # after which the store is asked again what time it is
_FIELDS = "items(name,size,generation,updated,md5Hash,crc32c),nextPageToken"
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Entry(NamedTuple):
    """What a listing says of an object.

    Attributes:
      size: bytes.
      generation: of this content: each write makes a new one.
      updated: when it was written, in seconds of the store's clock.
      checksums: of its content as the store computed them, those that it has: CRC-32C, MD5.
    """

    size: int
    generation: str
    updated: float
    checksums: tuple[str, str]


class Bucket:
    """The objects below one address; cheap to make, and usable from several threads."""

    def __init__(self, address: str) -> None:
        """Of an address such as gs://bucket/runs/x.

        Raises:
          UserError: it is none, or gcsfs is not installed.
        """
        self.address = address.rstrip("/")
        found = _ADDRESS.fullmatch(self.address)
        if found is None:
            raise UserError(f"{address}: give gs://BUCKET/PATH, of letters, digits and any of . _ = + @ ~ -")
        self.name, prefix = found["name"], found["prefix"]
        self._prefix = f"{prefix}/" if prefix else ""
        self._files = _files(address)

    def __truediv__(self, part: str) -> Bucket:
        """The objects below a folder of this one."""
        return Bucket(f"{self.address}/{part}")

    def entries(self, under: str = "", pattern: str = "") -> dict[str, Entry]:
        """All objects by name, in order; a request for each thousand.

        Args:
          under: what their names begin with.
          pattern: that they match instead, where `*` stands for anything but a slash and `**` for anything.

        Raises:
          UserError: there is no such bucket.
          OSError: the store cannot be asked.
        """
        found: dict[str, Entry] = {}
        limits = {"matchGlob": f"{self._prefix}{pattern}"} if pattern else {}
        words = {"prefix": f"{self._prefix}{under}", "fields": _FIELDS} | limits
        page = ""
        while True:
            more = {"pageToken": page} if page else {}
            try:
                told = self._json("GET", "b/{}/o", self.name, **words, **more)
            except FileNotFoundError:
                raise UserError(f"{self.address}: there is no bucket {self.name}") from None
            for item in told.get("items", []):
                found[item["name"].removeprefix(self._prefix)] = _entry(item)
            page = told.get("nextPageToken", "")
            if not page:
                return found

    def look(self, name: str) -> Entry | None:
        """What is known of an object, None where there is none.

        Raises:
          OSError: as `entries`.
        """
        try:
            return _entry(self._json("GET", "b/{}/o/{}", self.name, self._prefix + name))
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int = 0) -> bytes:
        """The content of an object, from a byte on that it must have.

        Raises:
          FileNotFoundError: there is none.
          OSError: as `entries`.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._asking():
            words = {"alt": "media", "headers": headers}
            return bytes(self._files.call("GET", "b/{}/o/{}", self.name, self._prefix + name, **words)[1])

    def write(self, name: str, content: bytes, generation: str | None = None) -> Entry:
        """Write an object of some megabytes at most.

        Args:
          name: of it.
          content: the whole.
          generation: that it must be of now, `ABSENT` where it must not exist; None for any.

        Raises:
          FileExistsError: it is of another generation; or of this write, told twice.
          OSError: as `entries`.
        """
        condition = {} if generation is None else {"ifGenerationMatch": generation}
        url = self._files.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o"
        words = {"uploadType": "media", "name": self._prefix + name, "data": content}
        headers = {"Content-Type": "application/octet-stream"}
        return _entry(self._json("POST", url, self.name, headers=headers, **words, **condition))

    def upload(self, name: str, path: Path) -> None:
        """Write an object of any size from a file.

        Raises:
          OSError: as `entries`.
        """
        if path.stat().st_size < _SMALL:
            self.write(name, path.read_bytes())
            return
        with self._asking():
            self._files.put_file(str(path), f"{self.name}/{self._prefix}{name}")

    def download(self, name: str, path: Path, size: int) -> None:
        """Write a file from an object of any size, which a listing told; it appears when it is whole.

        Raises:
          FileNotFoundError: there is none.
          OSError: as `entries`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            if size < _SMALL:  # the other way asks for its size again
                temporary.write_bytes(self.read(name))
            else:
                with self._asking():
                    self._files.get_file(f"{self.name}/{self._prefix}{name}", str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the store.

        Raises:
          FileNotFoundError: there is none.
          OSError: as `entries`.
        """
        with self._asking():
            here = f"{self.name}/{self._prefix}"
            self._files.cp_file(here + name, here + target)

    def delete(self, name: str) -> None:
        """Delete an object; nothing happens where there is none.

        Raises:
          OSError: as `entries`.
        """
        with self._asking(), contextlib.suppress(FileNotFoundError):
            self._files.call("DELETE", "b/{}/o/{}", self.name, self._prefix + name)

    def now(self) -> float:
        """Seconds of the store's clock, never more than it shows.

        The clock is read off an object that is written now and again; between, this machine counts.
        """
        with _clocks_lock:
            known = _clocks.get(self.name)
            if known is None or time.monotonic() - known[1] > _CLOCK_S:
                probe = f".clock-{uuid.uuid4().hex}"
                written = self.write(probe, b"").updated
                known = _clocks[self.name] = written, time.monotonic()
                self.delete(probe)
        return known[0] + time.monotonic() - known[1]

    def _json(self, method: str, path: str, *parts: str, **words: Any) -> dict[str, Any]:
        with self._asking():
            told: dict[str, Any] = self._files.call(method, path, *parts, json_out=True, **words)
            return told

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Make an OSError of what went wrong on the way."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:  # of a network that is away, too
            refused = "Forbidden" in str(error) or isinstance(error, PermissionError)
            number = errno.EACCES if refused else error.errno or errno.EIO
            raise OSError(number, _line(error), self.address) from error
        except Exception as error:  # of aiohttp, requests, google.auth and gcsfs
            raise OSError(errno.EIO, _line(error), self.address) from error


_clocks: dict[str, tuple[float, float]] = {}  # by bucket: its time, and when by this machine's counting
_clocks_lock = threading.Lock()


def is_bucket(address: str | os.PathLike[str]) -> bool:
    """Whether an address is of a bucket rather than of this machine."""
    return str(address).startswith(SCHEME)


def at_once(make: Callable[[_Item], _Made], items: Iterable[_Item]) -> list[_Made]:
    """What `make` returns for each, many at a time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(_AT_ONCE, "bucket") as pool:
        return list(pool.map(make, items))


def md5_of(path: Path) -> str:
    """The MD5 of a file as a listing shows that of an object."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return base64.b64encode(digest.digest()).decode()


def _entry(item: Mapping[str, Any]) -> Entry:
    updated = datetime.fromisoformat(item["updated"].replace("Z", "+00:00")).timestamp()
    sums = item.get("crc32c") or "", item.get("md5Hash") or ""
    return Entry(int(item["size"]), str(item["generation"]), updated, sums)


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@cache
def _file_system() -> Any:
    import fsspec
    from gcsfs.core import GCSFileSystem  # its core alone: more would ask each bucket of what kind it is

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with all of its source
    # Of Orbax's own as well: a listing that is kept would show it steps that are gone.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return GCSFileSystem(use_listings_cache=False)


def _files(address: str) -> Any:
    try:
        return _file_system()
    except ImportError as error:
        raise UserError(f"{address}: gs:// needs gcsfs; pip install 'vlmscale[gcs]'") from error
