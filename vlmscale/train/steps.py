"""Where the steps of checkpoints lie, which of them are whole, and what is wrong with the others.

On a disk Orbax writes a step under another name and renames it. A bucket renames nothing: there it writes to
the step's own name and, when all is there, an object that says so, without which a step does not count. Our
manifest is written before that, and names every file with its size and checksum: of a disk that of small
files, of a bucket those that the store computed for all of them, which it tells without reading one.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from vlmscale.bucket import Bucket, Entry, at_once, is_bucket
from vlmscale.records import write_json

MANIFEST, _PARTS = "manifest.json", ("files", "digests")
_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX  # Orbax's, within the name of a step that is not committed
_COMMITTED = "commit_success.txt"  # Orbax's, in a bucket
_SMALL = 2**20  # bytes; files up to this size have a CRC-32: all that say which array lies where


class Steps(ABC):
    """The steps of one folder. What changes it is called on process 0 alone.

    Attributes:
      path: what Orbax is given.
    """

    path: Path | epath.Path

    @abstractmethod
    def inspect(self) -> list[tuple[int, str | None]]:
        """All committed steps, ascending, and what is wrong with their files."""

    @abstractmethod
    def fault(self, step: int) -> str | None:
        """What is wrong with the files of a committed step; one without a manifest is taken at its word."""

    @abstractmethod
    def manifest(self, step: int) -> dict[str, Any] | None:
        """The manifest of a step, None where there is none; a ValueError where it is damaged."""

    @abstractmethod
    def exists(self, step: int) -> bool:
        """Whether a step is there, good or not."""

    @abstractmethod
    def probe(self) -> None:
        """Raise an OSError where nothing can be written, before all processes wait for it."""

    @abstractmethod
    def seal(self, step: int, digests: dict[str, int]) -> None:
        """Write the manifest of a step whose files are all there, before it counts."""

    @abstractmethod
    def remove(self, step: int) -> None:
        """Delete a step; killed on the way, it leaves no step but what `clear` removes."""

    @abstractmethod
    def set_aside(self, step: int, name: str) -> None:
        """Rename a step; an earlier one of that name gives way."""

    @abstractmethod
    def clear(self, *, ignore_errors: bool = False) -> bool:
        """Remove what killed saves left; whether there was any."""


class DiskSteps(Steps):
    """Steps in a folder of a disk."""

    path: Path

    def __init__(self, folder: Path) -> None:
        """Of a folder, which need not exist."""
        self.path = folder.resolve()

    def inspect(self) -> list[tuple[int, str | None]]:
        """As `Steps`."""
        steps = sorted(int(path.name) for path in self.path.glob("*") if path.name.isdigit())
        return [(step, self.fault(step)) for step in steps]

    def fault(self, step: int) -> str | None:
        """As `Steps`."""
        path, name = self.path / str(step), MANIFEST
        try:
            manifest = self.manifest(step)
            if manifest is None:
                return None if any(item.is_dir() for item in path.glob("*")) else "it is empty"
            for name, (size, checksum) in manifest["files"].items():
                if (found := (path / name).stat().st_size) != size:
                    return f"{name} has {found} bytes of {size}"
                own = isinstance(
                    checksum, int
                )  # of one that was saved in a bucket it is the server's, as text
                if own and _checksum(path / name) != checksum:
                    return f"{name} has changed"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except (TypeError, ValueError):  # also a name with a zero byte, and what is no pair
            return f"{MANIFEST} is unreadable"
        return None

    def manifest(self, step: int) -> dict[str, Any] | None:
        """As `Steps`."""
        try:
            return _parsed((self.path / str(step) / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def exists(self, step: int) -> bool:
        """As `Steps`."""
        return (self.path / str(step)).is_dir()

    def probe(self) -> None:
        """As `Steps`."""
        probe = self.path / f"probe{_UNFINISHED}"
        try:
            probe.mkdir(parents=True, exist_ok=True)
            (probe / "probe").write_bytes(bytes(4096))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            shutil.rmtree(probe, ignore_errors=True)

    def seal(self, step: int, digests: dict[str, int]) -> None:
        """As `Steps`."""
        folder = next(self.path.glob(f"{step}{_UNFINISHED}*"), self.path / str(step))
        files: dict[str, list[int | None]] = {}
        for path in sorted(folder.glob("*/**/*")):  # of items; Orbax still writes to the step's own
            if path.is_file():
                size = path.stat().st_size
                checksum = _checksum(path, sync=True) if size <= _SMALL else None
                files[path.relative_to(folder).as_posix()] = [size, checksum]
        write_json(folder / MANIFEST, {"files": files, "digests": digests})
        _checksum(folder / MANIFEST, sync=True)

    def remove(self, step: int) -> None:
        """As `Steps`."""
        # Under a name of the unfinished first: killed here, it is no damaged step but a leftover.
        leftover = self.path / f"old-{step}{_UNFINISHED}"
        (self.path / str(step)).rename(leftover)
        shutil.rmtree(leftover)

    def set_aside(self, step: int, name: str) -> None:
        """As `Steps`."""
        shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / str(step)).rename(self.path / name)

    def clear(self, *, ignore_errors: bool = False) -> bool:
        """As `Steps`."""
        found = list(self.path.glob(f"*{_UNFINISHED}*"))
        for path in found:
            shutil.rmtree(path, ignore_errors)
        return bool(found)


class BucketSteps(Steps):
    """Steps below an address of a bucket."""

    path: epath.Path

    def __init__(self, address: str) -> None:
        """Of an address, where nothing need be yet.

        Raises:
          UserError: as `Bucket`.
        """
        self.bucket = Bucket(address)
        self.path = epath.Path(self.bucket.address)

    def inspect(self) -> list[tuple[int, str | None]]:
        """As `Steps`; one listing, and the manifests."""
        found = self._steps()
        return [(step, self._fault(step, found[step])) for step in sorted(found) if _COMMITTED in found[step]]

    def fault(self, step: int) -> str | None:
        """As `Steps`."""
        return self._fault(step, (self.bucket / str(step)).entries())

    def _fault(self, step: int, there: dict[str, Entry]) -> str | None:
        try:
            manifest = self.manifest(step)
            if manifest is None:
                return None if any("/" in name for name in there) else "it is empty"
            for name, (size, checksum) in manifest["files"].items():
                if name not in there:
                    return f"{name} is missing"
                if there[name].size != size:
                    return f"{name} has {there[name].size} bytes of {size}"
                if there[name].checksums[0] != checksum:
                    return f"{name} has changed"
        except (TypeError, ValueError):  # also what is no pair
            return f"{MANIFEST} is unreadable"
        return None

    def manifest(self, step: int) -> dict[str, Any] | None:
        """As `Steps`."""
        try:
            return _parsed(self.bucket.read(f"{step}/{MANIFEST}").decode())
        except FileNotFoundError:
            return None

    def exists(self, step: int) -> bool:
        """As `Steps`."""
        return self.bucket.look(f"{step}/{_COMMITTED}") is not None

    def probe(self) -> None:
        """As `Steps`."""
        self.bucket.write("probe", b"")
        self.bucket.delete("probe")

    def seal(self, step: int, digests: dict[str, int]) -> None:
        """As `Steps`."""
        found = (self.bucket / str(step)).entries()
        files = {name: [entry.size, entry.checksums[0]] for name, entry in found.items() if "/" in name}
        text = json.dumps({"files": files, "digests": digests}, indent=1) + "\n"
        self.bucket.write(f"{step}/{MANIFEST}", text.encode())

    def remove(self, step: int) -> None:
        """As `Steps`."""
        self.bucket.delete(f"{step}/{_COMMITTED}")  # from here on it is none
        self._delete(f"{step}/")

    def set_aside(self, step: int, name: str) -> None:
        """As `Steps`; killed on the way, the step is still there, or gone."""
        self._delete(f"{name}/")
        found = (self.bucket / str(step)).entries()
        at_once(lambda file: self.bucket.copy(f"{step}/{file}", f"{name}/{file}"), found)
        self.remove(step)

    def clear(self, *, ignore_errors: bool = False) -> bool:
        """As `Steps`."""
        try:
            left = [step for step, there in self._steps().items() if _COMMITTED not in there]
            for step in left:
                self._delete(f"{step}/")
        except OSError:
            if not ignore_errors:
                raise
            return True
        return bool(left)

    def _steps(self) -> dict[int, dict[str, Entry]]:
        """What lies under each number."""
        found: dict[int, dict[str, Entry]] = {}
        for name, entry in self.bucket.entries().items():
            step, _, rest = name.partition("/")
            if step.isdigit() and rest:
                found.setdefault(int(step), {})[rest] = entry
        return found

    def _delete(self, under: str) -> None:
        at_once(self.bucket.delete, self.bucket.entries(under))


def steps_in(place: Path | str) -> Steps:
    """The steps of a folder, or of an address of a bucket."""
    return BucketSteps(str(place)) if is_bucket(place) else DiskSteps(Path(place))


def _parsed(text: str) -> dict[str, Any]:
    """What a manifest says; a ValueError where it is none."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(k), dict) for k in _PARTS):
        raise ValueError("no manifest")
    return manifest


def _checksum(path: Path, *, sync: bool = False) -> int:
    """CRC-32 of a file; `sync` makes it survive a power cut, as TensorStore does for arrays."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return zlib.crc32(file.read())
