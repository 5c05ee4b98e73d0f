"""Parameter trees as flat, named arrays: safetensors files and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vlmscale.errors import UserError
from vlmscale.weights.checkpoint import write_file

Tree = Mapping[str, Any]


def flatten(params: Tree) -> dict[str, np.ndarray]:
    """Parameters by path, such as `decoder/layers/q/weight`, on the host."""
    return {path: _on_host(leaf) for path, leaf in flatten_dict(dict(params), sep="/").items()}


def _on_host(leaf: Any) -> np.ndarray:
    """A whole array, also where other processes hold parts of it: they call this too, in the same order."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jax.device_get(leaf))


def save(path: Path, params: Tree, metadata: dict[str, str]) -> None:
    """Write a safetensors file; its bytes depend on nothing but the arguments."""
    write_file(path, dict(sorted(flatten(params).items())), metadata)


def load(path: Path) -> dict[str, Any]:
    """Read a safetensors file back into a nested dict.

    Raises:
      UserError: the file is absent, truncated or no safetensors file.
    """
    try:
        return unflatten_dict(load_file(str(path)), sep="/")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error


def check_shapes(path: Path, params: Tree, abstract: Tree) -> None:
    """Refuse a file whose parameters are not those of the model.

    Raises:
      UserError: naming the first missing, unknown or misshapen parameter.
    """
    have = {name: array.shape for name, array in flatten_dict(dict(params), sep="/").items()}
    want = {name: leaf.shape for name, leaf in flatten_dict(dict(abstract), sep="/").items()}
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            raise UserError(f"{path}: parameter {name} is missing")
        if name not in want:
            raise UserError(f"{path}: parameter {name} is unknown to the model")
        if have[name] != want[name]:
            raise UserError(f"{path}: parameter {name} has shape {have[name]}, the model wants {want[name]}")


def sha256(params: Tree) -> str:
    """Hash of path, dtype, shape and bytes of every parameter in sorted path order."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten_dict(dict(params), sep="/").items()):
        array = _on_host(leaf)  # one at a time: a large model may not fit
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def count(params: Tree) -> int:
    """Number of parameters; works on abstract trees too."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
