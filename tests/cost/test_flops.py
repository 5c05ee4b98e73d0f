"""Analytic FLOPs and parameter counts against what jax says that the models compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vlmscale.compressors import COMPRESSORS
from vlmscale.config import Cell, CompressorConfig, LLMConfig
from vlmscale.cost import flops
from vlmscale.cost.count import count_flops
from vlmscale.cost.image import Sample, image_flops, sample_flops, tower_flops
from vlmscale.layers import abstract_params
from vlmscale.models.decoder import Decoder, KVCache
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize

SMALL = DecoderSize(width=24, num_layers=3, num_heads=6, num_kv_heads=2, mlp_width=40)


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
    cache = KVCache(keys, keys, (shape(1, slots, dtype=bool),))

    def run(params: Any, *args: Any) -> Any:
        return decoder.apply({"params": params}, *args, method="extend")

    args = (shape(1, new, size.width), ids, valid, cache, shape(dtype=jnp.int32))
    return count_flops(run, decoder_shapes(size, 50, "loop"), *args)


def test_the_counter_agrees_with_the_compiler() -> None:
    """Where there is nothing but matrix products, XLA's own figure is the same."""

    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("bij,bjk->bik", x, y)

    args = (shape(3, 4, 5), shape(3, 5, 6))
    cost = jax.jit(products).lower(*args).compile().cost_analysis()
    assert count_flops(products, *args) == cost["flops"] == 2 * 3 * 4 * 5 * 6

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=7)[0]

    assert count_flops(looped, shape(4, 4)) == 7 * 2 * 4**3


def test_the_counter_looks_into_every_kind_of_call() -> None:
    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", feature_group_count=2)

    args = (shape(1, 4, 6, 6), shape(8, 2, 3, 3))
    cost = jax.jit(convolved).lower(*args).compile().cost_analysis()
    assert count_flops(convolved, *args) == cost["flops"] == 2 * 8 * 16 * 2 * 9

    def product(x: jax.Array) -> jax.Array:
        return x @ x

    square = shape(4, 4)
    assert count_flops(jax.jit(jax.checkpoint(product)), square) == 2 * 4**3
    assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, product, lambda x: x, x), square) == 2 * 4**3
    assert count_flops(lambda x: (product(x), x)[1], square) == 0  # nobody reads it
    with pytest.raises(ValueError, match="only known when it runs"):
        count_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, product, x), square)


# The toys, and two layers of one row of each family; all others are rows of the same formula.
COUNTED = {name: size for name, size in SIZES.items() if name.startswith("toy")} | {"small": SMALL}
COUNTED |= {
    name: replace(SIZES[name], num_layers=2) for name in ("qwen1.5-0.5b", "qwen3-0.6b", "smollm2-135m")
}


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
    counted = count_flops(lambda p, *a: decoder.apply({"params": p}, *a), decoder_shapes(SMALL, 50), *args)
    masked = SMALL.num_layers * 4 * SMALL.width * length * (length - 1) // 2
    assert flops.decoder_flops(SMALL, length, 0) == counted - masked


