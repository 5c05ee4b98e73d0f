"""Visual tokens that a picture does not give leave no trace: padded = unpadded, answers too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from vlmscale.compressors import Features
from vlmscale.evaluate.generation import make_generate, pad_prompts
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM, Inputs

SIZE = DecoderSize(width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24)
VOCAB, CAP, PATCHES, CHANNELS, IMAGE = 29, 17, 16, 8, 28
TEXT = ([3, 4], [5, 6, 7, 8, 9])  # before and behind the picture


def model(visual_tokens: int, layout: str = "scan", name: str = "prumerge") -> VLM:
    return VLM(SIZE, VOCAB, name, visual_tokens, layout=layout, options=(("count", "adaptive"),))


@pytest.fixture(scope="module")
def features() -> Features:
    """Pictures with one patch and with three that stand out."""
    rng = np.random.default_rng(0)
    scores = np.full((2, PATCHES), 0.01, np.float32)
    scores[0, 5], scores[1, [2, 3, 9]] = 0.5, 0.4
    drawn = rng.standard_normal((2, 2, PATCHES, CHANNELS)).astype(np.float32)
    return Features(drawn[0], keys=drawn[1], mean_attention=scores)


def row(features: Features, index: int) -> Features:
    return Features(*(None if value is None else value[index : index + 1] for value in features))


def inputs(features: Features, visual_tokens: int) -> Inputs:
    rows = len(features.selected)
    ids = [*TEXT[0], *[IMAGE] * visual_tokens, *TEXT[1]]
    tokens = np.tile(np.array(ids, np.int32), (rows, 1))
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (rows, 1))
    return Inputs(tokens, tokens == IMAGE, positions, np.ones_like(tokens), features)


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_logits_of_padded_slots_are_those_of_exact_ones(
    name: str, features: Features, random_params: Callable[..., Any]
) -> None:
    # From the picture's last slot on, where the text right behind it is predicted.
    behind = np.arange(-1, len(TEXT[1]))[None] + len(TEXT[0])
    wide = inputs(features, CAP)
    params = random_params(model(CAP, name=name), wide, np.tile(behind + CAP, (2, 1)))
    padded = jax.jit(model(CAP, name=name).apply)(params, wide, np.tile(behind + CAP, (2, 1)))
    counts = model(CAP, name=name).apply(params, wide, method="visual_counts").tolist()
    assert counts[0] != counts[1]
    for index, count in enumerate(counts):
        assert 1 < count < CAP
        exact = inputs(row(features, index), count)
        alone = jax.jit(model(count, name=name).apply)(params, exact, behind + count)
        np.testing.assert_allclose(padded[index], alone[0], atol=1e-5)


def test_answers_behind_padded_slots_are_those_behind_exact_ones(
    features: Features, random_params: Callable[..., Any]
) -> None:
    """Through the cache, in a batch with prompts of other lengths."""
    loop = model(CAP, "loop")
    wide = inputs(features, CAP)
    params = random_params(loop, wide, np.zeros((2, 1), int))["params"]
    counts = loop.apply({"params": params}, wide, method="visual_counts").tolist()
    prompts = [[*TEXT[0], *[IMAGE] * CAP, *TEXT[1][: 5 - 2 * index]] for index in range(2)]

    def answer(made: VLM, prompts: list[list[int]], features: Features) -> list[list[int]]:
        batch = pad_prompts(prompts, IMAGE, 0, 40)
        given = {name: value for name, value in features._asdict().items() if value is not None}
        return np.asarray(make_generate(made, 12, ())(params, batch | given)).tolist()

    together = answer(loop, prompts, features)
    assert together[0] != together[1]
    for index, count in enumerate(counts):
        shorter = [token for token in prompts[index] if token != IMAGE]
        shorter[2:2] = [IMAGE] * count
        assert answer(model(count, "loop"), [shorter], row(features, index)) == [together[index]]
