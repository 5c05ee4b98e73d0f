"""A prepared data set: its manifest, its index of columns, its records.

Owns reading and verifying; `prepare.py` makes what is read here. The directory is a TFDS data set, so TFDS
reads the records too, and decodes the pictures; here they stay encoded.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from vlmscale.data.records import Record
from vlmscale.data.shards import Progress, decode_example
from vlmscale.errors import UserError
from vlmscale.records import write_json

NAME, VERSION = "llava", 1
MANIFEST, PARTIAL = "manifest.json", "partial"


class Index(NamedTuple):
    """Columns of one split: n records, which show m images, p distinct pictures (by content) among them."""

    image_offsets: np.ndarray  # [n + 1] int64: record i shows images image_offsets[i] to image_offsets[i + 1]
    picture: np.ndarray  # [m] int32: the picture of each image shown
    picture_record: np.ndarray  # [p] int32: a record that holds the picture's bytes, and ...
    picture_slot: np.ndarray  # [p] int32: ... at which place among its images
    picture_width: np.ndarray  # [p] int32, pixels
    picture_height: np.ndarray  # [p] int32, pixels
    picture_bytes: np.ndarray  # [p] int64, encoded
    picture_sha256: np.ndarray  # [p, 32] uint8, of the encoded bytes
    words: np.ndarray  # [n] int32: LLaVA's count, see `records.count_words`
    turns: np.ndarray  # [n] int32
    task: np.ndarray  # [n] int32, into manifest["tasks"]
    source_index: np.ndarray  # [n] int32: counts the records of all sources, one after the other


class _Instruction(NamedTuple):
    """Records of one shard, as ArrayRecordDataSource wants it told to open no file before it must."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclass(frozen=True)
class Dataset:
    """One split of a prepared data set; made by `open_dataset`.

    Picklable, as path and split alone. Files are opened when they are first read, once in a process; records
    may be read from several threads.
    """

    path: Path
    split: str

    def __len__(self) -> int:
        return int(self.manifest["records"][self.split])

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.path, self.split)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json holds; every key is explained in `prepare.prepare_dataset`."""
        return read_manifest(self.path)

    @cached_property
    def index(self) -> Index:
        """The columns of the split.

        Raises:
            UserError: the file is absent or damaged.
        """
        path = index_file(self.path, self.split)
        try:
            with np.load(path, allow_pickle=False) as columns:
                index = Index(**{name: columns[name] for name in Index._fields})
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from None
        if len(index.words) != len(self):
            raise _damaged(path, f"{len(index.words)} records, but {len(self)} in {MANIFEST}")
        return index

    @cached_property
    def _shards(self) -> list[dict[str, Any]]:
        return [shard for shard in self.manifest["shards"] if shard["split"] == self.split]

    @cached_property
    def _source(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource(
            [
                _Instruction(str(self.path / shard["file"]), 0, shard["records"], shard["records"])
                for shard in self._shards
            ],
            reader_options={"max_parallelism": "0"},  # no threads of its own: the pipeline has them
        )

    def read(self, index: int) -> tuple[Record, list[bytes]]:
        """Record `index`, and the encoded pictures that it shows, in order.

        Raises:
            IndexError: there is no such record.
            UserError: its shard is absent or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            data = self._source[index]
            if not data:  # which the reader says of a file that was cut off
                raise RuntimeError("the file ends before it")
            return decode_example(data)
        except RuntimeError as error:
            ends = np.cumsum([shard["records"] for shard in self._shards])
            shard = self.path / self._shards[int(np.searchsorted(ends, index, "right"))]["file"]
            raise _damaged(shard, error, f"record {index} of {self.split} ") from None

    def record(self, index: int) -> Record:
        """Record `index`, without its pictures."""
        return self.read(index)[0]

    def images(self, index: int) -> list[bytes]:
        """The encoded pictures that record `index` shows, in order."""
        return self.read(index)[1]

    def picture(self, number: int) -> bytes:
        """The encoded bytes of distinct picture `number`."""
        return self.images(int(self.index.picture_record[number]))[int(self.index.picture_slot[number])]


def open_dataset(path: Path, split: str = "train") -> Dataset:
    """A split of a prepared data set.

    Raises:
        UserError: there is none at `path`, it has no such split, or one of its files is not there.
    """
    dataset = Dataset(Path(path), split)
    manifest = dataset.manifest
    if split not in manifest["records"]:
        raise UserError(f"{path}: has no split {split!r}; it has {', '.join(manifest['records'])}")
    needed = [index_file(dataset.path, split)]
    needed += [dataset.path / shard["file"] for shard in manifest["shards"] if shard["split"] == split]
    for file in needed:
        if not file.is_file():
            raise UserError(f"{file}: not found; copy the whole directory again, or prepare it anew")
    return dataset


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the prepared data set in a directory.

    Raises:
        UserError: there is none, or it is of another version.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        started = "its preparation is not finished" if (path / PARTIAL).is_dir() else "no prepared data set"
        raise UserError(f"{path}: {started}; make it with: vlmscale data prepare --out {path}") from None
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from None
    if not isinstance(manifest, dict) or manifest.get("name") != NAME:
        raise UserError(f"{file}: is not the manifest of a prepared data set; use another directory")
    if manifest["version"] != VERSION:
        raise UserError(f"{file}: has version {manifest['version']}, not {VERSION}; prepare the data again")
    return manifest


def add_to_manifest(path: Path, key: str, value: Any) -> dict[str, Any]:
    """Set one key of a prepared data set's manifest, by rename; returns the new manifest."""
    manifest = read_manifest(path) | {key: value}
    write_json(path / MANIFEST, manifest)
    return manifest


def index_file(path: Path, split: str) -> Path:
    """Where the columns of a split are."""
    return path / f"index-{split}.npz"


def verify(dataset: Dataset, progress: Progress) -> int:
    """Read a split back: shards against their sha256, pictures against theirs; returns how many records.

    Raises:
        UserError: something differs or cannot be read; it names the first shard, and how many there are.
    """
    index, shards = dataset.index, dataset._shards
    ends = np.cumsum([0, *(shard["records"] for shard in shards)])

    def check(number: int) -> str | None:
        shard = shards[number]
        path = dataset.path / shard["file"]
        for record in range(ends[number], ends[number + 1]):
            try:
                pictures = dataset.images(record)
            except UserError as error:
                return str(error)
            shown = index.picture[index.image_offsets[record] : index.image_offsets[record + 1]]
            digests = [hashlib.sha256(data).digest() for data in pictures]
            if digests != [index.picture_sha256[picture].tobytes() for picture in shown]:
                return f"{path}: the pictures of record {record} of {dataset.split} are not those prepared"
        with path.open("rb") as file:  # what lies between the records
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                return f"{path}: its bytes are not those that {MANIFEST} names; copy it again"
        return None

    faults = []
    with ThreadPoolExecutor() as pool:  # reading and hashing free the GIL
        for number, fault in enumerate(pool.map(check, range(len(shards)))):
            faults += [fault] * (fault is not None)
            progress(f"verifying {dataset.split}", int(ends[number + 1]), len(dataset))
    if faults:
        raise UserError(f"{faults[0]}" + f" (and {len(faults) - 1} more shards)" * (len(faults) > 1))
    return len(dataset)


def _damaged(path: Path, error: object, what: str = "") -> UserError:
    reason = str(error).split(";")[0]
    return UserError(
        f"{path}: {what}cannot be read ({reason}); copy the file again, or prepare the data anew"
    )
