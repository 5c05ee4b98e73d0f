"""What a review found once: ends of intervals, valleys, small and perfect tables, odd options."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from analysis.__main__ import main
from analysis.data import Table, load
from analysis.fit import fit
from analysis.laws import LAWS
from analysis.profile import ratio_interval
from analysis.study import Options, study

SIZES, COUNTS = (0.5, 1.8, 4, 7), (1, 4, 16, 64, 256)
Maker = Callable[..., Table]


@pytest.fixture
def table(tmp_path: Path) -> Maker:
    def make(
        error: Callable[[float, float], float],
        sizes: tuple[float, ...] = SIZES,
        counts: tuple[float, ...] = COUNTS,
        noise: float = 0.0,
        items: int | None = None,
    ) -> Table:
        rng = np.random.default_rng(5)
        lines = ["llm_params_b,visual_tokens,score" + (",n_items" if items else "")]
        for n in sizes:
            for v in counts:
                score = 1 - error(math.log(n), math.log(v)) - rng.normal(0, noise)
                if items:
                    score = rng.binomial(items, min(max(score, 0.0), 1.0)) / items
                lines.append(f"{n},{v},{score!r}" + (f",{items}" if items else ""))
        (tmp_path / "made.csv").write_text("\n".join(lines) + "\n")
        return load(tmp_path / "made.csv").tables[0]

    return make


def test_an_unfinished_solve_is_not_an_end(table: Maker) -> None:
    """Strong curvature and few cells: the ends agree with a bisection over scipy's fits."""
    made = table(lambda n, v: 0.45 * math.exp(-0.5 * n - 0.06 * v) + 0.15, noise=0.012)
    found = fit(LAWS["regular"], made)
    ends = ratio_interval(found).ends
    assert ends is not None
    u, w = np.log(made.n / 1e9), np.log(made.v)
    limit = found.sse * (1 + scipy.stats.f.ppf(0.95, 1, found.freedom) / found.freedom)

    def excess(ratio: float) -> float:
        def miss(p: np.ndarray) -> np.ndarray:
            z = np.clip(p[2] * p[1] * (ratio * u + w), -50, 50)
            bend = np.where(np.abs(z) < 1e-8, 1.0, -np.expm1(-z) / np.where(z == 0, 1, z))
            return p[0] - p[1] * (ratio * u + w) * bend - made.error

        starts = [(0.6, b, c) for b in (0.003, 0.01, 0.03) for c in (-5.0, 0.1, 2.0, 6.0)]
        fits = [scipy.optimize.least_squares(miss, s, x_scale="jac", max_nfev=2000) for s in starts]
        return min(2 * one.cost for one in fits) - limit

    for end, inside, outside in (
        (ends[0], found.ratio, ends[0] * 0.7),
        (ends[1], found.ratio, ends[1] * 1.5),
    ):
        assert end == pytest.approx(scipy.optimize.brentq(excess, inside, outside, rtol=1e-5), rel=2e-3)


def test_additive_finds_the_steep_valley(table: Maker) -> None:
    """Tokens dominate and size acts steeply and little: a start of one exponent alone ends elsewhere."""
    made = table(lambda n, v: 0.05 * math.exp(-0.9 * n) + 0.8 * math.exp(-0.15 * v), noise=0.004)
    u, w = np.log(made.n / 1e9), np.log(made.v)
    best = math.inf
    for alpha in np.geomspace(0.01, 6, 60):
        for beta in np.geomspace(0.01, 6, 60):
            columns = np.stack([np.exp(-alpha * u), np.exp(-beta * w), np.ones_like(u)], axis=1)
            best = min(best, scipy.optimize.nnls(columns, made.error)[1] ** 2)
    assert fit(LAWS["additive"], made).sse <= best


def test_exponents_of_additive_laws_are_not_negative() -> None:
    for name in ("paper-reasoning", "paper-ocr"):
        params = fit(LAWS["additive_product"], load(name).tables[0]).params
        assert min(params["alpha"], params["beta"]) >= 0


def test_a_law_without_an_aicc_is_never_the_best(table: Maker) -> None:
    made = table(lambda n, v: 0.6 - 0.05 * n - 0.02 * v, SIZES[:2], COUNTS[:3], 0.003)
    found = study(made, "here", Options(bootstrap=100))
    assert found.best is not None
    values = [law.fit.aicc for law in found.laws.values()]
    assert found.best.fit.aicc == min(value for value in values if value is not None)
    assert "regular" in found.refused


