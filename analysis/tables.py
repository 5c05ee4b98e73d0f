"""The report's tables, from studies to text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from analysis.bootstrap import percentile_interval
from analysis.compare import Comparison
from analysis.design import Candidate
from analysis.document import Grid
from analysis.optimum import Optimum, Pick
from analysis.study import Deployment, LawStudy, Study
from analysis.units import cost, count, fixed, flops, interval, level, percent, points, significant, tokens

_NEXT_CELLS = 8


def law_table(study: Study) -> Grid:
    """Every fitted law, best first: parameters with 95% intervals, fit, left-out errors, ratio and
    verdict.
    """
    least = next((law.fit.aicc for law in study.laws.values() if law.fit.aicc is not None), None)
    rows = [_law_row(name, law, least, study) for name, law in study.laws.items()]
    header = (
        "law",
        "parameters [95% bootstrap]",
        "R2",
        "AICc, over the least",
        "residual sd",
        "rms left out: a cell / an LLM / a V",
        "ratio [95% profile F]",
        "verdict",
    )
    return Grid(header, tuple(rows), f"{study.table.group}, {study.origin}.")


def _law_row(name: str, law: LawStudy, least: float | None, study: Study) -> tuple[str, ...]:
    fit, target = law.fit, study.table.target
    left_out = (law.validation.loo_rms, law.validation.lono_rms, law.validation.lovo_rms)
    ratio = (
        f"{law.verdict.ratio:.2f}\n{fixed(law.verdict.interval)}" if law.verdict.ratio is not None else "-"
    )
    return (
        f"{name}\n{'(chosen)' if law is study.best else ''}".rstrip(),
        _parameters(law),
        f"{fit.r2:.4f}" if fit.r2 is not None else "-",
        f"{fit.aicc - least:.1f}" if fit.aicc is not None and least is not None else "-",
        points(fit.sd, target) if np.isfinite(fit.sd) else "-",
        " / ".join(points(x, target) if x is not None else "-" for x in left_out),
        ratio,
        law.verdict.kind,
    )


def _parameters(law: LawStudy) -> str:
    """One line a parameter of the printed formula, with its interval where it has one."""
    usable = law.replicates.usable and law.fit.converged
    spread = law.fit.law.natural(law.replicates.theta, law.fit.cells.frame) if usable else {}
    # Where lam may be 0, K and D run through infinity: percentiles of such a spread are no interval.
    open_ended = ("K", "D") if "parameters_unidentified" in law.verdict.flags else ()
    lines = []
    for label, value in law.fit.params.items():
        ends = percentile_interval(np.asarray(spread[label])) if usable else (np.nan, np.nan)
        shown = f" {interval(ends)}" if np.isfinite(ends).all() else ""
        lines.append(f"{label} = {significant(value, 4)}{' (no bounds)' if label in open_ended else shown}")
    return "\n".join(lines)


def method_table(study: Study) -> Grid:
    """95% intervals of the chosen law by every method."""

    def shown(pair: tuple[float, float] | None, scale: float = 1.0) -> str:
        return interval((pair[0] * scale, pair[1] * scale)) if pair else "-"

    scale = 100.0 if study.table.target == "error" else 1.0
    rows = tuple(
        (
            method.name,
            shown(method.ratio),
            shown(method.slope_n, scale),
            shown(method.slope_v, scale),
            shown(method.visual_tokens),
            f"[{count(method.n[0])}, {count(method.n[1])}]" if method.n else "-",
            f"[{percent(method.share[0], 0)}, {percent(method.share[1], 0)}]" if method.share else "-",
            method.note or "",
        )
        for method in study.methods
    )
    unit = "pt" if scale == 100 else "loss"
    header = ("method", "ratio", f"{unit} per ln N", f"{unit} per ln V", "V*", "N*", "visual share", "remark")
    law = study.best.fit.law.name if study.best else ""
    caption = (
        f"{study.table.group}, {study.origin}, {law} law; V*, N* and share at "
        f"{cost(study.budget, study.cost.unit)}."
    )
    return Grid(header, rows, caption)


def comparison_table(comparison: Comparison) -> Grid:
    """Every method at every V: error, FLOPs, parameters; by V, then error."""

    def known(value: float, form: Callable[[float], str]) -> str:
        return form(value) if np.isfinite(value) else "-"

    rows = []
    for point in comparison.points:
        ends = f" [{percent(point.interval[0])}, {percent(point.interval[1])}]" if point.interval else ""
        best = [name for name, is_best in (("V", point.best_at_v), ("FLOPs", point.best_at_flops)) if is_best]
        rows.append(
            (
                tokens(point.v),
                point.method,
                percent(point.error) + ends,
                *(known(point.by_group.get(group, np.nan), percent) for group in comparison.groups),
                known(point.infer_flops, flops),
                known(point.without_tower, flops),
                known(point.compressor_params, count),
                ", ".join(best) or "-",
            )
        )
    header = (
        "V",
        "method",
        "error [95%]" if any(point.interval for point in comparison.points) else "error",
        *(f"error, {group}" for group in comparison.groups),
        "FLOPs an answer",
        "without the tower",
        "compressor parameters",
        "Pareto-best by",
    )
    blind = "not measured" if comparison.blind is None else percent(comparison.blind)
    caption = f"{comparison.llm_name} ({count(comparison.n)} parameters); error without an image: {blind}."
    return Grid(header, tuple(rows), caption)


def falling_table(studies: list[Study]) -> Grid:
    """How often error falls between neighbouring cells, and which of two equally dear cells is better."""

    def share(falling: int, pairs: int) -> str:
        return f"{falling} of {pairs}" + (f" ({percent(falling / pairs, 0)})" if pairs else "")

    rows = tuple(
        (
            study.table.group,
            study.origin,
            *(share(study.falling[key].falling, study.falling[key].pairs) for key in ("n", "v")),
            share(study.iso_cost.falling, study.iso_cost.pairs),
        )
        for study in studies
        if study.falling
    )
    header = (
        "group",
        "data",
        "error falls with N, same V",
        "error falls with V, same N",
        "equal cost (within 15%): the larger LLM with fewer tokens wins",
    )
    return Grid(header, rows)


def multiplier_table(study: Study) -> Grid:
    """How many times the optimum's budget each measured V needs for the same error."""
    rows = ((*(f"x{significant(x)}" if np.isfinite(x) else "out of reach" for _, x in study.multiplier),),)
    header = tuple(f"V = {tokens(v)}" for v, _ in study.multiplier)
    caption = (
        f"{study.table.group}, {study.origin}: compute that a fixed V needs for the error which the best V "
        f"reaches with {cost(study.budget, study.cost.unit)}."
    )
    return Grid(header, rows, caption)


