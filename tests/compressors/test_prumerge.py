"""PruMerge and PruMerge+ against the double loop that their authors wrote, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden
from vlmscale.compressors import COMPRESSORS, Features, check_count, make_compressor, parse_options
from vlmscale.compressors.prumerge import PruMergePlus
from vlmscale.errors import UserError

CHANNELS, WIDTH = 6, 5
NAMES = ("prumerge", "prumerge_plus")


def outliers_of(scores: np.ndarray) -> int:
    lower, upper = np.percentile(scores, [25, 75])
    return int(np.sum(scores > upper + 1.5 * (upper - lower)))


def chosen_of(scores: np.ndarray, adaptive: bool, plus: bool, ratio: float) -> list[int]:
    """Chosen patches of one image in order, perhaps with a patch twice."""
    patches = len(scores)
    if adaptive:
        ratio = outliers_of(scores) / patches
    top = [int(patch) for patch in np.argsort(-scores, kind="stable")[: int(patches * ratio)]]
    if not plus:
        return top
    step = int(1 / ratio)
    if adaptive:
        return top + [patch for patch in range(0, patches - 1, int(step / 3)) if patch not in top]
    return top + list(range(int(step / 2), patches - 1, step))


def merged(patches: np.ndarray, keys: np.ndarray, scores: np.ndarray, chosen: list[int]) -> np.ndarray:
    """One image: a token for each of `chosen`, and the extra one.

    Patches that are not chosen are found as released: 0 is written over the chosen indices, the list is
    sorted, and as many as there are chosen ones are cut off its front.
    """
    keys = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    left = sorted(0 if patch in chosen else patch for patch in range(len(patches)))[len(chosen) :]
    tokens = []
    for place, patch in enumerate(chosen):
        others = chosen[:place] + chosen[place + 1 :] + left
        likeness = np.array([keys[other] @ keys[patch] for other in others])
        token = patches[patch].copy()
        for nearest in np.argsort(-likeness, kind="stable")[:32]:
            token += scores[others[nearest]] * patches[others[nearest]]
        tokens.append(token)
    extra = np.zeros(patches.shape[1])
    for patch in left:
        extra += scores[patch] * patches[patch]
    return np.stack([*tokens, extra])


def class_scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    logits = queries[0] @ keys.T / np.sqrt(keys.shape[1])
    share = np.exp(logits - logits.max())
    return (share / share.sum())[1:]


def case(side: int, adaptive: bool, plus: bool, ratio: float, batch: int = 2) -> dict[str, np.ndarray]:
    """A golden file's arrays, the output from the reference above."""
    rng = np.random.default_rng(0)
    names = ("features", "keys", "queries")
    arrays = {name: rng.standard_normal((batch, side**2 + 1, CHANNELS)).astype(np.float32) for name in names}
    arrays["queries"] *= 1.5  # so that some patches stand out
    output = []
    for x, keys, queries in zip(*(arrays[name].astype(np.float64) for name in names), strict=True):
        scores = class_scores(queries, keys)
        output.append(merged(x[1:], keys[1:], scores, chosen_of(scores, adaptive, plus, ratio)))
    meta = np.array([batch, side**2, CHANNELS, adaptive, plus, ratio])
    return arrays | {"output": np.stack(output).astype(np.float32), "meta": meta}


@pytest.mark.parametrize(
    "side, plus, ratio",
    [(8, False, 1 / 8), (5, False, 0.4), (8, True, 1 / 8), (12, True, 0.05), (8, True, 0.3), (5, True, 0.2)],
)
def test_golden_files_pass(side: int, plus: bool, ratio: float, tmp_path: Path) -> None:
    arrays, twice = case(side, False, plus, ratio, batch=5), 0
    for queries, keys in zip(arrays["queries"], arrays["keys"], strict=True):
        chosen = chosen_of(class_scores(queries, keys), False, plus, ratio)
        twice += len(chosen) - len(set(chosen))
    assert bool(twice) == plus
    np.savez(tmp_path / "prumerge_fixed.npz", **arrays)
    assert golden.main([str(tmp_path / "prumerge_fixed.npz")]) == 0


