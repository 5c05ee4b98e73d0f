"""The laws: error (or loss) as a function of parameters N and visual tokens V, one static table of pure
functions.

Every law takes V alone: the text tokens Q belong to the cost (`cost.py`), never to the law. A law is written
in *centred* coordinates, u = ln N - centre of ln N and w = ln V - centre of ln V, in which its parameters are
well conditioned. `natural` turns them into the parameters of the printed formula, with N in billions. The
ratio of a law is that of its two local slopes at the centre, -dY/d ln N over -dY/d ln V; for a single-index
law that is a/b (or alpha/beta) everywhere.

The functions take the array module as their first argument: numpy for reports, jax.numpy inside the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.scipy.special as jax_special
import numpy as np
import scipy.special

Outer = Callable[[Any, Any], Any]
Array = Any  # a numpy or a jax array, as the caller's array module makes them


class Frame(NamedTuple):
    """The centre of a table's cells: means of ln(N in billions) and of ln V."""

    ln_n: float
    ln_v: float

    def coordinates(self, n: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(u, w) of n (a parameter count) and v (>= 1), any shapes that broadcast."""
        return np.log(np.asarray(n) / 1e9) - self.ln_n, np.log(np.asarray(v)) - self.ln_v


def _second_and_third(theta: Array) -> tuple[Array, Array]:
    return theta[..., 1], theta[..., 2]


class Program(NamedTuple):
    """What the solver compiles, once for all laws that share it. mean None: the outer functions of a line."""

    size: int
    mean: Callable[[Any, Array, Array, Array], Array] | None
    slopes: Callable[[Array], tuple[Array, Array]]
    floor: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Law:
    """One law.

    coordinates: names of the centred parameters. mean(xp, theta [..., k], u, w): the prediction; theta's
    leading axes broadcast against u and w by way of a trailing axis of length one, see `predict`.
    slopes(theta): two numbers whose quotient is the ratio. link(y): the scale on which the law is the line
    theta[0] - theta[1] u - theta[2] w (for laws of more parameters: starts from it). natural(theta [..., k],
    frame): the parameters of `formula`, [...] each. single_index: prediction = g(a ln N + b ln V), so that V*
    does not depend on the budget. bounded: predictions lie in (0, 1), so no unbounded loss can be fitted.
    floor: lower bounds of the centred parameters, () for none. outer(xp, line): the law as a function of that
    line, where it is one. within: the law of which this one is the first coordinates, the others being 0. The
    last two say which laws share a compiled program.
    """

    name: str
    formula: str
    coordinates: tuple[str, ...]
    mean: Callable[[Any, Array, Array, Array], Array]
    natural: Callable[[np.ndarray, Frame], dict[str, np.ndarray]]
    slopes: Callable[[Array], tuple[Array, Array]] = _second_and_third
    link: Callable[[np.ndarray], np.ndarray] | None = None
    single_index: bool = False
    bounded: bool = False
    floor: tuple[float, ...] = ()
    outer: Outer | None = None
    within: str = ""

    @property
    def size(self) -> int:
        """Number of parameters of the mean."""
        return len(self.coordinates)

    @property
    def program(self) -> Program:
        """The program that fits this law, with the coordinates that it lacks held at 0."""
        if self.outer is not None:
            return Program(self.size, None, self.slopes, ())
        host = LAWS[self.within] if self.within else self
        return Program(host.size, host.mean, host.slopes, host.floor)

    def predict(self, theta: np.ndarray, u: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Prediction [..., cells] for theta [..., k] at u, w [cells] or [..., cells]."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self.mean(np, np.asarray(theta)[..., None, :], np.asarray(u), np.asarray(w)))

    def ratio(self, theta: np.ndarray) -> np.ndarray:
        """Slope along ln N over slope along ln V, [...] for theta [..., k]."""
        by_size, by_tokens = self.slopes(np.asarray(theta))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(by_size / by_tokens)


def _line(theta: Array, u: Array, w: Array) -> Array:
    return theta[..., 0] - theta[..., 1] * u - theta[..., 2] * w


def _shrink(xp: Any, z: Array) -> Array:
    """(1 - exp(-z)) / z, smooth through z = 0."""
    near = xp.abs(z) < 1e-2
    safe = xp.where(near, 1.0, z)
    series = 1 - z / 2 * (1 - z / 3 * (1 - z / 4 * (1 - z / 5 * (1 - z / 6))))
    return xp.where(near, series, -xp.expm1(-xp.clip(safe, -600.0, 600.0)) / safe)


def _exp(xp: Any, z: Array) -> Array:
    return xp.exp(xp.clip(z, -600.0, 600.0))


def _regular(xp: Any, theta: Array, u: Array, w: Array) -> Array:
    index = theta[..., 1] * u + theta[..., 2] * w
    return theta[..., 0] - index * _shrink(xp, theta[..., 3] * index)


def _expit(xp: Any, line: Array) -> Array:
    return 1.0 / (1.0 + _exp(xp, -line))


def _log_odds(y: np.ndarray) -> np.ndarray:
    return np.log(y / (1 - y))


def _log_log(xp: Any, line: Array) -> Array:
    return -xp.expm1(-_exp(xp, line))


def _ndtr(xp: Any, line: Array) -> Array:
    return scipy.special.ndtr(line) if xp is np else jax_special.ndtr(line)


MOST_EXPONENT = 6.0  # an additive exponent beyond is a step over any measured range


def _exponents(xp: Any, theta: Array) -> tuple[Array, Array]:
    """(alpha, beta) of an additive law: its coordinates are the local slopes, which the data tell far
    better.
    """
    both = theta[..., 5] if theta.shape[-1] > 5 else 0.0
    return (
        xp.clip(theta[..., 1] / xp.maximum(theta[..., 0] + both, 1e-9), 0.0, MOST_EXPONENT),
        xp.clip(theta[..., 3] / xp.maximum(theta[..., 2] + both, 1e-9), 0.0, MOST_EXPONENT),
    )


def _additive(xp: Any, theta: Array, u: Array, w: Array) -> Array:
    alpha, beta = _exponents(xp, theta)
    by_size, by_tokens = xp.exp(-alpha * u), xp.exp(-beta * w)
    single = theta[..., 0] * by_size + theta[..., 2] * by_tokens + theta[..., 4]
    return single + theta[..., 5] * by_size * by_tokens if theta.shape[-1] > 5 else single


def _second_and_fourth(theta: Array) -> tuple[Array, Array]:
    return theta[..., 1], theta[..., 3]


def _interaction(xp: Any, theta: Array, u: Array, w: Array) -> Array:
    return _line(theta, u, w) - theta[..., 3] * u * w


def _quadratic(xp: Any, theta: Array, u: Array, w: Array) -> Array:
    return _interaction(xp, theta, u, w) - theta[..., 4] * u * u - theta[..., 5] * w * w


Parameters = dict[str, np.ndarray]


def _natural_line(theta: np.ndarray, frame: Frame) -> Parameters:
    y, a, b = (theta[..., i] for i in range(3))
    return {"c": y + a * frame.ln_n + b * frame.ln_v, "a": a, "b": b}


def _natural_power(theta: np.ndarray, frame: Frame) -> Parameters:
    line = _natural_line(theta, frame)
    return {"K": np.exp(line["c"]), "alpha": line["a"], "beta": line["b"]}


def _natural_regular(theta: np.ndarray, frame: Frame) -> Parameters:
    y, a, b, bend = (theta[..., i] for i in range(4))
    alpha, beta = bend * a, bend * b
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        shift = alpha * frame.ln_n + beta * frame.ln_v
        grow = np.exp(shift)
        c = y + (a * frame.ln_n + b * frame.ln_v) * _shrink(np, -shift)
        return {
            "c": c,
            "a": a * grow,
            "b": b * grow,
            "lam": bend / grow,
            "alpha": alpha,
            "beta": beta,
            "K": grow / bend,
            "D": y - 1 / bend,
        }


def _natural_paper(theta: np.ndarray, frame: Frame) -> Parameters:
    full = _natural_regular(theta, frame)
    # The active set leaves D at 0 but for rounding; a bound is reported as the bound.
    floor = np.where(np.abs(full["D"]) <= 1e-14 * np.abs(theta[..., 0]), 0.0, full["D"])
    return {"K": full["K"], "alpha": full["alpha"], "beta": full["beta"], "D": floor}


def _natural_index(theta: np.ndarray, frame: Frame) -> Parameters:
    line = _natural_line(theta, frame)
    return {"p0": -line["c"], "p1": line["a"], "p2": line["b"]}


def _natural_additive(theta: np.ndarray, frame: Frame) -> Parameters:
    alpha, beta = _exponents(np, theta)
    by_size, by_tokens = np.exp(alpha * frame.ln_n), np.exp(beta * frame.ln_v)
    result = {
        "a": theta[..., 0] * by_size,
        "alpha": alpha,
        "b": theta[..., 2] * by_tokens,
        "beta": beta,
        "D": theta[..., 4],
    }
    return {**result, "ab": theta[..., 5] * by_size * by_tokens} if theta.shape[-1] > 5 else result


def _natural_interaction(theta: np.ndarray, frame: Frame) -> Parameters:
    line, ab = _natural_line(theta, frame), theta[..., 3]
    m, k = frame
    return {"c": line["c"] - ab * m * k, "a": line["a"] - ab * k, "b": line["b"] - ab * m, "ab": ab}


def _natural_quadratic(theta: np.ndarray, frame: Frame) -> Parameters:
    crossed, aa, bb = _natural_interaction(theta, frame), theta[..., 4], theta[..., 5]
    m, k = frame
    return {
        "c": crossed["c"] - aa * m * m - bb * k * k,
        "a": crossed["a"] - 2 * aa * m,
        "b": crossed["b"] - 2 * bb * k,
        "ab": crossed["ab"],
        "aa": aa,
        "bb": bb,
    }


def _natural_logit_interaction(theta: np.ndarray, frame: Frame) -> Parameters:
    line = _natural_interaction(theta, frame)
    return {"p0": -line["c"], "p1": line["a"], "p2": line["b"], "p12": line["ab"]}


def _of_line(outer: Outer) -> Callable[[Any, Array, Array, Array], Array]:
    return lambda xp, theta, u, w: outer(xp, _line(theta, u, w))


OUTERS: tuple[Outer, ...] = (_exp, _expit, _ndtr, _log_log)
_FREE = float("inf")

LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(
            "log_linear",
            "Y = c - a ln N - b ln V",
            ("y", "a", "b"),
            lambda xp, theta, u, w: _line(theta, u, w),
            _natural_line,
            single_index=True,
            within="quadratic",
        ),
        Law(
            "power",
            "Y = K N^-alpha V^-beta",
            ("level", "alpha", "beta"),
            _of_line(_exp),
            _natural_power,
            outer=_exp,
            link=lambda y: np.log(np.maximum(y, 1e-4)),
            single_index=True,
        ),
        Law(
            "regular",
            "Y = c - (1 - exp(-lam e)) / lam, e = a ln N + b ln V (the paper's form with D free of sign)",
            ("y", "a", "b", "bend"),
            _regular,
            _natural_regular,
            single_index=True,
        ),
        Law(
            "paper",
            "Y = K N^-alpha V^-beta + D, D >= 0",
            ("y", "a", "b", "bend"),
            _regular,
            _natural_paper,
            single_index=True,
            within="regular",
        ),
        Law(
            "logit_linear",
            "logit(Y) = -(p0 + p1 ln N + p2 ln V)",
            ("level", "p1", "p2"),
            _of_line(_expit),
            _natural_index,
            outer=_expit,
            link=_log_odds,
            single_index=True,
            bounded=True,
        ),
        Law(
            "probit_linear",
            "probit(Y) = -(p0 + p1 ln N + p2 ln V)",
            ("level", "p1", "p2"),
            _of_line(_ndtr),
            _natural_index,
            outer=_ndtr,
            link=scipy.special.ndtri,
            single_index=True,
            bounded=True,
        ),
        Law(
            "log_accuracy",
            "-ln(1 - Y) = K N^-alpha V^-beta",
            ("level", "alpha", "beta"),
            _of_line(_log_log),
            _natural_power,
            outer=_log_log,
            link=lambda y: np.log(-np.log1p(-y)),
            single_index=True,
            bounded=True,
        ),
        Law(
            "additive",
            "Y = a N^-alpha + b V^-beta + D, all >= 0, exponents at most 6",
            ("a", "slope_n", "b", "slope_v", "D"),
            _additive,
            _natural_additive,
            slopes=_second_and_fourth,
            floor=(0.0, 0.0, 0.0, 0.0, 0.0),
            within="additive_product",
        ),
        Law(
            "additive_product",
            "Y = a N^-alpha + b V^-beta + ab N^-alpha V^-beta + D, all but ab >= 0, exponents at most 6",
            ("a", "slope_n", "b", "slope_v", "D", "ab"),
            _additive,
            _natural_additive,
            slopes=_second_and_fourth,
            floor=(0.0, 0.0, 0.0, 0.0, 0.0, -_FREE),
        ),
        Law(
            "interaction",
            "Y = c - a ln N - b ln V - ab ln N ln V",
            ("y", "a", "b", "ab"),
            _interaction,
            _natural_interaction,
            within="quadratic",
        ),
        Law(
            "quadratic",
            "Y = c - a ln N - b ln V - ab ln N ln V - aa (ln N)^2 - bb (ln V)^2",
            ("y", "a", "b", "ab", "aa", "bb"),
            _quadratic,
            _natural_quadratic,
        ),
    )
}

# Not a law of the table: the logit law with an interaction, against which its single index is tested.
LOGIT_INTERACTION = Law(
    "logit_interaction",
    "logit(Y) = -(p0 + p1 ln N + p2 ln V + p12 ln N ln V)",
    ("level", "p1", "p2", "p12"),
    lambda xp, theta, u, w: _expit(xp, _interaction(xp, theta, u, w)),
    _natural_logit_interaction,
    link=_log_odds,
    bounded=True,
)
