"""The vision tower and its pooling head against transformers' SigLIP, and what both styles share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from tests.golden import attention, dense, norm
from vlmscale.layers import abstract_params, init_params
from vlmscale.models.sizes import TOWERS, TowerSize
from vlmscale.models.vision import (
    ACTIVATIONS,
    STYLES,
    AttentionPool,
    EncoderBlock,
    TowerOutputs,
    VisionTower,
    bicubic_weights,
    head_weights,
    patches,
    resize_positions,
)

SIZE = TowerSize(24, 6, 32, 3, 4, 56, select_layer=3, levels=(1, 2, 3), norm_eps=1e-3)
LAYERS = tuple(range(SIZE.num_layers + 1))
# Larger, smaller, neither square, the same number of patches in another shape, and cut at both edges.
RESOLUTIONS = [(42, 42), (12, 12), (18, 54), (48, 12), (29, 40)]
Params = dict[str, Any]


def randomise(model: PreTrainedModel) -> None:
    """Draw all parameters, biases and norms too, which start as 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(around, 0.15)


def arrays(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {f"param.{name}": value.numpy() for name, value in model.state_dict().items()}


def theirs(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, 3] as torch has it."""
    return torch.tensor(images).permute(0, 3, 1, 2)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).standard_normal((2, height, width, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def siglip() -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=SIZE.width,
        intermediate_size=SIZE.mlp_width,
        num_hidden_layers=SIZE.num_layers,
        num_attention_heads=SIZE.num_heads,
        image_size=SIZE.image_size,
        patch_size=SIZE.patch_size,
        layer_norm_eps=SIZE.norm_eps,
        attn_implementation="eager",
    )
    model = SiglipVisionModel(config).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def weights(siglip: SiglipVisionModel) -> dict[str, np.ndarray]:
    return arrays(siglip)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return noise(24, 24)


def mlp(weights: dict[str, np.ndarray], name: str) -> Params:
    return {"up": dense(weights, f"{name}.fc1"), "down": dense(weights, f"{name}.fc2")}


def tower_params(weights: dict[str, np.ndarray], blocks: int) -> Params:
    """Theirs as ours; the patch convolution becomes a Dense over (row, column, channel)."""
    kernel = weights["param.embeddings.patch_embedding.weight"]
    params: Params = {
        "patch_embedding": {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])},
        "position_embedding": weights["param.embeddings.position_embedding.weight"],
    }
    if "param.embeddings.patch_embedding.bias" in weights:
        params["patch_embedding"]["bias"] = weights["param.embeddings.patch_embedding.bias"]
    if "param.embeddings.class_embedding" in weights:
        params["class_embedding"] = weights["param.embeddings.class_embedding"]
        params["pre_norm"] = norm(weights, "pre_layrnorm")
    for index in range(blocks):
        name = f"encoder.layers.{index}"
        heads = {letter: dense(weights, f"{name}.self_attn.{letter}_proj") for letter in "qkv"}
        params[f"block_{index}"] = {
            "attention_norm": norm(weights, f"{name}.layer_norm1"),
            "attention": heads | {"o": dense(weights, f"{name}.self_attn.out_proj")},
            "mlp_norm": norm(weights, f"{name}.layer_norm2"),
            "mlp": mlp(weights, f"{name}.mlp"),
        }
    return params


def outputs_of(model: PreTrainedModel, images: np.ndarray, interpolate: bool = False) -> Any:
    with torch.no_grad():
        return model(
            theirs(images),
            output_hidden_states=True,
            output_attentions=True,
            interpolate_pos_encoding=interpolate,
        )


def assert_same_outputs(
    size: TowerSize, model: PreTrainedModel, images: np.ndarray, interpolate: bool = False
) -> None:
    """Every hidden state and the attention of every block agree with transformers' within 1e-5."""
    params, blocks = tower_params(arrays(model), size.num_layers), tuple(range(size.num_layers))
    tower, layers = VisionTower(size), (*blocks, size.num_layers)
    ours = jax.jit(lambda x: tower.apply({"params": params}, x, layers, blocks))(images)
    wanted = outputs_of(model, images, interpolate)
    assert len(wanted.hidden_states) == len(layers)
    for layer, hidden in enumerate(wanted.hidden_states):
        assert ours.hidden[layer].shape == hidden.shape
        np.testing.assert_allclose(ours.hidden[layer], hidden, atol=1e-5, rtol=0)
    for block, attended in enumerate(wanted.attentions):
        assert_same_attention(ours, block, attended, size)


def assert_same_attention(ours: TowerOutputs, block: int, wanted: torch.Tensor, size: TowerSize) -> None:
    """The weights by head that a block's projections give agree with transformers' within 1e-5."""
    weights = head_weights(*ours.projections[block], size.num_heads)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, wanted, atol=1e-5, rtol=0)


