"""What every launch does first: the data is prepared, cohorts are fixed, and cells have their directories."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch.claims import LIFE_S, FileClaims, describe, holder, take
from launch.outcome import CLAIMS
from launch.work import end

if TYPE_CHECKING:
    from launch.cohorts import Cohort
    from launch.state import CellDirectory

_WAIT_S = 0.5


def open_cohorts(
    name: str,
    cells: Sequence[CellDirectory],
    out: Path,
    workers: int,
    memory: float | None,
    progress: Callable[[str, int, int], None],
    tell: Callable[[str], None],
) -> list[Cohort]:
    """Prepare the data, fix which cells train together, and open their directories.

    Args:
      name: of the sweep.
      cells: of it.
      out: its directory.
      workers: cohorts that will run at a time.
      memory: bytes that one may take; None for a share of this machine's.
      progress: called with (text, done, total).
      tell: called with what is to be known.

    Raises:
      UserError: no usable data, or directories that hold something else.
    """
    import jax

    from launch.changes import forgive_failed
    from launch.cohorts import fix_cohorts
    from launch.directory import read_sweep
    from vlmscale.train.prepared import prepare
    from vlmscale.train.run import open_run

    jax.config.update("jax_platforms", "cpu")  # this process must not hold the devices that its workers need
    with turn(out, tell):
        prepared = prepare([cell.cell for cell in cells], out / "data", progress, tell)
        print(prepared.manifest["summary"], file=sys.stderr)
        cohorts = fix_cohorts(list(cells), out, prepared, workers, memory)
        for cohort in cohorts:
            for cell in cohort.cells:
                open_run(cell.cell, cell.path, prepared.path, name, cohort.id)
    forgive_failed(read_sweep(out).crews())
    return cohorts


@contextmanager
def turn(out: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """One launcher at a time: to prepare the data, submit, or write the report. The others wait."""
    store, said = FileClaims(out / CLAIMS), False
    while (claim := take(store)) is None:
        if not said:
            said = True
            tell(f"{out}: {describe(holder(store) or {})} prepares or reports it; waiting")
        time.sleep(_WAIT_S)
    try:
        with claim.kept(LIFE_S, end, lambda: None):
            yield
    finally:
        claim.release()
