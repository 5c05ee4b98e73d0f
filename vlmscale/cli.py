"""`vlmscale COMMAND`: the composition root. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmscale import __version__
from vlmscale.cli_advise import add_advise
from vlmscale.cli_bench import add_bench
from vlmscale.cli_data import add_data
from vlmscale.cli_evaluate import DTYPES, add_distributed, add_evaluate
from vlmscale.cli_launch import add_demo
from vlmscale.cli_plan import add_plan
from vlmscale.cli_schedule import add_schedule
from vlmscale.cli_sweep import add_sweep
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, PreemptedError, RetryableError, UserError, disk_fault
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
    except RetryableError as error:
        print(f"vlmscale {arguments.command}: {error}", file=sys.stderr)
        return 1
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

    add_demo(commands)
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
    add_schedule(commands)
    add_plan(commands)
    add_bench(commands)
    add_advise(commands)
    _add_convert(commands)
    add_data(commands)
    add_sweep(commands)
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


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.content import check_trained
    from vlmscale.distributed import agree, leader, start, wait_for_leader
    from vlmscale.evaluate.items import check_files
    from vlmscale.loading import load_cell
    from vlmscale.records import Status
    from vlmscale.train.cohort import Member
    from vlmscale.train.loop import train
    from vlmscale.train.prepared import MANIFEST, Prepared, load_manifest, prepare
    from vlmscale.train.run import exclusive, keep_programs, open_run

    cell, run = load_cell(arguments.config, overrides), arguments.out
    check_files([cell.evaluate])
    if cell.train.init_from:
        check_trained("train.init_from", Path(cell.train.init_from))
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
        if leader() and Status(run).read()["state"] == "preempted":  # during the last step
            Status(run).update(state="trained")
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
