"""Tower outputs of distinct pictures on disk: written front to back by shards, read at random. No jax.

A store is a directory: `store.json`, and ArrayRecord shards with one record a picture, which holds the raw
little-endian bytes of its arrays one after another. store.json is renewed after each shard, so it always says
which shards are finished; a store is complete when it lists all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from vlmscale.errors import UserError, disk_fault
from vlmscale.records import read_json, write_json

META = "store.json"
_VERSION = 1
_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Compression is off: zstd saves a fifth of random bfloat16 values and reads 3.6 times slower on one core.
_OPTIONS = "group_size:1,uncompressed"
_SHARD_BYTES = 2**28
_MAX_SHARDS = 256  # each reader keeps them all open, and many systems allow 1024 files a process


class ArraySpec(NamedTuple):
    """Shape and dtype ("float32" or "bfloat16") of one picture's array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class _File(NamedTuple):
    """A shard as ArrayRecordDataSource wants it, so that it opens no file before it reads from it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def shard_size(records: int, record_bytes: int, together: int) -> int:
    """Records of a shard: a multiple of `together`, of about 256 MiB, and more where there are very many.

    A multiple, so that a writer which begins at a shard makes the same batches as one that began at 0.
    """
    target = max(_SHARD_BYTES, records * record_bytes // _MAX_SHARDS)
    return max(1, -(-target // (record_bytes * together))) * together


class StoreWriter:
    """Writes a store front to back; what an earlier writer finished of the same store is kept.

    Use it as a context manager: leaving it removes an unfinished shard. Its bytes depend on the arguments and
    the values alone, not on interruptions, provided that values do not depend on where a writer began.

    Attributes:
      done: records of finished shards; `append` goes on behind them.
    """

    def __init__(
        self, path: Path, key: str, records: int, arrays: Mapping[str, ArraySpec], shard_records: int
    ) -> None:
        """Begin or continue a store.

        Args:
          path: its directory, made if absent.
          key: hash of all that the values depend on.
          records: how many it will hold; 0 is complete at once.
          arrays: what each record holds, in the order of the file.
          shard_records: records of each shard but the last, see `shard_size`.

        Raises:
          UserError: the directory holds another store, or cannot be written to.
        """
        self.path = path
        self._layout: dict[str, Any] = {
            "version": _VERSION,
            "key": key,
            "records": records,
            "shard_records": shard_records,
            "arrays": {
                name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in arrays.items()
            },
        }
        self._arrays = dict(arrays)
        self._shards: list[dict[str, Any]] = []
        self._total = -(-records // shard_records)
        self._writer: ArrayRecordWriter | None = None
        self._filled = 0  # records of the shard at hand
        if (path / META).exists():
            self._shards = self._finished()
        else:
            try:
                path.mkdir(parents=True, exist_ok=True)
                self._save()
            except OSError as error:
                raise self._fault(error) from error
        self.done = sum(shard["records"] for shard in self._shards)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # on a full disk; the shard is given up anyway
                self._writer.close()
            self._writer = None
            self._temporary.unlink(missing_ok=True)

    def append(self, values: Mapping[str, np.ndarray]) -> None:
        """Write the next records.

        Args:
          values: of each array [b, ...], in its own dtype.

        Raises:
          UserError: the disk is full or refuses; finished shards are kept.
          ValueError: the arrays are not those of the store, or more than it has room for.
        """
        rows = self._rows(values)
        for row in rows:
            if self._writer is None:
                self._writer = self._open()
            self._writer.write(row)
            self._filled += 1
            left = self._layout["records"] - self.done - self._filled
            if left == 0 or self._filled == self._layout["shard_records"]:
                self._finish()
        if self._writer is not None and not self._writer.ok():  # a failed write() does not raise
            self._finish()

    def _rows(self, values: Mapping[str, np.ndarray]) -> list[bytes]:
        if values.keys() != self._arrays.keys():
            raise ValueError(f"a store of {sorted(self._arrays)} cannot hold {sorted(values)}")
        count = len(next(iter(values.values())))
        if self.done + self._filled + count > self._layout["records"]:
            raise ValueError(f"{self.path}: {count} records are more than the store has room for")
        for name, spec in self._arrays.items():
            if values[name].shape != (count, *spec.shape) or values[name].dtype != _DTYPES[spec.dtype]:
                found = f"{values[name].dtype} {list(values[name].shape)}"
                raise ValueError(f"{name} is {found}, not {spec.dtype} {[count, *spec.shape]}")
        return [b"".join(values[name][row].tobytes() for name in self._arrays) for row in range(count)]

    @property
    def _name(self) -> str:
        return f"pictures.array_record-{len(self._shards):05d}-of-{self._total:05d}"

    @property
    def _temporary(self) -> Path:
        return self.path / f".{self._name}.tmp"  # of one name, so that the next writer writes over it

    def _open(self) -> ArrayRecordWriter:
        try:
            return ArrayRecordWriter(str(self._temporary), _OPTIONS)
        except RuntimeError as error:
            raise self._fault(error) from error

    def _finish(self) -> None:
        """Make the shard at hand durable, then list it."""
        temporary, name, writer = self._temporary, self._name, self._writer
        assert writer is not None
        self._writer = None
        try:
            writer.close()
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = temporary.stat().st_size
            temporary.replace(self.path / name)
            self._shards.append({"file": name, "records": self._filled, "bytes": size, "sha256": digest})
            self._save()
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise self._fault(error) from error
        self.done += self._filled
        self._filled = 0

    def _save(self) -> None:
        write_json(self.path / META, self._layout | {"shards": self._shards})

    def _finished(self) -> list[dict[str, Any]]:
        """Finished shards of an earlier writer, up to the first whose file is not there in full."""
        meta = _read_meta(self.path, self._layout["key"])
        if {name: meta[name] for name in self._layout} != self._layout:
            raise UserError(f"{self.path}: was begun by another version of vlmscale; remove it")
        kept = []
        for shard in meta["shards"]:
            if _size(self.path / shard["file"]) != shard["bytes"]:
                break
            kept.append(shard)
        return kept

    def _fault(self, error: OSError | RuntimeError) -> UserError:
        fault = disk_fault(error)
        reason = fault.strerror if fault is not None else " ".join(str(error).split())[:200]
        kept = f"{len(self._shards)} of {self._total} shards are finished and kept"
        return UserError(f"{self.path}: {reason}; {kept}: put that right and run this again")


@dataclass(frozen=True)
class Store:
    """A finished store. Picklable; files are opened when they are first read from, once a process.

    Attributes:
      path: its directory.
      key: hash of all that the values depend on.
      arrays: what each record holds.
    """

    path: Path
    key: str
    arrays: dict[str, ArraySpec]
    _shards: tuple[dict[str, Any], ...] = field(repr=False)
    _files: ArrayRecordDataSource | None = field(repr=False, compare=False)  # None where it has no record

    def __len__(self) -> int:
        return 0 if self._files is None else len(self._files)

    def __getitem__(self, picture: int) -> dict[str, np.ndarray]:
        """The arrays of one picture by name, read-only, in their stored dtypes.

        Raises:
          IndexError: there is no such picture.
          UserError: its shard is damaged.
        """
        return self._unpack(self._read([picture])[0])

    def gather(self, pictures: Sequence[int]) -> dict[str, np.ndarray]:
        """The arrays of some pictures, each stacked to [b, ...].

        Raises:
          IndexError, UserError: as for one picture.
        """
        rows = [self._unpack(record) for record in self._read(pictures)]
        out = {}
        for name, spec in self.arrays.items():
            out[name] = np.empty((len(rows), *spec.shape), _DTYPES[spec.dtype])
            for index, row in enumerate(rows):
                out[name][index] = row[name]
        return out

    def verify(self) -> None:
        """Read every shard and compare its hash.

        Raises:
          UserError: naming the first that is absent or differs from what was written.
        """
        for shard in self._shards:
            path = self.path / shard["file"]
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _damaged(path, error.strerror or str(error)) from error
            if digest != shard["sha256"]:
                raise _damaged(path, "its sha256 is not that of store.json")

    def _read(self, pictures: Sequence[int]) -> Sequence[bytes]:
        wrong = [picture for picture in pictures if not 0 <= picture < len(self)]
        if wrong:
            raise IndexError(f"{self.path}: has {len(self)} pictures, and so none of number {wrong[0]}")
        if self._files is None or not len(pictures):
            return []
        try:
            if len(pictures) == 1:
                return [self._files[pictures[0]]]
            return self._files.__getitems__(pictures)
        except RuntimeError as error:
            if len(pictures) > 1:  # which one it is
                return [self._read([picture])[0] for picture in pictures]
            shard = self._shards[pictures[0] // self._shards[0]["records"]]
            raise _damaged(self.path / shard["file"], str(error)[:200]) from error

    def _unpack(self, record: bytes) -> dict[str, np.ndarray]:
        out, start = {}, 0
        for name, spec in self.arrays.items():
            count = math.prod(spec.shape)
            out[name] = np.frombuffer(record, _DTYPES[spec.dtype], count, start).reshape(spec.shape)
            start += spec.nbytes
        return out


def open_store(path: Path, key: str) -> Store:
    """A finished store.

    Args:
      path: its directory.
      key: hash of all that the values should depend on.

    Raises:
      UserError: there is none, it has another key, is not complete, or lacks (a part of) a file.
    """
    meta = _read_meta(path, key)
    shards = meta["shards"]
    done = sum(shard["records"] for shard in shards)
    if done < meta["records"]:
        raise UserError(
            f"{path}: holds {done} of {meta['records']} pictures; run the command that writes it again"
        )
    for shard in shards:
        size = _size(path / shard["file"])
        if size != shard["bytes"]:
            found = "is not there" if size is None else f"has {size} bytes, not {shard['bytes']}"
            raise _damaged(path / shard["file"], found)
    files = [_File(str(path / shard["file"]), 0, shard["records"], shard["records"]) for shard in shards]
    arrays = {name: ArraySpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in meta["arrays"].items()}
    return Store(path, key, arrays, tuple(shards), ArrayRecordDataSource(files) if files else None)


def _read_meta(path: Path, key: str) -> dict[str, Any]:
    """store.json, checked to be one of this version and of this key."""
    where = path / META
    if not where.is_file():
        raise UserError(f"{path}: holds no store of tower outputs ({META} is not there); write one first")
    meta = read_json(where)
    names = {"version", "key", "records", "shard_records", "arrays", "shards"}
    if not isinstance(meta, dict) or not names <= meta.keys():
        raise UserError(f"{where}: damaged; remove the folder and run the command that writes it again")
    if meta["version"] != _VERSION:
        raise UserError(f"{where}: is of format {meta['version']}, this version of vlmscale reads {_VERSION}")
    if meta["key"] != key:
        raise UserError(
            f"{path}: holds the outputs of another tower, of other pictures or other settings; "
            "name another folder, or remove this one"
        )
    return meta


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged ({reason}); remove it and run the command that writes the store again")