def declared(size: TowerSize, layers: tuple[int, ...], blocks: tuple[int, ...] = ()) -> dict[str, Any]:
    """Parameter shapes of a tower, unboxed."""
    image = jax.ShapeDtypeStruct((1, size.image_size, size.image_size, 3), jnp.float32)
    tower = VisionTower(size)
    return nn.meta.unbox(abstract_params(tower, image, layers=layers, projection_layers=blocks))


def assert_all_named(params: Any) -> None:
    """Every leaf is a box with one logical axis, or None, for each dimension."""
    boxes = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    assert boxes
    for path, box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned), jax.tree_util.keystr(path)
        assert len(box.names) == box.value.ndim, jax.tree_util.keystr(path)
        assert any(box.names), jax.tree_util.keystr(path)


def test_hidden_states_and_attention_are_those_of_siglip(
    siglip: SiglipVisionModel, pixels: np.ndarray
) -> None:
    assert_same_outputs(SIZE, siglip, pixels)


def test_the_last_hidden_state_has_no_final_norm(siglip: SiglipVisionModel, pixels: np.ndarray) -> None:
    """LLaVA's `vision_feature_layer` -1 is our last layer: transformers norms `last_hidden_state` alone."""
    wanted = outputs_of(siglip, pixels)
    with torch.no_grad():
        normed = siglip.post_layernorm(wanted.hidden_states[-1])
    torch.testing.assert_close(normed, wanted.last_hidden_state)
    assert (normed - wanted.hidden_states[-1]).abs().max() > 0.1


@pytest.mark.parametrize("height, width", RESOLUTIONS)
def test_positions_are_interpolated_as_those_of_siglip(
    siglip: SiglipVisionModel, height: int, width: int
) -> None:
    assert_same_outputs(SIZE, siglip, noise(height, width), interpolate=True)


@pytest.mark.parametrize("source, target", [(4, 7), (27, 24), (24, 27), (5, 5), (6, 1), (1, 3), (32, 50)])
def test_bicubic_weights_are_those_of_torch(source: int, target: int) -> None:
    eye = torch.eye(source).reshape(1, source, source, 1)  # a channel for each position, one column
    wanted = torch.nn.functional.interpolate(eye, size=(target, 1), mode="bicubic", align_corners=False)
    ours = bicubic_weights(source, target)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, wanted[0, :, :, 0].T, atol=1e-6)
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)


def test_the_same_grid_keeps_its_positions() -> None:
    table = jnp.asarray(noise(4, 4)[0].reshape(16, 3))
    assert resize_positions(table, 4, 4) is table
    assert np.abs(resize_positions(table, 2, 8) - table).max() > 0.1  # as many patches, another grid


def test_pixels_that_do_not_fill_a_patch_are_cut_off(siglip: SiglipVisionModel) -> None:
    """As 384 = 27 x 14 + 6 in SigLIP-so400m-384."""
    size = replace(SIZE, image_size=27)
    assert (size.grid, size.num_patches) == (4, 16)
    assert_same_outputs(size, siglip, noise(27, 27), interpolate=True)
    cut = declared(size, (1,)), declared(SIZE, (1,))
    assert jax.tree.map(lambda x: x.shape, cut[0]) == jax.tree.map(lambda x: x.shape, cut[1])


def head_params(weights: dict[str, np.ndarray]) -> Params:
    return {
        "final_norm": norm(weights, "post_layernorm"),
        "probe": weights["param.head.probe"],
        "attention": attention(weights, "head.attention"),
        "mlp_norm": norm(weights, "head.layernorm"),
        "mlp": mlp(weights, "head.mlp"),
    }


def test_pooling_head_is_that_of_siglip(
    siglip: SiglipVisionModel, weights: dict[str, np.ndarray], pixels: np.ndarray
) -> None:
    variables, wanted = {"params": head_params(weights)}, outputs_of(siglip, pixels)
    ours = jax.jit(AttentionPool(SIZE).apply)(variables, wanted.hidden_states[-1].numpy())
    np.testing.assert_allclose(ours, wanted.pooler_output, atol=1e-5, rtol=0)


