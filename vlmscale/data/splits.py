"""From a data config to prepared data sets: those it names, or the run's own, made of records or scenes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlmscale.config import DataConfig, parse_mixture
from vlmscale.data import scenes
from vlmscale.data.dataset import Dataset, open_dataset, read_manifest
from vlmscale.data.prepare import prepare_dataset, write_dataset
from vlmscale.data.records import PLACEHOLDER
from vlmscale.data.shards import Progress

SPLITS = ("train", "validation", "test")
QUARANTINE = "quarantine.jsonl"  # of every prepared data set


def prepare_records(config: DataConfig, out: Path, progress: Progress) -> list[Path]:
    """The directories of a config's prepared data sets; what is not prepared yet is, at `out`.

    Raises:
      UserError: records or pictures cannot be read, nothing is usable, or `out` holds other data.
    """
    if config.prepared:
        return [Path(path) for path, _ in parse_mixture(config.prepared)]
    if config.source == "llava":
        images = Path(config.images) if config.images else None
        prepare_dataset([Path(config.records)], images, out, progress=progress)
    else:
        shutil.rmtree(out, ignore_errors=True)  # it may hold scenes of another number or seed
        counts = (config.train_images, config.validation_images, config.test_images)
        sizes = dict(zip(SPLITS, counts, strict=True))
        write_dataset(out, scenes.conversations(sizes, config.seed))
    return [out]


def open_splits(directories: Iterable[Path]) -> dict[str, list[Dataset]]:
    """The data sets by split, in the order of their directories; a split has those that have it.

    Raises:
      UserError: a directory is no prepared data set.
    """
    found: list[Dataset] = []
    for directory in directories:
        train = open_dataset(directory)
        names = [name for name in SPLITS[1:] if train.manifest["records"].get(name)]
        found += [train, *(open_dataset(directory, name) for name in names)]
    by_split = {name: [dataset for dataset in found if dataset.split == name] for name in SPLITS}
    return {name: parts for name, parts in by_split.items() if parts}


def describe(manifest: dict[str, Any], aside: int = 0) -> str:
    """One line: how many records of a data set were read, are used, and were quarantined, by class of reason.

    Args:
      manifest: of the data set.
      aside: records that are too long for their use.
    """
    classes = Counter(manifest["quarantined"])
    if aside:
        classes["too long"] += aside
    quarantined = sum(classes.values())
    used = sum(manifest["records"].values()) - aside
    line = f"{', '.join(source['file'] for source in manifest['sources'])}: " * bool(manifest["sources"])
    line += f"{used + quarantined} records read, {used} used"
    if manifest["duplicate_ids"]:
        line += f" ({manifest['duplicate_ids']} with an id already seen)"
    line += f", {quarantined} quarantined"
    if classes:
        line += " (" + ", ".join(f"{count} {name}" for name, count in classes.most_common()) + ")"
    return line


def summarise(config: DataConfig, directories: list[Path], aside: dict[Path, int]) -> str:
    """One line on the data of a run; `aside` counts what is too long for it, by directory."""
    manifests = {path: read_manifest(path) for path in directories}
    if config.source == "scenes":
        counts = ", ".join(
            f"{count} {split}" for split, count in manifests[directories[0]]["records"].items()
        )
        return f"scenes (seed {config.seed}): {counts} conversations, {sum(aside.values())} quarantined"
    return "; ".join(describe(manifest, aside.get(path, 0)) for path, manifest in manifests.items())


def quarantine_of(directories: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """What was set aside when data sets were prepared: index, id, reason and source of each record."""
    for directory in directories:
        for line in (directory / QUARANTINE).read_text(encoding="utf-8").split("\n"):
            if line:
                yield json.loads(line)


def texts(datasets: Iterable[Dataset]) -> Iterator[str]:
    """All questions and answers: what the run's tokenizer is trained on."""
    for dataset in datasets:
        for index in range(len(dataset)):
            for turn in dataset.record(index).turns:
                yield turn.question.replace(PLACEHOLDER, "").strip()
                yield turn.answer
