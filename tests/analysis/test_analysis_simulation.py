"""Simulated sets of known truth: exact recovery, random starts, bias, spread and the coverage of intervals.

The sizes and token counts are the paper's (four LLMs, seven counts). Expected figures are from simulations of
the same truths by another program.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats

from analysis import mixed
from analysis.bootstrap import percentile_interval, resample
from analysis.data import Table, load
from analysis.fit import Cells, fit, fit_rows
from analysis.laws import LAWS, Frame

SETS = 4000
NOISE = 0.0034


class Truth(NamedTuple):
    """Y = K N^-alpha V^-beta + D."""

    K: float
    alpha: float
    beta: float
    D: float

    @property
    def ratio(self) -> float:
        return self.alpha / self.beta

    def error(self, data: Table) -> np.ndarray:
        return self.K * (data.n / 1e9) ** -self.alpha * data.v**-self.beta + self.D


PAPER = Truth(0.553, 0.077, 0.015, 0.036)
CURVED = Truth(0.5, 0.35, 0.15, 0.2)
OCR = Truth(0.9, 0.03, 0.05, 0.05)
STEEP = Truth(0.6, 0.6, 0.3, 0.3)


@cache
def data(name: str = "paper-reasoning") -> Table:
    return load(name).tables[0]


@cache
def cells() -> Cells:
    return fit(LAWS["log_linear"], data()).cells


def noisy(truth: Truth, sigma: float, seed: int) -> np.ndarray:
    """[SETS, 28] simulated errors."""
    return truth.error(data()) + np.random.default_rng(seed).normal(0, sigma, (SETS, 28))


ONES = np.ones((1, 28))


class Recovered(NamedTuple):
    ratio: np.ndarray
    alpha: np.ndarray
    D: np.ndarray


@cache
def paper_fits(truth: Truth, sigma: float) -> Recovered:
    """The paper's form fitted to every set."""
    law = LAWS["paper"]
    found = fit_rows(law, cells(), noisy(truth, sigma, 11), ONES)
    assert found.converged.all()
    natural = law.natural(found.theta, cells().frame)
    np.testing.assert_array_equal(natural["D"] == 0, found.bound)
    return Recovered(law.ratio(found.theta), natural["alpha"], natural["D"])


def rmse(values: np.ndarray, truth: float) -> float:
    return float(np.sqrt(np.mean((values - truth) ** 2)))


@pytest.mark.parametrize("law", ["regular", "paper"])
@pytest.mark.parametrize("truth", [PAPER, CURVED, OCR, STEEP])
def test_noise_free_recovery(law: str, truth: Truth) -> None:
    found = fit(LAWS[law], replace(data(), error=truth.error(data())))
    assert found.params["alpha"] == pytest.approx(truth.alpha, rel=1e-9)
    assert found.params["beta"] == pytest.approx(truth.beta, rel=1e-9)
    assert found.params["D"] == pytest.approx(truth.D, abs=1e-8)
    assert found.params["K"] == pytest.approx(truth.K, rel=1e-8)
    assert found.sse <= 1e-24
    assert found.converged
    assert found.bounds == ()


def random_starts(seed: int, slope: float) -> np.ndarray:
    """4,096 of (level, slope along ln N, slope along ln V, bend): slopes from `slope` to 0.1."""
    rng = np.random.default_rng(seed)
    return rng.uniform([0, slope, slope, -5], [1, 0.1, 0.1, 5], (4096, 4))


@pytest.mark.parametrize(
    ("slope", "steps", "share"),
    [
        (0.01, 40, 0.999),
        # Of either sign, so that some are all but flat: a few of these need more steps.
        (-0.1, 40, 0.997),
        (-0.1, 200, 0.9995),
    ],
)
@pytest.mark.parametrize("name", ["paper-reasoning", "paper-ocr", "straight"])
def test_random_starts_reach_the_optimum(name: str, slope: float, steps: int, share: float) -> None:
    """'straight' is a noisy log-linear truth, whose bend is none."""
    table, law = data() if name == "straight" else data(name), LAWS["regular"]
    if name == "straight":
        line = 0.59 - 0.0384 * np.log(table.n / 1e9) - 0.00814 * np.log(table.v)
        table = replace(table, error=line + np.random.default_rng(2).normal(0, 1e-5, 28))
    best, starts = fit(law, table), random_starts(5, slope)
    found = fit_rows(law, best.cells, table.error[None], np.ones((4096, 28)), start=starts, max_steps=steps)
    assert np.isfinite(found.theta).all()
    assert np.isfinite(found.cost).all()
    assert found.cost.min() >= best.sse * (1 - 1e-9)
    assert np.mean(found.cost <= best.sse * (1 + 1e-6)) >= share
    at_start = ((table.error - law.predict(starts, best.cells.u, best.cells.w)) ** 2).sum(axis=1)
    assert np.median(at_start) > 50 * best.sse  # the starts are not near the optimum


