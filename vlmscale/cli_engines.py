"""`vlmscale sweep run --on slurm|tpu`. Heavy imports happen inside the function that needs them."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscale.errors import UserError
from vlmscale.terminal import counted, tell

if TYPE_CHECKING:
    from launch.cohorts import Cohort
    from launch.site import Site
    from launch.state import CellDirectory
    from launch.tpu import Pods

Open = Callable[[], list["Cohort"]]  # prepares the data and opens directories

# Options that one engine alone reads; what is not given is None.
OPTIONS = {
    "local": (),
    "slurm": ("site",),
    "tpu": (
        *("bucket", "image", "slices", "queue", "spot", "service_account", "cache", "env"),
        *("max_restarts", "grace", "privileged", "manifests"),
    ),
}


def add_engines(run: Any) -> None:
    """Declare the options of engines; `launch.site.Site` and `launch.tpu.Pods` have their defaults."""
    slurm = run.add_argument_group("--on slurm (docs/slurm.md)")
    slurm.add_argument("--site", type=Path, metavar="FILE", help="what the cluster wants")
    tpu = run.add_argument_group("--on tpu (docs/tpu.md)")
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


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options of another engine than `--on` names, and what is missing or wrong of its own.

    Raises:
      UserError: with the option.
    """
    from launch.jobset import check_pods
    from launch.site import read_site

    for engine, names in OPTIONS.items():
        for name in names:
            if getattr(arguments, name) is not None and arguments.on != engine:
                option = "no-privileged" if name == "privileged" else name.replace("_", "-")
                raise UserError(f"--{option} is for --on {engine}; here it is --on {arguments.on}")
    if arguments.on == "tpu":
        check_pods(_pods(arguments))
    if arguments.on == "slurm":
        read_site(arguments.site)
    if arguments.on != "local" and arguments.workers and arguments.memory is None:
        raise UserError("--workers plans cohorts: give --memory GIB as well, that of all devices of a job")


def submit_to_slurm(
    name: str, cells: Sequence[CellDirectory], make: Open, arguments: argparse.Namespace
) -> int:
    """Queue what is left of a sweep on the cluster of this login node."""
    from launch.opening import turn
    from launch.sbatch import program, task_limit
    from launch.slurm import submit

    site, out = _site(cells, arguments), arguments.out
    task_limit(program)  # what can be known before the data is prepared
    program(["sbatch", "--test-only", *site.options, "--output=/dev/null", "--wrap=true"])
    cohorts = make()
    with turn(out, tell):
        done = submit(cohorts, out, name, site, arguments.workers, tell, program)
    if done.queued:
        tell(f"in the queue already: {len(done.queued)} of {counted(len(cohorts), 'cohort')}")
    for job, ids in done.jobs.items():
        print(f"job {job}: {len(ids)} of {counted(len(cohorts), 'cohort')}: {', '.join(ids)}")
    if not done.jobs:
        print("nothing new to submit")
    else:
        print(f"job {done.report}: the report, behind them\nvlmscale sweep status {out} --watch")
    return 0


def show_slurm(
    name: str, cohorts: Sequence[Cohort], cells: Sequence[CellDirectory], arguments: argparse.Namespace
) -> None:
    """Print the arrays and their scripts; what is queued is asked where there is a Slurm."""
    from launch.sbatch import program, queued
    from launch.slurm import plan, report_script, script

    site, out = _site(cells, arguments), arguments.out
    run = program if shutil.which("squeue") else None
    try:
        if run:
            queued(run)
    except UserError as error:
        tell(f"{error}; shown as if nothing were queued")
        run = None
    planned, waiting = plan(cohorts, [cell.id for cell in cells], out, site, tell, run)
    if waiting:
        print(f"in the queue already: {counted(len(waiting), 'cohort')}")
    if not planned:
        print("nothing new to submit")
        return
    for array in planned:
        words = ["sbatch", *array.words(arguments.workers), "<<'EOF'"]
        print(" ".join(words), *script(out, name, array, site), "EOF", sep="\n")
    print("sbatch --dependency=afterany:JOBS <<'EOF'", *report_script(out, name, site), "EOF", sep="\n")


def _site(cells: Sequence[CellDirectory], arguments: argparse.Namespace) -> Site:
    """The site, on which all cells fit."""
    from launch.site import read_site

    site = read_site(arguments.site)
    for cell in cells:
        site.shape(cell.cell.mesh, cell.label)
    return site


def apply_to_tpus(
    name: str, cells: Sequence[CellDirectory], make: Open, arguments: argparse.Namespace
) -> int:
    """Hand what is left of a sweep to the cluster that kubectl's config names."""
    from launch.kubectl import apply, check_cluster
    from launch.mirror import told
    from launch.pods import check_cells, jobs
    from launch.upload import adopt_cohorts, finished_there, upload

    pods, out, bucket = _pods(arguments), arguments.out, arguments.bucket
    check_cells(cells, bucket, pods)  # a mistake is told before the data is prepared
    check_cluster()
    with told():
        adopt_cohorts(out, bucket)  # and whether there is a bucket at all
        cohorts = make()
        upload(out, bucket, tell)
        over = finished_there(bucket)
    left = [cohort for cohort in cohorts if cohort.id not in over]
    for cohort in cohorts:
        if why := over.get(cohort.id):
            tell(f"{cohort.label} ({cohort.id}) is left out: {why}")
    if not left:
        print("nothing to submit")
        return 0
    paths = jobs(left, name, bucket, pods).write(arguments.manifests or out / "manifests")
    for line in apply(paths):
        print(line)
    print(f"vlmscale sweep status {arguments.bucket} --watch")
    return 0


def show_tpus(
    name: str, cohorts: Sequence[Cohort], cells: Sequence[CellDirectory], arguments: argparse.Namespace
) -> None:
    """Print the same jobs as commands of xpk; write the manifests where a folder is named."""
    from launch.pods import check_cells, jobs
    from launch.tpu import machine_of, xpk_command

    pods = _pods(arguments)
    check_cells(cells, arguments.bucket, pods)
    made = jobs(cohorts, name, arguments.bucket, pods)
    machine = machine_of(pods.slice)
    nodes = f"{counted(machine.hosts, 'node')} of {machine.kind}, --tpu-topology={pods.slice.topology}"
    print(f"each slice is a node pool of {nodes}")
    if not machine.xpk:
        print(f"xpk has no {pods.slice.name}: the same by xpk cannot be said")
    else:
        for job, command in made.commands.items():
            print(xpk_command(job, command, pods))
    print(f"what is done, failed or cancelled in {arguments.bucket} is left out at the launch")
    what = counted(len(cohorts), "manifest")
    if arguments.manifests is None:
        print(f"{what}; --manifests DIR writes them")
        return
    made.write(arguments.manifests)
    print(
        f"{what} in {arguments.manifests}, to look at: their jobs need what the launch puts into the bucket"
    )


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
    names = {"service_account": "account"} | {
        name: name for name in ("slices", "queue", "spot", "cache", "max_restarts", "grace", "privileged")
    }
    given = {ours: value for name, ours in names.items() if (value := getattr(arguments, name)) is not None}
    environment = {}
    for word in arguments.env or ():
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--env {word}: give NAME=VALUE")
        environment[name] = value
    return Pods(find_slice(arguments.topology), arguments.image, environment=environment, **given)
