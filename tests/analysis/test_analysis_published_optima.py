"""The two published sets give the known optima, costs and designs, and the same bits every time.

Where no other source is named, a figure is from refits of the published numbers of arXiv 2411.03312 by scipy,
float64, made before and apart from this package.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.optimize

from analysis.bootstrap import percentile_interval, resample
from analysis.cost import FlopsCost
from analysis.data import Table
from analysis.design import design
from analysis.evidence import iso_cost_pairs
from analysis.fit import Fit, fit, fit_rows, fitted
from analysis.laws import LAWS
from analysis.mixed import mixed_interval
from analysis.optimum import best_tokens, multipliers, optimum
from analysis.pooling import pool
from analysis.quality import copied_cells
from analysis.solve import solve
from tests.analysis.published_sets import (
    BOTH,
    BUDGET,
    EVERYWHERE,
    OCR,
    REASONING,
    fitted_law,
    replicates,
    table,
    values,
)

# --- the optimum (A13 to A15) -------------------------------------------------------------------------------


def best_v(found: Fit, q: float, budget: float = BUDGET) -> float:
    return float(best_tokens(found, found.theta[None], FlopsCost(q), budget, *EVERYWHERE)[0])


@pytest.mark.parametrize(("q", "v"), [(0, 1), (10, 2.7), (50, 13.44), (100, 26.9)])
def test_best_visual_tokens(q: float, v: float) -> None:
    found = optimum(fitted_law(REASONING, "log_linear"), FlopsCost(q), BUDGET)
    assert found is not None
    assert found.v == pytest.approx(v, rel=5e-3)
    assert found.corner == ("V_min" if q == 0 else "")
    assert found.n == pytest.approx(BUDGET / (2 * (q + found.v)), rel=1e-12)
    assert found.share == pytest.approx(1.0 if q == 0 else 1 / 4.7185, rel=1e-4)


def test_corners() -> None:
    """V_min up to Q = ratio - 1 = 3.72, V_max from 576 times that; OCR asks for V_max at every Q."""
    reasoning, ocr = fitted_law(REASONING, "log_linear"), fitted_law(OCR, "logit_linear")

    def corner(found: Fit, q: float) -> str:
        best = optimum(found, FlopsCost(q), BUDGET)
        assert best is not None
        return best.corner

    assert [corner(reasoning, q) for q in (0.0, 2.0, 3.7, 3.75, 2100.0, 2150.0)] == [
        *("V_min", "V_min", "V_min", "", "", "V_max")
    ]
    assert {corner(ocr, q) for q in (0.0, 10.0, 50.0, 500.0)} == {"V_max"}


@pytest.mark.parametrize("law", ["log_linear", "logit_linear", "power", "regular"])
def test_the_printed_formula_taken_literally_always_wants_the_fewest_tokens(law: str) -> None:
    """With T = Q + V in the law itself the text counts on both sides and cancels: V_min at every Q."""
    for q in (1.0, 10.0, 50.0, 200.0):
        found = optimum(fit(LAWS[law], table(REASONING), shift=q), FlopsCost(q), BUDGET)
        assert found is not None
        assert (found.v, found.corner) == (1.0, "V_min")
    assert fit(LAWS["log_linear"], table(REASONING), shift=50.0).ratio == pytest.approx(2.17, abs=0.005)


@pytest.mark.parametrize(("billions", "v"), [(0.5, 11.9), (7, 16.3), (14, 17.8), (70, 21.8)])
def test_additive_optimum_moves_with_the_budget(billions: float, v: float) -> None:
    found = fitted_law(REASONING, "additive")
    assert best_v(found, 50, 2e9 * billions * 66) == pytest.approx(v, rel=0.01)
    assert best_v(found, 0, 2e9 * billions * 16) == 1.0


def test_other_laws_optimum_moves_with_the_budget() -> None:
    expected = {
        "additive_product": (11.3, 17.4, 19.5, 25.5),
        "interaction": (12.2, 14.7, 15.4, 17.1),
        "quadratic": (11.7, 15.7, 16.9, 20.2),
    }
    for law, known in expected.items():
        got = [best_v(fitted_law(REASONING, law), 50, 2e9 * billions * 66) for billions in (0.5, 7, 14, 70)]
        np.testing.assert_allclose(got, known, rtol=0.01, err_msg=law)
    ocr = [best_v(fitted_law(OCR, "additive"), 0, 2e9 * billions * 16) for billions in (0.5, 7, 14, 70)]
    np.testing.assert_allclose(ocr, (21, 185, 329, 576), rtol=0.025)


@pytest.mark.parametrize("law", ["log_linear", "logit_linear", "regular"])
def test_the_papers_claims_in_resamples(law: str) -> None:
    """One token without text, and 16 the nearest of the tested counts at 50 text tokens."""
    found, theta, tested = (
        fitted_law(REASONING, law),
        replicates(REASONING, law).theta,
        table(REASONING).token_counts,
    )

    def spread(q: float) -> np.ndarray:
        return best_tokens(found, theta, FlopsCost(q), BUDGET, *EVERYWHERE)

    assert np.mean(spread(0.0) == 1.0) >= 0.998
    v = spread(50.0)
    nearest = tested[np.abs(v[:, None] - tested).argmin(axis=1)]
    assert np.mean(nearest == 16) >= 0.99
    np.testing.assert_allclose(percentile_interval(v), (12.1, 14.9), rtol=0, atol=0.15)
    assert np.mean(found.law.ratio(theta) > 1) == 1.0


def test_the_optimum_is_flat() -> None:
    found = optimum(fitted_law(REASONING, "log_linear"), FlopsCost(50), BUDGET)
    assert found is not None
    np.testing.assert_allclose(found.indifference, (4.3, 34.5), rtol=0.02)


def test_compute_to_match_the_optimum() -> None:
    found, v = fitted_law(REASONING, "log_linear"), np.array([1.0, 4, 16, 36, 64, 144, 576])
    with_text = multipliers(found, FlopsCost(50), BUDGET, v)
    np.testing.assert_allclose(with_text, (1.39, 1.10, 1.00, 1.10, 1.29, 1.85, 4.45), rtol=0, atol=0.006)
    without = multipliers(found, FlopsCost(0), BUDGET, v)
    np.testing.assert_allclose(without[:4], (1.0, 3.0, 8.9, 16.8), rtol=0, atol=0.06)
    np.testing.assert_allclose(without[5:], (50, 150), rtol=0.01)
    budget_free = multipliers(found, FlopsCost(50), BUDGET / 7, v)
    np.testing.assert_allclose(with_text, budget_free, rtol=1e-9)


@pytest.mark.parametrize(
    ("cost", "v"),
    [
        (FlopsCost(50, gen_tokens=10), 16.1),
        (FlopsCost(50, gen_tokens=128), 47.9),
        (FlopsCost(50, gen_tokens=10, batch=1, intensity=206), 567),
        (FlopsCost(50, gen_tokens=10, batch=32, intensity=206), 30.8),
        (FlopsCost(50, gen_tokens=128, batch=32, intensity=206), 235),
        (FlopsCost(50, query_pass=True), 26.9),
        (FlopsCost(50, system_tokens=35), 22.9),
        (FlopsCost(50, fixed_flops=0.384e12), 13.44),
    ],
)
def test_what_else_an_answer_costs(cost: FlopsCost, v: float) -> None:
    found = optimum(fitted_law(REASONING, "log_linear"), cost, BUDGET)
    assert found is not None
    assert found.v == pytest.approx(v, rel=3e-3)
    assert float(cost(found.n, found.v)) == pytest.approx(BUDGET, rel=1e-12)


def test_prefill_flops_and_the_towers_share() -> None:
    assert float(FlopsCost(50)(7e9, 16)) == pytest.approx(0.924e12)
    assert float(FlopsCost(50)(7e9, 576)) == pytest.approx(8.764e12)
    tower = FlopsCost(0, fixed_flops=0.384e12)
    share = [0.384e12 / float(tower(n, 1)) for n in (0.5e9, 7e9, 14e9)]
    assert share == pytest.approx((0.997, 0.965, 0.932), abs=6e-4)
    # The tower takes most of the gain away: 576 tokens to one is 21 times cheaper, not 576 times.
    assert float(tower(7e9, 576) / tower(7e9, 1)) == pytest.approx(21, abs=0.5)


def test_a_tower_that_grows_with_v_meets_its_condition() -> None:
    """At the optimum b/V = a (1/(Q + V) + F/(C - F V)), F the tower's FLOPs a visual token."""
    found, per_token = fitted_law(REASONING, "log_linear"), 0.384e12 / 576
    cost = FlopsCost(50, flops_per_token=per_token)
    v = float(best_tokens(found, found.theta[None], cost, BUDGET, *EVERYWHERE)[0])
    a, b = found.params["a"], found.params["b"]
    assert b / v == pytest.approx(a * (1 / (50 + v) + per_token / (BUDGET - per_token * v)), rel=1e-3)
    assert v < best_v(found, 50)


