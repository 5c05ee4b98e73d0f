"""Our parameters as Hugging Face directories that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vlmscale.errors import UserError
from vlmscale.records import make_directory
from vlmscale.weights import hf_config, tables
from vlmscale.weights.checkpoint import INDEX, TEMPORARY, WEIGHTS, write_checkpoint

Tensors = Iterator[tuple[str, np.ndarray]]

# What the tensors of a tower are called: transformers 4 knows them with this prefix alone, transformers 5
# writes them without and reads both.
TOWER_PREFIX = "vision_model."

WEIGHT_NAMES = (WEIGHTS, INDEX)
_WEIGHT_FILES = ("*.safetensors", "*.bin")  # transformers may load any of them in the place of ours
_BFLOAT16 = float(jnp.finfo(jnp.bfloat16).max)


def tensors_of(params: dict[str, Any], table: tables.Table) -> Tensors:
    """Names and arrays as a checkpoint holds them, made one at a time on the host.

    Args:
      params: nested dict of arrays, the decoder in either layout.
      table: of the model.

    Raises:
      ValueError: a parameter that no row of the table names.
    """
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        found = table.row_of(path)
        if found is None:
            raise ValueError(f"parameter {path}: no table row names it")
        row, layer = found
        to_theirs = tables.FORMS[row.form].theirs
        stacked = "{i}" in row.theirs and layer is None
        for number in range(leaf.shape[0]) if stacked else [layer]:
            part = jax.device_get(leaf[number] if stacked else leaf)
            yield row.theirs.replace("{i}", str(number)), np.ascontiguousarray(to_theirs(np.asarray(part)))


def decoder_tensors(params: dict[str, Any]) -> Tensors:
    """A decoder's."""
    return tensors_of(params, tables.DECODER)


def tower_tensors(params: dict[str, Any], style: str) -> Tensors:
    """A tower's, and the norm behind the last block.

    That norm is no part of a tower here, as no hidden state goes through it, but transformers expects one:
    it gets the weights that every norm starts with.
    """
    for name, array in tensors_of(params, tables.TOWERS[style]):
        yield TOWER_PREFIX + name, array
    width = params["position_embedding"].shape[-1]
    yield f"{TOWER_PREFIX}post_layernorm.weight", np.ones(width, np.float32)
    yield f"{TOWER_PREFIX}post_layernorm.bias", np.zeros(width, np.float32)


def llava_tensors(params: dict[str, Any], style: str) -> Tensors:
    """Those of a whole LLaVA: params of "decoder", "tower" and "compressor" (`mlp` or `pool`)."""
    behind = {name: params[name] for name in ("decoder", "compressor")}
    yield from tensors_of(behind, tables.llava(style))
    for name, array in tower_tensors(params["tower"], style):
        yield f"vision_tower.{name}", array


def num_blocks(tower_params: dict[str, Any]) -> int:
    """Blocks that a tower's parameters hold."""
    return sum(name.startswith("block_") for name in tower_params)


def llava_export_config(llava: hf_config.LlavaConfig, blocks: int) -> dict[str, Any]:
    """The config.json of a LLaVA whose tower holds so many blocks; the inverse of `hf_config.llava_config`.

    What transformers' LLaVA does not have, pooling, goes under a key of our own.
    """
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": hf_config.decoder_config(llava.decoder, llava.decoder.vocab_size),
        "vision_config": hf_config.tower_config(llava.tower, blocks),
        "image_token_index": llava.image_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": llava.tower.select_layer - blocks - 1,  # from the end, as LLaVA writes it
        "vision_feature_select_strategy": "full" if llava.keep_class_token else "default",
        "image_seq_length": llava.visual_tokens,
        "tie_word_embeddings": llava.decoder.tied_embeddings,
    }
    if llava.compressor != "mlp":
        config["vlmscale"] = {"compressor": llava.compressor, "visual_tokens": llava.visual_tokens}
    return config