def test_head_flops() -> None:
    decoder = Decoder(SMALL, 50)
    counted = count_flops(
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


def blocks_flops(size: TowerSize, blocks: int) -> int:
    """A ViT's patches and so many blocks, by the formula."""
    tokens, width = size.num_patches + size.class_tokens, size.width
    block = tokens * (8 * width**2 + 4 * width * size.mlp_width) + 4 * tokens**2 * width
    return blocks * block + 2 * size.num_patches * size.patch_size**2 * 3 * width


@pytest.mark.parametrize("name", ["scenes-48", "clip-vit-large-patch14-336", "siglip-base-patch16-224"])
def test_tower_flops(name: str) -> None:
    size = TOWERS[name]
    tokens = size.num_patches + size.class_tokens
    assert tower_flops(size) == blocks_flops(size, size.select_layer)
    assert tower_flops(size, frozenset({"levels"})) == blocks_flops(size, max(size.levels))
    if name.startswith("clip"):
        more = tower_flops(size, frozenset({"class_attention"})) - tower_flops(size)
        # Queries and keys once more, and one row of scores.
        assert 0 < more <= 4 * tokens * size.width**2 + 2 * tokens * size.width


def by_formula(name: str, visual_tokens: int, tower: TowerSize, llm_width: int) -> int:
    """The methods whose FLOPs are quickly written down."""
    width, patches = tower.width, tower.num_patches
    project = 2 * visual_tokens * (width * llm_width + llm_width**2)
    if name in ("mlp", "pool"):
        return project
    keys_values = 2 * 2 * patches * (len(tower.levels) * width * width + width * width)
    attention = 2 * 2 * patches * width**2 + 4 * patches * width
    if name == "tokenpacker":
        return keys_values + attention + 2 * visual_tokens * 3 * width**2 + project
    queries = 2 * llm_width * width + 2 * patches * 2 * width**2  # the depthwise convolution is no product
    return keys_values + attention + queries + 2 * visual_tokens * 2 * width**2 + project


def cell(name: str, visual_tokens: int, tower: str = "scenes-48", options: str = "") -> Cell:
    made = Cell(compressor=CompressorConfig(name, visual_tokens, options), llm=LLMConfig("toy-135k"))
    made.tower.name = tower
    return made


@pytest.mark.parametrize("tower", ["scenes-48", "clip-vit-large-patch14-336"])
@pytest.mark.parametrize("name", ["mlp", "pool", "tokenpacker", "quecc"])
def test_compressor_flops(name: str, tower: str) -> None:
    size, llm = TOWERS[tower], SIZES["toy-135k"]
    divisors = [n for n in COMPRESSORS[name].counts(size.grid) if size.num_patches % n == 0]
    for visual_tokens in {divisors[0], divisors[-1]}:
        counted = image_flops(cell(name, visual_tokens, tower), visual_tokens, 20, 7)
        assert counted.compressor == by_formula(name, visual_tokens, size, llm.width), visual_tokens
        assert counted.tower == tower_flops(size, frozenset({"levels"} if name[-1] in "rc" else ()))
        query = flops.decoder_flops(llm, 7, 0)
        assert counted.query_pass == (query if name == "quecc" else 0)
    assert image_flops(cell(name, 0, tower), 0, 20, 7) == (0, 0, 0)


def test_fusion_costs_grow_with_the_text() -> None:
    short, long = (image_flops(cell("llava_mini", 4), 4, text, 7).compressor for text in (10, 20))
    layer = flops.decoder_flops(replace(SIZES["toy-135k"], num_layers=1), 1, 0)
    assert long - short > 10 * 4 * layer * 0.9


def test_a_sample_costs_what_its_method_trains() -> None:
    llm = SIZES["toy-135k"]

    def decoder(visual_tokens: int) -> float:
        return flops.decoder_flops(llm, 30 + visual_tokens, 0) + flops.head_flops(llm, 50, 4)

    for name, wanted in (
        ("pool", decoder(16)),
        ("m3", decoder(16) + decoder(4) + decoder(1)),
        ("mqt", sum(map(decoder, range(2, 17, 2))) / 8),
        ("quecc", decoder(16)),
    ):
        image = image_flops(cell(name, 16), 16, 30, 7)
        counted = sample_flops(cell(name, 16), 50, Sample(30, 4, 7, 1.0))
        shared = 7 if name == "m3" else 3  # the projector forward once, backward for each of three counts
        assert counted == pytest.approx(3 * wanted + shared * image.compressor + image.query_pass), name
    assert sample_flops(cell("pool", 0), 50, Sample(30, 4, 7, 1.0)) == pytest.approx(3 * decoder(0))
    adaptive = cell("prumerge", 65, options="count=adaptive")
    few, fixed = sample_flops(adaptive, 50, Sample(30, 4, 7, 1.0), 6.0), cell("prumerge", 6)
    assert few == pytest.approx(sample_flops(fixed, 50, Sample(30, 4, 7, 1.0)), rel=0.01)
