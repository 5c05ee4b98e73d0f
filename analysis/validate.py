"""Out-of-sample checks: leave out a cell, an LLM, a token count; drop the largest LLM; compare with naive
guesses.

Every fold is a row of weights of the one solver. Errors are in units of score (0..1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.data import Table
from analysis.fit import MANY_CELLS, Fit, Rows, fit_rows, jacobian, scaled_jacobian

MAX_FOLDS, FEW_FOLDS = 200, 3


@dataclass(frozen=True)
class Validation:
    """Root mean square errors of predictions of left-out cells, None where a fold cannot be fitted.

    by_n, by_v: the same a level, {N: rms} and {V: rms}. largest: (mean, max) relative error |dY / Y| of the
    cells of the largest LLM, predicted from the others.
    """

    loo_rms: float | None
    lono_rms: float | None
    lovo_rms: float | None
    by_n: dict[float, float]
    by_v: dict[float, float]
    largest: tuple[float, float] | None


def validate(fit: Fit) -> Validation:
    """All folds of one fit in one batch. With thousands of cells, a cell is left out by its leverage instead,
    and neighbouring levels are left out together.
    """
    table = fit.table
    many = table.n.size > MANY_CELLS
    indices = [_folds(table.n, many), _folds(table.v, many)]
    if not many:
        indices.insert(0, np.arange(table.n.size))
    masks = [index == level for index in indices for level in np.unique(index)]
    weights = np.where(np.stack(masks), 0.0, fit.cells.weights)
    start = fit.theta[None] if many else None
    found = fit_rows(fit.law, fit.cells, fit.cells.targets[None], weights, start=start, warm=many)
    predicted = fit.law.predict(found.theta, fit.cells.u, fit.cells.w)
    told = _told(fit, found, weights)
    misses, first = [], 0
    for index in indices:
        folds = slice(first, first + int(index.max()) + 1)
        first = folds.stop
        # Each cell is predicted by the fold that leaves it out.
        miss = table.error - predicted[folds][index, np.arange(index.size)]
        misses.append(np.where(told[folds][index], miss, np.nan))
    by_size, by_count = misses[-2:]
    by_cell = fit.residuals() / (1 - leverages(fit)) if many else misses[0]
    last = (table.n == table.n.max()) & (table.error > 0)
    relative = np.abs(by_size[last]) / table.error[last]
    known = relative.size > 0 and bool(np.isfinite(relative).all())
    return Validation(
        _rms(by_cell),
        _rms(by_size),
        _rms(by_count),
        _by_level(table.n, by_size, indices[-2]),
        _by_level(table.v, by_count, indices[-1]),
        (float(relative.mean()), float(relative.max())) if known else None,
    )


def _folds(values: np.ndarray, many: bool) -> np.ndarray:
    """The fold of each cell: its level, or its block of neighbouring levels where there are too many."""
    levels, index = np.unique(values, return_inverse=True)
    most = FEW_FOLDS if many else MAX_FOLDS
    return index if levels.size <= most else index * most // levels.size


def _told(fit: Fit, found: Rows, weights: np.ndarray) -> np.ndarray:
    """[folds]: whether a fold's own cells determine the law: converged, and a Jacobian of full rank (but for
    the direction that an active bound fixes).
    """
    jac = jacobian(fit.law, found.theta, fit.cells.u, fit.cells.w) * (weights > 0)[..., None]
    jac = np.where(np.isfinite(jac), jac, 0.0)
    length = np.linalg.norm(jac, axis=1, keepdims=True)
    rank = np.linalg.matrix_rank(jac / np.where(length > 0, length, 1.0), tol=1e-7)
    return np.asarray(found.converged & (rank >= fit.law.size - found.bound))


def _rms(miss: np.ndarray) -> float | None:
    return float(np.sqrt(np.mean(miss**2))) if np.isfinite(miss).all() else None


def _by_level(values: np.ndarray, miss: np.ndarray, index: np.ndarray) -> dict[float, float]:
    result = {}
    for level in np.unique(index):
        rms = _rms(miss[index == level])
        if rms is not None:
            result[float(values[index == level].max())] = rms
    return result


def baselines(table: Table) -> dict[str, tuple[float, float]]:
    """(mean, max) relative error of two guesses for the largest LLM's cells: 'persistence' (the second
    largest LLM's error at the same V) and 'line' (a straight line in ln N at the same V). Only cells that can
    be guessed.
    """
    sizes = table.sizes
    guesses: dict[str, list[float]] = {"persistence": [], "line": []}
    for i in np.flatnonzero((table.n == sizes[-1]) & (table.error > 0)):
        others = (table.v == table.v[i]) & (table.n < sizes[-1])
        if not others.any():
            continue
        last = np.flatnonzero(others)[table.n[others].argmax()]
        guesses["persistence"].append(abs(table.error[last] / table.error[i] - 1))
        if np.unique(table.n[others]).size >= 2:
            slope, level = np.polyfit(np.log(table.n[others]), table.error[others], 1)
            guesses["line"].append(abs((slope * math.log(table.n[i]) + level) / table.error[i] - 1))
    return {name: (float(np.mean(x)), float(np.max(x))) for name, x in guesses.items() if x}


def leverages(fit: Fit) -> np.ndarray:
    """[cells] diagonal of the hat matrix of the linearised fit: how much each cell draws its own
    prediction.
    """
    q, _ = np.linalg.qr(scaled_jacobian(fit))
    return np.asarray((q**2).sum(axis=1))


def akaike_weights(fits: list[Fit]) -> np.ndarray:
    """[fits] weights exp(-dAICc / 2), normalised; a fit without an AICc or that did not converge weighs
    nothing. Where laws fit to rounding, the simplest of them share all the weight.
    """
    exact = [f.law.size for f in fits if f.exact and f.converged]
    if exact:
        simplest = np.array([float(f.exact and f.converged and f.law.size == min(exact)) for f in fits])
        return simplest / simplest.sum()
    values = np.array([f.aicc if f.aicc is not None and f.converged else np.inf for f in fits])
    if not np.isfinite(values).any():
        return np.zeros(len(fits))
    weights = np.exp(-(values - values.min()) / 2)
    return np.asarray(weights / weights.sum())
