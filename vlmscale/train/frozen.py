"""The frozen vision tower: where its weights lie, which a cell needs, and whether they are those it names."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vlmscale.compressors import COMPRESSORS, parse_options
from vlmscale.compressors.features import blocks_read
from vlmscale.config import Cell
from vlmscale.data.processor import CONFIG, NESTED, read_processor
from vlmscale.errors import UserError
from vlmscale.models.sizes import TOWERS, TowerSize
from vlmscale.sharding import make_mesh, place
from vlmscale.weights import hf_config, tables, tree
from vlmscale.weights.checkpoint import WEIGHTS, open_checkpoint
from vlmscale.weights.directory import abstract_tower
from vlmscale.weights.load import Source, load_params

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


def needed_params(weights: Path, name: str, needs: frozenset[str]) -> dict[str, Any]:
    """The tower's parameters without blocks that no output needs."""
    params = load_tower(weights, name, needs)
    read = blocks_read(TOWERS[name], needs)
    spare = {f"block_{index}" for index in range(read, TOWERS[name].num_layers)}
    return {part: values for part, values in params.items() if part not in spare}
