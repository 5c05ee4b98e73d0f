"""The report's tables, from studies to text."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from analysis.document import Grid
from analysis.optimum import Pick, prefill_flops
from analysis.study import Deployment, Study
from analysis.units import count, fixed, flops, interval, percent, significant, tokens


def law_table(studies: list[Study]) -> Grid:
    """Both laws of each study: parameters with 95% intervals, R2, AICc, ratio and verdict; the chosen law
    first.
    """
    rows = []
    for study in studies:
        for name, fit in study.fits.items():
            verdict = study.verdicts[name]
            usable = fit.converged and fit.replicates.shape[0] > 0
            parameters = "\n".join(
                f"{label} = {significant(float(value), 4)}"
                + (f" {interval(fit.interval(i))}" if usable else "")
                for i, (label, value) in enumerate(zip(fit.law.parameters, fit.params, strict=True))
            )
            ratio = f"{verdict.ratio:.2f}\n{fixed(verdict.interval)}" if verdict.ratio is not None else "-"
            rows.append(
                (
                    study.origin,
                    f"{name}\n{'(chosen)' if fit is study.best else ''}".rstrip(),
                    parameters,
                    f"{fit.r2:.4f}" if fit.r2 is not None else "-",
                    f"{fit.aicc:.1f}" if fit.aicc is not None else "-",
                    percent(fit.sd, 2),
                    ratio,
                    verdict.reason if verdict.identified else f"not identified: {verdict.reason}",
                )
            )
    header = ("data", "law", "parameters [95%]", "R2", "AICc", "residual sd", "ratio [95%]", "verdict")
    return Grid(header, tuple(rows))


def falling_table(studies: list[Study]) -> Grid:
    """How often error falls between neighbouring cells, along N and along V."""

    def share(study: Study, key: str) -> str:
        pairs = study.falling[key]
        return f"{pairs.falling} of {pairs.pairs}" + (
            f" ({percent(pairs.share, 0)})" if pairs.share is not None else ""
        )

    rows = tuple((study.table.group, study.origin, share(study, "n"), share(study, "v")) for study in studies)
    return Grid(("group", "data", "error falls with N, same V", "error falls with V, same N"), rows)


def _pick(pick: Pick | None) -> tuple[str, str]:
    if pick is None:
        return "-", "-"
    name = pick.llm_name if pick.llm_name == count(pick.n) else f"{pick.llm_name} ({count(pick.n)})"
    band = f" [{percent(pick.band[0])}, {percent(pick.band[1])}]" if pick.band else ""
    return f"{name}, V = {tokens(pick.v)}\n{flops(pick.cost)}", percent(pick.error) + band


def deploy_table(study: Study) -> Grid:
    """For each budget the best measured cell, the law's pick from the measured menu, and the law's free
    optimum.
    """
    rows = []
    for item in study.deployments:
        rows.append((flops(item.budget), *_pick(item.measured), *_law_columns(item, study)))
    q = f"Q = {tokens(study.q)} text tokens" + (
        "" if study.q_measured else ", the paper's, as the data records none"
    )
    return Grid(
        (
            "budget",
            "best measured cell",
            "error [sampling]",
            "law's pick from the menu",
            "error [95%]",
            "law, any N: N*, V*",
            "V within one sd",
        ),
        tuple(rows),
        f"{study.table.group}, {study.origin}; {q}; cost 2N(Q + V).",
    )


def _law_columns(item: Deployment, study: Study) -> tuple[str, str, str, str]:
    if item.free is None or item.indifferent is None:
        why = "no law fitted" if study.no_fit else "not identified"
        return why, "-", "-", "-"
    free = f"{count(item.free.n)}, {tokens(item.free.v)}" + (
        "\n(N not measured)" if item.free.extrapolated else ""
    )
    low, high = item.indifferent
    return *_pick(item.law), free, f"{_rough(low)} to {_rough(high)}"


def _rough(v: float) -> str:
    return str(round(v)) if v >= 10 else significant(v, 2)


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
            errors[key][table.group] = percent(float(table.error[i]))
            if np.isfinite(table.infer_flops[i]):
                counted[key].append(float(table.infer_flops[i]))
        for name, error in table.blind.items():
            if name in sizes:
                errors[float(sizes[name]), name, 0.0][table.group] = percent(error)
    q = float(np.mean([study.q for study in studies]))
    groups = [study.table.group for study in studies]
    rows = []
    for key in sorted(errors):
        n, name, v = key
        total = flops(float(np.mean(counted[key]))) if key in counted else "-"
        shown = tuple(errors[key].get(group, "-") for group in groups)
        label = "0 (no image)" if v == 0 else tokens(v)
        rows.append((name, count(n), label, flops(float(prefill_flops(n, v, q))), total, *shown))
    header = ("LLM", "N", "V", "cost 2N(Q + V)", "counted FLOPs", *(f"error, {group}" for group in groups))
    return Grid(
        header,
        tuple(rows),
        f"Cost at Q = {tokens(q)}; counted FLOPs as the rows record them (- if they do not).",
    )
