"""Prepared data: tokenizer, records and frozen-tower features of a run or of a whole sweep, made once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from vlmscale.compressors import COMPRESSORS, parse_options
from vlmscale.compressors.features import blocks_read, tower_features
from vlmscale.config import Cell, content_sha256, identity
from vlmscale.data.conversation import Template, fit_context, training_row
from vlmscale.data.images import preprocess
from vlmscale.data.pipeline import Rows
from vlmscale.data.processor import CONFIG, NESTED, read_processor
from vlmscale.data.records import Quarantined, Record, write_quarantine
from vlmscale.data.splits import Split, Splits, load_splits, read_records, texts, write_records
from vlmscale.data.tokenizer import load_tokenizer, train_tokenizer
from vlmscale.errors import UserError
from vlmscale.models.sizes import TOWERS, TowerSize
from vlmscale.records import write_json
from vlmscale.sharding import make_mesh, place
from vlmscale.weights import hf_config, tables, tree
from vlmscale.weights.checkpoint import WEIGHTS, open_checkpoint
from vlmscale.weights.directory import abstract_tower
from vlmscale.weights.load import Source, load_params

TOWER = "tower.safetensors"  # of a data directory
_BATCH = 256  # pictures that go through a tower together, at most
_ACTIVATION_BYTES = 2**30  # what they may take on the way, about
# Fields of a tower's row that config.json must agree with, and their names there.
_ARCHITECTURE = {
    "style": "model_type",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
_LLAVA_KEYS = {"vision_config", "quantization_config", "compression_config"}  # of a LLaVA's tower
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
        """Tower outputs that the cell's compressor reads, memory-mapped: images along the first axis.

        By their names in `vlmscale.compressors.Features`.
        """
        if not cell.compressor.visual_tokens:
            return {}
        names = ["selected", *sorted(needs_of(cell) - {"tower"})]
        return {name: np.load(self.path / f"{split}.{name}.npy", mmap_mode="r") for name in names}

    def constants(self, cell: Cell) -> dict[str, Any]:
        """What the cell's compressor reads of the tower beside its outputs, by names of `Features`."""
        if "tower" not in needs_of(cell):
            return {}
        params = tree.load(self.path / TOWER)
        blocks = (f"block_{index}" for index in range(TOWERS[cell.tower.name].select_layer))
        return {"tower": {block: params[block] for block in blocks}}

    def rows(self, split: str, cell: Cell) -> Rows:
        """Training rows of a split for one cell."""
        records, image_of = self.records(split)
        template = self.template
        rows = [training_row(record, template, cell.compressor.visual_tokens) for record in records]
        method = COMPRESSORS[cell.compressor.name]
        return Rows(
            rows,
            image_of,
            self.features(split, cell),
            template.pad,
            queries=cell.compressor.visual_tokens > 0 and method.text == "query",
            spare=cell.compressor.visual_tokens if method.trains_all else 0,
        )


def tower_path(cell: Cell) -> Path:
    """The file or the Hugging Face directory with the tower's weights."""
    if cell.tower.checkpoint != "shipped":
        return Path(cell.tower.checkpoint)
    return Path(str(resources.files("vlmscale") / "assets" / f"{cell.tower.name}.safetensors"))


def needs_of(cell: Cell) -> frozenset[str]:
    """The fields of `Features` beside `selected` that the cell's compressor reads; none of a blind model."""
    compressor = cell.compressor
    if not compressor.visual_tokens:
        return frozenset()
    options = parse_options(compressor.name, compressor.options)
    return COMPRESSORS[compressor.name].needs(TOWERS[cell.tower.name], options)


