"""The report's sentences, each written from measured numbers; no sentence claims what a verdict does not
carry.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.compare import Comparison, Point
from analysis.data import Dataset
from analysis.document import link
from analysis.optimum import Optimum
from analysis.study import Study
from analysis.units import count, fixed, interval, percent, significant, tokens
from analysis.verdict import IDENTIFIED

PAPER = link("arXiv 2411.03312", "https://arxiv.org/abs/2411.03312")


def plural(number: int, noun: str) -> str:
    """'1 cell', '3 cells'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _span(values: np.ndarray, form: str) -> str:
    text = [count(value) if form == "count" else tokens(value) for value in (values[0], values[-1])]
    return text[0] if len(values) == 1 else f"{text[0]} to {text[1]}"


def summary(dataset: Dataset, studies: list[Study], paper: list[Study]) -> str:
    """Three sentences: what was measured, what the laws say, what that means for V beside the paper's
    numbers.
    """
    measured = [study for study in studies if study.table.n.size]
    if not measured:
        return f"{plural(dataset.rows, 'row')} read, but no cell with an image is complete: nothing to fit."
    sizes = np.unique(np.concatenate([study.table.n for study in measured]))
    counts = np.unique(np.concatenate([study.table.v for study in measured]))
    grids = [set(zip(study.table.llm_name, study.table.v, strict=True)) for study in measured]
    same = all(grid == grids[0] for grid in grids)
    cells = len(grids[0]) if same else sum(len(grid) for grid in grids)
    tasks = len({task for study in measured if study.table.target == "error" for task in study.table.tasks})
    first = (
        f"{plural(cells, 'cell')} were measured: {plural(sizes.size, 'LLM size')} ({_span(sizes, 'count')} "
        f"parameters) and {plural(counts.size, 'visual token count')} ({_span(counts, 'tokens')}), on "
        f"{plural(tasks, 'task')} in "
        f"{plural(len(measured), 'group')}{'' if same else ', all groups together'} "
        f"({listed([study.table.group for study in measured])})."
    )
    third = "The best number of visual tokens is therefore " + _best_v([s for s in measured if s.identified])
    if paper:
        ratios = listed([f"{_ratio(study)} ({study.table.group})" for study in paper])
        third += f"; the numbers published in {PAPER} give ratios of {ratios}"
    return f"{first} {_ratios(measured)} {third}."


def methods_summary(comparison: Comparison) -> str:
    """What was compared on one LLM, and the best method at each V that several share."""
    counts = np.unique([point.v for point in comparison.points])
    best = []
    for v in counts:
        own = [point for point in comparison.points if point.v == v]
        if len(own) > 1:
            best.append(f"{own[0].method} at V = {tokens(v)} ({percent(own[0].error)}{_rivals(own)})")
    found = f" Least error: {listed(best)}." if best else " No two methods share a V."
    return (
        f"{len(comparison.methods)} methods were compared on {comparison.llm_name} "
        f"({count(comparison.n)} parameters) at {plural(counts.size, 'visual token count')} "
        f"({_span(counts, 'tokens')}), on {plural(len(comparison.tasks), 'task')}.{found}"
    )


def _rivals(own: list[Point]) -> str:
    """How many of the others have an interval that meets that of the first, the best."""
    lead, *others = own
    if lead.interval is None:
        return ""
    end = lead.interval[1]
    near = sum(1 for point in others if point.interval is not None and point.interval[0] <= end)
    return f"; the intervals of {near} of {len(others)} others meet its own"


def no_law(studies: list[Study]) -> str:
    """Why tables of several methods carry no law, in one line; empty where all do."""
    without = [study for study in studies if study.no_fit is not None]
    if not without:
        return ""
    sizes = np.unique(np.concatenate([study.table.n for study in studies]))
    if len(without) == len(studies) and sizes.size == 1:
        return (
            f"No scaling law is fitted: every cell has the same LLM size ({count(sizes[0])} parameters), and "
            "a law, fitted to one method at a time, needs two sizes and two token counts."
        )
    reasons: dict[str, list[str]] = {}
    for study in without:
        reasons.setdefault(str(study.no_fit), []).append(study.table.group)
    lines = [f"{listed(groups)} ({reason})" for reason, groups in reasons.items()]
    return f"No law is fitted to {'; '.join(lines)}."


def _ratio(study: Study) -> str:
    verdict = study.verdict
    return f"{verdict.ratio:.2f}" if verdict is not None and verdict.ratio is not None else "not identified"


def _ratios(studies: list[Study]) -> str:
    known = [
        f"{study.verdict.ratio:.2f} {fixed(study.verdict.interval)} for {study.table.group}"
        for study in studies
        if study.verdict is not None and study.verdict.ratio is not None
    ]
    unknown = [study.table.group for study in studies if not study.identified]
    parts = []
    if known:
        parts.append(
            "The ratio of the effect of LLM size to that of visual tokens (above 1: size matters more; 95% "
            "interval) is " + listed(known)
        )
    if unknown:
        start = (
            "it is not identified for " if known else "The ratio of the two effects is not identified for "
        )
        parts.append(start + listed(unknown))
    return "; ".join(parts) + "."


