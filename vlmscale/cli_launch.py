"""`vlmscale sweep run`, `sweep report`, `demo`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscale.cli_engines import (
    OPTIONS,
    add_engines,
    apply_to_tpus,
    check_options,
    show_slurm,
    show_tpus,
    submit_to_slurm,
)
from vlmscale.errors import EXIT_AGAIN, UserError
from vlmscale.terminal import add_command, counted, progress_bar, tell

if TYPE_CHECKING:
    from launch.cohorts import Cohort
    from launch.price import Predicted
    from launch.state import CellDirectory


def where(word: str) -> Path | str:
    """A directory, or an address, whose slashes a path would change."""
    from vlmscale.bucket import is_bucket

    return word if is_bucket(word) else Path(word)


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
        sweep="configs/sweeps/demo.py",
        on="local",
        workers=None,
        memory=None,
        dry_run=False,
        takes_config=True,
        topology=None,
        text_tokens=None,
        calibration=None,
        max_chip_hours=None,
        **{name: None for names in OPTIONS.values() for name in names},
    )


def add_run(sweep: Any) -> None:
    """Declare `sweep run`."""
    run = add_command(
        sweep,
        "run",
        _run,
        "train and evaluate all cells and write the report; --config.KEY=VALUE overrides",
        "vlmscale sweep run configs/sweeps/demo.py --out DIR",
    )
    run.add_argument("sweep", metavar="SWEEP", help="file with get_sweep(overrides)")
    run.add_argument(
        "--out", type=where, required=True, help="directory; several launchers on one share the work"
    )
    run.add_argument(
        "--on",
        choices=OPTIONS,
        default="local",
        help="this machine (default), the Slurm cluster of this login node, or TPU slices of a GKE cluster",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print cells, cohorts and commands; nothing is written"
    )
    run.add_argument(
        "--workers",
        type=int,
        help="processes or jobs at a time, and how many cohorts are made at least (default: as there is "
        "room for; on Slurm and TPUs each cell is a job of its own)",
    )
    run.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="what a process may take, for planning cohorts (default: an equal share of this machine's free "
        "memory; on an accelerator name that of the device)",
    )
    run.add_argument(
        "--topology",
        metavar="SLICE",
        help="what each job runs on, such as v5e-256 or h200-8: the slice of TPUs that it asks for, and "
        "elsewhere what the cost is predicted for",
    )
    run.add_argument(
        "--max-chip-hours", type=float, metavar="X", help="refuse cells that are predicted to take more"
    )
    run.add_argument(
        "--text-tokens", type=int, metavar="Q", help="for the prediction: as that of `vlmscale plan`"
    )
    run.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="for the prediction: efficiencies that `vlmscale bench step` measured",
    )
    add_engines(run)
    run.set_defaults(takes_config=True)


def add_report(sweep: Any) -> None:
    """Declare `sweep report`."""
    report = add_command(
        sweep,
        "report",
        _report_sweep,
        "collect the results and write the report, as `run` does last",
        "vlmscale sweep report DIR",
    )
    report.add_argument("out", type=where, metavar="DIR")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.local import run_cohorts
    from launch.opening import open_cohorts, turn
    from launch.price import as_predicted, check_limit
    from launch.state import directories, open_sweep
    from vlmscale.bucket import is_bucket
    from vlmscale.content import check_trained
    from vlmscale.evaluate.items import check_files
    from vlmscale.loading import load_sweep
    from vlmscale.records import make_directory

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers}: must be above 0")
    if arguments.memory is not None and not arguments.memory > 0:  # every cell would be alone, for good
        raise UserError(f"--memory={arguments.memory:g}: must be above 0")
    check_options(arguments)
    if is_bucket(arguments.out):
        raise UserError(
            f"--out {arguments.out}: is a directory here; --on tpu --bucket names where jobs work"
        )
    _check_prediction(arguments)
    sweep = load_sweep(arguments.sweep, overrides)
    check_files([cell.evaluate for cell in sweep.cells])
    if arguments.on != "slurm":  # there a stage may wait for the one before it
        for cell in sweep.cells:
            if cell.train.init_from:
                check_trained("train.init_from", Path(cell.train.init_from))
    found: list[Predicted] = []
    wanted = arguments.dry_run or arguments.on == "tpu" or arguments.max_chip_hours is not None
    if wanted and arguments.topology is not None:
        found = _predicted(directories(sweep, arguments.out), arguments)
    if arguments.max_chip_hours is not None or arguments.on == "tpu":
        check_limit(found, arguments.max_chip_hours)
    if arguments.on == "tpu":  # what runs is what was predicted; none of it changes a result, nor a cell's id
        sweep = replace(sweep, cells=[as_predicted(*pair) for pair in zip(sweep.cells, found, strict=True)])
    if arguments.dry_run:
        return _show_plan(sweep.name, directories(sweep, arguments.out), found, arguments)
    make_directory(arguments.out)
    with turn(arguments.out, tell):
        cells = open_sweep(sweep, arguments.out)
    if all(cell.finished for cell in cells):
        return _finish(arguments.out, f"all {len(cells)} cells are done")

    def make() -> list[Cohort]:
        workers, memory = _room(arguments, cells)
        return open_cohorts(sweep.name, cells, arguments.out, workers, memory, progress_bar(), tell)

    if arguments.on == "slurm":
        return submit_to_slurm(sweep.name, cells, make, arguments)
    if arguments.on == "tpu":
        return apply_to_tpus(sweep.name, cells, make, arguments)
    if run_cohorts(make(), arguments.workers):
        print("stopped; every cell is saved, run again to go on", file=sys.stderr)
        return EXIT_AGAIN
    return _finish(arguments.out, "results")


def _check_prediction(arguments: argparse.Namespace) -> None:
    """Refuse options of a prediction that cannot be read, or that go with none."""
    from vlmscale.plan.roofline import read_calibration
    from vlmscale.plan.slices import find_slice

    if arguments.topology is None:
        for name in ("max_chip_hours", "text_tokens", "calibration"):
            if getattr(arguments, name) is not None:
                word = name.replace("_", "-")
                raise UserError(f"--{word} is of a prediction: give --topology as well")
        return
    find_slice(arguments.topology)
    if arguments.calibration is not None:
        read_calibration(arguments.calibration)
    if arguments.text_tokens is not None and arguments.text_tokens < 1:
        raise UserError(f"--text-tokens {arguments.text_tokens}: must be above 0")


def _room(arguments: argparse.Namespace, cells: Sequence[CellDirectory]) -> tuple[int, float | None]:
    """Cohorts that run at a time, and bytes that each may take; None for a share of this machine's."""
    from launch.devices import needed, units

    memory = None if arguments.memory is None else arguments.memory * 2**30
    if arguments.on == "local":
        there = units()
        largest = max(needed(cell.cell.mesh, there, cell.label) for cell in cells)
        return arguments.workers or len(there) // largest, memory
    return arguments.workers or len(cells), float("inf") if memory is None else memory


