"""The command: python -m analysis DATA... [--out DIR] [--json]; `vlmscale analyze` is the same."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from analysis.data import BUILT_IN, DataError
from analysis.values import MOST_TOKENS

EXAMPLE = """examples:
  vlmscale analyze runs/demo --out runs/demo/report
  vlmscale analyze paper-reasoning paper-ocr --out runs/paper
  vlmscale analyze my.csv --text-tokens 80 --gen-tokens 10 --batch 32 --intensity 206 --budget 5e12 --json
  vlmscale analyze my.csv --cost latency --latency latency.json --text-tokens 50 --gen-tokens 10 --batch 8
"""


_FLOPS_OPTIONS = ("system_tokens", "query_pass", "intensity", "tower_flops", "token_flops", "attention")


def _whole(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def _real(least: float, most: float, *, above: bool = False) -> Any:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (above and value == least):
            bound = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"expected a number {bound} {least:g} to {most:g}, got {text!r}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="vlmscale analyze",
        description=(
            "Fit scaling laws to a sweep: which LLM and how many visual tokens for an inference budget."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add(
        "data",
        metavar="DATA",
        nargs="+",
        help=f"sweep or run directories, .jsonl or .csv files, or {', '.join(BUILT_IN)}; several are pooled",
    )
    add(
        "--out", metavar="DIR", type=Path, help="write report.html, report.md, figures and analysis.json here"
    )
    add("--json", action="store_true", help="print the whole analysis as one JSON object on stdout")
    add(
        "--law",
        metavar="NAME",
        action="append",
        help="fit this law alone (may be repeated), or all (default)",
    )
    add(
        "--loss",
        choices=("raw", "log", "huber", "binomial"),
        default="raw",
        help="default raw: squares of the error",
    )
    add("--bootstrap", metavar="R", type=_whole(1), default=10_000, help="resamples (default 10000)")
    add("--seed", metavar="S", type=_whole(0), default=0, help="seed of the resampling (default 0)")
    _cost_arguments(result)
    return result


def _cost_arguments(result: argparse.ArgumentParser) -> None:
    """What an answer is charged, as the classes of `cost` take it."""
    add = result.add_argument_group("what an answer costs").add_argument
    add(
        "--cost",
        choices=("flops", "latency"),
        default="flops",
        help="FLOPs by arithmetic, or milliseconds: the rows' latency_ms, or by --latency",
    )
    add(
        "--latency",
        metavar="FILE",
        type=Path,
        help="what vlmscale bench latency wrote: its model, at --text-tokens, --gen-tokens and --batch",
    )
    add(
        "--text-tokens",
        metavar="Q",
        type=_real(0, MOST_TOKENS),
        help="prompt text tokens (default: the data's mean, or 50)",
    )
    add(
        "--gen-tokens",
        metavar="G",
        type=_real(0, MOST_TOKENS),
        default=0.0,
        help="decoded tokens (default 0)",
    )
    add(
        "--system-tokens",
        metavar="S",
        type=_real(0, MOST_TOKENS),
        default=0.0,
        help="further prompt tokens (default 0)",
    )
    add("--batch", metavar="B", type=_real(1, 1e9), default=1.0, help="answers decoded together (default 1)")
    add(
        "--intensity",
        metavar="I",
        type=_real(0, 1e9),
        default=0.0,
        help="peak FLOP/s over bytes/s of the hardware (about 206 for an H200); default 0: FLOPs alone",
    )
    add("--query-pass", action="store_true", help="the compressor runs the LLM over the query first (QueCC)")
    add(
        "--tower-flops",
        metavar="F",
        type=_real(0, 1e30),
        default=0.0,
        help="FLOPs of the tower an image (default 0)",
    )
    add(
        "--token-flops",
        metavar="F",
        type=_real(0, 1e30),
        default=0.0,
        help="FLOPs a visual token costs outside the LLM (default 0)",
    )
    add("--attention", action="store_true", help="count attention's quadratic term")
    add(
        "--budget",
        metavar="C",
        type=_real(0, 1e36, above=True),
        action="append",
        default=[],
        help="FLOPs (or ms) an answer; may be repeated; default: three inside the data",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 with one line on stderr for unusable data, options or output place."""
    args = parser().parse_args(argv)
    # The fits run on the CPU in float64 on any machine: no accelerator needs to be woken for them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return _run(args)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
    from analysis import prose
    from analysis.record import analysis_record, to_json
    from analysis.study import analyze

    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out}: is not a directory; --out names the directory of the report")
    analysis = analyze(args.data, _options(args), beside_paper=args.out is not None)
    if not analysis.dataset.comparable:
        cells = sum(study.table.n.size for study in analysis.studies)
        raise DataError(
            f"{analysis.dataset.source}: {cells} cells with an image measured; nothing can be compared"
        )
    if args.out is None:
        result = analysis_record(analysis)
    else:
        from analysis.report import report_of

        result = report_of(analysis, args.out)
        for name in ("report.html", "report.md", "analysis.json"):
            print(f"wrote {args.out / name}", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(to_json(result), end="")
    groups = [result, *result["more_groups"]]
    for line in [line for group in groups for line in group["warnings"]]:
        print(f"warning: {line}", file=sys.stderr)
    if not args.json:
        told = {study.table.group for study in analysis.told}
        lines = [prose.methods_summary(item) for item in analysis.comparisons]
        lines += [prose.no_law(list(analysis.studies))] if analysis.comparisons else []
        lines += [_line(group) for group in groups if group["group"] in told]
        print("\n".join(line for line in lines if line))
    return 0


def _options(args: argparse.Namespace) -> Any:
    from analysis.cost import FlopsCost
    from analysis.latency import read_latency
    from analysis.laws import LAWS
    from analysis.study import Options

    names = args.law or ["all"]
    laws = tuple(LAWS) if "all" in names else tuple(dict.fromkeys(name.replace("-", "_") for name in names))
    cost = FlopsCost(
        text_tokens=math.nan if args.text_tokens is None else args.text_tokens,
        gen_tokens=args.gen_tokens,
        system_tokens=args.system_tokens,
        query_pass=args.query_pass,
        batch=args.batch,
        intensity=args.intensity,
        fixed_flops=args.tower_flops,
        flops_per_token=args.token_flops,
        attention=args.attention,
    )
    latency = args.cost == "latency"
    if args.latency is not None and not latency:
        raise ValueError(f"--latency {args.latency}: goes with --cost latency")
    if latency:
        _check_latency(args)
    elif not args.gen_tokens and (args.intensity or args.batch != 1):
        raise ValueError("--batch and --intensity say what decoding costs; give --gen-tokens too")
    timed = read_latency(args.latency, "size") if args.latency is not None else None
    return Options(laws, args.bootstrap, args.seed, args.loss, cost, latency, timed, tuple(args.budget))


def _check_latency(args: argparse.Namespace) -> None:
    """Refuse what cannot change milliseconds: FLOPs options, and without a model also tokens and batch."""
    given = [f"--{name.replace('_', '-')}" for name in _FLOPS_OPTIONS if getattr(args, name)]
    if args.latency is not None and given:
        raise ValueError(
            f"--latency {args.latency}: is a model of milliseconds; {given[0]} cannot change them"
        )
    given += ["--gen-tokens"] if args.gen_tokens else []
    given += ["--text-tokens"] if args.text_tokens is not None else []
    given += ["--batch"] if args.batch != 1 else []
    if args.latency is None and given:
        raise ValueError(
            f"--cost latency takes milliseconds as measured; {', '.join(given)} cannot change them without "
            "--latency FILE"
        )


def _line(group: dict[str, Any]) -> str:
    """One line a group for the terminal: the ratio and the best V, or why there is none."""
    if group["best_law"] is None:
        return f"{group['group']}: no law ({group['no_fit'] or 'none of the asked laws can be fitted'})"
    law = group["laws"][group["best_law"]]
    if not law["ratio_identified"]:
        return f"{group['group']}: ratio not identified ({law['reason']})"
    low, high = law["ratio_ci"]
    text = f"{group['group']}: ratio {law['ratio']:.2f} [{low:.2f}, {high:.2f}] ({group['best_law']})"
    best = group["optimum"]
    if best is not None:
        text += f", V* = {best['visual_tokens']:.3g}" + (
            f" (a corner: {best['corner']})"
            if best["corner"]
            else f" [{best['ci'][0]:.3g}, {best['ci'][1]:.3g}]"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
