"""What an answer costs: FLOPs by arithmetic, or latency, as measured in the sweep or by a model of latencies.

Laws read V; costs read Q + V.

A cost is a function of (n, v) and knows which n a budget buys at a given v. Source: section 3 of arXiv
2411.03312 for N(Q + V); the other terms are the standard counts (2 FLOPs a parameter and token, attention 2 L
d T^2 for the causal half).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from analysis.data import DataError, Table
from analysis.latency import ASPECT, FittedLatency
from analysis.units import significant


@dataclass(frozen=True)
class FlopsCost:
    """FLOPs of one answer of an LLM with n parameters on v visual tokens.

    text_tokens: Q of the prompt. gen_tokens: decoded tokens G. system_tokens: further prompt tokens.
    query_pass: the compressor first runs the LLM over the query alone (QueCC), which costs Q once more.
    batch, intensity: decoding reads all weights for each step of `batch` answers, so on hardware that does
    `intensity` FLOPs in the time of moving one byte (bfloat16) a decoded token costs max(1, intensity /
    batch) prefill tokens; intensity 0 counts FLOPs alone. fixed_flops: vision tower and whatever else is
    spent whatever N and V. flops_per_token: what each visual token costs outside the LLM (a tower whose
    resolution grows with V, a compressor). attention: count the quadratic term, with depth and width of a
    usual decoder.
    """

    text_tokens: float
    gen_tokens: float = 0.0
    system_tokens: float = 0.0
    query_pass: bool = False
    batch: float = 1.0
    intensity: float = 0.0
    fixed_flops: float = 0.0
    flops_per_token: float = 0.0
    attention: bool = False
    unit: str = field(default="FLOP", init=False)

    @property
    def effective_tokens(self) -> float:
        """Qe: what the answer costs besides its visual tokens, in prefill tokens."""
        decoded = self.gen_tokens * max(1.0, self.intensity / self.batch)
        return self.text_tokens * (2 if self.query_pass else 1) + self.system_tokens + decoded

    @property
    def plain(self) -> bool:
        """Whether V* of a single-index law has a closed form and does not depend on the budget."""
        return self.flops_per_token == 0 and not self.attention

    def _quadratic(self, n: np.ndarray, v: np.ndarray) -> np.ndarray:
        length = self.text_tokens + self.system_tokens + self.gen_tokens + v
        width = (n * ASPECT / 12) ** (1 / 3)
        return np.asarray(2 * width**2 / ASPECT * length**2)

    def __call__(self, n: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """FLOPs at n (a parameter count) and v visual tokens; broadcasts."""
        n, v = np.asarray(n, dtype=np.float64), np.asarray(v, dtype=np.float64)
        total = 2 * n * (self.effective_tokens + v) + self.fixed_flops + self.flops_per_token * v
        return total + self._quadratic(n, v) if self.attention else total

    def size_for(self, budget: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """The n that spends `budget` at v; 0 where the budget does not even pay what is spent besides the
        LLM.
        """
        v = np.asarray(v, dtype=np.float64)
        left = np.maximum(np.asarray(budget) - self.fixed_flops - self.flops_per_token * v, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            n = np.where(left > 0, left / (2 * (self.effective_tokens + v)), 0.0)
        if not self.attention:
            return np.asarray(n)
        # 2 T n + c n^(2/3) = left: Newton from above converges monotonically, the left side being increasing.
        for _ in range(60):
            slope = 2 * (self.effective_tokens + v) + self._quadratic(n, v) * 2 / 3 / np.maximum(n, 1e-300)
            n = np.maximum(n - (self(n, v) - self.fixed_flops - self.flops_per_token * v - left) / slope, 0.0)
        return np.asarray(n)

    def describe(self) -> str:
        """The formula with its numbers, for a caption."""
        text = f"2N(Q + V), Q = {significant(self.text_tokens)}"
        if self.system_tokens:
            text += f", {self.system_tokens:g} system tokens"
        if self.query_pass:
            text += ", the query passed through the LLM once more"
        if self.gen_tokens:
            text += f", {self.gen_tokens:g} decoded tokens"
            if self.intensity:
                text += f" at batch {self.batch:g} and {self.intensity:g} FLOP/byte"
        if self.fixed_flops:
            text += f", plus {self.fixed_flops:.3g} FLOP for the tower"
        if self.flops_per_token:
            text += f", plus {self.flops_per_token:.3g} FLOP a visual token"
        return text + (", attention's quadratic term included" if self.attention else "")


@dataclass(frozen=True)
class LatencyCost:
    """Milliseconds as measured: t0 + tn N + tv V + tnv N V, all >= 0, fitted to the cells' relative errors.

    coefficients: [4], N in billions. worst: largest relative error of the surface over the measured cells.
    """

    coefficients: tuple[float, float, float, float]
    worst: float
    unit: str = field(default="ms", init=False)
    plain: bool = field(default=False, init=False)

    def __call__(self, n: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """Milliseconds at n (a parameter count) and v visual tokens; broadcasts."""
        t0, tn, tv, tnv = self.coefficients
        billions, v = np.asarray(n, dtype=np.float64) / 1e9, np.asarray(v, dtype=np.float64)
        return t0 + tn * billions + tv * v + tnv * billions * v

    def size_for(self, budget: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """The n that takes `budget` milliseconds at v; 0 where no LLM is that fast."""
        t0, tn, tv, tnv = self.coefficients
        v = np.asarray(v, dtype=np.float64)
        left = np.maximum(np.asarray(budget) - t0 - tv * v, 0.0)
        return np.asarray(1e9 * left / (tn + tnv * v))

    def describe(self) -> str:
        """What it is, for a caption."""
        return f"measured latency in ms (its fitted surface is within {100 * self.worst:.0f}% of every cell)"


Cost = FlopsCost | LatencyCost | FittedLatency


def latency_cost(table: Table) -> LatencyCost:
    """The latency surface of a table's `latency_ms`.

    Raises DataError where fewer than four cells have a latency, or where it does not grow with N.
    """
    known = np.isfinite(table.latency_ms) & (table.latency_ms > 0)
    if known.sum() < 4:
        raise DataError(
            f"{table.source}: {table.group}: {int(known.sum())} cells have latency_ms; --cost latency needs "
            "at least four, so measure it or use --cost flops"
        )
    n, v, t = table.n[known] / 1e9, table.v[known], table.latency_ms[known]
    columns = np.stack([np.ones_like(n), n, v, n * v], axis=1)
    scale = (columns / t[:, None]).max(axis=0)
    found, _ = nnls(columns / t[:, None] / scale, np.ones_like(t))
    t0, tn, tv, tnv = (float(x) for x in found / scale)
    if tn + tnv == 0:
        raise DataError(
            f"{table.source}: {table.group}: latency_ms does not grow with LLM size; no budget to split"
        )
    worst = float(np.abs(columns @ np.array([t0, tn, tv, tnv]) / t - 1).max())
    return LatencyCost((t0, tn, tv, tnv), worst)
