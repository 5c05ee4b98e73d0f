"""The solver against scipy on random tables, its invariances, and tables that tell nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis.bootstrap import resample
from analysis.data import Table, load
from analysis.fit import LOSSES, Fit, covariance, fit, fit_rows, jacobian, starting_points, why_no_fit
from analysis.laws import LAWS, LOGIT_INTERACTION
from analysis.optimum import index_tokens
from analysis.profile import ratio_interval
from analysis.solve import solve
from analysis.verdict import Verdict, judge

Array = np.ndarray


@cache
def paper() -> Table:
    return load("paper-reasoning").tables[0]


def make_table(n: Array, v: Array, error: Array) -> Table:
    """A table of these cells; figures that fits do not read are NaN."""
    blank = {
        key: np.full(n.size, np.nan) for key, value in vars(paper()).items() if isinstance(value, np.ndarray)
    }
    names = tuple(f"{x:g}" for x in n)
    return replace(paper(), llm_name=names, **{**blank, "n": n, "v": v, "error": error})


def pick(table: Table, index: Array) -> Table:
    """The cells of `index`, in its order."""
    return make_table(table.n[index], table.v[index], table.error[index])


# --- scipy's answer, from formulas written apart from the package -------------------------------------------


class Form(NamedTuple):
    """A law in coordinates u, w about the centre. mean(p, u, w); draw: ranges of a truth; low, high: bounds;
    natural(p, m, k): printed parameters at centre (m, k); printed: the formula with N in billions.
    """

    mean: Callable[[Array, Array, Array], Array]
    draw: tuple[tuple[float, float], ...]
    printed: Callable[[dict[str, float], Array, Array], Array]
    natural: Callable[[Array, float, float], dict[str, float]] | None = None
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def line(p: Array, u: Array, w: Array) -> Array:
    return p[0] - p[1] * u - p[2] * w


def curved(p: Array, u: Array, w: Array) -> Array:
    e = p[1] * u + p[2] * w
    return p[0] - e if p[3] == 0 else p[0] + np.expm1(-p[3] * e) / p[3]


def two_powers(p: Array, u: Array, w: Array) -> Array:
    return p[0] * np.exp(-p[1] * u) + p[2] * np.exp(-p[3] * w) + p[4]


def surface(p: Array, u: Array, w: Array) -> Array:
    return line(p, u, w) - p[3] * u * w - p[4] * u**2 - p[5] * w**2


def index(p: dict[str, float], n: Array, v: Array) -> Array:
    return p["p0"] + p["p1"] * np.log(n) + p["p2"] * np.log(v)


def power(p: dict[str, float], n: Array, v: Array) -> Array:
    return p["K"] * n ** -p["alpha"] * v ** -p["beta"]


def crossed(p: dict[str, float], n: Array, v: Array) -> Array:
    return p["c"] - p["a"] * np.log(n) - p["b"] * np.log(v) - p["ab"] * np.log(n) * np.log(v)


def sum_of_powers(p: dict[str, float], n: Array, v: Array) -> Array:
    return p["a"] * n ** -p["alpha"] + p["b"] * v ** -p["beta"] + p["D"]


def index_parameters(p: Array, m: float, k: float) -> dict[str, float]:
    return {"p0": -(p[0] + p[1] * m + p[2] * k), "p1": p[1], "p2": p[2]}


def power_parameters(p: Array, m: float, k: float) -> dict[str, float]:
    return {"K": np.exp(p[0] + p[1] * m + p[2] * k), "alpha": p[1], "beta": p[2]}


LEVEL, SLOPE, ODDS, RATE = (0.35, 0.6), (0.01, 0.05), (0.05, 0.25), (0.02, 0.12)
FORMS = {
    "log_linear": Form(
        line,
        (LEVEL, SLOPE, SLOPE),
        lambda p, n, v: p["c"] - p["a"] * np.log(n) - p["b"] * np.log(v),
        lambda p, m, k: {"c": p[0] + p[1] * m + p[2] * k, "a": p[1], "b": p[2]},
    ),
    "power": Form(lambda p, u, w: np.exp(line(p, u, w)), ((-1.2, -0.8), RATE, RATE), power, power_parameters),
    "regular": Form(
        curved,
        (LEVEL, SLOPE, SLOPE, (-3, 6)),
        lambda p, n, v: power(p, n, v) + p["D"],
        lambda p, m, k: {
            "alpha": p[3] * p[1],
            "beta": p[3] * p[2],
            "D": p[0] - 1 / p[3],
            "K": np.exp(p[3] * (p[1] * m + p[2] * k)) / p[3],
        },
    ),
    "paper": Form(
        lambda p, u, w: p[0] * np.exp(-p[1] * u - p[2] * w) + p[3],
        ((0.2, 0.35), RATE, RATE, (0.0, 0.15)),
        lambda p, n, v: power(p, n, v) + p["D"],
        None,
        (0, -5, -5, 0),
        (5, 5, 5, 1),
    ),
    "logit_linear": Form(
        lambda p, u, w: scipy.special.expit(line(p, u, w)),
        ((-0.8, 0.6), ODDS, ODDS),
        lambda p, n, v: scipy.special.expit(-index(p, n, v)),
        index_parameters,
    ),
    "probit_linear": Form(
        lambda p, u, w: scipy.stats.norm.cdf(line(p, u, w)),
        ((-0.5, 0.4), ODDS, ODDS),
        lambda p, n, v: scipy.stats.norm.cdf(-index(p, n, v)),
        index_parameters,
    ),
    "log_accuracy": Form(
        lambda p, u, w: 1 - np.exp(-np.exp(line(p, u, w))),
        ((-0.8, 0.2), ODDS, ODDS),
        lambda p, n, v: 1 - np.exp(-power(p, n, v)),
        power_parameters,
    ),
    "additive": Form(
        two_powers,
        ((0.15, 0.3), ODDS, (0.1, 0.3), ODDS, (0.0, 0.1)),
        sum_of_powers,
        None,
        (0, -6, 0, -6, 0),
        (5, 6, 5, 6, 1),
    ),
    "additive_product": Form(
        lambda p, u, w: two_powers(p, u, w) + p[5] * np.exp(-p[1] * u - p[3] * w),
        ((0.15, 0.3), ODDS, (0.1, 0.3), ODDS, (0.0, 0.1), (-0.05, 0.1)),
        lambda p, n, v: sum_of_powers(p, n, v) + p["ab"] * n ** -p["alpha"] * v ** -p["beta"],
        None,
        (0, -6, 0, -6, 0, -5),
        (5, 6, 5, 6, 1, 5),
    ),
    "interaction": Form(
        lambda p, u, w: line(p, u, w) - p[3] * u * w,
        (LEVEL, SLOPE, SLOPE, (-0.004, 0.004)),
        crossed,
        lambda p, m, k: {
            "c": p[0] + p[1] * m + p[2] * k - p[3] * m * k,
            "a": p[1] - p[3] * k,
            "b": p[2] - p[3] * m,
            "ab": p[3],
        },
    ),
    "quadratic": Form(
        surface,
        (LEVEL, SLOPE, SLOPE, (-0.004, 0.004), (-0.004, 0.004), (-0.002, 0.002)),
        lambda p, n, v: crossed(p, n, v) - p["aa"] * np.log(n) ** 2 - p["bb"] * np.log(v) ** 2,
        lambda p, m, k: {
            "c": p[0] + p[1] * m + p[2] * k - p[3] * m * k - p[4] * m**2 - p[5] * k**2,
            "a": p[1] - p[3] * k - 2 * p[4] * m,
            "b": p[2] - p[3] * m - 2 * p[5] * k,
            "ab": p[3],
            "aa": p[4],
            "bb": p[5],
        },
    ),
}
VALLEYS = ("additive", "additive_product")  # a valley so flat that only its depth can be compared
GRIDS = ("paper", "toy", "holes", "unbalanced", "toy with holes", "large")


def grid(kind: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """(n, v) of the cells of one kind of table."""
    sizes, counts = {
        "paper": (np.array([0.5, 1.8, 4, 7]) * 1e9, [1, 4, 16, 36, 64, 144, 576]),
        "toy": (np.geomspace(1e4, 1e6, 3) * rng.uniform(0.7, 1.4, 3), [1, 4, 9, 16, 64]),
        "holes": (np.geomspace(2e8, 2e10, 5) * rng.uniform(0.7, 1.4, 5), [1, 4, 16, 64, 144, 576]),
        "unbalanced": (np.geomspace(1e7, 3e9, 3), []),
        "toy with holes": (np.geomspace(1e4, 8e5, 4), [1, 4, 16, 64]),
        "large": (np.geomspace(5e7, 5e10, 6), [1, 2, 4, 9, 16, 49, 196, 784]),
    }[kind]
    cells = list(itertools.product(sizes, counts))
    if kind == "unbalanced":  # every LLM has its own counts, and not equally many
        cells = [
            (n, float(v))
            for n, k in zip(sizes, (9, 5, 3), strict=True)
            for v in np.unique(rng.integers(1, 600, k))
        ]
    if "holes" in kind:
        keep = rng.permutation(len(cells))[: round(0.75 * len(cells))]
        cells = [cells[i] for i in sorted(keep)]
    n, v = np.array(cells, dtype=float).T
    return n, v


def by_scipy(form: Form, truth: Array, error: Array, u: Array, w: Array) -> tuple[Array, float]:
    """(parameters, SSE) of the best of six starts."""
    rng = np.random.default_rng(0)
    low = np.array(form.low or (-np.inf,) * truth.size)
    high = np.array(form.high or (np.inf,) * truth.size)
    best: tuple[Array, float] = (truth, np.inf)
    for number in range(6):
        start = (
            truth
            if number == 0
            else truth * rng.uniform(0.3, 2.0, truth.size) + rng.normal(0, 1e-3, truth.size)
        )
        found = scipy.optimize.least_squares(
            lambda p: error - form.mean(p, u, w),
            np.clip(start, low + 1e-6, high - 1e-6),
            jac="3-point",
            bounds=(low, high),
            x_scale="jac",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=400,
        )
        if 2 * found.cost < best[1]:
            best = found.x, 2 * found.cost
    return best


@pytest.mark.parametrize(
    ("name", "kind"),
    # The larger width compiles each law once more: three stand for all.
    [
        *itertools.product(LAWS, GRIDS[:-1]),
        *((law, "large") for law in ("log_linear", "regular", "additive")),
    ],
)
def test_agrees_with_scipy(name: str, kind: str) -> None:
    form = FORMS[name]
    rng = np.random.default_rng([list(LAWS).index(name), GRIDS.index(kind)])
    n, v = grid(kind, rng)
    u, w = (np.log(x) - np.log(x).mean() for x in (n, v))
    truth = np.array([rng.uniform(*ends) for ends in form.draw])
    error = form.mean(truth, u, w) + rng.normal(0, 0.004, n.size)
    assert 0.02 < error.min() <= error.max() < 0.98
    found = fit(LAWS[name], make_table(n, v, error))
    p, sse = by_scipy(form, truth, error, u, w)
    assert found.converged
    assert found.sse <= sse * (1 + 1e-6)
    assert found.sse == pytest.approx(float(((error - found.predict(n, v)) ** 2).sum()), rel=1e-12)
    # The printed formula with the printed parameters is the fit.
    np.testing.assert_allclose(form.printed(found.params, n / 1e9, v), found.predict(n, v), rtol=0, atol=2e-8)
    if name in VALLEYS:
        assert all(found.params[key] >= 0 for key in ("a", "b", "D"))
        return
    assert found.sse == pytest.approx(sse, rel=1e-6)
    np.testing.assert_allclose(found.predict(n, v), form.mean(p, u, w), rtol=0, atol=1e-6)
    if form.natural is not None:
        expected = form.natural(p, float(np.log(n / 1e9).mean()), float(np.log(v).mean()))
        for key, value in expected.items():
            assert found.params[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    elif p[3] > 1e-4:
        got = [found.params[key] for key in ("alpha", "beta", "D")]
        np.testing.assert_allclose(got, p[1:], rtol=1e-4)


@pytest.mark.parametrize("delta", [1e-3, 0.02])
@pytest.mark.parametrize("kind", ["paper", "toy with holes"])
def test_huber_agrees_with_scipy(kind: str, delta: float) -> None:
    """scipy's own robust loss, whose scale is the threshold."""
    rng = np.random.default_rng(3)
    n, v = grid(kind, rng)
    u, w = (np.log(x) - np.log(x).mean() for x in (n, v))
    target = line(np.array([-0.7, 0.1, 0.05]), u, w) + 0.01 * rng.standard_t(2, n.size)
    found = fit(LAWS["power"], make_table(n, v, np.exp(target)), loss="huber", delta=delta)

    def objective(p: Array) -> float:
        size = np.abs(target - line(p, u, w))
        return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())

    best = min(
        (
            scipy.optimize.minimize(
                objective,
                start,
                method="Nelder-Mead",
                options={"xatol": 1e-11, "fatol": 1e-16, "maxiter": 6000},
            )
            for start in ((-0.7, 0.1, 0.05), found.theta)
        ),
        key=lambda item: item.fun,
    )
    assert found.objective == pytest.approx(objective(found.theta), rel=1e-10)
    assert found.objective <= best.fun * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e9, 1e4])
