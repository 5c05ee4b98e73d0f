"""A launched sweep's directory, given to a bucket: what jobs without a shared disk begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.directory import SweepDirectory, read_sweep
from launch.mirror import below, reached, told
from launch.outcome import held_back, unfinished
from vlmscale.bucket import ABSENT, Bucket, Entry, at_once, md5_of
from vlmscale.errors import UserError
from vlmscale.records import Status, read_json, write_json

_MANIFEST = "data/manifest.json"
_ELSEWHERE = (
    ("llm", "checkpoint"),
    ("train", "init_from"),
    ("evaluate", "data"),
)  # read by jobs where they lie


def upload(local: Path, remote: str, tell: Callable[[str], None] = lambda line: None) -> int:
    """Give a sweep whose data is prepared and whose cohorts are fixed to a bucket.

    The data goes there with data sets that lie elsewhere, of each cell its config, and of cells that are done
    here all but their checkpoints: they count as done. What lies there already is left alone, and so are the
    states of cells that were begun there: it may be done again at any time. Files go first and sweep.json
    last, so that a sweep is whole when it is one.

    Args:
      local: the sweep's directory.
      remote: the address.
      tell: called with what jobs need beside it.

    Returns:
      How many files were sent.

    Raises:
      UserError: no sweep that is ready, another sweep at the address, or a bucket that cannot be written.
    """
    sweep, bucket = read_sweep(local), Bucket(remote)
    sweep.crews()
    with told():
        there = {**bucket.entries("data/"), **bucket.entries(pattern="cells/*/*")}
        known = bucket.look("sweep.json")
        if known is not None:
            _check(sweep, json.loads(bucket.read("sweep.json")), bucket.address)
        manifest, files = _data(local)
        for path in _needed(sweep):
            tell(f"{path}: has to be there on every host of a job")
        for name in sweep.cells:
            files[f"cells/{name}/spec.json"] = sweep.run(name) / "spec.json"
        changed = [name for name, path in files.items() if not _same(path, there.get(name))]
        at_once(lambda name: bucket.upload(name, files[name]), changed)
        added: list[str] = []
        for names in _finished(sweep):
            new = [name for name in names if name not in there]
            added += filter(None, at_once(lambda name: _add(bucket, name, local / name), new))
        if _MANIFEST not in there or bucket.read(_MANIFEST) != manifest:
            bucket.write(_MANIFEST, manifest)
            changed.append(_MANIFEST)
        if known is None:
            added.append(_add(bucket, "sweep.json", local / "sweep.json"))
    return len(changed) + len(added)


def adopt_cohorts(local: Path, remote: str) -> None:
    """Let a sweep's directory have the cohorts of the same sweep in a bucket, where jobs have them fixed.

    So it is where the directory was made anew, or a retry there has parted a cohort. Others that it has
    are left as they are, for `upload` to refuse: a retry here may have parted one.

    Args:
      local: the directory, whose cells are known.
      remote: the address.

    Raises:
      UserError: another sweep is there.
    """
    bucket = Bucket(remote)
    if bucket.look("sweep.json") is None:
        return
    sweep, known = read_sweep(local), json.loads(bucket.read("sweep.json"))
    own = read_json(local / "sweep.json")
    _check(sweep, known | {"cohorts": sweep.cohorts}, bucket.address)
    whole = [set(ids) for ids in sweep.cohorts]
    parted = all(any(some.issuperset(ids) for some in whole) for ids in known["cohorts"])
    if known["cohorts"] != sweep.cohorts and (parted or not whole):
        write_json(local / "sweep.json", own | {"cohorts": known["cohorts"]})


def finished_there(remote: str) -> dict[str, str]:
    """Why cohorts of a sweep in a bucket need no job: done, or failed or cancelled until they are retried.

    Args:
      remote: the address.

    Returns:
      Reasons by the ids of cohorts.
    """
    found = {}
    with reached(remote, ("status.json",)) as sweep:
        for crew in sweep.crews():
            if not unfinished(crew.runs):
                found[crew.id] = "done"
            elif why := held_back(crew.runs):
                found[crew.id] = f"{why}; vlmscale sweep retry {remote}, and kubectl delete jobset of its job"
    return found


def _check(sweep: SweepDirectory, known: dict[str, Any], address: str) -> None:
    for what, ours in (("cells", sweep.cells), ("cohorts", sweep.cohorts)):
        if known.get(what) != ours:
            raise UserError(
                f"{address}: holds sweep {known.get('name')} with other {what} than {sweep.out}; choose "
                "another address"
            )


def _data(local: Path) -> tuple[bytes, dict[str, Path]]:
    """The manifest of the data as it is to be there, and its other files by name."""
    manifest = read_json(local / _MANIFEST)
    files = {path.relative_to(local).as_posix(): path for path in below(local / "data")}
    del files[_MANIFEST]
    data_sets = []
    for place, digest in manifest["data_sets"]:
        folder = Path(place)
        if folder.is_absolute():
            place = f"sets/{digest[:16]}"
            files |= {f"data/{place}/{path.relative_to(folder).as_posix()}": path for path in below(folder)}
        data_sets.append([place, digest])
    text = json.dumps(manifest | {"data_sets": data_sets}, indent=1) + "\n"
    return text.encode(), files


def _needed(sweep: SweepDirectory) -> list[str]:
    """What the cells' configs name by its path and a job reads from there."""
    found: dict[str, None] = {}
    for name in sweep.cells:
        config = read_json(sweep.run(name) / "spec.json")["config"]
        for section, key in _ELSEWHERE:
            if config.get(section, {}).get(key):
                found[f"{section}.{key}={config[section][key]}"] = None
    return list(found)


def _finished(sweep: SweepDirectory) -> tuple[list[str], list[str]]:
    """Names of the files of cells that are done, and of those that say so, which come behind them."""
    done = [run for cell in sweep.cells if Status(run := sweep.run(cell)).read()["state"] == "done"]
    names = [path.relative_to(sweep.out).as_posix() for run in done for path in below(run)]
    states = [name for name in names if name.endswith("/status.json")]
    return [name for name in names if not name.endswith(("/status.json", "/spec.json"))], states


def _same(path: Path, there: Entry | None) -> bool:
    """Whether an object holds what a file does."""
    return there is not None and there.size == path.stat().st_size and there.checksums[1] == md5_of(path)


def _add(bucket: Bucket, name: str, path: Path) -> str:
    """Write an object unless there is one; its name where it was written."""
    try:
        bucket.write(name, path.read_bytes(), ABSENT)
    except FileExistsError:
        return ""
    return name
