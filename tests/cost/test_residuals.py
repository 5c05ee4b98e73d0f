"""What the backward pass keeps, by the formula and in what jax makes of the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vlmscale.cost.residuals import layer_residual_bytes
from vlmscale.models.decoder import REMAT, Decoder
from vlmscale.models.sizes import DecoderSize
from vlmscale.weights.directory import abstract_decoder

# No two widths are the same, that none may stand for another. Grouped keys, one key a head, one key for all.
SIZES = {
    "llama": DecoderSize(40, 3, 6, 2, 56, head_dim=8),
    "qwen2": DecoderSize(48, 2, 4, 4, 88, family="qwen2", head_dim=16, tied_embeddings=False),
    "qwen3": DecoderSize(24, 4, 3, 1, 64, family="qwen3", head_dim=16),
}


def kept_bytes(
    size: DecoderSize, remat: str, attention: str, rows: int, length: int, dtype: str, trained: bool
) -> int:
    """Bytes of what the scan over the layers stacks for the backward pass, parameters left out."""
    decoder = Decoder(size, 50, jnp.dtype(dtype), attention=attention, remat=remat)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    embeddings = jax.ShapeDtypeStruct((rows, length, size.width), dtype)

    def forward(params: Any, embeddings: Any, positions: Any, segments: Any) -> Any:
        def run(params: Any, embeddings: Any) -> Any:
            return decoder.apply({"params": params}, embeddings, positions, segments)

        if trained:
            return jax.vjp(run, params, embeddings)
        return jax.vjp(lambda embeddings: run(params, embeddings), embeddings)

    params = nn.meta.unbox(abstract_decoder(size, 50, "scan"))
    jaxpr = jax.make_jaxpr(forward)(params, embeddings, ids, ids).jaxpr
    (scan,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    stacked = set(scan.outvars[scan.params["num_carry"] :])
    return sum(each.aval.size * each.aval.dtype.itemsize for each in stacked & set(jaxpr.outvars))


# Where most is computed again, a dtype is as good as the other.
POLICIES = [("block", "bfloat16"), ("dots", "bfloat16"), ("none", "bfloat16"), ("none", "float32")]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("attention", ["xla", "splash"])
@pytest.mark.parametrize("remat, dtype", POLICIES)
@pytest.mark.parametrize("family", SIZES)
def test_the_formula_is_what_jax_keeps(
    family: str, remat: str, dtype: str, attention: str, trained: bool
) -> None:
    size, itemsize = SIZES[family], jnp.dtype(dtype).itemsize
    backend = "splash-interpret" if attention == "splash" else attention
    rows, length = 2, 130
    kept = kept_bytes(size, remat, backend, rows, length, dtype, trained)
    one = layer_residual_bytes(size, remat, attention, rows, length, itemsize, trained=trained)
    assert kept == size.num_layers * one


def test_kept_bytes_grow_with_rows_and_length_as_the_formula_says() -> None:
    size = replace(SIZES["llama"], num_layers=1)
    for rows, length in ((1, 7), (3, 9)):
        for remat in REMAT:
            kept = kept_bytes(size, remat, "xla", rows, length, "bfloat16", True)
            assert kept == layer_residual_bytes(size, remat, "xla", rows, length, 2)


def test_a_backend_that_was_not_looked_at_has_no_figure() -> None:
    with pytest.raises(ValueError, match="use xla or splash"):
        layer_residual_bytes(SIZES["llama"], "none", "cudnn", 1, 8, 2)
