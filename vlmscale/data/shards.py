"""One shard of a prepared data set: from records and pictures to an ArrayRecord file and its columns.

Owns the wire format (that of TFDS, so that its builders read it), the check of a picture, and what is known
of a shard without opening it (`Part`). Which records go where is `prepare.py`'s business, reading is
`dataset.py`'s.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from vlmscale.data.images import ImageError, decode_image
from vlmscale.data.records import (
    Record,
    RefusedError,
    Turn,
    count_words,
    id_text,
    locate_image,
    parse_record,
    quote,
)
from vlmscale.errors import UserError

Progress = Callable[[str, int, int], None]  # what, done, total
RECORD_BYTES = 2**30  # of all pictures of one record; a message of its wire format ends at 2 GiB
_AS_TFDS = ("RGB", "L")  # modes of Pillow that TFDS decodes to the pixels that training sees
# Pictures do not shrink, and reading goes faster; one record is one chunk, with a hash of its own.
_WRITER = "group_size:1,uncompressed"


class FileState(NamedTuple):
    """What tells that a picture's file is still the same: size in bytes (-1: not there) and time in ns."""

    size: int
    time: int


class Shown(NamedTuple):
    """What the check of a picture found. `format` and `mode` are Pillow's names, of the file as it came."""

    sha256: bytes
    width: int
    height: int
    size: int  # bytes
    format: str
    mode: str


class _Picture(NamedTuple):
    """A picture's file."""

    data: bytes
    sha256: bytes


@dataclass
class Part:
    """What a finished shard holds, as columns: n records, m images shown, k files named."""

    sha256: str = ""  # of the shard's file
    file_bytes: int = 0
    payload_bytes: int = 0  # of the examples alone, as TFDS counts them
    id_hash: list[int] = field(default_factory=list)  # [n]
    source_index: list[int] = field(default_factory=list)  # [n]
    task: list[str] = field(default_factory=list)  # [n]
    turns: list[int] = field(default_factory=list)  # [n]
    words: list[int] = field(default_factory=list)  # [n]
    images: list[int] = field(default_factory=list)  # [n], how many
    shown: list[Shown] = field(default_factory=list)  # [m]
    files: dict[str, tuple[FileState, bytes]] = field(default_factory=dict)  # [k], with sha256 or b""
    quarantined: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """The records of one shard, as their places in the sources; arrays are [n]."""

    target: Path  # without suffix
    sources: tuple[Path, ...]
    images: Path | None
    source: np.ndarray  # which of the sources
    index: np.ndarray  # counts the records of its source
    position: np.ndarray  # counts the records of all sources
    start: np.ndarray  # bytes of its source
    end: np.ndarray


@lru_cache(maxsize=1)
def features() -> tfds.features.FeaturesDict:
    """What an example holds; pictures stay encoded until they are read through TFDS."""
    kinds = tfds.features
    return kinds.FeaturesDict(
        {
            "id": kinds.Text(),
            "images": kinds.Sequence(kinds.Image(shape=(None, None, 3))),
            "image_names": kinds.Sequence(kinds.Text()),
            "turns": kinds.Sequence({"question": kinds.Text(), "answer": kinds.Text()}),
            "task": kinds.Text(),
            "task_group": kinds.Text(),
            "chance": np.float32,
        }
    )


def encode_example(record: Record, pictures: Sequence[bytes]) -> bytes:
    """A record and its encoded pictures as TFDS would write them, a tf.train.Example.

    The message is built as such: TFDS's own serialiser takes ten times as long, and gives the keys in an
    order that differs from process to process.
    """
    texts = {
        "id": [record.id],
        "image_names": record.images,
        "turns/question": [turn.question for turn in record.turns],
        "turns/answer": [turn.answer for turn in record.turns],
        "task": [record.task],
        "task_group": [record.task_group],
    }
    lists = {key: [text.encode() for text in values] for key, values in texts.items()} | {"images": pictures}
    kinds = tf_feature_pb2
    values = {key: kinds.Feature(bytes_list=kinds.BytesList(value=data)) for key, data in lists.items()}
    values["chance"] = kinds.Feature(float_list=kinds.FloatList(value=[record.chance]))
    example = tf_example_pb2.Example(features=kinds.Features(feature=values))
    return bytes(example.SerializeToString(deterministic=True))


