"""The published claims beside the evidence: a page of the report on the paper's own numbers.

Source of the claims: arXiv 2411.03312 (both versions) and its released scaling_law_code. Every figure on the
right is computed here, from the published cells alone.
"""

from __future__ import annotations

import numpy as np

from analysis.cost import FlopsCost
from analysis.data import load
from analysis.document import Block, Bullets, Grid, Heading, Text
from analysis.fit import fit
from analysis.laws import LAWS
from analysis.optimum import best_tokens, optimum
from analysis.pooling import pool
from analysis.profile import f_deviance
from analysis.published import exhaustive
from analysis.study import PAPER_ORIGIN, LawStudy, Study
from analysis.units import fixed, interval, percent, significant

PUBLISHED_RATIO = 0.077 / 0.015
_TEXT_TOKENS = 50.0


def claims(studies: list[Study]) -> list[Block]:
    """The page for whichever of the two published groups are there; empty for any other data."""
    own = {study.table.group: study for study in studies if study.origin == PAPER_ORIGIN and study.best}
    rows: list[tuple[str, str, str]] = []
    if "reasoning" in own:
        rows += _reasoning(own["reasoning"])
    if "ocr" in own:
        rows += _ocr(own["ocr"])
    if not rows:
        return []
    grid = Grid(("claim", "evidence in the published cells", "figure"), tuple(rows))
    intro = (
        "What the paper says, set beside what its own cells support. P is a share of bootstrap resamples of "
        "the chosen law; intervals are 95%."
    )
    blocks: list[Block] = [Heading("The published claims beside the evidence"), Text(intro), grid]
    weak = [line for study in own.values() for line in _search(study)] + _weaknesses(own)
    return [*blocks, Heading("Why the intervals are what they are", 3), Bullets(tuple(weak))]


def _flops(study: Study) -> float:
    """The study's budget, which the claims take in FLOPs also where an answer is charged milliseconds."""
    return study.budget if isinstance(study.cost, FlopsCost) else 1e12


def _tokens_at(law: LawStudy, q: float) -> np.ndarray:
    limits = float(law.fit.table.v.min()), float(law.fit.table.v.max())
    return best_tokens(law.fit, law.replicates.theta, FlopsCost(q), 1e12, *limits)


def nearest_measured(law: LawStudy, q: float, v: float) -> float:
    """Share of resamples whose V*(q) has v as the nearest measured token count (on the log axis)."""
    grid = law.fit.table.token_counts
    best = _tokens_at(law, q)
    nearest = grid[np.abs(np.log(best[:, None] / grid[None])).argmin(axis=1)]
    return float(np.mean(nearest == v))


def _reasoning(study: Study) -> list[tuple[str, str, str]]:
    law = study.best
    assert law is not None
    at_zero, at_fifty = (
        _tokens_at(law, 0.0),
        optimum(law.fit, FlopsCost(_TEXT_TOKENS), _flops(study), law.replicates),
    )
    assert at_fifty is not None
    forms = [float(np.exp(x)) for x in _form_spread(study)]
    rows = [
        (
            "With the text cached (Q = 0): the fewest visual tokens and the largest LLM",
            f"a > b in {percent(_larger(law), 1)} of resamples; without any law the larger LLM wins "
            f"{_iso(study, 0.0)} pairs of equal cost",
            f"P = {np.mean(at_zero == study.table.token_counts[0]):.3f}",
        ),
        (
            'Exactly "one" visual token',
            "a corner: 1 is the smallest V tested, V^-beta has no finite value at 0, and there is no cell "
            "without an image, so none against one cannot be decided",
            "not testable",
        ),
        (
            "Q = 50: about 16 tokens",
            f"V* = {significant(at_fifty.v)} {interval(at_fifty.v_interval)}; other laws say "
            f"{min(forms):.0f} to {max(forms):.0f}; within one residual sd lie "
            f"{significant(at_fifty.indifference[0], 2)} to {significant(at_fifty.indifference[1])} tokens",
            f"P(16 is the nearest tested) = {nearest_measured(law, _TEXT_TOKENS, 16.0):.3f}",
        ),
        (
            f"LLM size matters five times as much as tokens (0.077 / 0.015 = {PUBLISHED_RATIO:.2f})",
            f"ratio {law.fit.ratio:.2f}; with four LLMs as a sample of LLMs {_mixed(study)}",
            f"{fixed(law.profile.ends)}; P(ratio >= 5) = "
            f"{np.mean(law.fit.law.ratio(law.replicates.theta) >= 5):.2f}",
        ),
        _exponents(study),
        _literal(study),
        _large(study),
    ]
    return rows + _sensitivity()