def test_random_starts_on_an_exact_line() -> None:
    """The truth has no bend and no noise."""
    line = 0.59 - 0.0384 * cells().u - 0.00814 * cells().w
    found = fit_rows(
        LAWS["regular"], cells(), line[None], np.ones((4096, 28)), start=random_starts(6, 0.01), max_steps=40
    )
    assert np.isfinite(found.theta).all()
    assert np.mean(found.cost <= 1e-20) >= 0.999
    good = found.cost <= 1e-20
    np.testing.assert_allclose(
        found.theta[good], np.broadcast_to([0.59, 0.0384, 0.00814, 0], (good.sum(), 4)), atol=1e-6
    )


def test_paper_like_truth() -> None:
    found = paper_fits(PAPER, NOISE)
    assert abs(found.ratio.mean() / PAPER.ratio - 1) <= 0.005
    assert rmse(found.ratio, PAPER.ratio) == pytest.approx(0.239, abs=0.01)
    assert np.mean(found.D == 0) == pytest.approx(0.42, abs=0.03)


def test_paper_like_truth_with_less_noise() -> None:
    found = paper_fits(PAPER, 0.001)
    assert rmse(found.ratio, PAPER.ratio) == pytest.approx(0.068, abs=0.004)
    assert np.mean(found.D == 0) == pytest.approx(0.28, abs=0.03)


def test_strongly_curved_truth() -> None:
    found = paper_fits(CURVED, NOISE)
    np.testing.assert_allclose(percentile_interval(found.alpha), (0.336, 0.364), rtol=0, atol=0.002)
    np.testing.assert_allclose(percentile_interval(found.D), (0.189, 0.211), rtol=0, atol=0.002)
    assert not (found.D == 0).any()


def test_ocr_like_truth() -> None:
    found = paper_fits(OCR, NOISE)
    assert rmse(found.ratio, OCR.ratio) == pytest.approx(0.018, abs=0.001)
    assert (found.ratio < 1).all()


def held_coverage(cells: Cells, targets: np.ndarray, held: np.ndarray, start: np.ndarray) -> float:
    """Share of sets whose F test does not reject the regular law with a true constraint."""
    law = LAWS["regular"]
    free = fit_rows(law, cells, targets, ONES, start=start)
    bound = fit_rows(law, cells, targets, ONES, start=start, held=np.tile(held, (len(targets), 1)))
    assert free.converged.all()
    assert bound.converged.all()
    slope_n, slope_v, bend = bound.theta[:, 1], bound.theta[:, 2], bound.theta[:, 3]
    np.testing.assert_allclose(held[0] * slope_n + held[1] * slope_v + held[2] * bend, -held[3], atol=1e-6)
    f = (bound.cost - free.cost) / (free.cost / 24)
    assert f.min() > -1e-6
    return float(np.mean(f <= scipy.stats.f.ppf(0.95, 1, 24)))


def test_the_ratios_interval_covers() -> None:
    """The profile-F interval holds the truth exactly where the true ratio is not rejected."""
    start = np.array([[PAPER.error(data()).mean(), 0.038, 0.0075, 2.0]])
    held = np.array([1.0, -PAPER.ratio, 0.0, 0.0]) / 0.038
    assert held_coverage(cells(), noisy(PAPER, NOISE, 21), held, start) == pytest.approx(0.950, abs=0.012)


