"""What the cells of a sweep will take on a slice, before they are launched: arithmetic, nothing is compiled.

`vlmscale plan` says the same in more detail and asks the TPU compiler. Compilation, evaluation, checkpoints
and restarts are left out of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launch.state import CellDirectory
from vlmscale.config import Cell
from vlmscale.errors import UserError
from vlmscale.loading import override
from vlmscale.plan.fit import ANSWERS, find_fit, lengths_of
from vlmscale.plan.memory import predict
from vlmscale.plan.roofline import Efficiencies
from vlmscale.plan.slices import Slice, joined
from vlmscale.plan.table import row_of, why_not


@dataclass(frozen=True)
class Predicted:
    """A cell on a slice, or on several that one job spans.

    Attributes:
      id: of the cell.
      label: its short name.
      topology: of what it runs on, such as v5e-256 or 2xv5e-256.
      chips: there.
      hours: that training takes alone there; None where it cannot run.
      tower_hours: of `hours` those of a frozen tower that is computed in every step, which cells that train
        together share.
      changes: what the config has to say for it, such as "train.attention=splash".
      reason: why it cannot run; "" where it can.
    """

    id: str
    label: str
    topology: str
    chips: int
    hours: float | None
    tower_hours: float
    changes: tuple[str, ...]
    reason: str

    @property
    def chip_hours(self) -> float | None:
        """Hours on all chips; None where it cannot run."""
        return None if self.hours is None else self.hours * self.chips


class Cost(NamedTuple):
    """Of several cells: hours on their slice, one after another, and chip-hours."""

    hours: float
    chip_hours: float


def predicted(
    cells: Sequence[CellDirectory],
    place: Slice,
    slices: int = 1,
    *,
    text_tokens: int | None = None,
    calibration: Mapping[str, Efficiencies] | None = None,
) -> list[Predicted]:
    """Each cell as a run of its own.

    Args:
      cells: of a sweep, as `launch.state.directories` gives them.
      place: a slice, of `vlmscale.plan.slices.find_slice`.
      slices: of that kind, that one job spans.
      text_tokens: the longest text of a conversation, where rows are as long as the longest needs; None for
        `data.max_text_tokens`, which may be far too much.
      calibration: efficiencies by the kind of device, of `vlmscale.plan.roofline.read_calibration`.

    Raises:
      UserError: so many slices cannot be joined, or a config names a mesh that they cannot have.
    """
    place = joined(place, slices)
    shares = (calibration or {}).get(place.generation.device.kind)
    return [_predicted(cell, place, text_tokens, shares) for cell in cells]


def as_predicted(cell: Cell, found: Predicted) -> Cell:
    """The cell with what its prediction had to change for the slice: mesh, attention, recomputation."""
    words = [f"--config.{change}" for change in found.changes if not change.startswith(ANSWERS)]
    return override(cell, words, ("mesh", "train"))


def together(found: Sequence[Predicted]) -> Cost:
    """What the cells of a cohort take that can run, their tower once a batch.

    Whether the states of all have room beside one another is not asked: cohorts are planned by that.
    """
    hours = sum(one.hours - one.tower_hours for one in found if one.hours is not None)
    hours += max((one.tower_hours for one in found), default=0.0)
    return Cost(hours, hours * max((one.chips for one in found), default=0))


def check_limit(found: Sequence[Predicted], limit: float | None) -> None:
    """Refuse a sweep with a cell that would take more chip-hours than it may, or that cannot run there.

    Args:
      found: of `predicted`.
      limit: chip-hours of one cell at most; None for any.

    Raises:
      UserError: naming the first such cell; or the limit is no number above 0.
    """
    if limit is not None and not 0 < limit < math.inf:
        raise UserError(f"--max-chip-hours {limit:g}: must be a number above 0")
    for one in found:
        what = f"cell {one.id} ({one.label}) on {one.topology}"
        if one.chip_hours is None:
            raise UserError(f"{what}: cannot run there: {one.reason}; nothing was submitted")
        if limit is not None and one.chip_hours > limit:
            raise UserError(
                f"{what}: predicted to take {one.chip_hours:.3g} chip-hours, more than --max-chip-hours "
                f"{limit:g}; nothing was submitted"
            )


def _predicted(
    one: CellDirectory, place: Slice, text_tokens: int | None, shares: Efficiencies | None
) -> Predicted:
    fit = find_fit(one.cell, place, lengths_of(one.cell, text_tokens), predict, shares=shares)
    row = row_of(one.cell, place, fit, {}, shares)
    tower = 0.0
    if row.tower_s is not None and one.cell.data.features == "computed":
        tower = row.tower_s * one.cell.train.steps / 3600
    return Predicted(one.id, one.label, place.name, place.chips, row.hours, tower, row.changes, why_not(row))
