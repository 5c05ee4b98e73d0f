"""Resampling: residual, wild, pairs and cluster bootstraps, all rows of the one solver.

The residual bootstrap scales centred residuals by sqrt(n / (n - k)). The wild one flips their signs
(Rademacher). The cluster one is the wild bootstrap with one six-point weight (Webb 2023) a cluster. With few
clusters it under-covers badly (four clusters: 55% instead of 95%), so under `MIN_CLUSTERS` it is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.fit import MANY_CELLS, Fit, covariance, fit_rows, fitted

SCHEMES = ("residual", "wild", "pairs", "cluster_n", "cluster_v")
MIN_CLUSTERS = 6
FEW_CLUSTERS = 10
_STEPS = 60  # a resample starts at the fit; one that needs more is lost on a flat or unbounded valley
_BLOCK = 2048
_LOST = (
    0.1  # with more than this share of a first block not converging, the fit has run away: no use going on
)
_WEBB = np.array([-math.sqrt(1.5), -1.0, -math.sqrt(0.5), math.sqrt(0.5), 1.0, math.sqrt(1.5)])


@dataclass(frozen=True)
class Replicates:
    """theta [R, k] of the resamples that converged; `failed` counts the others; `warning` may be empty.

    scheme: as asked, or 'normal' where there are too many cells to resample and theta is drawn from its
    large-sample normal distribution.
    """

    theta: np.ndarray
    failed: int
    scheme: str
    warning: str = ""

    @property
    def usable(self) -> bool:
        """Whether at least 99% of the resamples converged."""
        return self.theta.shape[0] >= 0.99 * (self.theta.shape[0] + self.failed) and self.theta.shape[0] > 0


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """2.5% and 97.5% percentiles of values [resamples], infinities included."""
    low, high = np.quantile(values, [0.025, 0.975], method="closest_observation")
    return float(low), float(high)


def resample(fit: Fit, count: int, *, scheme: str = "residual", seed: int = 0) -> Replicates:
    """`count` refits of `fit` to resampled data; the same seed gives the same resamples for every law.

    Fewer where more than a tenth of the first 2048 do not converge: such a fit has run away, and is not
    usable.

    Raises ValueError for an unknown scheme, count < 1, or a cluster bootstrap with fewer than six clusters.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown bootstrap scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if count < 1:
        raise ValueError(f"bootstrap must be at least 1, got {count}")
    clusters, warning = _clusters(fit, scheme)
    rng = np.random.default_rng(seed)
    if fit.cells.u.size > MANY_CELLS:
        theta = rng.multivariate_normal(fit.theta, covariance(fit), size=count, method="eigh")
        floor = np.array(fit.law.floor or (-np.inf,) * fit.law.size)
        return Replicates(np.maximum(theta, floor), 0, "normal", warning)
    pieces, failed = [], 0
    for first in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - first)
        targets, weights = _draw(fit, scheme, clusters, rng, rows)
        found = fit_rows(
            fit.law, fit.cells, targets, weights, start=fit.theta[None], max_steps=_STEPS, warm=True
        )
        good = found.converged & _tells(fit, weights)
        pieces.append(found.theta[good])
        failed += int((~good).sum())
        if first == 0 and failed > _LOST * rows:
            break
    return Replicates(np.concatenate(pieces), failed, scheme, warning)


def _clusters(fit: Fit, scheme: str) -> tuple[np.ndarray, str]:
    """(cluster of each cell, warning); raises ValueError where there are too few."""
    if not scheme.startswith("cluster"):
        return np.zeros(0, dtype=int), ""
    values, what = (fit.table.n, "LLM sizes") if scheme == "cluster_n" else (fit.table.v, "token counts")
    levels, index = np.unique(values, return_inverse=True)
    if levels.size < MIN_CLUSTERS:
        raise ValueError(
            f"a cluster bootstrap needs at least {MIN_CLUSTERS} clusters; there are {levels.size} {what}, "
            "with which a 95% interval covers about 55%: use the mixed-effects interval"
        )
    few = f"{levels.size} {what} are few for a cluster bootstrap: its interval is too narrow"
    return index, few if levels.size < FEW_CLUSTERS else ""


def _draw(
    fit: Fit, scheme: str, clusters: np.ndarray, rng: np.random.Generator, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """(targets, weights) of `rows` resamples, [rows, cells] or [1, cells]."""
    cells, count = fit.cells, fit.cells.u.size
    if scheme == "pairs":
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=rows)
        return cells.targets[None], drawn * cells.weights
    root = np.sqrt(cells.weights)
    residual = fit.residuals() * root * math.sqrt(count / max(fit.freedom, 1))
    if scheme == "residual":
        noise = (residual - residual.mean())[rng.integers(0, count, size=(rows, count))]
    elif scheme == "wild":
        noise = residual * rng.choice([-1.0, 1.0], size=(rows, count))
    else:
        noise = residual * rng.choice(_WEBB, size=(rows, int(clusters.max()) + 1))[:, clusters]
    return fitted(fit) + noise / root, cells.weights[None]


def _tells(fit: Fit, weights: np.ndarray) -> np.ndarray:
    """[R]: whether a resample of pairs still has two LLM sizes and two token counts."""
    if weights.shape[0] == 1:
        return np.ones(1, dtype=bool)
    drawn = weights > 0
    result = np.ones(weights.shape[0], dtype=bool)
    for axis in (fit.cells.u, fit.cells.w):
        low = np.where(drawn, axis, np.inf).min(axis=1)
        high = np.where(drawn, axis, -np.inf).max(axis=1)
        result &= high > low
    return result
