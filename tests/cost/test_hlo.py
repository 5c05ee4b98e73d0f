"""FLOPs by formula, and as counted in jaxprs, against the HLO that jax lowers, with its loops unrolled."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.cost.hlo import lowered_flops
from vlmscale.compressors import COMPRESSORS, parse_options
from vlmscale.compressors.features import abstract_tower_params
from vlmscale.config import Cell, CompressorConfig, LLMConfig, TowerConfig
from vlmscale.cost import flops
from vlmscale.cost.image import Sample, compressor_call, image_flops, tower_call, tower_flops
from vlmscale.cost.training import step_flops
from vlmscale.models.decoder import REMAT, Decoder, KVCache, unstack
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize
from vlmscale.models.vision import EncoderBlock, VisionTower
from vlmscale.train.recipe import make_objective, trained_parts, training_model
from vlmscale.train.step import init_params, model_inputs
from vlmscale.weights.directory import abstract_decoder, abstract_tower

VOCAB, ROWS, TEXT, TARGETS, QUERY = 50, 2, 11, 3, 5
# Grouped keys; heads that are together as wide as the layer, narrower and wider.
DECODERS = {
    "llama": DecoderSize(48, 3, 6, 2, 56),
    "qwen2": DecoderSize(40, 2, 4, 2, 88, family="qwen2", head_dim=8, tied_embeddings=False),
    "qwen3": DecoderSize(24, 2, 4, 1, 64, family="qwen3", head_dim=16),
}
ENCODERS = {
    "siglip": TowerSize(24, 6, 32, 3, 2, 72, select_layer=2, levels=(1, 2)),
    "clip": TowerSize(26, 6, 32, 3, 2, 72, 2, (1, 2), style="clip", activation="quick_gelu"),
}
families = pytest.mark.parametrize("family", DECODERS)
styles = pytest.mark.parametrize("style", ENCODERS)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes above by name, and scans that lower to their bodies one behind the other."""
    for name, decoder in DECODERS.items():
        monkeypatch.setitem(SIZES, name, decoder)
    for name, tower in ENCODERS.items():
        monkeypatch.setitem(TOWERS, name, tower)
    monkeypatch.setattr(nn, "scan", partial(nn.scan, unroll=True))


def shape(*sides: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def integers(*sides: int) -> jax.ShapeDtypeStruct:
    return shape(*sides, dtype=jnp.int32)


def test_the_reader_of_hlo() -> None:
    """On programs whose FLOPs are plain to see."""
    square = shape(4, 4)

    def product(x: jax.Array) -> jax.Array:
        return x @ x

    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", feature_group_count=2)

    assert lowered_flops(convolved, shape(1, 4, 6, 6), shape(8, 2, 3, 3)) == 2 * 8 * 16 * 2 * 9
    assert lowered_flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), shape(3, 4, 5), shape(3, 5, 6)) == 720
    assert lowered_flops(lambda x: jax.jit(product)(product(x)), square) == 2 * 2 * 4**3
    assert lowered_flops(lambda x: jax.lax.cond(x[0, 0] > 0, product, lambda x: x, x), square) == 2 * 4**3
    assert lowered_flops(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ x, x), square) == 7 * 2 * 4**3
    until = partial(jax.lax.while_loop, lambda x: x[0, 0] > 0, product)
    assert lowered_flops(until, square, trips=5) == 5 * 2 * 4**3
    with pytest.raises(ValueError, match="only known when it runs"):
        lowered_flops(until, square)


def of_decoder(size: DecoderSize, layout: str, method: str, *inputs: Any) -> int:
    """FLOPs of one of the decoder's methods."""
    decoder = Decoder(size, VOCAB, layout=layout)

    def run(params: Any, *inputs: Any) -> Any:
        return decoder.apply({"params": params}, *inputs, method=method)

    return lowered_flops(run, nn.meta.unbox(abstract_decoder(size, VOCAB, layout)), *inputs)


@families
def test_a_decoder_s_layers_head_and_embeddings(family: str) -> None:
    size, ids = DECODERS[family], integers(ROWS, TEXT)
    states = shape(ROWS, TEXT, size.width)
    for layout in ("loop", "scan"):
        counted = of_decoder(size, layout, "__call__", states, ids, ids)
        assert counted == ROWS * flops.decoder_flops(size, TEXT, 0, causal=False)
    assert of_decoder(size, "loop", "embed", ids) == 0
    assert of_decoder(size, "loop", "logits", states) == flops.head_flops(size, VOCAB, ROWS * TEXT)


