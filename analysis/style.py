"""The one look of all figures: palettes, fonts, axes, legends and heat maps.

Ordered LLM sizes take viridis without its palest end, unordered things the Okabe-Ito palette, signed values a
diverging map with symmetric limits. All are safe for colour-blind readers; markers, line styles and lightness
tell the same apart in grey.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from analysis.data import Table
from analysis.study import LawStudy, Study
from analysis.units import count, significant, tokens

WIDTH = 5.4
SMALL = 9.0  # points: the least size of any text
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, ORANGE, DARK, GREY, PALE = OKABE_ITO[0], OKABE_ITO[1], "#333333", "#777777", "#c8c8c8"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
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
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "analysis",
}
METHOD_COLOURS = (*OKABE_ITO, "#8a8a8a")
MOST_TILES = 400  # places of a heat map above which none is drawn
_TITLE = 50  # characters of a title that fit on one line
_ANNOTATED = 80  # cells of a heat map above which values are no longer written into them
_UPRIGHT = 11  # columns of a heat map above which the values stand on end

Colour = tuple[float, float, float, float]
Handle = Line2D | Patch
_P = ParamSpec("_P")
_R = TypeVar("_R")


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """`draw` under the look of this module, whatever the caller's matplotlib settings."""

    @functools.wraps(draw)
    def inside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def plain(text: str) -> str:
    """`text` with nothing that matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def size_colours(number: int) -> list[Colour]:
    """Ordered colours for so many LLM sizes, dark to light."""
    return [tuple(colormaps["viridis"](x)) for x in np.linspace(0.0, 0.85, number)]


def method_look(index: int) -> dict[str, Any]:
    """Colour, marker, filling and line of the index-th method: no two of the first 32 look the same.

    Eight filled markers on solid lines, then eight open ones on dashed lines, whose colours come in the same
    order on other markers; then both again on dotted and dash-dotted lines.
    """
    turn, place = divmod(index, len(METHOD_COLOURS))
    colour = METHOD_COLOURS[place]
    return {
        "color": colour,
        "marker": MARKERS[(place + 3 * turn) % len(MARKERS)],
        "mfc": "white" if turn % 2 else colour,
        "mec": colour if turn % 2 else DARK,
        "mew": 1.5 if turn % 2 else 0.5,
        "ls": ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))[turn % 4],
    }


def new_figure(title: str, height: float = 4.5) -> tuple[Figure, Axes]:
    """A figure of the common width with one titled panel."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(wrapped(title))
    return figure, axes


def wrapped(title: str) -> str:
    """A title in as many lines as the width asks for."""
    lines = title.replace(": ", ":\n", 1).split("\n") if len(title) > _TITLE else [title]
    return plain("\n".join(textwrap.fill(line, _TITLE) for line in lines))


def usable(study: Study) -> LawStudy | None:
    """The chosen law where its fit converged."""
    return study.best if study.best is not None and study.best.fit.converged else None


def points_of(table: Table) -> tuple[float, str]:
    """(factor, unit) that turns a difference of the table's target into what a reader counts in."""
    return (100.0, "points of score") if table.target == "error" else (1.0, "units of loss")


def value_axis(axes: Axes, table: Table, values: np.ndarray) -> None:
    """The y axis over `values` of the table's target: error in percent, or a loss as it is."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.07 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    if table.target == "error":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        axes.set_ylabel("error (1 - mean score)")
    else:
        axes.set_ylabel("held-out loss")


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """A log axis over [low, high] with few, legible ticks: decades, or 1-2-5, or finer over a short range."""
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    if high / low < 50:
        axis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
        )
        axis.set_major_formatter(FuncFormatter(lambda x, _: _scientific(x)))
    axis.set_minor_formatter(NullFormatter())


def _scientific(value: float) -> str:
    power = int(np.floor(np.log10(value) + 1e-9))
    if -3 < power < 4:
        return significant(value)
    lead = significant(value / 10.0**power)
    return f"$10^{{{power}}}$" if lead == "1" else f"${lead}\\times10^{{{power}}}$"


def plain_ticks(axis: Axis) -> None:
    """Tick labels as plain numbers instead of powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda x, _: significant(x)))


