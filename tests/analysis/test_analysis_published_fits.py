"""The two published sets give the known figures: optima, intervals, choices, costs; the same bits every time.

Where no other source is named, a figure is from refits of the published numbers of arXiv 2411.03312 by scipy,
float64, made before and apart from this package.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.optimize

from analysis.bootstrap import Replicates, percentile_interval, resample
from analysis.cost import FlopsCost
from analysis.data import Table, load
from analysis.design import design
from analysis.evidence import iso_cost_pairs
from analysis.fit import Fit, f_test, fit, fit_rows, fitted
from analysis.laws import LAWS, LOGIT_INTERACTION
from analysis.mixed import mixed_interval
from analysis.optimum import best_tokens, multipliers, optimum
from analysis.pooling import pool
from analysis.profile import bend_interval, floor_ridge, ratio_interval
from analysis.quality import copied_cells
from analysis.solve import solve
from analysis.uncertainty import methods
from analysis.validate import baselines, validate
from analysis.verdict import Verdict, judge

REASONING, OCR = "paper-reasoning", "paper-ocr"
BOTH = (REASONING, OCR)
BUDGET = 2 * 7e9 * 66  # a 7B LLM on 16 visual and 50 text tokens
EVERYWHERE = (1.0, 576.0)


@cache
def table(name: str) -> Table:
    return load(name).tables[0]


@cache
def fitted_law(name: str, law: str) -> Fit:
    return fit(LAWS[law], table(name))


@cache
def replicates(name: str, law: str) -> Replicates:
    return resample(fitted_law(name, law), 10_000)


def verdict(name: str, law: str) -> Verdict:
    found = fitted_law(name, law)
    bend = bend_interval(found) if law == "regular" else None
    return judge(found, replicates(name, law), ratio_interval(found), bend)


def values(found: Fit, *names: str) -> list[float]:
    return [found.params[name] for name in names]


# --- optima (A1 to A8) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "sse", "r2", "sd"),
    [
        (REASONING, (0.59017177, 0.03838886, 0.00813578), 2.804936e-4, 0.99418, 0.00335),
        (OCR, (0.91341813, 0.02302993, 0.03178884), 3.345245e-3, 0.97431, 0.01157),
    ],
)
def test_log_linear(name: str, params: tuple[float, ...], sse: float, r2: float, sd: float) -> None:
    found, data = fitted_law(name, "log_linear"), table(name)
    np.testing.assert_allclose(values(found, "c", "a", "b"), params, rtol=0, atol=1e-7)
    x = np.column_stack([np.ones(28), np.log(data.n / 1e9), np.log(data.v)])
    exact = float(np.linalg.lstsq(x, data.error, rcond=None)[1][0])
    assert found.sse == pytest.approx(exact, rel=1e-9)
    assert found.sse == pytest.approx(sse, rel=2e-7)
    assert (found.r2, found.sd) == pytest.approx((r2, sd), abs=5e-6)
    assert found.converged
    assert found.bounds == ()


POWER = [
    (REASONING, (-0.52632657, 0.07093746, 0.01510162), 3.793797e-4, 0.99213),
    (OCR, (-0.08641464, 0.02823272, 0.03941193), 5.136608e-3, 0.96055),
]


@pytest.mark.parametrize(("name", "params", "sse", "r2"), POWER)
def test_power(name: str, params: tuple[float, ...], sse: float, r2: float) -> None:
    found = fitted_law(name, "power")
    level, alpha, beta = values(found, "K", "alpha", "beta")
    np.testing.assert_allclose((math.log(level), alpha, beta), params, rtol=0, atol=1e-6)
    assert found.sse == pytest.approx(sse, rel=1e-6)
    assert found.r2 == pytest.approx(r2, abs=5e-6)


@pytest.mark.parametrize(("name", "params", "sse", "r2"), POWER)
def test_the_papers_form_sits_on_its_bound(
    name: str, params: tuple[float, ...], sse: float, r2: float
) -> None:
    found = fitted_law(name, "paper")
    level, alpha, beta, floor = values(found, "K", "alpha", "beta", "D")
    np.testing.assert_allclose((math.log(level), alpha, beta), params, rtol=0, atol=1e-6)
    assert floor == 0.0
    assert found.sse == pytest.approx(sse, rel=1e-6)
    assert found.bounds == ("D = 0",)
    judged = verdict(name, "paper")
    assert judged.kind == "bound active"
    assert "bound_active" in judged.flags
    assert "the best fit sits on the bound D = 0" in judged.reason


@pytest.mark.parametrize(
    ("name", "params", "sse", "floor", "kind"),
    [
        (REASONING, (0.58996730, 0.03760616, 0.00795274, -0.42038332), 2.771166e-4, 2.969, "unidentified"),
        (OCR, (0.89841969, 0.01511733, 0.02090388, -5.15875373), 1.252535e-3, 1.0923, "identified"),
    ],
)
def test_regular(name: str, params: tuple[float, ...], sse: float, floor: float, kind: str) -> None:
    found = fitted_law(name, "regular")
    np.testing.assert_allclose(values(found, "c", "a", "b"), params[:3], rtol=0, atol=1e-6)
    assert found.params["lam"] == pytest.approx(params[3], rel=1e-5)
    assert found.sse == pytest.approx(sse, rel=1e-6)
    assert found.params["D"] == pytest.approx(floor, abs=5e-4)
    judged = verdict(name, "regular")
    assert judged.kind == kind
    assert ("parameters_unidentified" in judged.flags) == (kind == "unidentified")
    # The exponents may be unknown, their ratio is not.
    assert judged.ratio == pytest.approx(4.729 if name == REASONING else 0.723, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "params", "sse", "r2"),
    [
        (REASONING, (-0.36451520, 0.15523200, 0.03292300), 2.765060e-4, 0.99426),
        (OCR, (-2.15552864, 0.14563138, 0.20067879), 1.208403e-3, 0.99072),
    ],
)
def test_logit_linear(name: str, params: tuple[float, ...], sse: float, r2: float) -> None:
    found = fitted_law(name, "logit_linear")
    np.testing.assert_allclose(values(found, "p0", "p1", "p2"), params, rtol=0, atol=1e-6)
    assert found.sse == pytest.approx(sse, rel=1e-6)
    assert found.r2 == pytest.approx(r2, abs=5e-6)
    assert verdict(name, "logit_linear").kind == "identified"


@pytest.mark.parametrize(
    ("name", "delta", "params", "objective", "inside"),
    [
        (REASONING, 1e-3, (-0.52408435, 0.07129648, 0.01579141), 1.401056e-4, 4),
        (REASONING, 1e-2, (-0.52480732, 0.07137884, 0.01546344), 6.548962e-4, 23),
        (OCR, 1e-3, (-0.08601442, 0.03167492, 0.03761763), 3.709398e-4, 4),
        (OCR, 1e-2, (-0.08343951, 0.03019516, 0.03904965), 2.642750e-3, 15),
    ],
)
def test_huber(name: str, delta: float, params: tuple[float, ...], objective: float, inside: int) -> None:
    found = fit(LAWS["power"], table(name), loss="huber", delta=delta)
    level, alpha, beta = values(found, "K", "alpha", "beta")
    np.testing.assert_allclose((math.log(level), alpha, beta), params, rtol=0, atol=1e-5)
    assert found.objective == pytest.approx(objective, rel=1e-6)
    assert int((np.abs(found.residuals()) <= delta).sum()) == inside
    assert found.converged


@pytest.mark.parametrize(
    ("name", "params"),
    [
        (REASONING, (-0.52517703, 0.07127666, 0.01538521)),
        (OCR, (-0.08150390, 0.02978164, 0.04063143)),
    ],
)
def test_least_squares_of_logarithms(name: str, params: tuple[float, ...]) -> None:
    for found in (
        fit(LAWS["power"], table(name), loss="log"),
        fit(LAWS["power"], table(name), loss="huber", delta=10.0),
    ):
        level, alpha, beta = values(found, "K", "alpha", "beta")
        np.testing.assert_allclose((math.log(level), alpha, beta), params, rtol=0, atol=1e-8)


def test_hubers_default_threshold_is_the_noise() -> None:
    """1.345 robust standard deviations of the fit's own residuals."""
    for name in BOTH:
        found = fit(LAWS["power"], table(name), loss="huber")
        residual = found.residuals()
        scale = np.median(np.abs(residual - np.median(residual))) / 0.6745
        assert found.cells.delta == pytest.approx(1.345 * scale, rel=1e-4)


