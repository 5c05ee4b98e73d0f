"""Plans of cells on slices: what fits, how long it takes and what it costs, as rows and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmscale.config import Cell, reducer_of
from vlmscale.errors import UserError
from vlmscale.plan.ask import Answers
from vlmscale.plan.fit import Ask, Fit, Part, find_fit, lengths_of, why_no_mesh
from vlmscale.plan.roofline import Efficiencies, step_time, tower_time
from vlmscale.plan.slices import GENERATIONS, Slice, find_slice
from vlmscale.plan.totals import Totals, totals
from vlmscale.records import read_json
from vlmscale.train.recipe import trained_parts

_GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """A cell on a slice.

    Attributes:
      cell: its label.
      topology: name of the slice.
      mesh: data, fsdp, tensor; None where no mesh can hold the batch.
      changes: what of the config had to change.
      used_gib, limit_gib: of a device, in the program that takes most; at the nearest mesh where none fits.
      programs: of each, the same, its mesh and who says so.
      fits: whether all do.
      step_s, bound: predicted seconds of a step and what bounds it; without the tower.
      tower_s: of a step's pictures in a frozen tower.
      hours, chip_hours: of all steps, the tower in each where `data.features` is computed.
      price: in the price file's money; None without one.
      reason: why there is no mesh; "" where there is.
    """

    cell: str
    topology: str
    mesh: tuple[int, int, int] | None
    changes: tuple[str, ...]
    used_gib: float
    limit_gib: float
    programs: dict[str, dict[str, Any]]
    fits: bool
    step_s: float | None = None
    bound: str = ""
    tower_s: float | None = None
    hours: float | None = None
    chip_hours: float | None = None
    price: float | None = None
    reason: str = ""


def read_prices(path: Path) -> dict[str, float]:
    """Money a chip and hour by generation, such as {"v5e": 1.2}.

    Raises:
      UserError: the file cannot be read, or a price is no number above 0.
    """
    prices = read_json(path)
    if not isinstance(prices, dict):
        raise UserError(f'{path}: must be an object such as {{"v5e": 1.2}}')
    for name, price in prices.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < math.inf:
            raise UserError(f"{path}: {name}={price!r}: must be money a chip and hour, above 0")
        if name not in GENERATIONS:
            raise UserError(f"{path}: {name}: no such device; there are {', '.join(GENERATIONS)}")
    return {name: float(price) for name, price in prices.items()}


def label(cell: Cell) -> str:
    """A cell among those of a sweep."""
    compressor = cell.compressor
    method = f"{compressor.name} {compressor.visual_tokens}" if compressor.visual_tokens else "blind"
    spec = reducer_of(cell)
    method += f" {spec.label}" if spec is not None else ""
    return f"{cell.llm.name} {method} ({'+'.join(sorted(trained_parts(cell)))})"


def plan(
    cells: Sequence[Cell],
    topologies: Sequence[str],
    answers: Answers,
    prices: dict[str, float],
    progress: Callable[[int, int], None],
    text_tokens: int | None = None,
    workers: int = 1,
    calibration: dict[str, Efficiencies] | None = None,
) -> tuple[list[Planned], list[Totals]]:
    """Plan cells on slices.

    Args:
      cells: what is planned.
      topologies: names of slices.
      answers: who says what a program takes.
      prices: money a chip and hour by generation.
      progress: called with (plans, plans in all).
      text_tokens: as in `lengths_of`.
      workers: programs that are asked about at a time.
      calibration: efficiencies by the kind of device, where they were measured.

    Returns:
      A row for each cell and slice, and what all cells take on each slice.

    Raises:
      UserError: an unknown slice, or no TPU compiler.
    """
    slices = list({place.name: place for place in map(find_slice, topologies)}.values())
    shares = {place.name: (calibration or {}).get(place.generation.device.kind) for place in slices}
    jobs = [(number, cell, place) for number, cell in enumerate(cells) for place in slices]

    def one(number: int, cell: Cell, place: Slice) -> Fit | None:
        told: Ask = lambda request: answers(number, request)  # noqa: E731
        return find_fit(cell, place, lengths_of(cell, text_tokens), told, shares=shares[place.name])

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, *job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    fits = [future.result() for future in futures]
    rows = [
        row_of(cell, place, fit, prices, shares[place.name])
        for (_, cell, place), fit in zip(jobs, fits, strict=True)
    ]
    of_slice = []
    for place in slices:
        here = [(cell, fit) for (_, cell, where), fit in zip(jobs, fits, strict=True) if where == place]
        of_slice.append(totals(here, place, shares[place.name]))
    return rows, of_slice


def row_of(
    cell: Cell, place: Slice, fit: Fit | None, prices: dict[str, float], shares: Efficiencies | None
) -> Planned:
    """The row of a cell on a slice.

    Args:
      cell: it.
      place: the slice.
      fit: of `find_fit` on it.
      prices: as in `plan`.
      shares: efficiencies; None for those that are assumed.
    """
    if fit is None:
        return Planned(
            label(cell), place.name, None, (), 0.0, 0.0, {}, False, reason=why_no_mesh(cell, place)
        )
    train, largest = fit.train, fit.largest
    head = Planned(
        label(cell),
        place.name,
        train.request.mesh,
        fit.changes,
        largest.used / _GIB,
        largest.told.limit / _GIB,
        {name: _program(part) for name, part in fit.parts.items()},
        fit.fits,
    )
    if not fit.fits:
        return head
    request = train.request
    time = step_time(request.cell, place, request.mesh, request.length, train.told.needed, shares)
    tower = tower_time(request.cell, place, shares) if "tower" in fit.parts else 0.0
    seconds = time.seconds + (tower if cell.data.features == "computed" else 0.0)
    hours = seconds * cell.train.steps / 3600
    chips = hours * place.chips
    price = prices.get(place.kind)
    return Planned(
        **vars(head)
        | {
            "step_s": time.seconds,
            "bound": time.bound,
            "tower_s": tower,
            "hours": hours,
            "chip_hours": chips,
            "price": None if price is None else chips * price,
        }
    )


def _program(part: Part) -> dict[str, Any]:
    told = part.told
    return {
        "used_gib": part.used / _GIB,
        "limit_gib": told.limit / _GIB,
        "beside_gib": part.beside / _GIB,
        "mesh": part.request.mesh,
        "length": part.request.length,
        "by": told.by,
        "compile_s": told.seconds,
    }


def show(rows: Sequence[Planned], sums: Sequence[Totals], check: str) -> str:
    """The table for people; what arithmetic alone says of memory is marked with a ~."""
    width = max(len(row.cell) for row in rows)
    lines = [
        f"{'cell':{width}} {'slice':9} {'mesh':9} {'GiB':>12} {'step s':>7} {'bound':>8} {'tower s':>7} "
        f"{'hours':>7} {'chip-hours':>10} {'price':>9}"
    ]
    lines += [_line(row, width) for row in rows]
    if len(rows) > len(sums):
        lines += ["", *map(_sum, sums)]
    return "\n".join([*lines, check] if check else lines)


def why_not(row: Planned) -> str:
    """Why a cell cannot be trained or answer on a slice; "" where it can."""
    if row.mesh is None:
        return row.reason
    over = [name for name, part in row.programs.items() if part["used_gib"] > part["limit_gib"]]
    if not over:
        return ""
    return f"does not fit: {row.used_gib - row.limit_gib:.2f} GiB too much ({', '.join(over)})"


def _line(row: Planned, width: int) -> str:
    head = f"{row.cell:{width}} {row.topology:9}"
    if row.mesh is None:
        return f"{head} {row.reason}"
    guessed = any(part["by"] != "compiler" for part in row.programs.values())
    memory = f"{'~' * guessed}{row.used_gib:.2f}/{row.limit_gib:.2f}"
    head += f" {'x'.join(map(str, row.mesh)):9} {memory:>12}"
    words = " ".join(row.changes)
    if not row.fits:
        return f"{head} {why_not(row)} {words}".rstrip()
    price = "" if row.price is None else f"{row.price:.2f}"
    return (
        f"{head} {row.step_s:7.3f} {row.bound:>8} {row.tower_s:7.3f} {row.hours:7.2f} "
        f"{row.chip_hours:10.1f} {price:>9} {words}".rstrip()
    )


def _sum(sums: Totals) -> str:
    return (
        f"{sums.topology}: {sums.cells} cells, {sums.apart:.0f} chip-hours as separate runs, "
        f"{sums.towers:.0f} of them in towers; {sums.together:.0f} in {sums.cohorts} cohorts; "
        f"{sums.stored:.0f} with the towers' outputs stored once, {sums.store_tib:.2f} TiB"
    )


def to_json(rows: Sequence[Planned], sums: Sequence[Totals], answers: Answers) -> str:
    """One object."""
    found = {"plans": list(map(vars, rows)), "totals": list(map(vars, sums)), "errors": answers.errors}
    return json.dumps(found)
