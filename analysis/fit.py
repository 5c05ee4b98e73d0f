"""Fits of one law to one table: losses, starts, the active set of the paper's form, and what a fit is
worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc

from analysis.data import Table
from analysis.laws import LAWS, MOST_EXPONENT, Frame, Law
from analysis.solve import MAX_STEPS, solve

LOSSES = ("raw", "log", "huber", "binomial")
_THIN = 500  # cells that say enough about where to start
MANY_CELLS = 2000  # above, the large-sample normal stands for resampling, which would take minutes
_EXACT = 1e-18  # of the targets' own scatter; a sum of squares below is rounding, and AICc has no meaning
_STEEP = 30.0  # an index that moves this far over the cells is a step between 0 and 1, not a law
_TUNING = 1.345  # Huber's constant: 95% efficiency under normal noise


class Cells(NamedTuple):
    """What the solver needs of a table: centred coordinates, targets and weights, all [cells].

    log_scale: targets are logarithms. delta: Huber's threshold in units of the targets, inf for squares.
    shift: the law reads ln(V + shift).
    """

    frame: Frame
    u: np.ndarray
    w: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    log_scale: bool
    delta: float
    shift: float


class Rows(NamedTuple):
    """A batch of refits: theta [R, k], cost [R], converged [R], bound [R] (a bound is active), gradient
    [R].
    """

    theta: np.ndarray
    cost: np.ndarray
    converged: np.ndarray
    bound: np.ndarray
    gradient: np.ndarray


@dataclass(frozen=True)
class Fit:
    """One law fitted to one table.

    theta: [k], centred coordinates. objective: what was minimised. sse: weighted sum of squared residuals on
    the scale of the loss (error for raw, ln error for log and huber). r2, aicc: None where undefined. sd:
    residual standard deviation. freedom: cells - k. gradient: largest cosine between residuals and a free
    column of the Jacobian (0 at an optimum). condition: of the Jacobian with unit columns. bounds: the
    coefficients that sit on a bound. exact: no residual but rounding.
    """

    law: Law
    table: Table
    cells: Cells
    loss: str
    theta: np.ndarray
    objective: float
    sse: float
    r2: float | None
    aicc: float | None
    sd: float
    freedom: int
    converged: bool
    gradient: float
    condition: float
    bounds: tuple[str, ...]
    exact: bool = False

    @property
    def params(self) -> dict[str, float]:
        """The parameters of the printed formula, N in billions."""
        return {name: float(value) for name, value in self.law.natural(self.theta, self.cells.frame).items()}

    @property
    def ratio(self) -> float:
        """Slope along ln N over slope along ln V, at the centre of the cells."""
        return float(self.law.ratio(self.theta))

    @property
    def slopes(self) -> tuple[float, float]:
        """Fall of the prediction per unit of ln N and of ln V at the centre of the cells, in units of
        score.
        """
        step = 1e-5
        at = np.array([step, -step, 0.0, 0.0]), np.array([0.0, 0.0, step, -step])
        right, left, up, down = self.law.predict(self.theta, *at)
        return float(left - right) / (2 * step), float(down - up) / (2 * step)

    def predict(self, n: np.ndarray, v: np.ndarray, theta: np.ndarray | None = None) -> np.ndarray:
        """Prediction [..., cells] at n (a parameter count) and v (>= 1), of `theta` [..., k] or of the
        fit.
        """
        u, w = self.cells.frame.coordinates(n, np.asarray(v) + self.cells.shift)
        return self.law.predict(self.theta if theta is None else theta, u, w)

    def residuals(self) -> np.ndarray:
        """target - prediction [cells] on the scale of the loss."""
        return self.cells.targets - fitted(self)


def fitted(fit: Fit) -> np.ndarray:
    """Prediction [cells] at the fit's own cells, on the scale of the loss."""
    prediction = fit.law.predict(fit.theta, fit.cells.u, fit.cells.w)
    return np.log(prediction) if fit.cells.log_scale else prediction


