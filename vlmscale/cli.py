"""`vlmscale COMMAND`: the composition root. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmscale import __version__
from vlmscale.cli_advise import add_advise
from vlmscale.cli_bench import add_bench
from vlmscale.cli_data import add_data
from vlmscale.cli_evaluate import DTYPES, add_distributed, add_evaluate
from vlmscale.cli_plan import add_plan
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, UserError, disk_fault
from vlmscale.terminal import add_command, progress_bar, tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 2 a user's mistake, 42 saved and to be run again."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["analyze"]:  # analysis parses its own words
        from analysis.__main__ import main as analyze

        try:
            return analyze(words[1:])
        except KeyboardInterrupt:
            return 130
    # Configs are passed on as they stand; every other unknown word is a mistake.
    overrides = [word for word in words if word.startswith("--config.")]
    arguments = _parser().parse_args([word for word in words if not word.startswith("--config.")])
    if overrides and not getattr(arguments, "takes_config", False):
        print(f"vlmscale {arguments.command}: takes no {overrides[0]}", file=sys.stderr)
        return EXIT_USER
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if only_cpu_here():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not getattr(arguments, "distributed", ""):
        return _run(arguments, overrides)
    try:
        code = _run(arguments, overrides)
    except Exception:  # told here, for `leave` does not return to who would
        traceback.print_exc()
        code = 1
    if code not in (0, EXIT_AGAIN):  # all end together with these; of others jax would wait for minutes
        from vlmscale.distributed import leave

        leave(code)
    return code


def only_cpu_here(devices: Path = Path("/dev")) -> bool:
    """Whether libtpu is installed, as for `vlmscale plan`, on a machine that has neither a TPU nor a GPU.

    There jax would look for a TPU, which takes seconds and ends in a complaint.
    """
    kinds = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
    return find_spec("libtpu") is not None and not any(any(devices.glob(kind)) for kind in kinds)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run a command; what the user can mend becomes one line and a code."""
    try:
        code: int = arguments.run(arguments, overrides)
        return code
    except UserError as error:
        what = f" {arguments.what}" if arguments.command in ("data", "bench") else ""
        print(f"vlmscale {arguments.command}{what}: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("stopped; run again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        where = fault.filename or getattr(arguments, "out", None) or getattr(arguments, "run_dir", "disk")
        print(f"vlmscale {arguments.command}: {where}: {fault.strerror}", file=sys.stderr)
        return EXIT_USER


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmscale",
        description="Inference-optimal scaling laws for vision-language models.",
        epilog="example: vlmscale demo",
    )
    parser.add_argument("--version", action="version", version=f"vlmscale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = add_command(
        commands,
        "demo",
        _sweep_run,
        "train the demo sweep and write its report; --config.KEY=VALUE overrides",
        "vlmscale demo --out runs/demo",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="sweep directory (default runs/demo)"
    )
    demo.set_defaults(sweep="configs/sweeps/demo.py", workers=None, memory=None, takes_config=True)

    train = add_command(
        commands,
        "train",
        _train,
        "train one cell",
        "vlmscale train --config configs/llava_tiny.py --config.data.records=mix.json "
        "--config.data.images=DIR --out RUN",
    )
    train.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="config file; --config.KEY=VALUE overrides"
    )
    train.add_argument(
        "--out", type=Path, required=True, help="run directory; an unfinished run in it is resumed"
    )
    add_distributed(train)
    train.set_defaults(takes_config=True)

    add_evaluate(commands)
    add_plan(commands)
    add_bench(commands)
    add_advise(commands)
    _add_convert(commands)
    add_data(commands)
    _add_sweep(commands)
    tower = add_command(
        commands, "tower", _tower, "train the demo's vision tower", "vlmscale tower --out tower.safetensors"
    )
    tower.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    tower.add_argument(
        "--steps", type=int, default=None, help="fewer steps for a trial (default: the shipped tower's)"
    )
    commands.add_parser("analyze", help="fit scaling laws and write a report (see vlmscale analyze --help)")
    return parser


