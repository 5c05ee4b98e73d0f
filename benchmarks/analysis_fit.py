"""How long the analysis takes, against the grid search of the paper's released code on the same machine.

    python benchmarks/analysis_fit.py                 # all rows, about a minute
    python benchmarks/analysis_fit.py --rows peer T5  # some of them
    python benchmarks/analysis_fit.py --json          # the same as one JSON object

Every row runs in a process of its own: a first call stays a first call, and no row's memory counts for
another. The exit code is 1 if a row failed or missed its limit, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from analysis.data import Table

ROOT = Path(__file__).resolve().parent.parent
DATA = "paper-reasoning"
LAW = "logit_linear"
REPLICATES = 10_000
PEER_CELLS = 10_000
PEER_SCALE = 100  # the published search looks at a fifth of its 5,000,000 cells: 1,000,001
ROW_TIMEOUT = 900  # seconds


# --- the peer ---------------------------------------------------------------------------------------------


def random_search(
    n: np.ndarray, v: np.ndarray, error: np.ndarray, cells: int, seed: int
) -> tuple[list[float], float]:
    """The published search as it runs: (a, alpha, beta, D) of the best of `cells` random cells, and its loss.

    Source: arXiv 2411.03312, scaling_law_code/objective.py, re-implemented with the same work a cell: a
    Python loop over the 28 measurements, each looked up by the text of N and the position of V, and a
    progress line that prints the best parameters. It takes the time of the original loop within 5%.
    n: parameter counts, v: visual tokens, error: [cells of the data].
    """
    import numpy as np
    from tqdm import tqdm

    from analysis.published import BOX, CELLS

    billions = [float(value) / 1e9 for value in np.unique(n)]
    tokens = [float(value) for value in np.unique(v)]
    scores = {
        str(size): [float(1 - error[(n == size * 1e9) & (v == count)].item()) for count in tokens]
        for size in billions
    }
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(axis, cells) for axis in BOX.values()], axis=1)
    best_loss, best = float("inf"), drawn[0]
    # The line goes nowhere: a terminal would only be slower.
    with open(os.devnull, "w") as sink, tqdm(total=CELLS, file=sink) as bar:
        for cell in drawn:
            loss = _loss(cell, billions, tokens, scores)
            if loss < best_loss:
                best_loss, best = loss, cell
            bar.update(1)
            bar.set_description(f"best loss: {best_loss} : best params : {best}")
    return best.tolist(), float(best_loss)


def _loss(
    cell: np.ndarray, billions: list[float], tokens: list[float], scores: dict[str, list[float]]
) -> float:
    loss = 0.0
    for size in billions:
        for count in tokens:
            loss += (_predict(cell, [size, count]) - (1 - scores[str(size)][tokens.index(count)])) ** 2
    return loss


def _predict(cell: np.ndarray, where: list[float]) -> float:
    a, alpha, beta, floor = cell
    size, count = where
    return a / size**alpha / count**beta + floor


def peer() -> float:
    """Seconds of one published search: 1% of its cells timed, times 100; building its grid is left out."""
    table = _table()
    return PEER_SCALE * _seconds(lambda: random_search(table.n, table.v, table.error, PEER_CELLS, seed=0))


# --- the rows ---------------------------------------------------------------------------------------------


def single_fit_warm() -> float:
    """T1: one fit of the slowest law of at most four parameters, median of 20 after a first."""
    from analysis.fit import fit
    from analysis.laws import LAWS

    table = _table()
    slowest = 0.0
    for law in (law for law in LAWS.values() if law.size <= 4):
        times = [_seconds(partial(fit, law, table)) for _ in range(21)]
        slowest = max(slowest, statistics.median(times[1:]))
    return slowest


def bootstrap_warm() -> float:
    """T2: 10,000 residual bootstrap refits, median of 5 with new seeds after a first."""
    from analysis.bootstrap import resample
    from analysis.fit import fit
    from analysis.laws import LAWS

    fitted = fit(LAWS[LAW], _table())
    times = [
        _seconds(partial(resample, fitted, REPLICATES, scheme="residual", seed=seed)) for seed in range(6)
    ]
    return statistics.median(times[1:])


def first_call() -> float:
    """T3: the first fit and 10,000 refits of a process, with compilation, after the imports."""
    from analysis.bootstrap import resample
    from analysis.fit import fit
    from analysis.laws import LAWS

    table = _table()
    return _seconds(lambda: resample(fit(LAWS[LAW], table), REPLICATES, scheme="residual", seed=0))


def command_cold() -> float:
    """T4: the whole command from a new process, imports and report included."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "analysis", DATA, "--bootstrap", str(REPLICATES), "--out", place]
        return _seconds(lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL))


