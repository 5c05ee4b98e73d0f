"""A sweep's directory as its files alone tell it: cells, cohorts, where each lies. No jax."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.place import SHARED, Place
from vlmscale.errors import UserError
from vlmscale.records import read_json

_FEW = 5  # ids that a message can name


@dataclass(frozen=True)
class Crew:
    """Cells that train together, by their directories, and the directory of all of them."""

    id: str
    folder: Path
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class SweepDirectory:
    """What sweep.json holds.

    Attributes:
      out: the directory.
      name: of the sweep.
      cells: their ids, in order.
      cohorts: ids of cells that train together; empty until the data is prepared.
      place: where others find what is written to the directory.
    """

    out: Path
    name: str
    cells: list[str]
    cohorts: list[list[str]]
    place: Place = SHARED

    def again(self) -> SweepDirectory:
        """The same as it is now.

        Raises:
          UserError: as `read_sweep`.
        """
        self.place.again()
        return read_sweep(self.out, self.place)

    def run(self, cell: str) -> Path:
        """Directory of a cell."""
        return self.out / "cells" / cell

    def crews(self) -> list[Crew]:
        """All cohorts.

        Raises:
          UserError: they are not planned yet.
        """
        if not self.cohorts:
            raise UserError(
                f"{self.out}: its cells are not spread over cohorts yet; `vlmscale sweep run` does that once "
                "the data is prepared"
            )
        return [
            Crew(cohort_id(ids), cohort_folder(self.out, ids), tuple(map(self.run, ids)))
            for ids in self.cohorts
        ]

    def crew(self, name: str) -> Crew:
        """The cohort of this id.

        Raises:
          UserError: there is none.
        """
        known = {crew.id: crew for crew in self.crews()}
        if name not in known:
            # Of cohorts of several cells sweep.json has no ids.
            where = "vlmscale sweep run --dry-run"
            raise UserError(f"{self.out}: has no cohort {name}{_nearest(name, list(known), where)}")
        return known[name]

    def crew_of(self, cell: str) -> Crew:
        """The cohort that a cell trains in; before they are planned, itself alone."""
        run = self.run(cell)
        crews = self.crews() if self.cohorts else []
        return next((crew for crew in crews if run in crew.runs), Crew(cell, run, (run,)))

    def chosen(self, cells: Sequence[str]) -> list[str]:
        """These cells in the sweep's order, or all where none is named.

        Raises:
          UserError: one is not of the sweep.
        """
        for name in cells:
            if name not in self.cells:
                raise UserError(
                    f"{self.out}: has no cell {name}{_nearest(name, self.cells, 'vlmscale sweep status')}"
                )
        return [name for name in self.cells if not cells or name in cells]


def read_sweep(out: Path, place: Place = SHARED) -> SweepDirectory:
    """A sweep's directory.

    Args:
      out: it, or the copy of one that lies elsewhere.
      place: where that is.

    Raises:
      UserError: it is none, or sweep.json is damaged.
    """
    absent = f"{out}: is no sweep directory; `vlmscale sweep run SWEEP --out DIR` makes one"
    known = read_json(out / "sweep.json", absent)
    try:
        return SweepDirectory(out, str(known["name"]), list(known["cells"]), list(known["cohorts"]), place)
    except (KeyError, TypeError) as error:
        raise UserError(f"{out / 'sweep.json'}: has no {error}; it is none of a sweep") from error


def cohort_id(cells: Sequence[str]) -> str:
    """Id of the cohort of these cells: of one its own."""
    return cells[0] if len(cells) == 1 else hashlib.sha256(",".join(cells).encode()).hexdigest()[:12]


def cohort_folder(out: Path, cells: Sequence[str]) -> Path:
    """Where a cohort's checkpoints, log and claims lie: of one in the cell's own directory."""
    return out / ("cells" if len(cells) == 1 else "cohorts") / cohort_id(cells)


def _nearest(name: str, known: list[str], where: str) -> str:
    """What there is instead: the nearest, or all if they are few, or else where they are to be seen."""
    if near := difflib.get_close_matches(name, known, 1):
        return f"; the nearest is {near[0]}"
    return f"; it has {', '.join(known)}" if len(known) <= _FEW else f"; {where} shows all {len(known)}"
