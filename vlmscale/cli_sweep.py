"""`vlmscale sweep` and `vlmscale demo`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscale.cli_evaluate import add_distributed
from vlmscale.errors import EXIT_AGAIN, UserError
from vlmscale.terminal import add_command, progress_bar, tell

if TYPE_CHECKING:
    from launch.cohorts import Cohort
    from launch.state import CellDirectory
    from vlmscale.config import Sweep


def add_demo(commands: Any) -> None:
    """Declare `demo`: a sweep that ships with the package."""
    demo = add_command(
        commands,
        "demo",
        _run,
        "train the demo sweep and write its report; --config.KEY=VALUE overrides",
        "vlmscale demo --out runs/demo",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="sweep directory (default runs/demo)"
    )
    demo.set_defaults(
        sweep="configs/sweeps/demo.py", workers=None, memory=None, dry_run=False, takes_config=True
    )


def add_sweep(commands: Any) -> None:
    """Declare the commands of sweeps."""
    sweep = commands.add_parser("sweep", help="run sweeps of cells").add_subparsers(
        dest="what", required=True
    )
    _add_run(sweep)
    _add_work(sweep)
    status = add_command(
        sweep, "status", _status, "the state of every cell", "vlmscale sweep status DIR --watch"
    )
    status.add_argument("out", type=_where, metavar="DIR")
    status.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    status.add_argument("--watch", action="store_true", help="show it every 5 seconds until nothing is left")
    for name, run, about in (
        ("retry", _retry, "make failed and cancelled cells pending again, for the next run"),
        ("cancel", _cancel, "cancel cells that wait, and ask who works on others to save and stop"),
    ):
        command = add_command(sweep, name, run, about, f"vlmscale sweep {name} DIR CELL")
        command.add_argument("out", type=_where, metavar="DIR")
        command.add_argument("cells", nargs="*", metavar="CELL", help="cell ids (default: all)")
    collect = add_command(
        sweep,
        "collect",
        _collect,
        "the rows of finished cells of one or several sweeps, as one file",
        "vlmscale sweep collect runs/here copies/there --out all.jsonl",
    )
    collect.add_argument("outs", type=_where, nargs="+", metavar="DIR")
    collect.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    push = add_command(
        sweep,
        "push",
        _push,
        "give a sweep that was launched to a bucket, for jobs that share no disk",
        "vlmscale sweep push DIR gs://BUCKET/runs/x",
    )
    push.add_argument("out", type=Path, metavar="DIR")
    push.add_argument("address", metavar="gs://BUCKET/PATH")


def _add_run(sweep: Any) -> None:
    run = add_command(
        sweep,
        "run",
        _run,
        "train and evaluate all cells and write the report; --config.KEY=VALUE overrides",
        "vlmscale sweep run configs/sweeps/demo.py --out DIR",
    )
    run.add_argument("sweep", metavar="SWEEP", help="file with get_sweep(overrides)")
    run.add_argument(
        "--out", type=Path, required=True, help="directory; several launchers on one share the work"
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print cells, cohorts and commands; nothing is written"
    )
    run.add_argument("--workers", type=int, default=None, help="processes at a time (default: one a core)")
    run.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="what a process may take, for planning cohorts (default: an equal share of this machine's free "
        "memory; on an accelerator name that of the device)",
    )
    run.set_defaults(takes_config=True)


def _add_work(sweep: Any) -> None:
    work = add_command(
        sweep,
        "work",
        _work,
        "train and evaluate one cohort of a sweep that was launched: what runs inside a job",
        "vlmscale sweep work DIR --cohort ID --distributed auto",
    )
    work.add_argument("out", type=_where, metavar="DIR", help="a directory, or gs://BUCKET/PATH")
    work.add_argument("--cohort", required=True, metavar="ID", help="of sweep.json; of one cell its own id")
    work.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="of gs://: where this process keeps its files; those that are there are not fetched again "
        "(default: a temporary directory)",
    )
    add_distributed(work)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.state import directories, open_sweep
    from vlmscale.evaluate.items import check_files
    from vlmscale.loading import load_sweep
    from vlmscale.records import make_directory

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers}: must be above 0")
    sweep = load_sweep(arguments.sweep, overrides)
    check_files([cell.evaluate for cell in sweep.cells])
    if arguments.dry_run:
        return _show_plan(sweep.name, directories(sweep, arguments.out), arguments)
    make_directory(arguments.out)
    with _turn(arguments.out):
        cells = open_sweep(sweep, arguments.out)
    if all(cell.finished for cell in cells):
        return _finish(cells, arguments.out, f"all {len(cells)} cells are done")
    return _launch(sweep, cells, arguments) or _finish(cells, arguments.out, "results")


def _launch(sweep: Sweep, cells: list[CellDirectory], arguments: argparse.Namespace) -> int:
    """Run what is left of a sweep; 42 where a signal stopped it, else 0, whatever came of the cells."""
    import jax

    from launch.changes import forgive_failed
    from launch.cohorts import fix_cohorts
    from launch.directory import read_sweep
    from launch.local import cores, run_cohorts
    from vlmscale.train.prepared import prepare
    from vlmscale.train.run import open_run

    out = arguments.out
    jax.config.update("jax_platforms", "cpu")  # this process must not hold the devices that its workers need
    with _turn(out):
        prepared = prepare([cell.cell for cell in cells], out / "data", progress_bar(), tell)
        print(prepared.manifest["summary"], file=sys.stderr)
        memory = None if arguments.memory is None else arguments.memory * 2**30
        cohorts = fix_cohorts(cells, out, prepared, arguments.workers or len(cores()), memory)
        for cohort in cohorts:
            for cell in cohort.cells:
                open_run(cell.cell, cell.path, prepared.path, sweep.name, cohort.id)
    forgive_failed(read_sweep(out).crews())
    if run_cohorts(cohorts, arguments.workers):
        print("stopped; every cell is saved, run again to go on", file=sys.stderr)
        return EXIT_AGAIN
    _tell_unfinished(cohorts, out)
    return 0


def _finish(cells: list[CellDirectory], out: Path, what: str) -> int:
    """Collect the results, and write the report where no cell failed."""
    from launch.directory import read_sweep
    from launch.outcome import CANCELLED
    from launch.results import collect
    from vlmscale.records import Status

    with _turn(out):
        results = collect(read_sweep(out))
        print(f"{what}: {results}")
        if any(Status(cell.path).read()["state"] not in ("done", CANCELLED) for cell in cells):
            return 1
        _report(results)
    return 0


@contextmanager
def _turn(out: Path) -> Iterator[None]:
    """One launcher at a time: to prepare the data and to write the report. The others wait."""
    import time

    from launch.claims import LIFE_S, FileClaims, describe, holder, take
    from launch.outcome import CLAIMS
    from launch.work import end

    store, said = FileClaims(out / CLAIMS), False
    while (claim := take(store)) is None:
        if not said:
            said = True
            tell(f"{out}: {describe(holder(store) or {})} prepares or reports it; waiting")
        time.sleep(0.5)
    try:
        with claim.kept(LIFE_S, end, lambda: None):
            yield
    finally:
        claim.release()


def _tell_unfinished(cohorts: list[Cohort], out: Path) -> None:
    from launch.outcome import CANCELLED
    from vlmscale.records import Status

    for cohort in cohorts:
        for cell in cohort.cells:
            status = Status(cell.path).read()
            if status["state"] == CANCELLED:
                tell(f"{cell.label} ({cell.id}) is cancelled; vlmscale sweep retry {out} {cell.id}")
            elif status["state"] != "done":
                reason = status["last_error"] or "it ended without a word"
                tell(f"{cell.label} ({cell.id}) failed: {reason} (see {cohort.path / 'log.txt'})")


def _report(results: Path) -> None:
    """Write the report of a finished sweep beside its results, unless it is there and as new."""
    from analysis.data import DataError, load
    from analysis.report import write_report

    report = results.with_name("report") / "report.html"
    if not report.exists() or report.stat().st_mtime < results.stat().st_mtime:
        try:
            if not load(results.parent).comparable:
                print("no report: fewer than two cells with an image", file=sys.stderr)
                return
            print("comparing the cells and drawing the report ...", file=sys.stderr)
            write_report(results.parent, report.parent)
        except DataError as error:
            raise UserError(str(error)) from error
    print(f"report: {report}")


def _show_plan(name: str, cells: list[CellDirectory], arguments: argparse.Namespace) -> int:
    """Print what a launch would run."""
    from launch.cohorts import make_cohort, sharing
    from launch.directory import read_sweep
    from launch.local import command, cores
    from launch.state import check_sweep
    from vlmscale.records import Status

    out, by_id = arguments.out, {cell.id: cell for cell in cells}
    there = check_sweep(cells, out)
    print(f"sweep {name}: {len(cells)} cells in {out}")
    for cell in cells:
        state = Status(cell.path).read()["state"]
        print(f"  {cell.id}  {cell.label}  {cell.cell.train.steps} steps  {state}")
    known = read_sweep(out).cohorts if there else []
    workers = arguments.workers or len(cores())
    if known:
        print(f"{len(known)} cohorts, fixed at the first launch; run by {workers} processes at a time:")
        groups = [[by_id[cell] for cell in ids] for ids in known]
    else:
        groups = sharing(cells)
        print(
            f"{len(groups)} groups could each train together as far as the configs tell; the data, {workers} "
            "processes at a time and their memory part them further. As they stand:"
        )
    for group in groups:
        cohort = make_cohort(group, out)
        done = "  done" if cohort.finished else ""
        print(f"  {cohort.id}  {len(group)} cells: {', '.join(cell.id for cell in group)}{done}")
        if not done:
            print(f"    {shlex.join(command(cohort, cores()[0]))}")
    return 0


def _where(word: str) -> Path | str:
    """A directory, or an address, whose slashes a path would change."""
    from vlmscale.bucket import is_bucket

    return word if is_bucket(word) else Path(word)


def _push(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.upload import upload

    sent = upload(arguments.out, arguments.address, tell)
    print(f"{sent} files sent to {arguments.address}; the others are there already")
    return 0


def _work(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.mirror import reached
    from launch.work import run_cohort

    with reached(arguments.out, scratch=arguments.scratch) as sweep:
        crew, rank = sweep.crew(arguments.cohort), arguments.distributed
        return run_cohort(crew.folder, crew.runs, wait=True, distributed=rank, place=sweep.place)


def _status(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.mirror import reached, told
    from launch.status import FILES, TAIL, TAILS, cell_rows, table, watch

    if arguments.json and arguments.watch:
        raise UserError("--watch is for people; --json prints one object")
    with told(), reached(arguments.out, FILES, TAILS, TAIL) as sweep:
        if arguments.watch:
            watch(lambda: cell_rows(sweep.again()))
            return 0
        rows = cell_rows(sweep)
    print(json.dumps({"cells": rows}) if arguments.json else table(rows))
    return 0


def _retry(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.changes import FILES, retry
    from launch.mirror import reached, told

    with told(), reached(arguments.out, FILES) as sweep:
        changed = retry(sweep, arguments.cells, tell)
    for name in changed:
        print(f"{name}: pending")
    print(f"cells that are pending again: {len(changed)}" + ("; run the sweep to go on" if changed else ""))
    return 0


def _cancel(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.changes import FILES, cancel
    from launch.mirror import reached, told

    with told(), reached(arguments.out, FILES) as sweep:
        cancelled, asked = cancel(sweep, arguments.cells, tell)
    print(f"cells that are cancelled: {len(cancelled)}; asked to save and stop: {len(asked)}")
    return 0


def _collect(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.mirror import reached, told
    from launch.results import FILES, collect_into

    with ExitStack() as stack:
        stack.enter_context(told())
        outs = [stack.enter_context(reached(out, FILES)).out for out in arguments.outs]
        found = collect_into(arguments.out, outs)
    more = f"; {found.repeated} rows were in several directories and count once" if found.repeated else ""
    print(
        f"{len(found.rows)} rows of {len(found.done)} finished cells, of {len(found.cells)} in "
        f"{', '.join(map(str, arguments.outs))}{more}: {arguments.out}"
    )
    return 0
