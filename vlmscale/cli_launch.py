"""`vlmscale sweep run`, `sweep report`, `demo`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscale.errors import EXIT_AGAIN, UserError
from vlmscale.terminal import add_command, progress_bar, tell

if TYPE_CHECKING:
    from launch.cohorts import Cohort
    from launch.state import CellDirectory
    from launch.tpu import Pods
    from vlmscale.config import Sweep

# Options that one engine alone reads; what is not given is None.
_OF_ENGINE = {
    "local": (),
    "slurm": ("site",),
    "tpu": (
        *("bucket", "image", "slices", "queue", "spot", "service_account", "cache", "env"),
        *("max_restarts", "grace", "privileged", "manifests"),
    ),
}


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
        **{name: None for names in _OF_ENGINE.values() for name in names},
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
        "--out", type=Path, required=True, help="directory; several launchers on one share the work"
    )
    run.add_argument(
        "--on",
        choices=_OF_ENGINE,
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
    slurm = run.add_argument_group("--on slurm (docs/slurm.md)")
    slurm.add_argument("--site", type=Path, metavar="FILE", help="what the cluster wants")
    _add_tpu(run.add_argument_group("--on tpu (docs/tpu.md)"))
    run.set_defaults(takes_config=True)


def _add_tpu(tpu: Any) -> None:
    """Options of jobs on TPU slices; `launch.tpu.Pods` has their defaults."""
    tpu.add_argument("--topology", metavar="SLICE", help="of each job, such as v5e-256")
    tpu.add_argument("--slices", type=int, help="that one job spans (default 1)")
    tpu.add_argument("--image", help="of the container")
    tpu.add_argument("--bucket", metavar="gs://BUCKET/DIR", help="where the jobs keep the sweep")
    tpu.add_argument("--queue", help="of Kueue (default multislice-queue)")
    tpu.add_argument("--spot", action="store_true", default=None, help="on machines that may be taken away")
    tpu.add_argument("--cache", metavar="gs://BUCKET/DIR", help="of compiled programs")
    tpu.add_argument("--service-account", help="of Kubernetes, with rights to the bucket")
    tpu.add_argument("--max-restarts", type=int, help="of a job after faults (default 10)")
    tpu.add_argument("--grace", type=int, metavar="S", help="from SIGTERM to SIGKILL (default 120)")
    tpu.add_argument(
        "--no-privileged", dest="privileged", action="store_false", default=None, help="not as root"
    )
    tpu.add_argument("--env", action="append", metavar="NAME=VALUE", help="a variable of the container")
    tpu.add_argument("--manifests", type=Path, metavar="DIR", help="where they go (default OUT/manifests)")


def add_report(sweep: Any) -> None:
    """Declare `sweep report`."""
    report = add_command(
        sweep,
        "report",
        _report_sweep,
        "collect the results and write the report, as `run` does last",
        "vlmscale sweep report DIR",
    )
    report.add_argument("out", type=Path, metavar="DIR")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.state import directories, open_sweep
    from vlmscale.content import check_trained
    from vlmscale.evaluate.items import check_files
    from vlmscale.loading import load_sweep
    from vlmscale.records import make_directory

    _check_options(arguments)
    sweep = load_sweep(arguments.sweep, overrides)
    check_files([cell.evaluate for cell in sweep.cells])
    if arguments.on != "slurm":  # there a stage may wait for the one before it
        for cell in sweep.cells:
            if cell.train.init_from:
                check_trained("train.init_from", Path(cell.train.init_from))
    if arguments.dry_run:
        return _show_plan(sweep.name, directories(sweep, arguments.out), arguments)
    make_directory(arguments.out)
    with _turn(arguments.out):
        cells = open_sweep(sweep, arguments.out)
    if all(cell.finished for cell in cells):
        return _finish(arguments.out, f"all {len(cells)} cells are done")
    if arguments.on == "slurm":
        return _submit(sweep, cells, arguments)
    if arguments.on == "tpu":
        return _apply(sweep, cells, arguments)
    return _run_here(sweep, cells, arguments) or _finish(arguments.out, "results")


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong before anything is read."""
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers}: must be above 0")
    for engine, names in _OF_ENGINE.items():
        for name in names:
            if getattr(arguments, name) is not None and arguments.on != engine:
                option = "no-privileged" if name == "privileged" else name.replace("_", "-")
                raise UserError(f"--{option} is for --on {engine}; here it is --on {arguments.on}")
    if arguments.on != "local" and arguments.workers and arguments.memory is None:
        raise UserError("--workers plans cohorts: give --memory GIB as well, that of all devices of a job")