def token_ticks(axis: Axis, values: np.ndarray) -> None:
    """Tick the measured token counts on a log axis, leaving out those too near their neighbour."""
    span, shown = np.log(values[-1] / values[0]), [values[0]]
    for value in values[1:]:
        if np.log(value / shown[-1]) > 0.055 * span:
            shown.append(value)
    axis.set_ticks(shown, [tokens(value) for value in shown])
    axis.set_minor_locator(NullLocator())


def add_legend(figure: Figure, handles: Sequence[Handle], columns: int) -> None:
    """One legend below the panels."""
    figure.legend(
        handles=list(handles),
        loc="outside lower left",
        ncols=columns,
        columnspacing=1.0,
        handlelength=1.9,
        handletextpad=0.5,
    )


def size_handles(sizes: np.ndarray, colours: list[Colour], line: bool = True) -> list[Handle]:
    """Legend entries of LLM sizes."""
    return [
        Line2D(
            [],
            [],
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            ms=5,
            mec=DARK,
            mew=0.5,
            ls="-" if line else "",
            label=f"N = {count(n)}",
        )
        for i, (n, colour) in enumerate(zip(sizes, colours, strict=True))
    ]


def cell_grid(n: np.ndarray, v: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sizes, counts, grid [sizes, counts]) of `values` at (n, v): repeats averaged, NaN where no cell is."""
    sizes, row = np.unique(n, return_inverse=True)
    counts, column = np.unique(v, return_inverse=True)
    total, seen = np.zeros((sizes.size, counts.size)), np.zeros((sizes.size, counts.size))
    np.add.at(total, (row, column), values)
    np.add.at(seen, (row, column), 1)
    return sizes, counts, np.where(seen > 0, total / np.maximum(seen, 1), np.nan)


def map_height(rows: int) -> float:
    """Height in inches of a heat map with so many rows."""
    return float(np.clip(1.25 + 0.4 * rows, 2.6, 7.0))


def heat_map(
    axes: Axes,
    cells: tuple[np.ndarray, np.ndarray, np.ndarray],
    colours: Colormap,
    limits: tuple[float, float],
    text: Callable[[float], str],
) -> QuadMesh:
    """Tiles of one size for (sizes, counts, grid): V to the right, N upwards; hatched where no cell is."""
    sizes, counts, grid = cells
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid), cmap=colours, vmin=limits[0], vmax=limits[1], edgecolors="white", lw=1.0
    )
    axes.grid(False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    for row, column in np.argwhere(~np.isfinite(grid)):
        tile = Rectangle((column, row), 1, 1, fc="#f0f0f0", ec="#a8a8a8", hatch="////", lw=0, zorder=2)
        axes.add_patch(tile)
    if grid.size <= _ANNOTATED:
        for row, column in np.argwhere(np.isfinite(grid)):
            value = float(grid[row, column])
            red, green, blue, _ = mesh.cmap((value - limits[0]) / (limits[1] - limits[0]))
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            axes.text(
                column + 0.5,
                row + 0.5,
                text(value),
                ha="center",
                va="center",
                color=ink,
                fontsize=SMALL,
                rotation=90 if counts.size > _UPRIGHT else 0,
                zorder=4,
            )
    _tile_ticks(axes.xaxis, [tokens(v) for v in counts], 12)
    _tile_ticks(axes.yaxis, [count(n) for n in sizes], 20)
    axes.set_xlabel("visual tokens V")
    axes.set_ylabel("LLM parameters N")
    return mesh


def _tile_ticks(axis: Axis, labels: list[str], most: int) -> None:
    step = -(-len(labels) // most)
    axis.set_ticks(np.arange(0, len(labels), step) + 0.5, labels[::step])
    if len(labels) > 8:
        axis.set_tick_params(labelsize=SMALL)


def add_colour_bar(figure: Figure, axes: Axes, mesh: QuadMesh, label: str) -> None:
    """The scale of a heat map, to its right."""
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.set_label(label)
