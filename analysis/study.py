"""All that the report says about one task group, computed once: fits, verdicts, optimum, picks, evidence."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.data import Table
from analysis.evidence import Falling, at_chance, blind_gain, copied_cells, monotonicity
from analysis.fit import Fit, Verdict, fit_all, judge, why_no_fit
from analysis.optimum import (
    Optimum,
    Pick,
    TokenChoice,
    indifference,
    law_pick,
    measured_pick,
    optimum,
    round_budgets,
    token_choice,
)


@dataclass(frozen=True)
class Deployment:
    """One budget in FLOPs: the best measured cell; if the law is identified, its pick and free optimum."""

    budget: float
    measured: Pick | None
    law: Pick | None
    free: Optimum | None
    indifferent: tuple[float, float] | None


@dataclass(frozen=True)
class Study:
    """One table and what follows from it. `fits` is best first, and empty where `no_fit` says why."""

    table: Table
    origin: str
    q: float
    q_measured: bool
    no_fit: str | None
    fits: dict[str, Fit]
    verdicts: dict[str, Verdict]
    margin: float | None
    tokens: tuple[TokenChoice, ...]
    deployments: tuple[Deployment, ...]
    falling: dict[str, Falling]
    blind: tuple[int, int]
    chance_cells: int | None
    copies: tuple[tuple[int, int], ...]
    without_copies: Verdict | None

    @property
    def best(self) -> Fit | None:
        """The fit of the chosen law, or None."""
        return next(iter(self.fits.values()), None)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the chosen law, or None without a fit."""
        return next(iter(self.verdicts.values()), None)

    @property
    def identified(self) -> bool:
        """Whether the chosen law has a ratio."""
        return self.verdict is not None and self.verdict.identified


def study(table: Table, origin: str, bootstrap: int, seed: int) -> Study:
    """Analyse `table`; `origin` names it to a reader ('this sweep'). Raises ValueError for bootstrap < 1."""
    q, measured = table.mean_text_tokens()
    no_fit = why_no_fit(table)
    fits = fit_all(table, bootstrap, seed) if no_fit is None else {}
    verdicts = {name: judge(fit) for name, fit in fits.items()}
    best = next(iter(fits.values()), None)
    usable = best if best is not None and verdicts[best.law.name].identified else None
    copies = copied_cells(table)
    budgets = round_budgets(table, q) if table.n.size else []
    return Study(
        table=table,
        origin=origin,
        q=q,
        q_measured=measured,
        no_fit=no_fit,
        fits=fits,
        verdicts=verdicts,
        margin=_margin(list(fits.values())),
        tokens=_tokens(usable, table, q) if usable else (),
        deployments=tuple(_deploy(usable, table, budget, q) for budget in budgets),
        falling=monotonicity(table),
        blind=blind_gain(table),
        chance_cells=at_chance(table),
        copies=tuple(copies),
        without_copies=_refit_without(table, copies, best, bootstrap, seed),
    )


def _margin(fits: list[Fit]) -> float | None:
    if len(fits) < 2 or fits[0].aicc is None or fits[1].aicc is None or not fits[1].converged:
        return None
    return fits[1].aicc - fits[0].aicc


def _tokens(fit: Fit, table: Table, q: float) -> tuple[TokenChoice, ...]:
    v_min, v_max = float(table.v.min()), float(table.v.max())
    return tuple(token_choice(fit, value, v_min, v_max) for value in sorted({0.0, q, 2 * q, 4 * q}))


def _deploy(fit: Fit | None, table: Table, budget: float, q: float) -> Deployment:
    measured = measured_pick(table, budget, q)
    if fit is None:
        return Deployment(budget, measured, None, None, None)
    flat = indifference(fit, q, budget, float(table.v.min()), float(table.v.max()))
    return Deployment(budget, measured, law_pick(fit, table, budget, q), optimum(fit, table, budget, q), flat)


def _refit_without(
    table: Table, copies: list[tuple[int, int]], best: Fit | None, bootstrap: int, seed: int
) -> Verdict | None:
    """The chosen law's verdict without the later cell of each copied pair."""
    if best is None or not copies:
        return None
    smaller = table
    for index in sorted({later for _, later in copies}, reverse=True):
        smaller = smaller.without(index)
    if why_no_fit(smaller) is not None:
        return None
    return judge(fit_all(smaller, bootstrap, seed)[best.law.name])
