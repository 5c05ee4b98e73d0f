"""A run's directory: opened, checked to be that of the cell, and held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from vlmscale.config import Cell, cell_id, from_dict, leaves, to_dict
from vlmscale.errors import UserError
from vlmscale.records import CHECKPOINTS, make_directory, read_json, write_json
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.prepared import Prepared, load_manifest


def open_run(cell: Cell, run: Path, data: Path, sweep: str, cohort: str = "") -> None:
    """Make the run directory, or check that it belongs to this cell.

    Args:
      cell: the config.
      run: its directory.
      data: the prepared data, named in spec.json relative to the run.
      sweep: name of the sweep, "" for a single run.
      cohort: id of the cohort that the cell trains in, "" where it trains alone.

    A directory of another config is taken over only while nothing was trained in it; fields that change no
    result follow the newest config.

    Raises:
      UserError: another config was trained there, or it cannot be written.
    """
    make_directory(run)
    spec, own = run / "spec.json", cell_id(cell)
    trained = (run / "done.json").exists() or Checkpoints.any_in(run / CHECKPOINTS)
    if spec.exists() and trained and (known := read_json(spec))["cell_id"] != own:
        raise UserError(
            f"{run}: holds cell {known['cell_id']}, this config is cell {own}"
            f"{_differences(known['config'], cell)}; choose another --out"
        )
    where = os.path.relpath(data.resolve(), run.resolve())
    about = {"cell_id": own, "cohort_id": cohort or own, "sweep": sweep, "data": where}
    config = to_dict(cell)
    for section, name in (("train", "init_from"), ("llm", "checkpoint")):  # what the run reads again later
        if config[section][name]:
            config[section][name] = str(Path(config[section][name]).resolve())
    write_json(spec, about | {"config": config})


def _differences(known: dict[str, Any], wanted: Cell) -> str:
    """The first keys that matter in which two configs differ, for a message."""
    theirs = {name: value for name, value, _ in leaves(from_dict(known))}
    counting = [row for row in leaves(wanted) if row[2].get("changes_result", True)]
    found = [
        f"{name} is {theirs[name]} there and {value} here"
        for name, value, _ in counting
        if theirs[name] != value
    ]
    if not found:
        files = [name for name, value, about in counting if value and (about.keys() & {"content", "mixture"})]
        return f" (what a file holds has changed: {', '.join(files)})"
    return f" ({', '.join(found[:3])})"


@contextmanager
def exclusive(run: Path, wait: bool) -> Iterator[None]:
    """Hold a run's lock until the block or the process ends, however it ends.

    Args:
      run: the run directory.
      wait: wait for whoever holds it, instead of refusing.

    Raises:
      UserError: another process works on the run and `wait` is False.
    """
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{run}: another process is working on this run") from error
        yield


def load_prepared(run: Path) -> tuple[Cell, Prepared]:
    """The config of an opened run and its prepared data.

    Raises:
      UserError: not a run directory, or its data is gone.
    """
    spec = read_json(run / "spec.json")
    data = run / spec["data"]
    return from_dict(spec["config"]), Prepared(data, load_manifest(data))


def keep_programs() -> None:
    """Keep compiled programs on disk, so that a process need not compile again what one before it has.

    Under JAX_COMPILATION_CACHE_DIR where that is set, else in the user's cache directory, apart for every
    kind of CPU: programs of one may not run on another.
    """
    if jax.config.values.get("jax_compilation_cache_dir"):  # the variable is read when jax is imported
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    about = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(about.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(root / "vlmscale" / "programs" / kind))
