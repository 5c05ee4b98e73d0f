"""LLaVA JSON and an image folder into a prepared data set: a TFDS directory with a manifest and an index.

Owns which record goes into which shard, the processes that write shards, resuming, and the last step that
makes a data set of finished shards. What a shard is, is in `shards.py`; how it is read, in `dataset.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import shutil
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmscale.data.assemble import PICTURES, complete_part, finish
from vlmscale.data.dataset import MANIFEST, PARTIAL, VERSION, read_manifest
from vlmscale.data.images import ImageError
from vlmscale.data.records import PLACEHOLDER, Record, count_words, quote, read_items
from vlmscale.data.shards import (
    FileState,
    Job,
    Progress,
    ShardWriter,
    examine,
    file_state,
    load_part,
    write_file,
    write_shard,
)
from vlmscale.data.workers import cores, quiet_tracker, serve_parent
from vlmscale.errors import UserError, disk_fault
from vlmscale.records import make_directory

SHARD_RECORDS = 2048
_PLAN, _LOCK = "plan.json", "lock"
_TELLING = 20  # so many images that are all missing are the folder's fault, not the records'
_REPORT = 2**24  # bytes scanned between two reports
_SHARD_BYTES, _RECORD_BYTES = 2**18, 2**10  # what comes on top of pictures and text, at the most


@dataclass
class _Sources:
    """All records of all sources, as places in their files; arrays are [n]."""

    paths: tuple[Path, ...]
    described: list[dict[str, Any]]  # file, sha256, records
    source: np.ndarray
    index: np.ndarray
    start: np.ndarray
    end: np.ndarray
    picture_bytes: np.ndarray
    files: dict[str, FileState]  # by picture name


def prepare_dataset(
    sources: Sequence[Path],
    images: Path | None,
    out: Path,
    *,
    validation: int = 0,
    seed: int = 0,
    workers: int | None = None,
    shard_records: int = SHARD_RECORDS,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Make or finish the prepared data set of LLaVA records; if it is there, check that it is theirs.

    A shard is a range of the records in their order, so the bytes of the result depend on the sources and
    on `validation`, `seed` and `shard_records` alone. Finished shards survive a kill; the next call goes on.

    Args:
      sources: JSON lists of records, or JSON Lines where a name ends in .jsonl.
      images: the folder that image paths are relative to; None if all records are text alone.
      out: the directory; complete once it holds manifest.json.
      validation: how many records become the split "validation", chosen by a hash of `seed` and a record's
        place. They are chosen before they are read, so quarantined ones make the split smaller.
      workers: processes; None is one a core.
      shard_records: how many records a shard is made of.
      progress: called with (what, done, total).

    Returns:
      The manifest: version, name, sources (file, sha256, records read, used, quarantined), validation; by
      split records, pictures (distinct by content), images_shown and bytes (of the shards); formats and modes
      of distinct pictures (Pillow's names), tasks, duplicate_ids (used records whose id was seen before),
      quarantined by class of reason, tokens (filled in by others), shards, sha256 (of all shards' sha256: the
      content's id), vlmscale_version.

    Raises:
      UserError: a source or the folder cannot be read, nothing usable is in it, the disk is or becomes full,
        `out` holds other data, or pictures have changed since they were prepared.
    """
    out, sources = Path(out), tuple(map(Path, sources))
    if not sources or len(set(sources)) < len(sources):
        raise UserError("files of records: name at least one, and none of them twice")
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder; name the one that image paths are relative to")
    if (out / MANIFEST).exists():
        return _check_finished(sources, images, out, validation, seed, progress)
    found = _scan(sources, images, progress)
    there = sum(state.size >= 0 for state in found.files.values())
    if len(found.files) >= _TELLING and not there:
        place = f"is in {images.resolve()}" if images is not None else "can be found: no folder was given"
        raise UserError(
            f"none of the {len(found.files)} images that the records name, such as "
            f"{quote(next(iter(found.files)))}, {place}; name the folder that their paths are relative to"
        )
    if not 0 <= validation < len(found.source):
        raise UserError(f"validation={validation} of {len(found.source)} records leaves none to train on")
    make_directory(out)
    try:
        with _locked(out):
            settings = {"validation": validation, "seed": seed, "shard_records": shard_records}
            _check_plan(out, {"version": VERSION, "sources": found.described} | settings)
            jobs = _jobs(found, images, out / PARTIAL, validation, seed, shard_records)
            splits = {split: [job.target for job in of_split] for split, of_split in jobs.items()}
            every = [job for of_split in jobs.values() for job in of_split]
            _write_shards(every, found, out, workers, progress)
            extra = {"validation": {"records": validation, "seed": seed}}
            return finish(out, splits, found.described, extra)
    except UserError:
        raise
    except Exception as error:
        if (fault := disk_fault(error)) is None:
            raise
        where = fault.filename or out
        raise UserError(
            f"{where}: {fault.strerror}; finished shards are kept: mend that and run again"
        ) from error


