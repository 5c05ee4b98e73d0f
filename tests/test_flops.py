"""Analytic FLOPs and parameter counts against what jax says that the models compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from vlmscale.compressors import COMPRESSORS, Features
from vlmscale.cost import flops
from vlmscale.layers import abstract_params
from vlmscale.models.decoder import Decoder, KVCache
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize
from vlmscale.models.vision import VisionTower

SMALL = DecoderSize(width=24, num_layers=3, num_heads=6, num_kv_heads=2, mlp_width=40)
TOWER = TowerSize(40, 5, 16, 3, 2, 24, select_layer=3, levels=(1, 3))


def dot_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of every matrix product in a function's jaxpr; the body of a scan counts once a turn."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            assert "conv" not in name or name == "convert_element_type", name
            assert name != "while", "a while loop has no static count"
            if name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
                total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            inner = sum(count(sub) for sub in jaxprs_in_params(equation.params))
            total += inner * (equation.params["length"] if name == "scan" else 1)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def shape(*sides: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def decoder_shapes(size: DecoderSize, vocab_size: int, layout: str = "scan") -> Any:
    ids = shape(1, 4, dtype=jnp.int32)
    decoder = Decoder(size, vocab_size, layout=layout)
    return nn.meta.unbox(abstract_params(decoder, shape(1, 4, size.width), ids, ids))


def extend_flops(size: DecoderSize, new: int, slots: int) -> int:
    """Counted FLOPs of `new` tokens that attend to a cache of `slots`."""
    decoder = Decoder(size, 50, layout="loop")
    ids, valid = shape(1, new, dtype=jnp.int32), shape(1, new, dtype=bool)
    keys = (shape(1, size.num_kv_heads, slots, size.head_dim),) * size.num_layers
    cache = KVCache(keys, keys, shape(1, slots, dtype=bool))

    def run(params: Any, *args: Any) -> Any:
        return decoder.apply({"params": params}, *args, method="extend")

    args = (shape(1, new, size.width), ids, valid, cache, shape(dtype=jnp.int32))
    return dot_flops(run, decoder_shapes(size, 50, "loop"), *args)


def test_the_counter_agrees_with_the_compiler() -> None:
    """Where there is nothing but matrix products, XLA's own figure is the same."""

    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("bij,bjk->bik", x, y)

    args = (shape(3, 4, 5), shape(3, 5, 6))
    cost = jax.jit(products).lower(*args).compile().cost_analysis()
    assert dot_flops(products, *args) == cost["flops"] == 2 * 3 * 4 * 5 * 6

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=7)[0]

    assert dot_flops(looped, shape(4, 4)) == 7 * 2 * 4**3


# One of each family, and the toys; all others are rows of the same formula.
COUNTED = {name: size for name, size in SIZES.items() if name.startswith("toy")}
COUNTED |= {name: SIZES[name] for name in ("qwen1.5-0.5b", "qwen3-0.6b", "smollm2-135m")} | {"small": SMALL}


@pytest.mark.parametrize("size", COUNTED.values(), ids=COUNTED)
def test_decoder_flops_of_one_cached_token(size: DecoderSize) -> None:
    for context in (0, 17):
        assert flops.decoder_flops(size, 1, context) == extend_flops(size, 1, context + 1)


def test_decoder_flops_of_many_tokens_are_those_of_each_behind_the_others() -> None:
    one_by_one = sum(extend_flops(SMALL, 1, 5 + number + 1) for number in range(6))
    assert flops.decoder_flops(SMALL, 6, 5) == one_by_one


def test_full_forward_differs_by_the_masked_half_of_attention_alone() -> None:
    length = 12
    decoder, ids = Decoder(SMALL, 50), shape(1, length, dtype=jnp.int32)
    args = (shape(1, length, SMALL.width), ids, ids)
    counted = dot_flops(lambda p, *a: decoder.apply({"params": p}, *a), decoder_shapes(SMALL, 50), *args)
    masked = SMALL.num_layers * 4 * SMALL.width * length * (length - 1) // 2
    assert flops.decoder_flops(SMALL, length, 0) == counted - masked


def test_head_flops() -> None:
    decoder = Decoder(SMALL, 50)
    counted = dot_flops(
        lambda p, hidden: decoder.apply({"params": p}, hidden, method="logits"),
        decoder_shapes(SMALL, 50),
        shape(1, 7, SMALL.width),
    )
    assert flops.head_flops(SMALL, 50, 7) == counted


def test_an_answer_costs_its_prefill_and_every_token_that_is_fed_back() -> None:
    prompt, generated = 9, 4
    layers = flops.decoder_flops(SMALL, prompt, 0)
    layers += sum(extend_flops(SMALL, 1, prompt + number) for number in range(1, generated))
    wanted = layers + generated * flops.head_flops(SMALL, 50, 1)
    assert flops.inference_flops(SMALL, 50, prompt, generated) == wanted
    assert flops.inference_flops(SMALL, 50, prompt, 0) == flops.decoder_flops(SMALL, prompt, 0)


def test_training_is_three_forwards() -> None:
    forward = flops.decoder_flops(SMALL, 9, 0) + flops.head_flops(SMALL, 50, 4) + 1000
    assert flops.training_flops(SMALL, 50, 9, 4, 1000) == 3 * forward


@pytest.mark.parametrize("size", [TOWER, *TOWERS.values()], ids=["other", *TOWERS])
def test_tower_flops(size: TowerSize) -> None:
    tower, layers = VisionTower(size), (size.select_layer, *size.levels)
    pixels = shape(1, size.image_size, size.image_size, 3)
    params = {"params": nn.meta.unbox(abstract_params(tower, pixels, layers=layers))}
    assert flops.tower_flops(size) == dot_flops(lambda p, x: tower.apply(p, x, layers), params, pixels)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("size", [TOWER, *TOWERS.values()], ids=["other", *TOWERS])
def test_compressor_flops(name: str, size: TowerSize) -> None:
    selected = shape(1, size.num_patches, size.width)
    features = Features(selected, shape(1, size.num_patches, size.width * len(size.levels)))
    counts = COMPRESSORS[name].counts(size.grid)
    assert len(counts) > 2 or name == "mlp"
    for visual_tokens in counts:
        module = COMPRESSORS[name].build(visual_tokens, 20)
        params = {"params": nn.meta.unbox(abstract_params(module, features, None))}
        counted = dot_flops(lambda p, f, m=module: m.apply(p, f, None)[0], params, features)
        assert flops.compressor_flops(name, visual_tokens, size, 20) == counted
    assert flops.compressor_flops(name, 0, size, 20) == 0