def refuse_taken(out: Path, names: Iterable[str]) -> None:
    """Refuse a directory where an export would replace or mix with what is there.

    Hidden temporary files are no hindrance: only an export that was killed leaves them.

    Args:
      out: where the export goes; it may be absent.
      names: of the files that it consists of, below `out`.

    Raises:
      UserError: one of them is there, or other weights beside them; `out` is a run, a file, or a link to
        nothing.
    """
    paths = [out / name for name in names]
    folders = sorted({out, *(path.parent for path in paths)})
    for folder in dict.fromkeys([*out.parents, *folders]):
        if folder.is_symlink() and not folder.exists():
            raise UserError(
                f"{folder}: is a link to nothing ({os.readlink(folder)}); remove it or name another directory"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; name another directory")
    if os.path.lexists(out / "spec.json"):
        raise UserError(f"{out}: is a run (it has spec.json); name another directory")
    weights = {path for folder in folders for kind in _WEIGHT_FILES for path in folder.glob(kind)}
    taken = {path for path in paths if os.path.lexists(path)}
    others = sorted(path.relative_to(out).as_posix() for path in weights - taken)
    found = sorted(path.relative_to(out).as_posix() for path in taken) + others[:3]
    if not found:
        return
    listed = ", ".join(found) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    if any(path for folder in folders for path in folder.glob(TEMPORARY)):
        raise UserError(
            f"{out}: has the rest of an export that was killed; remove {listed}, or name another directory"
        )
    it = "it" if len(found) == 1 else "them"
    raise UserError(f"{out}: has {listed} already; remove {it} or name another directory")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[list[Path]]:
    """A list for the files that are written: where the block fails they go, with the folders left empty.

    So an export that the disk or a tensor stopped can be run again, into the same directory. Each file is
    listed before it is begun, and none may have been there before.
    """
    written: list[Path] = []
    existed = out.exists()
    try:
        yield written
    except BaseException:
        with suppress(OSError):  # the error that stopped the export says more
            for path in written:
                path.unlink(missing_ok=True)
        for folder in sorted({path.parent for path in written} | {out}, reverse=True):
            if folder != out or not existed:
                with suppress(OSError):  # not empty, or not there
                    folder.rmdir()
        raise


def write_directory(
    out: Path,
    config: dict[str, Any],
    tensors: Tensors,
    files: Mapping[str, dict[str, Any] | str | Path],
    dtype: np.dtype | None = None,
) -> list[Path]:
    """Write a directory that transformers loads; the weights come last and tell a whole one.

    Args:
      out: made if absent.
      config: its config.json; where `dtype` is given, it says so.
      tensors: pairs of name and array, made one by one.
      files: further files by name, as JSON objects, as text or as a file to copy.
      dtype: what floating point tensors are cast to; None keeps each as it is.

    Returns:
      All files.

    Raises:
      UserError: `out` holds one of the files or other weights, or cannot be made (nothing is touched); a
        number is too large for `dtype` (nothing is left).
      OSError: the disk is full or read-only; nothing is left.
    """
    contents = {"config.json": _saying(config, dtype), **files}
    refuse_taken(out, [*contents, *WEIGHT_NAMES])
    with whole_or_nothing(out) as written:
        make_directory(out)
        for name, content in contents.items():
            path = out / name
            written.append(path)
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                write_text(path, content)
        written += write_checkpoint(out, ((name, cast(name, array, dtype)) for name, array in tensors))
    return written


def cast(name: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """A tensor in another type, where it is of floating point numbers and a type is given.

    Raises:
      UserError: a finite number would become infinite.
    """
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # numpy's warning; the error below says which tensor
        made = array.astype(dtype, copy=False)
    infinite = np.isinf(made)
    if made is array or not infinite.any():
        return made
    lost = array[infinite & np.isfinite(array)]
    if lost.size:
        largest = float(np.abs(lost.astype(np.float64)).max())
        instead = "take bfloat16" if dtype == np.float16 and largest < _BFLOAT16 else "keep the type it has"
        raise UserError(f"tensor {name} does not fit {dtype.name} (largest {largest:.3g}); {instead}")
    return made


def write_text(path: Path, content: dict[str, Any] | str) -> None:
    """Write a text, or an object as JSON, with one line end behind it."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")


def _saying(config: dict[str, Any], dtype: np.dtype | None) -> dict[str, Any]:
    """A config.json that names the type of its tensors, in its parts too."""
    if dtype is None:
        return config
    parts = {
        name: _saying(config[name], dtype)
        for name in ("text_config", "vision_config")
        if isinstance(config.get(name), dict)
    }
    # transformers 4 reads the first spelling, transformers 5 the second.
    return config | parts | {"torch_dtype": dtype.name, "dtype": dtype.name}