def decode_example(data: bytes) -> tuple[Record, list[bytes]]:
    """The inverse of `encode_example`; `chance` has the digits of a float32."""
    values = tf_example_pb2.Example.FromString(data).features.feature

    def texts(key: str) -> list[str]:
        return [value.decode() for value in values[key].bytes_list.value]

    turns = zip(texts("turns/question"), texts("turns/answer"), strict=True)
    record = Record(
        texts("id")[0],
        tuple(texts("image_names")),
        tuple(Turn(question, answer) for question, answer in turns),
        texts("task")[0],
        texts("task_group")[0],
        float(str(np.float32(values["chance"].float_list.value[0]))),
    )
    return record, list(values["images"].bytes_list.value)


def examine(data: bytes) -> tuple[Shown, bytes]:
    """A picture's facts, after a full decode, and the bytes to store of it, whose sha256 is among them.

    These are its own for RGB and gray. TFDS reads other modes in its own way: palettes as their indices, CMYK
    and alpha as a fourth channel, 16 bits as 8. So of those the pixels that training sees are stored, as PNG.

    Raises:
        ImageError: it is too large (told by its header, before any pixel), truncated, damaged or no picture.
    """
    pixels = decode_image(data)
    height, width, _ = pixels.shape
    with Image.open(io.BytesIO(data)) as image:  # the header alone, which was found good
        kind, mode = str(image.format), image.mode
    if mode not in _AS_TFDS:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        data = buffer.getvalue()
    return Shown(hashlib.sha256(data).digest(), width, height, len(data), kind, mode), data


def file_state(images: Path | None, name: str) -> FileState:
    """How a picture's file is, by its name as written in a record."""
    try:
        stat = os.stat(os.path.join(images, name)) if images is not None else None
    except (OSError, ValueError):
        stat = None
    return FileState(-1, 0) if stat is None else FileState(stat.st_size, stat.st_mtime_ns)


class ShardWriter:
    """Writes TARGET.array_record, then TARGET.json, each complete or not there at all.

    Used in a `with` statement, at whose end the files get their names; after an error nothing is left.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.part = Part()
        self._temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        self._writer = ArrayRecordWriter(str(self._temporary), _WRITER)

    def add(
        self, record: Record, pictures: Sequence[bytes], shown: Sequence[Shown], position: int, words: int
    ) -> None:
        """Append a record whose pictures were examined."""
        data, part = encode_example(record, pictures), self.part
        self._writer.write(data)
        part.payload_bytes += len(data)
        part.id_hash.append(int.from_bytes(hashlib.blake2b(record.id.encode(), digest_size=8).digest()))
        part.source_index.append(position)
        part.task.append(record.task)
        part.turns.append(len(record.turns))
        part.words.append(words)
        part.images.append(len(pictures))
        part.shown.extend(shown)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            self._writer.close()
            if kind is None:
                self._finish()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
            self.part.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.part.file_bytes = self._temporary.stat().st_size
        self._temporary.replace(shard_file(self.target))
        save_part(self.target, self.part)


def shard_file(target: Path) -> Path:
    """Where the examples of a shard are until the data set is complete."""
    return target.with_name(f"{target.name}.array_record")


def part_file(target: Path) -> Path:
    """Where the columns of a shard are; it is there only if the shard is complete."""
    return target.with_name(f"{target.name}.json")


def save_part(target: Path, part: Part) -> None:
    """Write the columns of a shard."""
    values = vars(part) | {
        "shown": [[item.sha256.hex(), *item[1:]] for item in part.shown],
        "files": [[name, *state, digest.hex()] for name, (state, digest) in part.files.items()],
    }
    write_file(part_file(target), json.dumps(values).encode())


def load_part(target: Path) -> Part | None:
    """The columns of a shard; None if it is not complete."""
    try:
        values = json.loads(part_file(target).read_bytes())
    except FileNotFoundError:
        return None
    values["shown"] = [Shown(bytes.fromhex(digest), *rest) for digest, *rest in values["shown"]]
    values["files"] = {
        name: (FileState(size, time), bytes.fromhex(digest)) for name, size, time, digest in values["files"]
    }
    return Part(**values)


def write_file(path: Path, data: bytes) -> None:
    """Write a file by rename, after its bytes are on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only after an error


