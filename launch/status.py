"""Where a sweep stands, read from its cells' directories alone: without jax, so that it is quick."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.claims import describe, holder
from launch.directory import SweepDirectory, cohort_folder
from launch.outcome import CANCELLED
from launch.place import Place
from vlmscale.records import Status, read_json

FILES, TAILS = ("status.json", "spec.json"), ("metrics.jsonl",)  # of a cell: what is read here
TAIL = 4096  # bytes at the end of metrics.jsonl that are read
_LOST = "its process has gone; run the sweep again"
_EVERY_S = 5.0


def steps_done(run: Path) -> int:
    """Training steps that a cell has logged so far."""
    return int(_newest(run)[0])


def cell_rows(sweep: SweepDirectory) -> list[dict[str, Any]]:
    """What is known of each cell.

    Returns:
      Dicts of cell_id, cell (a short name), state, step, steps, attempts, last_error, seconds_left (of
      training, by the step times that it logged; else None) and holder (who works on it, else None).

    Raises:
      UserError: a damaged file.
    """
    cohorts = {name: cohort_folder(sweep.out, ids) for ids in sweep.cohorts for name in ids}
    folders = {name: cohorts.get(name, sweep.run(name)) for name in sweep.cells}
    states = {name: Status(sweep.run(name)).read() for name in sweep.cells}
    held = list(dict.fromkeys(folders[name] for name in states if states[name]["state"] == "running"))
    found = sweep.place.each(lambda folder: _holder(sweep.place, folder), held)
    holders = dict(zip(held, found, strict=True))
    return [_row(sweep.run(name), states[name], holders.get(folders[name])) for name in sweep.cells]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for a terminal, with the sums below."""
    width = max((len(row["cell"]) for row in rows), default=0)
    lines = []
    for row in rows:
        left = "" if row["seconds_left"] is None else f"{duration(row['seconds_left'])} left"
        said = row["last_error"] or row["holder"] or ""
        lines.append(
            f"{row['cell_id']}  {row['cell']:{width}} {row['state']:9} {row['step']:>6}/{row['steps']:<6} "
            f"attempts {row['attempts']}  {left:14}  {said}".rstrip()
        )
    states = Counter(row["state"] for row in rows)
    lines.append(
        f"{len(rows)} cells: {', '.join(f'{count} {state}' for state, count in states.most_common())}"
    )
    seconds = [row["seconds_left"] for row in rows if row["seconds_left"] is not None]
    if seconds:
        lines.append(f"those that are running train for about {duration(max(seconds))} more")
    return "\n".join(lines)


def watch(read: Callable[[], list[dict[str, Any]]]) -> None:
    """Show the table again and again until no cell is pending, running or preempted."""
    while True:
        rows = read()
        clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
        print(clear + table(rows), flush=True)
        if all(row["state"] in ("done", "failed", CANCELLED) for row in rows):
            return
        time.sleep(_EVERY_S)


def duration(seconds: float) -> str:
    """Such as `2 h 05 min`, `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _row(run: Path, status: dict[str, Any], holder: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"cell_id": run.name, "cell": "", "step": 0, "steps": 0}
    row |= {"seconds_left": None, "holder": None}
    row |= {name: status[name] for name in ("state", "attempts", "last_error")}
    spec = run / "spec.json"
    if spec.exists():
        config = read_json(spec)["config"]
        step, step_s = _newest(run)
        row |= {"cell": _name(config), "step": step, "steps": config["train"]["steps"]}
        if status["state"] == "running" and step_s is not None:
            row["seconds_left"] = step_s * max(0, row["steps"] - step)
    if status["state"] == "running":
        row["holder"] = holder
        if holder is None:
            row |= {"last_error": row["last_error"] or _LOST, "seconds_left": None}
    return row


def _holder(place: Place, folder: Path) -> str | None:
    store = place.claims(folder)
    try:
        found = holder(store)
    except OSError:  # a disk that may not be written has no clock to ask
        found = store.read(store.last()) if store.last() else None
    return None if found is None else describe(found)


def _name(config: dict[str, Any]) -> str:
    llm, compressor = config["llm"]["name"], config["compressor"]
    if not compressor["visual_tokens"]:
        return f"{llm} blind"
    options = f":{compressor['options']}" if compressor["options"] else ""
    reducer = config.get("reducer", {"name": "none"})
    inside = "" if reducer["name"] == "none" else f" {reducer['name']}"
    inside += f":{reducer['options']}" if inside and reducer["options"] else ""
    return f"{llm} {compressor['name']}{options} V={compressor['visual_tokens']}{inside}"


def _newest(run: Path) -> tuple[int, float | None]:
    """The last logged step and the last logged seconds a step; 0 and None where there are none."""
    path = run / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    step = 0
    for line in reversed(lines):
        try:
            values = json.loads(line)
            step = step or int(values["step"])
        except (ValueError, KeyError, TypeError):
            continue  # caught while it is being written, or cut by where the tail begins
        if "step_s" in values:
            return step, float(values["step_s"])
    return step, None