@pytest.mark.parametrize("law", ["regular", "additive", "quadratic"])
def test_best_tokens_is_the_best_of_a_fine_grid(law: str) -> None:
    grid = np.geomspace(*EVERYWHERE, 40_001)
    for name in BOTH:
        found = fitted_law(name, law)
        for q, budget in ((0.0, 1e11), (7.0, BUDGET), (50.0, BUDGET), (300.0, 1e13)):
            best = float(found.predict(budget / (2 * (q + grid)), grid).min())
            v = np.array([best_v(found, q, budget)])
            assert float(found.predict(budget / (2 * (q + v)), v)[0]) == pytest.approx(best, abs=2e-9)


# --- the data themselves (A16 to A18) -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "law", "expected"),
    [
        (REASONING, "log_linear", {1: 3.6, 2: 8.4, 5: 18.8, 10: 28.5, 50: 49.8}),
        (OCR, "logit_linear", {1: 8.5, 50: 78}),
    ],
)
def test_the_law_reads_v_alone(name: str, law: str, expected: dict[float, float]) -> None:
    """Deviance of T = V + q: least at q = 0."""
    least = fitted_law(name, law).sse
    deviance = {
        q: 28 * math.log(fit(LAWS[law], table(name), shift=float(q)).sse / least)
        for q in (0, 0.1, 0.3, *expected)
    }
    assert min(deviance, key=lambda q: deviance[q]) == 0
    for q, known in expected.items():
        assert deviance[q] == pytest.approx(known, abs=0.5), q


