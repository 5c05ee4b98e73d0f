"""FasterVLM: which patches are kept, in which order, and that nothing else happens to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vlmscale.compressors import COMPRESSORS, Features, check_count, make_compressor
from vlmscale.errors import UserError

SIDE, CHANNELS, WIDTH = 4, 6, 5


def random_features(*fields: str, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    selected = jnp.asarray(rng.standard_normal((3, SIDE**2, CHANNELS)), jnp.float32)
    return Features(selected, **{name: jnp.asarray(rng.random((3, SIDE**2)), jnp.float32) for name in fields})


def run(features: Features, params: Any, visual_tokens: int, **options: str) -> np.ndarray:
    module = make_compressor("fastervlm", visual_tokens, WIDTH, options)
    tokens, valid = jax.jit(lambda p, f: module.apply(p, f, None))(params, features)
    assert valid.shape == tokens.shape[:2]
    assert np.all(valid)
    return np.asarray(tokens)


@pytest.fixture(scope="module")
def params(random_params: Callable[..., Any]) -> Any:
    """Parameters, the same for every V and every score."""
    return random_params(make_compressor("mlp", SIDE**2, WIDTH), random_features(), None)


def projected(params: Any, x: np.ndarray) -> np.ndarray:
    up, down = (jax.tree.map(np.asarray, params["params"][name]) for name in ("up", "down"))
    h = x @ up["kernel"] + up["bias"]
    return h * (1 + erf(h / np.sqrt(2))) / 2 @ down["kernel"] + down["bias"]


@pytest.mark.parametrize("visual_tokens", [1, 5, 15])
def test_the_highest_are_kept_in_raster_order(visual_tokens: int, params: Any) -> None:
    features = random_features("class_attention")
    tokens = run(features, params, visual_tokens)
    for row in range(3):
        scores = list(np.asarray(features.class_attention[row]))
        ranked = sorted(range(SIDE**2), key=lambda patch: -scores[patch])
        kept = sorted(ranked[:visual_tokens])
        wanted = projected(params, np.asarray(features.selected[row])[kept])
        np.testing.assert_allclose(tokens[row], wanted, atol=2e-5)


def test_with_every_patch_it_is_the_projector_alone(params: Any) -> None:
    features = random_features("class_attention")
    plain, _ = make_compressor("mlp", SIDE**2, WIDTH).apply(params, features, None)
    np.testing.assert_allclose(run(features, params, SIDE**2), plain, atol=1e-6)


def test_of_equal_scores_the_lowest_index_wins(params: Any) -> None:
    scores = np.zeros((3, SIDE**2), np.float32)
    scores[0, [3, 7, 11, 15]] = 1
    scores[1, 9] = 1
    features = random_features()._replace(class_attention=jnp.asarray(scores))
    tokens = run(features, params, 3)
    for row, kept in enumerate(([3, 7, 11], [0, 1, 9], [0, 1, 2])):
        wanted = projected(params, np.asarray(features.selected[row])[kept])
        np.testing.assert_allclose(tokens[row], wanted, atol=2e-5)


def test_scores_are_what_the_option_says(params: Any) -> None:
    fields = {"class": "class_attention", "mean": "mean_attention", "probe": "probe_attention"}
    features = random_features(*fields.values())
    tokens = {score: run(features, params, 3, score=score) for score in ("auto", *fields)}
    np.testing.assert_array_equal(tokens["auto"], tokens["class"])
    for score, field in fields.items():
        alone = random_features()._replace(class_attention=getattr(features, field))
        np.testing.assert_array_equal(tokens[score], run(alone, params, 3))
    assert len({tokens[score].tobytes() for score in fields}) == 3
    without = features._replace(class_attention=None)
    np.testing.assert_array_equal(run(without, params, 3), tokens["mean"])
    with pytest.raises(ValueError, match="FasterVLM reads class_attention"):
        run(without, params, 3, score="class")


def test_every_count_up_to_the_patches_works() -> None:
    assert COMPRESSORS["fastervlm"].counts(SIDE) == list(range(1, 17))
    with pytest.raises(UserError, match="fastervlm on 4x4 patches gives 1 to 16"):
        check_count("fastervlm", 17, SIDE)


def test_the_projector_gets_a_gradient(params: Any) -> None:
    features = random_features("class_attention")
    module = make_compressor("fastervlm", 3, WIDTH)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, features, None)[0] ** 2)))(params)
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))
