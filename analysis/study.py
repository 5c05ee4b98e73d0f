"""All that the report says about one task group, computed once: fits, verdicts, intervals, optimum,
design.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from analysis.bootstrap import Replicates, percentile_interval, resample
from analysis.compare import Comparison, compare
from analysis.cost import Cost, FlopsCost, latency_cost
from analysis.data import BUILT_IN, Dataset, Table, load
from analysis.design import Design, design
from analysis.evidence import Falling, at_chance, blind_gain, iso_cost_pairs, monotonicity
from analysis.fit import MANY_CELLS, Fit, f_test, fit, why_no_fit
from analysis.latency import FittedLatency
from analysis.laws import LAWS, LOGIT_INTERACTION
from analysis.mixed import Mixed, mixed_interval
from analysis.optimum import (
    Optimum,
    Pick,
    best_tokens,
    law_pick,
    measured_cost,
    measured_pick,
    multipliers,
    optimum,
    round_budgets,
)
from analysis.pooling import Pooled, pool
from analysis.profile import RatioInterval, bend_interval, floor_ridge, ratio_interval
from analysis.quality import copied_cells
from analysis.uncertainty import Averaged, Method, averaged_tokens, methods
from analysis.validate import Validation, akaike_weights, baselines, validate
from analysis.verdict import Verdict, judge

THREADS = 2
NO_PAIRS = Falling(0, 0)
PAPER_ORIGIN = "arXiv 2411.03312"


@dataclass(frozen=True)
class Options:
    """What a user chooses: laws by name, resamples, seed, loss, how an answer is charged, budgets.

    cost.text_tokens NaN: the data's own mean, or the paper's 50. latency: charge milliseconds instead, those
    measured in the sweep, or by the model `timed` for the tokens and the batch of `cost`.
    """

    laws: tuple[str, ...] = tuple(LAWS)
    bootstrap: int = 10_000
    seed: int = 0
    loss: str = "raw"
    cost: FlopsCost = field(default_factory=lambda: FlopsCost(float("nan")))
    latency: bool = False
    timed: FittedLatency | None = None
    budgets: tuple[float, ...] = ()


@dataclass(frozen=True)
class LawStudy:
    """One law on one table. bend: interval of lam, for the regular law. v: its V* at the study's budget."""

    fit: Fit
    replicates: Replicates
    profile: RatioInterval
    verdict: Verdict
    validation: Validation
    v: float
    bend: tuple[float | None, float | None] | None = None


@dataclass(frozen=True)
class TokenChoice:
    """V* when an answer costs `q` tokens besides the visual ones, and nothing but the LLM."""

    q: float
    best: Optimum


@dataclass(frozen=True)
class Deployment:
    """One budget: the best measured cell; if the law is identified, its pick from the menu and its free
    optimum.
    """

    budget: float
    measured: Pick | None
    law: Pick | None
    free: Optimum | None


