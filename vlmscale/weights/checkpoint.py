"""The weight files of a Hugging Face directory, in and out.

It knows names, shapes and bytes, nothing of models, of jax or of config.json. The formats: safetensors
(https://huggingface.co/docs/safetensors: a header of JSON, then the bytes) and what `save_pretrained` of
transformers makes of it: one file, or numbered shards and an index that names the shard of each tensor.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vlmscale.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPORARY = ".model-*.tmp"  # what unfinished files are called; only a killed process leaves them
PYTORCH: Mapping[str, str] = MappingProxyType({"format": "pt"})  # as transformers writes and expects it

# What is read and written, in the order in which the safetensors library lays tensors out: the widest first,
# so that each starts at a multiple of its item size.
_NAMES = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")
_KINDS = ("u8", "i8", "f8", "f4", "u4", "i4", ml_dtypes.bfloat16, "f2", "u2", "i2", "i1", "u1", "?")
_DTYPES = dict(zip(_NAMES, map(np.dtype, _KINDS), strict=True))
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_KNOWN = ", ".join(_NAMES)
UNREADABLE = np.dtype("V")  # stands for a type that is not in the table, such as F8_E4M3
_AGAIN = "download or save the model again"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class Tensor(NamedTuple):
    """Where a tensor lies and what it is; `dtype` is `UNREADABLE` where `read` would refuse it."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a directory; `open_checkpoint` makes it. It is a context manager that closes the files.

    Attributes:
      directory: where the files are.
      tensors: every tensor by name, in the order of the names.
    """

    def __init__(self, directory: Path, tensors: dict[str, Tensor], files: dict[Path, Any]) -> None:
        self.directory, self.tensors, self._files = directory, tensors, files

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files, which letting go of them does; arrays that were read stay valid."""
        self._files.clear()

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or the part of it that `index` selects; the rest is not read.

        The library maps the file, so that a part takes no memory but its own, the page cache and 32 bytes for
        each row where it skips columns.

        Args:
          name: a key of `tensors`.
          index: slices without steps, their bounds None or from 0 to the length; dimensions that are left off
            are whole. None for all of the tensor.

        Returns:
          A C-contiguous, writable array that shares its memory with nothing.

        Raises:
          UserError: an unknown name, an index outside the shape or a type that is not read.
          ValueError: the checkpoint is closed.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f"the nearest is {' or '.join(near)}" if near else f"it has {_few(list(self.tensors))}"
            raise UserError(f"{self.directory}: has no tensor {name}; {hint}")
        file, dtype, shape = self.tensors[name]
        if file not in self._files:
            raise ValueError(f"{self.directory}: read after close")
        stored = self._files[file].get_slice(name)
        if dtype == UNREADABLE:
            raise UserError(
                f"{file}: tensor {name} is stored as {stored.get_dtype()}; convert it to one of {_KNOWN}"
            )
        ranges = _ranges(shape, index or ())
        if ranges is None:
            raise UserError(
                f"{file}: tensor {name} has shape {shape}, which {index} does not fit; give slices without "
                "steps and with bounds from 0 to the length"
            )
        lengths = [stop - start for start, stop in ranges]
        if 0 in lengths:
            return np.empty(lengths, dtype)  # the library refuses a start at the very end
        return stored[tuple(slice(start, stop) for start, stop in ranges)]


