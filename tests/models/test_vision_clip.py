"""The vision tower against transformers' CLIP: class token, first norm, quick GELU, attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import ACT2FN

from tests.models import test_vision as shared
from vlmscale.models.sizes import TowerSize
from vlmscale.models.vision import ACTIVATIONS, VisionTower, patches

SIZE = TowerSize(
    24,
    6,
    32,
    3,
    4,
    56,
    select_layer=2,
    levels=(1, 2),
    norm_eps=1e-3,
    style="clip",
    activation="quick_gelu",
)


def make(activation: str) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=SIZE.width,
        intermediate_size=SIZE.mlp_width,
        num_hidden_layers=SIZE.num_layers,
        num_attention_heads=SIZE.num_heads,
        image_size=SIZE.image_size,
        patch_size=SIZE.patch_size,
        layer_norm_eps=SIZE.norm_eps,
        hidden_act=activation,
        attn_implementation="eager",
    )
    model = CLIPVisionModel(config).eval()
    shared.randomise(model)
    return model


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModel:
    return make("quick_gelu")


@pytest.fixture(scope="module")
def params(clip: CLIPVisionModel) -> dict[str, Any]:
    return shared.tower_params(shared.arrays(clip), SIZE.num_layers)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return shared.noise(24, 24)


def test_hidden_states_and_attention_are_those_of_clip(clip: CLIPVisionModel, pixels: np.ndarray) -> None:
    shared.assert_same_outputs(SIZE, clip, pixels)


@pytest.mark.parametrize("height, width", shared.RESOLUTIONS)
def test_positions_are_interpolated_as_those_of_clip(clip: CLIPVisionModel, height: int, width: int) -> None:
    shared.assert_same_outputs(SIZE, clip, shared.noise(height, width), interpolate=True)


def test_the_last_hidden_state_has_no_final_norm(clip: CLIPVisionModel, pixels: np.ndarray) -> None:
    """Of CLIP not even `last_hidden_state` has it: only the pooled class token does."""
    wanted = shared.outputs_of(clip, pixels)
    torch.testing.assert_close(wanted.hidden_states[-1], wanted.last_hidden_state)
    with torch.no_grad():
        normed = clip.post_layernorm(wanted.hidden_states[-1])
    torch.testing.assert_close(normed[:, 0], wanted.pooler_output)
    assert (normed - wanted.hidden_states[-1]).abs().max() > 0.1


def test_layer_0_is_behind_the_first_norm(
    clip: CLIPVisionModel, params: dict[str, Any], pixels: np.ndarray
) -> None:
    with torch.no_grad():
        wanted = clip.pre_layrnorm(clip.embeddings(shared.theirs(pixels)))
    ours = VisionTower(SIZE).apply({"params": params}, pixels, (0,)).hidden[0]
    np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=0)


def test_a_class_token_stands_in_front(params: dict[str, Any], pixels: np.ndarray) -> None:
    assert SIZE.class_tokens == 1
    shapes = shared.declared(SIZE, (1,))
    assert shapes["class_embedding"].shape == (SIZE.width,)
    assert shapes["position_embedding"].shape == (1 + SIZE.num_patches, SIZE.width)
    assert set(shapes["patch_embedding"]) == {"kernel"}
    tower = VisionTower(SIZE)
    hidden = tower.apply({"params": params}, pixels, (0,)).hidden[0]
    assert hidden.shape == (2, 1 + SIZE.num_patches, SIZE.width)
    np.testing.assert_array_equal(hidden[0, 0], hidden[1, 0])  # before attention it knows no picture
    np.testing.assert_array_equal(patches(hidden, SIZE), hidden[:, 1:])
    # Nor does its position change with the resolution.
    larger = tower.apply({"params": params}, shared.noise(42, 30), (0,)).hidden[0]
    assert larger.shape == (2, 1 + 7 * 5, SIZE.width)
    np.testing.assert_allclose(larger[0, 0], hidden[0, 0], atol=1e-6)


def test_attention_alone_is_that_of_clip(
    clip: CLIPVisionModel, params: dict[str, Any], pixels: np.ndarray
) -> None:
    """The last block's attention with the features before it, as methods that read CLIP's class token do."""
    shapes = shared.declared(SIZE, (2,), (1, 2))
    assert set(shapes["block_2"]) == {"attention_norm", "attention"}
    assert set(shapes["block_2"]["attention"]) == {"q", "k"}
    out = jax.jit(lambda x: VisionTower(SIZE).apply({"params": params}, x, (2,), (1, 2)))(pixels)
    wanted = shared.outputs_of(clip, pixels).attentions
    for block in (1, 2):
        shared.assert_same_attention(out, block, wanted[block], SIZE)


def test_the_activation_matters(params: dict[str, Any], pixels: np.ndarray) -> None:
    """Checkpoints with `hidden_act` "gelu" are another network than OpenAI's; both are theirs exactly."""
    exact = replace(SIZE, activation="gelu")
    shared.assert_same_outputs(exact, make("gelu"), pixels)
    quick, other = (
        VisionTower(size).apply({"params": params}, pixels, (3,)).hidden[3] for size in (SIZE, exact)
    )
    assert np.abs(quick - other).max() > 1e-3


@pytest.mark.parametrize(
    "name, their_name",
    [("gelu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu"), ("quick_gelu", "quick_gelu")],
)
def test_activations_are_those_of_torch(name: str, their_name: str) -> None:
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    wanted = ACT2FN[their_name](torch.tensor(x))
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), wanted, atol=1e-6)


def test_bfloat16_is_close_to_float32(params: dict[str, Any], pixels: np.ndarray) -> None:
    full, half = (
        VisionTower(SIZE, dtype).apply({"params": params}, pixels, (3,), (2,))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.hidden[3].dtype == jnp.bfloat16
    error = np.asarray(half.hidden[3].astype(jnp.float32) - full.hidden[3])
    assert error.std() < 0.02 * np.asarray(full.hidden[3]).std()
    assert half.projections[2].keys.dtype == jnp.bfloat16