def test_the_bends_interval_covers() -> None:
    """lam belongs to N = 1 billion and V = 1, so the cells are described from there."""
    plain = cells()._replace(u=np.log(data().n / 1e9), w=np.log(data().v), frame=Frame(0.0, 0.0))
    lam = 1 / PAPER.K
    start = np.array([[PAPER.K + PAPER.D, PAPER.alpha / lam, PAPER.beta / lam, lam]])
    held = np.array([0.0, 0.0, 1.0, -lam])
    assert held_coverage(plain, noisy(PAPER, NOISE, 22), held, start) == pytest.approx(0.947, abs=0.012)


# --- LLMs that differ in more than N ------------------------------------------------------------------------

LINE = (0.59, 0.0384, 0.00814)


def with_llm_effects(sd: float, sets: int, seed: int) -> np.ndarray:
    """[sets, 28] errors on the log-linear law, with an effect of each LLM and noise of each cell."""
    rng, table = np.random.default_rng(seed), data()
    _, llm = np.unique(table.n, return_inverse=True)
    line = LINE[0] - LINE[1] * np.log(table.n / 1e9) - LINE[2] * np.log(table.v)
    return line + rng.normal(0, sd, (sets, 4))[:, llm] + rng.normal(0, NOISE, (sets, 28))


class Coverage(NamedTuple):
    """Shares of sets whose 95% interval holds the slope along ln N."""

    mixed: float
    wald: float


@cache
def coverage(sd: float) -> Coverage:
    """mixed: the package's interval. wald: least squares, t with 25 degrees of freedom."""
    errors, law = with_llm_effects(sd, SETS, 31), LAWS["log_linear"]
    inside = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "_DRAWS", 100)  # draws of the ratio; the slope's t interval needs none
        for error in errors:
            found = mixed.mixed_interval(law, replace(data(), error=error))
            assert found is not None
            middle, low, high = found.slope_n
            assert middle - low == pytest.approx(high - middle)
            inside += low <= LINE[1] <= high
    rows = fit_rows(law, cells(), errors, ONES)
    error_of_a = np.sqrt(rows.cost / 25 / (cells().u ** 2).sum())
    wald = np.abs(rows.theta[:, 1] - LINE[1]) <= scipy.stats.t.ppf(0.975, 25) * error_of_a
    return Coverage(inside / SETS, float(wald.mean()))


EFFECTS = pytest.mark.parametrize(("sd", "wald"), [(0.0, 0.946), (0.003, 0.646), (0.006, 0.509)])


@EFFECTS
def test_least_squares_does_not_cover_where_llms_differ(sd: float, wald: float) -> None:
    assert coverage(sd).wald == pytest.approx(wald, abs=0.03)


@EFFECTS
def test_the_mixed_interval_covers(sd: float, wald: float) -> None:
    """t with two degrees of freedom, from the scatter of the LLMs: right whatever their effect."""
    assert coverage(sd).mixed == pytest.approx(0.95, abs=0.012)
    assert coverage(sd).mixed >= wald


def test_pairs_bootstrap_does_not_cover() -> None:
    """300 sets with an LLM effect: as bad as least squares."""
    inside = 0
    for number, error in enumerate(with_llm_effects(0.003, 300, 32)):
        found = fit(LAWS["log_linear"], replace(data(), error=error))
        theta = resample(found, 999, scheme="pairs", seed=number).theta
        low, high = percentile_interval(theta[:, 1])
        inside += low <= LINE[1] <= high
    assert inside / 300 == pytest.approx(0.62, abs=0.06)


def test_a_cluster_bootstrap_of_four_llms_is_refused() -> None:
    """In the same simulation its interval covers 55%."""
    found = fit(LAWS["log_linear"], replace(data(), error=with_llm_effects(0.003, 1, 33)[0]))
    with pytest.raises(ValueError, match="covers about 55%: use the mixed-effects interval"):
        resample(found, 999, scheme="cluster_n")


def test_residual_bootstrap_covers_without_llm_effects() -> None:
    """200 sets of 400 resamples on the log-linear truth."""
    inside = 0
    for number, error in enumerate(with_llm_effects(0.0, 200, 34)):
        found = fit(LAWS["log_linear"], replace(data(), error=error))
        low, high = percentile_interval(found.law.ratio(resample(found, 400, seed=number).theta))
        inside += low <= LINE[1] / LINE[2] <= high
    assert 0.90 <= inside / 200 <= 0.99
