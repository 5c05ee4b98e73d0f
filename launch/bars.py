"""Progress of a sweep: on a terminal one bar for the sweep and one a running cell, elsewhere plain lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from launch.cohorts import Cohort
from launch.outcome import CANCELLED
from vlmscale.errors import EXIT_USER

_LINE_EVERY_S = 60.0


class Bars:
    """Context manager that shows what `update` and `finished` tell it."""

    def __init__(self, cohorts: list[Cohort]) -> None:
        self.cohorts = {cohort.id: cohort for cohort in cohorts}
        self.cells = [cell for cohort in cohorts for cell in cohort.cells]
        self.work = {cohort.id: cohort.work for cohort in cohorts}
        self.total = sum(self.work.values())
        self.terminal = sys.stderr.isatty()
        self.begun = time.monotonic()
        self.at_start = self._work_done()
        self.said = self.begun
        self.inner: dict[str, tqdm] = {}

    def __enter__(self) -> Bars:
        layout = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
        self.outer = tqdm(total=100, bar_format=layout, disable=not self.terminal, position=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (*self.inner.values(), self.outer):
            bar.close()

    def update(self, running: list[Cohort]) -> None:
        """Redraw; `running` are the live cohorts."""
        done = self._work_done()
        left = self._time_left(done)
        count = sum(cell.finished for cell in self.cells)
        if not self.terminal:
            if time.monotonic() - self.said >= _LINE_EVERY_S:
                self.said = time.monotonic()
                print(
                    f"{count}/{len(self.cells)} cells, {100 * done / self.total:.0f}% of the work, {left}",
                    file=sys.stderr,
                )
            return
        self.outer.n = round(100 * done / self.total, 1)
        self.outer.set_description_str(f"sweep {count}/{len(self.cells)} cells", refresh=False)
        self.outer.set_postfix_str(left)
        alive = {cohort.id for cohort in running}
        for name in [name for name in self.inner if name not in alive]:
            self.inner.pop(name).close()
        for cohort in running:
            if cohort.id not in self.inner:
                used = {bar.pos for bar in self.inner.values()}
                position = next(i for i in range(1, len(used) + 2) if -i not in used)
                self.inner[cohort.id] = tqdm(
                    total=cohort.steps,
                    desc=f"  {cohort.label:16}",
                    unit="step",
                    position=position,
                    leave=False,
                )
            self.inner[cohort.id].n = cohort.done
            self.inner[cohort.id].refresh()

    def finished(self, cohort: Cohort, code: int) -> None:
        """Say that a cohort's process has ended."""
        if not self.terminal:
            words = {0: "done", 42: "saved, to be run again"}.get(code, f"failed (exit {code})")
            if code == EXIT_USER and cohort.held_back.endswith(CANCELLED):
                words = CANCELLED
            print(f"{cohort.label} ({cohort.id}): {words}", file=sys.stderr)

    def _work_done(self) -> float:
        share = {
            name: 1.0 if cohort.finished else 0.95 * cohort.done / cohort.steps
            for name, cohort in self.cohorts.items()
        }
        return sum(share[name] * work for name, work in self.work.items())

    def _time_left(self, done: float) -> str:
        gained = done - self.at_start
        if gained <= 0:
            return "time left: measuring"
        seconds = (time.monotonic() - self.begun) * (self.total - done) / gained
        return f"about {int(seconds // 60)} min {int(seconds % 60):02d} s left"
