"""Prepared data: tokenizer, records and frozen-tower features of a run or of a whole sweep, made once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from vlmscale.compressors import COMPRESSORS
from vlmscale.config import Cell, identity
from vlmscale.data.conversation import Template, fit_context, training_row
from vlmscale.data.images import preprocess
from vlmscale.data.pipeline import Rows
from vlmscale.data.records import Quarantined, Record, write_quarantine
from vlmscale.data.splits import Split, Splits, load_splits, read_records, texts, write_records
from vlmscale.data.tokenizer import load_tokenizer, train_tokenizer
from vlmscale.errors import UserError
from vlmscale.layers import abstract_params
from vlmscale.models.sizes import TOWERS
from vlmscale.models.vision import VisionTower, patches
from vlmscale.records import write_json
from vlmscale.weights import tree

_BATCH = 256
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A finished data directory."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def template(self) -> Template:
        """Encoder of conversations with this run's tokenizer."""
        return Template(self.tokenizer)

    @property
    def eval_split(self) -> str:
        """The split that scores are reported on."""
        return "test" if "test" in self.manifest["images"] else "train"

    def records(self, split: str) -> tuple[list[Record], np.ndarray]:
        """Records of a split and the index of each one's picture (-1: none)."""
        return read_records(self.path / f"{split}.records.jsonl")

    def features(self, split: str, cell: Cell) -> dict[str, np.ndarray]:
        """Tower outputs that the cell's compressor reads, memory-mapped: name to [images, P, C]."""
        if not cell.compressor.visual_tokens:
            return {}
        names = ["selected"]
        if COMPRESSORS[cell.compressor.name].needs_levels:
            names.append("levels")
        return {name: np.load(self.path / f"{split}.{name}.npy", mmap_mode="r") for name in names}

    def rows(self, split: str, cell: Cell) -> Rows:
        """Training rows of a split for one cell."""
        records, image_of = self.records(split)
        template = self.template
        rows = [training_row(record, template, cell.compressor.visual_tokens) for record in records]
        return Rows(rows, image_of, self.features(split, cell), template.pad)


def tower_path(cell: Cell) -> Path:
    """The file with the tower's weights."""
    if cell.tower.checkpoint != "shipped":
        return Path(cell.tower.checkpoint)
    return Path(str(resources.files("vlmscale") / "assets" / f"{cell.tower.name}.safetensors"))


def load_tower(path: Path, name: str) -> dict[str, Any]:
    """Read and check the weights of a named tower.

    Raises:
      UserError: unreadable, or not the parameters of that tower.
    """
    params = tree.load(path)
    size = TOWERS[name]
    image = jax.ShapeDtypeStruct((1, size.image_size, size.image_size, 3), jnp.float32)
    abstract = abstract_params(VisionTower(size), image, layers=(size.num_layers,))
    tree.check_shapes(path, params, nn.meta.unbox(abstract))
    return params


def encode_images(
    name: str, params: dict[str, Any], pixels: jax.Array, with_levels: bool
) -> dict[str, jax.Array]:
    """Tower outputs of a batch of pixels [B, S, S, 3]: "selected" and, if asked, "levels"; patches only."""
    size = TOWERS[name]
    wanted = {size.select_layer} | (set(size.levels) if with_levels else set())
    outputs = VisionTower(size).apply({"params": params}, pixels, tuple(sorted(wanted)))
    hidden = {layer: patches(values, size) for layer, values in outputs.hidden.items()}
    out = {"selected": hidden[size.select_layer]}
    if with_levels:
        out["levels"] = jnp.concatenate([hidden[level] for level in size.levels], axis=-1)
    return out


def pixels_of(image: np.ndarray, cell: Cell) -> np.ndarray:
    """A decoded image as the tower wants it: float32 [S, S, 3]."""
    size = TOWERS[cell.tower.name]
    return preprocess(image, size.image_size, size.mean, size.std, cell.data.image_mode)


