"""Which cell to run next: what each candidate would take off the uncertainties that matter, per unit of cost.

Linearised at the fit: the covariance sd^2 (J'J)^-1 grows by one row of J for one more cell with the same
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.fit import Fit, jacobian, scaled_jacobian

_MENU = 24  # levels of an axis that a person can still choose from
TRAIN_TEXT_TOKENS = 200.0  # text tokens of a training conversation (LLaVA's mix has about that many)


@dataclass(frozen=True)
class Candidate:
    """One more cell (n, v): what is left of each sd after it (1 = no gain), its gain in ln det of the
    information, its training cost over that of the dearest measured cell, and whether that cell is measured
    already.
    """

    n: float
    v: float
    ratio_left: float
    bend_left: float | None
    target_left: float
    information: float
    cost: float
    repeat: bool

    @property
    def gain_per_cost(self) -> float:
        """Fall of ln sd(ln ratio) per unit of cost."""
        return -math.log(max(self.ratio_left, 1e-12)) / self.cost


@dataclass(frozen=True)
class Design:
    """law: under which all is computed. sd now: of ln ratio, of lam (regular law only) and of the prediction
    at `target` (n, v); and candidates.
    """

    law: str
    ratio_sd: float
    bend_sd: float | None
    target: tuple[float, float]
    target_sd: float
    candidates: tuple[Candidate, ...]


def design(
    fit: Fit,
    *,
    sizes: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    target: tuple[float, float] | None = None,
    train_text_tokens: float = TRAIN_TEXT_TOKENS,
) -> Design | None:
    """Candidates on a menu of LLM sizes x token counts; by default the measured ones and steps beyond.

    target: (n, v) whose prediction matters; by default twice the largest LLM at the middle token count.
    Training cost of a cell is n (train_text_tokens + v). None where the fit's Jacobian is singular.
    """
    table = fit.table
    sizes = _beyond(table.sizes, 2.0) if sizes is None else sizes
    counts = _beyond(table.token_counts, 4.0, least=1.0) if counts is None else counts
    target = target or (2 * float(table.n.max()), float(np.median(table.token_counts)))
    jac = scaled_jacobian(fit)
    information = jac.T @ jac
    if not np.isfinite(information).all() or np.linalg.cond(_unit(information)) > 1e13:
        return None
    # In units of each parameter's size, so that one matrix holds parameters of any scale.
    scale = 1 / np.sqrt(np.diag(information))
    base = np.linalg.inv(information * np.outer(scale, scale))
    ratio = _gradient(fit, lambda theta: math.log(abs(float(fit.law.ratio(theta))))) * scale
    bend = _gradient(fit, lambda theta: float(fit.law.natural(theta, fit.cells.frame)["lam"])) * scale
    bends = fit.law.name == "regular"
    aim = jacobian(fit.law, fit.theta, *_place(fit, np.array([target[0]]), np.array([target[1]])))[0] * scale
    n, v = (grid.ravel() for grid in np.meshgrid(sizes, counts, indexing="ij"))
    rows = jacobian(fit.law, fit.theta, *_place(fit, n, v)) * scale
    spread = rows @ base
    gain = 1 + (spread * rows).sum(axis=1)

    def left(gradient: np.ndarray) -> np.ndarray:
        """Share of an sd that is left after each candidate: one more row takes (row B g)^2 / gain off g' B
        g.
        """
        before = max(float(gradient @ base @ gradient), 1e-300)
        return np.sqrt(np.maximum(1 - (spread @ gradient) ** 2 / gain / before, 0.0))

    lefts = left(ratio), left(bend), left(aim)
    cost = n * (train_text_tokens + v) / float((table.n * (train_text_tokens + table.v)).max())
    measured = set(zip(table.n.tolist(), table.v.tolist(), strict=True))
    candidates = [
        Candidate(
            float(n[i]),
            float(v[i]),
            float(lefts[0][i]),
            float(lefts[1][i]) if bends else None,
            float(lefts[2][i]),
            float(np.log(gain[i])),
            float(cost[i]),
            (float(n[i]), float(v[i])) in measured,
        )
        for i in range(n.size)
    ]
    sd = [fit.sd * math.sqrt(max(g @ base @ g, 0.0)) for g in (ratio, bend, aim)]
    return Design(fit.law.name, sd[0], sd[1] if bends else None, target, sd[2], tuple(candidates))


def _unit(matrix: np.ndarray) -> np.ndarray:
    root = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    return np.asarray(matrix / np.outer(root, root))


def _place(fit: Fit, n: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return fit.cells.frame.coordinates(n, v + fit.cells.shift)


def _gradient(fit: Fit, quantity: Callable[[np.ndarray], float]) -> np.ndarray:
    """d quantity / d theta [k] by central differences; zeros where the law has no such quantity."""
    result = np.zeros(fit.law.size)
    for i in range(fit.law.size):
        step = np.zeros(fit.law.size)
        step[i] = 1e-6 * max(abs(fit.theta[i]), 1e-3)
        try:
            result[i] = (quantity(fit.theta + step) - quantity(fit.theta - step)) / (2 * step[i])
        except KeyError:
            return np.zeros(fit.law.size)
    return result


def _beyond(values: np.ndarray, factor: float, least: float = 0.0) -> np.ndarray:
    """The values (a few where they are very many), one step below the first (where allowed) and two above the
    last.
    """
    if values.size > _MENU:
        values = values[np.linspace(0, values.size - 1, _MENU).round().astype(int)]
    more = [values[0] / factor, values[-1] * factor, values[-1] * factor**2]
    return np.unique(np.concatenate([values, [x for x in more if x >= least]]))
