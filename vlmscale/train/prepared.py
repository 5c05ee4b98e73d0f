"""Prepared data: data sets, tokenizer and tower of a run or a whole sweep, and what is made of them once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vlmscale.config import Cell, DataConfig, identity, image_slots, parse_mixture
from vlmscale.content import TOKENIZER_FILES, content_sha256
from vlmscale.data import tokenizer as tokenizers
from vlmscale.data.conversation import Template, make_template
from vlmscale.data.dataset import Dataset, read_manifest
from vlmscale.data.images import preprocess
from vlmscale.data.lengths import Lengths, Limits, concatenate, lengths_of, shorten
from vlmscale.data.sources import DatasetSource, Joined, PictureReader, Pixels, Stored
from vlmscale.data.splits import QUARANTINE, open_splits, prepare_records, quarantine_of, summarise, texts
from vlmscale.data.store import open_store
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.records import read_json, write_json, write_lines
from vlmscale.train.features import FeatureJob, advise, estimate, pictures_of, write_features
from vlmscale.train.frozen import needed_params, needs_of, tower_path
from vlmscale.train.samples import Samples
from vlmscale.weights import tree

MANIFEST, TOWER = "manifest.json", "tower.safetensors"
VERSION = 2  # of the directory's layout
ADVISED_BYTES = 2**30  # a store of tower outputs above it is worth a thought
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A finished data directory."""

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own, or a copy of that of a published model."""
        if self.manifest["template"][0] == "toy":
            return tokenizers.load_tokenizer(self.path / tokenizers.FILE)
        return tokenizers.read_tokenizer(self.path)

    @cached_property
    def template(self) -> Template:
        """Encoder of conversations with this run's tokenizer."""
        name, mode = self.manifest["template"]
        return make_template(name, self.tokenizer, mode)

    @cached_property
    def datasets(self) -> dict[str, list[Dataset]]:
        """The data sets of each split.

        Raises:
          UserError: one has gone, or holds other data now.
        """
        places = [(self.path / place, digest) for place, digest in self.manifest["data_sets"]]
        for place, digest in places:
            if read_manifest(place)["sha256"] != digest:
                raise UserError(
                    f"{place}: holds other data than when {self.path} was made of it; bring that back"
                )
        return open_splits(place for place, _ in places)

    @property
    def eval_split(self) -> str:
        """The split that scores are reported on."""
        return next(name for name in ("test", "validation", "train") if name in self.datasets)

    def lengths(self, split: str) -> list[Lengths]:
        """Lengths of the conversations of each data set, cut behind `data.max_text_tokens`."""
        most = self.manifest["max_text_tokens"]
        return [
            lengths_of(dataset, self.template, most, _lengths_path(self.path, split, number))
            for number, dataset in enumerate(self.datasets[split])
        ]

    def vocab_rows(self, cell: Cell) -> int:
        """Rows of a cell's embedding table: of the tokenizer, or of the checkpoint that it starts from.

        Raises:
          UserError: the tokenizer has more tokens than the checkpoint.
        """
        tokens: int = self.manifest["vocab_size"]
        rows = SIZES[cell.llm.name].vocab_size if cell.llm.checkpoint else tokens
        if tokens > rows:
            raise UserError(
                f"data.tokenizer={cell.data.tokenizer}: has {tokens} tokens, llm.name={cell.llm.name} has "
                f"embeddings for {rows}; name the tokenizer of llm.checkpoint"
            )
        return rows

    def pictures(self, split: str, cells: Sequence[Cell]) -> list[PictureReader | None]:
        """How cells that share a tower read the pictures of each data set; None where all are blind."""
        seeing = [cell for cell in cells if cell.compressor.visual_tokens]
        if not seeing:
            return [None] * len(self.datasets[split])
        cell, needs = seeing[0], frozenset().union(*map(needs_of, seeing))
        size = TOWERS[cell.tower.name]
        if cell.data.features == "computed":
            pixels = Pixels(size.image_size, size.mean, size.std, cell.data.image_mode)
            return [pixels] * len(self.datasets[split])
        names = ("selected", *sorted(needs - {"tower"}))
        keys = self.manifest["features"][split]
        stores = [open_store(_store_path(self.path, split, number), key) for number, key in enumerate(keys)]
        return [Stored(store, names) for store in stores]

    @staticmethod
    def needs_tower(cell: Cell) -> bool:
        """Whether a cell computes with the tower: outputs that are not stored, or blocks that its compressor
        runs itself.
        """
        if not cell.compressor.visual_tokens:
            return False
        return cell.data.features == "computed" or "tower" in needs_of(cell)

    def tower(self, cell: Cell) -> dict[str, Any] | None:
        """The tower's parameters on the host where a cell computes with them."""
        return tree.load(self.path / TOWER) if self.needs_tower(cell) else None

    def samples(self, split: str, cell: Cell, readers: list[PictureReader | None] | None = None) -> Samples:
        """The conversations of a split as one cell reads them.

        Args:
          split: "train", for one.
          cell: the config.
          readers: of the pictures of each data set; None for the cell's own.
        """
        data, template, tokens = cell.data, self.template, image_slots(cell)
        limits = Limits(data.max_text_tokens, data.row_length, tokens)
        readers = self.pictures(split, [cell]) if readers is None else readers
        parts, lengths = self.datasets[split], self.lengths(split)
        fitted = [
            shorten(measured, dataset, template, limits)
            for measured, dataset in zip(lengths, parts, strict=True)
        ]
        sources = tuple(
            DatasetSource(dataset, template, pictures, limits)
            for dataset, pictures in zip(parts, readers, strict=True)
        )
        source = sources[0] if len(sources) == 1 else Joined(sources)
        before, after = concatenate(lengths), concatenate(fitted)
        cut = int(np.count_nonzero(after.text < before.text))
        emptied = int(np.count_nonzero((before.supervised > 0) & (after.supervised == 0)))
        if tokens and before.images.any() and not after.images.any():
            raise UserError(
                f"data.row_length={data.row_length}: no picture of {tokens} tokens fits; raise it"
            )
        return Samples(cell, source, parts, fitted, template, cut, emptied)