def _pick(pick: Pick | None, study: Study) -> tuple[str, str]:
    if pick is None:
        return "-", "-"
    name = pick.llm_name if pick.llm_name == count(pick.n) else f"{pick.llm_name} ({count(pick.n)})"
    target = study.table.target
    band = f" [{level(pick.band[0], target)}, {level(pick.band[1], target)}]" if pick.band else ""
    price = cost(pick.cost, study.cost.unit)
    return f"{name}, V = {tokens(pick.v)}\n{price}", level(pick.error, target) + band


def deploy_table(study: Study) -> Grid:
    """For each budget the best measured cell, the law's pick from the measured menu, and its free optimum."""
    rows = tuple(
        (cost(item.budget, study.cost.unit), *_pick(item.measured, study), *_law_columns(item, study))
        for item in study.deployments
    )
    q = "" if study.q_measured else " (Q is the paper's, as the data record none)"
    header = (
        "budget",
        "best measured cell",
        "error [sampling]",
        "law's pick from the menu",
        "error [95%]",
        "law, any N: N*, V*",
        "V within one sd",
    )
    return Grid(header, rows, f"{study.table.group}, {study.origin}; cost: {study.cost.describe()}{q}.")


def _law_columns(item: Deployment, study: Study) -> tuple[str, str, str, str]:
    if item.free is None:
        if study.identified:
            return "-", "-", "the budget buys no LLM", "-"
        return "no law fitted" if study.no_fit else "not identified", "-", "-", "-"
    return *_pick(item.law, study), _free(item.free), _indifference(item.free)


def _free(free: Optimum) -> str:
    return f"{count(free.n)}, {tokens(free.v)}" + ("\n(N not measured)" if free.extrapolated else "")


def _indifference(free: Optimum) -> str:
    return " to ".join(str(round(v)) if v >= 10 else significant(v, 2) for v in free.indifference)


