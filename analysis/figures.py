"""Figures about the law itself: how sure its ratio is, what it misses, how far tasks differ.

Each takes a `Study` and returns a figure, or None where the study holds nothing to draw. What follows from
the law is drawn in `outlook.py`, and offered here too.
"""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator
from scipy.special import betaincinv, ndtri

from analysis.fit import Fit, scaled_jacobian
from analysis.outlook import choice_figure, design_figure
from analysis.pooling import Slope, TaskSlopes
from analysis.profile import f_deviance
from analysis.study import Study
from analysis.style import (
    BLUE,
    DARK,
    GREY,
    MARKERS,
    MOST_TILES,
    ORANGE,
    SMALL,
    WIDTH,
    Handle,
    add_colour_bar,
    add_legend,
    cell_grid,
    heat_map,
    log_axis,
    map_height,
    new_figure,
    plain,
    plain_ticks,
    points_of,
    size_colours,
    size_handles,
    styled,
    usable,
    wrapped,
)
from analysis.units import count, fixed, tokens
from analysis.verdict import MIN_FREEDOM

__all__ = [
    "choice_figure",
    "design_figure",
    "forest_figure",
    "normal_figure",
    "ratio_figure",
    "residual_figure",
    "ridge_figure",
]

_MOST_POINTS = 500
_TICKED_FLOORS = (-1.0, -3.0, -10.0, -30.0, -100.0, -300.0, -1000.0)


@styled
def ratio_figure(study: Study) -> Figure | None:
    """Profile deviance against the ratio: the first law with a curve, and the other identified ones in grey.

    The dashed line is the 95% level of that law's F test; where its curve is below, the interval is shaded.
    """
    shown = [law for law in study.laws.values() if law.verdict.identified and law.profile.curve]
    if not shown:
        return None
    lead, others = shown[0], shown[1:]
    fit, ends = lead.fit, lead.profile.ends
    level = f_deviance(fit)
    figure, axes = new_figure(f"{study.table.group}, {study.origin}: ratio {fit.ratio:.2f} {fixed(ends)}")
    top = 2.6 * level
    curves = [np.array(law.profile.curve).T for law in shown]
    inside = np.concatenate([x[y <= top] for x, y in curves])
    if inside.max() / inside.min() > 4:
        log_axis(axes, "x", inside.min() / 1.05, inside.max() * 1.05)
        plain_ticks(axes.xaxis)
    else:
        margin = 0.03 * np.ptp(inside)
        axes.set_xlim(inside.min() - margin, inside.max() + margin)
    axes.set_ylim(0, top)
    if ends is not None:
        axes.axvspan(*ends, color=BLUE, alpha=0.15, lw=0, gid="interval")
    if axes.get_xlim()[0] < 1 < axes.get_xlim()[1]:
        axes.axvline(1.0, color="black", lw=1.0, ls=(0, (1, 1.5)))
        axes.annotate(
            "1",
            (1.0, 0.985),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 0),
            va="top",
            textcoords="offset points",
            fontsize=SMALL,
        )
    axes.axhline(level, color=ORANGE, lw=1.4, ls=(0, (5, 2)), zorder=2)
    for x, y in curves[1:]:
        axes.plot(x, y, color=GREY, lw=0.9, alpha=0.75, zorder=2.5)
    axes.plot(*curves[0], color=BLUE, lw=2.6, zorder=3)
    axes.plot([fit.ratio], [0], color=BLUE, marker="o", ms=7, ls="", clip_on=False, zorder=4)
    axes.set_xlabel("ratio: slope along ln N / slope along ln V")
    axes.set_ylabel("deviance, n ln(SSE / least SSE)")
    name = f"{fit.law.name} law" + (" (chosen)" if lead is study.best else "")
    handles: list[Handle] = [
        Line2D([], [], color=BLUE, lw=2.6, marker="o", ms=6, label=name),
        Line2D([], [], color=ORANGE, lw=1.4, ls=(0, (5, 2)), label="its 95% level"),
        Patch(color=BLUE, alpha=0.15, lw=0, label="its 95% interval"),
    ]
    if others:
        label = f"{len(others)} other identified law" + ("s" if len(others) > 1 else "")
        handles.append(Line2D([], [], color=GREY, lw=0.9, label=label))
    add_legend(figure, handles, 2)
    return figure


