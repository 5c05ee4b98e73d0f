"""Plans of cells on slices: what fits, how long it takes and what it costs, as rows and as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmscale.config import Cell
from vlmscale.errors import UserError
from vlmscale.plan.compiled import compile_request
from vlmscale.plan.fit import Fit, find_fit
from vlmscale.plan.roofline import step_time
from vlmscale.plan.slices import Slice, find_slice
from vlmscale.records import read_json

_GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """A cell on a slice.

    Attributes:
      cell: its label.
      topology: name of the slice.
      mesh: data, fsdp, tensor; None where no mesh can hold the batch.
      changes: what of the config had to change.
      used_gib, limit_gib: of a device, by the compiler; at the last mesh that was tried where none fits.
      fits: whether it does.
      step_s, bound: predicted seconds of a step and what bounds it.
      hours, chip_hours: of all steps.
      price: in the price file's money; None without one.
    """

    cell: str
    topology: str
    mesh: tuple[int, int, int] | None
    changes: tuple[str, ...]
    used_gib: float
    limit_gib: float
    fits: bool
    step_s: float | None
    bound: str
    hours: float | None
    chip_hours: float | None
    price: float | None


def read_prices(path: Path) -> dict[str, float]:
    """Money a chip and hour by generation, such as {"v5e": 1.2}.

    Raises:
      UserError: the file cannot be read, or a price is no number above 0.
    """
    prices = read_json(path)
    if not isinstance(prices, dict):
        raise UserError(f'{path}: must be an object such as {{"v5e": 1.2}}')
    for name, price in prices.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or price <= 0:
            raise UserError(f"{path}: {name}={price!r}: must be money a chip and hour, above 0")
    return {name: float(price) for name, price in prices.items()}


def row_length_of(cell: Cell) -> int:
    """Positions of a row: as the config says, else the longest text with one picture, to the next 128."""
    if cell.data.row_length:
        return cell.data.row_length
    return -(-(cell.data.max_text_tokens + cell.compressor.visual_tokens) // 128) * 128


def plan(
    cells: Sequence[tuple[str, Cell]],
    topologies: Sequence[str],
    cache: Path,
    prices: dict[str, float],
    progress: Callable[[int, int], None],
) -> list[Planned]:
    """Plan cells on slices.

    Args:
      cells: with their labels.
      topologies: names of slices.
      cache: directory of what was compiled before.
      prices: money a chip and hour by generation.
      progress: called with (plans, plans in all).

    Raises:
      UserError: an unknown slice, or no TPU compiler.
    """
    slices, rows = [find_slice(name) for name in topologies], []
    for label, cell in cells:
        for place in slices:
            length = row_length_of(cell)
            fit = find_fit(cell, place, length, lambda request: compile_request(request, cache))
            rows.append(_row(label, cell, place, length, fit, prices))
            progress(len(rows), len(cells) * len(slices))
    return rows


def _row(
    label: str, cell: Cell, place: Slice, length: int, fit: Fit | None, prices: dict[str, float]
) -> Planned:
    if fit is None:
        return Planned(label, place.name, None, (), 0.0, 0.0, False, None, "", None, None, None)
    found, request = fit.compiled, fit.request
    nothing = (None, "", None, None, None)
    head = (label, place.name, request.mesh, fit.changes, found.needed / _GIB, found.limit / _GIB, fit.fits)
    if not fit.fits:
        return Planned(*head, *nothing)
    time = step_time(request.cell, place, request.mesh, length, found.needed)
    hours = time.seconds * cell.train.steps / 3600
    chips = hours * place.chips
    price = prices.get(place.name.rpartition("-")[0])
    return Planned(*head, time.seconds, time.bound, hours, chips, None if price is None else chips * price)


def show(rows: Sequence[Planned]) -> str:
    """The table for people."""
    lines = [
        f"{'cell':40} {'slice':10} {'data x fsdp x tensor':20} {'GiB':>13} {'step s':>8} {'bound':>9} "
        f"{'hours':>8} {'chip-hours':>10} {'price':>10}"
    ]
    for row in rows:
        mesh = "x".join(map(str, row.mesh)) if row.mesh else "batch does not divide"
        memory = f"{row.used_gib:.2f}/{row.limit_gib:.2f}" if row.mesh else ""
        words = " ".join(row.changes)
        if not row.fits:
            over = f"does not fit: {row.used_gib - row.limit_gib:.2f} GiB too much" if row.mesh else ""
            lines.append(f"{row.cell:40} {row.topology:10} {mesh:20} {memory:>13} {over} {words}".rstrip())
            continue
        price = "" if row.price is None else f"{row.price:.2f}"
        lines.append(
            f"{row.cell:40} {row.topology:10} {mesh:20} {memory:>13} {row.step_s:8.3f} {row.bound:>9} "
            f"{row.hours:8.2f} {row.chip_hours:10.1f} {price:>10} {words}".rstrip()
        )
    return "\n".join(lines)


def to_json(rows: Sequence[Planned]) -> str:
    """One object."""
    found: list[dict[str, Any]] = [vars(row) for row in rows]
    return json.dumps({"plans": found})