def load_tower(path: Path, name: str, needs: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read and check the weights of a named tower.

    Args:
      path: a safetensors file of ours, which is read with all its blocks but may lack the last ones where
        they are not needed; or a directory in Hugging Face layout, of which only the blocks that are needed
        are read.
      name: of a row of the size table.
      needs: fields of `Features` that will be made with them.

    Returns:
      The parameters; those of the pooling head, under "head", only for `probe_attention`, as far as it reads
      them.

    Raises:
      UserError: unreadable, not the parameters of that tower, or without a block or the pooling head that is
        needed.
    """
    size, probe = TOWERS[name], "probe_attention" in needs
    needed = blocks_read(size, needs)
    if path.is_dir():
        return _read_directory(path, name, needed, probe)
    if path.name == WEIGHTS and (path.parent / "config.json").is_file():
        raise UserError(f"{path}: is one file of a directory in Hugging Face layout; name {path.parent}")
    params = tree.load(path)
    blocks = sum(part.startswith("block_") for part in params)
    layer = min(max(blocks, needed), size.num_layers)
    abstract = nn.meta.unbox(abstract_tower(size, (layer,), probe=probe))
    head = params.pop("head", None)
    if probe:
        if head is None:
            raise _no_head(path)
        read, whole = flatten_dict(abstract["head"]), flatten_dict(head)
        params["head"] = unflatten_dict({part: whole[part] for part in read if part in whole})
    tree.check_shapes(path, params, abstract)
    return params


def _no_head(path: Path) -> UserError:
    return UserError(
        f"{path}: has no pooling head, and so no attention of its probe; set compressor.options=score=mean"
    )


def _read_directory(directory: Path, name: str, layer: int, probe: bool) -> dict[str, Any]:
    """The parameters of a directory's tower up to a hidden state, and of its probe if asked, on one device.

    Raises:
      UserError: as `load_tower`.
    """
    config, where = hf_config.read_config(directory), directory / "config.json"
    kind = hf_config.kind_of(config, where)
    if kind == "decoder":
        raise UserError(f"{directory}: holds a language model alone; a CLIP, SigLIP or LLaVA has a tower")
    boxed = abstract_tower(TOWERS[name], (layer,), probe=probe)
    if kind == "llava":
        # Nothing but the tower is looked at: the language model may be one that is not built here.
        theirs = hf_config.llava_config(
            {key: config[key] for key in _LLAVA_KEYS & config.keys()}, where
        ).tower
        whole = tables.llava(theirs.style)
        table = replace(whole, ignored=(*whole.ignored, r"^language_model\.", r"^multi_modal_projector\."))
        boxed = {"tower": boxed}
    else:
        theirs = hf_config.tower_size(config, where)
        table = tables.TOWERS[theirs.style]
    _check_architecture(where, theirs, name, layer)
    _check_processor(directory, name)
    places = place(boxed, make_mesh(devices=jax.local_devices()[:1]))
    with open_checkpoint(directory) as checkpoint:
        if probe and not any(table.canonical(name).endswith("head.probe") for name in checkpoint.tensors):
            raise _no_head(directory)
        params, _ = load_params(places, [Source(checkpoint, table)])
    return params["tower"] if kind == "llava" else params


def _check_architecture(where: Path, theirs: TowerSize, name: str, layer: int) -> None:
    """Refuse a config.json that describes another tower than the named row, by the first key that differs.

    It may lack the last blocks, behind `layer`, as our own exports do.
    """
    if layer <= theirs.num_layers < TOWERS[name].num_layers:
        theirs = replace(theirs, num_layers=TOWERS[name].num_layers)
    for field, key in _ARCHITECTURE.items():
        found, wanted = getattr(theirs, field), getattr(TOWERS[name], field)
        if found == wanted:
            continue
        fits = [
            row
            for row, size in TOWERS.items()
            if all(getattr(size, part) == getattr(theirs, part) for part in _ARCHITECTURE)
        ]
        hint = f"it fits tower.name={' or '.join(fits)}" if fits else "it fits no tower of the size table"
        raise UserError(f"{where}: {key} is {found}, but tower.name={name} has {wanted}; {hint}")


def _check_processor(directory: Path, name: str) -> None:
    """Refuse an image processor whose pixels are not those that the named row stands for.

    Pictures are prepared by `data.image_mode` with the row's numbers, so how they become square and by which
    filter is the config's choice, but their side and their normalisation are the tower's own.
    """
    nested = directory / NESTED
    # Processors of text and pictures have such a file too, the picture's part in it or not.
    inside = nested.is_file() and b'"image_processor"' in nested.read_bytes()
    if not inside and not (directory / CONFIG).is_file():
        return
    processor, size = read_processor(directory), TOWERS[name]
    for key, theirs, ours in (
        ("size", processor.shape, (size.image_size, size.image_size)),
        ("rescale_factor", processor.scale or 1.0, 1 / 255),
        ("do_normalize", processor.normalise, True),
        ("image_mean", processor.mean, size.mean),
        ("image_std", processor.std, size.std),
    ):
        if not np.allclose(theirs, ours, rtol=0, atol=1e-6):
            raise UserError(
                f"{directory}: its image processor has {key} {theirs}, but tower.name={name} has {ours}; "
                "remove that file if the tower was trained with the latter"
            )


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
      UserError: cells disagree, the directory belongs to other data, the tower cannot be read or is not the
        named one, or nothing usable is left.
    """
    first = cells[0]
    if any((cell.data, cell.tower) != (first.data, first.tower) for cell in cells):
        raise UserError("the cells of a sweep must share `data` and `tower`")
    needs = frozenset().union(*map(needs_of, cells))
    weights = tower_path(first)
    key = _key(first, weights, needs)
    manifest_path = out / "manifest.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        if manifest["key"] != key:
            raise UserError(f"{out}: holds other data than this config asks for; choose another --out")
        return Prepared(out, manifest, load_tokenizer(out / "tokenizer.json"))
    params = _needed_params(weights, first.tower.name, needs)  # before anything that takes long
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
    # A copy, so that a run stays whole when its source goes away.
    tree.save(out / TOWER, params, {"name": first.tower.name})
    digest, params = tree.sha256(params), jax.device_put(params)  # in this order: no second copy on the host
    # The parameters are an argument: as constants they would be copied into the program.
    encode = jax.jit(partial(tower_features, TOWERS[first.tower.name], needs=needs))
    together = batch_size(TOWERS[first.tower.name], needs)
    for name, split in parts.items():
        write_records(out / f"{name}.records.jsonl", split)
        _write_features(out, name, split, first, partial(encode, params), together, progress)
    write_quarantine(splits.quarantined, out / "quarantine.jsonl")
    manifest = {
        "key": key,
        "summary": splits.summary,
        "records": {name: len(split.records) for name, split in parts.items()},
        "images": {name: split.num_images for name, split in parts.items()},
        "shortened_conversations": cut,
        "quarantined": len(splits.quarantined),
        "vocab_size": tokenizer.get_vocab_size(),
        "tower_sha256": digest,
    }
    write_json(manifest_path, manifest)
    return Prepared(out, manifest, tokenizer)


def _needed_params(weights: Path, name: str, needs: frozenset[str]) -> dict[str, Any]:
    """The tower's parameters without blocks that no output needs."""
    params = load_tower(weights, name, needs)
    read = blocks_read(TOWERS[name], needs)
    spare = {f"block_{index}" for index in range(read, TOWERS[name].num_layers)}
    return {part: values for part, values in params.items() if part not in spare}


def _key(cell: Cell, weights: Path, needs: frozenset[str]) -> str:
    """Hash of all that the directory's content depends on."""
    parts = identity(cell.data) | {"levels": "levels" in needs, "tower": cell.tower.name}
    if more := sorted(needs - {"levels"}):  # apart, so that directories of earlier versions stay good
        parts["needs"] = more
    parts["weights"] = content_sha256("tower.checkpoint", weights, directory=True)
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
    together: int,
    progress: Progress,
) -> None:
    """Run the tower over every distinct picture of a split, so many together, and store its outputs as .npy.

    Records of text alone get one blank picture, which no record shows, so that shapes are known.
    """
    size = TOWERS[cell.tower.name]
    total = max(split.num_images, 1)
    # Written front to back, not through a memory map: on a full disk a write fails, a map kills the process.
    with contextlib.ExitStack() as stack:
        stores: dict[str, BinaryIO] = {}
        for start in range(0, total, together):
            indices = range(start, min(start + together, total))
            pixels = np.zeros((together, size.image_size, size.image_size, 3), np.float32)
            for row, index in enumerate(indices[: split.num_images - start]):
                pixels[row] = pixels_of(split.load_image(index), cell)
            for key, values in run(pixels).items():
                if key not in stores:
                    stores[key] = stack.enter_context((out / f"{name}.{key}.npy").open("wb"))
                    header = {"descr": "<f4", "fortran_order": False, "shape": (total, *values.shape[1:])}
                    np.lib.format.write_array_header_1_0(stores[key], header)
                stores[key].write(np.asarray(values, "<f4")[: len(indices)].tobytes())
            progress(f"tower features, {name}", indices.stop, total)