def _add_convert(commands: Any) -> None:
    convert = add_command(
        commands,
        "convert",
        _convert,
        "write a trained run as a Hugging Face directory, or check, cast and split such a directory",
        "vlmscale convert --run RUN --out DIR",
    )
    source = convert.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="a trained run")
    source.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face directory")
    convert.add_argument(
        "--out", type=Path, required=True, help="directory to write; nothing in it is replaced"
    )
    convert.add_argument(
        "--part", choices=("all", "llm", "tower"), default="all", help="one part of a LLaVA (--model)"
    )
    convert.add_argument("--dtype", choices=DTYPES, help="what tensors are cast to (default: as they are)")


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="run sweeps of cells").add_subparsers(
        dest="what", required=True
    )
    run = add_command(
        sweep,
        "run",
        _sweep_run,
        "train and evaluate all cells and write the report; --config.KEY=VALUE overrides",
        "vlmscale sweep run configs/sweeps/demo.py --out DIR",
    )
    run.add_argument("sweep", metavar="SWEEP", help="file with get_sweep(overrides)")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--workers", type=int, default=None, help="processes at a time (default: one a core)")
    run.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="what a process may take, for planning cohorts (default: an equal share of this machine's free "
        "memory; on an accelerator name that of the device)",
    )
    run.set_defaults(takes_config=True)
    status = add_command(
        sweep, "status", _sweep_status, "the state of every cell", "vlmscale sweep status DIR"
    )
    status.add_argument("out", type=Path, metavar="DIR")
    status.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )


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


def _sweep_run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.local import cores, run_cohorts
    from launch.state import collect, open_sweep
    from vlmscale.evaluate.items import check_files
    from vlmscale.loading import load_sweep
    from vlmscale.records import Status

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers}: must be above 0")
    sweep = load_sweep(arguments.sweep, overrides)
    check_files([cell.evaluate for cell in sweep.cells])
    cells = open_sweep(sweep, arguments.out)
    if all(cell.finished for cell in cells):
        results = collect(cells, arguments.out)
        print(f"all {len(cells)} cells are done: {results}")
        _report(results)
        return 0
    import jax

    from launch.cohorts import fix_cohorts
    from vlmscale.train.prepared import prepare
    from vlmscale.train.run import open_run

    jax.config.update("jax_platforms", "cpu")  # this process must not hold the devices that its workers need
    prepared = prepare([cell.cell for cell in cells], arguments.out / "data", progress_bar(), tell)
    print(prepared.manifest["summary"], file=sys.stderr)
    memory = None if arguments.memory is None else arguments.memory * 2**30
    cohorts = fix_cohorts(cells, arguments.out, prepared, arguments.workers or len(cores()), memory)
    for cohort in cohorts:
        for cell in cohort.cells:
            open_run(cell.cell, cell.path, prepared.path, sweep.name, cohort.id)
    if run_cohorts(cohorts, arguments.workers):
        print("stopped; every cell is saved, run again to go on", file=sys.stderr)
        return EXIT_AGAIN
    failed = [(cohort, cell) for cohort in cohorts for cell in cohort.cells if not cell.finished]
    for cohort, cell in failed:
        reason = Status(cell.path).read()["last_error"] or "it ended without a word"
        print(f"{cell.label} ({cell.id}) failed: {reason} (see {cohort.path / 'log.txt'})", file=sys.stderr)
    results = collect(cells, arguments.out)
    print(f"results: {results}")
    if failed:
        return 1
    _report(results)
    return 0


