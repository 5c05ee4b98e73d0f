"""`vlmscale schedule`: how many visual tokens each layer of a trained model needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlmscale.cli_evaluate import DTYPES
from vlmscale.errors import UserError
from vlmscale.terminal import add_command, tell


def add_schedule(commands: Any) -> None:
    """Declare the command."""
    schedule = add_command(
        commands,
        "schedule",
        _schedule,
        "search for the fewest visual tokens that each layer of a trained model needs (G-Search, P-Sigmoid)",
        "vlmscale schedule --run RUN --tolerance 0.01",
    )
    schedule.add_argument("--run", type=Path, required=True, dest="run_dir", metavar="DIR")
    aim = schedule.add_mutually_exclusive_group(required=True)
    aim.add_argument(
        "--tolerance",
        type=float,
        help="greedy: by how much the score, 0 to 1, may be below the plain model's",
    )
    aim.add_argument(
        "--budget", type=float, help="sigmoid: the layers' FLOPs on a prompt, as a share of the plain model's"
    )
    schedule.add_argument("--trials", type=int, default=40, help="sigmoids to try (default 40)")
    schedule.add_argument("--items", type=int, default=200, help="calibration items (default 200)")
    schedule.add_argument(
        "--tasks", default="", help="comma-separated names (default: all of the run's validation data)"
    )
    schedule.add_argument("--data", type=Path, metavar="DIR", help="directory of task files NAME.jsonl")
    schedule.add_argument("--dtype", choices=DTYPES, help="default float32 on CPU, else bfloat16")
    schedule.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )


def _schedule(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.evaluate.items import words
    from vlmscale.evaluate.loaded import load_run
    from vlmscale.evaluate.scheduling import calibration_tasks, search, with_schedule
    from vlmscale.train.run import keep_programs

    tolerance, budget = arguments.tolerance, arguments.budget
    if tolerance is not None and not 0 <= tolerance < 1:
        raise UserError(f"--tolerance {tolerance:g}: 0 or above, and below 1")
    if budget is not None and not 0 < budget <= 1:
        raise UserError(f"--budget {budget:g}: a share above 0 and at most 1")
    for name in ("trials", "items"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be above 0")
    keep_programs()
    run = with_schedule(load_run(arguments.run_dir, arguments.dtype))
    tasks = calibration_tasks(run, words(arguments.tasks), arguments.data, arguments.items)
    plain, found = search(run, tasks, tolerance=tolerance, budget=budget, trials=arguments.trials, tell=tell)
    tokens = run.cell.compressor.visual_tokens
    # Six digits are enough for the count to come out, and short enough for a command line.
    shares = [round(count / tokens, 6) for count in found.counts]
    words_of = ",".join(f"{share:g}" for share in shares)
    chosen = f"--config.reducer.name=g_search '--config.reducer.schedule=({words_of},)'"
    if arguments.json:
        print(
            json.dumps(
                {
                    "run": str(arguments.run_dir),
                    "items": sum(len(task.items) for task in tasks),
                    "visual_tokens": list(found.counts),
                    "schedule": shares,
                    "score": found.score,
                    "plain_score": plain.score,
                    "prefill_flops_share": found.flops_share,
                }
            )
        )
        return 0
    print(f"visual tokens by layer: {' '.join(map(str, found.counts))}")
    share = f"{found.flops_share:.3f} of the plain prefill's FLOPs"
    print(f"score {found.score:.4f} (plain {plain.score:.4f}); {share}")
    print(f"vlmscale evaluate --run {arguments.run_dir} {chosen}")
    return 0
