"""Configs from files: `get_config(arg)`, `get_sweep(overrides)`, `get_data(arg)`, with overrides.

A config file is Python. It is loaded through ml_collections, so `--config FILE[:ARG] --config.train.steps=10`
works from any command.
"""

from __future__ import annotations

import copy
import difflib
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_flags

from vlmscale.config import Cell, DataConfig, Sweep, cell_id, leaves, to_dict, trains_reducer
from vlmscale.errors import UserError
from vlmscale.validation import validate

T = TypeVar("T")


def load_cell(spec: str, overrides: Sequence[str]) -> Cell:
    """Read `FILE[:ARG]` and apply overrides such as `--config.train.steps=10`.

    Args:
      spec: path of a config file, looked up in the working directory and then among the shipped ones.
      overrides: command-line words, each `--config.KEY=VALUE`.

    Returns:
      A validated cell.

    Raises:
      UserError: file missing or faulty, unknown key (the nearest is named), wrong type, bad combination.
    """
    path, separator, argument = spec.partition(":")
    for word in overrides:
        _check_override(word)
    values = flags.FlagValues()
    argv = ["vlmscale", f"--config={find_config(path)}{separator}{argument}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    # ml_collections loads every config file under this one module name: without this a file that lacks
    # get_config would silently get that of the file before.
    sys.modules.pop("config_config", None)
    try:
        values(argv)
        cell = values["config"].value
    except flags.IllegalFlagValueError as error:
        lines = str(error).strip().splitlines()  # from get_config: a whole traceback, the reason last
        where = "wrong type or value" if len(lines) == 1 else path
        raise UserError(f"{where}: {lines[-1].strip()}") from error
    except UserError:
        raise
    except Exception as error:  # a config file is a program of the user's: it may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(cell, Cell):
        raise UserError(f"{path}: get_config must return a vlmscale.config.Cell, not {type(cell).__name__}")
    validate(cell)
    _check_untouched(cell)
    return cell


def override(cell: Cell, overrides: Sequence[str], parts: Sequence[str]) -> Cell:
    """A trained cell with other values of what training did not read.

    Args:
      cell: of a run; stays as it is.
      overrides: command-line words, each `--config.KEY=VALUE`.
      parts: of the config that may change.

    Raises:
      UserError: a key that is unknown or of another part, or a value of a wrong type.
    """
    if not overrides:
        return cell
    for word in overrides:
        _check_override(word)
        key = word.removeprefix("--config.").partition("=")[0]
        if key.partition(".")[0] not in parts:
            allowed = ", ".join(f"--config.{part}.*" for part in parts)
            raise UserError(f"{word}: the run was trained with another; here only {allowed} may change")
    values, argv = flags.FlagValues(), ["vlmscale", *overrides]
    config_flags.DEFINE_config_dataclass("config", copy.deepcopy(cell), flag_values=values, sys_argv=argv)
    try:
        values(argv)
        made: Cell = values["config"].value
    except (flags.IllegalFlagValueError, TypeError, ValueError) as error:
        raise UserError(f"wrong type or value: {str(error).strip().splitlines()[-1]}") from error
    validate(made)
    return made


def find_config(path: str) -> Path:
    """The file itself, or the shipped one of the same name under `configs/`."""
    given = Path(path)
    if given.is_file():
        return given
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    for root in config_roots():
        if (root / relative).is_file():
            return root / relative
    raise UserError(f"config {path}: no such file, and none of that name ships with vlmscale")


def config_roots() -> Iterator[Path]:
    """Where shipped configs lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    yield from (root for root in (package / "configs", package.parent / "configs") if root.is_dir())


def _check_override(word: str) -> None:
    key, equals, _ = word.partition("=")
    if not key.startswith("--config.") or not equals:
        raise UserError(f"{word}: an override reads --config.KEY=VALUE")
    key = key.removeprefix("--config.")
    known = [name for name, _, _ in leaves(Cell())]
    if key not in known:
        near = [name for name in known if name.endswith(f".{key}")]  # only its part is missing
        near += difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise UserError(f"unknown config key {key}; the nearest is {near[0]}")


def _check_untouched(cell: Cell) -> None:
    """Refuse a reducer where a model is trained that takes no notice of it."""
    if cell.reducer.name != "none" and not trains_reducer(cell):
        raise UserError(
            f"reducer.name={cell.reducer.name}: is asked of a trained run; vlmscale evaluate --run RUN "
            f"--config.reducer.name={cell.reducer.name}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def load_data(spec: str) -> DataConfig:
    """The data of a file with `get_data(arg)`, such as `configs/data/llava_instruct.py:DIR`.

    Args:
      spec: FILE[:ARG], the file looked up as those of `load_cell` are.

    Raises:
      UserError: the file is missing or faulty.
    """
    path, _, argument = spec.partition(":")
    return _run_file(path, "a data definition", "get_data(arg)", (argument,), DataConfig)


def load_sweep(spec: str, overrides: Sequence[str], *, planned: bool = False) -> Sweep:
    """Read a sweep file: Python with `get_sweep(overrides) -> Sweep`.

    Args:
      spec: FILE, or FILE:ARG where its `get_sweep(overrides, arg)` takes one.
      overrides: words `--config.KEY=VALUE`.
      planned: nothing will run, so that files which the cells name need not be there.

    Raises:
      UserError: file missing or faulty, no cells, or the same cell twice.
    """
    path, _, argument = spec.partition(":")
    given = (overrides, argument) if argument else (overrides,)
    sweep = _run_file(path, "a sweep file", "get_sweep(overrides)", given, Sweep)
    for cell in sweep.cells:
        validate(cell)
        _check_untouched(cell)
    ids = [json.dumps(to_dict(cell)) if planned else cell_id(cell) for cell in sweep.cells]
    if not ids or len(set(ids)) < len(ids):
        raise UserError(f"{spec}: has {len(ids)} cells, {len(set(ids))} of them distinct")
    return sweep


def _run_file(path: str, what: str, signature: str, arguments: tuple[Any, ...], kind: type[T]) -> T:
    """What the function of a config file returns: it is a program of the user's, and may raise anything."""
    found, name = find_config(path), signature.partition("(")[0]
    try:
        scope = runpy.run_path(str(found))
        if name not in scope:
            raise UserError(f"{path}: {what} defines {signature}")
        made = scope[name](*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(made, kind):
        raise UserError(
            f"{path}: {name} must return a vlmscale.config.{kind.__name__}, not {type(made).__name__}"
        )
    return made
