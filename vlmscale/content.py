"""Hashes of what files and directories hold: results depend on contents, not on paths."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from vlmscale.errors import UserError

_RACY_NS = 2_000_000_000  # nanoseconds; more than a tick of any file system's clock
_digests: dict[tuple[int, ...], str] = {}  # of files by what the system says of them


def content_sha256(name: str, path: Path, directory: bool) -> str:
    """Hash of what a field's path holds; a large file is read once in the life of the process.

    Args:
      name: of the field, for messages.
      path: of a file, or of a directory in Hugging Face layout, whose config.json and safetensors files count
        in the order of their names; other files and the names themselves do not.
      directory: whether it may be a directory.

    Raises:
      UserError: it cannot be read, or a directory has no config.json.
    """
    try:
        if not directory or not path.is_dir():
            return _file_sha256(path)
        config = path / "config.json"
        if not config.is_file():
            raise UserError(
                f"{name}={path}: has no config.json; name a directory that a model was downloaded or saved to"
            )
        files = [config, *sorted(path.glob("*.safetensors"))]
        return hashlib.sha256("".join(map(_file_sha256, files)).encode()).hexdigest()
    except FileNotFoundError as error:
        hint = f"download it, or name another with --config.{name}"
        raise UserError(f"{name}={path}: {error.strerror}; {hint}") from None
    except OSError as error:
        raise UserError(f"{name}={path}: {error.strerror or error}") from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        stamp = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if stamp in _digests:
            return _digests[stamp]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file may change again within one tick of its clock, and no stamp would show it: only what has rested
    # for a while is remembered.
    if time.time_ns() - about.st_mtime_ns > _RACY_NS:
        _digests[stamp] = digest
    return digest


def manifest_sha256(name: str, directory: Path) -> str:
    """The content of a prepared data set, as its manifest states it."""
    try:
        return str(json.loads((directory / "manifest.json").read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{name}={directory}: is no finished data set; make one with `vlmscale data prepare`"
        ) from None


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokenizer_sha256(name: str, directory: Path) -> str:
    """Hash of all files of a directory that a tokenizer is made of.

    Raises:
      UserError: there is no tokenizer.json; `name` is that of the field.
    """
    if not (directory / TOKENIZER_FILES[0]).is_file():
        raise UserError(f"{name}={directory}: has no {TOKENIZER_FILES[0]}")
    there = [file for file in TOKENIZER_FILES if (directory / file).is_file()]
    parts = [f"{file} {content_sha256(name, directory / file, False)}" for file in there]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def earlier_cell(name: str, run: Path) -> str:
    """Id of the cell that a run holds, trained or not: what it will be trained to follows from that.

    Raises:
      UserError: it is no run; `name` is that of the field.
    """
    try:
        return str(json.loads((run / "spec.json").read_bytes())["cell_id"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{name}={run}: is no run (no spec.json); train it first") from None


def check_trained(name: str, run: Path) -> None:
    """Refuse a run that another is to start from before it is trained to its end.

    Raises:
      UserError: it is not; `name` is that of the field.
    """
    if not (run / "done.json").exists():
        raise UserError(f"{name}={run}: is no run that was trained to its end (no done.json); train it first")