@pytest.mark.parametrize("name", LAWS)
def test_noise_free_recovery(name: str, scale: float) -> None:
    """Every law finds what it made, for real and toy sizes."""
    form, rng = FORMS[name], np.random.default_rng(7)
    n, v = (x.ravel() for x in np.meshgrid(np.array([0.5, 1.8, 4, 7]) * scale, [1.0, 4, 16, 64]))
    u, w = (np.log(x) - np.log(x).mean() for x in (n, v))
    truth = np.array([rng.uniform(*ends) for ends in form.draw])
    error = form.mean(truth, u, w)
    found = fit(LAWS[name], make_table(n, v, error))
    np.testing.assert_allclose(found.predict(n, v), error, rtol=0, atol=1e-7 if name in VALLEYS else 1e-11)
    assert found.converged


def test_thousands_of_cells() -> None:
    rng = np.random.default_rng(0)
    n, v = np.exp(rng.uniform(18, 24, 1500)), np.round(np.exp(rng.uniform(0, 6, 1500)))
    error = 0.6 - 0.04 * np.log(n / 1e9) - 0.01 * np.log(v) + rng.normal(0, 0.02, 1500)
    found = fit(LAWS["log_linear"], make_table(n, v, error))
    x = np.column_stack([np.ones(1500), -np.log(n / 1e9), -np.log(v)])
    np.testing.assert_allclose(
        [found.params[key] for key in "cab"], np.linalg.lstsq(x, error, rcond=None)[0], rtol=1e-9
    )
    np.testing.assert_allclose(
        np.sqrt(np.diag(covariance(found)))[1:],
        np.sqrt(np.diag(np.linalg.inv(x.T @ x))[1:] * found.sse / 1497),
        rtol=1e-7,
    )