def test_without_the_copied_cell() -> None:
    (pair,) = copied_cells(table(OCR))
    assert (table(OCR).n[pair[1]], table(OCR).v[pair[1]]) == (7e9, 576)
    smaller = table(OCR).without(pair[1])
    assert smaller.n.size == 27
    assert fit(LAWS["logit_linear"], smaller).ratio == pytest.approx(0.737, abs=0.002)


@pytest.mark.parametrize(
    ("billions", "ratio", "v"),
    [
        # Qwen1.5, counted from the architecture: all parameters, and those outside the embeddings
        ((0.464, 1.837, 3.950, 7.721), 4.47, 14.4),
        ((0.308, 1.214, 3.172, 6.476), 4.09, 16.2),
        ((0.5, 1.8, 4.0, 7.0), 4.72, 13.4),
    ],
)
def test_conventions_of_n(billions: tuple[float, ...], ratio: float, v: float) -> None:
    data = table(REASONING)
    _, level = np.unique(data.n, return_inverse=True)
    found = fit(LAWS["log_linear"], replace(data, n=np.array(billions)[level] * 1e9))
    assert found.ratio == pytest.approx(ratio, abs=0.01)
    assert best_v(found, 50) == pytest.approx(v, abs=0.06)


def test_jackknife_of_levels() -> None:
    data = table(REASONING)

    def ratios(values: np.ndarray) -> list[float]:
        weights = np.stack([(values != level).astype(float) for level in np.unique(values)])
        found = fitted_law(REASONING, "log_linear")
        rows = fit_rows(found.law, found.cells, found.cells.targets[None], weights)
        assert rows.converged.all()
        return [float(x) for x in found.law.ratio(rows.theta)]

    by_n, by_v = ratios(data.n), ratios(data.v)
    assert (min(by_n), max(by_n)) == pytest.approx((4.53, 4.94), abs=0.006)
    assert (min(by_v), max(by_v)) == pytest.approx((4.59, 4.81), abs=0.006)


