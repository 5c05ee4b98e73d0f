"""The frozen tower over a data set's distinct pictures: its outputs as a store, and whether that pays."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vlmscale.compressors.features import abstract_features, tower_features
from vlmscale.data.dataset import Dataset
from vlmscale.data.images import ImageError, decode_image, preprocess
from vlmscale.data.store import ArraySpec, Store, StoreWriter, open_store, shard_size
from vlmscale.data.workers import cores
from vlmscale.errors import UserError
from vlmscale.models.sizes import TowerSize
from vlmscale.weights import tree

_BATCH = 256  # pictures that go through a tower together, at most
_ACTIVATION_BYTES = 2**30  # what they may take on the way, about
_MAPS = {"class_attention", "mean_attention", "probe_attention"}  # methods rank by them: never rounded
_PROBE_BYTES = 2**26  # of the file that a disk's speed is measured with
Progress = Callable[[str, int, int], None]


class Pictures(NamedTuple):
    """The distinct pictures of a data set, by number.

    Attributes:
      load: gives picture i decoded, uint8 [H, W, 3]; called from several threads.
      sha256: [p, 32] uint8, of each one's content.
    """

    load: Callable[[int], np.ndarray]
    sha256: np.ndarray


@dataclass(frozen=True)
class FeatureJob:
    """What is stored: which outputs of which tower, of which pictures.

    Attributes:
      pictures: what the tower is run over.
      size: the tower's row of the size table.
      params: those of its parameters that the outputs need, see `vlmscale.train.frozen.needed_params`.
      needs: fields of `vlmscale.compressors.Features` beside `selected`; "tower" adds nothing.
      image_mode: how a picture becomes a square, see `vlmscale.data.images.preprocess`.
      dtype: "float32" or "bfloat16", how outputs are stored; maps of attention are float32 in any case.
      compute: dtype of the tower's computation.
    """

    pictures: Pictures
    size: TowerSize
    params: dict[str, Any]
    needs: frozenset[str]
    image_mode: str
    dtype: str
    compute: str = "float32"

    @cached_property
    def key(self) -> str:
        """Hash of all that the stored values depend on."""
        parts = {
            "pictures": hashlib.sha256(self.pictures.sha256.tobytes()).hexdigest(),
            "size": asdict(self.size),
            "params": tree.sha256(self.params),
            "needs": sorted(self.needs - {"tower"}),
            "image_mode": self.image_mode,
            "dtype": self.dtype,
            "compute": self.compute,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def count(self) -> int:
        """Number of pictures p."""
        return len(self.pictures.sha256)

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """What is stored of each picture."""
        return stored_arrays(self.size, self.needs, self.dtype)

    def pixels(self, index: int) -> np.ndarray:
        """A picture as the tower wants it: float32 [S, S, 3]."""
        size = self.size
        return preprocess(self.pictures.load(index), size.image_size, size.mean, size.std, self.image_mode)


def pictures_of(dataset: Dataset, image_size: int) -> Pictures:
    """The distinct pictures of a prepared data set, for a tower of so many pixels a side."""
    index = dataset.index

    def load(number: int) -> np.ndarray:
        try:
            return decode_image(dataset.picture(number), target=image_size)
        except ImageError as error:
            record = dataset.record(int(index.picture_record[number]))
            name = record.images[int(index.picture_slot[number])]
            raise UserError(
                f"{dataset.path}: record {record.id!r}: image {name!r} {error}; prepare the data again"
            ) from error

    return Pictures(load, index.picture_sha256)


def batch_size(size: TowerSize, needs: frozenset[str]) -> int:
    """How many pictures go through a tower together: few enough that its activations take about 1 GiB."""
    tokens = size.num_patches + size.class_tokens
    scores = 2 * size.num_heads * tokens**2  # before and after the softmax
    streams = tokens * (2 * size.mlp_width + 8 * size.width)
    states = 1
    for field, count in (("levels", len(size.levels)), ("stack", size.select_layer), ("keys", 1)):
        states += 2 * count * (field in needs)  # where it is made, and copied into the output
    pixels = 2 * 3 * size.image_size**2
    numbers = scores + streams + tokens * size.width * states + pixels
    return max(1, min(_BATCH, _ACTIVATION_BYTES // (4 * numbers)))


def stored_arrays(size: TowerSize, needs: frozenset[str], dtype: str) -> dict[str, ArraySpec]:
    """What a store holds of each picture: "selected" first, then the fields of `needs` in order."""
    shapes = abstract_features(size, needs)
    names = ["selected", *sorted(needs - {"tower"})]
    return {
        name: ArraySpec(getattr(shapes, name).shape[1:], "float32" if name in _MAPS else dtype)
        for name in names
    }


def estimate(count: int, size: TowerSize, needs: frozenset[str], dtype: str) -> int:
    """Bytes that the store of so many pictures takes on disk, rounded up by what ArrayRecord adds."""
    if not count:
        return 0
    record = sum(spec.nbytes for spec in stored_arrays(size, needs, dtype).values())
    shards = -(-count // shard_size(count, record, batch_size(size, needs)))
    # A header for each record and for each block of 64 KiB; the index and padding to blocks of each shard.
    return math.ceil(count * (record + 64) * (1 + 24 / 2**16)) + shards * 3 * 2**16


def write_features(job: FeatureJob, out: Path, progress: Progress, what: str = "tower features") -> Store:
    """Run the tower over every picture and store its outputs; a store begun earlier is continued.

    The next pictures are decoded, and earlier outputs written, while the tower computes. Which pictures go
    through it together does not depend on interruptions, so neither do the bytes on disk.

    Args:
      job: what is stored.
      out: the store's directory.
      progress: called with (what, done, total) after each batch.
      what: the text for `progress`.

    Raises:
      UserError: the disk cannot hold the store or is full, `out` holds another one, or a picture cannot be
        read.
    """
    together, total, arrays = batch_size(job.size, job.needs), job.count, job.arrays
    shard = shard_size(total, sum(spec.nbytes for spec in arrays.values()), together)
    check_room(job, out)
    with StoreWriter(out, job.key, total, arrays, shard) as writer:
        done = writer.done
        if done < total:
            run = _runner(job)
            with ThreadPoolExecutor(cores()) as decoders, ThreadPoolExecutor(1) as disk:
                writing: Future[None] | None = None
                for pixels, count in _batches(job, range(done, total, together), together, decoders):
                    made = run(pixels)  # returns before it has computed
                    if writing is not None:
                        writing.result()  # at most one batch waits for the disk
                    writing = disk.submit(_append, writer, made, count)
                    done += count
                    progress(what, done, total)
                if writing is not None:
                    writing.result()
    return open_store(out, job.key)


def check_room(job: FeatureJob, out: Path) -> tuple[int, int]:
    """What is left to write and what is free where the store will lie, both in bytes.

    Raises:
      UserError: it does not fit.
    """
    nbytes = estimate(job.count, job.size, job.needs, job.dtype)
    there = sum(path.stat().st_size for path in out.glob("*")) if out.is_dir() else 0
    left, free = max(0, nbytes - there), shutil.disk_usage(_existing(out)).free
    if left > free:
        need, have = math.ceil(left / 2**20), free // 2**20
        raise UserError(
            f"{out}: the tower's outputs of {job.count} pictures need {need} MiB, {have} MiB are free; make "
            "room, or let training compute them"
        )
    return left, free


@dataclass(frozen=True)
class Advice:
    """Whether storing pays: sizes in bytes, speeds in bytes/s, times in seconds for one picture.

    Attributes:
      pictures: how many distinct pictures there are.
      shown: how many are shown in an epoch.
      nbytes: what all their outputs take on disk.
      free: what is free there.
      tower: a picture's share of the time of one batch in the tower.
      decode: a picture's share of the time that all cores take to decode and resize.
      write, read: speed of that disk, read by one thread in pieces of one picture.
    """

    pictures: int
    shown: int
    nbytes: int
    free: int
    tower: float
    decode: float
    write: float
    read: float

    @property
    def build_s(self) -> float:
        """Seconds to write the store; decoding, tower and disk work side by side."""
        return max(self.pictures * max(self.tower, self.decode), self.nbytes / self.write)

    @property
    def recompute_s(self) -> float:
        """Seconds that an epoch takes to decode its pictures and run the tower."""
        return self.shown * max(self.tower, self.decode)

    @property
    def read_s(self) -> float:
        """Seconds that an epoch takes to read its pictures' outputs."""
        return self.shown * self.nbytes / self.pictures / self.read

    @property
    def epochs(self) -> int | None:
        """The first number of epochs, over all that read the store, at which it has paid; None: never."""
        saved = self.recompute_s - self.read_s
        return math.floor(self.build_s / saved) + 1 if saved > 0 else None

    def __str__(self) -> str:
        """One line for the user."""
        if self.epochs is None:
            verdict = "recomputing is cheaper however often they are read"
        else:
            verdict = f"storing is cheaper from {self.epochs} epochs on, counted over all cells"
        sizes = f"{math.ceil(self.nbytes / 2**20)} MiB, {self.free // 2**20} MiB are free"
        times = f"{self.recompute_s:.3g} s to recompute and {self.read_s:.3g} s to read"
        return f"tower outputs of {self.pictures} pictures: {sizes}; an epoch takes {times}: {verdict}"


