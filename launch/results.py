"""The rows of finished cells, of one sweep or of several, as one file. No jax."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.directory import SweepDirectory, read_sweep
from vlmscale.errors import UserError
from vlmscale.records import Status, write_lines

RESULTS = "results.jsonl"
FILES = ("status.json", "result.jsonl")  # of a cell: what is read here


@dataclass
class Collected:
    """What was found: rows, ids of cells that are done and of all, and how many rows were there already."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    cells: set[str] = field(default_factory=set)
    repeated: int = 0


def collect(sweep: SweepDirectory) -> Path:
    """Write all rows of a sweep's finished cells to its results.jsonl, unless it holds just those."""
    path, lines = sweep.out / RESULTS, _lines(gather([sweep.out]).rows)
    if not path.exists() or path.read_text(encoding="utf-8").splitlines() != lines:
        write_lines(path, lines)  # its time tells whether the report is older
    return path


def collect_into(path: Path, outs: Sequence[Path]) -> Collected:
    """Write all rows of finished cells of several sweeps, here or copied here, to one file.

    Raises:
      UserError: as `gather`; or nothing is finished, or the file cannot be written.
    """
    found = gather(outs)
    if not found.rows:
        raise UserError(f"{', '.join(map(str, outs))}: no cell is done yet; nothing is written")
    try:
        write_lines(path, _lines(found.rows))
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror or error}") from error
    return found


def gather(outs: Sequence[Path]) -> Collected:
    """Rows of finished cells, each with a blind score where there is one; the same row counts once.

    Raises:
      UserError: no directory of a sweep, a damaged file, or two directories with different scores for one
        cell and task.
    """
    found = Collected()
    known: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    for out in outs:
        sweep = read_sweep(out)
        found.cells |= set(sweep.cells)
        for name in sweep.cells:
            run = sweep.run(name)
            if Status(run).read()["state"] != "done":
                continue
            found.done.add(name)
            path = run / "result.jsonl"
            for row in _read(path):
                key = (row["cell_id"], row["task"], row["visual_tokens"], row.get("reducer"))
                first, there = known.setdefault(key, (path, row))
                if there is row:
                    found.rows.append(row)
                    continue
                if there["score"] != row["score"] or there.get("n_items") != row.get("n_items"):
                    raise UserError(
                        f"{path}: task {row['task']} has score {row['score']}, in {first} {there['score']}: "
                        "one cell, two results; leave one of the directories out"
                    )
                found.repeated += 1
    _fill_blind(found.rows)
    return found


def _fill_blind(rows: list[dict[str, Any]]) -> None:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["llm_name"], row["data_mix"], row["seed"], row["task"]

    blind = {key(row): row["score"] for row in rows if row["visual_tokens"] == 0}
    for row in rows:
        if row.get("blind_score") is None:  # else it was asked without its pictures
            row["blind_score"] = blind.get(key(row))


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a finished cell."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}, though its cell is done; copy it again"
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            missing = {
                "cell_id",
                "task",
                "visual_tokens",
                "score",
                "llm_name",
                "data_mix",
                "seed",
            } - row.keys()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: no JSON object; copy it again") from error
        if missing:
            raise UserError(f"{path}, line {number}: has no {', '.join(sorted(missing))}")
        rows.append(row)
    return rows


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row) for row in rows]
