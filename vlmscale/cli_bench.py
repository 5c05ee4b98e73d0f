"""`vlmscale bench latency|step`: times of this device. Heavy imports happen inside the command."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.terminal import add_command, names, progress_bar, tell, whole_numbers


def add_bench(commands: Any) -> None:
    """Declare it."""
    bench = commands.add_parser("bench", help="time this device").add_subparsers(dest="what", required=True)
    latency = add_command(
        bench,
        "latency",
        _latency,
        "time prefill, decoding, tower and compressor with random weights, and fit a model to the times",
        "vlmscale bench latency --llm qwen1.5-0.5b,qwen1.5-1.8b --visual-tokens 1,16,144,576 --text-tokens 50"
        " --batch 1,8 --out latency.json",
    )
    add = latency.add_argument
    add("--llm", required=True, metavar="NAMES", help="sizes such as qwen1.5-0.5b,toy-375k")
    add("--visual-tokens", required=True, metavar="V", help="counts such as 1,16,144")
    add("--text-tokens", required=True, metavar="Q", help="text tokens of the prompt, such as 50,200")
    add("--batch", default="1", metavar="B", help="answers at once, such as 1,8 (default 1)")
    add("--gen-tokens", type=int, default=8, metavar="G", help="tokens of an answer (default 8)")
    add(
        "--tower", default="", metavar="NAME", help="time this tower, too, such as clip-vit-large-patch14-336"
    )
    add("--compressor", default="", metavar="NAME[:OPTIONS]", help="with --tower: such as pool")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32 on CPU, else bfloat16")
    add("--attention", default="xla", metavar="BACKEND", help="xla (default), cudnn or splash")
    add("--repeats", type=int, default=5, help="timings of which the median counts (default 5)")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    add("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    _add_step(bench)


def _add_step(bench: Any) -> None:
    step = add_command(
        bench,
        "step",
        _step,
        "time training steps with random weights, calibrate the plan's roofline on the first and compare the "
        "others; --config.KEY=VALUE overrides",
        "vlmscale bench step configs/llava_finetune.py:qwen1.5-0.5b,144,tokenpacker "
        "configs/llava_finetune.py:qwen1.5-1.8b,144,tokenpacker --config.train.batch_size=8 --out h200.json",
    )
    add = step.add_argument
    add("configs", nargs="+", metavar="CONFIG", help="FILE[:ARG]; the first calibrates")
    add("--length", type=int, metavar="T", help="positions of a row (default: as vlmscale plan has it)")
    add("--steps", type=int, default=5, help="steps of which the median counts (default 5)")
    add("--out", type=Path, metavar="FILE", help="JSON file for vlmscale plan --calibration")
    add("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    step.set_defaults(takes_config=True)


def _step(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.config import image_slots
    from vlmscale.loading import load_cell
    from vlmscale.plan.calibrate import calibrate, compare, place_here, time_step
    from vlmscale.plan.fit import lengths_of
    from vlmscale.records import make_directory, write_json

    if arguments.steps < 1:
        raise UserError(f"--steps={arguments.steps}: must be above 0")
    cells = [load_cell(config, overrides) for config in arguments.configs]
    lengths = [arguments.length or lengths_of(cell).row for cell in cells]
    for cell, length in zip(cells, lengths, strict=True):
        most = image_slots(cell)
        if length <= most + 1:
            raise UserError(f"--length={length}: leaves no text behind the {most} tokens of a picture")
    place, bar, timed = place_here(), progress_bar(), []
    for number, (cell, length) in enumerate(zip(cells, lengths, strict=True), 1):
        timed.append(time_step(cell, place, length, arguments.steps))
        bar("timing", number, len(cells))
    shares = calibrate(timed[0], place)
    kind = place.generation.device.kind
    result = {
        "device": kind,
        "devices": place.devices,
        "efficiencies": {kind: shares._asdict()},
        "cells": compare(timed, place, shares),
    }
    if arguments.out:
        make_directory(arguments.out.absolute().parent)
        write_json(arguments.out, result)
        tell(f"wrote {arguments.out}")
    print(json.dumps(result) if arguments.json else _steps(result))
    return 0


def _steps(result: dict[str, Any]) -> str:
    """Measured beside predicted, the calibrating cell first."""
    shares = result["efficiencies"][result["device"]]
    lines = [
        f"{result['devices']} x {result['device']}; "
        + ", ".join(f"{name} at {share:.0%}" for name, share in shares.items()),
        f"{'LLM':18} {'V':>4} {'batch':>5} {'T':>5} {'step s':>8} {'predicted':>9} {'error':>6} {'bound':>8} "
        f"{'GiB':>7} {'peak':>7} {'predicted':>9}",
    ]
    for row in result["cells"]:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        lines.append(
            f"{row['llm']:18} {row['visual_tokens']:4} {row['batch_size']:5} {row['length']:5} "
            f"{row['measured_s']:8.3f} {row['predicted_s']:9.3f} "
            f"{row['predicted_s'] / row['measured_s'] - 1:6.0%} {row['bound']:>8} "
            f"{row['compiler_bytes'] / 2**30:7.2f} {peak:>7} {row['predicted_bytes'] / 2**30:9.2f}"
        )
    return "\n".join(lines)


def _latency(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import jax

    from analysis.latency import FORM, KIND, fit_models
    from analysis.values import DataError
    from vlmscale.attention import BACKENDS
    from vlmscale.evaluate.latency import Grid, measure
    from vlmscale.records import make_directory, write_json

    if arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is a directory; name the file to write")
    if arguments.attention not in BACKENDS:
        raise UserError(f"--attention {arguments.attention}: unknown (known: {', '.join(BACKENDS)})")
    grid = Grid(
        names(arguments.llm, "--llm"),
        whole_numbers(arguments.visual_tokens, "--visual-tokens"),
        whole_numbers(arguments.text_tokens, "--text-tokens"),
        whole_numbers(arguments.batch, "--batch"),
        arguments.gen_tokens,
        arguments.tower,
        arguments.compressor,
        arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        arguments.attention,
        arguments.repeats,
    )
    make_directory(arguments.out.absolute().parent)
    bar = progress_bar()
    measured = measure(grid, lambda done, total: bar("timing", done, total))
    models, reason = None, None
    try:
        models = fit_models(measured["llms"], measured["cells"], grid.dtype)
    except DataError as error:
        reason = str(error)
    result = {"kind": KIND, "version": FORM, **measured, "models": models, "no_fit": reason}
    write_json(arguments.out, result)
    tell(f"wrote {arguments.out}")
    print(json.dumps(result) if arguments.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    """What was timed, what was not, and how well the model fits."""
    where = f"{result['device']['kind']}, {result['dtype']}, attention {result['attention']}"
    lines = [
        f"{where}; milliseconds of a batch",
        f"{'LLM':18} {'V':>5} {'Q':>5} {'batch':>5} {'prefill':>10} {'a token':>10}",
    ]
    for cell in result["cells"]:
        lines.append(
            f"{cell['llm_name']:18} {cell['visual_tokens']:5} {cell['text_tokens']:5} {cell['batch']:5} "
            f"{cell['prefill_ms']:10.3f} {cell['decode_ms']:10.3f}"
        )
    images = result["images"] or {"tower_ms": [], "compressor_ms": []}
    for row in images["tower_ms"]:
        lines.append(f"{images['tower']}: batch {row['batch']}: {row['ms']:.3f}")
    by_count: dict[tuple[int, int], list[float]] = {}
    for row in images["compressor_ms"]:
        by_count.setdefault((row["batch"], row["visual_tokens"]), []).append(row["ms"])
    for (batch, count), found in by_count.items():
        median = statistics.median(found)
        lines.append(
            f"{images['compressor']}: V = {count}, batch {batch}: {median:.3f} (median over the LLMs)"
        )
    for row in result["failures"]:
        what = ", ".join(f"{key} {value}" for key, value in row.items() if key != "reason")
        lines.append(f"not timed: {what}: {row['reason']}")
    if result["failures"]:
        lines.append(f"{len(result['failures'])} not timed, {len(result['cells'])} cells timed")
    return "\n".join(lines + _fits(result))


def _fits(result: dict[str, Any]) -> list[str]:
    if result["models"] is None:
        return [f"no model of the times: {result['no_fit']}"]
    lines = [
        "relative errors of the fitted model: median, worst; on an LLM left out of the fit: median, worst"
    ]
    known = {"shape": "shape of the LLM known", "size": "from N alone"}
    for name, model in result["models"].items():
        for part, fit in model.items():
            keys = ("median_error", "worst_error", "left_out_median_error", "left_out_worst_error")
            errors = " ".join("      -" if fit[key] is None else f"{fit[key]:7.1%}" for key in keys)
            lines.append(f"  {part:8} {known[name]:24} {errors}")
    return lines