def _predicted(cells: Sequence[CellDirectory], arguments: argparse.Namespace) -> list[Predicted]:
    """What the cells will take on the slice that was named."""
    from launch.price import predicted
    from vlmscale.plan.roofline import read_calibration
    from vlmscale.plan.slices import find_slice

    place, slices = find_slice(arguments.topology), arguments.slices or 1
    measured = read_calibration(arguments.calibration) if arguments.calibration else None
    return predicted(cells, place, slices, text_tokens=arguments.text_tokens, calibration=measured)


def _show_cost(cohorts: Sequence[Cohort], predictions: Sequence[Predicted], applied: bool) -> None:
    """Print what each cohort will take, and all of them; `applied`: a launch makes the changes itself."""
    from launch.price import Cost, together

    costs, by_id = [], {one.id: one for one in predictions}
    for cohort in cohorts:
        found = [by_id[cell.id] for cell in cohort.cells]
        for one in found:
            if one.reason:
                print(f"  {cohort.id}  {one.label} cannot run there: {one.reason}")
        costs.append(together(found))
        changes = sorted({word for one in found for word in one.changes})
        said = f"  {cohort.id}  {costs[-1].hours:.3g} h, {costs[-1].chip_hours:.3g} chip-hours"
        how = "with" if applied else "if the config says"
        print(said + (f" {how} {' '.join(changes)}" if changes else ""))
    whole = Cost(*map(sum, zip(*costs, strict=True))) if costs else Cost(0, 0)
    took = f"{whole.hours:.3g} h one after another, {whole.chip_hours:.3g} chip-hours"
    print(
        f"predicted for {predictions[0].topology}: {took}; compilation, evaluation and restarts not counted"
    )


