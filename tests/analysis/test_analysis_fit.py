"""The published sets give the reference figures; known truths come back; intervals cover."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.data import Table, load
from analysis.fit import fit_all, fit_law, judge, least_squares, why_no_fit
from analysis.laws import LAWS, features
from analysis.optimum import best_tokens, indifference, token_choice

# Least-squares optima of the 28 published cells, computed independently with scipy in float64.
REFERENCE = [
    ("paper-reasoning", "log-linear", (0.59017177, 0.03838886, 0.00813578), 2.804936e-4, 0.99418),
    ("paper-reasoning", "logit-linear", (-0.36451520, 0.15523200, 0.03292300), 2.765060e-4, 0.99426),
    ("paper-ocr", "log-linear", (0.91341813, 0.02302993, 0.03178884), 3.345245e-3, 0.97431),
    ("paper-ocr", "logit-linear", (-2.15552864, 0.14563138, 0.20067879), 1.208403e-3, 0.99072),
]


def paper(name: str) -> Table:
    return load(name).tables[0]


@pytest.mark.parametrize(("name", "law", "params", "sse", "r2"), REFERENCE)
def test_reference_optima(name: str, law: str, params: tuple[float, ...], sse: float, r2: float) -> None:
    fit = fit_law(LAWS[law], paper(name), bootstrap=1)
    np.testing.assert_allclose(fit.params, params, rtol=0, atol=1e-7)
    assert fit.sse == pytest.approx(sse, rel=1e-6)
    assert fit.r2 == pytest.approx(r2, abs=1e-5)
    assert fit.converged


@pytest.mark.parametrize(
    ("name", "law", "interval"),
    [
        ("paper-reasoning", "log-linear", (4.35, 5.15)),
        ("paper-reasoning", "logit-linear", (4.36, 5.14)),
        ("paper-ocr", "logit-linear", (0.64, 0.81)),
    ],
)
def test_reference_ratio_intervals(name: str, law: str, interval: tuple[float, float]) -> None:
    fit = fit_law(LAWS[law], paper(name), bootstrap=10_000)
    verdict = judge(fit)
    assert fit.failed == 0
    assert verdict.identified
    assert verdict.interval is not None
    np.testing.assert_allclose(verdict.interval, interval, rtol=0, atol=0.03)


def test_reference_choice_of_law() -> None:
    margins = {}
    for name in ("paper-reasoning", "paper-ocr"):
        best, other = fit_all(paper(name), bootstrap=1).values()
        assert best.law.name == "logit-linear"
        assert best.aicc is not None
        assert other.aicc is not None
        margins[name] = other.aicc - best.aicc
    assert margins["paper-reasoning"] == pytest.approx(0.4, abs=0.05)
    assert margins["paper-ocr"] == pytest.approx(28.5, abs=0.05)


def test_reference_optimum() -> None:
    fit = fit_law(LAWS["log-linear"], paper("paper-reasoning"), bootstrap=10_000)
    for q, v in ((0.0, 1.0), (10.0, 2.69), (50.0, 13.44), (100.0, 26.9)):
        assert token_choice(fit, q, 1, 576).v == pytest.approx(v, rel=5e-3)
    np.testing.assert_allclose(token_choice(fit, 50, 1, 576).interval, (12.1, 14.9), atol=0.1)
    np.testing.assert_allclose(indifference(fit, 50, 9.24e11, 1, 576), (4.3, 34.5), rtol=0.02)
    assert token_choice(fit, 3.6, 1, 576).corner == "V_min"
    assert token_choice(fit, 2200, 1, 576).corner == "V_max"
    ocr = fit_law(LAWS["logit-linear"], paper("paper-ocr"), bootstrap=10)
    assert {token_choice(ocr, q, 1, 576).corner for q in (0.0, 50.0, 500.0)} == {"V_max"}


def test_best_tokens_is_the_best_of_a_fine_grid_for_any_signs() -> None:
    rng = np.random.default_rng(0)
    grid = np.geomspace(1, 64, 20_001)
    for _ in range(50):
        a, b = rng.normal(size=2)
        for q in (0.0, 7.0, 300.0):
            gain = b * np.log(grid) - a * np.log(q + grid)
            found = float(best_tokens(np.array([0.0, a, b]), q, 1, 64))
            assert b * np.log(found) - a * np.log(q + found) >= gain.max() - 1e-9


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
@pytest.mark.parametrize("scale", [1e9, 1e4])
def test_noise_free_recovery(law: object, scale: float) -> None:
    assert isinstance(law, type(LAWS["log-linear"]))
    n, v = (x.ravel() for x in np.meshgrid(np.array([0.5, 1.8, 4, 7]) * scale, [1.0, 4, 16, 64]))
    x = features(n, v)
    truth = np.array([-0.5, 0.2, 0.1]) if law.logistic else np.array([0.6, 0.03, 0.02])
    found, converged = least_squares(law, x, law.predict(truth, x)[None])
    assert converged.all()
    np.testing.assert_allclose(found[0], truth, atol=1e-9)


def test_jacobian_is_the_derivative() -> None:
    x = features(np.array([5e8, 7e9, 2e4]), np.array([1.0, 16.0, 576.0]))
    for law in LAWS.values():
        at = np.array([0.3, 0.04, 0.1])
        step = 1e-6 * np.eye(3)
        slope = np.stack([(law.predict(at + d, x) - law.predict(at - d, x)) / 2e-6 for d in step], axis=-1)
        np.testing.assert_allclose(law.jacobian(at, x), slope, atol=1e-8)


def test_bootstrap_covers_the_truth() -> None:
    table, law = paper("paper-reasoning"), LAWS["log-linear"]
    x, rng = features(table.n, table.v), np.random.default_rng(1)
    truth = np.array([0.59, 0.0384, 0.00814])
    inside = 0
    for trial in range(200):
        noisy = replace(table, error=law.predict(truth, x) + rng.normal(0, 0.0034, table.n.size))
        low, high = judge(fit_law(law, noisy, bootstrap=400, seed=trial)).interval or (np.nan, np.nan)
        inside += low <= truth[1] / truth[2] <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_pure_noise_is_not_identified() -> None:
    table = paper("paper-reasoning")
    noise = np.random.default_rng(4).normal(0.5, 0.02, table.n.size)
    for fit in fit_all(replace(table, error=noise), bootstrap=500).values():
        verdict = judge(fit)
        assert not verdict.identified
        assert verdict.ratio is None
        assert verdict.interval is None
        assert "cannot be told from zero" in verdict.reason or "rises" in verdict.reason


def test_every_ratio_given_has_a_finite_positive_interval() -> None:
    table, seen = paper("paper-reasoning"), set()
    for trial in range(60):
        rng = np.random.default_rng(trial)
        error = (
            0.6 - 0.04 * np.log(table.n / 1e9) - 0.012 * np.log(table.v) + rng.normal(0, 0.06, table.n.size)
        )
        for fit in fit_all(replace(table, error=error), bootstrap=200, seed=trial).values():
            verdict = judge(fit)
            seen.add(verdict.identified)
            if verdict.identified:
                assert verdict.interval is not None
                assert 0 < verdict.interval[0] < verdict.interval[1] < np.inf
    assert seen == {True, False}


def test_error_that_rises_with_tokens_is_named() -> None:
    table = paper("paper-reasoning")
    rising = replace(table, error=0.5 - 0.03 * np.log(table.n / 1e9) + 0.02 * np.log(table.v))
    assert "error rises with visual tokens" in judge(fit_all(rising, 100)["log-linear"]).reason


def test_a_step_from_one_to_zero_is_not_identified() -> None:
    table = paper("paper-reasoning")
    step = replace(table, error=(table.v < 30).astype(float))
    verdict = judge(fit_law(LAWS["logit-linear"], step, bootstrap=50))
    assert not verdict.identified


def test_constant_error_is_not_identified() -> None:
    table = paper("paper-ocr")
    flat = replace(table, error=np.full(table.n.size, 0.5))
    assert all(not judge(fit).identified for fit in fit_all(flat, 50).values())


def test_too_small_tables_say_why() -> None:
    table = paper("paper-reasoning")
    one_size = table
    for index in range(27, 6, -1):
        one_size = one_size.without(index)
    assert "1 LLM size" in (why_no_fit(one_size) or "")
    with pytest.raises(ValueError, match="1 LLM size"):
        fit_law(LAWS["log-linear"], one_size)
    with pytest.raises(ValueError, match="bootstrap"):
        fit_law(LAWS["log-linear"], table, bootstrap=0)
    diagonal = replace(table, n=table.v * 1e6)
    assert "change together" in (why_no_fit(diagonal) or "")
