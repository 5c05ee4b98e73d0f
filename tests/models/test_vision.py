"""The vision tower and its pooling head against transformers' SigLIP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.golden import attention, dense, norm
from vlmscale.models.vision import TOWERS, AttentionPool, TowerSize, VisionTower

SIZE = TowerSize(24, 6, 32, 3, 4, 56, select_layer=3, levels=(1, 2, 3), norm_eps=1e-3)


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
    )
    torch.manual_seed(0)
    model = SiglipVisionModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms too, which start as 0 and 1
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(around, 0.15)
    return model


@pytest.fixture(scope="module")
def weights(siglip: SiglipVisionModel) -> dict[str, np.ndarray]:
    return {f"param.{name}": value.numpy() for name, value in siglip.state_dict().items()}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)


def mlp(weights: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    return {"up": dense(weights, f"{name}.fc1"), "down": dense(weights, f"{name}.fc2")}


def tower_params(weights: dict[str, np.ndarray], blocks: int) -> dict[str, Any]:
    """Theirs as ours; the patch convolution becomes a Dense over (row, column, channel)."""
    kernel = weights["param.embeddings.patch_embedding.weight"]
    params: dict[str, Any] = {
        "patch_embedding": {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, SIZE.width),
            "bias": weights["param.embeddings.patch_embedding.bias"],
        },
        "position_embedding": weights["param.embeddings.position_embedding.weight"],
    }
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


def hidden_states(siglip: SiglipVisionModel, pixels: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        x = siglip.embeddings(torch.tensor(pixels).permute(0, 3, 1, 2))
        states = [x.numpy()]
        for layer in siglip.encoder.layers:
            x = layer(x, None)
            states.append(x.numpy())
    return states


def test_hidden_states_are_those_of_siglip(
    siglip: SiglipVisionModel, weights: dict[str, np.ndarray], pixels: np.ndarray
) -> None:
    layers = (3, 0, 2)
    params = tower_params(weights, 3)
    ours = jax.jit(lambda x: VisionTower(SIZE).apply({"params": params}, x, layers))(pixels)
    assert set(ours) == set(layers)
    wanted = hidden_states(siglip, pixels)
    for layer in layers:
        np.testing.assert_allclose(ours[layer], wanted[layer], atol=1e-5, rtol=0)


def test_pooling_head_is_that_of_siglip(
    siglip: SiglipVisionModel, weights: dict[str, np.ndarray], pixels: np.ndarray
) -> None:
    params = {
        "final_norm": norm(weights, "post_layernorm"),
        "probe": weights["param.head.probe"],
        "attention": attention(weights, "head.attention"),
        "mlp_norm": norm(weights, "head.layernorm"),
        "mlp": mlp(weights, "head.mlp"),
    }
    last = hidden_states(siglip, pixels)[-1]
    ours = jax.jit(AttentionPool(SIZE).apply)({"params": params}, last)
    with torch.no_grad():
        wanted = siglip(torch.tensor(pixels).permute(0, 3, 1, 2)).pooler_output.numpy()
    np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=0)


def test_blocks_behind_the_last_asked_for_are_not_there(
    weights: dict[str, np.ndarray], pixels: np.ndarray
) -> None:
    tower = VisionTower(SIZE)
    shapes = jax.eval_shape(lambda x: tower.init(jax.random.key(0), x, (1, 2)), jnp.asarray(pixels))
    assert [name for name in shapes["params"] if name.startswith("block")] == ["block_0", "block_1"]
    params = tower_params(weights, 3)
    params["block_2"] = jax.tree.map(lambda x: x * np.nan, params["block_2"])
    out = jax.jit(lambda x: tower.apply({"params": params}, x, (2,)))(pixels)
    assert np.isfinite(out[2]).all()


@pytest.mark.parametrize("size", TOWERS.values(), ids=TOWERS)
def test_table_rows_are_consistent(size: TowerSize) -> None:
    assert size.image_size % size.patch_size == 0
    assert size.width % size.num_heads == 0
    assert all(0 <= layer <= size.num_layers for layer in (size.select_layer, *size.levels))
