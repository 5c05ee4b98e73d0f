"""Trained runs as Hugging Face directories, and such directories checked, cast and taken apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vlmscale import model_card
from vlmscale.compressors import parse_options
from vlmscale.config import Cell, trains_reducer
from vlmscale.data.processor import CONFIG as IMAGES
from vlmscale.data.processor import NESTED, ImageProcessor, processor_config
from vlmscale.data.tokenizer import IMAGE, tokenizer_files
from vlmscale.errors import UserError
from vlmscale.evaluate.loaded import LoadedRun
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize
from vlmscale.records import read_json
from vlmscale.train.frozen import load_tower
from vlmscale.weights import export, hf_config, tree
from vlmscale.weights.checkpoint import INDEX, Checkpoint, open_checkpoint
from vlmscale.weights.directory import Description, describe
from vlmscale.weights.load import Report, Source, account_for

Files = dict[str, dict[str, Any] | str | Path]

COMPRESSOR = "compressor.safetensors"
_UNFINISHED = ".model-compressor.tmp"  # as `vlmscale.weights.checkpoint.TEMPORARY`: left only by a kill
_TEMPLATES = "additional_chat_templates"
# What is copied beside weights and config.json. README.md is the model card, or says how pooling is added.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_ALL_FILES = (*_TEXT_FILES, IMAGES, NESTED, "README.md", "LICENSE")


@dataclass
class Converted(Report):
    """What was found in a directory that was written anew.

    Attributes:
      not_copied: what else lies in it, where the whole was written: names, those of folders with a slash.
    """

    not_copied: list[str] = field(default_factory=list)


def convert_directory(model: Path, out: Path, part: str, dtype: str | None) -> tuple[Converted, list[Path]]:
    """Check a Hugging Face directory against its config.json and write it, or one part of it, anew.

    The whole keeps every tensor under its name, the text half of a CLIP or SigLIP too. A part is a model of
    its own: the LLM without a head that repeats its tied embedding, the tower with its last blocks, norm and
    pooling head.

    Args:
      model: a LLaVA, decoder, tower, or whole CLIP or SigLIP directory.
      out: a directory that holds none of the files, and no weights.
      part: "all"; "llm" or "tower" of a LLaVA; "tower" of a whole CLIP or SigLIP. A directory that is that
        part alone is written whole.
      dtype: what floating point tensors are cast to; None keeps each as it is.

    Returns:
      What was found, and the files written.

    Raises:
      UserError: a file or tensor is missing, damaged or unknown, the model has no such part, a number is too
        large for `dtype`, or `out` holds one of the files or weights, is a run or no directory.
      OSError: the disk is full or read-only.
    """
    kind = None if dtype is None else np.dtype(jnp.dtype(dtype))
    with open_checkpoint(model) as checkpoint:
        described = describe(checkpoint, whole_tower=True)
        if (described.kind, part) in (("decoder", "llm"), ("tower", "tower")) and not _has_halves(described):
            part = "all"
        config, names = _part(checkpoint, described, part)
        files = _tower_files(model) if part == "tower" else _copies(model, part)
        report = Converted(not_copied=_not_copied(checkpoint, files) if part == "all" else [])
        shapes = flatten_dict(nn.meta.unbox(described.boxed), sep="/")
        report.loaded = sorted(account_for(Source(checkpoint, described.table), shapes, report))
        report.num_params = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
        if part != "all" and kind is None:
            kind = _only_dtype(checkpoint, names.values())
        tensors = ((name, checkpoint.read(stored)) for name, stored in names.items())
        return report, export.write_directory(out, config, tensors, files, kind)


def _part(checkpoint: Checkpoint, described: Description, part: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The config.json of a part, and its tensors: names there and in the checkpoint.

    Raises:
      UserError: the model has no such part.
    """
    config, llava = described.config, described.llava
    if part == "all":
        return config, {name: name for name in checkpoint.tensors}
    if llava is None and not _has_halves(described):
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