def why_no_fit(table: Table, law: Law | None = None) -> str | None:
    """Why no law (or this law) can be fitted to `table`, in one clause, or None where one can."""
    sizes, counts = table.sizes.size, table.token_counts.size
    if sizes < 2 or counts < 2:
        return f"{_plural(sizes, 'LLM size')} and {_plural(counts, 'token count')}; a law needs two of each"
    if table.n.size <= 3:
        return f"{table.n.size} cells measured; a law with three parameters needs at least four"
    u, w = frame_of(table).coordinates(table.n, table.v)
    if np.ptp(table.error) == 0:
        return "every cell has the same error"
    if np.linalg.matrix_rank(np.column_stack([np.ones_like(u), u, w])) < 3:
        return "LLM size and token count change together in every cell, so their effects cannot be told apart"
    if law is None:
        return None
    if law.bounded and table.target != "error":
        return f"the {law.name} law describes an error between 0 and 1, not a loss"
    if law.size > 3 and table.n.size < law.size + 3:
        return (
            f"{table.n.size} cells measured; the {law.name} law, of {law.size} parameters, needs "
            f"{law.size + 3}"
        )
    if (
        law.name == "interaction"
        and np.linalg.matrix_rank(np.column_stack([np.ones_like(u), u, w, u * w])) < 4
    ):
        return "the cells do not cross enough sizes with token counts to tell an interaction"
    if law.name == "quadratic" and min(sizes, counts) < 3:
        return "a quadratic law needs three LLM sizes and three token counts"
    return None


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def frame_of(table: Table) -> Frame:
    """The centre of a table's cells."""
    return Frame(float(np.log(table.n / 1e9).mean()), float(np.log(table.v).mean()))


def fit(law: Law, table: Table, *, loss: str = "raw", delta: float | None = None, shift: float = 0.0) -> Fit:
    """Fit `law` to `table`.

    loss: 'raw' (least squares of the error, the default), 'log' (of its logarithm), 'huber' (Huber's loss of
    the logarithm, delta in units of ln error; by default 1.345 robust standard deviations, so that it scales
    with the noise; 1e-3 is the constant of the language-model literature) or 'binomial' (squares weighted by
    1 / (p(1-p)/items + extra variance)). shift: the law reads ln(V + shift) instead of ln V. Raises
    ValueError for a table that the law cannot be fitted to (see `why_no_fit`), an unknown loss, a loss in
    logarithms of an error that is not positive, or 'binomial' without item counts.
    """
    reason = why_no_fit(table, law)
    if reason is not None:
        raise ValueError(reason)
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
    cells = _cells(table, loss, shift)
    if loss == "huber":
        cells = cells._replace(delta=_noise_delta(law, cells) if delta is None else float(delta))
    found = fit_rows(law, cells, cells.targets[None], cells.weights[None])
    if loss == "binomial":
        cells, found = _reweighted(law, table, cells, found)
    return _describe(law, table, cells, loss, found)


def _cells(table: Table, loss: str, shift: float) -> Cells:
    log_n, log_v = np.log(table.n / 1e9), np.log(table.v + shift)
    frame = Frame(float(log_n.mean()), float(log_v.mean()))
    log_scale = loss in ("log", "huber")
    if log_scale and table.error.min() <= 0:
        raise ValueError(f"loss {loss!r} takes logarithms, and a cell of {table.group} has no error at all")
    if loss == "binomial" and not np.isfinite(table.n_items).all():
        raise ValueError("loss 'binomial' needs n_items in every row")
    targets = np.log(table.error) if log_scale else table.error
    return Cells(
        frame,
        log_n - frame.ln_n,
        log_v - frame.ln_v,
        targets,
        np.ones_like(targets),
        log_scale,
        np.inf,
        shift,
    )


def _noise_delta(law: Law, cells: Cells) -> float:
    """1.345 robust standard deviations of the residuals, iterated from least squares until it settles."""
    for _ in range(20):
        found = fit_rows(law, cells, cells.targets[None], cells.weights[None])
        residual = cells.targets - np.log(law.predict(found.theta[0], cells.u, cells.w))
        scale = float(np.median(np.abs(residual - np.median(residual)))) / 0.6745
        delta = max(_TUNING * scale, 1e-12)
        if abs(delta - cells.delta) <= 1e-6 * delta:
            break
        cells = cells._replace(delta=delta)
    return delta