def _run_here(sweep: Sweep, cells: list[CellDirectory], arguments: argparse.Namespace) -> int:
    """Run what is left of a sweep; 42 where a signal stopped it, else 0, whatever came of the cells."""
    from launch.local import run_cohorts

    cohorts = _open_cohorts(sweep, cells, arguments)
    if run_cohorts(cohorts, arguments.workers):
        print("stopped; every cell is saved, run again to go on", file=sys.stderr)
        return EXIT_AGAIN
    return 0


def _submit(sweep: Sweep, cells: list[CellDirectory], arguments: argparse.Namespace) -> int:
    """Queue what is left of a sweep on the Slurm cluster."""
    from launch.sbatch import program
    from launch.site import read_site
    from launch.slurm import submit

    site = read_site(arguments.site)
    program(["sbatch", "--version"])  # before the data is prepared
    cohorts, out = _open_cohorts(sweep, cells, arguments), arguments.out
    with _turn(out):
        done = submit(cohorts, out, sweep.name, site, arguments.workers, program)
    if done.queued:
        tell(f"in the queue already: {len(done.queued)} of {len(cohorts)} cohorts")
    for job, ids in done.jobs.items():
        print(f"job {job}: {len(ids)} of {len(cohorts)} cohorts: {', '.join(ids)}")
    if not done.jobs:
        print("nothing new to submit")
    else:
        print(f"job {done.report}: the report, behind them\nvlmscale sweep status {out} --watch")
    return 0


def _apply(sweep: Sweep, cells: list[CellDirectory], arguments: argparse.Namespace) -> int:
    """Hand what is left of a sweep to the cluster that kubectl's config names."""
    from launch.mirror import upload

    from launch.kubectl import apply, check_cluster
    from launch.pods import jobs

    pods, out = _pods(arguments), arguments.out
    jobs([], sweep.name, arguments.bucket, pods)  # a mistake is told before the data is prepared
    check_cluster()
    cohorts = _open_cohorts(sweep, cells, arguments)
    left = [cohort for cohort in cohorts if not cohort.finished]
    manifests = arguments.manifests or out / "manifests"
    paths = jobs(left, sweep.name, arguments.bucket, pods).write(manifests)
    upload(out, arguments.bucket)
    for line in apply(paths):
        print(line)
    print(f"vlmscale sweep status {arguments.bucket} --watch")
    return 0


def _pods(arguments: argparse.Namespace) -> Pods:
    """What all jobs have in common, by the options that were given."""
    from launch.tpu import Pods
    from vlmscale.plan.slices import find_slice

    for name, example in (
        ("topology", "v5e-256"),
        ("image", "REGION-docker.pkg.dev/PROJECT/vlmscale/vlmscale:1"),
        ("bucket", "gs://BUCKET/runs/grid1"),
    ):
        if not getattr(arguments, name):
            raise UserError(f"--on tpu needs --{name}, such as --{name} {example}")
    names = {"slices": "slices", "queue": "queue", "spot": "spot", "cache": "cache"}
    names |= {"service_account": "account", "max_restarts": "max_restarts", "grace": "grace"}
    names |= {"privileged": "privileged"}
    given = {ours: value for name, ours in names.items() if (value := getattr(arguments, name)) is not None}
    environment = {}
    for word in arguments.env or ():
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--env {word}: give NAME=VALUE")
        environment[name] = value
    return Pods(find_slice(arguments.topology), arguments.image, environment=environment, **given)


def _open_cohorts(sweep: Sweep, cells: list[CellDirectory], arguments: argparse.Namespace) -> list[Cohort]:
    """Prepare the data, fix which cells train together, and open their directories."""
    import jax

    from launch.changes import forgive_failed
    from launch.cohorts import fix_cohorts
    from launch.directory import read_sweep
    from vlmscale.train.prepared import prepare
    from vlmscale.train.run import open_run

    out = arguments.out
    jax.config.update("jax_platforms", "cpu")  # this process must not hold the devices that its workers need
    with _turn(out):
        prepared = prepare([cell.cell for cell in cells], out / "data", progress_bar(), tell)
        print(prepared.manifest["summary"], file=sys.stderr)
        workers, memory = _room(arguments, cells)
        cohorts = fix_cohorts(cells, out, prepared, workers, memory)
        for cohort in cohorts:
            for cell in cohort.cells:
                open_run(cell.cell, cell.path, prepared.path, sweep.name, cohort.id)
    forgive_failed(read_sweep(out).crews())
    return cohorts