@pytest.mark.parametrize(
    ("name", "q", "pairs", "wins"),
    [(REASONING, 0, 19, 19), (REASONING, 50, 14, 13), (OCR, 0, 19, 2), (OCR, 50, 14, 0)],
)
def test_pairs_of_equal_cost(name: str, q: float, pairs: int, wins: int) -> None:
    """The larger LLM on fewer tokens against the smaller one on more."""
    found = iso_cost_pairs(table(name), FlopsCost(q)(table(name).n, table(name).v))
    assert (found.pairs, found.falling) == (pairs, wins)


# --- the LLMs as a sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "law", "ends", "share"),
    [
        (REASONING, "log_linear", (4.13, 5.43), (0.9998, 0.0002)),
        (OCR, "log_linear", (0.41, 1.06), (0.035, 0.01)),
        (OCR, "logit_linear", (0.43, 1.01), (0.03, 0.01)),
    ],
)
def test_mixed_interval(name: str, law: str, ends: tuple[float, float], share: tuple[float, float]) -> None:
    found = mixed_interval(LAWS[law], table(name))
    assert found is not None
    assert None not in found.ratio
    np.testing.assert_allclose(np.array(found.ratio, dtype=float), ends, rtol=0, atol=0.03)
    assert found.size_beats_tokens == pytest.approx(share[0], abs=share[1])


def test_mixed_interval_of_the_optimum_and_its_lack_of_fit() -> None:
    found = mixed_interval(LAWS["log_linear"], table(REASONING))
    assert found is not None
    np.testing.assert_allclose(found.best_tokens(50, *EVERYWHERE), (11.3, 16.0), rtol=0, atol=0.1)
    assert found.row_f == pytest.approx((0.76, 0.48), abs=0.006)
    assert found.column_f == pytest.approx((0.37, 0.86), abs=0.006)
    a, b = found.draws.T
    v = np.where(a > b, 50 * b / (a - b), 576)
    assert np.mean((v >= 10) & (v <= 16)) == pytest.approx(0.97, abs=0.006)
    ocr = mixed_interval(LAWS["logit_linear"], table(OCR))
    assert ocr is not None
    assert ocr.row_f == pytest.approx((4.0, 0.04), abs=0.06)


def test_mixed_slopes_are_those_of_least_squares_on_a_full_grid() -> None:
    found, line = mixed_interval(LAWS["log_linear"], table(REASONING)), fitted_law(REASONING, "log_linear")
    assert found is not None
    assert (found.slope_n[0], found.slope_v[0]) == pytest.approx(
        (line.params["a"], line.params["b"]), rel=1e-9
    )


# --- design, pooling, item noise ----------------------------------------------------------------------------


def test_what_the_next_cell_would_tell() -> None:
    found = design(
        fitted_law(REASONING, "regular"),
        sizes=np.array([0.5, 7, 14, 32, 72]) * 1e9,
        counts=np.array([1.0, 16, 144, 576, 2880]),
        target=(14e9, 16.0),
    )
    assert found is not None
    assert found.ratio_sd == pytest.approx(0.0435, abs=5e-5)
    assert found.bend_sd == pytest.approx(0.80, abs=5e-3)
    assert found.target_sd == pytest.approx(0.0020, abs=5e-5)
    at = {(item.n / 1e9, item.v): item for item in found.candidates}
    assert at[72, 2880].bend_left == pytest.approx(0.35, abs=0.005)
    assert at[72, 2880].target_left == pytest.approx(0.60, abs=0.005)
    assert at[72, 16].target_left == pytest.approx(0.57, abs=0.01)
    assert at[0.5, 2880].ratio_left == pytest.approx(0.886, abs=1e-3)
    assert at[32, 1].ratio_left == pytest.approx(0.901, abs=1e-3)
    assert [key for key, item in at.items() if item.repeat] == [
        (n, v) for n in (0.5, 7) for v in (1, 16, 144, 576)
    ]


def task_tables(slopes_n: np.ndarray, slopes_v: np.ndarray, sigma: float, seed: int) -> tuple[Table, ...]:
    data, rng = table(REASONING), np.random.default_rng(seed)
    u, w = np.log(data.n / 1e9), np.log(data.v)
    return tuple(
        replace(data, group=f"task {i}", error=0.6 - a * u - b * w + rng.normal(0, sigma, u.size))
        for i, (a, b) in enumerate(zip(slopes_n, slopes_v, strict=True))
    )