def exhaustive_grid() -> float:
    """T5: all 5,000,000 cells of the published box, first call; checked against the known optimum."""
    from analysis.published import exhaustive

    table = _table()
    start = time.perf_counter()
    best = exhaustive(table.n, table.v, table.error).best
    seconds = time.perf_counter() - start
    if [round(value, 4) for value in best[:4]] != [0.5571, 0.0747, 0.0162, 0.0333]:
        raise AssertionError(f"the best cell is {best}")
    return seconds


def peak_memory() -> float:
    """T6: peak resident GiB of a process that makes a fit and 50,000 residual bootstrap refits."""
    from analysis.bootstrap import resample
    from analysis.fit import fit
    from analysis.laws import LAWS

    resample(fit(LAWS[LAW], _table()), 50_000, scheme="residual", seed=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def _table() -> Table:
    from analysis.data import load

    return load(DATA).tables[0]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- the table --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row: what it measures, and its limit in `unit`."""

    what: str
    measure: Callable[[], float]
    limit: float | None
    unit: str = "s"


ROWS = {
    "peer": Row("published search, 10,000 cells x 100", peer, None),
    "T1": Row("single fit, warm, slowest law", single_fit_warm, 0.005),
    "T2": Row("10,000 bootstrap refits, warm", bootstrap_warm, 1.0),
    "T3": Row("first fit + 10,000 refits, compiling", first_call, 4.0),
    "T4": Row("whole command, cold", command_cold, 30.0),
    "T5": Row("5,000,000 cells of the published box", exhaustive_grid, 2.0),
    "T6": Row("peak memory, 50,000 refits", peak_memory, 1.0, unit="GiB"),
}


@dataclass(frozen=True)
class Outcome:
    """A measured row. value: None if it failed; ratio: peer over value, None where there is none."""

    value: float | None
    ratio: float | None
    failure: str = ""

    def passed(self, row: Row) -> bool:
        """Whether the row ran and kept its limit; the ratio is for the reader."""
        return self.value is not None and (row.limit is None or self.value <= row.limit)


def measure(name: str) -> tuple[float | None, str]:
    """Run one row in a new process: (its value, ""), or (None, the last line of what went wrong)."""
    # A compilation cache that the user has would make first calls look warm.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=ROW_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None, f"took more than {ROW_TIMEOUT} s"
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return float(done.stdout.strip().splitlines()[-1]), ""


def measure_all(names: list[str]) -> dict[str, Outcome]:
    """Every named row in the order of `ROWS`, the peer first, so that the others have their ratio."""
    outcomes: dict[str, Outcome] = {}
    for name in (name for name in ROWS if name in names):
        print(f"{name}: {ROWS[name].what} ...", file=sys.stderr, flush=True)
        value, failure = measure(name)
        reference = value if name == "peer" else outcomes["peer"].value if "peer" in outcomes else None
        ratio = reference / value if reference and value and ROWS[name].unit == "s" else None
        outcomes[name] = Outcome(value, ratio, failure)
    return outcomes


def show(outcomes: dict[str, Outcome]) -> None:
    """Print the table, then why rows failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}; {DATA}")
    print(f"{'row':<44} | {'measured':>10} | {'limit':>18} | ratio against the peer")
    for name, outcome in outcomes.items():
        row = ROWS[name]
        measured = "failed" if outcome.value is None else _amount(outcome.value, row.unit)
        limit = "-" if row.limit is None else f"<= {_amount(row.limit, row.unit)}"
        ratio = "-" if outcome.ratio is None else f"{outcome.ratio:,.0f}x"
        verdict = "" if outcome.passed(row) else "  MISSED"
        print(f"{name + ' ' + row.what:<44} | {measured:>10} | {limit:>18} | {ratio}{verdict}")
    for name, outcome in outcomes.items():
        if outcome.failure:
            print(f"{name}: {outcome.failure}")


def _amount(value: float, unit: str) -> str:
    return f"{value * 1e3:.3g} ms" if unit == "s" and value < 0.1 else f"{value:.3g} {unit}"


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(repr(ROWS[args.one].measure()))
        return 0
    outcomes = measure_all(args.rows)
    if args.json:
        report = {
            name: {
                **outcome.__dict__,
                **{key: getattr(ROWS[name], key) for key in ("what", "limit", "unit")},
                "passed": outcome.passed(ROWS[name]),
            }
            for name, outcome in outcomes.items()
        }
        print(json.dumps(report, indent=1))
    else:
        show(outcomes)
    return 0 if all(outcome.passed(ROWS[name]) for name, outcome in outcomes.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
