"""The report's sentences, each written from measured numbers; no sentence claims what a verdict does not
carry.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.data import Dataset
from analysis.document import link
from analysis.optimum import TokenChoice
from analysis.study import Study
from analysis.units import count, fixed, interval, percent, significant, tokens

PAPER = link("arXiv 2411.03312", "https://arxiv.org/abs/2411.03312")
_TOY = 1e8  # below this the report warns that the LLMs are far from those in use


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
    cells = len(
        {pair for study in measured for pair in zip(study.table.llm_name, study.table.v, strict=True)}
    )
    tasks = sum(len(study.table.tasks) for study in measured)
    first = (
        f"{plural(cells, 'cell')} were measured: {plural(sizes.size, 'LLM size')} ({_span(sizes, 'count')} "
        f"parameters) and {plural(counts.size, 'visual token count')} ({_span(counts, 'tokens')}), on "
        f"{plural(tasks, 'task')} in {plural(len(measured), 'group')} "
        f"({listed([study.table.group for study in measured])})."
    )
    third = "The best number of visual tokens is therefore " + _best_v([s for s in measured if s.identified])
    if paper:
        ratios = listed([f"{_ratio(study)} ({study.table.group})" for study in paper])
        third += f"; the numbers published in {PAPER} give ratios of {ratios}"
    return f"{first} {_ratios(measured)} {third}."


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
    if not studies:
        return "not known from these cells"
    here = [(next(c for c in study.tokens if c.q == study.q), study) for study in studies]
    asked = {tokens(study.q) for study in studies}
    if len(asked) == 1:
        parts = listed([f"{choice_text(choice)} for {study.table.group}" for choice, study in here])
        return f"{parts}, at Q = {asked.pop()} text tokens"
    return listed(
        [f"{choice_text(choice)} for {study.table.group} at Q = {tokens(study.q)}" for choice, study in here]
    )


def choice_text(choice: TokenChoice) -> str:
    """V*(Q) with interval, or the corner it sits in."""
    value = tokens(choice.v)
    if choice.corner and choice.interval[0] == choice.interval[1]:
        return f"{value} (the {'fewest' if choice.corner == 'V_min' else 'most'} measured)"
    return f"{value} {interval(choice.interval)}"


def token_statement(study: Study) -> str:
    """What V*(Q) is for one group, or why there is none."""
    name = f"{study.table.group}, {study.origin}"
    if study.no_fit is not None:
        return f"{name}: no law, because {study.no_fit}."
    verdict = study.verdict
    if verdict is None or not verdict.identified or verdict.ratio is None:
        return f"{name}: no best V can be given; {verdict.reason if verdict else 'no fit'}."
    low, high = verdict.interval or (verdict.ratio, verdict.ratio)
    if high < 1:
        rule = "the ratio is below 1, so the law asks for the most tokens at any Q"
    elif low <= 1:
        rule = "the ratio's interval contains 1, so a best V is weakly determined"
    else:
        rule = f"V*(Q) = Q / ({verdict.ratio:.2f} - 1), kept within the measured V"
    return f"{name}: {rule}. V* is {listed(_choices(study))}."


def _choices(study: Study) -> list[str]:
    """V* at each Q, those with the same answer joined."""
    answers: dict[str, list[str]] = {}
    for choice in study.tokens:
        answers.setdefault(choice_text(choice), []).append(tokens(choice.q))
    return [f"{answer} at Q = {listed(values)}" for answer, values in answers.items()]


def choice_of_law(study: Study) -> str:
    """Which law describes the cells best, and by how much."""
    best = study.best
    if best is None:
        return f"No law is fitted: {study.no_fit}."
    others = [name for name in study.fits if name != best.law.name]
    if study.margin is None:
        lost = [name for name in others if not study.fits[name].converged]
        if lost and best.converged:
            return f"The {best.law.name} law is chosen: the fit of the {listed(lost)} law did not converge."
        if not best.converged:
            return "No fit converged: the parameters ran away, and no curve is drawn."
        return f"The {best.law.name} law has the smaller error; AICc is undefined here."
    grade = (
        "the two cannot be told apart"
        if study.margin < 2
        else "clear"
        if study.margin > 10
        else "some evidence"
    )
    return (
        f"The {best.law.name} law is chosen; its AICc is {significant(study.margin)} "
        f"lower than that of the {listed(others)} law ({grade})."
    )


def quality_notes(study: Study) -> list[str]:
    """Copied and dropped cells, and the grid's holes, one sentence each."""
    table, notes = study.table, []
    for earlier, later in study.copies:
        names = [f"({table.llm_name[i]}, V = {tokens(table.v[i])})" for i in (later, earlier)]
        notes.append(
            f"{table.group}, {study.origin}: cell {names[0]} equals {names[1]} to all digits, so one is a "
            "copy."
        )
        if study.without_copies is not None and study.without_copies.ratio is not None:
            notes[-1] += f" Without {names[0]} the ratio is {study.without_copies.ratio:.3f}."
    if table.dropped:
        notes.append(f"{table.group}: left out as incomplete: {'; '.join(table.dropped)}.")
    full = table.sizes.size * table.token_counts.size
    if 0 < table.n.size < full:
        notes.append(
            f"{table.group}: {full - table.n.size} of the {full} cells of the grid are not measured."
        )
    return notes