@pytest.mark.parametrize("name, plus", [("prumerge_adaptive", False), ("prumerge_plus_adaptive", True)])
@pytest.mark.parametrize("side", [8, 7, 14])  # of 49 and 196 patches the released code loses one to a float
def test_golden_files_pass_with_a_count_of_their_own(
    name: str, plus: bool, side: int, tmp_path: Path
) -> None:
    arrays = case(side, True, plus, 1 / 8, batch=1)
    assert 3 < arrays["output"].shape[1] < side**2 + 1
    np.savez(tmp_path / f"{name}.npz", **arrays)
    assert golden.main([str(tmp_path / f"{name}.npz")]) == 0


def test_golden_files_fail_where_anything_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = case(4, False, True, 1 / 4)
    batch, patches, channels, _, _, ratio = right["meta"]
    swapped = right["output"].copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    for name, changed in {
        "order": {"output": swapped},
        "extra": {"output": right["output"] + np.float32(1e-4) * (np.arange(9) == 8)[:, None]},
        "plain": {"meta": np.array([batch, patches, channels, 0, 0, ratio])},
        "ratio": {"meta": np.array([batch, patches, channels, 0, 1, ratio / 2])},
        "many": {"meta": np.array([batch, patches, channels, 0, 0, 2.0])},
        "meta": {"meta": right["meta"][:5]},
    }.items():
        path = tmp_path / f"prumerge_{name}.npz"
        np.savez(path, **(right | changed))
        assert golden.main([str(path)]) == 1, name
    assert capsys.readouterr().out.count("max_abs_err=") == 2


def scored(scores: Any, **fields: Any) -> Features:
    """Features of images with these scores, to be read by "mean", and random patches and keys."""
    scores = np.asarray(scores, np.float32)
    rng = np.random.default_rng(0)
    patches, keys = rng.standard_normal((2, *scores.shape, CHANNELS)).astype(np.float32)
    keys *= 0.01  # so that the least norm to divide by would show
    given = {"keys": jnp.asarray(keys), "mean_attention": jnp.asarray(scores)} | fields
    return Features(jnp.asarray(patches), **given)


@cache
def runner(name: str, visual_tokens: int, options: tuple[tuple[str, str], ...]) -> Any:
    module = make_compressor(name, visual_tokens, WIDTH, dict(options))
    return jax.jit(lambda features: module.apply({}, features, None, method="compress"))


def compress(name: str, visual_tokens: int, features: Features, **options: str) -> tuple[np.ndarray, ...]:
    tokens, valid = map(np.asarray, runner(name, visual_tokens, tuple(options.items()))(features))
    assert (tokens.shape[1], valid.shape) == (visual_tokens, tokens.shape[:2])
    return tokens, valid


def reference(features: Features, row: int, chosen: list[int]) -> np.ndarray:
    """What the chosen patches of one image give, its scores those of "mean"."""
    arrays = (features.selected, features.keys, features.mean_attention)
    return merged(*(np.asarray(array[row], np.float64) for array in arrays), chosen)