@styled
def ridge_figure(study: Study) -> Figure | None:
    """alpha, beta (above) and their ratio (below) of the best power law with each D held.

    The exponents slide along D, the ratio hardly moves. Shaded: the D that the data do not reject at 95%.
    """
    finite = [row for row in study.ridge if np.isfinite(list(row.values())).all()]
    rows = sorted(finite, key=lambda row: row["D"])
    if not rows:
        return None
    d, alpha, beta, ratio, deviance = (
        np.array([row[key] for row in rows]) for key in ("D", "alpha", "beta", "ratio", "deviance")
    )
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
    upper.set_title(
        wrapped(f"{study.table.group}, {study.origin}: exponents of K N^-alpha V^-beta + D, D held")
    )
    edge = float(study.table.error.min())
    # -ln(edge - D) spreads the decades below zero and the last steps before the least error alike.
    upper.set_xscale(
        "function",
        functions=(
            lambda x: -np.log(np.maximum(edge - np.asarray(x, dtype=float), 1e-9 * edge)),
            lambda t: edge - np.exp(-np.asarray(t, dtype=float)),
        ),
    )
    upper.set_xlim(d[0], d[-1])
    upper.set_yscale("log")
    upper.plot(d, alpha, color=BLUE, lw=2.0, label="alpha (LLM size)")
    upper.plot(d, beta, color=ORANGE, lw=2.0, ls=(0, (5, 1.5)), label="beta (visual tokens)")
    lower.plot(d, ratio, color="black", lw=2.0, label="alpha / beta")
    lower.set_ylim(0, 1.35 * float(np.abs(ratio).max()))
    limit = f_deviance(study.laws["regular"].fit)
    kept = _shade_floors((upper, lower), d, deviance, edge, limit)
    upper.set_ylabel("exponent")
    lower.set_ylabel("alpha / beta")
    unit = "error" if study.table.target == "error" else "loss"
    lower.set_xlabel(f"floor D, in units of {unit} (least measured {unit}: {edge:.2f})")
    ticks = _floor_ticks(d, edge)
    lower.xaxis.set_ticks(ticks, [f"{x:.{2 if x > 0 else 3}g}".replace("-", "−") for x in ticks])
    lower.xaxis.set_minor_locator(NullLocator())
    handles: list[Handle] = list(upper.get_lines()[:2])
    if kept:
        handles.append(Patch(color="#009E73", alpha=0.18, lw=0, label="D not rejected at 95%"))
    else:
        handles.append(Line2D([], [], ls="", label="every D shown is rejected at 95%"))
    add_legend(figure, handles, 2)
    return figure


def _floor_ticks(d: np.ndarray, edge: float) -> list[float]:
    """0 and, away from it on both sides, the round D that stand clear of each other."""

    def place(x: float) -> float:
        return float(-np.log(edge - x))

    clear = 0.07 * (place(float(d[-1])) - place(float(d[0])))
    ticks = [0.0]
    for x in _TICKED_FLOORS:
        if x >= d[0] and place(min(ticks)) - place(x) > clear:
            ticks.append(x)
    return sorted(
        [*ticks, *(x for x in (0.6 * edge, 0.9 * edge) if x < d[-1] and place(x) - place(0) > clear)]
    )


def _shade_floors(
    panels: tuple[Axes, ...], d: np.ndarray, deviance: np.ndarray, edge: float, limit: float
) -> bool:
    """Shade the D that are not rejected and mark D = 0; whether there are any of the former."""
    place = np.linspace(-np.log(edge - d[0]), -np.log(edge - d[-1]), 400)
    kept = np.interp(place, -np.log(edge - d), deviance) <= limit
    for axes in panels:
        axes.fill_between(
            edge - np.exp(-place),
            0,
            1,
            where=kept,
            transform=axes.get_xaxis_transform(),
            color="#009E73",
            alpha=0.18,
            lw=0,
            zorder=0.5,
        )
        axes.axvline(0.0, color="black", lw=1.0, ls=(0, (1, 1.5)), zorder=1)
    panels[0].annotate(
        "D = 0",
        (0.0, 0.03),
        xycoords=panels[0].get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=SMALL,
    )
    return bool(kept.any())


