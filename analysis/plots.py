"""Figures of the measured cells with the law beside them, and how to save a figure.

Drawn by one set of functions for a sweep and for the paper's published numbers, on matplotlib's Agg canvas:
no window, no state. The figures about the law itself are in `figures.py`.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from analysis.compare import Comparison, Point
from analysis.cost import FlopsCost
from analysis.optimum import index_tokens, measured_cost, optimal_path, pareto
from analysis.study import LawStudy, Study
from analysis.style import (
    DARK,
    MARKERS,
    OKABE_ITO,
    ORANGE,
    PALE,
    SMALL,
    STYLE,
    Colour,
    Handle,
    add_legend,
    log_axis,
    method_look,
    new_figure,
    plain,
    size_colours,
    size_handles,
    styled,
    token_ticks,
    usable,
    value_axis,
)
from analysis.units import flops, tokens

_BLIND = (0, (4, 3))


def _blind_lines(axes: Axes, study: Study, colours: list[Colour]) -> tuple[list[float], list[Handle]]:
    """(errors without an image, legend entry): a dashed line for each LLM that has one."""
    drawn = []
    for n, colour in zip(study.table.sizes, colours, strict=True):
        names = {name for name, size in zip(study.table.llm_name, study.table.n, strict=True) if size == n}
        for name in sorted(names & study.table.blind.keys()):
            axes.axhline(study.table.blind[name], color=colour, ls=_BLIND, lw=1.1, zorder=1)
            drawn.append(study.table.blind[name])
    return drawn, [Line2D([], [], color="#555555", ls=_BLIND, lw=1.1, label="no image")] if drawn else []


def _band(law: LawStudy, n: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% bootstrap band of the law at n, v."""
    low, high = np.quantile(law.fit.predict(n, v, law.replicates.theta), [0.025, 0.975], axis=0)
    return low, high


def _cost_label(study: Study) -> str:
    cost = study.cost
    if not isinstance(cost, FlopsCost):
        return "latency, ms"
    bare = cost.plain and not cost.fixed_flops and cost.effective_tokens == cost.text_tokens
    return "inference FLOPs of the LLM, 2N(Q + V)" if bare else "inference FLOPs"


@styled
def cost_figure(study: Study) -> Figure:
    """Error against cost, a curve an LLM size, with the measured and the law's best path.

    The form of Figure 1 of arXiv 2411.03312. Works without a fit; the law's path needs an identified ratio.
    """
    table, colours = study.table, size_colours(study.table.sizes.size)
    flops = f" (Q = {tokens(study.q)} text tokens)" if isinstance(study.cost, FlopsCost) else ""
    figure, axes = new_figure(f"{table.group}, {study.origin}{flops}", 4.7)
    cost = measured_cost(table, study.cost)
    reach = max(float(cost.max() / cost.min()) ** 0.17, 1.15)
    log_axis(axes, "x", float(cost.min()) / reach, float(cost.max()) * reach)
    if not isinstance(study.cost, FlopsCost):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    handles = size_handles(table.sizes, colours)
    best = pareto(table, study.cost)
    axes.plot(cost[best], table.error[best], color=PALE, lw=7, solid_capstyle="round", zorder=1.5)
    handles.append(Line2D([], [], color=PALE, lw=6, label="best measured"))
    for i, (n, colour) in enumerate(zip(table.sizes, colours, strict=True)):
        own = np.flatnonzero(table.n == n)
        axes.plot(
            cost[own],
            table.error[own],
            color=colour,
            marker=MARKERS[i % 8],
            ms=5,
            mec=DARK,
            mew=0.5,
            lw=1.5,
            zorder=3,
        )
    if study.identified and study.best is not None:
        handles += _law_path(axes, study, study.best, cost)
    blind, entry = _blind_lines(axes, study, colours)
    value_axis(axes, table, np.append(table.error, blind))
    _annotate_tokens(axes, study, cost)
    axes.set_xlabel(_cost_label(study))
    add_legend(figure, [*handles, *entry], 3)
    return figure