def _ranges(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]] | None:
    """Start and stop in each dimension, or None for an index that `read` refuses."""
    if len(index) > len(shape):
        return None
    ranges = [(0, length) for length in shape]
    for axis, cut in enumerate(index):
        start = 0 if cut.start is None else cut.start
        stop = shape[axis] if cut.stop is None else cut.stop
        if cut.step not in (None, 1) or not 0 <= start <= stop <= shape[axis]:
            return None
        ranges[axis] = (start, stop)
    return ranges


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open the weights of a directory that `save_pretrained` or the hub made; no tensor is read yet.

    As in transformers, `model.safetensors` comes before an index, and a tensor in a file of the index counts
    even where the index does not name it. An index that its files contradict and a tensor that is in two
    files are refused, as there is no telling which is right.

    Raises:
      UserError: no such directory, no safetensors in it, a damaged file or index, or two that disagree.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {what}; name a directory that a model was downloaded or saved to")
    tensors: dict[str, Tensor] = {}
    files: dict[Path, Any] = {}
    places = _places(directory)
    for path in sorted({directory / WEIGHTS} if places is None else set(places.values())):
        file = files[path] = _open_file(path)
        for name in file.keys():  # noqa: SIM118 (no dict)
            if name in tensors:
                first = tensors[name].file.name
                raise UserError(f"{directory}: tensor {name} is in {first} and in {path.name}; {_AGAIN}")
            stored = file.get_slice(name)
            dtype = _DTYPES.get(str(stored.get_dtype()), UNREADABLE)
            tensors[name] = Tensor(path, dtype, tuple(stored.get_shape()))
    for name, path in (places or {}).items():
        if name not in tensors or tensors[name].file != path:
            truth = f"{tensors[name].file.name} has it" if name in tensors else "no file has it"
            where = f"is in {path.name}, but {truth}"
            raise UserError(f"{directory / INDEX}: says that tensor {name} {where}; {_AGAIN}")
    return Checkpoint(directory, dict(sorted(tensors.items())), files)


def _open_file(path: Path) -> Any:
    """Map a file and have the library check its header: JSON, whose offsets tile the rest of the file."""
    try:
        return safe_open(str(path), framework="numpy")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, "safetensors", error) from error


def _places(directory: Path) -> dict[str, Path] | None:
    """The file of each tensor according to the index, or None where `model.safetensors` holds them all."""
    path = directory / INDEX
    if (directory / WEIGHTS).is_file():
        return None
    if not path.is_file():
        raise UserError(f"{directory}: {_what_is_there(directory)}")
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, "JSON", error) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    valid = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not weight_map or not valid:
        raise UserError(f"{path}: has no weight_map of tensor names to file names; {_AGAIN}")
    for file in sorted(set(weight_map.values())):
        # By name alone, not by what a link resolves to: the files of a hub snapshot are links to ../../blobs.
        # As Windows reads it, to which both slashes and a drive mean something, so that all systems agree.
        name = PureWindowsPath(file)
        if name.anchor or ".." in name.parts or name.suffix != ".safetensors":
            raise UserError(
                f"{path}: names {file!r}, but only .safetensors files inside the directory are opened; "
                "do not trust this model, or save it again"
            )
        if not (directory / file).is_file():
            raise UserError(f"{path}: names {file}, which is not there; download the missing file")
    return {name: directory / file for name, file in weight_map.items()}


def _what_is_there(directory: Path) -> str:
    """Why a directory has no weights to open, and what to do."""
    names = sorted(path.name for path in directory.iterdir())
    for name in sorted({WEIGHTS, INDEX} & set(names)):  # yet neither is_file()
        return f"{name} is no file, or a link to one that is not there; {_AGAIN}"
    found = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    if "adapter_config.json" in names and all(name.startswith("adapter_") for name in found + pickled):
        return (
            "is an adapter (adapter_config.json) without its model; merge it into its base model first (in "
            "peft: merge_and_unload, then save_pretrained) and name the result"
        )
    if found:
        lacking = f"has {_few(found)}, but neither {WEIGHTS} nor {INDEX}"
        if any(_SHARD.fullmatch(name) for name in found):
            return f"{lacking}; if a download or an export was cut off, run it again"
        return f"{lacking}; rename the file that is the whole model, or download the default variant"
    if pickled:
        return (
            f"has only pickle files ({_few(pickled)}), which are never opened since they can run code; "
            f'convert them in transformers: MODEL.from_pretrained("{directory}").save_pretrained('
            f'"{directory}", safe_serialization=True), MODEL being the class that config.json names under '
            "architectures"
        )
    return f"has neither {WEIGHTS} nor {INDEX}; name a directory that a model was downloaded or saved to"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _damaged(path: Path, kind: str, error: Exception) -> UserError:
    """The line for a file that cannot be read; git without lfs leaves short texts for large files."""
    advice = _AGAIN
    if not isinstance(error, OSError):
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                advice = "it is only a git-lfs pointer: run `git lfs pull` in its directory"
    return UserError(f"{path}: cannot be read as {kind} ({' '.join(str(error).split())}); {advice}")


