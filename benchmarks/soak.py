"""A long run that is killed again and again: it goes on where it was, and its memory does not grow.

    python benchmarks/soak.py --minutes 30

Trains the smallest cell of the demo in a process of its own, and kills it at random moments (SIGKILL, or
SIGTERM for one in three), each time after 2.5 to 7 minutes. Prints for each attempt where it resumed, how
it ended, and its resident memory (median of 20 samples, one a second) a minute after the first logged step
and at the end; then the largest growth. Every step must be in metrics.jsonl once, and every attempt behind
the first checkpoint must have resumed from one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_WARM_S, _SAMPLES = 60.0, 20


def resident_gib(pid: int) -> float:
    """Resident set of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def steps_of(run: Path) -> list[int]:
    """Steps that metrics.jsonl holds; the last line may be cut."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []:
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found


def attempt(words: list[str], run: Path, seconds: float, how: signal.Signals) -> dict[str, Any]:
    """Start, watch, stop."""
    before = max(steps_of(run), default=0)
    with (run.parent / "log.txt").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", "vlmscale.cli", *words], stdout=log, stderr=log)
        start = time.monotonic()
        while process.poll() is None and max(steps_of(run), default=0) <= before:
            time.sleep(0.5)
        time.sleep(_WARM_S)
        samples: list[float] = []
        while process.poll() is None and time.monotonic() - start < seconds:
            samples.append(resident_gib(process.pid))
            time.sleep(1.0)
        process.send_signal(how)
        code = process.wait()
    samples = samples or [float("nan")]  # stopped before it was warm
    warm, last = statistics.median(samples[:_SAMPLES]), statistics.median(samples[-_SAMPLES:])
    status = json.loads((run / "status.json").read_text())
    return {
        "ended": how.name if code in (-how, 42) else f"exit {code}",
        "resumed_from": (status["resumed_from"] or [0])[-1],
        "steps": max(steps_of(run), default=0),
        "warm_gib": warm,
        "last_gib": last,
        "growth": last / warm - 1,
    }


def main() -> None:
    """Parse, run, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, end = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["train", "--config", "configs/scenes_tiny.py:toy-14k,4", "--out", str(run)]
        words += ["--config.data.train_images=500", "--config.train.steps=2000000"]
        words += ["--config.train.checkpoint_every=200", "--config.train.heldout_every=1000"]
        rows = []
        while time.monotonic() < end:
            how = signal.SIGTERM if draw.random() < 1 / 3 else signal.SIGKILL
            left = max(150.0, min(draw.uniform(150, 420), end - time.monotonic()))
            rows.append(attempt(words, run, left, how))
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()
                ),
                flush=True,
            )
        logged, growth = steps_of(run), max(row["growth"] for row in rows if row["growth"] == row["growth"])
        saved = [row["resumed_from"] for row in rows[1:]]
        print(
            f"{len(rows)} attempts, {logged[-1]} steps, largest growth {growth:.1%}, "
            f"each step once: {logged == list(range(1, len(logged) + 1))}, "
            f"every resume behind a checkpoint: {all(step > 0 for step in saved)}"
        )


if __name__ == "__main__":
    main()