def slopes_alone(data: Table) -> tuple[np.ndarray, np.ndarray]:
    """(slopes, standard errors) along ln N and ln V by the textbook's normal equations."""
    x = np.column_stack([np.ones(data.n.size), -np.log(data.n / 1e9), -np.log(data.v)])
    inverse = np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ data.error
    noise = ((data.error - x @ beta) ** 2).sum() / (data.n.size - 3)
    return beta[1:], np.sqrt(noise * np.diag(inverse))[1:]


def test_pooling_agrees_with_paule_and_mandel() -> None:
    """Spread, means and pooled slopes against a direct solution of the estimating equation."""
    rng = np.random.default_rng(3)
    tables = task_tables(rng.normal(0.04, 0.012, 9), rng.normal(0.01, 0.004, 9), 0.01, 5)
    found = pool(tables)
    assert found is not None
    value, error = (np.stack(part) for part in zip(*map(slopes_alone, tables), strict=True))
    for axis, (mean, spread, name) in enumerate(
        [(found.mean_n, found.spread_n, "slope_n"), (found.mean_v, found.spread_v, "slope_v")]
    ):
        x, s2 = value[:, axis], error[:, axis] ** 2

        def excess(t: float, x: np.ndarray = x, s2: np.ndarray = s2) -> float:
            middle = np.average(x, weights=1 / (s2 + t))
            return float(((x - middle) ** 2 / (s2 + t)).sum()) - 8

        between = scipy.optimize.brentq(excess, 0, 1, xtol=1e-16, rtol=1e-14)
        middle = np.average(x, weights=1 / (s2 + between))
        assert spread == pytest.approx(math.sqrt(between), rel=1e-7)
        assert mean == pytest.approx((middle, (1 / (s2 + between)).sum() ** -0.5), rel=1e-7)
        pooled = [getattr(task, name).pooled for task in found.tasks]
        np.testing.assert_allclose(pooled, middle + between / (between + s2) * (x - middle), rtol=1e-7)
        assert [getattr(task, name).value for task in found.tasks] == pytest.approx(x.tolist(), rel=1e-9)
        assert [getattr(task, name).error for task in found.tasks] == pytest.approx(
            error[:, axis].tolist(), rel=1e-9
        )


def test_pooling_finds_a_known_spread() -> None:
    """Over 200 sets of 12 tasks: the mean spread, and pooled slopes nearer to the truth than a task's own."""
    spreads, alone, pooled = [], [], []
    for trial in range(200):
        rng = np.random.default_rng(trial)
        truth = rng.normal(0.01, 0.003, 12)
        found = pool(task_tables(np.full(12, 0.04), truth, 0.03, 1000 + trial))
        assert found is not None
        spreads.append((found.spread_v**2, found.spread_n**2))
        slopes = [task.slope_v for task in found.tasks if task.slope_v is not None]
        alone += [slope.value - x for slope, x in zip(slopes, truth, strict=True)]
        pooled += [slope.pooled - x for slope, x in zip(slopes, truth, strict=True)]
    by_tokens, by_size = np.sqrt(np.mean(spreads, axis=0))
    assert by_tokens == pytest.approx(0.003, rel=0.1)
    assert by_size < 0.004  # the truth is none: chance alone leaves this much of the 0.0055 of one slope
    assert np.std(pooled) < 0.85 * np.std(alone)