def write_dataset(
    out: Path,
    splits: Mapping[str, Iterable[tuple[Record, Sequence[bytes]]]],
    *,
    shard_records: int = SHARD_RECORDS,
) -> dict[str, Any]:
    """Make a prepared data set of records in memory and their encoded pictures; as `prepare_dataset`.

    Raises:
      UserError: `out` holds a prepared data set already, or the disk is full.
      ValueError: a record's pictures are not as many as its names and placeholders, a picture cannot be
        decoded, or a split is empty.
    """
    if (out / MANIFEST).exists():
        raise UserError(f"{out}: holds a prepared data set already; choose another directory")
    make_directory(out)
    try:
        with _locked(out):
            for left in (out / PARTIAL).glob("*-*"):  # of one that was killed
                left.unlink()
            targets, position = {}, 0
            for split, items in splits.items():
                targets[split] = _write_split(out / PARTIAL, split, items, position, shard_records)
                position += sum(len(complete_part(target).words) for target in targets[split])
            return finish(out, targets, [], {})
    except (RuntimeError, OSError) as error:
        if (fault := disk_fault(error)) is None:
            raise
        raise UserError(f"{fault.filename or out}: {fault.strerror}; mend that and run again") from error


def _write_split(
    folder: Path,
    split: str,
    items: Iterable[tuple[Record, Sequence[bytes]]],
    position: int,
    shard_records: int,
) -> list[Path]:
    """Write records in memory as shards; their targets."""
    targets: list[Path] = []
    with contextlib.ExitStack() as stack:
        for number, (record, pictures) in enumerate(items):
            if number % shard_records == 0:
                stack.close()
                targets.append(folder / f"{split}-{len(targets):05}")
                writer = stack.enter_context(ShardWriter(targets[-1]))
            texts = [text for turn in record.turns for text in (turn.question, turn.answer)]
            placeholders = sum(turn.question.count(PLACEHOLDER) for turn in record.turns)
            if not len(pictures) == len(record.images) == placeholders:
                raise ValueError(
                    f"record {quote(record.id)} has {len(pictures)} pictures, {len(record.images)} image "
                    f"names and {placeholders} {PLACEHOLDER} placeholders"
                )
            try:
                found = [examine(data) for data in pictures]
            except ImageError as error:
                raise ValueError(f"record {quote(record.id)}: picture {error}") from None
            shown, stored = [fact for fact, _ in found], [data for _, data in found]
            writer.add(record, stored, shown, position + number, count_words(texts))
    if not targets:
        raise ValueError(f"split {split!r} has no records")
    return targets


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the directory's partial folder, which it makes, against another preparation; clears half files."""
    folder = out / PARTIAL
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is preparing it; wait for it to end") from None
        except OSError:  # a file system without locks
            pass
        for left in [*folder.glob("*.tmp"), *out.glob("*.tmp")]:
            left.unlink()
        yield