def limits(dataset: Dataset, studies: list[Study]) -> list[str]:
    """What the data cannot tell, from its own counts and verdicts."""
    notes = []
    measured = [study for study in studies if study.table.n.size]
    for study in studies:
        if study.no_fit is not None:
            notes.append(f"{study.table.group}: {study.no_fit}.")
        elif not study.identified and study.verdict is not None:
            notes.append(f"{study.table.group}: not identified, because {study.verdict.reason}.")
        elif (
            study.verdict is not None
            and study.verdict.interval
            and study.verdict.interval[0] < 1 < study.verdict.interval[1]
        ):
            notes.append(
                f"{study.table.group}: whether size or tokens matter more; the ratio's interval contains 1."
            )
        if (
            study.margin is not None
            and study.margin < 2
            and len({v.identified for v in study.verdicts.values()}) > 1
        ):
            notes.append(
                f"{study.table.group}: which law holds; the two fit alike, but only one of them gives a "
                "ratio."
            )
    if measured:
        notes += _scope(measured)
    for study in measured:
        notes += _noise(study)
    if dataset.unfinished:
        notes.append(f"{plural(dataset.unfinished, 'row')} of unfinished runs were not read.")
    notes.append(
        "Real cost: the cost here is the LLM's prefill alone. The vision tower, decoding, caches and "
        "latency are not in it, and they move the choice."
    )
    return notes


def _scope(studies: list[Study]) -> list[str]:
    sizes = np.unique(np.concatenate([study.table.n for study in studies]))
    v = np.concatenate([study.table.v for study in studies])
    notes = [
        f"Other LLMs: there are {plural(sizes.size, 'LLM size')}, and N stands for everything in which "
        "these LLMs differ (depth, width, training). The intervals resample cells, not LLMs, so they are "
        "too narrow for another family.",
        f"Token counts outside {tokens(v.min())} to {tokens(v.max())}: a best V at either end is a limit of "
        "the grid, not an optimum. That V* is the same at every budget is a property of both laws, not a "
        "finding.",
    ]
    if sizes.max() < _TOY:
        notes.append(
            f"Large models: the largest LLM here has {count(sizes.max())} parameters. The ratio describes "
            "these toys; it is not a forecast for models of billions of parameters."
        )
    seeds = np.concatenate([study.table.seeds for study in studies])
    if seeds.max() == 1:
        notes.append(
            "Noise between training runs: every cell has one seed, so it cannot be told from lack of fit."
        )
    if any(len(study.table.tasks) > 1 for study in studies):
        notes.append(
            "Single tasks: a group is the plain mean of its tasks, which may differ in how they use tokens."
        )
    return notes


def _noise(study: Study) -> list[str]:
    table, notes = study.table, []
    noise = float(np.sqrt(np.mean(table.sampling_sd**2)))
    if study.best is not None and math.isfinite(noise):
        if study.best.sd <= 1.5 * noise:
            reading = "the law explains what these items can show; a finer one needs more items"
        else:
            reading = "the rest is training noise or the law's shape, which these cells do not separate"
        notes.append(
            f"{table.group}, finer structure: the residual sd is {percent(study.best.sd, 2)}, the sampling "
            f"noise of the test items alone {percent(noise, 2)}; {reading}."
        )
    if study.chance_cells:
        notes.append(
            f"{table.group}: {study.chance_cells} of {plural(table.n.size, 'cell')} score within two "
            "sampling sd of guessing; they say little about scaling."
        )
    helped, compared = study.blind
    if compared and helped < compared:
        notes.append(
            f"{table.group}: in {compared - helped} of {plural(compared, 'cell')} the model with the image "
            "is no better than the same LLM without it."
        )
    return notes
