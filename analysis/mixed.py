"""The mixed-effects interval: LLMs and token counts as samples of what they stand for, with t distributions.

Few LLMs differ in more than N. With the LLM as a random effect the slope along ln N is judged from the
scatter of the LLMs' means about their line, with (LLMs - 2) degrees of freedom; the slope along ln V likewise
from the token counts: in simulation with four LLMs such an interval covers 95% where least squares covers 50
to 65%. The ratio and V* take the larger of that scatter and of the cells' own noise, so that a lucky small
scatter of few levels does not shrink them: they are a little too wide (98%) rather than too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc, stdtrit

from analysis.data import Table
from analysis.laws import Law
from analysis.optimum import index_tokens

_DRAWS = 200_000


@dataclass(frozen=True)
class Mixed:
    """slope_n, slope_v: (estimate, 95% t interval) of the law's index, on its own scale. draws: [_DRAWS, 2]
    of the two slopes; row_f, column_f: (F, p) of the lack of fit of LLMs and of token counts about their
    lines.
    """

    slope_n: tuple[float, float, float]
    slope_v: tuple[float, float, float]
    ratio: tuple[float | None, float | None]
    size_beats_tokens: float
    row_f: tuple[float, float]
    column_f: tuple[float, float]
    draws: np.ndarray

    def best_tokens(self, q: float, v_min: float, v_max: float) -> tuple[float, float]:
        """95% interval of V*(q) = q / (ratio - 1) within [v_min, v_max] at cost N (q + V)."""
        low, high = np.quantile(
            index_tokens(self.draws[:, 0], self.draws[:, 1], q, v_min, v_max), [0.025, 0.975]
        )
        return float(low), float(high)


def mixed_interval(law: Law, table: Table, seed: int = 0) -> Mixed | None:
    """The interval for a law that is a line on some scale (log_linear, power, logit, probit, log_accuracy).

    None for any other law, for fewer than three LLM sizes or token counts, or where a cell is missing on the
    law's scale (an error of 0 or 1). A cell per LLM and token count is expected; a grid with holes is
    described by row and column effects fitted by least squares.
    """
    if law.size != 3 or table.sizes.size < 3 or table.token_counts.size < 3:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        y = law.link(table.error) if law.link else table.error
    if not np.isfinite(y).all():
        return None
    rows, i = np.unique(np.log(table.n / 1e9), return_inverse=True)
    columns, j = np.unique(np.log(table.v), return_inverse=True)
    freedom = y.size - rows.size - columns.size + 1
    if freedom < 1:
        return None
    # Normal equations of one effect a row and one a column: small however many cells there are.
    crossed = np.zeros((rows.size, columns.size))
    np.add.at(crossed, (i, j), 1.0)
    normal = np.block([[np.diag(crossed.sum(axis=1)), crossed], [crossed.T, np.diag(crossed.sum(axis=0))]])
    sums = np.concatenate([np.bincount(i, y), np.bincount(j, y)])
    effects, _, rank, _ = np.linalg.lstsq(normal, sums, rcond=1e-10)
    if rank < rows.size + columns.size - 1:
        return None
    by_level = effects[: rows.size], effects[rows.size :]
    noise = float(((y - by_level[0][i] - by_level[1][j]) ** 2).sum()) / freedom
    by_row = _line(rows, by_level[0], np.bincount(i), noise, freedom)
    by_column = _line(columns, by_level[1], np.bincount(j), noise, freedom)
    rng = np.random.default_rng(seed)
    draws = np.column_stack(
        [part.mean + part.careful * rng.standard_t(part.freedom, _DRAWS) for part in (by_row, by_column)]
    )
    # By angle, so that a slope of tokens below zero counts as a ratio beyond infinity.
    low, high = np.quantile(
        np.arctan2(draws[:, 0] / by_row.careful, draws[:, 1] / by_column.careful), [0.025, 0.975]
    )
    scale = by_row.careful / by_column.careful
    return Mixed(
        by_row.interval(),
        by_column.interval(),
        (
            math.tan(low) * scale if 0 < low < math.pi / 2 else None,
            math.tan(high) * scale if 0 < high < math.pi / 2 else None,
        ),
        float(np.mean(draws[:, 0] > draws[:, 1])),
        by_row.lack,
        by_column.lack,
        draws,
    )


@dataclass(frozen=True)
class _Line:
    """error: from the scatter of the levels alone. careful: from the larger of that and the noise of the
    cells.
    """

    mean: float
    error: float
    careful: float
    freedom: int
    lack: tuple[float, float]

    def interval(self) -> tuple[float, float, float]:
        reach = float(stdtrit(self.freedom, 0.975)) * self.error
        return self.mean, self.mean - reach, self.mean + reach


def _line(x: np.ndarray, effects: np.ndarray, cells: np.ndarray, noise: float, noise_freedom: int) -> _Line:
    """The falling line through level effects [levels], each the mean of `cells` cells."""
    weight = cells / cells.sum()
    centred = x - weight @ x
    level = effects - weight @ effects
    square = float(cells @ centred**2)
    slope = -float(cells @ (centred * level)) / square
    left = level + slope * centred
    freedom = x.size - 2
    scatter = float(cells @ left**2) / freedom
    noise = max(noise, 1e-300)
    return _Line(
        slope,
        math.sqrt(max(scatter, 1e-300) / square),
        math.sqrt(max(scatter, noise) / square),
        freedom,
        (scatter / noise, float(fdtrc(freedom, noise_freedom, scatter / noise))),
    )
