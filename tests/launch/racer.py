"""A launcher of a test: claims and runs all cells of a directory, in its own order, until all are done.

`python racer.py ROOT LIFE_S SLEEP_S SEED`: the work is to wait and to write who did it. It begins when
there is a file ROOT/go.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.claims import LostError
from launch.outcome import unfinished
from launch.work import work
from vlmscale.records import write_lines


def note(root: Path, what: str, cell: str) -> None:
    """One line, which the system writes as a whole."""
    file = os.open(root / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (json.dumps({"what": what, "cell": cell, "pid": os.getpid()}) + "\n").encode())
    os.close(file)


def main(root: Path, life_s: float, sleep_s: float, seed: int) -> None:
    """Run all cells."""
    rng = random.Random(seed)
    cells = sorted((root / "cells").iterdir())
    rng.shuffle(cells)

    def make(cell: Path) -> Callable[[Callable[[Path], None]], None]:
        def run(commit: Callable[[Path], None]) -> None:
            note(root, "ran", cell.name)
            time.sleep(sleep_s * rng.random())
            write_lines(cell / "result.jsonl", [json.dumps({"cell_id": cell.name, "pid": os.getpid()})])
            try:
                commit(cell)
            except LostError:
                note(root, "refused", cell.name)
                raise
            note(root, "committed", cell.name)

        return run

    note(root, "ready", "")
    while not (root / "go").exists():
        time.sleep(0.01)
    while left := [cell for cell in cells if unfinished([cell])]:
        for cell in left:
            work(cell, [cell], make(cell), life_s=life_s, lost=lambda: None)
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
