"""Fixed sin-cos positions of a square grid, which query-based compressors add to queries and keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.models.vision import resize_positions

_PERIOD = np.float32(10_000)


def grid_side(count: int) -> int:
    """The side of the square grid of `count` cells.

    Raises:
      ValueError: `count` is no square number.
    """
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise ValueError(f"{count} queries are no square grid: use 1, 4, 9, 16, ...")
    return side


def sincos_positions(grid: int, width: int) -> np.ndarray:
    """Positions of a grid x grid map in raster order: float32 [grid**2, width].

    The first half of the channels says the column of a cell, the second half its row (Qwen-VL's order, and
    that of the masked autoencoder, which it comes from). A half is [sin(p w_i), cos(p w_i)] with
    w_i = 10000 ** (-i / (width / 4)), i < width / 4. Computed in float32 throughout, as the published tables
    were: those that were stored with fewer bits come out the same.

    Raises:
      ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {width}")
    quarter = width // 4
    frequency = 1 / _PERIOD ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    angle = np.arange(grid, dtype=np.float32)[:, None] * frequency
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.concatenate([axis[column], axis[row]], axis=1)


def resize_grid(table: np.ndarray, side: int) -> jax.Array:
    """Positions of one square grid for another, bicubic as in torch: float32 [G * G, C] to [side**2, C]."""
    return resize_positions(jnp.asarray(table, jnp.float32), side, side)