@pytest.mark.parametrize(("name", "sse"), [(REASONING, 3.16760e-4), (OCR, 4.78534e-3)])
def test_additive(name: str, sse: float) -> None:
    found = fitted_law(name, "additive")
    assert found.sse <= sse * (1 + 1e-5)
    assert found.params["D"] < 1e-8
    assert found.bounds == ("D = 0",)
    assert found.converged


@pytest.mark.parametrize(("name", "sse"), [(REASONING, 3.963130e-4), (OCR, 7.373255e-3)])
def test_never_worse_than_the_published_grid(name: str, sse: float) -> None:
    """sse: of the best of all five million cells of the published grid search."""
    assert fitted_law(name, "paper").sse <= sse


# --- the choice of law (A9) ---------------------------------------------------------------------------------

# {law: (SSE, AICc above the logit law's)}, SSE printed to four digits.
FORMS = {
    REASONING: {
        "logit_linear": (2.765e-4, 0.0),
        "probit_linear": (2.770e-4, 0.05),
        "log_linear": (2.805e-4, 0.4),
        "interaction": (2.570e-4, 0.9),
        "log_accuracy": (2.980e-4, 2.1),
        "regular": (2.771e-4, 3.1),
        "quadratic": (2.505e-4, 7.1),
        "power": (3.794e-4, 8.9),
        "additive": (3.168e-4, 10.1),
        "paper": (3.794e-4, 11.8),
        "additive_product": (3.081e-4, 12.9),
    },
    OCR: {
        "logit_linear": (1.208e-3, 0.0),
        "probit_linear": (1.234e-3, 0.6),
        "regular": (1.253e-3, 4.0),
        "log_accuracy": (1.604e-3, 7.9),
        "quadratic": (1.173e-3, 9.0),
        "interaction": (2.410e-3, 22.3),
        "log_linear": (3.345e-3, 28.5),
        "power": (5.137e-3, 40.5),
        "paper": (5.137e-3, 43.5),
        "additive": (4.785e-3, 44.8),
        "additive_product": (4.215e-3, 44.8),
    },
}