def _report_sweep(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.bucket import is_bucket

    if is_bucket(arguments.out):
        raise UserError(
            f"{arguments.out}: a report is written on a disk: vlmscale sweep collect {arguments.out} --out "
            "all.jsonl, then vlmscale analyze all.jsonl --out report"
        )
    return _finish(arguments.out, "results")


def _finish(out: Path, what: str) -> int:
    """Collect the results, tell what is not done, and write the report where no cell failed."""
    from launch.directory import read_sweep
    from launch.opening import turn
    from launch.outcome import CANCELLED
    from launch.results import collect
    from launch.status import cell_rows

    sweep = read_sweep(out)
    with turn(out, tell):
        results, left = collect(sweep), False
        for row in cell_rows(sweep):
            cell, state = row["cell_id"], row["state"]
            if state == CANCELLED:
                tell(f"{row['cell']} ({cell}) is cancelled; vlmscale sweep retry {out} {cell}")
            elif state != "done":
                left = True
                log = sweep.crew_of(cell).folder / "log.txt"
                why = row["last_error"] or "it ended without a word"
                tell(f"{row['cell']} ({cell}) {state}: {why} (see {log})")
        print(f"{what}: {results}")
        if left:
            return 1
        _report(results)
    return 0


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


def _show_plan(
    name: str, cells: list[CellDirectory], found: Sequence[Predicted], arguments: argparse.Namespace
) -> int:
    """Print what a launch would run, and what that is predicted to take, where it is."""
    from launch.cohorts import make_cohort, sharing
    from launch.directory import read_sweep
    from launch.outcome import CANCELLED
    from launch.state import check_sweep
    from vlmscale.records import Status

    out, by_id = arguments.out, {cell.id: cell for cell in cells}
    there = check_sweep(cells, out)
    print(f"sweep {name}: {counted(len(cells), 'cell')} in {out}")
    for cell in cells:
        state = Status(cell.path).read()["state"]
        print(f"  {cell.id}  {cell.label}  {cell.cell.train.steps} steps  {state}")
    known = read_sweep(out).cohorts if there else []
    workers, _ = _room(arguments, cells)
    if known:
        groups = [[by_id[cell] for cell in ids] for ids in known]
        # On TPUs the queue says how many run.
        at_once = "" if arguments.on == "tpu" else f", {workers} at a time"
        print(f"{counted(len(known), 'cohort')}, fixed at the first launch{at_once}:")
    elif arguments.on != "local" and not arguments.workers:
        groups = [[cell] for cell in cells]
        print("each cell a cohort of its own:")
    else:
        groups = sharing(cells)
        print(
            f"{counted(len(groups), 'group')} could train together as far as the configs tell; the data, "
            f"{workers} at a time and their memory part them further. As they stand:"
        )
    cohorts = [make_cohort(group, out) for group in groups]
    for cohort in cohorts:
        done = "  done" if cohort.finished else ""
        ids = ", ".join(cell.id for cell in cohort.cells)
        print(f"  {cohort.id}  {counted(len(cohort.cells), 'cell')}: {ids}{done}")
    left = [cohort for cohort in cohorts if not cohort.finished and not cohort.held_back.endswith(CANCELLED)]
    for cohort in cohorts:
        if cohort.held_back.endswith(CANCELLED) and arguments.on != "slurm":  # which tells it itself
            print(f"  {cohort.id}  is left out: {cohort.held_back}; vlmscale sweep retry {out}")
    if found:
        _show_cost(left, found, arguments.on == "tpu")
    if arguments.on == "slurm":
        show_slurm(name, [cohort for cohort in cohorts if not cohort.finished], cells, arguments)
    elif arguments.on == "tpu":
        show_tpus(name, left, cells, arguments)
    else:
        _show_local(left)
    return 0


def _show_local(cohorts: list[Cohort]) -> None:
    from launch.devices import environment, needed, platform, units
    from launch.local import command

    for cohort in cohorts:
        mesh, there = cohort.cells[0].cell.mesh, units()
        taken = there[: needed(mesh, there, cohort.label)]
        words = command(cohort, taken[0] if platform() == "cpu" else None)
        print(*(f"{key}={value}" for key, value in environment(mesh, taken).items()), shlex.join(words))