def prepare(cells: list[Cell], out: Path, progress: Progress) -> Prepared:
    """Make or reuse the data directory of cells that share tower and data.

    Args:
      cells: all cells that will read it; they must agree in `data` and `tower`.
      out: the directory; complete once it holds manifest.json.
      progress: called with (what, done, total).

    Raises:
      UserError: cells disagree, the directory belongs to other data, or nothing usable is left.
    """
    first = cells[0]
    if any((cell.data, cell.tower) != (first.data, first.tower) for cell in cells):
        raise UserError("the cells of a sweep must share `data` and `tower`")
    with_levels = any(
        c.compressor.visual_tokens and COMPRESSORS[c.compressor.name].needs_levels for c in cells
    )
    weights = tower_path(first)
    key = _key(first, weights, with_levels)
    manifest_path = out / "manifest.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        if manifest["key"] != key:
            raise UserError(f"{out}: holds other data than this config asks for; choose another --out")
        return Prepared(out, manifest, load_tokenizer(out / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    splits = load_splits(first.data, TOWERS[first.tower.name].image_size)
    named = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    parts = {name: split for name, split in named.items() if split is not None}
    tokenizer = train_tokenizer(texts(splits.train.records), first.data.vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))
    refused = {item.index for item in splits.quarantined}
    cut = {}
    for name, split in parts.items():
        cut[name] = _fit(split, Template(tokenizer), first.data.max_text_tokens, refused, splits)
        if not split.records:
            reasons = "; ".join(f"{item.id}: {item.reason}" for item in splits.quarantined[-5:])
            source = first.data.records or f"scenes, {name}"
            raise UserError(f"{source}: no usable record is left ({reasons})")
    params = load_tower(weights, first.tower.name)
    (out / "tower.safetensors").write_bytes(weights.read_bytes())
    run = jax.jit(lambda pixels: encode_images(first.tower.name, params, pixels, with_levels))
    for name, split in parts.items():
        write_records(out / f"{name}.records.jsonl", split)
        _write_features(out, name, split, first, run, progress)
    write_quarantine(splits.quarantined, out / "quarantine.jsonl")
    manifest = {
        "key": key,
        "summary": splits.summary,
        "records": {name: len(split.records) for name, split in parts.items()},
        "images": {name: split.num_images for name, split in parts.items()},
        "shortened_conversations": cut,
        "quarantined": len(splits.quarantined),
        "vocab_size": tokenizer.get_vocab_size(),
        "tower_sha256": tree.sha256(params),
    }
    write_json(manifest_path, manifest)
    return Prepared(out, manifest, tokenizer)


def _key(cell: Cell, weights: Path, with_levels: bool) -> str:
    """Hash of all that the directory's content depends on."""
    parts = identity(cell.data) | {"levels": with_levels, "tower": cell.tower.name}
    try:
        parts["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"tower.checkpoint={weights}: {error.strerror or error}") from error
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _fit(split: Split, template: Template, max_text_tokens: int, refused: set[int], splits: Splits) -> int:
    """Shorten conversations to the context in place; returns how many lost turns.

    `refused` are the indices of records that were set aside before: what is left keeps its own.
    """
    kept, image_of, shortened = [], [], 0
    indices = (index for index in itertools.count() if index not in refused)
    for index, record, image in zip(indices, split.records, split.image_of, strict=False):
        fitted = fit_context(record, template, max_text_tokens)
        if fitted is None:
            length = len(template.conversation(record.turns[:1])[0])
            reason = (
                f"too long: the first turn has {length} tokens, data.max_text_tokens is {max_text_tokens}"
            )
            splits.quarantined.append(Quarantined(index, record.id, reason))
            continue
        shortened += len(fitted.turns) < len(record.turns)
        kept.append(fitted)
        image_of.append(image)
    split.records, split.image_of = kept, np.array(image_of, np.int64)
    return shortened


def _write_features(
    out: Path,
    name: str,
    split: Split,
    cell: Cell,
    run: Callable[[np.ndarray], dict[str, jax.Array]],
    progress: Progress,
) -> None:
    """Run the tower over every distinct picture of a split and store its outputs as .npy.

    Records of text alone get one blank picture, which no record shows, so that shapes are known.
    """
    size = TOWERS[cell.tower.name]
    total = max(split.num_images, 1)
    # Written front to back, not through a memory map: on a full disk a write fails, a map kills the process.
    with contextlib.ExitStack() as stack:
        stores: dict[str, BinaryIO] = {}
        for start in range(0, total, _BATCH):
            indices = range(start, min(start + _BATCH, total))
            pixels = np.zeros((_BATCH, size.image_size, size.image_size, 3), np.float32)
            for row, index in enumerate(indices[: split.num_images - start]):
                pixels[row] = pixels_of(split.load_image(index), cell)
            for key, values in run(pixels).items():
                if key not in stores:
                    stores[key] = stack.enter_context((out / f"{name}.{key}.npy").open("wb"))
                    header = {"descr": "<f4", "fortran_order": False, "shape": (total, *values.shape[1:])}
                    np.lib.format.write_array_header_1_0(stores[key], header)
                stores[key].write(np.asarray(values, "<f4")[: len(indices)].tobytes())
            progress(f"tower features, {name}", indices.stop, total)
