"""What a reader must know about one study, one line each: for the JSON's warnings and the terminal."""

from __future__ import annotations

from analysis.study import Study
from analysis.units import tokens

ENOUGH = 200  # resamples, of which five lie beyond each end of a 95% interval


def remarks(study: Study) -> tuple[str, ...]:
    """Warnings that follow from the fits: no law, bounds, what is unidentified, copies, failed resamples."""
    group = study.table.group
    if study.no_fit is not None:
        return (f"{group}: no law can be fitted: {study.no_fit}",)
    lines = []
    if study.options.bootstrap < ENOUGH:
        lines.append(
            f"{group}: {study.options.bootstrap} resamples are too few for 95% intervals; take {ENOUGH} or "
            "more"
        )
    lines += [f"{group}: {law} is not fitted: {reason}" for law, reason in study.refused.items()]
    best = study.best
    if best is not None and not best.verdict.identified:
        lines.append(f"{group}: the ratio is not identified: {best.verdict.reason}")
    for name, law in study.laws.items():
        if (law.verdict.kind != "identified" and law.verdict.identified) or not law.fit.converged:
            lines.append(f"{group}: {name}: {law.verdict.reason}")
        if law.replicates.failed:
            total = law.replicates.failed + law.replicates.theta.shape[0]
            lines.append(f"{group}: {name}: {law.replicates.failed} of {total} resamples did not converge")
        if law.replicates.scheme == "normal":
            lines.append(
                f"{group}: {name}: so many cells that the large-sample normal stands for the bootstrap"
            )
    if study.without_copies is not None and study.without_copies.ratio is not None:
        later = sorted({pair[1] for pair in study.copies})
        cells = ", ".join(f"({study.table.llm_name[i]}, V = {tokens(study.table.v[i])})" for i in later)
        lines.append(
            f"{group}: without the copied cell {cells} the ratio is {study.without_copies.ratio:.3f}"
        )
    if best is not None and best.verdict.identified and study.optimum is None:
        lines.append(f"{group}: a budget of {study.budget:.3g} {study.cost.unit} buys no LLM at any V")
    if study.optimum is not None and study.optimum.extrapolated:
        lines.append(
            f"{group}: the best LLM for the budget {study.budget:.3g} lies outside the measured sizes"
        )
    return tuple(lines)