def test_the_probes_attention_needs_no_more_of_the_head_than_that(weights: dict[str, np.ndarray]) -> None:
    hidden = np.random.default_rng(0).standard_normal((2, SIZE.num_patches, SIZE.width), np.float32)
    pool = AttentionPool(SIZE)
    shapes = nn.meta.unbox(abstract_params(pool, hidden, method="probe_attention"))
    assert set(shapes) == {"final_norm", "probe", "attention"}
    assert set(shapes["attention"]) == {"q", "k"}
    whole = head_params(weights)
    params = whole | {"attention": {letter: whole["attention"][letter] for letter in "qk"}}
    params = {name: params[name] for name in shapes}
    given = pool.apply({"params": params}, hidden, method="probe_attention")
    assert (given.shape, given.dtype) == ((2, hidden.shape[1]), jnp.float32)
    np.testing.assert_allclose(given.sum(1), 1, atol=1e-6)


def test_only_what_is_asked_for_comes_back(weights: dict[str, np.ndarray], pixels: np.ndarray) -> None:
    variables, tower = {"params": tower_params(weights, 3)}, VisionTower(SIZE)
    out = tower.apply(variables, pixels, (3, 0), (1,))
    assert (set(out.hidden), set(out.projections)) == ({0, 3}, {1})
    plain = tower.apply(variables, pixels, (3,))
    assert plain.projections == {}
    np.testing.assert_array_equal(plain.hidden[3], out.hidden[3])


def test_blocks_that_nothing_asked_for_needs_are_not_there(
    weights: dict[str, np.ndarray], pixels: np.ndarray
) -> None:
    def blocks(layers: tuple[int, ...], attended: tuple[int, ...] = ()) -> list[str]:
        return [name for name in declared(SIZE, layers, attended) if name.startswith("block")]

    assert blocks((0,)) == []
    assert blocks((1, 2)) == ["block_0", "block_1"]
    assert blocks((2,), (0, 1)) == ["block_0", "block_1"]
    assert blocks((), (1,)) == ["block_0", "block_1"]
    params = tower_params(weights, 3)
    params["block_2"] = jax.tree.map(lambda x: x * np.nan, params["block_2"])
    out = jax.jit(lambda x: VisionTower(SIZE).apply({"params": params}, x, (2,), (1,)))(pixels)
    assert np.isfinite(out.hidden[2]).all()


def test_a_block_of_which_only_attention_is_asked_has_no_more_than_that(
    siglip: SiglipVisionModel, weights: dict[str, np.ndarray], pixels: np.ndarray
) -> None:
    shapes = declared(SIZE, (1,), (2, 0))
    assert set(shapes["block_1"]) == {"attention_norm", "attention", "mlp_norm", "mlp"}
    assert set(shapes["block_2"]) == {"attention_norm", "attention"}
    assert set(shapes["block_2"]["attention"]) == {"q", "k"}
    params = tower_params(weights, 3)
    params["block_2"]["attention"] = {letter: params["block_2"]["attention"][letter] for letter in "qk"}
    del params["block_2"]["mlp_norm"], params["block_2"]["mlp"]
    out = jax.jit(lambda x: VisionTower(SIZE).apply({"params": params}, x, (1,), (2, 0)))(pixels)
    assert (set(out.hidden), set(out.projections)) == ({1}, {0, 2})
    wanted = outputs_of(siglip, pixels).attentions
    for block in (0, 2):
        assert_same_attention(out, block, wanted[block], SIZE)


def test_projections_have_their_bias_and_no_scale(
    siglip: SiglipVisionModel, weights: dict[str, np.ndarray], pixels: np.ndarray
) -> None:
    """They are what `q_proj` and `k_proj` return."""
    seen: dict[str, torch.Tensor] = {}
    attention = siglip.encoder.layers[1].self_attn
    hooks = [
        layer.register_forward_hook(lambda module, given, made, name=name: seen.update({name: made}))
        for name, layer in (("queries", attention.q_proj), ("keys", attention.k_proj))
    ]
    outputs_of(siglip, pixels)
    for hook in hooks:
        hook.remove()
    ours = VisionTower(SIZE).apply({"params": tower_params(weights, 2)}, pixels, (), (1,)).projections[1]
    for name, wanted in seen.items():
        np.testing.assert_allclose(getattr(ours, name), wanted, atol=1e-5, rtol=0)


def test_rows_of_attention_can_be_had_alone(weights: dict[str, np.ndarray], pixels: np.ndarray) -> None:
    made = VisionTower(SIZE).apply({"params": tower_params(weights, 2)}, pixels, (), (1,)).projections[1]
    whole = head_weights(*made, SIZE.num_heads)
    rows = head_weights(made.queries[:, 3:5], made.keys, SIZE.num_heads)
    np.testing.assert_allclose(rows, whole[:, :, 3:5], atol=1e-6)