def write_checkpoint(
    directory: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] = PYTORCH,
) -> list[Path]:
    """Write tensors as transformers' `save_pretrained` does, to the byte.

    They fill shards in the order in which they come; one larger than a shard gets its own. The files get
    their names when all are written, the index last, so that an export killed at any moment is refused by
    `open_checkpoint` and by transformers and can be run again.

    Args:
      directory: made if absent. One process writes to it at a time.
      tensors: pairs of name and array, which may be made one by one: a shard and one tensor are held at most.
      max_shard_bytes: most bytes of tensors in a file.
      metadata: what the header of each file says beside the tensors.

    Returns:
      The files: one `model.safetensors`, or the shards and then the index.

    Raises:
      UserError: the directory has weights already, or is a file.
      OSError: the disk is full or read-only; the unfinished files are removed.
      ValueError: no tensors, a name twice or an array of a type that the format lacks.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; name another directory")
    for name in (WEIGHTS, INDEX):
        if os.path.lexists(directory / name):
            raise UserError(f"{directory}: has {name} already; remove it or name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(TEMPORARY):
        left.unlink()  # of an export that was killed

    shards: list[list[str]] = []
    size = parameters = 0
    try:
        for arrays in _shards(tensors, max_shard_bytes):
            shards.append(list(arrays))
            size += sum(array.nbytes for array in arrays.values())
            parameters += sum(array.size for array in arrays.values())
            write_file(_temporary(directory, len(shards)), arrays, metadata)
            arrays.clear()  # here, or it would be held while the next shard is filled
        if not shards:
            raise ValueError(f"{directory}: no tensors to write")
        if len(shards) == 1:
            return [_temporary(directory, 1).replace(directory / WEIGHTS)]
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_parameters": parameters, "total_size": size},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        _write(_temporary(directory, 0), [(json.dumps(index, indent=2, sort_keys=True) + "\n").encode()])
        names = [*files, INDEX]
        return [
            _temporary(directory, number).replace(directory / name)
            for number, name in zip([*range(1, len(names)), 0], names, strict=True)
        ]
    finally:
        for number in range(len(shards) + 1):
            _temporary(directory, number).unlink(missing_ok=True)  # still there only after a failure


def _temporary(directory: Path, number: int) -> Path:
    """Where a shard, or for 0 the index, is written: hidden, and not named as weights are."""
    return directory / f".model-{number:05d}.tmp"


def _shards(tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    """Tensors grouped as `split_torch_state_dict_into_shards` of huggingface_hub groups them."""
    seen = {"__metadata__"}  # the format's own key
    shard: dict[str, np.ndarray] = {}
    held = 0
    for name, array in tensors:
        if name in seen:
            raise ValueError(f"tensor {name}: the name is taken")
        if array.dtype not in _CODES:
            raise ValueError(f"tensor {name}: {array.dtype} cannot be stored, only {_KNOWN}")
        seen.add(name)
        if array.nbytes > limit:
            yield {name: array}
            continue
        if held + array.nbytes > limit:
            yield shard
            shard, held = {}, 0
        shard[name] = array
        held += array.nbytes
    if shard:
        yield shard


def write_file(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, byte for byte as the library would.

    The library itself orders the metadata anew in each call and tells of a full disk in a text alone.
    Its 0.8 makes files that only their owner may read and, killed, leaves one of a random name; those before
    hold all bytes twice.
    """
    names = sorted(arrays, key=lambda name: ([*_CODES].index(arrays[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        array, offset = arrays[name], end
        end += array.nbytes
        code = _CODES[array.dtype]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    # As uint8, for Python's buffers know no bfloat16; ravel copies, one tensor at a time, only what has gaps.
    parts = (arrays[name].ravel().view(np.uint8).data for name in names)
    _write(path, [struct.pack("<Q", len(text)), text], parts)


def _write(path: Path, *parts: Iterable[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.writelines(part)
        file.flush()
        os.fsync(file.fileno())  # a disk on the network may say only now that it is full