@pytest.mark.parametrize(("noise", "extra"), [(0.0, False), (0.2, True)])
def test_quasi_binomial_agrees_with_scipy(noise: float, extra: bool) -> None:
    """Items per cell from 50 to 5,000, with and without variance beyond the binomial."""
    rng, data = np.random.default_rng(8), table(REASONING)
    items = np.round(np.geomspace(50, 5000, 28)[rng.permutation(28)])
    u, w = np.log(data.n / 1e9), np.log(data.v)
    p = 1 / (1 + np.exp(-(0.4 - 0.15 * u - 0.03 * w + rng.normal(0, noise, 28))))
    error = rng.binomial(items.astype(int), p) / items
    mine = replace(data, error=error, n_items=items, sampling_sd=np.sqrt(error * (1 - error) / items))
    found = fit(LAWS["logit_linear"], mine, loss="binomial")

    def predict(theta: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(theta[0] + theta[1] * u + theta[2] * w))

    def moment(t: float, square: np.ndarray, variance: np.ndarray) -> float:
        return float(np.mean(square / (variance + t))) - 1

    theta, added = np.array([-0.4, 0.15, 0.03]), 0.0
    for _ in range(100):
        prediction = predict(theta)
        variance = prediction * (1 - prediction) / items
        square = (error - prediction) ** 2 / (1 - 3 / 28)
        over = moment(0.0, square, variance) > 0
        added = scipy.optimize.brentq(moment, 0, 1, (square, variance), 1e-16, 1e-13) if over else 0.0
        root = 1 / np.sqrt(variance + added)
        fitted_now = scipy.optimize.least_squares(
            lambda x, root=root: root * (error - predict(x)), theta, xtol=1e-15, ftol=1e-15, gtol=1e-15
        )
        theta = fitted_now.x
    assert (added > 0) == extra
    np.testing.assert_allclose(values(found, "p0", "p1", "p2"), theta, rtol=1e-6, atol=1e-8)
    weight = 1 / (variance + added)
    np.testing.assert_allclose(found.cells.weights, weight / weight.mean(), rtol=1e-5)


# --- determinism and precision (D1, D2) ---------------------------------------------------------------------

PRINT_DIGITS = """
from analysis.bootstrap import resample
from analysis.data import load
from analysis.fit import fit
from analysis.laws import LAWS
from analysis.mixed import mixed_interval
from analysis.profile import ratio_interval
import hashlib
for name in ("paper-reasoning", "paper-ocr"):
    table = load(name).tables[0]
    for law in ("logit_linear", "power"):
        found = fit(LAWS[law], table)
        drawn = resample(found, 2000, scheme="pairs", seed=7)
        text = repr([found.theta.tolist(), found.sse, ratio_interval(found).ends])
        print(law, text, hashlib.sha256(drawn.theta.tobytes()).hexdigest())
    mixed = mixed_interval(LAWS["logit_linear"], table, 7)
    print(mixed.ratio, hashlib.sha256(mixed.draws.tobytes()).hexdigest())
"""


def test_fresh_processes_give_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    outputs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PRINT_DIGITS],
            env={**environment, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout)
    exec(compile(PRINT_DIGITS, "digits", "exec"), {})
    outputs.append(capsys.readouterr().out)
    assert len(outputs[0].splitlines()) == 6
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("law", ["log_linear", "logit_linear", "regular", "paper", "additive"])
def test_a_seed_gives_the_same_bits_twice(law: str) -> None:
    first, second = (fit(LAWS[law], table(REASONING)) for _ in range(2))
    assert first.theta.tobytes() == second.theta.tobytes()
    assert first.sse == second.sse
    one, two, other = (resample(fit_, 300, seed=seed) for fit_, seed in ((first, 5), (second, 5), (first, 6)))
    assert one.theta.tobytes() == two.theta.tobytes()
    assert one.theta.tobytes() != other.theta.tobytes()


def test_float32_is_refused() -> None:
    found = fitted_law(REASONING, "log_linear")
    arrays = {
        "u": found.cells.u,
        "w": found.cells.w,
        "targets": found.cells.targets[None],
        "weights": found.cells.weights[None],
        "start": found.theta[None],
    }
    for name in arrays:
        with pytest.raises(TypeError, match=f"{name} is float32; fits are made in float64"):
            solve(found.law, **{**arrays, name: arrays[name].astype(np.float32)})
    with pytest.raises(TypeError, match="float32"):
        fit(LAWS["log_linear"], replace(table(REASONING), error=table(REASONING).error.astype(np.float32)))


@pytest.mark.parametrize("flag", [False, True])
def test_the_global_precision_is_left_alone(flag: bool) -> None:
    before = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", flag)
        found = fit(LAWS["log_linear"], table(REASONING))
        assert jax.config.jax_enable_x64 is flag
        assert jax.numpy.zeros(1).dtype == (np.float64 if flag else np.float32)
    finally:
        jax.config.update("jax_enable_x64", before)
    assert found.theta.dtype == np.float64
    assert found.theta.tobytes() == fitted_law(REASONING, "log_linear").theta.tobytes()
    np.testing.assert_array_equal(fitted(found) + found.residuals(), table(REASONING).error)
