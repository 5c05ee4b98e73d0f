"""What a reduced answer costs: the arithmetic and what jax lowers, and tokens and caches of each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.cost.hlo import lowered_flops
from tests.reducers.prompts import (
    LONGEST,
    MLP,
    SIZES,
    SPECS,
    TEXTS,
    VOCAB,
    fastv,
    make_model,
    make_prompts,
    scheduled,
)
from vlmscale.cost import flops
from vlmscale.cost.reduced import ranking_flops, tokens_by_layer
from vlmscale.evaluate.generation import prompt_inputs
from vlmscale.reducers import ReducerSpec, cut_layers, is_adaptive


def is_fixed(spec: ReducerSpec) -> bool:
    """Whether how many tokens each layer has depends on no prompt, and all run in one pass."""
    return not is_adaptive(spec) and not spec.appended


@pytest.mark.parametrize("name", [name for name in SPECS if is_fixed(SPECS[name])])
def test_prefill_and_decoding_are_lowered_to_what_is_counted(
    name: str, random_params: Callable[..., Any]
) -> None:
    spec, size, batch = SPECS[name], SIZES["grouped"], make_prompts()
    rows, length, new = len(TEXTS), LONGEST + MLP.visual_tokens, 4
    plain, model = make_model(None), make_model(spec)
    params = random_params(plain, prompt_inputs(batch), jnp.zeros((rows, 1), int))["params"]

    def prefill(model: Any) -> Callable[..., Any]:
        return lambda params, batch: model.apply(
            {"params": params}, prompt_inputs(batch), length + new, method="prefill"
        )

    layers = tokens_by_layer(spec, size.num_layers, LONGEST, MLP.visual_tokens)
    assert layers[0] == length > layers[-1]
    saved = sum(
        flops.layer_flops(size, length, 0, causal=False) - flops.layer_flops(size, there, 0, causal=False)
        for there in layers
    )
    ranked = ranking_flops(spec, size, layers)
    if "received" in name:  # whole matrices, in blocks of 128 queries, and the sums
        ranked = sum(
            2 * size.num_heads * size.head_dim * 128 * layers[layer - 1] + 2 * 128 * layers[layer - 1]
            for layer in cuts(spec)
        )
    wanted = lowered_flops(prefill(plain), params, batch) - rows * (saved - ranked)
    assert lowered_flops(prefill(model), params, batch) == wanted

    def decode(params: Any, *inputs: Any) -> Any:
        return model.apply({"params": params}, *inputs, method="decode")

    _, cache, position = jax.eval_shape(prefill(model), params, batch)
    counted = lowered_flops(decode, params, jnp.zeros(rows, jnp.int32), position, cache, jnp.int32(length))
    head = flops.head_flops(size, VOCAB, 1)
    one = sum(flops.layer_flops(size, 1, there + new - 1, causal=False) for there in layers)
    assert counted == rows * (one + head)
    assert [stored.shape[2] for stored in cache.k] == [there + new for there in layers]


def cuts(spec: Any) -> tuple[int, ...]:
    return cut_layers(spec, 5)


def test_tokens_of_each_layer() -> None:
    assert tokens_by_layer(None, 3, 10, 16) == [26, 26, 26]
    assert tokens_by_layer(fastv(2, 0.25), 4, 10, 16) == [26, 26, 14, 14]
    assert tokens_by_layer(scheduled(1, 0.5, 0.5, 0.1), 5, 10.5, 16) == [26.5, 18.5, 18.5, 12.5, 12.5]
    assert tokens_by_layer(fastv(), 3, 10, 0) == [10, 10, 10]


def test_published_shares_of_flops() -> None:
    """FastV's own model of costs (README: 57% at K = 3 and half of 576 tokens, with about 50 of text)."""
    size = SIZES["grouped"].__class__(
        width=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_width=11008
    )

    def share(layer: int, keep: float, text: int) -> float:
        layers = tokens_by_layer(fastv(layer, keep), 32, text, 576)
        each = [flops.layer_flops(size, there, 0, causal=False) for there in layers]
        return sum(each) / (32 * flops.layer_flops(size, 576 + text, 0, causal=False))

    assert share(3, 0.5, 60) == pytest.approx(0.582, abs=2e-3)
    assert share(2, 0.5, 60) == pytest.approx(0.568, abs=2e-3)
    assert share(2, 0.25, 60) == pytest.approx(0.357, abs=2e-3)