@pytest.mark.parametrize("name", LAWS)
def test_jacobian_and_slopes_are_derivatives(name: str) -> None:
    """Against complex steps of the formulas here (real ones where a function has no complex form)."""
    law, rng = LAWS[name], np.random.default_rng(2)
    u, w = rng.normal(0, 1, (2, 5))
    theta = np.array([0.5, 0.04, 0.3, 0.02, 0.1, 0.05])[: law.size]
    step = 1e-4
    for i in range(law.size):
        h = np.zeros(law.size)
        h[i] = step

        def at(factor: float, h: Array = h) -> Array:
            return law.predict(theta + factor * h, u, w)

        slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
        np.testing.assert_allclose(jacobian(law, theta, u, w)[:, i], slope, atol=1e-8)
    found = fit(law, paper())
    ends = found.predict(
        *(
            np.exp(np.array(x))
            for x in zip(
                *[
                    (found.cells.frame.ln_n + np.log(1e9) + i, found.cells.frame.ln_v + j)
                    for i, j in ((1e-4, 0), (-1e-4, 0), (0, 1e-4), (0, -1e-4))
                ],
                strict=True,
            )
        )
    )
    by_hand = (ends[1] - ends[0]) / 2e-4, (ends[3] - ends[2]) / 2e-4
    assert found.slopes == pytest.approx(by_hand, rel=1e-6)
    assert found.ratio == pytest.approx(by_hand[0] / by_hand[1], rel=1e-6)


