"""What compressors are given, against transformers' CLIP and SigLIP: which block, which rows, which mean."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionConfig
from transformers import SiglipVisionModel as SiglipModel

from tests.models.test_vision import arrays, head_params, noise, outputs_of, randomise, tower_params
from vlmscale.compressors.features import Features, blocks_read, tower_features
from vlmscale.models.sizes import TowerSize

SIGLIP = TowerSize(24, 6, 32, 4, 4, 56, select_layer=2, levels=(1, 3), norm_eps=1e-3)
CLIP = replace(SIGLIP, style="clip", activation="quick_gelu")
BOTH = frozenset({"levels", "keys", "mean_attention", "stack"})
CLASS = frozenset({"class_query", "class_attention"})
SIZES = {"clip": CLIP, "siglip": SIGLIP}
IMAGES = jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.float32)
NEEDS = {"clip": BOTH | CLASS, "siglip": BOTH | {"probe_attention"}}


def make(size: TowerSize) -> PreTrainedModel:
    kind, config = (
        (CLIPVisionModel, CLIPVisionConfig) if size.class_tokens else (SiglipModel, SiglipVisionConfig)
    )
    model = kind(
        config(
            hidden_size=size.width,
            intermediate_size=size.mlp_width,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            image_size=size.image_size,
            patch_size=size.patch_size,
            layer_norm_eps=size.norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {style: make(size) for style, size in SIZES.items()}


def params_of(model: PreTrainedModel, size: TowerSize) -> dict[str, Any]:
    params = tower_params(arrays(model), size.num_layers)
    return params if size.class_tokens else params | {"head": head_params(arrays(model))}


def wanted_of(model: PreTrainedModel, size: TowerSize, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every field, from hooks and outputs of transformers."""
    seen: dict[str, torch.Tensor] = {}
    layer, first = size.select_layer, size.class_tokens
    reader = model.encoder.layers[layer if layer < size.num_layers else layer - 1].self_attn
    for name, module in (("keys", reader.k_proj), ("queries", reader.q_proj)):
        module.register_forward_hook(lambda module, given, made, name=name: seen.update({name: made}))
    out = outputs_of(model, images)
    given = out.attentions[layer - 1]
    wanted = {
        "selected": out.hidden_states[layer][:, first:],
        "levels": torch.cat([out.hidden_states[level][:, first:] for level in size.levels], -1),
        "stack": torch.stack(out.hidden_states[:layer], 1),
        "keys": seen["keys"],
        "mean_attention": given.mean(1).mean(1)[:, first:],
    }
    if first:
        wanted |= {"class_query": seen["queries"][:, 0], "class_attention": given[:, :, 0].mean(1)[:, 1:]}
    else:
        with torch.no_grad():
            normed = model.post_layernorm(out.hidden_states[-1])
            probe = model.head.probe.repeat(len(images), 1, 1)
            _, weights = model.head.attention(probe, normed, normed, need_weights=True)
        wanted["probe_attention"] = weights[:, 0]
    return {name: values.numpy() for name, values in wanted.items()}


@pytest.mark.parametrize("style", SIZES)
@pytest.mark.parametrize("layer", [2, 4], ids=["inner", "last"])
def test_every_field_is_transformers(style: str, layer: int, models: dict[str, PreTrainedModel]) -> None:
    """Keys come from the block that reads the selected layer; of the last layer from the one that made it."""
    size, images = replace(SIZES[style], select_layer=layer), noise(24, 24)
    model, needs = models[style], NEEDS[style]
    made = jax.jit(partial(tower_features, size, needs=needs))(params_of(model, size), pixels=images)
    wanted = wanted_of(model, size, images)
    assert made.keys() == wanted.keys() == {"selected"} | needs
    for name, values in wanted.items():
        assert made[name].shape == values.shape, name
        np.testing.assert_allclose(made[name], values, atol=1e-5, rtol=0, err_msg=name)


def test_the_shapes_are_those_documented() -> None:
    patches, width, layer = CLIP.num_patches, CLIP.width, CLIP.select_layer
    shapes = {
        "selected": (patches, width),
        "levels": (patches, 2 * width),
        "keys": (1 + patches, width),
        "class_query": (width,),
        "class_attention": (patches,),
        "mean_attention": (patches,),
        "stack": (layer, 1 + patches, width),
    }
    for name in shapes.keys() - {"selected"}:
        assert {key: one.shape[1:] for key, one in shaped(CLIP, {name}).items()} == {
            key: shapes[key] for key in ("selected", name)
        }
    assert shaped(SIGLIP, {"probe_attention"})["probe_attention"].shape == (2, patches)
    assert shaped(SIGLIP, {"keys"})["keys"].shape == (2, patches, width)
    assert set(Features._fields) == {*shapes, "probe_attention", "tower"}


