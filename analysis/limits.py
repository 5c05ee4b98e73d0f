"""What the data cannot tell, written from the verdicts and from the data's own counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.compare import Comparison
from analysis.cost import FlopsCost
from analysis.data import Dataset
from analysis.prose import plural
from analysis.study import Study
from analysis.units import count, points, tokens

_TOY = 1e8  # below this the report warns that the LLMs are far from those in use


def limits(dataset: Dataset, studies: list[Study]) -> list[str]:
    """One sentence a limit, most serious first."""
    notes = [line for study in studies for line in _verdicts(study)]
    measured = [study for study in studies if study.table.n.size]
    if measured:
        notes += _scope(measured)
    for study in measured:
        notes += _noise(study)
    if dataset.unfinished:
        notes.append(f"{plural(dataset.unfinished, 'row')} of unfinished runs were not read.")
    return notes + _cost(studies)


def limits_of_methods(comparisons: Sequence[Comparison]) -> list[str]:
    """What a comparison of methods leaves open, one sentence each."""
    points = [point for comparison in comparisons for point in comparison.points]
    notes = []
    if all(point.seeds == 1 for point in points):
        notes.append(
            "Noise between training runs: every point has one seed, and its interval holds the noise of the "
            "test items alone. A gap between two methods may be the luck of a training."
        )
    if any(point.interval for point in points):
        notes.append(
            "Paired tests: all methods answer the same items, so two of them can differ more surely than "
            "their intervals, which take the items as drawn anew for each, show."
        )
    notes.append(
        "Other amounts of training and other LLMs: methods learn at different speeds, and the order may "
        "change with steps, learning rate, LLM and tower."
    )
    largest = max(comparison.n for comparison in comparisons)
    if largest < _TOY:
        notes.append(
            f"Large models: the largest LLM here has {count(largest)} parameters; the "
            "order of methods is not a forecast for models of billions of parameters."
        )
    return notes


def _verdicts(study: Study) -> list[str]:
    """What the verdicts leave open for one group."""
    group, best = study.table.group, study.best
    if study.no_fit is not None:
        return [f"{group}: {study.no_fit}."]
    if best is None or not best.verdict.identified:
        return [
            f"{group}: the ratio is not identified, because {best.verdict.reason if best else 'no law fits'}."
        ]
    notes = []
    low, high = best.verdict.interval or (math.nan, math.nan)
    if low < 1 < high:
        notes.append(f"{group}: whether size or tokens matter more; the ratio's interval contains 1.")
    rivals = [name for name, law in study.laws.items() if _close(study, name) and law is not best]
    if rivals:
        notes.append(f"{group}: which law holds; within 2 of the least AICc lie also {', '.join(rivals)}.")
    regular = study.laws.get("regular")
    if regular is not None and "parameters_unidentified" in regular.verdict.flags:
        notes.append(
            f"{group}: the exponents alpha and beta and the floor D one by one; only their ratio is known."
        )
    bounds = [name for name, law in study.laws.items() if "D = 0" in law.fit.bounds]
    if bounds:
        notes.append(
            f"{group}: a positive floor D; {', '.join(bounds)} sit on the bound D = 0, where resampling "
            "hides its uncertainty."
        )
    if best.validation.lono_rms is None:
        notes.append(
            f"{group}: how well a new LLM is predicted; the {best.fit.law.name} law needs all sizes to be "
            "fitted."
        )
    if study.optimum is not None and study.optimum.v > 0:
        near, far = study.optimum.indifference
        notes.append(
            f"{group}: one best V; every V from {tokens(near)} to {tokens(far)} is within one residual sd of "
            "the best at that cost."
        )
    return notes


def _close(study: Study, name: str) -> bool:
    least = study.best.fit.aicc if study.best else None
    own = study.laws[name].fit.aicc
    return least is not None and own is not None and own - least < 2


def _cost(studies: list[Study]) -> list[str]:
    """What the cost leaves out."""
    costs = [study.cost for study in studies]
    if not costs or not isinstance(costs[0], FlopsCost):
        return []
    missing = []
    if not costs[0].fixed_flops:
        missing.append("the vision tower")
    if not costs[0].gen_tokens:
        missing.append("decoding")
    if not costs[0].intensity:
        missing.append("latency")
    if not missing:
        return []
    return [f"Real cost: {', '.join(missing)} are not in the cost here, and they move the choice."]


def _scope(studies: list[Study]) -> list[str]:
    sizes = np.unique(np.concatenate([study.table.n for study in studies]))
    v = np.concatenate([study.table.v for study in studies])
    notes = [
        f"Other LLMs: there are {plural(sizes.size, 'LLM size')}, and N stands for everything in which "
        "these LLMs differ (depth, width, training). Intervals that resample cells are too "
        "narrow for another family; the mixed-effects one allows for it.",
        f"Token counts outside {tokens(v.min())} to {tokens(v.max())}: a best V at either end is a limit of "
        "the grid, not an optimum. That V* is the same at every budget is a property of every law of one "
        "index, not a finding.",
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
    if study.best is not None and math.isfinite(noise) and math.isfinite(study.best.fit.sd):
        if study.best.fit.sd <= 1.5 * noise:
            reading = "the law explains what these items can show; a finer one needs more items"
        else:
            reading = "the rest is training noise or the law's shape, which these cells do not separate"
        notes.append(
            f"{table.group}, finer structure: the residual sd is {points(study.best.fit.sd, table.target)}, "
            f"the sampling noise of the test items alone {points(noise, table.target)}; {reading}."
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
