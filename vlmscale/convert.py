"""Trained runs as Hugging Face directories, and such directories checked, cast and taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vlmscale.data.processor import CONFIG as IMAGES
from vlmscale.data.processor import NESTED, ImageProcessor, processor_config, read_processor
from vlmscale.data.tokenizer import tokenizer_files
from vlmscale.errors import UserError
from vlmscale.evaluate.runner import LoadedRun
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.train.prepared import load_tower
from vlmscale.weights import export, hf_config, tree
from vlmscale.weights.checkpoint import Checkpoint, open_checkpoint, write_file
from vlmscale.weights.directory import Description, describe
from vlmscale.weights.load import Report, Source, account_for

Files = dict[str, dict[str, Any] | str | Path]

COMPRESSOR = "compressor.safetensors"
# What a directory holds beside weights and config.json, for text and for all. Of a chat or a licence too:
# README.md is the model card, or says how pooling is added.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_ALL_FILES = (*_TEXT_FILES, IMAGES, NESTED, "README.md", "LICENSE")


def convert_directory(model: Path, out: Path, part: str, dtype: str | None) -> tuple[Report, list[Path]]:
    """Check a Hugging Face directory against its config.json and write it, or one part of it, anew.

    The whole keeps every tensor under its name, the text half of a CLIP or SigLIP too. A part is a model of
    its own: the LLM without a head that repeats its tied embedding, the tower with its last blocks, norm and
    pooling head.

    Args:
      model: a LLaVA, decoder, tower, or whole CLIP or SigLIP directory.
      out: a directory without weights.
      part: "all"; "llm" or "tower" of a LLaVA; "tower" of a whole CLIP or SigLIP.
      dtype: what floating point tensors are cast to; None keeps each as it is.

    Returns:
      What was found, and the files written.

    Raises:
      UserError: a file or tensor is missing, damaged or unknown, the model has no such part, or `out` holds
        weights or is a file.
      OSError: the disk is full or read-only.
    """
    kind = None if dtype is None else np.dtype(jnp.dtype(dtype))
    with open_checkpoint(model) as checkpoint:
        described = describe(checkpoint, whole_tower=True)
        config, names = _part(checkpoint, described, part)
        export.refuse_taken(out)
        shapes = flatten_dict(nn.meta.unbox(described.boxed), sep="/")
        report = Report()
        report.loaded = sorted(account_for(Source(checkpoint, described.table), shapes, report))
        report.num_params = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
        if part != "all" and kind is None:
            kind = _only_dtype(checkpoint, names.values())
        tensors = ((name, checkpoint.read(stored)) for name, stored in names.items())
        files = _tower_files(model) if part == "tower" else _copies(model, part)
        return report, export.write_directory(out, config, tensors, files, kind)


def _part(
    checkpoint: Checkpoint, described: Description, part: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config.json of a part, and its tensors: names there and in the checkpoint.

    Raises:
      UserError: the model has no such part.
    """
    config, llava = described.config, described.llava
    if part == "all":
        return config, {name: name for name in checkpoint.tensors}
    whole = "vision_config" in config  # a LLaVA, or a CLIP or SigLIP with its text half
    if not whole and llava is None:
        raise UserError(f"{checkpoint.directory}: is a {described.kind} alone; leave --part away")
    if part == "llm" and llava is None:
        raise UserError(f"{checkpoint.directory}: is a two-tower model, which has no LLM; take --part tower")
    canonical = {described.table.canonical(name): name for name in checkpoint.tensors}
    if part == "llm":
        assert llava is not None
        names = _under("language_model.", "", canonical)
        if llava.decoder.tied_embeddings:
            names.pop("lm_head.weight", None)
        text = config.get("text_config") or {}
        ends = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: text[name] for name in ends if name in text}
        return hf_config.decoder_config(llava.decoder, llava.decoder.vocab_size) | ids, names
    prefix = export.TOWER_PREFIX
    if llava is not None:
        names = _under("vision_tower.", prefix, canonical)
    else:
        names = _under(prefix, prefix, {name: name for name in checkpoint.tensors})
    tower = described.tower
    assert tower is not None
    made = hf_config.tower_config(tower, tower.num_layers)
    if tower.style == "siglip":
        made["vision_use_head"] = any(name.startswith(f"{prefix}head.") for name in names)
    return made, names


def _under(prefix: str, to: str, names: dict[str, str]) -> dict[str, str]:
    """The tensors below a prefix, with another one; old files also hold buffers, which are computed."""
    return {
        to + name.removeprefix(prefix): stored
        for name, stored in sorted(names.items())
        if name.startswith(prefix) and not name.endswith((".inv_freq", ".position_ids"))
    }