def advise(job: FeatureJob, out: Path, shown: int) -> Advice:
    """Measure what storing costs and saves: times one batch of the tower, decoding, and the disk.

    Args:
      job: what would be stored, of at least one picture.
      out: where.
      shown: pictures shown in an epoch, repeated ones counted each time.

    Raises:
      UserError: the disk cannot hold it, or a picture cannot be read.
    """
    _, free = check_room(job, out)
    run, together = _runner(job), batch_size(job.size, job.needs)
    with ThreadPoolExecutor(cores()) as decoders:
        start = time.perf_counter()
        pixels, count = next(_batches(job, range(0, min(job.count, together), together), together, decoders))
        decode = (time.perf_counter() - start) / count
    jax.block_until_ready(run(pixels))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(run(pixels))
    tower = (time.perf_counter() - start) / together
    nbytes = estimate(job.count, job.size, job.needs, job.dtype)
    piece = sum(spec.nbytes for spec in job.arrays.values())
    write, read = disk_speed(_existing(out), piece, max(1, min(nbytes, _PROBE_BYTES) // piece))
    return Advice(job.count, shown, nbytes, free, tower, decode, write, read)


def disk_speed(folder: Path, piece: int, count: int) -> tuple[float, float]:
    """Bytes/s that a disk writes, and that one thread reads in `count` pieces of so many bytes, at random.

    The file is dropped from memory before it is read, where the system can do that (Linux).
    """
    data = np.random.default_rng(0).bytes(count * piece)
    path = folder / f".speed.{os.getpid()}.tmp"
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            for index in np.random.default_rng(1).permutation(count):
                file.seek(int(index) * piece)
                file.read(piece)
        ended = time.perf_counter()
    finally:
        path.unlink(missing_ok=True)
    return len(data) / (written - start), len(data) / (ended - begun)


@partial(jax.jit, static_argnames=("size", "needs", "compute", "dtype"))
def _encode(
    params: dict[str, Any],
    pixels: jax.Array,
    size: TowerSize,
    needs: frozenset[str],
    compute: str,
    dtype: str,
) -> dict[str, jax.Array]:
    made = tower_features(size, params, pixels, needs, jax.numpy.dtype(compute))
    return {name: values.astype("float32" if name in _MAPS else dtype) for name, values in made.items()}


def _runner(job: FeatureJob) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    """The tower, whose parameters are an argument: as constants they would be copied into the program."""
    params = jax.device_put(job.params)
    return partial(_encode, params, size=job.size, needs=job.needs, compute=job.compute, dtype=job.dtype)


def _append(writer: StoreWriter, made: dict[str, jax.Array], count: int) -> None:
    writer.append({name: np.asarray(values)[:count] for name, values in made.items()})


def _batches(
    job: FeatureJob, starts: range, together: int, decoders: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, int]]:
    """Pixels [together, S, S, 3] of the pictures from each start on, and how many are real; one ahead."""
    side = job.size.image_size

    def submit(start: int) -> tuple[np.ndarray, list[Future[None]]]:
        pixels = np.zeros((together, side, side, 3), np.float32)

        def fill(row: int) -> None:
            pixels[row] = job.pixels(start + row)

        return pixels, [decoders.submit(fill, row) for row in range(min(together, job.count - start))]

    ahead = None
    for start in [*starts, None]:
        ready, ahead = ahead, None if start is None else submit(start)
        if ready is not None:
            pixels, rows = ready
            for row in rows:
                row.result()
            yield pixels, len(rows)


def _existing(path: Path) -> Path:
    """The nearest folder above that is there already."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