def _room(arguments: argparse.Namespace, cells: Sequence[CellDirectory]) -> tuple[int, float | None]:
    """Cohorts that run at a time, and bytes that each may take; None for a share of this machine's."""
    from launch.devices import needed, places

    memory = None if arguments.memory is None else arguments.memory * 2**30
    if arguments.on == "local":
        there = len(places())
        largest = max(needed(cell.cell.mesh, there, cell.label) for cell in cells)
        return arguments.workers or there // largest, memory
    return arguments.workers or len(cells), float("inf") if memory is None else memory


def _report_sweep(arguments: argparse.Namespace, overrides: list[str]) -> int:
    return _finish(arguments.out, "results")


def _finish(out: Path, what: str) -> int:
    """Collect the results, tell what is not done, and write the report where no cell failed."""
    from launch.directory import read_sweep
    from launch.outcome import CANCELLED
    from launch.results import collect
    from launch.status import cell_rows

    sweep = read_sweep(out)
    with _turn(out):
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
    from launch.state import check_sweep
    from vlmscale.records import Status

    out, by_id = arguments.out, {cell.id: cell for cell in cells}
    there = check_sweep(cells, out)
    print(f"sweep {name}: {_count(len(cells), 'cell')} in {out}")
    for cell in cells:
        state = Status(cell.path).read()["state"]
        print(f"  {cell.id}  {cell.label}  {cell.cell.train.steps} steps  {state}")
    known = read_sweep(out).cohorts if there else []
    workers, _ = _room(arguments, cells)
    if known:
        groups = [[by_id[cell] for cell in ids] for ids in known]
        print(f"{_count(len(known), 'cohort')}, fixed at the first launch, {workers} at a time:")
    elif arguments.on != "local" and not arguments.workers:
        groups = [[cell] for cell in cells]
        print("each cell a cohort of its own:")
    else:
        groups = sharing(cells)
        print(
            f"{_count(len(groups), 'group')} could train together as far as the configs tell; the data, "
            f"{workers} at a time and their memory part them further. As they stand:"
        )
    cohorts = [make_cohort(group, out) for group in groups]
    for cohort in cohorts:
        done = "  done" if cohort.finished else ""
        ids = ", ".join(cell.id for cell in cohort.cells)
        print(f"  {cohort.id}  {_count(len(cohort.cells), 'cell')}: {ids}{done}")
    left = [cohort for cohort in cohorts if not cohort.finished]
    if arguments.on == "slurm":
        _show_slurm(name, left, [cell.id for cell in cells], arguments)
    elif arguments.on == "tpu":
        _show_tpu(name, left, arguments)
    else:
        _show_local(left)
    return 0


def _show_local(cohorts: list[Cohort]) -> None:
    from launch.devices import environment, needed, places, platform
    from launch.local import command

    for cohort in cohorts:
        mesh, there = cohort.cells[0].cell.mesh, places()
        taken = there[: needed(mesh, len(there), cohort.label)]
        words = command(cohort, taken[0] if platform() == "cpu" else None)
        print(*(f"{key}={value}" for key, value in environment(mesh, taken).items()), shlex.join(words))


def _show_slurm(name: str, cohorts: list[Cohort], cells: list[str], arguments: argparse.Namespace) -> None:
    """Print the arrays and the scripts; what is queued is asked where there is a Slurm."""
    from launch.sbatch import program
    from launch.site import read_site
    from launch.slurm import plan, report_script, script

    site, out = read_site(arguments.site), arguments.out
    run = program if shutil.which("squeue") else None
    planned, queued = plan(cohorts, cells, out, site, run)
    if queued:
        print(f"in the queue already: {_count(len(queued), 'cohort')}")
    for array in planned:
        words = ["sbatch", *array.words(arguments.workers), "<<'EOF'"]
        print(" ".join(words), *script(out, name, array, site), "EOF", sep="\n")
    print("sbatch --dependency=afterany:JOBS <<'EOF'", *report_script(out, name, site), "EOF", sep="\n")


def _show_tpu(name: str, cohorts: list[Cohort], arguments: argparse.Namespace) -> None:
    """Print the same jobs as commands of xpk; write the manifests where a folder is named."""
    from launch.pods import jobs
    from launch.tpu import xpk_command

    pods = _pods(arguments)
    made = jobs(cohorts, name, arguments.bucket, pods)
    for job, command in made.commands.items():
        print(xpk_command(job, command, pods))
    if arguments.manifests is None:
        print(f"{_count(len(cohorts), 'manifest')}; --manifests DIR writes them")
        return
    made.write(arguments.manifests)
    print(
        f"{_count(len(cohorts), 'manifest')} in {arguments.manifests}: kubectl apply -f {arguments.manifests}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