@pytest.mark.parametrize("name", BOTH)
def test_order_of_laws(name: str) -> None:
    aicc = {law: fitted_law(name, law).aicc for law in LAWS}
    assert None not in aicc.values()
    known = {law: float(value) for law, value in aicc.items() if value is not None}
    assert known.keys() == FORMS[name].keys()
    assert min(known, key=lambda law: known[law]) == "logit_linear"
    for law, (sse, above) in FORMS[name].items():
        assert fitted_law(name, law).sse == pytest.approx(sse, rel=5e-4), law
        assert known[law] - known["logit_linear"] == pytest.approx(above, abs=0.06), law
    gap = known["paper"] - known["logit_linear"]
    assert gap == pytest.approx(11.8 if name == REASONING else 43.5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "f", "tolerance", "p"), [(REASONING, 8.86, 0.02, 0.0066), (OCR, 74.4, 0.1, 8e-9)]
)
def test_no_floor_is_rejected(name: str, f: float, tolerance: float, p: float) -> None:
    value, chance = f_test(fitted_law(name, "power"), fitted_law(name, "regular"))
    assert value == pytest.approx(f, abs=tolerance)
    assert chance == pytest.approx(p, rel=0.02)


def test_interactions() -> None:
    """OCR needs one on the raw scale and none on the logit scale; reasoning needs none."""
    expected = {
        (REASONING, "log_linear"): (2.2, 0.15),
        (REASONING, "logit_linear"): (1.3, 0.26),
        (OCR, "log_linear"): (9.3, 0.005),
        (OCR, "logit_linear"): (0.42, 0.52),
    }
    for (name, law), (f, p) in expected.items():
        larger = (
            fitted_law(name, "interaction") if law == "log_linear" else fit(LOGIT_INTERACTION, table(name))
        )
        value, chance = f_test(fitted_law(name, law), larger)
        assert value == pytest.approx(f, abs=0.06 if f > 1 else 0.01)
        assert chance == pytest.approx(p, abs=0.006)