def _larger(law: LawStudy) -> float:
    return float(np.mean(law.fit.law.ratio(law.replicates.theta) > 1))


def _iso(study: Study, q: float) -> str:
    from analysis.evidence import iso_cost_pairs

    pairs = iso_cost_pairs(study.table, FlopsCost(q)(study.table.n, study.table.v))
    return f"{pairs.falling} of {pairs.pairs}"


def _mixed(study: Study) -> str:
    ends = study.mixed.ratio if study.mixed else (None, None)
    return fixed((ends[0], ends[1])) if ends[0] is not None and ends[1] is not None else "unbounded"


def _form_spread(study: Study) -> np.ndarray:
    """ln V*(50) of every law at the budgets of 0.5, 7, 14 and 70 billion parameters with 16 tokens."""
    cost = FlopsCost(_TEXT_TOKENS)
    limits = float(study.table.v.min()), float(study.table.v.max())
    budgets = [float(cost(n, 16)) for n in (0.5e9, 7e9, 14e9, 70e9)]
    values = [
        float(best_tokens(law.fit, law.fit.theta[None], cost, budget, *limits)[0])
        for law in study.laws.values()
        for budget in budgets
    ]
    return np.log(values)


def _exponents(study: Study) -> tuple[str, str, str]:
    regular = study.laws.get("regular")
    bend = regular.bend if regular else None
    ends = [significant(x) if x is not None else "unbounded" for x in bend] if bend else ["-", "-"]
    not_rejected = (
        [row for row in study.ridge if row["deviance"] <= f_deviance(regular.fit)] if regular else []
    )
    alphas = [row["alpha"] for row in not_rejected] or [float("nan")]
    test = ""
    if study.curvature:
        verb = "is rejected" if study.curvature[1] < 0.05 else "is not rejected"
        test = f"; D = 0 {verb} (F = {study.curvature[0]:.1f}, p = {study.curvature[1]:.2g})"
    return (
        "alpha = 0.077, beta = 0.015",
        f"along D the same fit has alpha from {min(alphas):.4f} to {max(alphas):.3f} (D not "
        "rejected: below {max(r['D'] for r in not_rejected):.2f}) while "
        f"the ratio moves from {min(r['ratio'] for r in not_rejected):.2f} to "
        f"{max(r['ratio'] for r in not_rejected):.2f}{test}"
        if not_rejected
        else f"no D below the data is compatible with the cells{test}",
        f"lam in [{ends[0]}, {ends[1]}]: "
        + ("unidentified" if regular and regular.verdict.flags else "identified"),
    )


def _literal(study: Study) -> tuple[str, str, str]:
    law = LAWS["log_linear"]
    plain, shifted = fit(law, study.table), fit(law, study.table, shift=_TEXT_TOKENS)
    deviance = study.table.n.size * np.log(shifted.sse / plain.sse)
    v = float(
        best_tokens(shifted, shifted.theta[None], FlopsCost(_TEXT_TOKENS), _flops(study), 1.0, 576.0)[0]
    )
    return (
        "The law reads T = Q + V (as printed; the released code fits T = V)",
        f"with T = V + 50 the best V would be {v:.0f} at every Q, so the claim at Q = 50 follows from T = V "
        "alone",
        f"the cells prefer T = V by a deviance of {deviance:.0f}",
    )