def _scan(sources: tuple[Path, ...], images: Path | None, progress: Progress) -> _Sources:
    """Find every record of the sources and the size of its pictures, holding none of them."""
    described: list[dict[str, Any]] = []
    places: list[np.ndarray] = []
    files: dict[str, FileState] = {}
    for number, path in enumerate(sources):
        rows, last = array("q"), 0
        for index, (start, end, item) in enumerate(read_items(path)):
            size = 0
            for name in _names(item):
                if name not in files:
                    files[name] = file_state(images, name)
                size += max(files[name].size, 0)
            rows.extend((number, index, start, end, size))
            if end - last > _REPORT:
                last = end
                progress(f"scanning {path.name}", end, path.stat().st_size)
        places.append(np.frombuffer(rows, np.int64).reshape(-1, 5))
        described.append({"file": str(path), "sha256": _sha256(path), "records": len(rows) // 5})
    source, index, start, end, size = np.concatenate(places).T
    return _Sources(sources, described, source, index, start, end, size, files)


def _names(item: Any) -> list[str]:
    """The image names of a record that is not checked yet."""
    named = item.get("image") if isinstance(item, dict) else None
    return [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Note what is being prepared; refuse if it is something else than what was begun."""
    path = out / PARTIAL / _PLAN
    text = json.dumps(plan, indent=1)
    if path.exists() and path.read_text() != text:
        raise UserError(
            f"{out}: an unfinished preparation of other sources or settings is there; run the same command "
            f"again, or remove {out / PARTIAL} to begin anew"
        )
    write_file(path, text.encode())


def _jobs(
    found: _Sources, images: Path | None, folder: Path, validation: int, seed: int, shard_records: int
) -> dict[str, list[Job]]:
    """The shards of each split."""
    total = len(found.source)
    held_out = np.zeros(total, bool)
    if validation:
        hashes = [
            hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
            for position in range(total)
        ]
        held_out[np.argsort(np.array(hashes, "V8").view(">u8"), kind="stable")[:validation]] = True
    splits = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
    return {
        split: [
            Job(
                folder / f"{split}-{number:05}",
                found.paths,
                images,
                found.source[chosen],
                found.index[chosen],
                chosen,
                found.start[chosen],
                found.end[chosen],
            )
            for number, start in enumerate(range(0, len(positions), shard_records))
            for chosen in [positions[start : start + shard_records]]
        ]
        for split, positions in splits.items()
        if len(positions)
    }


def _write_shards(
    jobs: list[Job], found: _Sources, out: Path, workers: int | None, progress: Progress
) -> None:
    """Write the shards that are not there yet."""
    missing = [job for job in jobs if not _is_done(job.target, found.files)]
    left = np.concatenate([job.position for job in missing]) if missing else np.zeros(0, int)
    sizes = found.picture_bytes + found.end - found.start
    needed = int(sizes[left].sum()) + _SHARD_BYTES * len(missing) + _RECORD_BYTES * len(left)
    needed, free = needed + needed // 100, shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: needs about {_mib(needed)} MiB, but {_mib(free)} MiB are free; make room, or choose "
            "another directory"
        )
    total = len(found.source)
    done = total - len(left)
    count = min(workers or cores(), len(missing))
    for written in map(write_shard, missing) if count <= 1 else _in_processes(missing, count):
        done += written
        progress("preparing records", done, total)


def _mib(size: int) -> int:
    return -(-size // 2**20)


def _is_done(target: Path, files: Mapping[str, FileState]) -> bool:
    """Whether a shard is complete, and made of pictures that are still as they were."""
    part = load_part(target)
    return part is not None and all(files.get(name) == state for name, (state, _) in part.files.items())


def _in_processes(jobs: list[Job], count: int) -> Iterator[int]:
    """`write_shard` of each job, in any order, in processes that know nothing of an accelerator."""
    # Not fork: a thread of the caller's (JAX has several) may hold a lock.
    quiet_tracker()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(count, context, initializer=serve_parent) as pool:
        futures = [pool.submit(write_shard, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process of the preparation ended early: killed for its memory (run again with fewer "
                "workers, the shards are kept), or called by a script that lacks `if __name__ == '__main__'`"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check_finished(
    sources: tuple[Path, ...], images: Path | None, out: Path, validation: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """The manifest of a finished data set, if it is that of these sources and pictures."""
    manifest = read_manifest(out)
    hashes = [source["sha256"] for source in manifest["sources"]]
    if [_sha256(path) for path in sources] != hashes:
        names = ", ".join(source["file"] for source in manifest["sources"]) or "records that were drawn"
        raise UserError(f"{out}: holds other data, prepared from {names}; choose another directory")
    chosen = manifest.get("validation")
    if chosen != {"records": validation, "seed": seed}:
        how = f"{chosen['records']} validation records, seed {chosen['seed']}" if chosen else "other settings"
        raise UserError(f"{out}: was prepared with {how}; use the same, or choose another directory")
    try:
        with np.load(out / PICTURES) as saved:
            columns = {key: saved[key] for key in saved.files}
        names, digests = json.loads(columns["names"].tobytes()), columns["sha256"].reshape(-1, 32)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{out / PICTURES}: cannot be read ({error}); prepare the data anew") from None
    changed, new = [], 0
    for number, name in enumerate(names):
        state = FileState(int(columns["size"][number]), int(columns["time"][number]))
        if _has_changed(images, name, state, digests[number].tobytes()):
            changed.append(name)
            new += state.size < 0
        if number % 10_000 == 9_999:
            progress("checking pictures", number + 1, len(names))
    if changed:
        more = f" and {len(changed) - 1} more pictures" * (len(changed) > 1)
        where = f"in {images}" if images is not None else "(no image folder is named)"
        how = "appeared" if new == len(changed) else "changed"
        raise UserError(
            f"{out}: {quote(changed[0])}{more} {how} {where} since the data was prepared; choose another "
            "directory to prepare what is there now, or bring back what was"
        )
    shutil.rmtree(out / PARTIAL, ignore_errors=True)  # left by a kill at the very end
    return manifest


def _has_changed(images: Path | None, name: str, state: FileState, digest: bytes) -> bool:
    """Whether a picture's file is not what it was; its bytes are read only where its size or time differs."""
    now = file_state(images, name)
    if now == state:
        return False
    if images is None or now.size != state.size or not any(digest):
        return True
    return bytes.fromhex(_sha256(images / name)) != digest