def test_of_equals_the_lowest_index_wins() -> None:
    scores = np.full((2, 49), 1 / 64)
    scores[1, 20:] = 1 / 32
    directions = jnp.asarray(np.eye(CHANNELS, dtype=np.float32)[np.arange(98).reshape(2, 49) % 3])
    features = scored(scores, keys=directions)  # 48 others: 15 or 16 alike, then the 32 lowest of the rest
    tokens, _ = compress("prumerge", 4, features)
    for row, chosen in enumerate(([0, 1, 2], [20, 21, 22])):
        keys, x = np.asarray(directions[row]), np.asarray(features.selected[row], np.float64)
        for place, patch in enumerate(chosen):
            others = sorted(set(range(49)) - {patch}, key=lambda j: (-(keys[j] @ keys[patch]), j))
            wanted = x[patch] + scores[row][others[:32]] @ x[others[:32]]
            np.testing.assert_allclose(tokens[row, place], wanted, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_stands_out_the_extra_token_is_alone(name: str) -> None:
    features = scored(np.full((2, 49), 1 / 49))
    tokens, valid = compress(name, 9, features, count="adaptive")
    np.testing.assert_allclose(tokens[:, 0], np.asarray(features.selected).mean(1), atol=2e-5)
    assert valid.tolist() == [[True] + [False] * 8] * 2
    assert not tokens[:, 1:].any()
    fixed, _ = compress(name, 1, features)
    np.testing.assert_array_equal(fixed, tokens[:, :1])


def test_what_stands_out_is_told_by_the_quartiles() -> None:
    scores = np.arange(64) / 4096
    lower, upper = np.percentile(scores, [25, 75])
    scores[-4:] = [upper + reach * (upper - lower) for reach in (1.45, 1.49, 1.51, 1.55)]
    assert np.percentile(scores, [25, 75]).tolist() == [lower, upper]
    tokens, valid = compress("prumerge", 6, scored([scores]), count="adaptive")
    assert valid[0].tolist() == [True] * 3 + [False] * 3
    np.testing.assert_allclose(tokens[0, :3], reference(scored([scores]), 0, [63, 62]), atol=2e-5)


def peaked(*outliers: int) -> np.ndarray:
    """Scores of a 7 x 7 image in which these patches alone stand out, in this order."""
    scores = (1 + np.random.default_rng(1).random(49) / 10) / 49
    scores[list(outliers)] = np.linspace(0.5, 0.3, len(outliers))
    assert outliers_of(scores) == len(outliers)
    return scores


def test_more_outliers_than_fit_are_capped_to_the_highest() -> None:
    features = scored([peaked(30, 2, 17, 48, 5)])
    features = features._replace(keys=features.keys.at[:, 1].set(0))  # a key without a direction is like none
    tokens, valid = compress("prumerge", 4, features, count="adaptive")
    assert valid.all()
    np.testing.assert_allclose(tokens[0], reference(features, 0, [30, 2, 17]), atol=2e-5)


def test_more_spaced_patches_than_fit_are_capped_to_the_highest() -> None:
    scores = peaked(30, 2, 17, 48, 6)  # s = 3
    features = scored([scores])
    spaced = [patch for patch in range(0, 48, 3) if patch not in (30, 6)]
    kept = sorted(sorted(spaced, key=lambda patch: -scores[patch])[:4])
    tokens, valid = compress("prumerge_plus", 10, features, count="adaptive")
    assert valid.all()
    assert kept != spaced[:4]
    np.testing.assert_allclose(tokens[0], reference(features, 0, [30, 2, 17, 48, 6, *kept]), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_the_count_of_its_own_outliers(name: str) -> None:
    features = scored(np.random.default_rng(0).lognormal(size=(6, 64)) / 64)
    tokens, valid = compress(name, 65, features, count="adaptive")
    counts = set()
    for row in range(6):
        scores = np.asarray(features.mean_attention[row])
        chosen = chosen_of(scores, True, name == "prumerge_plus", 0) if outliers_of(scores) else []
        wanted = reference(features, row, chosen)
        counts.add(len(wanted))
        np.testing.assert_allclose(tokens[row, : len(wanted)], wanted, atol=2e-5)
        assert not tokens[row, len(wanted) :].any()
        assert valid[row].tolist() == [place < len(wanted) for place in range(65)]
    assert len(counts) > 2


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_do_not_influence_each_other(name: str) -> None:
    """Unlike the released code, which counts outliers over the batch."""
    features = scored([peaked(30, 2), peaked(5, 6, 7, 8, 9, 10, 11)])
    together, valid = compress(name, 50, features, count="adaptive")
    assert valid[0].sum() != valid[1].sum()
    twin = jax.tree.map(lambda array: jnp.stack([array[0], array[0]]), features)
    alone, counts = compress(name, 50, twin, count="adaptive")
    np.testing.assert_array_equal(counts[0], valid[0])
    np.testing.assert_array_equal(alone[0], together[0])


def test_padding_changes_nothing(random_params: Callable[..., Any]) -> None:
    features = scored([peaked(30, 2, 9), peaked(5, 6, 7)])
    params = random_params(make_compressor("prumerge", 4, WIDTH), features, None)

    def run(visual_tokens: int, **options: str) -> tuple[np.ndarray, ...]:
        module = make_compressor("prumerge", visual_tokens, WIDTH, options)
        return tuple(map(np.asarray, jax.jit(lambda f: module.apply(params, f, None))(features)))

    unpadded, valid = run(4)
    assert valid.all()
    for visual_tokens in (4, 50):
        tokens, valid = run(visual_tokens, count="adaptive")
        np.testing.assert_allclose(tokens[:, :4], unpadded, atol=1e-6)
        assert not tokens[:, 4:].any()
        assert valid.tolist() == [[place < 4 for place in range(visual_tokens)]] * 2


@pytest.mark.parametrize("patches", [4, 49])
@pytest.mark.parametrize("name", NAMES)
def test_every_patch_may_be_chosen(name: str, patches: int) -> None:
    scores = np.random.default_rng(0).random((1, patches)) / patches
    features = scored(scores)
    visual_tokens = COMPRESSORS[name].counts(round(patches**0.5))[-1]
    chosen = list(np.argsort(-scores[0]))
    if name == "prumerge_plus":
        spaced = visual_tokens // 2
        chosen = chosen[: visual_tokens - 1 - spaced]
        chosen += [int((place + 0.5) * patches / spaced) for place in range(spaced)]
        assert len(set(chosen)) < len(chosen)
    tokens, _ = compress(name, visual_tokens, features)
    np.testing.assert_allclose(tokens[0], reference(features, 0, chosen), atol=2e-5)


@pytest.mark.parametrize("patches", [64, 576, 729])
def test_spaced_patches_span_the_picture(patches: int) -> None:
    for visual_tokens in range(3, patches + 2):
        spaced = PruMergePlus(visual_tokens, WIDTH)._spaced(patches)
        assert len(spaced) == len(set(spaced)) == visual_tokens // 2
        share = patches / len(spaced)
        assert 0 <= spaced[0] <= share
        assert patches - 1 - share <= spaced[-1] < patches
    assert PruMergePlus(145, WIDTH)._spaced(576) == list(range(4, 573, 8))


def test_scores_are_what_the_option_says() -> None:
    rng = np.random.default_rng(0)
    mean, probe = rng.random((2, 1, 25)).astype(np.float32) / 25
    keys = jnp.asarray(rng.standard_normal((1, 26, CHANNELS)), jnp.float32)
    query = jnp.asarray(rng.standard_normal((1, CHANNELS)), jnp.float32)
    full = scored(mean, probe_attention=jnp.asarray(probe), keys=keys, class_query=query)
    by_class = class_scores(np.asarray(query, np.float64), np.asarray(keys[0], np.float64))
    for option, scores in {"auto": by_class, "probe": probe[0]}.items():
        plain = full._replace(keys=keys[:, 1:], mean_attention=jnp.asarray(scores[None], jnp.float32))
        wanted = reference(plain, 0, list(np.argsort(-scores)[:3]))
        np.testing.assert_allclose(compress("prumerge", 4, full, score=option)[0][0], wanted, atol=2e-5)
    without = full._replace(class_query=None)
    wanted = compress("prumerge", 4, full, score="mean")
    np.testing.assert_array_equal(compress("prumerge", 4, without)[0], wanted[0])
    with pytest.raises(ValueError, match="PruMerge reads class_query"):
        compress("prumerge", 4, without, score="class")
    with pytest.raises(ValueError, match="PruMerge reads keys"):
        compress("prumerge", 4, full._replace(keys=None))


def test_the_projector_gets_a_gradient(random_params: Callable[..., Any]) -> None:
    features = scored([peaked(30, 2, 9)])
    module = make_compressor("prumerge", 9, WIDTH, {"count": "adaptive"})
    params = random_params(module, features, None)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, features, None)[0] ** 2)))(params)
    assert len(jax.tree.leaves(grads)) == 4
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))


def test_counts_and_options_of_the_table() -> None:
    for name in NAMES:
        assert COMPRESSORS[name].counts(3) == list(range(1, 11))
        with pytest.raises(UserError, match=f"{name} on 8x8 patches gives 1 to 65"):
            check_count(name, 66, 8)
        assert not COMPRESSORS[name].adaptive(parse_options(name, "count=fixed"))
        assert COMPRESSORS[name].adaptive(parse_options(name, "count=adaptive,score=mean"))