@families
@pytest.mark.parametrize("new", [1, 3])
def test_tokens_behind_a_cache(family: str, new: int) -> None:
    size, slots = DECODERS[family], 9
    keys = (shape(ROWS, size.num_kv_heads, slots, size.head_dim),) * size.num_layers
    cache = KVCache(keys, keys, (shape(ROWS, slots, dtype=bool),))
    inputs = (shape(ROWS, new, size.width), integers(ROWS, new), shape(ROWS, new, dtype=bool), cache)
    counted = of_decoder(size, "loop", "extend", *inputs, integers())
    assert counted == ROWS * flops.decoder_flops(size, new, slots - new, causal=False)


@families
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("remat", REMAT)
def test_a_decoder_s_gradient(family: str, remat: str, trained: bool) -> None:
    size, ids = DECODERS[family], integers(ROWS, TEXT)
    decoder = Decoder(size, VOCAB, remat=remat)

    def loss(params: Any, states: Any, positions: Any) -> Any:
        return decoder.apply({"params": params}, states, positions, positions).sum()

    wanted = (0, 1) if trained else 1
    params = nn.meta.unbox(abstract_decoder(size, VOCAB, "scan"))
    counted = lowered_flops(
        jax.value_and_grad(loss, argnums=wanted), params, shape(ROWS, TEXT, size.width), ids
    )
    assert counted == ROWS * flops.decoder_step_flops(size, TEXT, remat, trained=trained, causal=False)


@styles
def test_a_tower_s_patches_and_blocks(style: str) -> None:
    size = ENCODERS[style]
    tokens, width = size.num_patches + size.class_tokens, size.width
    block = EncoderBlock(size, jnp.float32, "xla")
    states = shape(1, tokens, width)
    params = jax.eval_shape(block.init, jax.random.key(0), states)
    one = 8 * tokens * width**2 + 4 * tokens * width * size.mlp_width + 4 * tokens**2 * width
    assert lowered_flops(lambda params, x: block.apply(params, x)[0], params, states) == one
    patches = 2 * size.num_patches * 3 * size.patch_size**2 * width
    tower, pixels = VisionTower(size), shape(1, size.image_size, size.image_size, 3)
    for layer in range(size.num_layers + 1):
        params = nn.meta.unbox(abstract_tower(size, (layer,)))

        def run(params: Any, pixels: Any, layer: int = layer) -> Any:
            return tower.apply({"params": params}, pixels, (layer,)).hidden

        assert lowered_flops(run, params, pixels) == patches + layer * one
    assert tower_flops(size) == patches + size.select_layer * one


@styles
@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_and_what_it_reads_of_the_tower(name: str, style: str) -> None:
    tokens = 16 if name == "mlp" else 4
    cell = tiny_cell(name, tokens, "qwen3", style)
    image = image_flops(cell, tokens, TEXT, QUERY)
    assert lowered_flops(*compressor_call(cell, tokens, TEXT).shapes()) == image.compressor > 0
    needs = COMPRESSORS[name].needs(ENCODERS[style], parse_options(name, ""))
    assert lowered_flops(*tower_call(ENCODERS[style], needs)) == image.tower


def tiny_cell(name: str, tokens: int, family: str, style: str) -> Cell:
    return Cell(compressor=CompressorConfig(name, tokens), llm=LLMConfig(family), tower=TowerConfig(style))


# Compressor, decoder, tower.
MODELS = {"pool": ("llama", "clip"), "tokenpacker": ("qwen2", "siglip"), "quecc": ("qwen3", "clip")}
models = pytest.mark.parametrize("name", MODELS)
TOKENS = 4


def model_batch(cell: Cell, rows: int = ROWS) -> dict[str, Any]:
    """A row an image, whose pixels the step gives to the tower."""
    side, length = TOWERS[cell.tower.name].image_size, TEXT + cell.compressor.visual_tokens
    of_tokens = ("tokens", "image_slots", "positions", "segment_ids")
    return {
        **{name: integers(rows, length) for name in of_tokens},
        "target_positions": integers(rows, TARGETS),
        "target_ids": integers(rows, TARGETS),
        "target_mask": shape(rows, TARGETS, dtype=bool),
        "query_tokens": integers(rows, QUERY),
        "query_length": integers(rows),
        "pixels": shape(rows, side, side, 3, dtype=jnp.uint8),
    }


