"""Attention against torch's `nn.MultiheadAttention`: numbers, mask, and how it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlmscale.compressors.multihead import MultiheadAttention, torch_linear
from vlmscale.layers import init_params


@pytest.mark.parametrize("num_heads, masked", [(1, False), (4, False), (2, True)])
def test_numbers_are_those_of_torch(num_heads: int, masked: bool, random_params: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, 8)).astype(np.float32) for length in (3, 5, 5))
    mask = rng.random((2, 3, 5)) < 0.6 if masked else None
    if mask is not None:
        mask[:, :, 0] = True
        assert not mask.all()
    module = MultiheadAttention(num_heads)
    params = random_params(module, q, k, v)
    ours = jax.jit(module.apply)(params, q, k, v, mask)
    theirs = torch.nn.MultiheadAttention(8, num_heads, batch_first=True)
    parts = {name: {key: np.asarray(x) for key, x in part.items()} for name, part in params["params"].items()}
    weights = {
        "in_proj_weight": np.concatenate([parts[name]["kernel"].T for name in "qkv"]),
        "in_proj_bias": np.concatenate([parts[name]["bias"] for name in "qkv"]),
        "out_proj.weight": parts["o"]["kernel"].T,
        "out_proj.bias": parts["o"]["bias"],
    }
    theirs.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    hidden = None if mask is None else torch.tensor(~mask).repeat_interleave(num_heads, 0)
    with torch.no_grad():
        wanted, _ = theirs(*map(torch.tensor, (q, k, v)), attn_mask=hidden)
    np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_it_starts_as_torch_does() -> None:
    """Uniform within the bounds that torch's own draw fills."""
    width = 64
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(width, 4)
    x = jnp.zeros((1, 2, width))
    ours = init_params(MultiheadAttention(4), jax.random.key(0), x, x, x)
    packed = float(theirs.in_proj_weight.detach().abs().max())
    for name in "qkv":
        assert float(jnp.abs(ours[name]["kernel"]).max()) == pytest.approx(packed, rel=0.01)
    linear = torch.nn.Linear(width, width)
    out = float(jnp.abs(ours["o"]["kernel"]).max())
    assert out == pytest.approx(float(linear.weight.detach().abs().max()), rel=0.01)
    convolution = torch.nn.Conv2d(500, 500, 3, groups=500).weight.detach()
    kernel = torch_linear(jax.random.key(0), (3, 3, 500))
    assert float(jnp.abs(kernel).max()) == pytest.approx(float(convolution.abs().max()), rel=0.01)
    assert float(kernel.std()) == pytest.approx(float(convolution.std()), rel=0.05)
    assert not any(part["bias"].any() for part in ours.values())


def test_the_output_starts_as_the_caller_says() -> None:
    x = jnp.zeros((1, 2, 64))
    module = MultiheadAttention(4, output_init=jax.nn.initializers.constant(3.0))
    params = init_params(module, jax.random.key(0), x, x, x)
    assert (params["o"]["kernel"] == 3).all()
    assert not (params["q"]["kernel"] == 3).any()


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    x = jnp.zeros((1, 2, 10))
    with pytest.raises(ValueError, match="4 heads do not divide a width of 10"):
        MultiheadAttention(4).init(jax.random.key(0), x, x, x)