def pixels_of(image: np.ndarray, cell: Cell) -> np.ndarray:
    """A decoded image as the tower wants it: float32 [S, S, 3]."""
    size = TOWERS[cell.tower.name]
    return preprocess(image, size.image_size, size.mean, size.std, cell.data.image_mode)


def prepare(
    cells: list[Cell], out: Path, progress: Progress, tell: Callable[[str], None] = lambda line: None
) -> Prepared:
    """Make or reuse the data directory of cells that share tower and data.

    Args:
      cells: all cells that will read it; they must agree in `data` and `tower`.
      out: the directory; complete once it holds manifest.json.
      progress: called with (what, done, total).
      tell: called with what is to be known before something large is begun.

    Raises:
      UserError: cells disagree, the directory belongs to other data, the tower cannot be read or is not the
        named one, or nothing usable is left.
    """
    first = cells[0]
    if any((cell.data, cell.tower) != (first.data, first.tower) for cell in cells):
        raise UserError("the cells of a sweep must share `data` and `tower`")
    needs = frozenset().union(*map(needs_of, cells))
    weights, data = tower_path(first), first.data
    key = _key(first, weights, needs)
    if (out / MANIFEST).exists():
        manifest = load_manifest(out)
        if manifest["key"] != key:
            raise UserError(f"{out}: holds other data than this config asks for; choose another --out")
        return Prepared(out, manifest)
    params = needed_params(weights, first.tower.name, needs)  # before anything that takes long
    out.mkdir(parents=True, exist_ok=True)
    directories = prepare_records(data, out / "records", progress)
    splits = open_splits(directories)
    for (path, weight), dataset in zip(parse_mixture(data.prepared), splits["train"], strict=False):
        if len(dataset) * weight < 1:
            raise UserError(
                f"data.prepared: {path}={weight} shows none of its {len(dataset)} records in an epoch"
            )
    tokenizer = _tokenizer(data, out, splits["train"])
    template = make_template(data.template, tokenizer, data.tokenization)
    shortened, aside = _measure(out, splits, template, data, progress)
    left_out = Counter(dataset.split for dataset, _ in aside)
    # A copy, so that a run stays whole when its source goes away.
    tree.save(out / TOWER, params, {"name": first.tower.name})
    manifest = {
        "version": VERSION,
        "key": key,
        "summary": summarise(data, directories, Counter(dataset.path for dataset, _ in aside)),
        # The run's own moves with it.
        "data_sets": [
            ["records" if path == out / "records" else str(path.resolve()), read_manifest(path)["sha256"]]
            for path in directories
        ],
        "template": [data.template, data.tokenization],
        "max_text_tokens": data.max_text_tokens,
        "records": {name: sum(map(len, parts)) - left_out[name] for name, parts in splits.items()},
        "shortened_conversations": shortened,
        "vocab_size": tokenizer.get_vocab_size(),
        "tower_sha256": tree.sha256(params),
        "features": {},
    }
    quarantined = [*quarantine_of(directories), *(item for _, item in aside)]
    manifest["quarantined"] = len(quarantined)
    if data.features == "stored" and any(cell.compressor.visual_tokens for cell in cells):
        for name, parts in splits.items():
            manifest["features"][name] = [
                _store(_store_path(out, name, number), dataset, params, needs, first, progress, tell)
                for number, dataset in enumerate(parts)
            ]
    write_lines(out / QUARANTINE, [json.dumps(item) for item in quarantined])
    write_json(out / MANIFEST, manifest)
    return Prepared(out, manifest)


