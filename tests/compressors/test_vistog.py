"""VisToG against one masked pass over image and semantic tokens together, and grouping by loops."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vlmscale.compressors import COMPRESSORS, Features, check_count, make_compressor
from vlmscale.compressors.features import tower_features
from vlmscale.compressors.vistog import through_tower
from vlmscale.errors import UserError
from vlmscale.layers import abstract_params
from vlmscale.models.sizes import TowerSize
from vlmscale.models.vision import VisionTower

SIGLIP = TowerSize(24, 6, 16, 3, 2, 24, select_layer=2, levels=(1, 2), norm_eps=1e-3)
SIZES = {"siglip": SIGLIP, "clip": replace(SIGLIP, style="clip", activation="quick_gelu", norm_eps=1e-5)}
TOKENS, WIDTH = 5, 12
Tree = dict[str, Any]


def draw(abstract: Any, seed: int) -> Any:
    """Random parameters of these shapes, biases and norms too."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> np.ndarray:
        around = 1.0 if path[-1].key == "scale" else 0.0
        return (around + 0.25 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, nn.meta.unbox(abstract))


@functools.cache
def tower_of(size: TowerSize) -> tuple[Tree, Features]:
    """Parameters of a tower, and what it makes of two pictures."""
    images = np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)
    params = draw(abstract_params(VisionTower(size), images, layers=(size.select_layer,)), 1)
    needs = COMPRESSORS["vistog"].needs(size, {})
    made = jax.jit(partial(tower_features, size, needs=needs))(params, pixels=images)
    blocks = {f"block_{index}": params[f"block_{index}"] for index in range(size.select_layer)}
    return params, Features(**made, tower=blocks)


def compressor(size: TowerSize, tokens: int = TOKENS) -> nn.Module:
    return make_compressor("vistog", tokens, WIDTH, tower_size=size)


def params_for(module: nn.Module, features: Features) -> Tree:
    return draw(abstract_params(module, features, None), 2)


def linear(x: np.ndarray, p: Tree) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0)


