"""A small model in front of a large one: its scores, its certainty, and who answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reducers.naive import Naive, Sees, best
from tests.reducers.prompts import MLP, SIZES, TEXTS, make_model, make_prompts
from vlmscale.evaluate.generation import make_generate, prompt_inputs
from vlmscale.evaluate.guided import Guidance, Guided, make_consistency, make_guide, take_rows
from vlmscale.models.ranking import share_of
from vlmscale.reducers import ReducerSpec
from vlmscale.sharding import make_mesh, put_batch

NEW, SEEING = 5, len(TEXTS) - 1  # rows with a picture
SGL = ReducerSpec("sgl", 2, 0.25, ())


@pytest.fixture(scope="module")
def small(random_params: Callable[..., Any]) -> Any:
    return params_of(random_params, "grouped")


@pytest.fixture(scope="module")
def large(random_params: Callable[..., Any]) -> Any:
    return params_of(random_params, "qwen2")


def params_of(random_params: Callable[..., Any], size: str) -> Any:
    batch = make_prompts()
    places = jnp.zeros((len(TEXTS), 1), int)
    return random_params(make_model(None, size=size), prompt_inputs(batch), places)["params"]


@pytest.fixture(scope="module")
def stop(small: Any) -> int:
    """A token with which the second row's answer ends early."""
    free = np.asarray(make_generate(make_model(None), NEW, ())(small, make_prompts()))
    token = int(free[1, 2])
    assert (free == token).any(1).sum() < len(free), "all rows end, so the test would show little"
    return token


@pytest.fixture(scope="module")
def guidance(small: Any, stop: int) -> Guidance:
    return make_guide(make_model(None), NEW, (stop,))(small, make_prompts())


def rows_of(small: Any) -> list[tuple[np.ndarray, list[int], list[int]]]:
    """Embeddings, positions and places of visual tokens of each prompt."""
    batch = make_prompts()
    embedded = make_model(None).apply({"params": small}, prompt_inputs(batch), method="embed")
    rows = []
    for row, length in enumerate(batch["valid"].sum(1)):
        visual = np.flatnonzero(batch["image_slots"][row, :length]).tolist()
        rows.append((np.asarray(embedded.embeddings)[row, :length], list(range(length)), visual))
    return rows


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Watching(Naive):
    """Keeps the attention of every layer, a matrix for the prompt and a row for each token said."""

    def layer(
        self, number: int, x: np.ndarray, positions: np.ndarray, *sees: Sees
    ) -> tuple[np.ndarray, np.ndarray]:
        y, attention = super().layer(number, x, positions, *sees)
        self.watched = [*getattr(self, "watched", []), attention.mean(0)]
        return y, attention


def test_the_guide_says_what_it_would_say_and_adds_up_its_attention(
    small: Any, stop: int, guidance: Guidance
) -> None:
    batch = make_prompts()
    plain = make_generate(make_model(None), NEW, (stop,))(small, batch)
    np.testing.assert_array_equal(guidance.ids, plain)
    assert sorted({int(count) for count in guidance.lengths}) != [NEW], "no answer ends early"
    for row, (x, positions, visual) in enumerate(rows_of(small)):
        said = np.asarray(guidance.ids)[row, : guidance.lengths[row]].tolist()
        naive = Watching(small["decoder"], SIZES["grouped"])
        answered = naive.answer(x, positions, visual, (), lambda *_: [], said[:-1])
        likely = [probabilities(logits).max() for logits in answered.logits]
        assert [int(np.argmax(logits)) for logits in answered.logits] == said
        np.testing.assert_allclose(guidance.confidence[row], np.prod(likely) ** (1 / len(said)), rtol=1e-4)
        if not visual:
            continue
        total = np.zeros(len(x))
        for matrix in naive.watched:
            rows = matrix[visual[-1] :] if len(matrix) > 1 else matrix
            total += rows.sum(0)[: len(x)]
        np.testing.assert_allclose(guidance.scores[row, visual], total[visual], rtol=1e-4)


def test_consistency_is_the_answers_probability_with_few_tokens(small: Any, guidance: Guidance) -> None:
    found = make_consistency(make_model(None))(small, make_prompts(), guidance)
    for row, (x, positions, visual) in enumerate(rows_of(small)[:SEEING]):
        said = np.asarray(guidance.ids)[row, : guidance.lengths[row]].tolist()
        scores = np.asarray(guidance.scores)[row]
        keep = best({place: scores[place] for place in visual}, 1)
        answered = Naive(small["decoder"], SIZES["grouped"]).answer(
            x, positions, visual, (0,), lambda *_, keep=keep: keep, said[:-1]
        )
        wanted = np.prod(
            [probabilities(logits)[token] for logits, token in zip(answered.logits, said, strict=True)]
        )
        np.testing.assert_allclose(found[row], wanted, rtol=1e-4)