# --- intervals (A10, A11) and identifiability ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "law", "ends"),
    [
        (REASONING, "log_linear", (4.34, 5.16)),
        (REASONING, "logit_linear", (4.34, 5.15)),
        (REASONING, "power", (4.26, 5.22)),
        (REASONING, "regular", (4.34, 5.18)),
        (OCR, "logit_linear", (0.64, 0.81)),
        (OCR, "power", (0.54, 0.91)),
    ],
)
def test_profile_interval_of_the_ratio(name: str, law: str, ends: tuple[float, float]) -> None:
    found = ratio_interval(fitted_law(name, law)).ends
    assert found is not None
    np.testing.assert_allclose(found, ends, rtol=0, atol=0.01)


def test_profile_interval_is_fiellers() -> None:
    """For a law linear in its parameters the profile-F interval of a/b has a closed form (Fieller 1954)."""
    for name in BOTH:
        found, data = fitted_law(name, "log_linear"), table(name)
        x = np.column_stack([np.ones(28), -np.log(data.n), -np.log(data.v)])
        beta, (sse,), _, _ = np.linalg.lstsq(x, data.error, rcond=None)
        cov = sse / 25 * np.linalg.inv(x.T @ x)
        t2 = scipy.stats.t.ppf(0.975, 25) ** 2
        ends = np.roots(
            [
                beta[2] ** 2 - t2 * cov[2, 2],
                -2 * (beta[1] * beta[2] - t2 * cov[1, 2]),
                beta[1] ** 2 - t2 * cov[1, 1],
            ]
        )
        np.testing.assert_allclose(ratio_interval(found).ends, np.sort(ends), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "law", "scheme", "ends"),
    [
        (REASONING, "log_linear", "residual", (4.35, 5.15)),
        (REASONING, "log_linear", "pairs", (4.36, 5.13)),
        (REASONING, "log_linear", "wild", (4.38, 5.11)),
        (REASONING, "logit_linear", "residual", (4.36, 5.14)),
        (REASONING, "regular", "residual", (4.35, 5.16)),
        (REASONING, "paper", "residual", (4.27, 5.18)),
        (REASONING, "paper", "pairs", (4.25, 5.21)),
        (OCR, "logit_linear", "residual", (0.64, 0.81)),
        (OCR, "logit_linear", "pairs", (0.62, 0.82)),
        (OCR, "paper", "residual", (0.54, 0.90)),
    ],
)
def test_bootstrap_interval_of_the_ratio(name: str, law: str, scheme: str, ends: tuple[float, float]) -> None:
    found = fitted_law(name, law)
    drawn = replicates(name, law) if scheme == "residual" else resample(found, 10_000, scheme=scheme)
    assert drawn.failed == 0
    assert drawn.theta.shape == (10_000, found.law.size)
    np.testing.assert_allclose(percentile_interval(found.law.ratio(drawn.theta)), ends, rtol=0, atol=0.03)