def with_features(cell: Cell, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a tower's outputs in place of pixels."""
    size = TOWERS[cell.tower.name]
    needs = COMPRESSORS[cell.compressor.name].needs(size, {})
    run, params, _ = tower_call(size, needs)
    made = jax.eval_shape(run, params, shape(*batch["pixels"].shape))
    rest = {name: value for name, value in batch.items() if name != "pixels"}
    return rest | made | ({"tower": params} if "tower" in needs else {})


@cache
def model_params(name: str, tokens: int, family: str, style: str) -> dict[str, Any]:
    """Shapes of all parts' parameters."""
    cell = tiny_cell(name, tokens, family, style)
    init = partial(init_params, training_model(cell, VOCAB), seed=0)
    made: dict[str, Any] = jax.eval_shape(init, with_features(cell, model_batch(cell)))
    return made | {"tower": abstract_tower_params(TOWERS[style])}


def params_of(cell: Cell) -> dict[str, Any]:
    own = cell.compressor
    return model_params(own.name, own.visual_tokens, cell.llm.name, cell.tower.name)


def counted_step(cell: Cell, rows: int) -> int:
    """FLOPs of the loss and its gradients."""
    cell.train.loss_chunk = rows * TARGETS
    objective = make_objective(cell, training_model(cell, VOCAB))
    params, batch = params_of(cell), model_batch(cell, rows)
    trained = {part: params[part] for part in trained_parts(cell)}

    def loss(trained: Any, params: Any, batch: Any, weights: Any, step: Any) -> Any:
        return objective(params | trained, batch, weights, step)

    inputs = (trained, params, batch, shape(rows, TARGETS), integers())
    return lowered_flops(jax.value_and_grad(loss), *inputs, trips=1)


STAGES = {
    "compressor": {"llm_rate": 0.0},
    "compressor and decoder": {},
    "decoder": {"compressor_rate": 0.0},
    "all": {"tower_rate": 1.0},
}
# Every stage of every model, under the policies in turn.
STEPS = [
    (name, stage, list(REMAT)[(row + column) % len(REMAT)])
    for row, name in enumerate(MODELS)
    for column, stage in enumerate(STAGES)
]


@pytest.mark.parametrize("name, stage, remat", STEPS)
def test_a_model_s_training_step(name: str, stage: str, remat: str) -> None:
    cell = tiny_cell(name, TOKENS, *MODELS[name])
    cell.data.features, cell.train.remat = "computed", remat
    for field, value in STAGES[stage].items():
        setattr(cell.train, field, value)
    wanted = step_flops(cell, VOCAB, Sample(TEXT, TARGETS, QUERY, 1.0))
    assert counted_step(cell, ROWS) == ROWS * wanted


@pytest.mark.parametrize("name", [name for name in COMPRESSORS if name not in MODELS])
def test_every_other_compressor_s_training_step(name: str) -> None:
    """Of one image: what images share, as the projections of learned queries, a batch computes once."""
    cell = tiny_cell(name, 16 if name == "mlp" else 4, "qwen2", "siglip")
    cell.train.tower_rate = 1.0
    assert counted_step(cell, 1) == step_flops(cell, VOCAB, Sample(TEXT, TARGETS, QUERY, 1.0))


@models
def test_a_model_s_forward_pass(name: str) -> None:
    cell = tiny_cell(name, TOKENS, *MODELS[name])
    model = training_model(cell, VOCAB)
    batch = with_features(cell, model_batch(cell))

    def run(params: Any, batch: Any) -> Any:
        behind = {part: params[part] for part in ("decoder", "compressor")}
        return model.apply({"params": behind}, model_inputs(batch), batch["target_positions"])

    counted = lowered_flops(run, params_of(cell), batch)
    size = SIZES[cell.llm.name]
    layers = flops.decoder_flops(size, TEXT + TOKENS, 0, causal=False)
    head = flops.head_flops(size, VOCAB, TARGETS)
    assert counted == ROWS * (layers + head + before_the_llm(cell))


def before_the_llm(cell: Cell) -> float:
    """Compressor and pass over the question, an image."""
    image = image_flops(cell, TOKENS, TEXT, QUERY)
    full = flops.decoder_flops(SIZES[cell.llm.name], QUERY, 0, causal=False)
    return image.compressor + (full if image.query_pass else 0)


@models
def test_a_model_s_prefill_and_one_more_token(name: str) -> None:
    cell, slots = tiny_cell(name, TOKENS, *MODELS[name]), TEXT + TOKENS + 3
    size = SIZES[cell.llm.name]
    model = training_model(cell, VOCAB).clone(layout="loop")
    batch = with_features(cell, model_batch(cell))
    stacked = params_of(cell)
    params = {
        "decoder": jax.eval_shape(unstack, stacked["decoder"]),
        "compressor": stacked["compressor"],
    }
    head = flops.head_flops(size, VOCAB, 1)

    def prefill(params: Any, batch: Any) -> Any:
        return model.apply({"params": params}, model_inputs(batch), slots, method="prefill")

    layers = flops.decoder_flops(size, TEXT + TOKENS, 0, causal=False)
    assert lowered_flops(prefill, params, batch) == ROWS * (layers + head + before_the_llm(cell))

    def decode(params: Any, *inputs: Any) -> Any:
        return model.apply({"params": params}, *inputs, method="decode")

    _, cache, position = jax.eval_shape(prefill, params, batch)
    one = flops.decoder_flops(size, 1, slots - 1, causal=False)
    counted = lowered_flops(decode, params, integers(ROWS), position, cache, integers())
    assert counted == ROWS * (one + head)