def _has_halves(described: Description) -> bool:
    """Whether it is a LLaVA, or a CLIP or SigLIP with its text half."""
    return "vision_config" in described.config


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
    templates = sorted((model / _TEMPLATES).glob("*.jinja"))
    plain = {name: model / name for name in names if (model / name).is_file()}
    return {**plain, **{f"{_TEMPLATES}/{path.name}": path for path in templates}}


def _not_copied(checkpoint: Checkpoint, files: Files) -> list[str]:
    """What lies in the directory beside its config.json, its weights and these files.

    Hidden names are left out: they are of git or of the hub's cache.
    """
    directory = checkpoint.directory
    known = {"config.json", INDEX, *(Path(name).parts[0] for name in files)}
    known |= {tensor.file.relative_to(directory).parts[0] for tensor in checkpoint.tensors.values()}
    return sorted(
        path.name + "/" * path.is_dir()
        for path in directory.iterdir()
        if path.name not in known and not path.name.startswith(".")
    )


def _tower_files(model: Path) -> Files:
    """The preprocessing of pictures; not processor_config.json, whose processor has a tokenizer as well."""
    if (model / IMAGES).is_file():
        return {IMAGES: model / IMAGES}
    nested = read_json(model / NESTED) if (model / NESTED).is_file() else {}
    return {IMAGES: nested["image_processor"]} if "image_processor" in nested else {}


def export_run(run: LoadedRun, out: Path, dtype: str | None) -> list[Path]:
    """A trained run as directories that transformers loads, with a README.md that says how.

    With the compressor `mlp` or `pool`, `out` is a `LlavaForConditionalGeneration`. Another compressor has
    no place in it: then `out/llm` and `out/tower` are directories of their own and
    `out/compressor.safetensors` holds the rest under our names. A blind run is its LLM alone.

    The run's own tokenizer comes with it. Where a config.json says model_type qwen2, transformers 5 makes
    any tokenizer a Qwen2Tokenizer, whose ids differ (see `tokenizer_files`): a blind run and `out/llm` of a
    Qwen2 size need `PreTrainedTokenizerFast.from_pretrained`. The toy sizes are of the family llama.

    Args:
      run: trained.
      out: a directory that holds none of the files, and no weights.
      dtype: of the tensors; None for float32, as trained.

    Returns:
      The files written.

    Raises:
      UserError: `out` holds one of the files or weights, is a run or no directory; a number is too large for
        `dtype`; the run has another model's tokenizer.
      OSError: the disk is full or read-only.
    """
    if run.cell.data.template != "toy":
        raise UserError(
            f"{run.path}: was trained with the tokenizer of another model (data.tokenizer); only runs with a "
            "tokenizer of their own are exported so far"
        )
    if trains_reducer(run.cell):
        raise UserError(
            f"{run.path}: was trained with reducer.name={run.cell.reducer.name}, which no model of "
            "transformers has; evaluate and generate answer with the run itself"
        )
    kind = np.dtype(jnp.dtype(dtype or "float32"))
    template, compressor = run.prepared.template, run.cell.compressor
    size = replace(SIZES[run.cell.llm.name], vocab_size=run.prepared.tokenizer.get_vocab_size())
    ends = {"eos_token_id": template.stop_ids[0], "pad_token_id": template.pad}
    text: Files = {**tokenizer_files(run.prepared.tokenizer), "generation_config.json": ends}
    config = hf_config.decoder_config(size, size.vocab_size) | {"bos_token_id": None} | ends
    if not compressor.visual_tokens:
        tensors = export.decoder_tensors(run.params["decoder"])
        return export.write_directory(
            out, config, tensors, text | {"README.md": model_card.of_llm(run)}, kind
        )
    trained = run.cell.train.tower_rate > 0 and run.tower is not None
    tower = run.tower if trained else load_tower(run.prepared.path / "tower.safetensors", run.cell.tower.name)
    assert tower is not None
    if _is_llava(run.cell):
        return _export_llava(run, tower, out, (size, config), text, kind)
    return _export_parts(run, tower, out, config, text, kind)


