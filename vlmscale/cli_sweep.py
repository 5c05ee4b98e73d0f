"""`vlmscale sweep` but for its `run`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlmscale.cli_evaluate import add_distributed
from vlmscale.cli_launch import add_report, add_run, where
from vlmscale.errors import UserError
from vlmscale.terminal import add_command, tell


def add_sweep(commands: Any) -> None:
    """Declare the commands of sweeps."""
    sweep = commands.add_parser("sweep", help="run sweeps of cells").add_subparsers(
        dest="what", required=True
    )
    add_run(sweep)
    _add_work(sweep)
    add_report(sweep)
    status = add_command(
        sweep, "status", _status, "the state of every cell", "vlmscale sweep status DIR --watch"
    )
    status.add_argument("out", type=where, metavar="DIR")
    status.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    status.add_argument("--watch", action="store_true", help="show it every 5 seconds until nothing is left")
    for name, run, about in (
        ("retry", _retry, "make failed and cancelled cells pending again, for the next run"),
        ("cancel", _cancel, "cancel cells that wait, and ask who works on others to save and stop"),
    ):
        command = add_command(sweep, name, run, about, f"vlmscale sweep {name} DIR CELL")
        command.add_argument("out", type=where, metavar="DIR")
        command.add_argument("cells", nargs="*", metavar="CELL", help="cell ids (default: all)")
    collect = add_command(
        sweep,
        "collect",
        _collect,
        "the rows of finished cells of one or several sweeps, as one file",
        "vlmscale sweep collect runs/here copies/there --out all.jsonl",
    )
    collect.add_argument("outs", type=where, nargs="+", metavar="DIR")
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


def _add_work(sweep: Any) -> None:
    work = add_command(
        sweep,
        "work",
        _work,
        "train and evaluate one cohort of a sweep that was launched: what runs inside a job",
        "vlmscale sweep work DIR --cohort ID --distributed auto",
    )
    work.add_argument("out", type=where, metavar="DIR", help="a directory, or gs://BUCKET/PATH")
    work.add_argument("--cohort", required=True, metavar="ID", help="of sweep.json; of one cell its own id")
    work.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="of gs://: where this process keeps its files; those that are there are not fetched again "
        "(default: a temporary directory)",
    )
    add_distributed(work)


def _push(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from launch.mirror import told
    from launch.upload import adopt_cohorts, upload

    with told():
        adopt_cohorts(arguments.out, arguments.address)  # a retry there may have parted some
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
