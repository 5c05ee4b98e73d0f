"""One Levenberg-Marquardt for every fit: each row of a batch has its own targets, weights, start and
constraint.

A bootstrap resample, a fold, a start and a profile point are all rows, so one compiled program a law does
them all, 256 rows (fewer for thousands of cells) at a time. Method: Marquardt's diagonal damping (1963);
bounds by projection, with a coordinate held while it sits on its bound and the gradient points outside
(Kanzow, Yamashita and Fukushima 2004). Everything runs in float64 on the CPU, whatever accelerator the
machine has, so the digits do not depend on it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from analysis.laws import Law

CHUNK = 256
_PLACES = 1 << 16  # cells times rows that one call holds
MAX_STEPS = 200
_STIFF = 1e5  # square root of the weight that holds a constrained quantity, over that of a cell
_NEWTON_AFTER, _WARM = 12, 1  # steps from a cold start, and from one near the optimum
_SMALL_STEP = 1e-11
_SMALL_GAIN = 1e-14


class Solution(NamedTuple):
    """Rows of a solved batch: theta [R, k]; cost [R], the objective without the constraint (a weighted sum of
    squares, or of Huber losses times two); converged [R]; gradient [R], the largest cosine between the
    residuals and a free column of the Jacobian; steps [R].
    """

    theta: np.ndarray
    cost: np.ndarray
    converged: np.ndarray
    gradient: np.ndarray
    steps: np.ndarray


def _residuals(
    law: Law, log_scale: bool, theta: Any, u: Any, w: Any, targets: Any, held: Any, scale: Any
) -> Any:
    """[cells + 1]: target - prediction, then the constraint held[0] * slope_n + held[1] * slope_v +
    held[2] * theta[3] + held[3], whose weight is zero where `held` is.
    """
    prediction = law.mean(jnp, theta, u, w)
    if log_scale:
        prediction = jnp.log(jnp.maximum(prediction, 1e-300))
    by_size, by_tokens = law.slopes(theta)
    extra = held[2] * theta[3] if law.size > 3 else 0.0
    constraint = held[0] * by_size + held[1] * by_tokens + extra + held[3]
    return jnp.concatenate([targets - prediction, -_STIFF * scale * constraint[None]])


def _step(gradient: Any, curvature: Any, diagonal: Any, damping: Any, fixed: Any, given: Any) -> Any:
    """The damped Gauss-Newton step [R, k] of the coordinates that are not `fixed`; those take `given`."""
    free = ~fixed
    gradient = jnp.where(free, gradient - jnp.einsum("rkl,rl->rk", curvature, given), 0.0)
    diagonal = jnp.where(free, diagonal, 1.0)
    # Scaled to a unit diagonal, so that one ridge suits parameters of any size.
    root = jnp.sqrt(diagonal)
    scaled = jnp.where(free[:, :, None] & free[:, None, :], curvature, 0.0) / (
        root[:, :, None] * root[:, None, :]
    )
    ridge = damping[:, None] + jnp.where(free, 1e-15, 1.0)
    system = scaled + ridge[:, :, None] * jnp.eye(diagonal.shape[1])
    return jnp.where(free, _eliminate(system, gradient / root) / root, given)


def _eliminate(system: Any, right: Any) -> Any:
    """Solve [R, k, k] x = [R, k] by Gauss-Jordan, without pivots: damped normal equations need none, and
    where Newton's are indefinite a bad step is refused. Compiles in a fraction of what a batched LU takes.
    """
    table = jnp.concatenate([system, right[..., None]], axis=2)
    for i in range(system.shape[1]):
        row = table[:, i] / table[:, i, i, None]
        table = (table - table[:, :, i, None] * row[:, None]).at[:, i].set(row)
    return table[..., -1]


@partial(jax.jit, static_argnames=("law", "log_scale", "max_steps"))
def _levenberg_marquardt(
    law: Law,
    log_scale: bool,
    max_steps: int,
    u: Any,
    w: Any,
    targets: Any,
    weights: Any,
    start: Any,
    held: Any,
    delta: Any,
    newton_after: Any,
) -> Any:
    """(theta, cost, converged, cosine, steps) of one chunk; see `solve`. The constraint is the last
    residual.
    """
    k = law.size
    low = jnp.array(law.floor or (-jnp.inf,) * k)
    one = jnp.ones((weights.shape[0], 1))
    weights = jnp.concatenate([weights, one], axis=1)
    edge = jnp.concatenate([delta * jnp.ones(u.shape), jnp.full(1, jnp.inf)])

    def row(theta: Any, target: Any, hold: Any) -> Any:
        # The constraint is scaled by the spread of the row's targets, so that its stiffness has no unit.
        return _residuals(law, log_scale, theta, u, w, target, hold, jnp.max(jnp.abs(target)) + 1e-300)

    def losses(residual: Any) -> Any:
        size = jnp.abs(residual)
        return jnp.where(size <= edge, size**2, 2 * edge * size - jnp.where(size <= edge, 0.0, edge) ** 2)

    def evaluate(theta: Any) -> tuple[Any, Any]:
        residual = jax.vmap(row)(theta, targets, held)
        loss = jnp.where(weights > 0, weights * losses(jnp.where(weights > 0, residual, 0.0)), 0.0)
        return residual, loss

    def normal(theta: Any, residual: Any, number: Any) -> tuple[Any, Any, Any, Any]:
        jac = -jax.vmap(jax.jacfwd(row))(theta, targets, held)
        jac = jnp.where(weights[..., None] > 0, jac, 0.0)
        residual = jnp.where(weights > 0, residual, 0.0)
        inside = jnp.abs(residual) <= edge
        pull = weights * jnp.clip(residual, -edge, edge)
        gradient = jnp.einsum("rc,rck->rk", pull, jac)
        curvature = jnp.einsum("rc,rck,rcl->rkl", weights * inside, jac, jac)
        if law.floor:
            # The additive laws have a valley so flat that what Gauss-Newton leaves out decides the way along
            # it;
            # far from it, Gauss-Newton is the safer guide.
            second = jax.vmap(jax.jacfwd(jax.jacfwd(row)))(theta, targets, held)
            second = jnp.where(weights[..., None, None] > 0, second, 0.0)
            curvature += jnp.where(number >= newton_after, 1.0, 0.0) * jnp.einsum(
                "rc,rckl->rkl", pull, second
            )
        robust = weights * jnp.where(inside, 1.0, edge / jnp.maximum(jnp.abs(residual), 1e-300))
        diagonal = jnp.einsum("rc,rck->rk", robust, jac**2)
        return gradient, curvature, diagonal, jnp.sum(pull * residual, axis=1)

    def body(state: Any) -> Any:
        theta, residual, loss, damping, done, cosine, step_count, number = state
        gradient, curvature, diagonal, size = normal(theta, residual, number)
        stuck = ((theta <= low) & (gradient < 0)) | (diagonal <= 0)
        step = _step(gradient, curvature, diagonal, damping, stuck, jnp.zeros_like(theta))
        if law.floor:
            # Where the step would leave the bounds, go to the bound and take the best step along it.
            over = ~stuck & (theta + step < low)
            step = _step(
                gradient, curvature, diagonal, damping, stuck | over, jnp.where(over, low - theta, 0.0)
            )
        trial = jnp.maximum(theta + step, low)
        step = trial - theta
        trial_residual, trial_loss = evaluate(trial)
        cost, trial_cost = jnp.sum(loss, axis=1), jnp.sum(trial_loss, axis=1)
        better = trial_cost <= cost
        gain = 2 * jnp.sum(gradient * step, axis=1)
        small = jnp.all(jnp.abs(step) <= _SMALL_STEP * (1e-3 + jnp.abs(theta)), axis=1)
        small |= jnp.abs(gain) <= _SMALL_GAIN * cost
        # A tiny step means an optimum only while the damping is low: elsewhere it means a stall.
        now = small & (damping < 1e3) & jnp.isfinite(trial_cost)
        length = jnp.sqrt(jnp.maximum(diagonal * size[:, None], 1e-300))
        now_cosine = jnp.max(jnp.where(stuck, 0.0, jnp.abs(gradient)) / length, axis=1)
        cosine = jnp.where(done, cosine, now_cosine)
        take = better & ~done
        theta = jnp.where(take[:, None], trial, theta)
        residual = jnp.where(take[:, None], trial_residual, residual)
        loss = jnp.where(take[:, None], trial_loss, loss)
        damping = jnp.where(better, jnp.maximum(damping * 0.1, 1e-16), damping * 10.0)
        step_count = step_count + ~done
        return theta, residual, loss, damping, done | now, cosine, step_count, number + 1

    start = jnp.maximum(start, low)
    residual, loss = evaluate(start)
    rows = start.shape[0]
    state = (
        start,
        residual,
        loss,
        jnp.full(rows, 1e-3),
        jnp.zeros(rows, bool),
        jnp.full(rows, jnp.inf),
        jnp.zeros(rows, int),
        0,
    )
    state = jax.lax.while_loop(lambda s: (s[7] < max_steps) & ~jnp.all(s[4]), body, state)
    theta, _, loss, _, done, cosine, steps, _ = state
    return theta, jnp.sum(loss[:, :-1], axis=1), done & jnp.all(jnp.isfinite(theta), axis=1), cosine, steps


def solve(
    law: Law,
    u: np.ndarray,
    w: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    start: np.ndarray,
    *,
    held: np.ndarray | None = None,
    log_scale: bool = False,
    delta: float = np.inf,
    max_steps: int = MAX_STEPS,
    warm: bool = False,
) -> Solution:
    """Minimise sum weights * loss(targets - law) for every row from its start.

    u, w: [cells]. targets, weights: [R, cells] (or [cells], the same for every row). start: [R, k]. held: [R,
    4], a linear constraint held . (slope along ln N, slope along ln V, theta[3], 1) = 0 a row (zeros: none).
    log_scale: targets are logarithms, and so is the prediction. delta: Huber's threshold; the loss is then 2
    * (r^2/2 or delta (|r| - delta/2)), so that it is the square inside. warm: the starts are near their
    optima. Raises TypeError for arrays that are not float64.
    """
    for name, array in (("u", u), ("w", w), ("targets", targets), ("weights", weights), ("start", start)):
        if array.dtype != np.float64:
            raise TypeError(f"{name} is {array.dtype}; fits are made in float64 alone")
    rows, cells = start.shape[0], u.size
    # Cells are padded (with weight zero) to few sizes and rows to chunks, so that programs are compiled once.
    width = max(32, 1 << (cells - 1).bit_length())
    held = np.zeros((rows, 4)) if held is None else held
    targets = np.broadcast_to(targets, (rows, cells))
    weights = np.broadcast_to(weights, (rows, cells))
    u, w = np.pad(u, (0, width - cells)), np.pad(w, (0, width - cells))
    newton_after = _WARM if warm else _NEWTON_AFTER
    chunk = max(1, min(CHUNK, _PLACES // width))
    pieces = []
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        for first in range(0, rows, chunk):
            own = slice(first, min(first + chunk, rows))
            count = own.stop - first
            # The first row fills the chunk: a padding row of zeros would never converge.
            index = np.where(np.arange(chunk) < count, np.arange(chunk), 0) + first
            block = np.zeros((chunk, width)), np.zeros((chunk, width))
            block[0][:, :cells], block[1][:, :cells] = targets[index], weights[index]
            found = _levenberg_marquardt(
                law, log_scale, max_steps, u, w, *block, start[index], held[index], float(delta), newton_after
            )
            pieces.append([np.asarray(part)[:count] for part in found])
    theta, cost, converged, gradient, steps = (np.concatenate(part) for part in zip(*pieces, strict=True))
    if theta.dtype != np.float64:
        raise TypeError(f"the solver ran in {theta.dtype}; fits are made in float64 alone")
    return Solution(theta, cost, converged, gradient, steps)
