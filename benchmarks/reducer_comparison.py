"""What is best at equal FLOPs: fewer tokens in front of the LLM, fewer inside it, or a smaller LLM?

Asks every plain run of a trained sweep (configs/sweeps/reducer_comparison.py) with the reducers that need no
training, then draws error against FLOPs of one answer, a figure of all task groups, and prints what each way
reaches at the FLOPs of each other. FLOPs are those behind the tower, which all have in common.

    vlmscale sweep run configs/sweeps/reducer_comparison.py --out runs/reducers
    python benchmarks/reducer_comparison.py runs/reducers --out runs/reducers/comparison

What was asked already is not asked again. The figure needs nothing beside vlmscale.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from vlmscale.cli import main as vlmscale
from vlmscale.config import Cell, from_dict
from vlmscale.models.sizes import SIZES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARES = {True: (0.5, 0.25, 0.1), False: (0.5,)}  # of FastV, with all 64 patches and with fewer tokens
GUIDED = 0.25
WAYS = {  # in the order of the legend: colour and marker
    "all 64 patches": ("black", "*"),
    "pooled before the LLM": ("tab:blue", "o"),
    "other compressor": ("tab:cyan", "."),
    "dropped inside, no training": ("tab:orange", "x"),
    "compressed, then dropped": ("tab:red", "+"),
    "guided by toy-14k": ("tab:brown", "v"),
    "VoCo, trained": ("tab:green", "s"),
    "ATP, trained": ("tab:purple", "D"),
}


class Point(NamedTuple):
    """One set-up's mean over the tasks of a group."""

    way: str
    label: str
    llm: str
    flops: float
    error: float
    stderr: float


def ask(run: Path, *words: str) -> None:
    """Evaluate a run with overrides of its reducer."""
    if vlmscale(["evaluate", "--run", str(run), *(f"--config.reducer.{word}" for word in words)]):
        raise SystemExit(f"{run}: not evaluated with {' '.join(words)}")


def ask_all(runs: dict[Path, Cell]) -> None:
    """Every plain run with every reducer that needs no training."""
    guides = {
        cell.compressor.visual_tokens: run
        for run, cell in runs.items()
        if cell.llm.name == "toy-14k" and cell.compressor.name == "pool" and cell.reducer.name == "none"
    }
    for run, cell in runs.items():
        tokens, layers = cell.compressor.visual_tokens, SIZES[cell.llm.name].num_layers
        if cell.reducer.name != "none" or tokens < 16:
            continue
        for share in SHARES[tokens == 64]:
            ask(run, "name=fastv", "layer=1", f"keep={share}")
        if tokens == 64:
            if layers > 2:  # of two layers a schedule is FastV
                ask(run, "name=g_search", "schedule=(1,0.5,0.1)")
            like = "similar" if cell.compressor.name == "mlp" else "all"
            ask(run, "name=sparsity_similarity", "layer=1", f"options=patches={like}")
        if cell.compressor.name == "pool" and cell.llm.name != "toy-14k":
            guide = guides[tokens]
            ask(run, "name=sgl", "layer=1", f"keep={GUIDED}", f"guide={guide}")


def way_of(row: dict[str, Any]) -> str:
    """Which of `WAYS` a row belongs to."""
    reducer = row["reducer"] or ""
    for name, way in (("voco", "VoCo, trained"), ("atp", "ATP, trained"), ("sgl", "guided by toy-14k")):
        if reducer.startswith(name):
            return way
    whole = row["asked"] == 64  # mlp, or pool over windows of one patch
    if reducer:
        return "dropped inside, no training" if whole else "compressed, then dropped"
    if whole:
        return "all 64 patches"
    return "pooled before the LLM" if row["compressor"] == "pool" else "other compressor"


