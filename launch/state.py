"""The state of a sweep lives in its directory alone: what it is made of, what is finished, its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmscale import __version__
from vlmscale.compressors import label, parse_options
from vlmscale.config import Cell, Sweep, cell_id
from vlmscale.cost.image import Sample, sample_flops
from vlmscale.errors import UserError
from vlmscale.records import Status, make_directory, read_json, read_rows, write_json, write_lines

_TYPICAL = Sample(
    text=96, targets=24, query=12, with_image=1
)  # only the order and the time left depend on it


@dataclass(frozen=True)
class CellDirectory:
    """One cell of a sweep on disk."""

    id: str
    cell: Cell
    path: Path

    @property
    def label(self) -> str:
        """Short name for progress and tables."""
        compressor = self.cell.compressor
        if not compressor.visual_tokens:
            return f"{self.cell.llm.name} blind"
        method = label(compressor.name, parse_options(compressor.name, compressor.options))
        return f"{self.cell.llm.name} {method} V={compressor.visual_tokens}"

    @property
    def finished(self) -> bool:
        """Trained and evaluated."""
        return Status(self.path).read()["state"] == "done"

    @property
    def left_behind(self) -> bool:
        """Its numbers stopped being finite, and the other cells of its cohort went on without it."""
        return Status(self.path).read().get("failed_at") is not None

    @property
    def work(self) -> float:
        """Predicted training FLOPs and start-up, in arbitrary units: for ordering and time left."""
        sample = sample_flops(self.cell, self.cell.data.vocab_size, _TYPICAL)
        return sample * self.cell.train.batch_size * self.cell.train.steps + 3e11


def open_sweep(sweep: Sweep, out: Path) -> list[CellDirectory]:
    """Make the sweep's directory or check that it holds the same cells.

    Raises:
      UserError: another sweep lives there, or it cannot be written.
    """
    make_directory(out / "cells")
    cells = [CellDirectory(cell_id(c), c, out / "cells" / cell_id(c)) for c in sweep.cells]
    path = out / "sweep.json"
    ids = [cell.id for cell in cells]
    known = read_json(path) if path.exists() else {"cells": []}
    if known["cells"] != ids:
        if any((out / "cells" / name / "spec.json").exists() for name in known["cells"]):
            raise UserError(f"{out}: holds sweep {known['name']} with other cells; choose another --out")
        # Cohorts are planned when the data is there.
        write_json(path, {"name": sweep.name, "cells": ids, "cohorts": [], "vlmscale_version": __version__})
    return cells


def steps_done(cell: CellDirectory) -> int:
    """Training steps that a cell has logged so far."""
    path = cell.path / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0  # not begun, or caught while a line is being written


def collect(cells: list[CellDirectory], out: Path) -> Path:
    """All rows of finished cells in results.jsonl, each with a blind score where there is one."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        if cell.finished:
            rows += read_rows(cell.path / "result.jsonl")

    def key(row: dict[str, Any]) -> tuple:
        return row["llm_name"], row["data_mix"], row["seed"], row["task"]

    blind = {key(row): row["score"] for row in rows if row["visual_tokens"] == 0}
    for row in rows:
        if row.get("blind_score") is None:  # else it was asked without its pictures
            row["blind_score"] = blind.get(key(row))
    path, lines = out / "results.jsonl", [json.dumps(row) for row in rows]
    if not path.exists() or path.read_text(encoding="utf-8").splitlines() != lines:
        write_lines(path, lines)  # its time tells whether the report is older
    return path