def _only_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> np.dtype | None:
    """The type of all floating point tensors, or None where there are several."""
    kinds = {checkpoint.tensors[name].dtype for name in names}
    floating = [kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)]
    return floating[0] if len(floating) == 1 else None


def _copies(model: Path, part: str) -> Files:
    names = _TEXT_FILES if part == "llm" else _ALL_FILES
    return {name: model / name for name in names if (model / name).is_file()}


def _tower_files(model: Path) -> Files:
    """The preprocessing of pictures; not processor_config.json, whose processor has a tokenizer as well."""
    if (model / IMAGES).is_file():
        return {IMAGES: model / IMAGES}
    if (model / NESTED).is_file():
        return {IMAGES: processor_config(read_processor(model))}
    return {}


def export_run(run: LoadedRun, out: Path, dtype: str | None) -> list[Path]:
    """A trained run as directories that transformers loads, with a README.md that says how.

    With the compressor `mlp` or `pool`, `out` is a `LlavaForConditionalGeneration`. Another compressor has
    no place in it: then `out/llm` and `out/tower` are directories of their own and
    `out/compressor.safetensors` holds the rest under our names. A blind run is its LLM alone.

    The run's own tokenizer comes with it. In a directory whose config.json says model_type qwen2,
    transformers 5 would make it a Qwen2Tokenizer, whose ids differ (see `tokenizer_files`): `out/llm` and
    the blind LLM of a Qwen2 size are read right by vlmscale alone. The toy sizes are of the family llama.

    Args:
      run: trained.
      out: a directory without weights.
      dtype: of the tensors; None for float32, as trained.

    Returns:
      The files written.

    Raises:
      UserError: `out` holds weights already, or is a file.
      OSError: the disk is full or read-only.
    """
    cell, template = run.cell, run.prepared.template
    kind = np.dtype(jnp.dtype(dtype or "float32"))
    export.refuse_taken(out)
    size = replace(SIZES[cell.llm.name], vocab_size=run.prepared.tokenizer.get_vocab_size())
    ends = {"eos_token_id": template.end, "pad_token_id": template.pad}
    text_files: Files = {**tokenizer_files(run.prepared.tokenizer), "generation_config.json": ends}
    config = hf_config.decoder_config(size, size.vocab_size) | {"bos_token_id": None} | ends
    tensors = export.decoder_tensors(run.params["decoder"])
    visual_tokens = cell.compressor.visual_tokens
    if not visual_tokens:
        files: Files = text_files | {"README.md": _readme_llm(run)}
        return export.write_directory(out, config, tensors, files, kind)

    tower_size = TOWERS[cell.tower.name]
    tower = load_tower(run.prepared.path / "tower.safetensors", cell.tower.name)
    pictures = ImageProcessor.of(
        tower_size.image_size, tower_size.mean, tower_size.std, cell.data.image_mode
    )
    image_files: Files = {IMAGES: processor_config(pictures)}
    if cell.compressor.name in ("mlp", "pool"):
        llava = hf_config.LlavaConfig(
            decoder=size,
            tower=tower_size,
            image_token_id=template.image,
            keep_class_token=tower_size.class_tokens == 0,  # compressors read patches alone
            visual_tokens=visual_tokens,
            compressor=cell.compressor.name,
        )
        whole = export.llava_export_config(llava, export.num_blocks(tower))
        whole["text_config"] = config
        params = {name: run.params[name] for name in ("decoder", "compressor")} | {"tower": tower}
        image_files |= {NESTED: _processor(run, llava), "README.md": _readme_llava(run, llava)}
        made = export.llava_tensors(params, tower_size.style)
        return export.write_directory(out, whole, made, text_files | image_files, kind)

    for folder, name in ((out, COMPRESSOR), (out / "llm", None), (out / "tower", None)):
        export.refuse_taken(folder, [name]) if name else export.refuse_taken(folder)
    written = export.write_directory(out / "llm", config, tensors, text_files, kind)
    tower_config = hf_config.tower_config(tower_size, export.num_blocks(tower))
    made = export.tower_tensors(tower, tower_size.style)
    written += export.write_directory(out / "tower", tower_config, made, image_files, kind)
    export.write_text(out / "README.md", _readme_parts(run))
    arrays = {name: array.astype(kind) for name, array in sorted(tree.flatten(run.params["compressor"]).items())}
    said = {"compressor": cell.compressor.name, "visual_tokens": str(visual_tokens)}
    write_file(out / COMPRESSOR, arrays, said)
    return [*written, out / "README.md", out / COMPRESSOR]