def test_a_context_is_seen_and_stays_as_it_is(weights: dict[str, np.ndarray]) -> None:
    """Tokens beside a context come out as from one pass over both, and the context is not run."""
    rng = np.random.default_rng(0)
    context, x = (rng.standard_normal((2, count, SIZE.width), np.float32) for count in (5, 3))
    block, params = EncoderBlock(SIZE, jnp.float32, "xla"), tower_params(weights, 1)["block_0"]

    @jax.jit
    def run(x: np.ndarray, context: np.ndarray | None = None) -> jax.Array:
        return block.apply({"params": params}, x, context=context)[0]

    alone, joint = run(x, context), run(np.concatenate([context, x], 1))
    assert alone.shape == x.shape
    np.testing.assert_allclose(alone, joint[:, 5:], atol=1e-5, rtol=0)
    assert np.abs(alone - run(x)).max() > 0.01


def test_bfloat16_is_close_to_float32(weights: dict[str, np.ndarray], pixels: np.ndarray) -> None:
    variables = {"params": tower_params(weights, 3)}
    full, half = (
        VisionTower(SIZE, dtype).apply(variables, noise(42, 24), (0, 3), (2,))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    for layer in (0, 3):
        assert half.hidden[layer].dtype == jnp.bfloat16
        error = np.asarray(half.hidden[layer].astype(jnp.float32) - full.hidden[layer])
        assert error.std() < 0.02 * np.asarray(full.hidden[layer]).std()
    assert half.projections[2].keys.dtype == jnp.bfloat16
    shares = [head_weights(*out.projections[2], SIZE.num_heads) for out in (half, full)]
    assert shares[0].dtype == jnp.float32
    np.testing.assert_allclose(*shares, atol=0.05)


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_says_on_which_axes_it_lies(style: str) -> None:
    size = replace(SIZE, style=style)
    image = jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32)
    params = abstract_params(VisionTower(size), image, layers=(2,), projection_layers=(2,))
    assert_all_named(params)
    assert params["position_embedding"].names == ("position", "embed")
    assert params["patch_embedding"]["kernel"].names == ("patch", "embed")
    block = params["block_0"]
    assert {block["attention"][letter]["kernel"].names for letter in "qkv"} == {("embed", "heads")}
    assert block["attention"]["o"]["kernel"].names == ("heads", "embed")
    assert block["mlp"]["up"]["kernel"].names == ("embed", "mlp")
    assert block["mlp"]["down"]["kernel"].names == ("mlp", "embed")


def test_every_parameter_of_the_head_says_on_which_axes_it_lies() -> None:
    hidden = jax.ShapeDtypeStruct((1, SIZE.num_patches, SIZE.width), jnp.float32)
    params = abstract_params(AttentionPool(SIZE), hidden)
    assert_all_named(params)
    assert params["probe"].names == (None, None, "embed")


def test_fresh_parameters_are_plain_arrays_that_the_tower_takes(pixels: np.ndarray) -> None:
    tower = VisionTower(SIZE)
    params = init_params(tower, jax.random.key(0), pixels, layers=(3,))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert np.isfinite(tower.apply({"params": params}, pixels, (3,)).hidden[3]).all()


@pytest.mark.parametrize(
    "changes, shape, layers, blocks, message",
    [
        ({}, (24, 24), (4,), (), "no layer 4: the tower has 0 to 3"),
        ({}, (24, 24), (-1,), (), "no layer -1"),
        ({}, (24, 24), (1,), (3,), "no projections of block 3: the tower has 0 to 2"),
        ({}, (24, 5), (1,), (), r"\(24, 5\) pixels hold no patch of 6 x 6"),
        ({"style": "dino"}, (24, 24), (1,), (), "unknown style 'dino'; there are siglip, clip"),
        ({"activation": "relu"}, (24, 24), (1,), (), "unknown activation 'relu'; there are gelu_tanh, gelu"),
    ],
)
def test_what_cannot_be_is_said(
    changes: dict[str, str],
    shape: tuple[int, int],
    layers: tuple[int, ...],
    blocks: tuple[int, ...],
    message: str,
) -> None:
    image = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    tower = VisionTower(replace(SIZE, **changes))
    with pytest.raises(ValueError, match=message):
        abstract_params(tower, image, layers=layers, projection_layers=blocks)


def test_patches_of_siglip_are_all_there_is(pixels: np.ndarray) -> None:
    hidden = jnp.ones((2, SIZE.num_patches, SIZE.width))
    assert patches(hidden, SIZE).shape == hidden.shape


@pytest.mark.parametrize("size", TOWERS.values(), ids=TOWERS)
def test_table_rows_are_consistent(size: TowerSize) -> None:
    assert size.width % size.num_heads == 0
    assert all(0 <= layer <= size.num_layers for layer in (size.select_layer, *size.levels))
    assert size.style in STYLES
    assert size.activation in ACTIVATIONS