@dataclass(frozen=True)
class Study:
    """One table and what follows from it. `laws` is best first, and empty where `no_fit` says why.

    refused: laws that this table cannot carry, each with the reason. budget: at which V* of laws that are not
    of one index is taken. multiplier: (V, times the optimum's budget) for the measured V. interaction: (law,
    F, p) tests of the single index. curvature: (F, p) of D = 0 against a free curvature.
    """

    table: Table
    origin: str
    options: Options
    cost: Cost
    q: float
    q_measured: bool
    no_fit: str | None
    budget: float
    laws: dict[str, LawStudy] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    optimum: Optimum | None = None
    averaged: Averaged | None = None
    methods: tuple[Method, ...] = ()
    mixed: Mixed | None = None
    tokens: tuple[TokenChoice, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    multiplier: tuple[tuple[float, float], ...] = ()
    falling: dict[str, Falling] = field(default_factory=dict)
    iso_cost: Falling = NO_PAIRS
    baselines: dict[str, tuple[float, float]] = field(default_factory=dict)
    interactions: tuple[tuple[str, float, float], ...] = ()
    curvature: tuple[float, float] | None = None
    ridge: tuple[dict[str, float], ...] = ()
    design: Design | None = None
    pooled: Pooled | None = None
    blind: tuple[int, int] = (0, 0)
    chance_cells: int | None = None
    copies: tuple[tuple[int, int], ...] = ()
    without_copies: Verdict | None = None

    @property
    def best(self) -> LawStudy | None:
        """The chosen law: least AICc, or None."""
        return next(iter(self.laws.values()), None)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the chosen law, or None without a fit."""
        return self.best.verdict if self.best else None

    @property
    def identified(self) -> bool:
        """Whether the chosen law has a ratio."""
        return self.verdict is not None and self.verdict.identified

    @property
    def margin(self) -> float | None:
        """AICc of the second law over that of the chosen one, or None where either is undefined."""
        values = [law.fit.aicc for law in list(self.laws.values())[:2]]
        if len(values) < 2 or values[0] is None or values[1] is None:
            return None
        return values[1] - values[0]


def study(table: Table, origin: str, options: Options) -> Study:
    """Analyse `table`; `origin` names it to a reader ('this sweep').

    Raises ValueError for bootstrap < 1 or an unknown law, DataError for a latency that was not measured.
    """
    unknown = [name for name in options.laws if name not in LAWS]
    if unknown:
        raise ValueError(f"unknown law {unknown[0]!r}; known: {', '.join(LAWS)}")
    q, measured = table.mean_text_tokens()
    if math.isfinite(options.cost.text_tokens):
        q, measured = options.cost.text_tokens, True
    cost: Cost = replace(options.cost, text_tokens=q)
    if options.latency and options.timed is not None:
        asked = options.cost
        cost = replace(options.timed, text_tokens=q, gen_tokens=asked.gen_tokens, batch=asked.batch)
    elif options.latency and table.n.size:
        cost = latency_cost(table)
    base = Study(table, origin, options, cost, q, measured, why_no_fit(table), math.nan)
    if not table.n.size:
        return base
    budgets = list(options.budgets) or round_budgets(table, cost)
    base = replace(
        base,
        budget=budgets[0] if options.budgets else budgets[len(budgets) // 2],
        falling=monotonicity(table),
        blind=blind_gain(table),
        chance_cells=at_chance(table),
        copies=tuple(copied_cells(table)),
        pooled=pool(table.by_task or (table,)),
    )
    if table.n.size <= MANY_CELLS:
        pairs = iso_cost_pairs(table, measured_cost(table, cost))
        base = replace(base, iso_cost=pairs, baselines=baselines(table))
    if base.no_fit is None:
        laws, refused = _all_laws(table, options, cost, base.budget)
        base = replace(base, laws=laws, refused=refused)
    best = base.best
    usable = best if best is not None and best.verdict.identified else None
    base = replace(base, deployments=tuple(_deploy(table, usable, item, cost) for item in budgets))
    return _with_best(base, best) if best is not None and best.fit.converged else base


def _all_laws(
    table: Table, options: Options, cost: Cost, budget: float
) -> tuple[dict[str, LawStudy], dict[str, str]]:
    """(laws best first, refused): each law fitted, resampled, profiled, validated; two laws at a time."""
    refused = {name: why_no_fit(table, LAWS[name]) for name in options.laws}
    wanted = [name for name, reason in refused.items() if reason is None]

    def one(name: str) -> LawStudy:
        return _one_law(name, table, options, cost, budget)

    # The laws of most parameters take longest, so they start first.
    wanted.sort(key=lambda name: -LAWS[name].size)
    with ThreadPoolExecutor(THREADS) as pool_of_threads:
        laws = dict(zip(wanted, pool_of_threads.map(one, wanted), strict=True))

    def order(item: tuple[str, LawStudy]) -> tuple[bool, int, float, float]:
        # Among laws that fit to rounding, the simplest; a law with too few cells for an AICc comes last.
        own = item[1].fit
        size = own.law.size if own.exact else 99
        return not own.converged, size, own.aicc if own.aicc is not None else np.inf, own.sse

    return dict(sorted(laws.items(), key=order)), {k: v for k, v in refused.items() if v is not None}


def _one_law(name: str, table: Table, options: Options, cost: Cost, budget: float) -> LawStudy:
    found = fit(LAWS[name], table, loss=options.loss)
    replicates = resample(found, options.bootstrap, seed=options.seed)
    profile = ratio_interval(found) if options.loss != "huber" else _resampled_ratio(found, replicates)
    bend = bend_interval(found) if name == "regular" else None
    limits = float(table.v.min()), float(table.v.max())
    v = float(best_tokens(found, found.theta[None], cost, budget, *limits)[0])
    return LawStudy(
        found, replicates, profile, judge(found, replicates, profile, bend), validate(found), v, bend
    )


def _resampled_ratio(found: Fit, replicates: Replicates) -> RatioInterval:
    """For a loss that is no sum of squares, and so has no F test: percentiles of the resamples."""
    slopes = np.array([found.law.slopes(theta) for theta in replicates.theta])
    if not replicates.usable or (np.quantile(slopes, 0.025, axis=0) <= 0).any():
        return RatioInterval(None, None)
    return RatioInterval(*percentile_interval(found.law.ratio(replicates.theta)))


def _with_best(base: Study, best: LawStudy) -> Study:
    """The study with all that is computed for the chosen law alone."""
    table, cost, options, budget = base.table, base.cost, base.options, base.budget
    fits = {name: law.fit for name, law in base.laws.items()}
    replicates = {name: law.replicates for name, law in base.laws.items()}
    weights = akaike_weights(list(fits.values()))
    mixed = mixed_interval(best.fit.law, table, options.seed)
    regular = base.laws.get("regular")
    planned = design(regular.fit) if regular is not None and regular.fit.converged else None
    drawn = best.replicates, best.profile, mixed, cost, budget, options.bootstrap, options.seed
    base = replace(
        base,
        optimum=optimum(best.fit, cost, budget, best.replicates),
        averaged=averaged_tokens(fits, replicates, weights, cost, budget),
        mixed=mixed,
        methods=methods(best.fit, *drawn),
        interactions=_interactions(fits, table, options.loss),
        curvature=f_test(fits["power"], fits["regular"]) if {"power", "regular"} <= fits.keys() else None,
        ridge=tuple(floor_ridge(regular.fit)) if regular is not None and _ridged(regular.fit) else (),
        design=planned if planned is not None else design(best.fit),
        without_copies=_without_copies(base, best),
    )
    if not best.verdict.identified:
        return base
    times = multipliers(best.fit, cost, budget, table.token_counts).tolist()
    pairs = tuple(zip(table.token_counts.tolist(), times, strict=True))
    return replace(base, multiplier=pairs, tokens=_tokens(best, base))


def _ridged(regular: Fit) -> bool:
    return regular.loss == "raw" and regular.cells.u.size <= MANY_CELLS


def _tokens(best: LawStudy, base: Study) -> tuple[TokenChoice, ...]:
    choices = []
    asked = base.cost.effective_tokens if isinstance(base.cost, FlopsCost) else base.q
    for q in sorted({0.0, asked, 2 * asked, 4 * asked}):
        found = optimum(
            best.fit, FlopsCost(q), base.budget if not base.options.latency else 1e12, best.replicates
        )
        if found is not None:
            choices.append(TokenChoice(q, found))
    return tuple(choices)


def _deploy(table: Table, best: LawStudy | None, budget: float, cost: Cost) -> Deployment:
    measured = measured_pick(table, budget, cost)
    if best is None:
        return Deployment(budget, measured, None, None)
    return Deployment(
        budget,
        measured,
        law_pick(best.fit, budget, cost, best.replicates),
        optimum(best.fit, cost, budget, best.replicates),
    )


def _interactions(fits: dict[str, Fit], table: Table, loss: str) -> tuple[tuple[str, float, float], ...]:
    """(law, F, p): whether an interaction of N and V improves the log-linear and the logit law."""
    tests = []
    if {"log_linear", "interaction"} <= fits.keys():
        tests.append(("log_linear", *f_test(fits["log_linear"], fits["interaction"])))
    # With thousands of cells any law is rejected by some term: the test says nothing that the AICc does not.
    few = table.n.size <= MANY_CELLS
    if few and "logit_linear" in fits and why_no_fit(table, LOGIT_INTERACTION) is None:
        crossed = fit(LOGIT_INTERACTION, table, loss=loss)
        if crossed.converged and crossed.freedom > 0:
            tests.append(("logit_linear", *f_test(fits["logit_linear"], crossed)))
    return tuple(tests)


def _without_copies(base: Study, best: LawStudy) -> Verdict | None:
    """The chosen law's verdict without the later cell of each copied pair."""
    smaller = base.table
    for index in sorted({later for _, later in base.copies}, reverse=True):
        smaller = smaller.without(index)
    if not base.copies or why_no_fit(smaller, best.fit.law) is not None:
        return None
    return _one_law(best.fit.law.name, smaller, base.options, base.cost, base.budget).verdict


@dataclass(frozen=True)
class Analysis:
    """A dataset, the study of each of its task groups, and those of the published data to set beside them.

    comparisons: of the methods, where the data name several.
    """

    dataset: Dataset
    studies: tuple[Study, ...]
    paper: tuple[Study, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    @property
    def told(self) -> tuple[Study, ...]:
        """The studies that a reader is shown: beside a comparison of methods, those that carry a law."""
        carried = tuple(study for study in self.studies if study.no_fit is None)
        return carried if self.comparisons else self.studies

    @property
    def published(self) -> bool:
        """Whether the data are the paper's own."""
        return all(study.origin == PAPER_ORIGIN for study in self.studies)


def analyze(sources: Sequence[Path | str], options: Options, *, beside_paper: bool = False) -> Analysis:
    """Read `sources` (see `data.load`) and study every task group.

    beside_paper: also study the published numbers, for a report that sets them beside the data.
    Raises DataError for data that cannot be read or charged, ValueError for options that make no sense.
    """
    dataset = load(*sources)
    published = {str(source) for source in sources} <= BUILT_IN.keys()
    kind = "this data" if dataset.source.endswith(".csv") else "this sweep"
    origin = PAPER_ORIGIN if published else kind
    studies = tuple(study(table, origin, options) for table in dataset.tables)
    analysis = Analysis(dataset, studies, comparisons=compare(dataset.methods))
    paper: tuple[Study, ...] = ()
    if beside_paper and not published and analysis.told:
        plain = Options(options.laws, options.bootstrap, options.seed)
        known = [load(name).tables[0] for name in ("paper-reasoning", "paper-ocr")]
        paper = tuple(study(table, PAPER_ORIGIN, plain) for table in known)
    return replace(analysis, paper=paper)