def test_a_model_that_guides_itself_keeps_what_its_attention_says(
    small: Any, stop: int, guidance: Guidance
) -> None:
    """The tokens with the largest column sums, from layer 2 on."""
    batch = make_prompts()
    model = make_model(SGL)
    inputs = prompt_inputs(batch)
    _, cache, _ = model.apply({"params": small}, inputs, 30, guidance.scores, "masked", method="prefill")
    for row, (_, _, visual) in enumerate(rows_of(small)[:SEEING]):
        scores = np.asarray(guidance.scores)[row]
        wanted = best({place: scores[place] for place in visual}, share_of(SGL.keep, len(visual), 0))
        kept = [place for place in visual if cache.seen[1][row, place]]
        assert kept == wanted
        assert np.asarray(cache.seen[0])[row, visual].all()
    length = batch["tokens"].shape[1]
    compact = make_generate(model, NEW, (stop,))(small, batch | {"given": guidance.scores})
    masked = make_generate(model, NEW, (stop,), form="masked")(small, batch | {"given": guidance.scores})
    np.testing.assert_array_equal(compact, masked)
    assert length == MLP.visual_tokens + 9


def make_guided(small: Any, stop: int, exit_above: float, generate: Any = None, mesh: Any = None) -> Guided:
    large = make_model(SGL, size="qwen2")
    generate = generate or make_generate(large, NEW, (stop,))
    return Guided(
        make_model(None),
        small,
        generate,
        NEW,
        (stop,),
        exit_above,
        mesh or make_mesh(1, 1, 1, jax.devices()[:1]),
    )


def test_the_large_model_answers_with_the_guides_scores(
    small: Any, large: Any, stop: int, guidance: Guidance
) -> None:
    batch = jax.tree.map(jnp.asarray, make_prompts())
    reply = make_guided(small, stop, 1.0)(large, batch)
    given = batch | {"given": guidance.scores}
    wanted = make_generate(make_model(SGL, size="qwen2"), NEW, (stop,))(large, given)
    np.testing.assert_array_equal(reply.ids, wanted)
    np.testing.assert_array_equal(reply.guide_tokens, guidance.lengths)
    assert not reply.exited.any()


def test_where_the_small_model_is_certain_the_large_one_is_not_asked(
    small: Any, large: Any, stop: int, guidance: Guidance
) -> None:
    batch = jax.tree.map(jnp.asarray, make_prompts())
    consistency = make_consistency(make_model(None))(small, batch, guidance)
    certain = np.sort((np.asarray(guidance.confidence) + np.asarray(consistency)) / 2)
    asked: list[int] = []
    generate = make_generate(make_model(SGL, size="qwen2"), NEW, (stop,))

    def counting(params: Any, part: Any) -> jax.Array:
        asked.append(part["tokens"].shape[0])
        return generate(params, part)

    everyone = make_guided(small, stop, 1.0)(large, batch).ids
    reply = make_guided(small, stop, float(certain[0]) / 2, counting)(large, batch)
    assert reply.exited.all()
    assert asked == []
    np.testing.assert_array_equal(reply.ids, guidance.ids)
    for left in (1, 2, 3):  # rows that the large model is to answer
        threshold = float(certain[left - 1] + certain[left]) / 2
        reply = make_guided(small, stop, threshold, counting)(large, batch)
        assert (~reply.exited).sum() == left
        assert asked.pop() == {1: 1, 2: 2, 3: 4}[left]
        np.testing.assert_array_equal(reply.ids[reply.exited], np.asarray(guidance.ids)[reply.exited])
        np.testing.assert_array_equal(reply.ids[~reply.exited], everyone[~reply.exited])


def test_rows_that_stay_are_split_over_devices_as_before(small: Any, large: Any, stop: int) -> None:
    batch, mesh = make_prompts(rows=8), make_mesh(2, 2, 2)
    whole = jax.tree.map(jnp.asarray, batch)
    guidance = make_guide(make_model(None), NEW, (stop,))(small, whole)
    certain = np.sort(guidance.confidence + make_consistency(make_model(None))(small, whole, guidance)) / 2
    threshold = float(certain[2:4].mean())
    plain = make_guided(small, stop, threshold)(large, whole)
    assert 0 < plain.exited.sum() < 8
    with jax.set_mesh(mesh):
        spread = make_guided(small, stop, threshold, mesh=mesh)(large, put_batch(batch, mesh))
    np.testing.assert_array_equal(spread.ids, plain.ids)
    np.testing.assert_array_equal(spread.exited, plain.exited)


def test_rows_take_their_images_along() -> None:
    batch = {
        "tokens": jnp.arange(6).reshape(3, 2),
        "selected": jnp.arange(6).reshape(6, 1),
        "tower": {"w": jnp.ones(1)},
    }
    part = take_rows(batch, np.array([2, 0, 2]))
    np.testing.assert_array_equal(part["tokens"][:, 0], [4, 0, 4])
    np.testing.assert_array_equal(part["selected"][:, 0], [4, 5, 0, 1, 4, 5])
    assert part["tower"] is batch["tower"]


def test_scores_that_are_missing_are_asked_for(small: Any) -> None:
    with pytest.raises(ValueError, match="scores of a guide"):
        make_generate(make_model(SGL), 2, ())(small, make_prompts())