def _sweep_status(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.state import CellDirectory, steps_done
    from vlmscale.config import from_dict
    from vlmscale.records import Status, read_json

    rows = []
    for name in read_json(arguments.out / "sweep.json")["cells"]:
        path = arguments.out / "cells" / name
        spec = read_json(path / "spec.json") if (path / "spec.json").exists() else None
        status = Status(path).read()
        row = {"cell_id": name, "cell": "", "step": 0, "steps": 0} | {
            k: status[k] for k in ("state", "attempts", "last_error")
        }
        if spec:
            cell = CellDirectory(name, from_dict(spec["config"]), path)
            row |= {"cell": cell.label, "step": steps_done(cell), "steps": cell.cell.train.steps}
        rows.append(row)
    if arguments.json:
        print(json.dumps({"cells": rows}))
        return 0
    width = max((len(row["cell"]) for row in rows), default=0)
    for row in rows:
        print(
            f"{row['cell_id']}  {row['cell']:{width}} {row['state']:9} {row['step']:>6}/{row['steps']:<6} "
            f"attempts {row['attempts']}  {row['last_error'] or ''}"
        )
    states = Counter(row["state"] for row in rows)
    print(f"{len(rows)} cells: {', '.join(f'{count} {state}' for state, count in states.most_common())}")
    return 0


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.distributed import agree, leader, start, wait_for_leader
    from vlmscale.evaluate.items import check_files
    from vlmscale.loading import load_cell
    from vlmscale.records import Status
    from vlmscale.train.cohort import Member
    from vlmscale.train.loop import PreemptedError, train
    from vlmscale.train.prepared import MANIFEST, Prepared, load_manifest, prepare
    from vlmscale.train.run import exclusive, keep_programs, open_run

    cell, run = load_cell(arguments.config, overrides), arguments.out
    check_files([cell.evaluate])
    keep_programs()
    start(arguments.distributed)
    data = run / "data"
    if leader():
        open_run(cell, run, data, "")
        prepared = prepare([cell], data, progress_bar(), tell)
    else:
        wait_for_leader(data / MANIFEST)
        prepared = Prepared(data, load_manifest(data))
    if agree(int((run / "done.json").exists())):
        print(f"{run}: already trained")
        return 0
    if leader():
        print(prepared.manifest["summary"], file=sys.stderr)
        if prepared.manifest["quarantined"]:
            print(f"set aside and why: {prepared.path / 'quarantine.jsonl'}", file=sys.stderr)
    bar = progress_bar()

    def show(step: int, steps: int, text: str) -> None:
        if leader():
            bar(f"training, {text}", step, steps)

    try:
        with exclusive(run, wait=False) if leader() else contextlib.nullcontext():
            train([Member(cell, run)], run, prepared, show, tell if leader() else lambda line: None)
    except PreemptedError as error:
        print(error, file=sys.stderr)
        return EXIT_AGAIN
    except (FloatingPointError, UserError) as error:
        if leader():
            Status(run).update(state="failed", last_error=str(error))
        if isinstance(error, UserError):
            raise
        print(f"vlmscale train: {error}", file=sys.stderr)
        return 1
    if leader():
        Status(run).update(state="trained")
        print(f"trained: {run} ({cell.train.steps} steps); next: vlmscale evaluate --run {run}")
    return 0


def _convert(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.convert import convert_directory, export_run

    left: list[str] = []
    if arguments.model:
        report, written = convert_directory(arguments.model, arguments.out, arguments.part, arguments.dtype)
        print(f"{arguments.model}: {report}", file=sys.stderr)
        left = report.not_copied
    else:
        from vlmscale.evaluate.loaded import load_run

        if arguments.part != "all":
            raise UserError(f"--part {arguments.part}: goes with --model")
        written = export_run(load_run(arguments.run_dir, "float32"), arguments.out, arguments.dtype)
    for path in written:
        print(f"wrote {path}")
    if left:
        print(f"not copied: {', '.join(left)}", file=sys.stderr)
    return 0


def _tower(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.records import make_directory
    from vlmscale.train.tower import train_tower

    if arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is a directory; name the file to write")
    if arguments.steps is not None and arguments.steps < 1:
        raise UserError(f"--steps={arguments.steps}: must be above 0")
    make_directory(arguments.out.parent)
    bar = progress_bar()
    train_tower(arguments.out, arguments.steps, lambda step, steps, text: bar(text, step, steps))
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