def _reweighted(law: Law, table: Table, cells: Cells, found: Rows) -> tuple[Cells, Rows]:
    """Quasi-binomial fit: weights and extra variance (by moments) from the fit, until the weights settle."""
    items = table.n_items
    for _ in range(100):
        p = np.clip(law.predict(found.theta[0], cells.u, cells.w), 1e-3, 1 - 1e-3)
        noise = p * (1 - p) / items
        square = (cells.targets - p) ** 2
        share = 1 - law.size / p.size
        extra = _extra_variance(square / share, noise)
        weights = 1 / (noise + extra)
        weights /= weights.mean()
        settled = float(np.abs(weights - cells.weights).max()) <= 1e-10
        cells = cells._replace(weights=weights)
        found = fit_rows(law, cells, cells.targets[None], cells.weights[None], start=found.theta)
        if settled:
            break
    return cells, found


def _extra_variance(square: np.ndarray, noise: np.ndarray) -> float:
    """t >= 0 with mean(square / (noise + t)) = 1, by bisection; 0 where the noise alone explains the
    squares.
    """
    if float(np.mean(square / noise)) <= 1:
        return 0.0
    low, high = 0.0, float(square.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(np.mean(square / (noise + middle))) > 1 else (low, middle)
    return high


def fit_rows(
    law: Law,
    cells: Cells,
    targets: np.ndarray,
    weights: np.ndarray,
    *,
    start: np.ndarray | None = None,
    held: np.ndarray | None = None,
    max_steps: int = MAX_STEPS,
    warm: bool = False,
) -> Rows:
    """Refit `law` for every row of targets and weights [R, cells], at the coordinates of `cells`.

    start: [R, k] or [1, k] (warm: near the optima); by default every row starts from its own linear
    regression (the additive laws from several splits, of which the best end counts). held: see `solve`. The
    paper's form is fitted without its bound; rows whose D falls below 0 take the fit with D = 0, the power
    law (the optimum sits on the bound).
    """
    rows = max(targets.shape[0], weights.shape[0])
    starts = (
        starting_points(law, cells, targets, weights)
        if start is None
        else np.broadcast_to(start, (rows, law.size))
    )
    many, shape = starts.shape[0] // rows, (rows, cells.u.size)
    found = solve(
        law,
        cells.u,
        cells.w,
        np.repeat(np.broadcast_to(targets, shape), many, axis=0) if many > 1 else targets,
        np.repeat(np.broadcast_to(weights, shape), many, axis=0) if many > 1 else weights,
        np.ascontiguousarray(starts),
        held=None if held is None else np.repeat(held, many, axis=0),
        log_scale=cells.log_scale,
        delta=cells.delta,
        max_steps=max_steps,
        warm=warm,
    )
    cost = np.where(np.isfinite(found.cost), found.cost, np.inf).reshape(rows, many)
    index = np.arange(rows) * many + cost.argmin(axis=1)
    theta, best = found.theta[index], found.cost[index]
    converged, gradient = found.converged[index], found.gradient[index]
    bound = np.zeros(rows, dtype=bool)
    if law.floor:
        bound = (theta <= np.array(law.floor)).any(axis=1)
    if law.name == "paper":
        bound = ~(theta[:, 3] * theta[:, 0] >= 1)
        if bound.any():
            power = fit_rows(
                LAWS["power"],
                cells,
                np.broadcast_to(targets, shape)[bound],
                np.broadcast_to(weights, shape)[bound],
                held=None if held is None else held[bound],
                max_steps=max_steps,
            )
            level, alpha, beta = power.theta.T
            grow = np.exp(np.clip(level, -300.0, 300.0))
            theta, best = theta.copy(), best.copy()
            theta[bound] = np.column_stack([grow, alpha * grow, beta * grow, 1 / grow])
            best[bound], converged[bound], gradient[bound] = power.cost, power.converged, power.gradient
    if law.link is not None:
        reach = np.abs(theta[:, 1:3]) @ np.array([np.ptp(cells.u), np.ptp(cells.w)])
        converged = converged & (reach < _STEEP)
    return Rows(theta, best, converged, bound, gradient)


def starting_points(law: Law, cells: Cells, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R * S, k]: from the weighted regression of each row on the law's own scale; S > 1 for additive
    laws.
    """
    rows = max(targets.shape[0], weights.shape[0])
    level = np.exp(targets) if cells.log_scale else targets
    if law.bounded:
        level = np.clip(level, 1e-3, 1 - 1e-3)
    y = law.link(level) if law.link else level
    x = np.column_stack([np.ones_like(cells.u), -cells.u, -cells.w])
    normal = np.einsum("rc,ci,cj->rij", weights, x, x)
    normal += 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    right = np.einsum("rc,ci->ri", weights * y, x)
    line = np.broadcast_to(np.linalg.solve(normal, right[..., None])[..., 0], (rows, 3))
    if not law.floor:
        return np.concatenate([line, np.zeros((rows, law.size - 3))], axis=1)
    grid = _additive_starts(law, cells, level, np.broadcast_to(weights, (rows, cells.u.size)))
    return grid.reshape(-1, law.size)


_EXPONENTS = np.geomspace(0.02, 4.0, 10)
_SUBSETS = ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,))


def _additive_starts(law: Law, cells: Cells, level: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R, S, k]: the best non-negative a, b, D on a grid of exponents; one start for each quarter of the
    grid, because a steep and a flat exponent are valleys of their own (one start where the cells are very
    many).
    """
    thin = slice(None, None, max(1, cells.u.size // _THIN))
    u, w, weights = cells.u[thin], cells.w[thin], weights[:, thin]
    level = np.broadcast_to(level, (weights.shape[0], cells.u.size))[:, thin]
    points, costs = [], []
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            found, cost = _non_negative(
                np.stack([np.exp(-alpha * u), np.exp(-beta * w), np.ones_like(u)]), level, weights
            )
            a, b = (np.maximum(found[:, i], 1e-3 * level.mean(axis=1)) for i in (0, 1))
            rest = [np.zeros_like(a)] * (law.size - 5)
            points.append(np.stack([a, a * alpha, b, b * beta, found[:, 2], *rest], axis=1))
            costs.append(cost)
    half, side = _EXPONENTS.size // 2, _EXPONENTS.size
    steep = np.arange(side * side) // side >= half, np.arange(side * side) % side >= half
    cost = np.stack(costs)
    masks = [(steep[0] == i) & (steep[1] == j) for i in (False, True) for j in (False, True)]
    if cells.u.size > MANY_CELLS:
        masks = [np.ones(side * side, dtype=bool)]
    best = [np.where(mask[:, None], cost, np.inf).argmin(axis=0) for mask in masks]
    return np.stack([np.stack(points)[index, np.arange(index.size)] for index in best], axis=1)


def _non_negative(
    columns: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients [R, 3], cost [R]) of least squares with coefficients >= 0, by trying the few active
    sets.
    """
    normal = np.einsum("rc,ic,jc->rij", weights, columns, columns)
    right = np.einsum("rc,ic->ri", weights * targets, columns)
    square = (weights * targets**2).sum(axis=1)
    best, least = np.zeros((targets.shape[0], 3)), np.full(targets.shape[0], np.inf)
    for subset in _SUBSETS:
        inner = normal[:, subset][:, :, subset]
        ridge = 1e-12 * np.trace(inner, axis1=1, axis2=2)[:, None, None] * np.eye(len(subset))
        found = np.linalg.solve(inner + ridge, right[:, subset, None])[..., 0]
        cost = square - (found * right[:, subset]).sum(axis=1)
        better = (found >= 0).all(axis=1) & (cost < least)
        least = np.where(better, cost, least)
        whole = np.zeros_like(best)
        whole[:, subset] = found
        best = np.where(better[:, None], whole, best)
    return best, least


def jacobian(law: Law, theta: np.ndarray, u: np.ndarray, w: np.ndarray) -> np.ndarray:
    """d prediction / d theta [..., cells, k] at theta [..., k], by central differences (9 digits or so:
    enough for standard errors; the solver's own derivatives are exact).
    """
    columns = []
    for i in range(law.size):
        step = np.zeros(theta.shape)
        step[..., i] = 1e-6 * np.maximum(np.abs(theta[..., i]), 1e-3)
        ahead, behind = law.predict(theta + step, u, w), law.predict(theta - step, u, w)
        columns.append((ahead - behind) / (2 * step[..., i, None]))
    return np.stack(columns, axis=-1)


def scaled_jacobian(fit: Fit) -> np.ndarray:
    """Jacobian [cells, k] on the scale of the loss, rows times the square root of the weights."""
    jac = jacobian(fit.law, fit.theta, fit.cells.u, fit.cells.w)
    if fit.cells.log_scale:
        jac = jac / fit.law.predict(fit.theta, fit.cells.u, fit.cells.w)[:, None]
    return jac * np.sqrt(fit.cells.weights)[:, None]


def covariance(fit: Fit) -> np.ndarray:
    """[k, k]: sd^2 (J'J)^-1, the large-sample covariance of theta (a pseudo-inverse where J is singular)."""
    jac = scaled_jacobian(fit)
    length = np.linalg.norm(jac, axis=0)
    if not np.isfinite(length).all():
        return np.full((fit.law.size, fit.law.size), np.inf)
    length = np.where(length > 0, length, 1.0)
    unit = jac / length
    return np.asarray(fit.sd**2 * np.linalg.pinv(unit.T @ unit, rcond=1e-14) / np.outer(length, length))


def _describe(law: Law, table: Table, cells: Cells, loss: str, found: Rows) -> Fit:
    theta, count = found.theta[0], cells.u.size
    prediction = law.predict(theta, cells.u, cells.w)
    residual = cells.targets - (np.log(prediction) if cells.log_scale else prediction)
    sse = float(cells.weights @ residual**2)
    middle = np.average(cells.targets, weights=cells.weights)
    spread = float(cells.weights @ (cells.targets - middle) ** 2)
    freedom, exact = count - law.size, sse <= _EXACT * spread
    objective = float(found.cost[0]) / 2 if loss == "huber" else float(found.cost[0])
    jac = jacobian(law, theta, cells.u, cells.w) * np.sqrt(cells.weights)[:, None]
    length = np.linalg.norm(jac, axis=0)
    singular = np.linalg.svd(jac / np.where(length > 0, length, 1.0), compute_uv=False)
    return Fit(
        law=law,
        table=table,
        cells=cells,
        loss=loss,
        theta=theta,
        objective=objective,
        sse=sse,
        r2=1 - sse / spread if spread > 0 else None,
        # Weights are variances up to a factor: their logarithms belong to the likelihood.
        aicc=None
        if exact or loss == "huber"
        else _plus(aicc(sse, count, law.size), -np.log(cells.weights).sum()),
        exact=exact,
        sd=math.sqrt(sse / freedom) if freedom else math.nan,
        freedom=freedom,
        converged=bool(found.converged[0]),
        gradient=float(found.gradient[0]),
        condition=float(singular[0] / singular[-1]) if singular[-1] > 0 else math.inf,
        bounds=_bounds(law, theta, cells.frame, bool(found.bound[0])),
    )


def _plus(value: float | None, more: float) -> float | None:
    return None if value is None else value + float(more)


def _bounds(law: Law, theta: np.ndarray, frame: Frame, active: bool) -> tuple[str, ...]:
    """What sits on a bound, in the names of the printed formula."""
    if law.name == "paper":
        return ("D = 0",) if active else ()
    if not law.floor:
        return ()
    names = {"slope_n": "alpha", "slope_v": "beta"}
    low = [
        f"{names.get(x, x)} = 0"
        for x, at in zip(law.coordinates, theta <= np.array(law.floor), strict=True)
        if at
    ]
    natural = law.natural(theta, frame)
    high = [
        f"{x} = {MOST_EXPONENT:g}" for x in ("alpha", "beta") if natural[x] >= MOST_EXPONENT * (1 - 1e-12)
    ]
    return (*low, *high)


def aicc(sse: float, cells: int, parameters: int) -> float | None:
    """Corrected Akaike criterion, the noise variance counted; None for too few cells or no residual."""
    counted = parameters + 1
    if cells <= counted + 1 or sse <= 0:
        return None
    penalty = 2 * counted + 2 * counted * (counted + 1) / (cells - counted - 1)
    return cells * math.log(sse / cells) + penalty


def f_test(small: Fit, large: Fit) -> tuple[float, float]:
    """(F, p) of the nested law `small` against `large`, fitted to the same cells with the same loss; NaN
    where `large` leaves no residual to judge by, or where each law has weights of its own.
    """
    extra = large.law.size - small.law.size
    if large.exact or large.freedom < 1 or large.loss in ("huber", "binomial"):
        return math.nan, math.nan
    value = (small.sse - large.sse) / extra / (large.sse / large.freedom)
    return value, float(fdtrc(extra, large.freedom, max(value, 0.0)))