def test_a_perfect_fit_belongs_to_the_simplest_law(table: Maker) -> None:
    line = study(table(lambda n, v: 0.6 - 0.05 * n - 0.02 * v), "here", Options(bootstrap=100))
    assert line.best is not None
    assert line.best.fit.law.name == "log_linear"
    assert line.best.fit.aicc is None
    assert line.averaged is not None
    assert line.averaged.weights == {"log_linear": 1.0}
    assert line.averaged.visual_tokens == pytest.approx(50 / (2.5 - 1), rel=1e-6)


def test_binomial_weights_come_from_the_items(table: Maker) -> None:
    """Few items and cells at 1: close to the maximum of the binomial likelihood."""
    made = table(lambda n, v: 1 / (1 + math.exp(1.5 + 0.4 * n + 0.25 * v)), items=60)
    assert made.error.min() == 0
    u, w = np.log(made.n / 1e9), np.log(made.v)

    def loss(p: np.ndarray) -> float:
        line = p[0] + p[1] * u + p[2] * w
        return float(np.sum(made.error * np.logaddexp(0, line) + (1 - made.error) * np.logaddexp(0, -line)))

    truth = scipy.optimize.minimize(loss, [1.0, 0.3, 0.2], tol=1e-12).x
    params = fit(LAWS["logit_linear"], made, loss="binomial").params
    assert [params[name] for name in ("p0", "p1", "p2")] == pytest.approx(truth, abs=0.03)


def test_huber_has_an_interval_from_its_resamples() -> None:
    found = study(load("paper-reasoning").tables[0], "here", Options(("power",), 400, loss="huber"))
    assert found.verdict is not None
    assert found.verdict.interval is not None
    assert found.verdict.interval[0] < found.best.fit.ratio < found.verdict.interval[1]  # type: ignore[union-attr]
    assert found.best.fit.aicc is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cost", "latency", "--gen-tokens", "3"], "--gen-tokens cannot change them"),
        (["--batch", "8"], "give --gen-tokens too"),
        (["--intensity", "200"], "give --gen-tokens too"),
    ],
)
def test_options_that_nothing_would_read_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["paper-ocr", *words]) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.err.count("\n") == 1


def test_a_budget_that_buys_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["paper-reasoning", "--law", "log_linear", "--bootstrap", "100", "--json", "--budget", "1e-3"]
    assert main(words) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["optimum"] is None
    assert "buys no LLM at any V" in streams.err


def test_few_resamples_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for count, said in (("5", True), ("200", False)):
        assert main(["paper-ocr", "--law", "log_linear", "--bootstrap", count]) == 0
        assert ("too few for 95% intervals" in capsys.readouterr().err) is said


def test_a_group_has_its_own_cost(tmp_path: Path) -> None:
    lines = ["llm_params_b,visual_tokens,score,task,task_group,text_tokens"]
    for group, q in (("a", 20), ("b", 200)):
        for i, n in enumerate(SIZES):
            lines += [
                f"{n},{v},{0.4 + 0.05 * i + 0.01 * j},{group},{group},{q}" for j, v in enumerate(COUNTS)
            ]
    (tmp_path / "two.csv").write_text("\n".join(lines) + "\n")
    studies = [study(one, "here", Options(("log_linear",), 100)) for one in load(tmp_path / "two.csv").tables]
    assert [one.q for one in studies] == [20, 200]
    values = [one.optimum.v for one in studies if one.optimum]
    assert values[1] == pytest.approx(10 * values[0], rel=1e-6)


def test_rising_error_has_no_ratio() -> None:
    made = load("paper-reasoning").tables[0]
    upside_down = replace(made, error=1 - made.error)
    found = study(upside_down, "here", Options(("log_linear", "logit_linear"), 200))
    assert found.verdict is not None
    assert found.verdict.ratio is None
    assert "wrong_sign" in found.verdict.flags
    assert found.tokens == ()


def test_the_page_of_the_documentation_runs() -> None:
    """The Python of docs/analysis.md, and the values that its comments show."""
    page = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    (code,) = (block.split("```")[0] for block in page.split("```python\n")[1:])
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["best"].ratio == pytest.approx(4.7150, abs=1e-4)
    assert names["point"].v == pytest.approx(13.46, abs=0.01)
    assert names["plan"].ratio_sd == pytest.approx(0.0435, abs=1e-4)
    assert (names["top"].n, names["top"].v) == (0.25e9, 576)