def params_up_to(size: TowerSize, blocks: int) -> Any:
    whole = params_of(make(size), size)
    spare = {f"block_{index}" for index in range(blocks, size.num_layers)}
    return {name: part for name, part in whole.items() if name not in spare}


def shaped(size: TowerSize, needs: set[str], **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes alone, of a tower that has no more blocks than must be read."""
    params = params_up_to(size, blocks_read(size, frozenset(needs)))
    run = partial(tower_features, size, needs=frozenset(needs), **options)
    return jax.eval_shape(run, params, pixels=IMAGES)


@pytest.mark.parametrize(
    "layer, needs, blocks",
    [
        (2, set(), 2),
        (2, {"levels"}, 3),
        (2, {"mean_attention"}, 2),
        (2, {"class_attention"}, 2),
        (2, {"stack", "tower"}, 2),
        (2, {"keys"}, 3),
        (2, {"class_query"}, 3),
        (1, {"keys"}, 2),
        (4, {"keys"}, 4),
        (2, {"probe_attention"}, 4),
    ],
)
def test_no_more_blocks_are_read_than_must_be(layer: int, needs: set[str], blocks: int) -> None:
    size = replace(CLIP if needs & CLASS else SIGLIP, select_layer=layer)
    assert blocks_read(size, frozenset(needs)) == blocks
    shaped(size, needs)  # as many are enough
    if "tower" not in needs:
        fewer = params_up_to(size, blocks - 1)
        run = partial(tower_features, size, needs=frozenset(needs))
        with pytest.raises(Exception, match=f"block_{blocks - 1}"):
            jax.eval_shape(run, fewer, pixels=IMAGES)


@pytest.mark.parametrize("need, more", [("class_attention", 0), ("mean_attention", 1)])
def test_the_class_tokens_attention_is_one_row(need: str, more: int) -> None:
    """No scores of all tokens to all tokens are made but those of the blocks that run."""

    def scores(needs: set[str]) -> int:
        run = partial(tower_features, CLIP, needs=frozenset(needs))
        made = jax.make_jaxpr(lambda params, pixels: run(params, pixels=pixels))(
            params_of(make(CLIP), CLIP), IMAGES
        )
        tokens = 1 + CLIP.num_patches
        return str(made).count(f"f32[2,{CLIP.num_heads},{tokens},{tokens}] = dot_general")

    assert scores(set()) == CLIP.select_layer
    assert scores({need}) == CLIP.select_layer + more


@pytest.mark.parametrize("style", SIZES)
def test_what_a_tower_cannot_give_is_refused(style: str) -> None:
    for need in {"clip": ["probe_attention"], "siglip": sorted(CLASS)}[style]:
        with pytest.raises(ValueError, match=f"{need}: a tower of style {style} has none"):
            shaped(SIZES[style], {need})


def test_every_token_keeps_the_class_token(models: dict[str, PreTrainedModel]) -> None:
    images, params = noise(24, 24), params_of(models["clip"], CLIP)
    run = jax.jit(partial(tower_features, CLIP, needs=frozenset(), every_token=True))
    wanted = outputs_of(models["clip"], images).hidden_states[2]
    np.testing.assert_allclose(run(params, pixels=images)["selected"], wanted, atol=1e-5, rtol=0)


def test_attention_stays_float32_in_bfloat16() -> None:
    made = shaped(CLIP, {"mean_attention", "class_attention", "keys"}, dtype=jnp.bfloat16)
    assert {name: one.dtype.name for name, one in made.items()} == {
        "selected": "bfloat16",
        "keys": "bfloat16",
        "mean_attention": "float32",
        "class_attention": "float32",
    }


def test_shuffled_heads_give_the_same_scores(models: dict[str, PreTrainedModel]) -> None:
    size, images = SIZES["clip"], noise(24, 24)
    params = params_of(models["clip"], size)
    order = np.roll(np.arange(size.num_heads), 1)
    block = f"block_{size.select_layer - 1}"

    def shuffled(path: Any, leaf: jax.Array) -> jax.Array:
        names = tuple(part.key for part in path)
        if names[:2] != (block, "attention") or names[2:] == ("o", "bias"):
            return leaf
        axis = 0 if names[2] == "o" else -1
        heads = jnp.split(leaf, size.num_heads, axis)
        return jnp.concatenate([heads[head] for head in order], axis)

    other = jax.tree_util.tree_map_with_path(shuffled, params)
    needs = frozenset({"class_attention", "mean_attention", "keys"})
    run = jax.jit(partial(tower_features, size, needs=needs))
    wanted, made = run(params, pixels=images), run(other, pixels=images)
    for name in ("class_attention", "mean_attention", "selected"):
        np.testing.assert_allclose(made[name], wanted[name], atol=1e-6)
