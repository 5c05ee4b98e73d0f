"""Windows and regions of the patch grid against torch and against loops."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlmscale.compressors.grid import pool_grid, split_regions, square_divisors, squares, window_means


@pytest.mark.parametrize("side", [8, 27])
def test_pooling_is_that_of_torch_for_every_grid(side: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, side * side, 3)).astype(np.float32)
    maps = torch.tensor(x).permute(0, 2, 1).reshape(2, 3, side, side)
    for grid in range(1, side + 1):
        wanted = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).permute(0, 2, 1)
        ours = pool_grid(jnp.asarray(x), grid * grid)
        np.testing.assert_allclose(ours, wanted, atol=1e-6, err_msg=str(grid))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grid", [1, 2, 4, 8])
def test_equal_windows_are_plain_means_to_the_bit(grid: int, dtype: jnp.dtype) -> None:
    """Published runs have been trained on these numbers."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 5)), dtype)
    plain = x.reshape(2, grid, 8 // grid, grid, 8 // grid, 5).mean((2, 4)).reshape(2, grid * grid, 5)
    ours = pool_grid(x, grid * grid)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, plain)


def test_unequal_windows_are_means_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 49, 5)), jnp.bfloat16)
    ours = pool_grid(x, 9)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, pool_grid(x.astype(jnp.float32), 9).astype(jnp.bfloat16))


def test_windows_overlap_where_the_grid_does_not_divide() -> None:
    third, half = 1 / 3, 1 / 2
    wanted = [[third, third, third, 0, 0], [0, 0, third, third, third]]
    np.testing.assert_allclose(window_means(5, 2), wanted, rtol=1e-6)
    wanted = [[half, half, 0, 0], [0, half, half, 0], [0, 0, half, half]]
    np.testing.assert_allclose(window_means(4, 3), wanted, rtol=1e-6)


@pytest.mark.parametrize("grid", [1, 2, 3, 6])
def test_regions_and_what_is_inside_are_in_raster_order(grid: int) -> None:
    side, region = 6, 6 // grid
    x = np.arange(2 * side * side * 2).reshape(2, side * side, 2)
    cut = []
    for image in x.reshape(2, side, side, 2):
        for top in range(0, side, region):
            for left in range(0, side, region):
                cut.append(image[top : top + region, left : left + region].reshape(-1, 2))
    np.testing.assert_array_equal(split_regions(jnp.asarray(x), grid), np.stack(cut))


def test_counts() -> None:
    assert square_divisors(24) == [1, 4, 9, 16, 36, 64, 144, 576]
    assert square_divisors(27) == [1, 9, 81, 729]
    assert squares(5) == [1, 4, 9, 16, 25]
