"""`vlmscale plan`: what training takes on a slice elsewhere. Heavy imports happen inside the command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.terminal import add_command, progress_bar


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
    plan.add_argument("what", metavar="CONFIG | SWEEP", help="config FILE[:ARG], or a sweep file")
    plan.add_argument(
        "--topology", action="append", required=True, metavar="NAME", help="slice such as v5e-256; repeatable"
    )
    plan.add_argument(
        "--prices", type=Path, metavar="FILE", help='money a chip and hour by generation: {"v5e": 1.2}'
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    plan.set_defaults(takes_config=True)


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs, and a device must not be taken for it
    from vlmscale.loading import find_config, load_cell, load_sweep
    from vlmscale.plan.compiled import needs_libtpu
    from vlmscale.plan.slices import find_slice
    from vlmscale.plan.table import plan, read_prices, show, to_json

    for name in arguments.topology:
        find_slice(name)
    needs_libtpu()
    prices = read_prices(arguments.prices) if arguments.prices else {}
    path = find_config(arguments.what.partition(":")[0])
    if "def get_sweep(" in path.read_text(encoding="utf-8"):
        found = load_sweep(arguments.what, overrides).cells
    else:
        found = [load_cell(arguments.what, overrides)]
    cells = [
        (f"{cell.llm.name} {cell.compressor.name} {cell.compressor.visual_tokens}", cell) for cell in found
    ]
    bar = progress_bar()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    rows = plan(
        cells, arguments.topology, root / "vlmscale" / "plans", prices, lambda n, of: bar("planning", n, of)
    )
    print(to_json(rows) if arguments.json else show(rows))
    if not all(row.fits for row in rows):
        raise UserError("not all fit; see the table")
    return 0