@styled
def residual_figure(study: Study) -> Figure | None:
    """Heat map over N x V of what each cell's error is above the chosen law's, in points of score.

    None without a fit, or where the grid has more than 400 places.
    """
    law = usable(study)
    if law is None or study.table.sizes.size * study.table.token_counts.size > MOST_TILES:
        return None
    table, (factor, unit) = study.table, points_of(study.table)
    left = factor * (table.error - law.fit.predict(table.n, table.v))
    cells = cell_grid(table.n, table.v, left)
    reach = float(np.nanmax(np.abs(cells[2]))) or 1.0
    title = f"{table.group}, {study.origin}: residuals of the {law.fit.law.name} law"
    figure, axes = new_figure(title, map_height(table.sizes.size))
    digits = 1 if table.target == "error" else 3

    def text(value: float) -> str:
        return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")

    mesh = heat_map(axes, cells, colormaps["PuOr_r"].resampled(65), (-reach, reach), text)
    what = "error" if table.target == "error" else "loss"
    add_colour_bar(figure, axes, mesh, f"{what} above the law's,\n{unit}")
    return figure


def standardised(fit: Fit) -> np.ndarray:
    """[cells] residuals over their sd, which is sd sqrt(1 - leverage); NaN where a cell fits itself."""
    jac = scaled_jacobian(fit)
    unit = jac / np.maximum(np.linalg.norm(jac, axis=0), 1e-300)
    basis, values, _ = np.linalg.svd(unit, full_matrices=False)
    leverage = (basis[:, values > 1e-10 * values[0]] ** 2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = fit.residuals() * np.sqrt(fit.cells.weights) / (fit.sd * np.sqrt(1 - leverage))
    return np.asarray(np.where(leverage < 1 - 1e-9, scaled, np.nan))


@styled
def normal_figure(study: Study) -> Figure | None:
    """Normal quantile plot of the chosen law's standardised residuals, the worst cell named.

    With the exact pointwise 95% envelope of normal order statistics. None without a fit, for an exact one, or
    where too few cells are left over to have a distribution.
    """
    law = usable(study)
    if law is None or law.fit.freedom < MIN_FREEDOM or not law.fit.sd > 0:
        return None
    table, residual = study.table, standardised(law.fit)
    order = np.argsort(residual)[: int(np.isfinite(residual).sum())]
    if order.size < 3:
        return None
    rank = np.arange(1, order.size + 1)
    low, middle, high = (ndtri(betaincinv(rank, order.size + 1 - rank, p)) for p in (0.025, 0.5, 0.975))
    figure, axes = new_figure(
        f"{table.group}, {study.origin}: normal plot of the {law.fit.law.name} law's residuals"
    )
    axes.fill_between(middle, low, high, color=GREY, alpha=0.2, lw=0)
    axes.plot(middle[[0, -1]], middle[[0, -1]], color=GREY, lw=1.2)
    sizes = table.sizes if table.sizes.size <= len(MARKERS) else table.sizes[:0]
    colours = size_colours(sizes.size)
    kept = rank - 1
    if order.size > _MOST_POINTS:  # both tails whole and the middle thinned
        thin = np.linspace(0, order.size - 1, _MOST_POINTS).round().astype(int)
        kept = np.unique(np.concatenate([thin, kept[:50], kept[-50:]]))
    for i, (n, colour) in enumerate(zip(sizes, colours, strict=True)):
        own = kept[table.n[order[kept]] == n]
        axes.plot(
            middle[own],
            residual[order[own]],
            color=colour,
            marker=MARKERS[i],
            ms=6,
            mec=DARK,
            mew=0.5,
            ls="",
            zorder=3,
        )
    if not sizes.size:
        axes.plot(middle[kept], residual[order[kept]], color=BLUE, marker="o", ms=4, ls="", zorder=3)
    at = int(np.abs(residual[order]).argmax())
    worst, left = int(order[at]), bool(at > 0)
    axes.annotate(
        f"N = {count(table.n[worst])}, V = {tokens(table.v[worst])}",
        (middle[at], residual[worst]),
        xytext=(4, 12) if left else (-4, -12),
        textcoords="offset points",
        va="center",
        ha="right" if left else "left",
        fontsize=SMALL,
        color=DARK,
    )
    axes.margins(x=0.06, y=0.12)
    axes.set_xlabel("normal quantile (median of the order statistic)")
    axes.set_ylabel("standardised residual, sd")
    handles = size_handles(sizes, colours, line=False)
    handles.append(Patch(color=GREY, alpha=0.2, lw=0, label="95% if normal (pointwise)"))
    add_legend(figure, handles, 3)
    return figure


@styled
def forest_figure(study: Study) -> Figure | None:
    """One row a task: slopes along ln N and ln V, alone (95% t interval) and partially pooled, on the mean.

    Sorted by the slope along ln V. None without pooled slopes or with a single task.
    """
    pooled = study.pooled
    if pooled is None or len(pooled.tasks) < 2:
        return None
    factor, unit = points_of(study.table)

    def order(task: TaskSlopes) -> tuple[bool, float]:
        slope = task.slope_v or task.slope_n
        return task.slope_v is not None, slope.pooled if slope else 0.0

    tasks = sorted(pooled.tasks, key=order)
    panels = [
        (label, mean, [getattr(task, name) for task in tasks])
        for label, mean, name in (("ln N", pooled.mean_n, "slope_n"), ("ln V", pooled.mean_v, "slope_v"))
        if mean is not None
    ]
    figure = Figure(figsize=(WIDTH, float(np.clip(1.7 + 0.3 * len(tasks), 2.6, 40.0))), layout="constrained")
    figure.suptitle(
        wrapped(f"{study.table.group}, {study.origin}: slopes of each task"),
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    what = "error" if study.table.target == "error" else "loss"
    if len(panels) > 1:
        unit = unit.replace(" of score", "")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, mean, slopes) in zip(all_axes, panels, strict=True):
        _forest_panel(axes, slopes, mean[0], factor)
        axes.set_xlabel(f"fall of {what} along {label},\n{unit} per e-fold")
    names = [task.task if len(task.task) <= 18 else task.task[:17] + "…" for task in tasks]
    all_axes[0].set_yticks(range(len(tasks)), [plain(name) for name in names])
    all_axes[0].set_ylim(-0.6, len(tasks) - 0.4)
    handles: list[Handle] = [
        Line2D([], [], color=GREY, lw=1.2, marker="o", mfc="white", ms=6, label="task alone, 95% t"),
        Line2D([], [], color=BLUE, lw=2.8, marker="o", ms=6, label="partially pooled, 95%"),
        Line2D([], [], color=ORANGE, lw=1.3, ls=(0, (5, 2)), label="mean"),
    ]
    add_legend(figure, handles, 3)
    return figure


def _forest_panel(axes: Axes, slopes: list[Slope | None], mean: float, factor: float) -> None:
    known = [(row, slope) for row, slope in enumerate(slopes) if slope is not None]
    # One degree of freedom makes t intervals that would dwarf all else: they leave the panel, as arrows.
    core = factor * np.array([[s.value, *s.pooled_interval, mean] for _, s in known])
    reach = factor * np.array([s.interval for _, s in known])
    span = float(np.ptp(core)) or 1.0
    low, high = max(reach.min(), core.min() - 1.5 * span), min(reach.max(), core.max() + 1.5 * span)
    low, high = min(low, float(core.min())), max(high, float(core.max()))
    axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.axvline(factor * mean, color=ORANGE, lw=1.3, ls=(0, (5, 2)), zorder=1)
    if axes.get_xlim()[0] < 0 < axes.get_xlim()[1]:
        axes.axvline(0.0, color="black", lw=0.9, zorder=1)
    for row, slope in known:
        left, right = (factor * end for end in slope.interval)
        axes.plot([max(left, low), min(right, high)], [row + 0.16] * 2, color=GREY, lw=1.2, zorder=2)
        for end, cut, marker in ((low, left < low, "<"), (high, right > high, ">")):
            if cut:
                axes.plot([end], [row + 0.16], color=GREY, marker=marker, ms=5, zorder=2)
        axes.plot([factor * slope.value], [row + 0.16], color=GREY, marker="o", mfc="white", ms=6, zorder=3)
        axes.plot(
            factor * np.array(slope.pooled_interval),
            [row - 0.16] * 2,
            color=BLUE,
            lw=2.8,
            zorder=2,
            solid_capstyle="butt",
        )
        axes.plot([factor * slope.pooled], [row - 0.16], color=BLUE, marker="o", ms=6, zorder=3)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