def write_shard(job: Job) -> int:
    """Read, check and write the records of one shard; returns how many it was given.

    Raises:
        UserError: a source has changed since it was scanned.
        RuntimeError, OSError: the disk.
    """
    root = job.images.resolve() if job.images is not None else None
    checked: dict[bytes, tuple[Shown, bytes] | str] = {}
    files = [path.open("rb") for path in job.sources]
    try:
        with ShardWriter(job.target) as writer:
            places = zip(job.source, job.index, job.position, job.start, job.end, strict=True)
            for source, index, position, start, end in places:
                files[source].seek(start)
                try:
                    item = json.loads(files[source].read(end - start))
                except ValueError:
                    raise UserError(f"{job.sources[source]}: changed while it was read; run again") from None
                try:
                    record = parse_record(item, int(position))
                    read = _pictures(record, job.images, root, writer.part)
                    found = [_examine(name, read[name], checked) for name in record.images]
                except RefusedError as error:
                    writer.part.quarantined.append(
                        {
                            "index": int(index),
                            "source": str(job.sources[source]),
                            "id": id_text(item, int(position)),
                            "reason": str(error),
                        }
                    )
                    continue
                # LLaVA counts before it drops a leading gpt turn.
                words = count_words(turn["value"] for turn in item["conversations"])
                shown, pictures = [fact for fact, _ in found], [data for _, data in found]
                writer.add(record, pictures, shown, int(position), words)
    finally:
        for file in files:
            file.close()
    return len(job.position)


def _pictures(record: Record, images: Path | None, root: Path | None, part: Part) -> dict[str, _Picture]:
    """The files that a record names, read; notes the state of each in `part.files`."""
    for name in record.images:  # before the first refusal, so that one that is mended later is noticed
        part.files.setdefault(name, (file_state(images, name), b""))
    if record.images and root is None:
        raise RefusedError(f"no image folder: {quote(record.images[0])} is named, but no folder was given")
    places = {name: locate_image(name, root) for name in record.images if root is not None}
    pictures, left = {}, RECORD_BYTES
    for name, place in places.items():
        try:
            with place.open("rb") as file:
                stat = os.fstat(file.fileno())
                left -= stat.st_size * record.images.count(name)
                if left < 0:
                    raise RefusedError(
                        f"unreadable image: {quote(name)} is too large, {RECORD_BYTES} bytes a record at most"
                    )
                data = file.read()
        except OSError as error:
            raise RefusedError(
                f"unreadable image: {quote(name)} cannot be opened ({error.strerror or error})"
            ) from None
        pictures[name] = _Picture(data, hashlib.sha256(data).digest())
        part.files[name] = FileState(stat.st_size, stat.st_mtime_ns), pictures[name].sha256
    return pictures


def _examine(
    name: str, picture: _Picture, checked: dict[bytes, tuple[Shown, bytes] | str]
) -> tuple[Shown, bytes]:
    """`examine`; what `checked` holds by its file's sha256 is not decoded again."""
    known = checked.get(picture.sha256)
    if known is None:
        try:
            facts, stored = examine(picture.data)
            # Of most pictures the bytes at hand: a shard's would be too many to keep.
            known = facts, b"" if stored is picture.data else stored
        except ImageError as error:
            known = str(error)
        checked[picture.sha256] = known
    if isinstance(known, str):
        raise RefusedError(f"unreadable image: {quote(name)} {known}")
    return known[0], known[1] or picture.data