def points_of(runs: dict[Path, Cell]) -> dict[str, list[Point]]:
    """By task group, one for each run and reducer."""
    found: dict[tuple[str, str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run, cell in runs.items():
        for line in (run / "result.jsonl").read_text().splitlines():
            row = json.loads(line) | {"asked": cell.compressor.visual_tokens}
            label = row["compressor"] + f" {cell.compressor.visual_tokens}"
            if row["reducer"]:
                label += " " + row["reducer"].split(":guide=")[0]
            found[row["task_group"], way_of(row), label, row["llm_name"]].append(row)
    points: dict[str, list[Point]] = defaultdict(list)
    for (group, way, label, llm), rows in found.items():
        spent = float(np.mean([row["infer_flops"] - row["tower_flops"] for row in rows]))
        error = 1 - float(np.mean([row["score"] for row in rows]))
        spread = float(np.sqrt(np.sum([row["stderr"] ** 2 for row in rows]))) / len(rows)
        points[group].append(Point(way, label, llm, spent, error, spread))
    return dict(points)


def draw(points: dict[str, list[Point]], path: Path) -> None:
    """One panel a task group."""
    groups = sorted(points)
    figure, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 5), layout="constrained")
    for axis, group in zip(np.atleast_1d(axes), groups, strict=True):
        for way, (colour, marker) in WAYS.items():
            own = [point for point in points[group] if point.way == way]
            if not any(point.way == way for every in points.values() for point in every):
                continue
            x, y = [point.flops for point in own], [100 * point.error for point in own]
            axis.scatter(x, y, c=colour, marker=marker, s=90 if marker == "*" else 36, label=way, zorder=3)
        for name, (colour, _) in WAYS.items():
            best = frontier([point for point in points[group] if point.way == name])
            if name in ("pooled before the LLM", "dropped inside, no training", "VoCo, trained"):
                line = [point.flops for point in best], [100 * point.error for point in best]
                axis.plot(*line, c=colour, linewidth=1, zorder=2)
        axis.set(xscale="log", title=group, xlabel="FLOPs of an answer behind the tower", ylabel="error, %")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that nothing cheaper is as good as, in order of FLOPs."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.flops, point.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def at_most(points: Sequence[Point], budget: float) -> Point | None:
    """The best of those within a budget."""
    within = [point for point in points if point.flops <= budget]
    return min(within, key=lambda point: point.error) if within else None


def table(points: dict[str, list[Point]]) -> str:
    """Per task group, at shares of the FLOPs of the largest LLM with all patches: the best of each way."""
    ways = [way for way in WAYS if way != "all 64 patches"]
    lines = ["| group | FLOPs | smaller LLM, all patches | " + " | ".join(ways) + " |"]
    lines.append("|---" * (len(ways) + 3) + "|")
    for group in sorted(points):
        whole = sorted(point for point in points[group] if point.way == "all 64 patches")
        largest = max(point.flops for point in whole)
        for share in (0.1, 0.2, 0.3, 0.5, 0.7):
            cells = [shown(at_most(whole, share * largest))]
            for way in ways:
                cells.append(shown(at_most([p for p in points[group] if p.way == way], share * largest)))
            lines.append(f"| {group} | {100 * share:.0f}% | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(point: Point | None) -> str:
    """One cell of the table."""
    if point is None:
        return ""
    what = f"{point.llm.removeprefix('toy-')}, {point.label}"
    return f"{100 * point.error:.1f} ± {100 * point.stderr:.1f} ({what})"


def main() -> None:
    """Ask, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sweep", type=Path, help="directory of the trained sweep")
    parser.add_argument("--out", type=Path, required=True, help="PREFIX of the figure and the points")
    options = parser.parse_args()
    runs = {
        place.parent: from_dict(json.loads(place.read_text())["config"])
        for place in sorted(options.sweep.rglob("spec.json"))
        if (place.parent / "done.json").exists()
    }
    if not runs:
        raise SystemExit(f"{options.sweep}: no finished runs")
    ask_all(runs)
    points = points_of(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(points, options.out.with_suffix(".png"))
    rows = [{"group": group} | point._asdict() for group, own in points.items() for point in own]
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    print(table(points))


if __name__ == "__main__":
    main()
