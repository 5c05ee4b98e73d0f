"""The grid search of the paper's released code, evaluated whole: a cross-check, not a way to fit.

Source: arXiv 2411.03312, `scaling_law_code/objective.py` of github.com/locuslab/llava-token-compression,
re-implemented. It minimises the plain sum of squared errors of a N^-alpha V^-beta + D, with N in
billions and V the visual tokens alone, over a box of 5,000,000 cells; it shuffles them without a seed
and stops after a fifth, so what it returns is chance. Here every cell is evaluated, which gives the
optimum of the box and, from the ranks of the cells, the distribution of what the search returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Both ends of each axis are cells: numpy.linspace, as in the source.
BOX = {
    "a": np.linspace(0.2, 0.7, 50),
    "alpha": np.linspace(0.0, 0.2, 100),
    "beta": np.linspace(0.0, 0.05, 100),
    "D": np.linspace(0.0, 0.3, 10),
}
CELLS = 5_000_000
DRAWN = 0.2  # share of the cells that the search looks at
PRINTED = (0.077, 0.015)  # alpha, beta in Figure 1 of the paper and typed into objective.py (reasoning)
_KEPT = 256  # the chance that the best drawn cell ranks lower is 0.8^256 = 2e-25


class Cell(NamedTuple):
    """One cell of the box and its sum of squared errors."""

    a: float
    alpha: float
    beta: float
    D: float
    sse: float


@dataclass(frozen=True)
class GridResult:
    """What the published search would find on one table.

    best: the optimum of the box. edges: those of a, alpha, beta and D that `best` has at an end of their
    axis, where the box and not the data may have chosen the value. ranges: for alpha, beta, D and
    ratio (alpha / beta) the 2.5% and 97.5% quantiles of what a random fifth of the cells returns.
    printed: the best cell among those with the alpha and beta nearest to `PRINTED`. printed_rank: its
    rank among all cells, 1 for the optimum. The printed exponents are those of reasoning: on another
    table these two say nothing.
    """

    best: Cell
    edges: tuple[str, ...]
    ranges: dict[str, tuple[float, float]]
    printed: Cell
    printed_rank: int


def exhaustive(n: np.ndarray, v: np.ndarray, error: np.ndarray) -> GridResult:
    """Evaluate the whole box on n (parameter counts), v (visual tokens, >= 1) and error, each [cells]."""
    alpha, beta = _pairs("alpha", "beta")
    a, floor = _pairs("a", "D")
    curve = np.exp(-np.outer(alpha, np.log(n / 1e9)) - np.outer(beta, np.log(v)))  # [exponents, cells]
    # The sum of (a curve + D - error)^2, multiplied out, is a matrix product of sums that only the exponents
    # change and of factors that only (a, D) change.
    sums = np.stack([np.ones(alpha.size), curve @ error, curve.sum(1), np.square(curve).sum(1)], axis=1)
    constant = error @ error - 2 * floor * error.sum() + error.size * floor**2
    sse = sums @ np.stack([constant, -2 * a, 2 * a * floor, a**2])  # [exponents, levels]

    exponent, level = np.divmod(np.argpartition(sse, _KEPT, axis=None)[:_KEPT], a.size)
    # Multiplied out, a loss keeps an error of about 1e-14; the few that count are summed term by term.
    exact = np.square(a[level, None] * curve[exponent] + floor[level, None] - error).sum(1)
    order = np.argsort(exact, kind="stable")
    exponent, level = exponent[order], level[order]
    best = _cell(exponent[0], level[0], exact[order[0]])

    near = _nearest("alpha", PRINTED[0]) * BOX["beta"].size + _nearest("beta", PRINTED[1])
    near_level = int(np.argmin(sse[near]))
    return GridResult(
        best=best,
        edges=tuple(name for name, axis in BOX.items() if getattr(best, name) in (axis[0], axis[-1])),
        ranges=_ranges(alpha[exponent], beta[exponent], floor[level]),
        printed=_cell(near, near_level, sse[near, near_level]),
        printed_rank=1 + int(np.count_nonzero(sse < sse[near, near_level])),
    )


def _pairs(first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of values of two axes, the second running fastest, as two flat arrays."""
    one, two = np.meshgrid(BOX[first], BOX[second], indexing="ij")
    return one.ravel(), two.ravel()


def _nearest(name: str, value: float) -> int:
    return int(np.argmin(np.abs(BOX[name] - value)))


def _cell(exponent: int, level: int, sse: float) -> Cell:
    """The cell at two flat indices, as `_pairs` orders (alpha, beta) and (a, D)."""
    i, j = divmod(exponent, BOX["beta"].size)
    k, m = divmod(level, BOX["D"].size)
    values = BOX["a"][k], BOX["alpha"][i], BOX["beta"][j], BOX["D"][m], sse
    return Cell(*(float(value) for value in values))


def _ranges(alpha: np.ndarray, beta: np.ndarray, floor: np.ndarray) -> dict[str, tuple[float, float]]:
    """95% ranges of the best of a random fifth, from the cells in the order of their rank.

    The best drawn cell has rank k if it was drawn and the k - 1 better ones were not: p (1 - p)^(k - 1)
    with p = 0.2. Drawing is without replacement; among five million cells that changes the chances
    by 1e-5 of them.
    """
    chance = DRAWN * (1 - DRAWN) ** np.arange(alpha.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = alpha / beta  # the box holds beta = 0
    columns = {"alpha": alpha, "beta": beta, "D": floor, "ratio": ratio}
    return {name: _quantiles(values, chance) for name, values in columns.items()}


def _quantiles(values: np.ndarray, chance: np.ndarray) -> tuple[float, float]:
    order = np.argsort(values, kind="stable")
    low, high = np.searchsorted(np.cumsum(chance[order]), [0.025, 0.975])
    return float(values[order[low]]), float(values[order[high]])