def load_manifest(out: Path) -> dict[str, Any]:
    """What a finished data directory says of itself.

    Raises:
      UserError: there is none, or an earlier version made it.
    """
    manifest = read_json(out / MANIFEST)
    if manifest.get("version") != VERSION:
        raise UserError(f"{out}: was made by an earlier version of vlmscale; train again with another --out")
    return manifest


def _key(cell: Cell, weights: Path, needs: frozenset[str]) -> str:
    """Hash of all that the directory's content depends on."""
    parts = identity(cell.data) | {"needs": sorted(needs), "tower": cell.tower.name}
    parts["weights"] = content_sha256("tower.checkpoint", weights, directory=True)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer(data: DataConfig, out: Path, train: list[Dataset]) -> Tokenizer:
    """The run's tokenizer, with its files in the data directory."""
    if data.tokenizer:
        for name in TOKENIZER_FILES:
            if (Path(data.tokenizer) / name).is_file():
                shutil.copyfile(Path(data.tokenizer) / name, out / name)
        return tokenizers.read_tokenizer(out)
    made = tokenizers.train_tokenizer(texts(train), data.vocab_size)
    made.save(str(out / tokenizers.FILE))
    return made


def _lengths_path(out: Path, split: str, number: int) -> Path:
    return out / f"lengths-{split}-{number}.npz"


def _store_path(out: Path, split: str, number: int) -> Path:
    return out / "features" / f"{split}-{number}"


def _measure(
    out: Path,
    splits: dict[str, list[Dataset]],
    template: Template,
    data: DataConfig,
    progress: Progress,
) -> tuple[dict[str, int], list[tuple[Dataset, dict[str, Any]]]]:
    """Write the lengths of all conversations; how many were cut in each split, and what is set aside."""
    shortened: dict[str, int] = {}
    aside: list[tuple[Dataset, dict[str, Any]]] = []
    for split, parts in splits.items():
        cut = usable = 0
        for number, dataset in enumerate(parts):
            path = _lengths_path(out, split, number)
            lengths = lengths_of(dataset, template, data.max_text_tokens, path, progress)
            cut += int(np.count_nonzero(lengths.text < lengths.whole))
            usable += int(np.count_nonzero(lengths.supervised))
            for index in np.flatnonzero(lengths.supervised == 0):
                reason = (
                    f"too long: no word of an answer stands within data.max_text_tokens="
                    f"{data.max_text_tokens} of {lengths.whole[index]} tokens"
                )
                where = int(dataset.index.source_index[index])
                item = {"index": where, "id": dataset.record(int(index)).id, "reason": reason}
                aside.append((dataset, item))
        shortened[split] = cut
        if not usable:
            reasons = "; ".join(f"{item['id']}: {item['reason']}" for _, item in aside[-5:])
            raise UserError(f"{parts[0].path}: no usable record is left in {split} ({reasons})")
    return shortened, aside


def _store(
    path: Path,
    dataset: Dataset,
    params: dict[str, Any],
    needs: frozenset[str],
    cell: Cell,
    progress: Progress,
    tell: Callable[[str], None],
) -> str:
    """Store the tower's outputs for a data set's pictures; the store's key."""
    size, data = TOWERS[cell.tower.name], cell.data
    pictures = pictures_of(dataset, size.image_size)
    job = FeatureJob(pictures, size, params, needs, data.image_mode, data.feature_dtype)
    path.parent.mkdir(exist_ok=True)
    if estimate(job.count, size, needs, data.feature_dtype) > ADVISED_BYTES:
        tell(f"{advise(job, path, len(dataset.index.picture))} (data.features=stored or computed)")
    write_features(job, path, progress, f"tower features, {dataset.split}")
    return job.key
