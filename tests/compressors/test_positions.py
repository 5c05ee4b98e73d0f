"""Sin-cos positions against loops, and their resize against torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlmscale.compressors.positions import grid_side, resize_grid, sincos_positions


@pytest.mark.parametrize("grid, width", [(1, 4), (3, 8), (2, 20), (5, 64)])
def test_columns_drive_the_first_half_and_rows_the_second(grid: int, width: int) -> None:
    table = sincos_positions(grid, width)
    assert table.shape == (grid**2, width)
    assert table.dtype == np.float32
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            angles = [[place * 10_000 ** (-i / quarter) for i in range(quarter)] for place in (column, row)]
            wanted = [f(angle) for half in angles for f in (math.sin, math.cos) for angle in half]
            np.testing.assert_allclose(table[row * grid + column], wanted, atol=1e-6)


@pytest.mark.parametrize("width", [2, 6, 10, 1023])
def test_widths_that_four_does_not_divide_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4, not {width}"):
        sincos_positions(2, width)


@pytest.mark.parametrize("grid, side", [(3, 7), (2, 5), (4, 4), (6, 4), (1, 3), (16, 24)])
def test_resize_is_torchs_bicubic(grid: int, side: int) -> None:
    table = sincos_positions(grid, 8)
    maps = torch.tensor(table).reshape(1, grid, grid, 8).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
    wanted = wanted.permute(0, 2, 3, 1).reshape(side**2, 8).numpy()
    np.testing.assert_allclose(resize_grid(table, side), wanted, atol=5e-6)


@pytest.mark.parametrize("count", [1, 4, 9, 576])
def test_square_counts_have_a_side(count: int) -> None:
    assert grid_side(count) ** 2 == count


@pytest.mark.parametrize("count", [-1, 0, 2, 8, 577])
def test_other_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} queries"):
        grid_side(count)