def _large(study: Study) -> tuple[str, str, str]:
    at = np.full(3, 14e9), np.array([1.0, 16.0, 576.0])
    spread = np.array([law.fit.predict(*at) for law in study.laws.values() if law.fit.converged])
    width = float(((spread.max(axis=0) - spread.min(axis=0)) / spread.mean(axis=0)).max())
    best = study.best
    drop = best.validation.largest if best else None
    check = f"dropping 7B, it is predicted within {percent(drop[1])}; " if drop else ""
    return (
        "A 14B LLM is predicted within 2%",
        f"{check}all laws together span {percent(width)} of the error at 14B",
        "compatible, little power",
    )


def _sensitivity() -> list[tuple[str, str, str]]:
    """How far tasks differ, from the paper's Table 1 (one LLM)."""
    spans = []
    for table in load("paper-table1").tables:
        pooled = pool(table.by_task)
        slopes = [task.slope_v.value for task in pooled.tasks if task.slope_v] if pooled else []
        if len(slopes) > 2:
            spans.append(f"{table.group} {100 * min(slopes):.1f} to {100 * max(slopes):.1f}")
    if not spans:
        return []
    return [
        (
            "The ratio carries over to a user's task",
            f"points per ln V by benchmark in the paper's Table 1 (7B): {'; '.join(spans)}",
            "no: fit your own tasks",
        )
    ]


def _ocr(study: Study) -> list[tuple[str, str, str]]:
    law = study.best
    assert law is not None
    without = study.without_copies.ratio if study.without_copies else None
    extra = f"; without the copied cell {without:.3f}" if without is not None else ""
    below = 1 - _larger(law)
    mixed = f"{1 - study.mixed.size_beats_tokens:.2f}" if study.mixed else "-"
    return [
        (
            "OCR-like tasks: tokens matter more than LLM size",
            f"ratio {law.fit.ratio:.2f} {fixed(law.profile.ends)}{extra}; the larger LLM wins "
            f"{_iso(study, 50.0)} pairs "
            f"of equal cost; with four LLMs as a sample {_mixed(study)}",
            f"P = {below:.3f}; {mixed} with LLMs as a sample",
        )
    ]


def _search(study: Study) -> list[str]:
    """What the published grid search finds when nothing is left to chance."""
    table = study.table
    grid = exhaustive(table.n, table.v, table.error)
    paper = study.laws.get("paper")
    low, high = grid.ranges["ratio"]
    excess = (
        f", {percent(grid.best.sse / paper.fit.sse - 1, 0)} above the least squares with D >= 0"
        if paper
        else ""
    )
    edges = f"; {', '.join(grid.edges)} at the edge of its box" if grid.edges else ""
    return [
        f"{table.group}: the published grid, searched in full, ends at alpha = {grid.best.alpha:.4f}, beta = "
        f"{grid.best.beta:.4f}, D = {grid.best.D:.3f}{excess}{edges}. A random fifth of it, unseeded as "
        f"released, gives ratios from {low:.2f} to {high:.2f}."
    ]


def _weaknesses(own: dict[str, Study]) -> list[str]:
    lines = [
        "A and B of the printed formula are only known as a product; labels and frontier in the released "
        "figure are typed in, not computed.",
        "Four LLMs leave two degrees of freedom for the slope along N, and N stands for all that differs "
        "between them.",
        "One training seed a cell; an average over nine benchmarks hides how far they differ, and an "
        "average of power laws is not a power law.",
        "V = 576 is no compression: another architecture than the other cells.",
        "The cost leaves out the vision tower, a query pass and decoding; chance level and blind score are "
        "ignored.",
        "N is nominal: with exact totals (0.464, 1.837, 3.950, 7.721 B) or non-embedding counts the ratio "
        "moves by 5 to 13%.",
    ]
    if "ocr" in own:
        lines.append(
            "OCR: a copied cell, a rounded cell and one that disagrees with another list of the same source."
        )
    return lines
