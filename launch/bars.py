"""Progress of a sweep: on a terminal one bar for the sweep and one a running cell, elsewhere plain lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from launch.state import CellDirectory, steps_done

_LINE_EVERY_S = 60.0


class Bars:
    """Context manager that shows what `update` and `finished` tell it."""

    def __init__(self, cells: list[CellDirectory]) -> None:
        self.cells = {cell.id: cell for cell in cells}
        self.total = sum(cell.work for cell in cells)
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

    def update(self, running: list[tuple[CellDirectory, int]]) -> None:
        """Redraw; `running` are the live cells with their steps."""
        done = self._work_done()
        left = self._time_left(done)
        count = sum(cell.finished for cell in self.cells.values())
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
        alive = {cell.id for cell, _ in running}
        for name in [name for name in self.inner if name not in alive]:
            self.inner.pop(name).close()
        for cell, step in running:
            if cell.id not in self.inner:
                used = {bar.pos for bar in self.inner.values()}
                position = next(i for i in range(1, len(used) + 2) if -i not in used)
                self.inner[cell.id] = tqdm(
                    total=cell.cell.train.steps,
                    desc=f"  {cell.label:16}",
                    unit="step",
                    position=position,
                    leave=False,
                )
            self.inner[cell.id].n = step
            self.inner[cell.id].refresh()

    def finished(self, cell: CellDirectory, code: int) -> None:
        """Say that a cell's process has ended."""
        if not self.terminal:
            words = {0: "done", 42: "saved, to be run again"}.get(code, f"failed (exit {code})")
            print(f"{cell.label} ({cell.id}): {words}", file=sys.stderr)

    def _work_done(self) -> float:
        share = {
            name: 1.0 if cell.finished else 0.95 * steps_done(cell) / cell.cell.train.steps
            for name, cell in self.cells.items()
        }
        return sum(share[name] * cell.work for name, cell in self.cells.items())

    def _time_left(self, done: float) -> str:
        gained = done - self.at_start
        if gained <= 0:
            return "time left: measuring"
        seconds = (time.monotonic() - self.begun) * (self.total - done) / gained
        return f"about {int(seconds // 60)} min {int(seconds % 60):02d} s left"
