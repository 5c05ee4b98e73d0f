"""How full packed rows are, and how long a plan takes, against the bound and against LLaVA's own grouping.

    python benchmarks/packing.py                      # 665,298 records, V in 1, 16, 144, 576; under a minute
    python benchmarks/packing.py --records 20000      # a small one
    python benchmarks/packing.py --json               # the same as one JSON object

The records are drawn as the lengths of LLaVA's instruction mix: text log-normal (mu 5.0, sigma 0.9) within
8 to 1,900 tokens, 6% without an image; rows have 2,048 positions, and what is longer is truncated. For each
number of visual tokens V: rows a block (G) and its image slots (P), as `choose_shape` finds them; the
shares of positions and slots that are real; the bound that no plan can exceed; the seconds from lengths to
the first plan, shape included, and to that of the next epoch. The peer is LLaVA's
`group_by_modality_length` (batches of 16 on 8 devices), its rows padded to the longest of each device's
batch; the last column is our share over its. Text tokens serve as the whitespace words by which the peer
sorts, which favours it.

All of it runs on one core. The exit code is 1 if a row missed its limits: 98% of positions or 99% of the
bound, 95% of slots, 20 seconds to the first plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlmscale.data.packing import choose_shape, group_by_modality_length, padded_share, plan, upper_bound

RECORDS = 665_298  # of llava_v1_5_mix665k
LENGTH = 2048
PEER_BATCH, PEER_DEVICES = 16, 8
LEAST_POSITIONS, LEAST_OF_BOUND, LEAST_SLOTS, MOST_SECONDS = 0.98, 0.99, 0.95, 20.0
COLUMNS = ("V", "G", "P", "positions", "of bound", "bound", "slots", "first s", "next s", "peer", "ratio")


def instruction_mix(records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens and image counts of each record."""
    rng = np.random.default_rng(seed)
    text = np.clip(np.rint(rng.lognormal(5.0, 0.9, records)), 8, 1900).astype(np.int64)
    return text, (rng.random(records) >= 0.06).astype(np.int64)


def row(text: np.ndarray, images: np.ndarray, visual_tokens: int, seed: int) -> dict[str, float]:
    """The measurements of one V, by column."""
    sizes = np.minimum(text + images * visual_tokens, LENGTH)
    start = time.perf_counter()
    shape = choose_shape(sizes, images, LENGTH)
    made = plan(sizes, images, shape, seed, epoch=0)
    planned = time.perf_counter()
    plan(sizes, images, shape, seed, epoch=1)
    end = time.perf_counter()
    used, bound = made.utilization(sizes, images, shape), upper_bound(sizes, images, shape)
    order = group_by_modality_length(text, images > 0, PEER_BATCH, PEER_DEVICES, seed, epoch=0)
    peer = padded_share(order, sizes, PEER_BATCH)
    values = (
        visual_tokens,
        shape.rows,
        shape.images,
        used.positions,
        used.positions / bound,
        bound,
        used.slots,
    )
    times = (planned - start, end - planned)
    return dict(zip(COLUMNS, (*values, *times, peer, used.positions / peer), strict=True))


def holds(found: dict[str, float]) -> bool:
    """Whether a row keeps the limits."""
    full = found["positions"] >= LEAST_POSITIONS or found["of bound"] >= LEAST_OF_BOUND
    return full and found["slots"] >= LEAST_SLOTS and found["first s"] <= MOST_SECONDS


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[1, 16, 144, 576])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    text, images = instruction_mix(args.records, args.seed)
    rows = [row(text, images, tokens, args.seed) for tokens in args.visual_tokens]
    if args.json:
        print(json.dumps({"records": args.records, "length": LENGTH, "rows": rows}))
    else:
        print("  ".join(f"{name:>9}" for name in COLUMNS))
        for found in rows:
            cells = [f"{v:9d}" if isinstance(v, int) else f"{v:9.4f}" for v in found.values()]
            print("  ".join(cells) + ("" if holds(found) else "  MISSED"))
    return 0 if all(map(holds, rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
