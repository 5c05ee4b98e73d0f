"""The published grid search: the optimum of its box, and how far chance moves what it returns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from analysis import published
from analysis.data import load
from analysis.published import BOX, CELLS, Cell, GridResult, exhaustive


def run(name: str) -> GridResult:
    table = load(name).tables[0]
    return exhaustive(table.n, table.v, table.error)


@pytest.fixture(scope="module")
def reasoning() -> GridResult:
    return run("paper-reasoning")


@pytest.fixture(scope="module")
def ocr() -> GridResult:
    return run("paper-ocr")


def direct(box: dict[str, np.ndarray], n: np.ndarray, v: np.ndarray, error: np.ndarray) -> list[Cell]:
    """Every cell of the box by plain loops, best first."""
    found = []
    for a, alpha, beta, floor in itertools.product(
        *(box[name].tolist() for name in ("a", "alpha", "beta", "D"))
    ):
        loss = 0.0
        for size, tokens, measured in zip(n.tolist(), v.tolist(), error.tolist(), strict=True):
            loss += (a / (size / 1e9) ** alpha / tokens**beta + floor - measured) ** 2
        found.append(Cell(a, alpha, beta, floor, loss))
    return sorted(found, key=lambda cell: cell.sse)


def test_the_box_is_the_published_one() -> None:
    assert np.prod([axis.size for axis in BOX.values()]) == CELLS
    assert {name: (axis[0], axis[-1]) for name, axis in BOX.items()} == {
        "a": (0.2, 0.7),
        "alpha": (0.0, 0.2),
        "beta": (0.0, 0.05),
        "D": (0.0, 0.3),
    }


def test_reasoning_optimum(reasoning: GridResult) -> None:
    assert reasoning.best[:4] == pytest.approx((0.5571, 0.07475, 0.01616, 0.0333), abs=5e-5)
    assert reasoning.best.sse == pytest.approx(3.963130e-4, rel=1e-6)
    assert reasoning.edges == ()


def test_ocr_optimum_is_held_by_the_box(ocr: GridResult) -> None:
    assert ocr.best[:4] == pytest.approx((0.6796, 0.04242, 0.05, 0.2333), abs=5e-5)
    assert ocr.best.sse == pytest.approx(7.373255e-3, rel=1e-6)
    assert ocr.edges == ("beta",)


def test_reasoning_ranges_of_a_random_fifth(reasoning: GridResult) -> None:
    assert reasoning.ranges["alpha"] == pytest.approx((0.0687, 0.0828), abs=5e-5)
    assert reasoning.ranges["beta"] == pytest.approx((0.0136, 0.0187), abs=5e-5)
    assert reasoning.ranges["D"] == pytest.approx((0.0, 0.0667), abs=5e-5)
    assert reasoning.ranges["ratio"] == pytest.approx((4.44, 5.19), abs=6e-3)


def test_ocr_range_of_beta_ends_at_the_box(ocr: GridResult) -> None:
    assert ocr.ranges["beta"] == pytest.approx((0.0475, 0.05), abs=5e-5)


def test_the_printed_exponents_are_a_lucky_draw(reasoning: GridResult) -> None:
    assert reasoning.printed_rank == 8
    assert reasoning.printed[1:4] == pytest.approx((0.07677, 0.01515, 0.0333), abs=5e-5)
    assert reasoning.printed.sse == pytest.approx(4.45e-4, abs=5e-7)


def test_ranges_are_those_of_drawing(reasoning: GridResult) -> None:
    """Drawing each rank with chance 0.2 and taking the first, many times, gives what the formula gives."""
    rng = np.random.default_rng(0)
    firsts = np.array([np.argmax(rng.random(200) < published.DRAWN) for _ in range(20_000)])
    chance = published.DRAWN * (1 - published.DRAWN) ** np.arange(40)
    counts = np.bincount(firsts, minlength=40)[:40] / firsts.size
    np.testing.assert_allclose(counts, chance, atol=0.01)
    low, high = published._quantiles(np.arange(256.0), published.DRAWN * 0.8 ** np.arange(256))
    assert (low, high) == tuple(np.quantile(firsts, [0.025, 0.975], method="inverted_cdf"))


@pytest.mark.parametrize("name", ["paper-reasoning", "paper-ocr"])
def test_agrees_with_plain_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small box, every rank counts: the same optimum, edges and rank of the printed cell."""
    small = {
        "a": np.linspace(0.5, 0.7, 5),
        "alpha": np.linspace(0.03, 0.09, 7),
        "beta": np.linspace(0.01, 0.05, 8),
        "D": np.linspace(0.0, 0.3, 4),
    }
    monkeypatch.setattr(published, "BOX", small)
    table = load(name).tables[0]
    got, want = exhaustive(table.n, table.v, table.error), direct(small, table.n, table.v, table.error)
    assert got.best[:4] == want[0][:4]
    assert got.best.sse == pytest.approx(want[0].sse, rel=1e-12)
    alpha = min(small["alpha"], key=lambda x: abs(x - published.PRINTED[0]))
    beta = min(small["beta"], key=lambda x: abs(x - published.PRINTED[1]))
    rank = next(k for k, cell in enumerate(want, 1) if (cell.alpha, cell.beta) == (alpha, beta))
    assert got.printed_rank == rank
    assert got.printed[:4] == want[rank - 1][:4]
    assert got.printed.sse == pytest.approx(want[rank - 1].sse, rel=1e-9)


def test_an_exact_cell_is_found() -> None:
    """Noise-free data of one cell give that cell, with a loss of rounding alone."""
    n, v = (axis.ravel() for axis in np.meshgrid([4e6, 1e8, 7e9], [1.0, 16.0, 576.0]))
    truth = tuple(float(BOX[name][k]) for name, k in (("a", 20), ("alpha", 60), ("beta", 99), ("D", 0)))
    error = truth[0] / (n / 1e9) ** truth[1] / v ** truth[2] + truth[3]
    result = exhaustive(n, v, error)
    assert result.best[:4] == truth
    assert result.best.sse < 1e-28
    assert result.edges == ("beta", "D")
