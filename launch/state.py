"""The state of a sweep lives in its directory alone: the cells that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmscale import __version__
from vlmscale.compressors import label, parse_options
from vlmscale.config import Cell, Sweep, cell_id, reducer_of
from vlmscale.cost.image import Sample, sample_flops
from vlmscale.errors import UserError
from vlmscale.records import Status, make_directory, read_json, write_json

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
        spec = reducer_of(self.cell)
        inside = f" {spec.label}" if spec is not None else ""
        return f"{self.cell.llm.name} {method} V={compressor.visual_tokens}{inside}"

    @property
    def finished(self) -> bool:
        """Trained and evaluated."""
        return Status(self.path).read()["state"] == "done"

    @property
    def work(self) -> float:
        """Predicted training FLOPs and start-up, in arbitrary units: for ordering and time left."""
        sample = sample_flops(self.cell, self.cell.data.vocab_size, _TYPICAL)
        return sample * self.cell.train.batch_size * self.cell.train.steps + 3e11


def directories(sweep: Sweep, out: Path) -> list[CellDirectory]:
    """The cells of a sweep, where they are or will be."""
    return [CellDirectory(cell_id(c), c, out / "cells" / cell_id(c)) for c in sweep.cells]


def open_sweep(sweep: Sweep, out: Path) -> list[CellDirectory]:
    """Make the sweep's directory or check that it holds the same cells.

    Raises:
      UserError: another sweep lives there, or it cannot be written.
    """
    make_directory(out / "cells")
    cells = directories(sweep, out)
    if not check_sweep(cells, out):
        ids = [cell.id for cell in cells]
        # Cohorts are planned when the data is there.
        about = {"name": sweep.name, "cells": ids, "cohorts": [], "vlmscale_version": __version__}
        write_json(out / "sweep.json", about)
    return cells


def check_sweep(cells: list[CellDirectory], out: Path) -> bool:
    """Whether a directory holds these cells already.

    Raises:
      UserError: others were opened there.
    """
    path = out / "sweep.json"
    if not path.exists():
        return False
    known = read_json(path)
    if known["cells"] == [cell.id for cell in cells]:
        return True
    if any((out / "cells" / name / "spec.json").exists() for name in known["cells"]):
        raise UserError(f"{out}: holds sweep {known['name']} with other cells; choose another --out")
    return False