def _best_v(studies: list[Study]) -> str:
    known = [(study, study.optimum) for study in studies if study.optimum is not None]
    if not known:
        return "not known from these cells"
    costs = [study.cost.describe() for study, _ in known]
    if len(set(costs)) == 1:
        parts = listed([f"{choice_text(best)} for {study.table.group}" for study, best in known])
        return f"{parts}, at a cost of {costs[0]}"
    shown = zip(known, costs, strict=True)
    return listed([f"{choice_text(best)} for {study.table.group} ({cost})" for (study, best), cost in shown])


def choice_text(best: Optimum) -> str:
    """V* with its interval, or the corner it sits in."""
    value = tokens(best.v)
    if best.corner and (best.v_interval is None or best.v_interval[0] == best.v_interval[1]):
        return f"{value} (the {'fewest' if best.corner == 'V_min' else 'most'} measured)"
    return f"{value} {interval(best.v_interval)}"


def token_statement(study: Study) -> str:
    """What V*(Q) is for one group, or why there is none."""
    name = f"{study.table.group}, {study.origin}"
    if study.no_fit is not None:
        return f"{name}: no law, because {study.no_fit}."
    verdict, best = study.verdict, study.best
    if verdict is None or best is None or verdict.ratio is None:
        return f"{name}: no best V can be given; {verdict.reason if verdict else 'no fit'}."
    low, high = verdict.interval or (verdict.ratio, verdict.ratio)
    if not best.fit.law.single_index:
        rule = f"under the {best.fit.law.name} law the best V depends on the budget"
    elif high < 1:
        rule = "the ratio is below 1, so the law asks for the most tokens at any Q"
    elif low <= 1:
        rule = "the ratio's interval contains 1, so a best V is weakly determined"
    else:
        rule = f"V*(Q) = Q / ({verdict.ratio:.2f} - 1), kept within the measured V"
    return f"{name}: {rule}. V* is {listed(_choices(study))}.{_averaged(study)}"


def _averaged(study: Study) -> str:
    if study.averaged is None or study.optimum is None:
        return ""
    return (
        f" Averaged over the laws by Akaike weight, at this cost: {tokens(study.averaged.visual_tokens)} "
        f"{interval(study.averaged.interval)}."
    )


def _choices(study: Study) -> list[str]:
    """V* at each Q, those with the same answer joined."""
    answers: dict[str, list[str]] = {}
    for choice in study.tokens:
        answers.setdefault(choice_text(choice.best), []).append(tokens(choice.q))
    return [f"{answer} at Q = {listed(values)}" for answer, values in answers.items()]


def choice_of_law(study: Study) -> str:
    """Which law describes the cells best, by how much, and how it does on the largest LLM."""
    best = study.best
    if best is None:
        return f"No law is fitted: {study.no_fit}."
    name = best.fit.law.name
    if not best.fit.converged:
        return "No fit converged: the parameters ran away, and no curve is drawn."
    if study.margin is None:
        return f"The {name} law is chosen by its sum of squares; AICc is undefined here."
    second = list(study.laws)[1]
    grade = (
        "the two cannot be told apart"
        if study.margin < 2
        else "clear"
        if study.margin > 10
        else "some evidence"
    )
    text = (
        f"The {name} law is chosen; its AICc is {significant(study.margin)} lower than that of the {second} "
        f"law ({grade})."
    )
    return text + _largest(study)


def _largest(study: Study) -> str:
    """How the chosen law and the naive guesses predict the largest LLM from the others."""
    best = study.best
    if best is None or best.validation.largest is None:
        return ""
    text = (
        " Without its largest LLM it predicts that LLM's cells within "
        f"{percent(best.validation.largest[0])} on average"
    )
    guesses = {"persistence": "repeating the second largest", "line": "a line in ln N at each V"}
    known = [f"{guesses[name]} {percent(mean)}" for name, (mean, _) in study.baselines.items()]
    return f"{text} ({', '.join(known)})." if known else f"{text}."


def single_index(study: Study) -> str:
    """Whether size and tokens act through one index, and on which scale; lack of fit by LLM and token
    count.
    """
    parts = [
        f"an interaction of N and V {'improves' if p < 0.05 else 'does not improve'} the {law} law (F = "
        f"{significant(f, 2)}, p = {significant(p, 2)})"
        for law, f, p in study.interactions
        if math.isfinite(p)
    ]
    if study.mixed is not None:
        (row, row_p), (column, column_p) = study.mixed.row_f, study.mixed.column_f
        parts.append(
            f"lack of fit by LLM F = {significant(row, 2)} (p = {significant(row_p, 2)}), by token count F = "
            f"{significant(column, 2)} (p = {significant(column_p, 2)})"
        )
    return f"{study.table.group}: {'; '.join(parts)}." if parts else ""


def quality_notes(study: Study) -> list[str]:
    """Copied cells, and every verdict that is not plain 'identified', one sentence each."""
    table, notes = study.table, []
    for earlier, later in study.copies:
        names = [f"({table.llm_name[i]}, V = {tokens(table.v[i])})" for i in (later, earlier)]
        note = (
            f"{table.group}, {study.origin}: cell {names[0]} equals {names[1]} to all digits: likely a copy."
        )
        if study.without_copies is not None and study.without_copies.ratio is not None:
            note += f" Without {names[0]} the ratio is {study.without_copies.ratio:.3f}."
        notes.append(note)
    for name, law in study.laws.items():
        if law.verdict.kind != IDENTIFIED:
            notes.append(f"{table.group}, {study.origin}, {name}: {law.verdict.reason}.")
    notes += [f"{table.group}: {name} is not fitted: {reason}." for name, reason in study.refused.items()]
    return notes