def _annotate_tokens(axes: Axes, study: Study, cost: np.ndarray) -> None:
    """Label V at the ends and the middle of the smallest and the largest LLM's curve, clear of all curves."""
    table, (left, right), (bottom, top) = study.table, axes.get_xlim(), axes.get_ylim()

    def on_page(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """In points, near enough: the panel is about 320 by 230."""
        return 320 * np.log(x / left) / np.log(right / left), 230 * (y - bottom) / (top - bottom)

    x, y = on_page(cost, table.error)
    curves = [np.flatnonzero(table.n == n) for n in table.sizes]
    taken: list[tuple[float, float]] = []
    for line in axes.get_lines():
        if line.get_transform() == axes.transData:
            drawn = np.stack(on_page(*np.asarray(line.get_xydata(), dtype=float).T))
            length = np.append(0.0, np.hypot(*np.diff(drawn)).cumsum())
            every = np.arange(0.0, length[-1] + 2, 2)  # points of the page, so that all lines count alike
            taken += zip(*(np.interp(every, length, side) for side in drawn), strict=True)
    for own in curves[:1] + curves[1:][-1:]:
        for j in sorted({0, own.size // 2, own.size - 1}):
            i = own[j]
            text = ("V = " if j == 0 else "") + tokens(table.v[i])
            shift = _free_place(float(x[i]), float(y[i]), 6.0 * len(text), np.array(taken))
            taken.append((float(x[i]) + shift[0], float(y[i]) + shift[1]))
            axes.annotate(
                text,
                (cost[i], table.error[i]),
                xytext=shift,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=SMALL,
                color=DARK,
                zorder=6,
            )


def _free_place(x: float, y: float, width: float, taken: np.ndarray) -> tuple[float, float]:
    """Where to centre a label of that width about (x, y), in points: where fewest others are."""
    aside = width / 2 + 6
    places = [
        (-aside, -5),
        (aside, 5),
        (aside, -6),
        (-aside, 6),
        (0, 12),
        (0, -12),
        (aside, 0),
        (-aside, 0),
        (aside, 13),
    ]
    places += [(-aside, -13), (-aside, 13), (aside, -13)]

    def crowd(place: tuple[float, float]) -> int:
        over = np.abs(taken - np.array([x, y]) - np.array(place)) < np.array([width / 2 + 2, 6.5])
        return int(over.all(axis=1).sum())

    return min(places, key=crowd)


def _law_path(axes: Axes, study: Study, law: LawStudy, cost: np.ndarray) -> list[Handle]:
    n, v = optimal_path(law.fit, study.cost, np.geomspace(cost.min(), cost.max(), 120))
    if not n.size:
        return []
    price, dashes = study.cost(n, v), (0, (5, 1.5))
    low, high = _band(law, n, v)
    axes.fill_between(price, low, high, color=ORANGE, alpha=0.22, lw=0, zorder=2)
    axes.plot(price, law.fit.predict(n, v), color=ORANGE, lw=1.8, ls=dashes, zorder=4)
    return [Line2D([], [], color=ORANGE, lw=1.8, ls=dashes, label="best by the law (95%)")]


@styled
def law_figure(study: Study) -> Figure:
    """Error against V, a curve an LLM size: cells as markers, the chosen law as lines with its 95% band."""
    table, colours, law = study.table, size_colours(study.table.sizes.size), usable(study)
    what = f"{law.fit.law.name} law" if law else "cells, no law fitted"
    figure, axes = new_figure(f"{table.group}, {study.origin}: {what}", 4.7)
    spread = (table.v.max() / table.v.min()) ** 0.04 if table.token_counts.size > 1 else 1.5
    log_axis(axes, "x", float(table.v.min()) / spread, float(table.v.max()) * spread)
    values = [table.error]
    grid = np.geomspace(table.v.min(), table.v.max(), 80)
    banded = law is not None and law.replicates.theta.shape[0] > 0
    for i, (n, colour) in enumerate(zip(table.sizes, colours, strict=True)):
        own = table.n == n
        axes.plot(
            table.v[own],
            table.error[own],
            color=colour,
            marker=MARKERS[i % 8],
            ms=5.5,
            mec=DARK,
            mew=0.5,
            ls="",
        )
        if law is None:
            axes.plot(table.v[own], table.error[own], color=colour, lw=0.8, alpha=0.5)
            continue
        at = np.full_like(grid, n)
        curve = law.fit.predict(at, grid)
        axes.plot(grid, curve, color=colour, lw=1.5, zorder=2)
        values.append(curve)
        if banded:
            axes.fill_between(grid, *_band(law, at, grid), color=colour, alpha=0.16, lw=0, zorder=1)
    handles = size_handles(table.sizes, colours)
    blind, entry = _blind_lines(axes, study, colours)
    handles += entry
    if banded:
        handles.append(Patch(color="#777777", alpha=0.3, lw=0, label="95% bootstrap band"))
    value_axis(axes, table, np.concatenate([*values, np.array(blind)]))
    token_ticks(axes.xaxis, table.token_counts)
    axes.set_xlabel("visual tokens V")
    add_legend(figure, handles, 3)
    return figure


@styled
def tokens_figure(studies: list[Study], title: str) -> Figure | None:
    """V*(Q) at cost 2N(Q + V) with its 95% band, a line a task group; a marker at the group's own Q.

    Only where the chosen law is of a single index and its ratio identified; None without one.
    """
    shown = [
        (study, study.best)
        for study in studies
        if study.best is not None and study.identified and study.best.fit.law.single_index
    ]
    if not shown:
        return None
    figure, axes = new_figure(title, 4.2)
    v_min = min(float(study.table.v.min()) for study, _ in shown)
    v_max = max(float(study.table.v.max()) for study, _ in shown)
    top = 10.0 ** np.ceil(np.log10(max(4 * max(study.q for study, _ in shown), 100.0)))
    q = np.geomspace(1.0, top, 160)
    log_axis(axes, "x", 1.0, float(top))
    log_axis(axes, "y", v_min / 1.25, v_max * 1.25)
    handles: list[Handle] = []
    for i, (study, law) in enumerate(shown):
        colour, style = OKABE_ITO[i % len(OKABE_ITO)], ("-", (0, (6, 2)), (0, (2, 1.5)))[i % 3]
        look: dict[str, Any] = {"color": colour, "marker": MARKERS[i % 8], "ms": 6.5, "lw": 2.0}
        _token_line(axes, study, law, q, {**look, "ls": style})
        label = plain(f"{study.table.group} (ratio {law.fit.ratio:.2f})")
        handles.append(Line2D([], [], **look, ls=style, label=label))
    axes.set_xlabel("text tokens Q")
    axes.set_ylabel("best visual tokens V*(Q)")
    token_ticks(axes.yaxis, np.unique(np.concatenate([study.table.v for study, _ in shown])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    add_legend(figure, handles, 2)
    return figure


def _token_line(axes: Axes, study: Study, law: LawStudy, q: np.ndarray, look: dict[str, Any]) -> None:
    limits = float(study.table.v.min()), float(study.table.v.max())

    def best(theta: np.ndarray, value: float) -> np.ndarray:
        by_size, by_tokens = law.fit.law.slopes(theta)
        return index_tokens(by_size, by_tokens, value, *limits)

    if law.replicates.theta.shape[0]:
        spread = np.stack([best(law.replicates.theta, value) for value in q])
        low, high = np.quantile(spread, [0.025, 0.975], axis=1)
        axes.fill_between(q, low, high, color=look["color"], alpha=0.18, lw=0)
    line = [float(best(law.fit.theta, value)) for value in q]
    axes.plot(q, line, clip_on=False, **{**look, "marker": ""})
    if study.q >= q[0]:
        axes.plot([study.q], [float(best(law.fit.theta, study.q))], clip_on=False, **{**look, "ls": ""})


@styled
def methods_figure(comparison: Comparison) -> Figure:
    """Error against V and against FLOPs of a whole answer, a line a method through its points in order of V.

    Rings mark the points that none with as few tokens (FLOPs) beats. The second panel is left out where the
    data have no FLOPs. Methods stand a little beside their V, so that they do not hide each other.
    """
    priced = any(math.isfinite(point.infer_flops) for point in comparison.points)
    figure = Figure(figsize=(12.4 if priced else 8.0, 6.2), layout="constrained")
    panels = figure.subplots(1, 2 if priced else 1, sharey=True, squeeze=False)[0]
    looks = {method: method_look(i) for i, method in enumerate(comparison.methods)}
    v = np.unique([point.v for point in comparison.points])
    reach = float(max(v[-1] / v[0], 2.0)) ** 0.08
    log_axis(panels[0], "x", float(v[0]) / reach, float(v[-1]) * reach)
    token_ticks(panels[0].xaxis, v)
    panels[0].set_xlabel("visual tokens V")
    panels[0].set_title(plain(f"{comparison.llm_name}: error against visual tokens"))
    beside = _beside(panels[0], comparison)
    _methods_panel(panels[0], comparison, looks, lambda point: beside[point.method, point.v], "best_at_v")
    if priced:
        _flops_axis(panels[1], [p.infer_flops for p in comparison.points if math.isfinite(p.infer_flops)])
        _methods_panel(panels[1], comparison, looks, lambda point: point.infer_flops, "best_at_flops")
    shown = [x for point in comparison.points for x in (point.error, *(point.interval or ()))]
    low, high = min([*shown, comparison.blind or 1.0]), max([*shown, comparison.blind or 0.0])
    margin = 0.04 * (high - low) or 0.05
    panels[0].set_ylim(low - margin, high + margin)
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    panels[0].set_ylabel("error (1 - mean score)")
    handles = [Line2D([], [], **look, ms=7, lw=1.6, label=plain(name)) for name, look in looks.items()]
    handles.append(Line2D([], [], **_RING, ls="", label="Pareto-best"))
    if comparison.blind is not None:
        handles.append(Line2D([], [], color="#555555", ls=_BLIND, lw=1.3, label="no image"))
    figure.legend(
        handles=handles,
        loc="outside right upper",
        handlelength=3.4,
        title="method",
        alignment="left",
        ncols=-(-len(handles) // _LEGEND_ROWS),
    )
    return figure


_RING: dict[str, Any] = {"marker": "o", "ms": 14, "mfc": "none", "mec": DARK, "mew": 1.3}
_LEGEND_ROWS = 20


def _flops_axis(axes: Axes, price: list[float]) -> None:
    low, high = min(price), max(price)
    reach = max(high / low, 1.2) ** 0.06
    log_axis(axes, "x", low / reach, high * reach)
    if high / low < 6:  # less than a decade has too few round powers: even steps, which read as well
        ticks: list[float] = []
        for x in MaxNLocator(6).tick_values(low, high):
            if low / reach <= x <= high * reach and (not ticks or x / ticks[-1] > (high / low) ** 0.12):
                ticks.append(float(x))
        axes.xaxis.set_ticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: flops(x).removesuffix("FLOP").replace(" ", "")))
    axes.set_xlabel("inference FLOPs of a whole answer")
    axes.set_title("error against inference FLOPs")


def _beside(axes: Axes, comparison: Comparison) -> dict[tuple[str, float], float]:
    """(method, V) to where it is drawn: side by side in a shaded column where several methods share a V."""
    sharing = Counter(point.v for point in comparison.points)
    shared = sorted(v for v, times in sharing.items() if times > 1)
    here = {point.method for point in comparison.points if sharing[point.v] > 1}
    order = [method for method in comparison.methods if method in here]
    step = min([4.0, *(b / a for a, b in pairwise(shared))])
    widest = min(step**0.28, 1.035 ** (len(order) - 1))
    reach = {}
    for v in shared:
        # A lone point nearby, such as the mean count of an adaptive method, stays outside the column.
        alone = [max(v / w, w / v) for w, times in sharing.items() if times == 1]
        reach[v] = min(widest, max(1.3, min(alone, default=4.0) ** 0.8))
        axes.axvspan(v / reach[v] / 1.04, v * reach[v] * 1.04, color="#f2f2f2", lw=0, zorder=0)
    ends = axes.get_xlim()
    if shared:  # no column is cut off
        first, last = shared[0] / reach[shared[0]] / 1.1, shared[-1] * reach[shared[-1]] * 1.1
        axes.set_xlim(min(ends[0], first), max(ends[1], last))
    return {
        (point.method, point.v): point.v
        * reach[point.v] ** (2 * order.index(point.method) / (len(order) - 1) - 1)
        if sharing[point.v] > 1
        else point.v
        for point in comparison.points
    }


def _methods_panel(
    axes: Axes,
    comparison: Comparison,
    looks: dict[str, dict[str, Any]],
    place: Callable[[Point], float],
    best: str,
) -> None:
    """The lines, intervals and rings of one panel."""
    if comparison.blind is not None:
        axes.axhline(comparison.blind, color="#555555", ls=_BLIND, lw=1.3, zorder=1)
    for method, look in looks.items():
        own = [point for point in comparison.of(method) if math.isfinite(place(point))]
        x, y = [place(point) for point in own], [point.error for point in own]
        for at, point in zip(x, own, strict=True):
            if best == "best_at_v" and point.interval is not None:  # once is enough
                axes.plot([at, at], point.interval, color=look["color"], lw=1.0, alpha=0.45, zorder=2)
        axes.plot(x, y, color=look["color"], ls=look["ls"], lw=1.1, alpha=0.65, zorder=2.5)
        axes.plot(x, y, **{**look, "ls": ""}, ms=7, zorder=4)
        ringed = [(at, point.error) for at, point in zip(x, own, strict=True) if getattr(point, best)]
        for at, error in ringed:
            axes.plot([at], [error], **_RING, ls="", zorder=5)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element to place inside a page: ids prefixed with `name`, no prologue, no
    metadata.
    """
    stream = io.StringIO()
    with rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(
            stream, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def to_png(figure: Figure, path: Path) -> None:
    """Write the figure to `path` at 160 dots an inch."""
    with rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=160, metadata={"Software": None})