def norm(x: np.ndarray, p: Tree, eps: float) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * p["scale"] + p["bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def activate(x: np.ndarray, size: TowerSize) -> np.ndarray:
    if size.activation == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def masked_pass(x: np.ndarray, seen: np.ndarray, params: Tree, size: TowerSize) -> np.ndarray:
    """A plain ViT over all tokens of one image [K, C]; seen[i, j] says whether token i attends to token j."""
    for index in range(size.select_layer):
        p = params[f"block_{index}"]
        h = norm(x, p["attention_norm"], size.norm_eps)
        q, k, v = (linear(h, p["attention"][letter]) for letter in "qkv")
        mixed = np.zeros_like(x)
        for head in np.split(np.arange(size.width), size.num_heads):
            scores = q[:, head] @ k[:, head].T / np.sqrt(len(head))
            share = np.where(seen, np.exp(scores - scores.max()), 0)
            mixed[:, head] = share @ v[:, head] / share.sum(1, keepdims=True)
        x = x + linear(mixed, p["attention"]["o"])
        h = linear(norm(x, p["mlp_norm"], size.norm_eps), p["mlp"]["up"])
        x = x + linear(activate(h, size), p["mlp"]["down"])
    return x


def isolated(size: TowerSize, tower: Tree, first: np.ndarray, semantic: np.ndarray) -> np.ndarray:
    """Image tokens [T, C] and semantic ones [V, C] in one pass, the former blind to the latter."""
    count = len(first) + len(semantic)
    seen = np.ones((count, count), bool)
    seen[: len(first), len(first) :] = False
    return masked_pass(np.concatenate([first, semantic]), seen, tower, size)


def grouped(semantic: np.ndarray, patches: np.ndarray, p: Tree) -> tuple[np.ndarray, list[list[int]]]:
    """Grouping and projector of one image, a patch and a token at a time; and the patches of each token."""
    s, x = norm(semantic, p["token_norm"], 1e-5), norm(patches, p["patch_norm"], 1e-5)
    q, k, v = linear(s, p["group_q"]), linear(x, p["group_k"]), linear(x, p["group_v"])
    members: list[list[int]] = [[] for _ in s]
    for index, key in enumerate(k):
        members[int(np.argmax([query @ key for query in q]))].append(index)
    tokens = []
    for token, chosen in zip(s, members, strict=True):
        mean = v[chosen].mean(0) if chosen else np.zeros_like(token)
        token = token + linear(mean, p["group_o"])
        hidden = gelu(linear(norm(token, p["mlp_norm"], 1e-5), p["mlp_up"]))
        token = token + linear(hidden, p["mlp_down"])
        tokens.append(linear(gelu(linear(token, p["up"])), p["down"]))
    return np.stack(tokens), members


@pytest.mark.parametrize("style", SIZES)
def test_isolated_attention_is_a_mask(style: str) -> None:
    """In one pass the patches come out as without semantic tokens, and the latter as from our second pass."""
    size = SIZES[style]
    tower, features = tower_of(size)
    semantic = np.random.default_rng(3).standard_normal((TOKENS, size.width)).astype(np.float32)
    spread = jnp.broadcast_to(semantic, (2, *semantic.shape))
    ours = jax.jit(partial(through_tower, size=size))(spread, features.stack, features.tower)
    for image in range(2):
        out = isolated(size, tower, np.asarray(features.stack[image, 0]), semantic)
        behind, patches = out[-TOKENS:], out[size.class_tokens : -TOKENS]
        np.testing.assert_allclose(features.selected[image], patches, atol=2e-5, rtol=0)
        np.testing.assert_allclose(ours[image], behind, atol=2e-5, rtol=0)
        everything = np.ones((len(out), len(out)), bool)
        start = np.concatenate([features.stack[image, 0], semantic])
        mixed = masked_pass(start, everything, tower, size)
        assert np.abs(mixed[size.class_tokens : -TOKENS] - patches).max() > 0.01, (
            "no isolation, no difference"
        )


@pytest.mark.parametrize("style", SIZES)
def test_it_is_the_reference(style: str) -> None:
    size = SIZES[style]
    tower, features = tower_of(size)
    module = compressor(size)
    params = params_for(module, features)
    tokens, valid = jax.jit(partial(module.apply, text_query=None))({"params": params}, features)
    assert (tokens.shape, valid.shape, bool(valid.all())) == ((2, TOKENS, WIDTH), (2, TOKENS), True)
    for image in range(2):
        first = np.asarray(features.stack[image, 0])
        semantic = isolated(size, tower, first, params["semantic_tokens"])[-TOKENS:]
        wanted, members = grouped(semantic, np.asarray(features.selected[image]), params)
        assert sum(map(bool, members)) > 1, "all patches chose one token"
        np.testing.assert_allclose(tokens[image], wanted, atol=2e-5, rtol=0)


def loss_of(module: nn.Module, params: Tree, features: Features) -> jax.Array:
    tokens, _ = module.apply({"params": params}, features, None)
    weights = np.random.default_rng(4).standard_normal(tokens.shape)
    return jnp.sum(tokens * weights)


def test_gradient_reaches_every_parameter_and_stops_at_the_tower() -> None:
    _, features = tower_of(SIGLIP)
    module = compressor(SIGLIP)
    params = params_for(module, features)
    ours, theirs = jax.jit(jax.grad(partial(loss_of, module), (0, 1)))(params, features)
    for path, leaf in jax.tree.leaves_with_path(ours):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert (np.abs(leaf).max(0) > 0).all(), jax.tree_util.keystr(path)
    for path, leaf in jax.tree.leaves_with_path(theirs):
        assert not np.abs(leaf).any(), jax.tree_util.keystr(path)


def test_tokens_without_patches_are_finite_and_alike() -> None:
    """Scores without any difference send all patches to the first token; the others add no patch."""
    _, features = tower_of(SIGLIP)
    module = compressor(SIGLIP)
    params = params_for(module, features)
    params["group_q"]["kernel"] = np.zeros_like(params["group_q"]["kernel"])
    run = jax.jit(jax.value_and_grad(partial(loss_of, module)))
    value, grads = run(params, features)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    assert largest < 1e3, "an empty group's gradient drowns the others"
    moved = np.random.default_rng(5).standard_normal((2, 16, 16), np.float32)
    apply = jax.jit(partial(module.apply, text_query=None))
    tokens, _ = apply({"params": params}, features)
    others, _ = apply({"params": params}, features._replace(selected=features.selected + moved))
    np.testing.assert_array_equal(tokens[:, 1:], others[:, 1:])
    assert np.abs(tokens[:, 0] - others[:, 0]).max() > 0.01


def test_one_token_is_the_mean_of_all_patches_whatever_it_asks() -> None:
    _, features = tower_of(SIGLIP)
    module = compressor(SIGLIP, 1)
    params = params_for(module, features)
    run = jax.jit(partial(module.apply, text_query=None))
    first, _ = run({"params": params}, features)
    other, _ = run({"params": params | {"group_q": {"kernel": params["group_q"]["kernel"] + 1}}}, features)
    np.testing.assert_array_equal(first, other)
    order = np.random.default_rng(6).permutation(16)
    shuffled, _ = run({"params": params}, features._replace(selected=features.selected[:, order]))
    np.testing.assert_allclose(first, shuffled, atol=1e-5)


def test_bfloat16_is_close() -> None:
    """As long as the same patches are chosen: one token leaves no choice."""
    _, features = tower_of(SIGLIP)
    params = params_for(compressor(SIGLIP, 1), features)
    half = make_compressor("vistog", 1, WIDTH, tower_size=SIGLIP, dtype=jnp.bfloat16)
    tokens, full = (
        jax.jit(partial(module.apply, text_query=None))({"params": params}, features)[0]
        for module in (half, compressor(SIGLIP, 1))
    )
    assert tokens.dtype == jnp.bfloat16
    assert np.abs(tokens.astype(jnp.float32) - full).max() < 0.05 * np.abs(full).max()


def test_it_gives_any_number_up_to_the_patches_and_needs_the_tower() -> None:
    for count in (1, 7, 64):
        check_count("vistog", count, 8)
    with pytest.raises(UserError, match="vistog on 8x8 patches gives 1 to 64"):
        check_count("vistog", 65, 8)
    _, features = tower_of(SIGLIP)
    for lacking in (features._replace(stack=None), features._replace(tower=None)):
        with pytest.raises(ValueError, match="runs in the tower"):
            abstract_params(compressor(SIGLIP), lacking, None)
    with pytest.raises(ValueError, match="runs in the tower"):
        abstract_params(make_compressor("vistog", 5, WIDTH), features, None)
