"""The figures, drawn by one set of functions for a sweep and for the paper's published numbers.

Matplotlib's Agg canvas, no window, no global state. LLM sizes take an ordered palette (viridis without its
palest end), task groups the Okabe-Ito palette; both are safe for colour-blind readers.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis.fit import Fit
from analysis.optimum import best_tokens, optimal_path, pareto, prefill_flops
from analysis.study import Study
from analysis.units import count, tokens

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "analysis",
}


def _colours(number: int) -> list[tuple[float, float, float, float]]:
    return [tuple(colormaps["viridis"](x)) for x in np.linspace(0.0, 0.85, number)]


def _figure(title: str, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title.replace("$", r"\$"))
    return figure, axes


def _percent_axis(axes: Axes, values: np.ndarray) -> None:
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.07 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    axes.set_ylabel("error (1 - mean score)")


def _log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """A log axis over [low, high] with few, legible decade or 1-2-5 ticks."""
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    if high / low < 50:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def _token_ticks(axis: Axis, values: np.ndarray) -> None:
    """Tick the measured token counts on a log axis, leaving out those too near their neighbour."""
    span, shown = np.log(values[-1] / values[0]), [values[0]]
    for value in values[1:]:
        if np.log(value / shown[-1]) > 0.055 * span:
            shown.append(value)
    axis.set_ticks(shown, [tokens(value) for value in shown])
    axis.set_minor_locator(NullLocator())


def _legend(figure: Figure, handles: list[Line2D | Patch], columns: int) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=columns,
        columnspacing=1.0,
        handlelength=1.9,
        handletextpad=0.5,
    )


def _size_handles(
    sizes: np.ndarray, colours: list[tuple[float, float, float, float]]
) -> list[Line2D | Patch]:
    return [
        Line2D([], [], color=colour, marker=_MARKERS[i % len(_MARKERS)], ms=5, label=f"N = {count(n)}")
        for i, (n, colour) in enumerate(zip(sizes, colours, strict=True))
    ]


def _blind_lines(axes: Axes, study: Study, colours: list[tuple[float, float, float, float]]) -> list[float]:
    drawn = []
    for n, colour in zip(study.table.sizes, colours, strict=True):
        names = {name for name, size in zip(study.table.llm_name, study.table.n, strict=True) if size == n}
        for name in sorted(names & study.table.blind.keys()):
            axes.axhline(study.table.blind[name], color=colour, ls=(0, (4, 3)), lw=1.1, zorder=1)
            drawn.append(study.table.blind[name])
    return drawn


def cost_figure(study: Study) -> Figure:
    """Error against LLM prefill FLOPs 2N(q + V), a curve an LLM size, with the measured and the law's best
    path.

    The form of Figure 1 of arXiv 2411.03312. Works without a fit; the law's path needs an identified ratio.
    """
    table, q, colours = study.table, study.q, _colours(study.table.sizes.size)
    with rc_context(_STYLE):
        figure, axes = _figure(f"{table.group}, {study.origin} (Q = {tokens(q)} text tokens)", 4.7)
        cost = prefill_flops(table.n, table.v, q)
        _log_axis(axes, "x", float(cost.min()) / 2.2, float(cost.max()) * 2.0)
        handles = _size_handles(table.sizes, colours)
        best = pareto(table, q)
        axes.plot(cost[best], table.error[best], color="#c8c8c8", lw=7, solid_capstyle="round", zorder=1.5)
        handles.append(Line2D([], [], color="#c8c8c8", lw=6, label="best measured"))
        for i, (n, colour) in enumerate(zip(table.sizes, colours, strict=True)):
            own = np.flatnonzero(table.n == n)
            axes.plot(
                cost[own], table.error[own], color=colour, marker=_MARKERS[i % 8], ms=5, lw=1.5, zorder=3
            )
            if i in (0, table.sizes.size - 1):
                _annotate_tokens(axes, cost[own], table.error[own], table.v[own], last=i > 0)
        values = [table.error]
        if study.identified and study.best is not None:
            handles += _law_path(axes, study, study.best, cost, q)
        blind = _blind_lines(axes, study, colours)
        if blind:
            values.append(np.array(blind))
            handles.append(Line2D([], [], color="#555555", ls=(0, (4, 3)), lw=1.1, label="no image"))
        _percent_axis(axes, np.concatenate(values))
        axes.set_xlabel("inference FLOPs of the LLM, 2N(Q + V)")
        _legend(figure, handles, 3)
    return figure


def _annotate_tokens(axes: Axes, cost: np.ndarray, error: np.ndarray, v: np.ndarray, last: bool) -> None:
    """Label V at the ends and in the middle of one curve."""
    for j in sorted({0, v.size // 2, v.size - 1}):
        axes.annotate(
            ("V = " if j == 0 else "") + tokens(v[j]),
            (cost[j], error[j]),
            xytext=(6, 6) if last else (-5, -7),
            textcoords="offset points",
            ha="left" if last else "right",
            va="center",
            fontsize=9,
            color="#333333",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            zorder=6,
        )


def _law_path(axes: Axes, study: Study, fit: Fit, cost: np.ndarray, q: float) -> list[Line2D | Patch]:
    budgets = np.geomspace(cost.min(), cost.max(), 120)
    n, v = optimal_path(fit, study.table, budgets, q)
    low, high = fit.band(n, v)
    axes.fill_between(budgets, low, high, color="#D55E00", alpha=0.22, lw=0, zorder=2)
    axes.plot(budgets, fit.predict(n, v), color="#D55E00", lw=1.8, ls=(0, (5, 1.5)), zorder=4)
    return [Line2D([], [], color="#D55E00", lw=1.8, ls=(0, (5, 1.5)), label="best by the law (95%)")]


def law_figure(study: Study) -> Figure:
    """Error against V, a curve an LLM size: cells as markers, the chosen law as lines with its 95% band."""
    table, colours, fit = study.table, _colours(study.table.sizes.size), study.best
    with rc_context(_STYLE):
        title = f"{table.group}, {study.origin}: " + (
            f"{fit.law.name} law" if fit else "cells, no law fitted"
        )
        figure, axes = _figure(title, 4.7)
        spread = (table.v.max() / table.v.min()) ** 0.04 if table.token_counts.size > 1 else 1.5
        _log_axis(axes, "x", float(table.v.min()) / spread, float(table.v.max()) * spread)
        values = [table.error]
        grid = np.geomspace(table.v.min(), table.v.max(), 80)
        for i, (n, colour) in enumerate(zip(table.sizes, colours, strict=True)):
            own = table.n == n
            axes.plot(
                table.v[own], table.error[own], color=colour, marker=_MARKERS[i % 8], ms=5.5, ls="", zorder=3
            )
            if fit is None or not fit.converged:
                axes.plot(table.v[own], table.error[own], color=colour, lw=0.8, alpha=0.5)
                continue
            at = np.full_like(grid, n)
            curve = fit.predict(at, grid)
            axes.plot(grid, curve, color=colour, lw=1.5, zorder=2)
            values.append(curve)
            if fit.replicates.size:
                low, high = fit.band(at, grid)
                axes.fill_between(grid, low, high, color=colour, alpha=0.16, lw=0, zorder=1)
        handles = _size_handles(table.sizes, colours)
        blind = _blind_lines(axes, study, colours)
        if blind:
            values.append(np.array(blind))
            handles.append(Line2D([], [], color="#555555", ls=(0, (4, 3)), lw=1.1, label="no image"))
        if fit is not None and fit.converged and fit.replicates.size:
            handles.append(Patch(color="#777777", alpha=0.3, lw=0, label="95% bootstrap band"))
        _percent_axis(axes, np.concatenate(values))
        _token_ticks(axes.xaxis, table.token_counts)
        axes.set_xlabel("visual tokens V")
        _legend(figure, handles, 3)
    return figure


def tokens_figure(studies: list[Study], title: str) -> Figure | None:
    """V*(Q) with its 95% band, a line a task group, for the studies with an identified ratio; None without
    one.
    """
    shown = [study for study in studies if study.identified]
    if not shown:
        return None
    with rc_context(_STYLE):
        figure, axes = _figure(title, 4.2)
        v_min = min(float(study.table.v.min()) for study in shown)
        v_max = max(float(study.table.v.max()) for study in shown)
        top = 10.0 ** np.ceil(np.log10(max(4 * max(study.q for study in shown), 100.0)))
        q = np.geomspace(1.0, top, 160)
        _log_axis(axes, "x", 1.0, float(top))
        _log_axis(axes, "y", v_min / 1.25, v_max * 1.25)
        handles: list[Line2D | Patch] = []
        for i, study in enumerate(shown):
            fit, colour = study.best, OKABE_ITO[i % len(OKABE_ITO)]
            assert fit is not None
            assert study.verdict is not None
            ratio = study.verdict.ratio
            limits = float(study.table.v.min()), float(study.table.v.max())
            spread = np.stack([best_tokens(fit.replicates, value, *limits) for value in q])
            low, high = np.percentile(spread, [2.5, 97.5], axis=1)
            line = [float(best_tokens(fit.params, value, *limits)) for value in q]
            style = ("-", (0, (6, 2)), (0, (2, 1.5)))[i % 3]
            axes.fill_between(q, low, high, color=colour, alpha=0.18, lw=0)
            axes.plot(q, line, color=colour, lw=2.0, ls=style, clip_on=False)
            label = f"{study.table.group} (ratio {ratio:.2f})".replace("$", r"\$")
            handles.append(Line2D([], [], color=colour, lw=2.0, ls=style, label=label))
        axes.set_xlabel("text tokens Q")
        axes.set_ylabel("best visual tokens V*(Q)")
        _token_ticks(axes.yaxis, np.unique(np.concatenate([study.table.v for study in shown])))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        _legend(figure, handles, 2)
    return figure


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element to place inside a page: ids prefixed with `name`, no prologue, no
    metadata.
    """
    stream = io.StringIO()
    with rc_context(_STYLE):
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
    with rc_context(_STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=160, metadata={"Software": None})
