"""Figures of what follows from a law: the best number of visual tokens, and the cell to run next."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.optimum import best_tokens
from analysis.study import Study
from analysis.style import (
    BLUE,
    DARK,
    MOST_TILES,
    ORANGE,
    SMALL,
    Handle,
    add_colour_bar,
    add_legend,
    cell_grid,
    heat_map,
    log_axis,
    map_height,
    new_figure,
    styled,
    token_ticks,
    usable,
)
from analysis.units import percent, significant


@styled
def choice_figure(study: Study) -> Figure | None:
    """Histogram of V* over the resamples of the chosen law at the study's budget, on the measured V.

    With the law's own V* and interval, the model average, and the V that are as good as the best within one
    residual sd. None without an optimum or where every resample chooses the least or the largest V.
    """
    law, best = usable(study), study.optimum
    if law is None or best is None or not law.replicates.theta.shape[0]:
        return None
    ends = float(study.table.v.min()), float(study.table.v.max())
    draws = best_tokens(law.fit, law.replicates.theta, study.cost, study.budget, *ends)
    draws = draws[np.isfinite(draws)]
    at_low, at_high = (np.isclose(draws, end, rtol=1e-6, atol=0) for end in ends)
    if not draws.size or (at_low | at_high).all():
        return None
    title = f"{study.table.group}, {study.origin}: V* by the {law.fit.law.name} law at {_price(study)}"
    figure, axes = new_figure(title, 4.4)
    low, high = _choice_range(study, draws)
    log_axis(axes, "x", low, high)
    middle = np.log(np.quantile(draws, [0.025, 0.975]))
    number = int(np.clip(16 * np.log(high / low) / max(float(np.ptp(middle)), 1e-3), 24, 160))
    edges = np.geomspace(low, high, number + 1)
    share = 100 * np.histogram(draws, edges)[0] / draws.size
    axes.axvspan(*best.indifference, color="#E69F00", alpha=0.18, lw=0, zorder=0.5, gid="indifference")
    axes.stairs(share, edges, fill=True, color=BLUE, alpha=0.6, lw=0, zorder=2)
    top = float(share.max())
    axes.set_ylim(0, 1.32 * top)
    levels = np.asarray(MaxNLocator(5).tick_values(0, top))
    axes.set_yticks(levels[levels <= 1.02 * top])
    axes.axvline(best.v, ymax=1 / 1.32, color="black", lw=1.6, zorder=3)
    handles: list[Handle] = [
        Line2D([], [], color="black", lw=1.6, label=f"V* = {significant(best.v)}"),
        Patch(color=BLUE, alpha=0.6, lw=0, label="resamples"),
        Patch(color="#E69F00", alpha=0.18, lw=0, label="as good within one sd"),
    ]
    if best.v_interval is not None:
        handles.append(_bar(axes, best.v_interval, best.v, 1.09 * top, "s", BLUE, "95%, this law"))
    if study.averaged is not None:
        value, pair = study.averaged.visual_tokens, study.averaged.interval
        handles.append(_bar(axes, pair, value, 1.2 * top, "D", ORANGE, "95%, laws averaged"))
    counts = study.table.token_counts
    counts = counts[(counts >= low) & (counts <= high)]
    axes.plot(counts, np.zeros(counts.size), color="black", marker="^", ms=7, ls="", clip_on=False, zorder=5)
    handles.append(Line2D([], [], color="black", marker="^", ms=6, ls="", label="measured V"))
    token_ticks(axes.xaxis, counts)
    axes.set_xlabel("best visual tokens V*")
    axes.set_ylabel("resamples, %")
    for name, mask, side in (("least", at_low, "left"), ("largest", at_high, "right")):
        if mask.any():
            text, place = (
                f"{percent(mask.mean(), 0)} at the {name} V",
                (0.01 if side == "left" else 0.99, 0.99),
            )
            axes.text(*place, text, ha=side, va="top", transform=axes.transAxes, fontsize=SMALL, color=DARK)
    add_legend(figure, handles, 3)
    return figure


def _price(study: Study) -> str:
    return f"{study.budget:.3g} {study.cost.unit}".replace("e+", "e")


def _choice_range(study: Study, draws: np.ndarray) -> tuple[float, float]:
    """(low, high) V that shows resamples, intervals and the measured V on both sides of them."""
    assert study.optimum is not None
    points = [float(draws.min()), float(draws.max()), *study.optimum.indifference]
    if study.averaged is not None:
        points += study.averaged.interval
    counts = study.table.token_counts
    below, above = counts[counts <= min(points)], counts[counts >= max(points)]
    low = float(below[-1]) if below.size else min(points)
    high = float(above[0]) if above.size else max(points)
    margin = (high / low) ** 0.04 if high > low else 1.2
    return low / margin, high * margin


def _bar(
    axes: Axes, pair: tuple[float, float], value: float, height: float, marker: str, colour: str, label: str
) -> Handle:
    axes.plot(pair, [height] * 2, color=colour, lw=2.2, marker="|", ms=9, mew=2.0, zorder=4)
    axes.plot([value], [height], color=colour, marker=marker, ms=6.5, ls="", zorder=4)
    return Line2D([], [], color=colour, lw=2.2, marker=marker, ms=6, label=label)


@styled
def design_figure(study: Study) -> Figure | None:
    """Heat map over candidates (n, v) for the next cell: by how many percent it would lower sd(ln ratio).

    A dot marks the cells measured already (running one again), a star the best gain per training cost.
    """
    plan = study.design
    if plan is None or not plan.candidates:
        return None
    n, v, left = np.array([(item.n, item.v, item.ratio_left) for item in plan.candidates]).T
    sizes, counts, grid = cells = cell_grid(n, v, 100 * (1 - left))
    if grid.size > MOST_TILES:
        return None
    figure, axes = new_figure(
        f"{study.table.group}, {study.origin}: what one more cell tells of the ratio",
        map_height(sizes.size) + 0.3,
    )
    top = float(np.nanmax(grid)) or 1.0
    mesh = heat_map(axes, cells, colormaps["cividis"].resampled(65), (0.0, top), lambda x: f"{x:.1f}")
    add_colour_bar(figure, axes, mesh, "fall of sd(ln ratio), %")

    def mark(item_n: float, item_v: float, x: float, y: float, **look: Any) -> None:
        column, row = np.searchsorted(counts, item_v), np.searchsorted(sizes, item_n)
        axes.plot([column + x], [row + y], mec="black", mew=0.7, ls="", zorder=5, **look)

    for item in plan.candidates:
        if item.repeat:
            mark(item.n, item.v, 0.13, 0.82, marker="o", ms=4.5, mfc="white")
    best = max(plan.candidates, key=lambda item: item.gain_per_cost)
    mark(best.n, best.v, 0.86, 0.82, marker="*", ms=9.5, mfc="white")
    handles: list[Handle] = [
        Line2D([], [], ls="", marker="o", ms=4.5, mfc="white", mec="black", label="measured already"),
        Line2D([], [], ls="", marker="*", ms=11, mfc="white", mec="black", label="best for its cost"),
    ]
    add_legend(figure, handles, 2)
    return figure
