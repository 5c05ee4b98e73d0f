"""What a cohort writes about itself: status, metrics and TensorBoard of each cell, and what failed.

Of several processes the first writes; all of them take part in what is decided here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vlmscale.cost.image import image_flops, sample_flops, tower_passes
from vlmscale.data.plans import Plans
from vlmscale.distributed import leader
from vlmscale.records import Metrics, Status, environment, write_json
from vlmscale.train.cohort import Group, Member
from vlmscale.train.prepared import Prepared
from vlmscale.train.recipe import compute_dtype, make_schedule
from vlmscale.train.together import Reading
from vlmscale.train.watch import Board, Work, live_line, memory, rates, write_overview

_FEW = 0.5  # a share of image slots that is worth a word
_SHOWN = 8  # record ids that a message names


class Journal:
    """All that is written about the cells of a cohort while it runs."""

    def __init__(self, members: Sequence[Member], devices: int, tell: Callable[[str], None]) -> None:
        """Read what earlier attempts left.

        Args:
          members: the cells.
          devices: that they are trained on.
          tell: called with what happens on the way.
        """
        self.members, self.devices, self.tell = members, devices, tell
        self.started = time.monotonic()
        self.statuses = [Status(member.run) for member in members]
        self.before = [status.read() for status in self.statuses]
        self.failure = ""
        self._metrics: list[Metrics] = []
        self._boards: list[Board] = []

    def begin(self, device_kind: str) -> None:
        """Note that an attempt begins."""
        self.kind = device_kind
        if leader():
            for member, status, before in zip(self.members, self.statuses, self.before, strict=True):
                write_json(member.run / "env.json", environment(device_kind))
                if before.get("failed_at") is None:
                    status.update(state="running", attempts=before["attempts"] + 1, last_error=None)

    def status(self, **changes: Any) -> None:
        """Change the status of all cells that have not failed."""
        if leader():
            for status in self.statuses:
                if status.read().get("failed_at") is None:
                    status.update(**changes)

    def took(self) -> None:
        """Add this attempt's time."""
        if leader():
            for index, status in enumerate(self.statuses):
                status.update(wall_s=self._wall_s(index))

    def _wall_s(self, index: int) -> float:
        """Seconds that all attempts took."""
        return float(self.before[index].get("wall_s", 0.0)) + time.monotonic() - self.started

    def failed_at(self, member: Member) -> int | None:
        """The step at which an earlier attempt left a cell behind."""
        step: int | None = self.before[self.members.index(member)].get("failed_at")
        return step

    def resumed(self, step: int) -> None:
        """Note the step that this attempt goes on from; a fresh start gives failed cells another try."""
        for status, before in zip(self.statuses, self.before, strict=True):
            if not step:
                before.pop("failed_at", None)
            if leader() and before.get("failed_at") is None:
                known = before["resumed_from"] + ([step] if step or before["attempts"] else [])
                status.update(state="running", resumed_from=known, failed_at=None, last_error=None)

    def open(self, step: int, groups: Sequence[Group], reading: Reading, prepared: Prepared) -> None:
        """Open the files of all cells behind a step, and work out what a step computes."""
        self.reading = reading
        cell, average = self.members[0].cell, [samples.average() for samples in reading.samples]
        self._work, shared = [], []
        for index, member in enumerate(self.members):
            about = reading.describe(index)
            rows = member.cell.train.batch_size
            seen = rows * about["conversations"] / about["rows"]
            positions = rows * about["row_length"]
            own = sample_flops(member.cell, prepared.vocab_rows(member.cell), average[index])
            tower = image_flops(member.cell, member.cell.compressor.visual_tokens, 1, 1.0).tower
            paid = average[index].with_image * tower_passes(member.cell) * tower
            shared.append(seen * paid if not member.cell.train.tower_rate else 0.0)
            work = Work(positions, positions * about["positions_used"], seen * own - shared[-1])
            self._work.append(work)
            if leader():
                write_json(member.run / "data.json", about)
                self._metrics.append(Metrics(member.run / "metrics.jsonl", step))
                self._boards.append(Board(member.run, step))
        self._flops = sum(work.flops for work in self._work) + max(shared)  # the tower runs once for all
        schedule = jax.jit(jax.vmap(make_schedule(cell.train)))
        self._schedule = np.asarray(schedule(np.arange(cell.train.steps)))
        if leader():
            for group in groups:
                for member in group.members:
                    params = {**group.places.trained, **group.places.frozen}
                    write_overview(member.run / "parameters.txt", params)

    def write(
        self,
        step: int,
        group: Group,
        values: dict[str, Any],
        clock: dict[str, float],
        losses: dict[int, float],
    ) -> None:
        """A line for each living cell of a group.

        Args:
          step: that the values lead up to.
          group: of the cells.
          values: fetched, of `watch.Means.take`.
          clock: of `watch.Meter.read`.
          losses: held-out losses by the cell's number.
        """
        for place, (index, member) in enumerate(zip(group.indices, group.members, strict=True)):
            if place in group.failed:
                continue
            numbers = {name: float(value) for name, value in group.of_cell(values, place).items()}
            bad = int(numbers.pop("failures"))
            first = int(numbers.pop("first_failure"))
            if bad and member.cell.train.nonfinite == "stop":
                group.failed[place] = first
                self._fail(index, first)
                continue
            if bad:
                self.tell(f"{self._not_finite(index, first)}; skipped")
                numbers["skipped"] = bad
            numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
            numbers["learning_rate"] = float(self._schedule[step - 1]) * member.cell.train.learning_rate
            if index in losses:
                numbers["heldout_loss"] = losses[index]
            numbers |= self._speed(index, clock)
            if leader():
                self._metrics[index].write(step, **numbers)
                self._boards[index].write(step, numbers)

    def _speed(self, index: int, clock: dict[str, float]) -> dict[str, float]:
        """What the clock says of a cell: its own tokens, the FLOPs of the whole program."""
        if not clock:
            return {}
        train = self.members[index].cell.train
        work = self._work[index]._replace(flops=self._flops)
        dtype = np.dtype(compute_dtype(train)).name
        return clock | rates(work, clock["step_s"], self.devices, self.kind, dtype) | memory()

    def live_line(
        self, groups: Sequence[Group], values: Sequence[dict[str, Any] | None], clock: dict[str, float]
    ) -> str:
        """What a terminal shows: the mean loss of living cells, and the speed."""
        losses: list[float] = []
        tokens, speed = 0.0, {}
        for group, own in zip(groups, values, strict=True):
            for place, index in enumerate(group.indices):
                if own is not None and place not in group.failed:
                    losses.append(float(group.of_cell(own, place)["loss"]))
                    speed = self._speed(index, clock)
                    tokens += speed.get("tokens_per_s", 0.0)
        if speed:
            speed["tokens_per_s"] = tokens
        return live_line(float(np.mean(losses)) if losses else math.nan, speed)

    def _fail(self, index: int, step: int) -> None:
        self.failure = (
            f"{self._not_finite(index, step)}; lower train.learning_rate, or set train.nonfinite=skip"
        )
        if leader():
            self.statuses[index].update(state="failed", failed_at=step, last_error=self.failure)
        if len(self.members) > 1:
            self.tell(f"{self.members[index].run.name} is left behind: {self.failure}")

    def _not_finite(self, index: int, step: int) -> str:
        ids = self.records(step)
        named = ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
        return f"loss or gradient is not finite at step {step} (records {named})"

    def records(self, step: int) -> list[str]:
        """Ids of the records of a step's batch."""
        schedule, samples = self.reading.schedules[0], self.reading.samples[0]
        assert schedule is not None
        blocks = self.members[0].cell.train.batch_size // schedule.shape.rows
        plans = Plans(schedule)
        rows = [row for number in range(blocks) for row in plans.block((step - 1) * blocks + number)]
        return [samples.record_id(int(sample)) for row in rows for sample in row]

    def flush(self) -> None:
        """Force all lines to disk."""
        for metrics, board in zip(self._metrics, self._boards, strict=True):
            metrics.flush()
            board.flush()

    def close(self) -> None:
        """Close all files."""
        for metrics, board in zip(self._metrics, self._boards, strict=True):
            metrics.close()
            board.close()

    def done(self, index: int, params_sha256: str, skipped: int) -> None:
        """Note that a cell is trained to its end."""
        if leader():
            status = self.statuses[index].read()
            done = {
                "steps": self.members[index].cell.train.steps,
                "wall_s": self._wall_s(index),
                "resumed_from": status["resumed_from"],
                "params_sha256": params_sha256,
            }
            write_json(
                self.members[index].run / "done.json", done | ({"skipped": skipped} if skipped else {})
            )


def tell_layout(members: Sequence[Member], reading: Reading, tell: Callable[[str], None]) -> None:
    """Say what of the data is worth knowing before the first step."""
    for index, member in enumerate(members):
        about, cell = reading.describe(index), member.cell
        if about["image_slots_used"] < _FEW and cell.compressor.visual_tokens:
            tell(
                f"only {about['image_slots_used']:.0%} of the image slots are used; with data.packing=pack "
                "and data.row_length rows share them"
            )
        if about["cut"]:
            tell(
                f"{about['cut']} conversations are cut at data.row_length={cell.data.row_length}; "
                f"{about['left_out']} of them have no word of an answer within it and are left out"
            )
