"""Arithmetic on the square grid of patches: windows, regions, positions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def square_divisors(side: int) -> list[int]:
    """Token counts g * g for every g that divides the side of the patch grid."""
    return [g * g for g in range(1, side + 1) if side % g == 0]


def squares(side: int) -> list[int]:
    """Token counts g * g for every g up to the side of the patch grid."""
    return [g * g for g in range(1, side + 1)]


def window_means(side: int, grid: int) -> np.ndarray:
    """One axis of adaptive average pooling as a matrix: float32 [grid, side], rows sum to 1.

    Window i covers floor(i * side / grid) to ceil((i + 1) * side / grid), as torch's
    `adaptive_avg_pool2d`: equal windows where grid divides side, else overlapping ones.
    """
    weights = np.zeros((grid, side), np.float32)
    for i in range(grid):
        start, end = i * side // grid, -(-(i + 1) * side // grid)
        weights[i, start:end] = 1 / (end - start)
    return weights


def pool_grid(x: jax.Array, visual_tokens: int) -> jax.Array:
    """Adaptive average pooling of a square grid in raster order: [N, P, C] to [N, V, C], in float32.

    The result has the dtype of `x`.
    """
    batch, patches, channels = x.shape
    side, grid = math.isqrt(patches), math.isqrt(visual_tokens)
    if side % grid == 0:
        window = side // grid
        x32 = x.astype(jnp.float32).reshape(batch, grid, window, grid, window, channels)
        return x32.mean((2, 4)).reshape(batch, visual_tokens, channels).astype(x.dtype)
    rows = window_means(side, grid)
    x32 = x.astype(jnp.float32).reshape(batch, side, side, channels)
    pooled = jnp.einsum("ih,nhwc,jw->nijc", rows, x32, rows, precision=jax.lax.Precision.HIGHEST)
    return pooled.reshape(batch, visual_tokens, channels).astype(x.dtype)


def split_regions(x: jax.Array, grid: int) -> jax.Array:
    """Cut a square grid into grid x grid regions: [N, P, C] to [N * grid**2, (side / grid)**2, C].

    Regions and the patches inside each are in raster order.
    """
    batch, patches, channels = x.shape
    region = math.isqrt(patches) // grid
    x = x.reshape(batch, grid, region, grid, region, channels).swapaxes(2, 3)
    return x.reshape(batch * grid * grid, region * region, channels)
