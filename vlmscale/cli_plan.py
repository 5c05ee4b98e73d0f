"""`vlmscale plan`: what training takes on a slice elsewhere. Heavy imports happen inside the command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.terminal import add_command, progress_bar, tell


def add_plan(commands: Any) -> None:
    """Declare it."""
    plan = add_command(
        commands,
        "plan",
        _plan,
        "memory by the TPU compiler and predicted time of training on a slice that need not be here; "
        "--config.KEY=VALUE overrides",
        "vlmscale plan configs/llava_finetune.py:qwen1.5-1.8b,144,tokenpacker --topology v5e-16",
    )
    plan.add_argument("what", metavar="CONFIG | SWEEP", help="config or sweep, FILE[:ARG]")
    plan.add_argument(
        "--topology", action="append", required=True, metavar="NAME", help="slice such as v5e-256; repeatable"
    )
    plan.add_argument(
        "--text-tokens",
        type=int,
        metavar="Q",
        help="the longest text of a conversation, where rows are as long as the longest needs "
        "(data.row_length=0; default data.max_text_tokens)",
    )
    plan.add_argument(
        "--prices", type=Path, metavar="FILE", help='money a chip and hour by generation: {"v5e": 1.2}'
    )
    plan.add_argument(
        "--compile",
        choices=("all", "ends", "none"),
        default="all",
        help="whose memory the TPU compiler is asked about: of all cells (default); of the least and the "
        "most visual tokens of each LLM and of three cells between, the others by arithmetic; of none",
    )
    plan.add_argument(
        "--effort",
        choices=("full", "fast"),
        default="full",
        help="of the compiler: fast takes a third of the time for almost the same bytes; what fills a device "
        "is compiled with full effort all the same",
    )
    plan.add_argument(
        "--calibration", type=Path, metavar="FILE", help="efficiencies that `vlmscale bench step` measured"
    )
    plan.add_argument("--workers", type=int, help="programs compiled at a time (default: half the cores)")
    plan.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    plan.set_defaults(takes_config=True)


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs, and a device must not be taken for it
    from vlmscale.loading import find_config, load_cell, load_sweep
    from vlmscale.plan.ask import Answers
    from vlmscale.plan.compiled import needs_libtpu
    from vlmscale.plan.roofline import read_calibration
    from vlmscale.plan.slices import find_slice
    from vlmscale.plan.table import plan, read_prices, show, to_json

    slices = [find_slice(name) for name in arguments.topology]
    if arguments.compile != "none" and not all(place.generation.gpu for place in slices):
        needs_libtpu()
    for name in ("text_tokens", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be above 0")
    prices = read_prices(arguments.prices) if arguments.prices else {}
    path = find_config(arguments.what.partition(":")[0])
    if "def get_sweep(" in path.read_text(encoding="utf-8"):
        cells = load_sweep(arguments.what, overrides, planned=True).cells
    else:
        cells = [load_cell(arguments.what, overrides)]
    if any(cell.data.packing == "pack" for cell in cells):
        tell("data.packing=pack: planned with one picture a row; packed rows have more (docs/plan.md)")
    bar = progress_bar()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    answers = Answers(cells, arguments.compile, root / "vlmscale" / "plans", arguments.effort)
    rows, sums = plan(
        cells,
        arguments.topology,
        answers,
        prices,
        lambda done, total: bar("planning", done, total),
        arguments.text_tokens,
        arguments.workers or max(1, len(os.sched_getaffinity(0)) // 2),
        read_calibration(arguments.calibration) if arguments.calibration else None,
    )
    print(to_json(rows, sums, answers) if arguments.json else show(rows, sums, answers.check()))
    if not all(row.fits for row in rows):
        raise UserError("not all fit; see the table")
    return 0
