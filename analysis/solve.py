"""One Levenberg-Marquardt for every fit: each row of a batch has its own targets, weights, start and
constraint.

A bootstrap resample, a fold, a start and a profile point are all rows, so one compiled program does
them all, 64 rows (fewer for thousands of cells) at a time. Method: Marquardt's diagonal damping (1963);
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

from analysis.laws import OUTERS, Law, Program

CHUNK = 64
_ROUND = 4096  # many cells are padded to a multiple of this
_PLACES = 1 << 16  # cells times rows that one call holds
MAX_STEPS = 200
_STIFF = 1e5  # square root of the weight that holds a constrained quantity, over that of a cell
_NEWTON_AFTER, _WARM = 12, 1  # steps from a cold start, and from one near the optimum
_FIRST_PASS = 12
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


class _Batch(NamedTuple):
    """What the rows of one chunk are fitted to. weights and edge (Huber's thresholds) count the constraint as
    a last cell, of weight one and without a threshold.
    """

    program: Program
    log_scale: bool
    kind: Any
    u: Any
    w: Any
    targets: Any
    weights: Any
    held: Any
    edge: Any


class _State(NamedTuple):
    """The rows between two steps."""

    theta: Any
    residual: Any
    loss: Any
    damping: Any
    done: Any
    cosine: Any
    steps: Any
    number: Any


def _residuals(batch: _Batch, theta: Any, target: Any, held: Any) -> Any:
    """[cells + 1] of one row: target - prediction, then the constraint held[0] * slope_n + held[1] * slope_v
    + held[2] * theta[3] + held[3], which is nothing where `held` is zero.
    """
    program, u, w = batch.program, batch.u, batch.w
    if program.mean is None:
        line = theta[0] - theta[1] * u - theta[2] * w
        prediction = jax.lax.switch(batch.kind, [partial(outer, jnp) for outer in OUTERS], line)
    else:
        prediction = program.mean(jnp, theta, u, w)
    if batch.log_scale:
        prediction = jnp.log(jnp.maximum(prediction, 1e-300))
    by_size, by_tokens = program.slopes(theta)
    extra = held[2] * theta[3] if program.size > 3 else 0.0
    constraint = held[0] * by_size + held[1] * by_tokens + extra + held[3]
    # Scaled by the size of the row's targets, so that its stiffness has no unit.
    stiff = _STIFF * (jnp.max(jnp.abs(target)) + 1e-300)
    return jnp.concatenate([target - prediction, -stiff * constraint[None]])


def _evaluate(batch: _Batch, theta: Any) -> tuple[Any, Any]:
    """(residual, loss), each [R, cells + 1]."""
    residual = jax.vmap(partial(_residuals, batch))(theta, batch.targets, batch.held)
    size = jnp.abs(jnp.where(batch.weights > 0, residual, 0.0))
    inside = size <= batch.edge
    loss = jnp.where(inside, size**2, 2 * batch.edge * size - jnp.where(inside, 0.0, batch.edge) ** 2)
    return residual, batch.weights * loss


def _normal(batch: _Batch, theta: Any, residual: Any, newton: Any) -> tuple[Any, Any, Any, Any]:
    """(gradient [R, k], curvature [R, k, k], its robust diagonal [R, k], weighted square of residuals
    [R]).
    """
    weights, edge = batch.weights, batch.edge
    jac = -jax.vmap(jax.jacfwd(partial(_residuals, batch)))(theta, batch.targets, batch.held)
    jac = jnp.where(weights[..., None] > 0, jac, 0.0)
    residual = jnp.where(weights > 0, residual, 0.0)
    inside = jnp.abs(residual) <= edge
    pull = weights * jnp.clip(residual, -edge, edge)
    gradient = jnp.einsum("rc,rck->rk", pull, jac)
    curvature = jnp.einsum("rc,rck,rcl->rkl", weights * inside, jac, jac)
    if batch.program.floor:
        # The additive laws have a valley so flat that what Gauss-Newton leaves out decides the way along it;
        # far
        # from it, Gauss-Newton is the safer guide.
        def bent(theta: Any, target: Any, held: Any, weight: Any) -> Any:
            return jnp.vdot(weight, _residuals(batch, theta, target, held))

        def second(first: Any) -> Any:
            return first + jax.vmap(jax.jacfwd(jax.grad(bent)))(theta, batch.targets, batch.held, pull)

        curvature = jax.lax.cond(newton, second, lambda first: first, curvature)
    robust = weights * jnp.where(inside, 1.0, edge / jnp.maximum(jnp.abs(residual), 1e-300))
    return gradient, curvature, jnp.einsum("rc,rck->rk", robust, jac**2), jnp.sum(pull * residual, axis=1)


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


def _advance(batch: _Batch, low: Any, frozen: Any, newton_after: Any, state: _State) -> _State:
    """One step of every row: tried, taken where it does not raise the cost, and the damping adapted."""
    theta, damping = state.theta, state.damping
    gradient, curvature, diagonal, size = _normal(batch, theta, state.residual, state.number >= newton_after)
    stuck = ((theta <= low) & (gradient < 0)) | (diagonal <= 0) | frozen
    step = _step(gradient, curvature, diagonal, damping, stuck, jnp.zeros_like(theta))
    if batch.program.floor:
        # Where the step would leave the bounds, go to the bound and take the best step along it.
        over = ~stuck & (theta + step < low)
        given = jnp.where(over, low - theta, 0.0)
        step = _step(gradient, curvature, diagonal, damping, stuck | over, given)
    trial = jnp.maximum(theta + step, low)
    step = trial - theta
    residual, loss = _evaluate(batch, trial)
    cost, trial_cost = jnp.sum(state.loss, axis=1), jnp.sum(loss, axis=1)
    better = trial_cost <= cost
    small = jnp.all(jnp.abs(step) <= _SMALL_STEP * (1e-3 + jnp.abs(theta)), axis=1)
    small |= jnp.abs(2 * jnp.sum(gradient * step, axis=1)) <= _SMALL_GAIN * cost
    # A tiny step means an optimum only while the damping is low: elsewhere it means a stall.
    arrived = small & (damping < 1e3) & jnp.isfinite(trial_cost)
    length = jnp.sqrt(jnp.maximum(diagonal * size[:, None], 1e-300))
    cosine = jnp.max(jnp.where(stuck, 0.0, jnp.abs(gradient)) / length, axis=1)
    take = (better & ~state.done)[:, None]
    return _State(
        jnp.where(take, trial, theta),
        jnp.where(take, residual, state.residual),
        jnp.where(take, loss, state.loss),
        jnp.where(better, jnp.maximum(damping * 0.1, 1e-16), damping * 10.0),
        state.done | arrived,
        jnp.where(state.done, state.cosine, cosine),
        state.steps + ~state.done,
        state.number + 1,
    )


@partial(jax.jit, static_argnames=("program", "log_scale"))
def _levenberg_marquardt(
    program: Program,
    log_scale: bool,
    kind: Any,
    frozen: Any,
    max_steps: Any,
    u: Any,
    w: Any,
    targets: Any,
    weights: Any,
    start: Any,
    held: Any,
    delta: Any,
    newton_after: Any,
) -> Any:
    """(theta, cost, converged, cosine, steps) of one chunk; see `solve`."""
    rows = start.shape[0]
    low = jnp.array(program.floor or (-jnp.inf,) * program.size)
    weights = jnp.concatenate([weights, jnp.ones((rows, 1))], axis=1)
    edge = jnp.concatenate([delta * jnp.ones(u.shape), jnp.full(1, jnp.inf)])
    batch = _Batch(program, log_scale, kind, u, w, targets, weights, held, edge)
    start = jnp.maximum(start, low)
    none, zero = jnp.zeros(rows, bool), jnp.zeros(rows, int)
    state = _State(
        start, *_evaluate(batch, start), jnp.full(rows, 1e-3), none, jnp.full(rows, jnp.inf), zero, 0
    )
    state = jax.lax.while_loop(
        lambda state: (state.number < max_steps) & ~jnp.all(state.done),
        partial(_advance, batch, low, frozen, newton_after),
        state,
    )
    converged = state.done & jnp.all(jnp.isfinite(state.theta), axis=1)
    return state.theta, jnp.sum(state.loss[:, :-1], axis=1), converged, state.cosine, state.steps


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
    width = max(32, 1 << (cells - 1).bit_length()) if cells <= _ROUND else -(-cells // _ROUND) * _ROUND
    held = np.zeros((rows, 4)) if held is None else held
    targets = np.broadcast_to(targets, (rows, cells))
    weights = np.broadcast_to(weights, (rows, cells))
    u, w = np.pad(u, (0, width - cells)), np.pad(w, (0, width - cells))
    # A law may be the first coordinates of a larger one: the others are held at zero in its program.
    width_of_theta = law.program.size
    start = np.pad(start, ((0, 0), (0, width_of_theta - law.size)))
    frozen = np.arange(width_of_theta) >= law.size
    kind = OUTERS.index(law.outer) if law.outer is not None else 0
    theta, cost, gradient = start.copy(), np.zeros(rows), np.zeros(rows)
    converged, steps = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=np.int64)
    chunk = max(1, min(CHUNK, _PLACES // width))
    # Most rows need few steps: a second pass gathers the others, so that no chunk waits for one of them.
    newton_after = _WARM if warm else _NEWTON_AFTER
    for limit, newton in ((_FIRST_PASS, newton_after), (max_steps - _FIRST_PASS, newton_after - _FIRST_PASS)):
        left = np.flatnonzero(~converged)
        for own in (left[first : first + chunk] for first in range(0, left.size, chunk)):
            # Its first row fills the chunk: a padding row of zeros would never converge.
            index = np.concatenate([own, np.full(chunk - own.size, own[0])])
            block = np.zeros((chunk, width)), np.zeros((chunk, width))
            block[0][:, :cells], block[1][:, :cells] = targets[index], weights[index]
            fixed = kind, frozen, limit, u, w, *block, theta[index], held[index], float(delta), newton
            with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
                found = _levenberg_marquardt(law.program, log_scale, *fixed)
            parts = [np.asarray(part)[: own.size] for part in found]
            theta[own], cost[own], converged[own], gradient[own] = parts[:4]
            steps[own] += parts[4]
            if parts[0].dtype != np.float64:
                raise TypeError(f"the solver ran in {parts[0].dtype}; fits are made in float64 alone")
    return Solution(theta[:, : law.size], cost, converged, gradient, steps)
