"""The last step of a preparation: finished shards become a data set.

Owns the columns of a split, the manifest, the list of picture files and TFDS's metadata. Killed at any moment
it is called again and does the rest; the manifest comes last.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlmscale import __version__
from vlmscale.data.dataset import MANIFEST, NAME, PARTIAL, VERSION, Index, index_file
from vlmscale.data.records import quote
from vlmscale.data.shards import Part, Shown, features, load_part, part_file, shard_file, write_file
from vlmscale.errors import UserError
from vlmscale.records import write_json

PICTURES, _QUARANTINE = "pictures.npz", "quarantine.jsonl"


def complete_part(target: Path) -> Part:
    """The columns of a shard that was just written.

    Raises:
      UserError: they are not there: somebody cleared the directory.
    """
    part = load_part(target)
    if part is None:
        raise UserError(f"{part_file(target)}: has gone while the data was prepared; run again")
    return part


def finish(
    out: Path, targets: dict[str, list[Path]], sources: list[dict[str, Any]], more: dict[str, Any]
) -> dict[str, Any]:
    """Make a data set of finished shards; may be killed and called again."""
    parts = {split: [complete_part(target) for target in of_split] for split, of_split in targets.items()}
    every = [part for of_split in parts.values() for part in of_split]
    order = {source["file"]: number for number, source in enumerate(sources)}
    quarantined = sorted(
        (item for part in every for item in part.quarantined),
        key=lambda item: (order[item["source"]], item["index"]),
    )
    for split, of_split in parts.items():
        if not any(part.words for part in of_split):
            _nothing_usable(out, split, sources, quarantined)
    tasks = sorted({task for part in every for task in part.task})
    counts = Counter(item["source"] for item in quarantined)
    ids = np.array([number for part in every for number in part.id_hash], np.uint64)
    manifest: dict[str, Any] = {"version": VERSION, "name": NAME, "sources": [], **more}
    for source in sources:
        aside = counts[source["file"]]
        manifest["sources"].append(source | {"used": source["records"] - aside, "quarantined": aside})
    manifest |= {"records": {}, "pictures": {}, "images_shown": {}, "bytes": {}}
    kinds: dict[bytes, tuple[str, str]] = {}
    for split, of_split in parts.items():
        index = merge_parts(of_split, tasks)
        kinds |= {item.sha256: (item.format, item.mode) for part in of_split for item in part.shown}
        buffer = io.BytesIO()
        np.savez(buffer, **index._asdict())
        write_file(index_file(out, split), buffer.getvalue())
        manifest["records"][split] = len(index.words)
        manifest["pictures"][split] = len(index.picture_record)
        manifest["images_shown"][split] = len(index.picture)
        manifest["bytes"][split] = sum(part.file_bytes for part in of_split)
    shards = _place_shards(out, targets, parts)
    manifest |= {
        "distinct_pictures": len(kinds),  # of all splits together
        "formats": dict(sorted(Counter(kind for kind, _ in kinds.values()).items())),
        "modes": dict(sorted(Counter(mode for _, mode in kinds.values()).items())),
        "tasks": tasks,
        "duplicate_ids": len(ids) - len(np.unique(ids)),
        "quarantined": dict(Counter(item["reason"].split(":", 1)[0] for item in quarantined).most_common()),
        "tokens": {},
        "shards": shards,
        "sha256": hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest(),
        "vlmscale_version": __version__,
    }
    _write_pictures(out / PICTURES, every)
    write_file(out / _QUARANTINE, "".join(json.dumps(item) + "\n" for item in quarantined).encode())
    write_json(out / MANIFEST, manifest)
    shutil.rmtree(out / PARTIAL)
    return manifest


def _nothing_usable(
    out: Path, split: str, sources: list[dict[str, Any]], quarantined: list[dict[str, Any]]
) -> None:
    shutil.rmtree(out / PARTIAL)
    shown = "; ".join(
        f"record {item['index']} (id {quote(item['id'])}): {item['reason']}" for item in quarantined[:5]
    )
    more = len(quarantined) - 5
    files, count = ", ".join(source["file"] for source in sources), sum(s["records"] for s in sources)
    which = f"its {count} records" if split == "train" else f"the records chosen for {split}"
    raise UserError(f"{files}: none of {which} can be used: {shown}" + f"; and {more} more" * (more > 0))


def merge_parts(parts: list[Part], tasks: list[str]) -> Index:
    """The columns of a split."""
    numbers: dict[bytes, int] = {}
    first: list[tuple[int, int, Shown]] = []
    picture, images, records = [], [], 0
    task_number = {task: number for number, task in enumerate(tasks)}
    for part in parts:
        shown = iter(part.shown)
        for count in part.images:
            for slot in range(count):
                item = next(shown)
                number = numbers.setdefault(item.sha256, len(numbers))
                if number == len(first):
                    first.append((records, slot, item))
                picture.append(number)
            records += 1
        images += part.images

    def column(name: str) -> np.ndarray:
        return np.array([value for part in parts for value in getattr(part, name)], np.int32)

    return Index(
        image_offsets=np.cumsum([0, *images], dtype=np.int64),
        picture=np.array(picture, np.int32),
        picture_record=np.array([record for record, _, _ in first], np.int32),
        picture_slot=np.array([slot for _, slot, _ in first], np.int32),
        picture_width=np.array([item.width for _, _, item in first], np.int32),
        picture_height=np.array([item.height for _, _, item in first], np.int32),
        picture_bytes=np.array([item.size for _, _, item in first], np.int64),
        picture_sha256=np.frombuffer(b"".join(numbers), np.uint8).reshape(-1, 32),
        words=column("words"),
        turns=column("turns"),
        task=np.array([task_number[task] for part in parts for task in part.task], np.int32),
        source_index=column("source_index"),
    )


def _place_shards(
    out: Path, targets: dict[str, list[Path]], parts: dict[str, list[Part]]
) -> list[dict[str, Any]]:
    """Give the shards that hold records their TFDS names, and write TFDS's metadata."""
    entries, infos = [], []
    for split, of_split in targets.items():
        used = [pair for pair in zip(of_split, parts[split], strict=True) if pair[1].words]
        template = tfds.core.ShardedFileTemplate(
            data_dir=out, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        for number, (target, part) in enumerate(used):
            name = Path(template.sharded_filepath(shard_index=number, num_shards=len(used))).name
            if shard_file(target).exists():  # not if this was reached before
                shard_file(target).replace(out / name)
            entries.append({"split": split, "file": name, "records": len(part.words), "sha256": part.sha256})
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part.words) for _, part in used],
                num_bytes=sum(part.payload_bytes for _, part in used),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(data_dir=out, features=features(), split_infos=infos, check_data=False)
    return entries


def _write_pictures(path: Path, parts: Iterable[Part]) -> None:
    """Write the state of every picture file that was looked for, so that a change is noticed later."""
    files = dict(sorted(pair for part in parts for pair in part.files.items()))
    states = [state for state, _ in files.values()]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.frombuffer(json.dumps(list(files)).encode(), np.uint8),
        size=np.array([state.size for state in states], np.int64),
        time=np.array([state.time for state in states], np.int64),
        sha256=np.frombuffer(b"".join(digest.ljust(32, b"\0") for _, digest in files.values()), np.uint8),
    )
    write_file(path, buffer.getvalue())
