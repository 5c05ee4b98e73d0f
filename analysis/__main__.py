"""The command: python -m analysis DATA --out DIR."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from analysis.data import BUILT_IN, DataError
from analysis.report import write_report

EXAMPLE = """example:
  vlmscale analyze runs/demo --out runs/demo/report
  vlmscale analyze paper-reasoning --out runs/paper --bootstrap 10000 --json
"""


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="vlmscale analyze",
        description="Fit scaling laws to a sweep and write a report: what to deploy for an inference budget.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "data",
        metavar="DATA",
        help=f"a sweep directory with results.jsonl, a .jsonl or .csv file, or {' or '.join(BUILT_IN)}",
    )
    result.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the report goes")
    result.add_argument(
        "--bootstrap", metavar="R", type=_positive, default=2000, help="resamples (default 2000)"
    )
    result.add_argument(
        "--seed", metavar="S", type=_natural, default=0, help="seed of the resampling (default 0)"
    )
    result.add_argument(
        "--json", action="store_true", help="print the whole analysis as one JSON object on stdout"
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 with one line on stderr for unusable data or output place."""
    args = parser().parse_args(argv)
    try:
        result = write_report(args.data, args.out, bootstrap=args.bootstrap, seed=args.seed)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    files = [args.out / name for name in ("report.html", "report.md", "analysis.json")]
    for path in files:
        print(f"wrote {path}", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        for line in _lines(result):
            print(line)
    return 0


def _lines(result: dict[str, Any]) -> list[str]:
    """One line a group for the terminal: the ratio, or why there is none."""
    lines = []
    for group in result["groups"]:
        laws = group["laws"]
        verdict = laws[0]["verdict"] if laws else None
        if verdict is None:
            lines.append(f"{group['group']}: no law ({group['no_fit']})")
        elif verdict["identified"]:
            low, high = verdict["ratio_interval"]
            lines.append(
                f"{group['group']}: ratio {verdict['ratio']:.2f} [{low:.2f}, {high:.2f}] ({laws[0]['law']})"
            )
        else:
            lines.append(f"{group['group']}: not identified ({verdict['reason']})")
    return lines


if __name__ == "__main__":
    sys.exit(main())