def test_a_cluster_bootstrap_of_four_llms_is_refused_and_of_seven_token_counts_warned() -> None:
    found = fitted_law(REASONING, "log_linear")
    with pytest.raises(ValueError, match="at least 6 clusters; there are 4 LLM sizes"):
        resample(found, 100, scheme="cluster_n")
    drawn = resample(found, 4000, scheme="cluster_v")
    assert drawn.warning.startswith("7 token counts are few")
    np.testing.assert_allclose(
        percentile_interval(found.law.ratio(drawn.theta)), (4.48, 4.97), rtol=0, atol=0.05
    )
    by_name = {
        item.name: item
        for item in methods(
            found,
            replicates(REASONING, "log_linear"),
            ratio_interval(found),
            None,
            FlopsCost(50.0),
            BUDGET,
            200,
            0,
        )
    }
    assert by_name["cluster by LLM bootstrap"].note.startswith("refused")
    assert by_name["cluster by LLM bootstrap"].ratio is None


def test_bootstrap_of_the_papers_form() -> None:
    """How wide its exponents are, and how often the bound is active."""
    found = fitted_law(REASONING, "paper")
    params = found.law.natural(replicates(REASONING, "paper").theta, found.cells.frame)
    np.testing.assert_allclose(percentile_interval(params["alpha"]), (0.069, 0.135), rtol=0, atol=0.003)
    np.testing.assert_allclose(percentile_interval(params["beta"]), (0.0140, 0.0291), rtol=0, atol=0.0007)
    assert percentile_interval(params["D"])[0] == 0.0
    assert percentile_interval(params["D"])[1] == pytest.approx(0.257, abs=0.01)
    assert np.mean(params["D"] == 0) == pytest.approx(0.50, abs=0.02)
    assert np.mean(params["alpha"] / params["beta"] >= 5) == pytest.approx(0.11, abs=0.015)


def test_bend_interval() -> None:
    reasoning, ocr = (bend_interval(fitted_law(name, "regular")) for name in BOTH)
    np.testing.assert_allclose(np.array(reasoning, dtype=float), (-2.21, 1.09), rtol=0, atol=0.02)
    np.testing.assert_allclose(np.array(ocr, dtype=float), (-8.02, -3.01), rtol=0, atol=0.03)


RIDGE = """
    -100  .0004 .0001 4.718   .36
    -10   .0036 .0008 4.716   .51
    -2    .0151 .0032 4.711  1.28
    -1    .0249 .0053 4.706  2.18
    -0.5  .0369 .0078 4.702  3.57
    0     .0709 .0151 4.697  8.80
    0.05  .0782 .0166 4.698 10.1
    0.1   .0870 .0185 4.698 11.7
    0.2   .1124 .0239 4.705 16.6
    0.3   .1588 .0336 4.731 25.6
    0.4   .2695 .0553 4.873 44.6
    0.46  .4612 .0854 5.398 67.5
"""


def test_ridge_of_the_floor() -> None:
    """Exponents slide along D; their ratio hardly moves. Columns: D, alpha, beta, ratio, deviance."""
    expected = np.array([line.split() for line in RIDGE.strip().splitlines()], dtype=float)
    found = floor_ridge(fitted_law(REASONING, "regular"), expected[:, 0])
    got = np.array([[row[key] for key in ("D", "alpha", "beta", "ratio", "deviance")] for row in found])
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got[:, 0], expected[:, 0])
    np.testing.assert_allclose(got[:, 1:3], expected[:, 1:3], rtol=0, atol=6e-5)
    np.testing.assert_allclose(got[:, 3], expected[:, 3], rtol=0, atol=6e-4)
    np.testing.assert_allclose(got[:6, 4], expected[:6, 4], rtol=0, atol=6e-3)
    np.testing.assert_allclose(got[6:, 4], expected[6:, 4], rtol=0, atol=6e-2)