def design_table(study: Study) -> Grid:
    """The candidates that take most off sd(ln ratio) per unit of training cost, each LLM size at most
    twice.
    """
    design = study.design
    assert design is not None
    chosen: list[Candidate] = []
    for candidate in sorted(design.candidates, key=lambda item: -item.gain_per_cost):
        if sum(other.n == candidate.n for other in chosen) < 2 and len(chosen) < _NEXT_CELLS:
            chosen.append(candidate)
    rows = tuple(
        (
            count(item.n),
            tokens(item.v) + (" (again)" if item.repeat else ""),
            _off(item.ratio_left),
            _off(item.bend_left) if item.bend_left is not None else "-",
            _off(item.target_left),
            significant(item.information, 2),
            percent(item.cost, 1 if item.cost < 0.1 else 0),
        )
        for item in chosen
    )
    n, v = design.target
    header = (
        "LLM",
        "V",
        "off sd(ln ratio)",
        "off sd(lam)",
        f"off sd of the prediction at ({count(n)}, V = {tokens(v)})",
        "gain in ln det",
        "training cost, of the dearest cell",
    )
    now = f"now sd(ln ratio) = {significant(design.ratio_sd, 2)}"
    if design.bend_sd is not None:
        now += f", sd(lam) = {significant(design.bend_sd, 2)}"
    now += f", sd of that prediction {points(design.target_sd, study.table.target)}"
    return Grid(header, rows, f"{study.table.group}, {study.origin}, by the {design.law} law: {now}.")


def _off(left: float) -> str:
    return f"-{100 * (1 - left):.1f}%"


def task_table(study: Study) -> Grid:
    """Slopes of each task alone and after partial pooling."""
    pooled = study.pooled
    assert pooled is not None
    rows = []
    for task in sorted(pooled.tasks, key=lambda item: item.slope_v.pooled if item.slope_v else 0.0):
        columns = [task.task]
        for slope in (task.slope_n, task.slope_v):
            if slope is None:
                columns += ["-", "-"]
                continue
            columns.append(
                f"{100 * slope.value:.2f} [{100 * slope.interval[0]:.2f}, {100 * slope.interval[1]:.2f}]"
            )
            low, high = slope.pooled_interval
            columns.append(f"{100 * slope.pooled:.2f} [{100 * low:.2f}, {100 * high:.2f}]")
        columns.append(significant(task.ratio, 3) if task.ratio is not None else "-")
        rows.append(tuple(columns))
    header = (
        "task",
        "per ln N, alone",
        "per ln N, pooled",
        "per ln V, alone",
        "per ln V, pooled",
        "ratio, pooled",
    )
    spread = [
        f"{axis}: mean {100 * mean[0]:.2f}, sd between tasks {100 * sd:.2f}"
        for axis, mean, sd in (
            ("ln N", pooled.mean_n, pooled.spread_n),
            ("ln V", pooled.mean_v, pooled.spread_v),
        )
        if mean is not None
    ]
    return Grid(
        header, tuple(rows), f"{study.table.group}, {study.origin}, points of score; {'; '.join(spread)}."
    )


def cell_table(studies: list[Study]) -> Grid:
    """Every cell: LLM, N, V, cost, counted FLOPs, and the error of each group; V = 0 is the LLM without an
    image.
    """
    errors: dict[tuple[float, str, float], dict[str, str]] = defaultdict(dict)
    counted: dict[tuple[float, str, float], list[float]] = defaultdict(list)
    for study in studies:
        table = study.table
        sizes = dict(zip(table.llm_name, table.n, strict=True))
        for i, name in enumerate(table.llm_name):
            key = float(table.n[i]), name, float(table.v[i])
            errors[key][table.group] = level(float(table.error[i]), table.target)
            if np.isfinite(table.infer_flops[i]):
                counted[key].append(float(table.infer_flops[i]))
        for name, error in table.blind.items():
            if name in sizes:
                errors[float(sizes[name]), name, 0.0][table.group] = level(error, table.target)
    costs = {study.cost.describe(): study.cost for study in studies}
    # Groups that are charged differently have no one cost a cell.
    price = next(iter(costs.values())) if len(costs) == 1 else None
    groups = [study.table.group for study in studies]
    rows = []
    for key in sorted(errors):
        n, name, v = key
        total = flops(float(np.mean(counted[key]))) if key in counted else "-"
        shown = tuple(errors[key].get(group, "-") for group in groups)
        label = "0 (no image)" if v == 0 else tokens(v)
        rows.append(
            (name, count(n), label, cost(float(price(n, v)), price.unit) if price else "-", total, *shown)
        )
    header = ("LLM", "N", "V", "cost", "counted FLOPs", *(f"error, {group}" for group in groups))
    caption = f"Cost: {', '.join(costs)}; counted FLOPs as the rows record them (- if they do not)."
    return Grid(header, tuple(rows), caption)