def _is_llava(cell: Cell) -> bool:
    """Whether transformers' LLaVA can be the run: its projector, behind equal windows or none."""
    compressor = cell.compressor
    if compressor.name == "pool":
        equal = TOWERS[cell.tower.name].grid % math.isqrt(compressor.visual_tokens) == 0
        return equal and not parse_options("pool", compressor.options)
    return compressor.name in hf_config.LLAVA_COMPRESSORS


def _export_llava(
    run: LoadedRun,
    tower: dict[str, Any],
    out: Path,
    decoder: tuple[DecoderSize, dict[str, Any]],
    text: Files,
    kind: np.dtype,
) -> list[Path]:
    cell, size = run.cell, TOWERS[run.cell.tower.name]
    llava = hf_config.LlavaConfig(
        decoder=decoder[0],
        tower=size,
        image_token_id=run.prepared.template.image,
        keep_class_token=not size.class_tokens,  # compressors read patches alone
        visual_tokens=cell.compressor.visual_tokens,
        compressor=cell.compressor.name,
    )
    config = export.llava_export_config(llava, export.num_blocks(tower)) | {"text_config": decoder[1]}
    strategy = config["vision_feature_select_strategy"]
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        # It counts a picture's tokens as pixels over this: the side of what a pooled token covers.
        "patch_size": size.patch_size * size.grid // math.isqrt(llava.visual_tokens),
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(strategy == "default"),  # the class token that this takes away
    }
    files = text | _picture_files(run) | {NESTED: processor, "README.md": model_card.of_llava(run)}
    tensors = export.llava_tensors(run.params | {"tower": tower}, size.style)
    return export.write_directory(out, config, tensors, files, kind)


def _export_parts(
    run: LoadedRun, tower: dict[str, Any], out: Path, config: dict[str, Any], text: Files, kind: np.dtype
) -> list[Path]:
    size, params, pictures = TOWERS[run.cell.tower.name], run.params, _picture_files(run)
    options = parse_options(run.cell.compressor.name, run.cell.compressor.options)
    held = {"llm": text, "tower": pictures}
    names = [f"{part}/{name}" for part in held for name in (*held[part], "config.json", *export.WEIGHT_NAMES)]
    export.refuse_taken(out, [*names, "README.md", COMPRESSOR])  # all, before the first is written
    compressor = {
        name: export.cast(name, leaf, kind) for name, leaf in tree.flatten(params["compressor"]).items()
    }
    with export.whole_or_nothing(out) as written:
        tensors = export.decoder_tensors(params["decoder"])
        written += export.write_directory(out / "llm", config, tensors, text, kind)
        described = hf_config.tower_config(size, export.num_blocks(tower))
        tensors = export.tower_tensors(tower, size.style)
        written += export.write_directory(out / "tower", described, tensors, pictures, kind)
        written.append(out / "README.md")
        export.write_text(out / "README.md", model_card.of_parts(run))
        written.append(out / COMPRESSOR)
        about = {
            "compressor": run.cell.compressor.name,
            "options": ",".join(f"{key}={value}" for key, value in options.items()),
            "visual_tokens": str(run.cell.compressor.visual_tokens),
        }
        try:
            tree.save(out / _UNFINISHED, compressor, about)
            (out / _UNFINISHED).replace(out / COMPRESSOR)
        finally:
            (out / _UNFINISHED).unlink(missing_ok=True)
    return written


def _picture_files(run: LoadedRun) -> Files:
    size = TOWERS[run.cell.tower.name]
    processor = ImageProcessor.of(size.image_size, size.mean, size.std, run.cell.data.image_mode)
    return {IMAGES: processor_config(processor)}