# --- left-out cells (A12) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "law", "lono", "lovo", "tolerance"),
    [
        (REASONING, "logit_linear", 0.390, 0.333, 0.005),
        (OCR, "logit_linear", 0.898, 0.777, 0.005),
        (OCR, "paper", 1.614, 2.056, 0.005),
        # printed to two decimals
        (REASONING, "log_linear", 0.38, 0.34, 0.006),
        (REASONING, "power", 0.47, 0.40, 0.006),
        (REASONING, "regular", 0.51, 0.34, 0.006),
        (REASONING, "interaction", 0.40, 0.32, 0.006),
        (REASONING, "quadratic", 0.82, 0.36, 0.006),
        (REASONING, "additive", 0.98, 0.37, 0.006),
        (OCR, "log_linear", 1.32, 1.58, 0.006),
        (OCR, "regular", 0.94, 0.96, 0.006),
        (OCR, "quadratic", 3.51, 1.09, 0.006),
    ],
)
def test_left_out_levels(name: str, law: str, lono: float, lovo: float, tolerance: float) -> None:
    """Root mean square errors in points of score."""
    found = validate(fitted_law(name, law))
    assert found.lono_rms is not None
    assert found.lovo_rms is not None
    assert 100 * found.lono_rms == pytest.approx(lono, abs=tolerance)
    assert 100 * found.lovo_rms == pytest.approx(lovo, abs=tolerance)


def test_left_out_levels_one_by_one() -> None:
    reasoning, ocr = (validate(fitted_law(name, "logit_linear")) for name in BOTH)

    def points(by_level: dict[float, float]) -> list[float]:
        return [100 * by_level[key] for key in sorted(by_level)]

    np.testing.assert_allclose(points(reasoning.by_n), (0.29, 0.46, 0.46, 0.32), rtol=0, atol=0.006)
    np.testing.assert_allclose(
        points(reasoning.by_v), (0.22, 0.53, 0.19, 0.10, 0.40, 0.38, 0.33), rtol=0, atol=0.006
    )
    np.testing.assert_allclose(points(ocr.by_n), (0.78, 0.54, 1.10, 1.06), rtol=0, atol=0.006)
    np.testing.assert_allclose(
        points(ocr.by_v), (0.52, 0.54, 0.60, 0.90, 0.78, 0.66, 1.20), rtol=0, atol=0.006
    )
    assert 100 * validate(fitted_law(OCR, "paper")).by_v[1.0] == pytest.approx(3.75, abs=0.006)


def test_a_left_out_cell_is_predicted_by_the_others() -> None:
    """LOO of the log-linear law against its closed form, residual / (1 - leverage)."""
    data = table(REASONING)
    x = np.column_stack([np.ones(28), np.log(data.n), np.log(data.v)])
    hat = x @ np.linalg.solve(x.T @ x, x.T)
    press = (data.error - hat @ data.error) / (1 - np.diag(hat))
    found = validate(fitted_law(REASONING, "log_linear"))
    assert found.loo_rms == pytest.approx(float(np.sqrt(np.mean(press**2))), rel=1e-8)


@pytest.mark.parametrize(
    ("name", "law", "mean", "worst"),
    [
        (REASONING, "log_linear", 0.49, 0.99),
        (REASONING, "power", 0.45, 0.97),
        (REASONING, "logit_linear", 0.57, 0.99),
        (REASONING, "regular", 1.09, 1.77),
        (OCR, "logit_linear", 1.30, 2.77),
        (OCR, "power", 1.39, 3.39),
    ],
)
def test_without_the_largest_llm(name: str, law: str, mean: float, worst: float) -> None:
    """Relative errors in per cent of the 7B cells, predicted from the others."""
    found = validate(fitted_law(name, law)).largest
    assert found is not None
    np.testing.assert_allclose(100 * np.array(found), (mean, worst), rtol=0, atol=0.006)


def test_naive_guesses() -> None:
    reasoning, ocr = (baselines(table(name)) for name in BOTH)
    np.testing.assert_allclose(100 * np.array(reasoning["persistence"]), (3.90, 5.55), rtol=0, atol=0.006)
    np.testing.assert_allclose(100 * np.array(reasoning["line"]), (0.72, 1.65), rtol=0, atol=0.006)
    np.testing.assert_allclose(100 * np.array(ocr["persistence"]), (0.73, 1.54), rtol=0, atol=0.006)


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