# --- invariances --------------------------------------------------------------------------------------------

SINGLE = sorted(name for name, law in LAWS.items() if law.single_index)
few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def noisy_table(seed: int) -> Table:
    """A table of the logit law with 3 to 5 LLMs and 3 to 6 counts."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(9, 24)) * np.cumprod(rng.uniform(1.5, 5, rng.integers(3, 6)))
    counts = np.sort(rng.choice(np.arange(1, 26), rng.integers(3, 7), replace=False)).astype(float) ** 2
    n, v = (x.ravel() for x in np.meshgrid(sizes, counts, indexing="ij"))
    u, w = np.log(n) - np.log(n).mean(), np.log(v) - np.log(v).mean()
    a, b = rng.uniform(0.1, 0.3, 2)
    error = scipy.special.expit(rng.uniform(-0.5, 0.5) - a * u - b * w) + rng.normal(0, 0.004, n.size)
    return make_table(n, v, error)


@few
@given(seeds, st.floats(1e-4, 1e4), st.sampled_from(SINGLE))
def test_the_unit_of_n_does_not_matter(seed: int, factor: float, name: str) -> None:
    table = noisy_table(seed)
    found, scaled = (fit(LAWS[name], item) for item in (table, replace(table, n=table.n * factor)))
    assert scaled.sse == pytest.approx(found.sse, rel=1e-9)
    assert scaled.ratio == pytest.approx(found.ratio, rel=1e-7)


@few
@given(seeds, st.sampled_from(sorted(LAWS)))
def test_the_order_of_cells_does_not_matter(seed: int, name: str) -> None:
    table = noisy_table(seed)
    order = np.random.default_rng(seed).permutation(table.n.size)
    found, shuffled = fit(LAWS[name], table), fit(LAWS[name], pick(table, order))
    assert shuffled.sse == pytest.approx(found.sse, rel=1e-10)
    tolerance = 1e-5 if name in VALLEYS else 1e-8
    np.testing.assert_allclose(
        shuffled.predict(table.n, table.v), found.predict(table.n, table.v), atol=tolerance
    )
    if LAWS[name].size == 3 and name != "paper":
        np.testing.assert_allclose(shuffled.theta, found.theta, rtol=0, atol=1e-9)


@few
@given(seeds, st.sampled_from(sorted(set(LAWS) - set(VALLEYS))), st.integers(1, 2))
def test_a_weight_of_zero_removes_a_cell(seed: int, name: str, gone: int) -> None:
    table, law = noisy_table(seed), LAWS[name]
    out = np.random.default_rng(seed).choice(table.n.size, gone, replace=False)
    rest = np.setdiff1d(np.arange(table.n.size), out)
    smaller = pick(table, rest)
    assume(why_no_fit(smaller, law) is None)
    whole = fit(law, table)
    weights = np.ones((1, table.n.size))
    weights[0, out] = 0
    rows = fit_rows(law, whole.cells, table.error[None], weights)
    removed = fit(law, smaller)
    assert rows.cost[0] == pytest.approx(removed.sse, rel=1e-9)
    predicted = law.predict(rows.theta, whole.cells.u, whole.cells.w)[0, rest]
    np.testing.assert_allclose(predicted, removed.predict(smaller.n, smaller.v), rtol=0, atol=1e-8)
    # What stands in a removed cell is never read.
    targets = table.error.copy()
    targets[out] = np.nan
    other = solve(
        LAWS["regular"] if name == "paper" else law,
        whole.cells.u,
        whole.cells.w,
        targets[None],
        weights,
        rows.theta,
    )
    if not rows.bound[0]:
        assert other.cost[0] == pytest.approx(removed.sse, rel=1e-9)


@few
@given(seeds, st.sampled_from(sorted(LAWS)), st.integers(2, 600))
def test_a_row_does_not_depend_on_its_batch(seed: int, name: str, rows: int) -> None:
    """To the bit: alone, among others, in another order."""
    law, found = LAWS[name], fit(LAWS[name], paper())
    rng = np.random.default_rng(seed)
    rows = min(rows, 60) if name in VALLEYS else rows
    targets = found.cells.targets + rng.normal(0, 0.004, (rows, 28))
    weights = rng.integers(0, 3, (rows, 28)).astype(float)
    together = fit_rows(law, found.cells, targets, weights)
    i = int(rng.integers(rows))
    alone = fit_rows(law, found.cells, targets[i : i + 1], weights[i : i + 1])
    turned = fit_rows(law, found.cells, targets[::-1], weights[::-1])
    for part in ("theta", "cost", "converged", "bound"):  # not `gradient`, see below
        own = getattr(together, part)[i]
        assert np.asarray(own).tobytes() == getattr(alone, part)[0].tobytes(), part
        assert np.asarray(own).tobytes() == getattr(turned, part)[rows - 1 - i].tobytes(), part


def test_a_rows_gradient_does_not_depend_on_its_batch() -> None:
    found = fit(LAWS["regular"], paper())
    targets = found.cells.targets + np.random.default_rng(1).normal(0, 0.004, (100, 28))
    together = fit_rows(found.law, found.cells, targets, np.ones((1, 28))).gradient
    alone = [fit_rows(found.law, found.cells, row[None], np.ones((1, 28))).gradient[0] for row in targets]
    assert together.tolist() == alone


@pytest.mark.parametrize("name", ["log_linear", "regular", "additive"])
def test_cells_of_no_weight_are_padding(name: str) -> None:
    """Four more fill the padding: the same bits. Forty more double it: the same but for rounding."""
    found = fit(LAWS[name], paper())
    start = starting_points(found.law, found.cells, found.cells.targets[None], found.cells.weights[None])

    def padded(more: int) -> Array:
        u, w, targets, weights = (
            np.concatenate([x, np.full(more, fill)])
            for x, fill in (
                (found.cells.u, 3.0),
                (found.cells.w, -2.0),
                (found.cells.targets, 0.1),
                (found.cells.weights, 0.0),
            )
        )
        return solve(found.law, u, w, targets, weights, start[:1]).theta

    assert padded(4).tobytes() == padded(0).tobytes()
    np.testing.assert_allclose(padded(40), padded(0), rtol=0, atol=1e-6 if name == "additive" else 1e-10)


@few
@given(st.floats(0.05, 30), st.sampled_from(sorted(LAWS)))
def test_a_held_ratio_is_held(ratio: float, name: str) -> None:
    law, found = LAWS[name], fit(LAWS[name], paper())
    size = np.abs(found.law.slopes(found.theta)).max()
    held = np.array([[1.0, -ratio, 0.0, 0.0]]) / size / np.hypot(1, ratio)
    rows = fit_rows(law, found.cells, found.cells.targets[None], found.cells.weights[None], held=held)
    slope_n, slope_v = law.slopes(rows.theta[0])
    # An angle, so that the tolerance means the same for every ratio.
    assert np.arctan2(slope_n, slope_v) == pytest.approx(np.arctan(ratio), abs=1e-6)
    assert rows.cost[0] >= found.sse * (1 - 1e-9)


def test_a_held_ratio_at_its_best_value_costs_nothing() -> None:
    for name, law in LAWS.items():
        found = fit(law, paper())
        held = np.array([[1.0, -found.ratio, 0.0, 0.0]]) / 0.04
        rows = fit_rows(
            law,
            found.cells,
            found.cells.targets[None],
            found.cells.weights[None],
            start=found.theta[None],
            held=held,
        )
        assert rows.cost[0] == pytest.approx(found.sse, rel=1e-7), name


# --- what a fit is worth ------------------------------------------------------------------------------------


def verdict(found: Fit, count: int = 300) -> Verdict:
    return judge(found, resample(found, count), ratio_interval(found))


def test_pure_noise_is_not_identified() -> None:
    noise = np.random.default_rng(4).normal(0.5, 0.02, 28)
    for law in LAWS.values():
        judged = verdict(fit(law, replace(paper(), error=noise)), 100)
        assert judged.kind != "identified", law.name
        assert judged.ratio is None
        assert judged.interval is None
        assert "ratio_unidentified" in judged.flags


def test_every_ratio_given_has_a_finite_positive_interval() -> None:
    seen = set()
    for trial in range(25):
        rng = np.random.default_rng(trial)
        error = 0.6 - 0.04 * np.log(paper().n / 1e9) - 0.012 * np.log(paper().v) + rng.normal(0, 0.06, 28)
        for name in ("log_linear", "logit_linear"):
            judged = verdict(fit(LAWS[name], replace(paper(), error=np.clip(error, 0.01, 0.99))), 200)
            seen.add(judged.identified)
            if judged.identified:
                assert judged.interval is not None
                assert judged.ratio is not None
                assert 0 < judged.interval[0] < judged.ratio < judged.interval[1] < np.inf
    assert seen == {True, False}


def test_error_that_rises_with_tokens_is_named() -> None:
    rising = 0.5 - 0.03 * np.log(paper().n / 1e9) + 0.02 * np.log(paper().v)
    judged = verdict(fit(LAWS["log_linear"], replace(paper(), error=rising + 1e-4 * np.cos(np.arange(28)))))
    assert "error rises with visual tokens" in judged.reason
    assert "wrong_sign" in judged.flags


@pytest.mark.parametrize("name", sorted(name for name, law in LAWS.items() if law.bounded))
def test_a_step_from_one_to_zero_is_not_identified(name: str) -> None:
    found = fit(LAWS[name], replace(paper(), error=(paper().v < 30).astype(float)))
    assert not found.converged
    judged = judge(found, resample(found, 20), ratio_interval(found))
    assert judged.ratio is None
    assert "not_converged" in judged.flags


def test_constant_error_is_refused() -> None:
    flat = replace(paper(), error=np.full(28, 0.5))
    assert why_no_fit(flat) == "every cell has the same error"
    with pytest.raises(ValueError, match="every cell has the same error"):
        fit(LAWS["log_linear"], flat)


def test_too_small_tables_say_why() -> None:
    one_size = pick(paper(), np.arange(7))
    assert why_no_fit(one_size) == "1 LLM size and 7 token counts; a law needs two of each"
    with pytest.raises(ValueError, match="1 LLM size"):
        fit(LAWS["log_linear"], one_size)
    assert "change together" in (why_no_fit(replace(paper(), n=paper().v * 1e6)) or "")
    corners = pick(paper(), np.array([0, 6, 21, 27]))
    assert why_no_fit(corners) is None
    assert "4 cells measured; the regular law, of 4 parameters, needs 7" in (
        why_no_fit(corners, LAWS["regular"]) or ""
    )
    assert "not a loss" in (why_no_fit(replace(paper(), target="loss"), LAWS["logit_linear"]) or "")
    assert why_no_fit(replace(paper(), target="loss"), LAWS["regular"]) is None
    narrow = pick(paper(), np.flatnonzero(np.isin(paper().v, [1, 16])))
    assert "quadratic" in (why_no_fit(narrow, LAWS["quadratic"]) or "")


def test_unusable_requests_are_refused() -> None:
    found = fit(LAWS["log_linear"], paper())
    with pytest.raises(ValueError, match="bootstrap must be at least 1"):
        resample(found, 0)
    with pytest.raises(ValueError, match="unknown bootstrap scheme 'jackknife'"):
        resample(found, 10, scheme="jackknife")
    with pytest.raises(ValueError, match=f"unknown loss 'l1'; known: {', '.join(LOSSES)}"):
        fit(LAWS["log_linear"], paper(), loss="l1")
    perfect = replace(paper(), error=np.maximum(paper().error - paper().error.min(), 0))
    for loss in ("log", "huber"):
        with pytest.raises(ValueError, match="has no error at all"):
            fit(LAWS["power"], perfect, loss=loss)
    with pytest.raises(ValueError, match="needs n_items"):
        fit(LAWS["logit_linear"], replace(paper(), sampling_sd=np.full(28, np.nan)), loss="binomial")


def test_the_logit_interaction_contains_the_logit_law() -> None:
    small, large = fit(LAWS["logit_linear"], paper()), fit(LOGIT_INTERACTION, paper())
    assert large.sse < small.sse
    p, n, v = large.params, np.log(paper().n / 1e9), np.log(paper().v)
    by_hand = scipy.special.expit(-(p["p0"] + p["p1"] * n + p["p2"] * v + p["p12"] * n * v))
    np.testing.assert_allclose(by_hand, large.predict(paper().n, paper().v), atol=1e-12)


def test_index_tokens_is_the_best_of_a_fine_grid_for_any_signs() -> None:
    rng = np.random.default_rng(0)
    counts = np.geomspace(1, 64, 20_001)
    for _ in range(50):
        a, b = rng.normal(size=2)
        for q in (0.0, 7.0, 300.0):
            gain = b * np.log(counts) - a * np.log(q + counts)
            found = float(index_tokens(np.array(a), np.array(b), q, 1, 64))
            assert b * np.log(found) - a * np.log(q + found) >= gain.max() - 1e-9
