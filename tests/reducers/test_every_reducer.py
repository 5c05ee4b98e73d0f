"""What holds for every reducer: the naive reference, two exact forms, batches, meshes, and what is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reducers.naive import Answered, Choose, Naive, Sees, best
from tests.reducers.prompts import (
    ADAPTIVE,
    MLP,
    SIZES,
    SPECS,
    fastv,
    make_model,
    make_prompts,
    scheduled,
    sparse,
)
from vlmscale.evaluate.generation import make_generate, prompt_inputs
from vlmscale.evaluate.rooms import Fitting, wide_enough
from vlmscale.layers import abstract_params
from vlmscale.models.cuts import Heads, Prefix, Ranking, gather, stays
from vlmscale.models.ranking import received, share_of, shares_of
from vlmscale.models.vlm import VLM
from vlmscale.reducers import ReducerSpec, cut_layers, is_adaptive
from vlmscale.reducers.sparsity import knee, similar_patches
from vlmscale.sharding import make_mesh, place, put_batch

every_reducer = pytest.mark.parametrize("name", SPECS)
ANSWER = 32


@pytest.fixture(scope="module")
def params_of(random_params: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def make(size: str = "grouped", case: Any = MLP, name: str = "fastv") -> Any:
        batch = make_prompts(case, appended=SPECS[name].appended)
        inputs = prompt_inputs(batch)
        model = make_model(SPECS[name], case, size)
        return random_params(model, inputs, jnp.zeros((len(batch["tokens"]), 1), int))["params"]

    return make


@functools.partial(jax.jit, static_argnames=("model", "form", "steps"))
def answer(
    model: VLM,
    params: Any,
    batch: dict[str, Any],
    then: jax.Array,
    form: str = "compact",
    steps: int = ANSWER,
) -> tuple[jax.Array, Any]:
    """Logits [1 + steps, B, vocab] behind the prompt and each token of an answer [B, steps]; the cache."""
    length = batch["tokens"].shape[1]
    variables = {"params": params}
    inputs = prompt_inputs(batch)
    first, cache, position = model.apply(variables, inputs, length + steps, form=form, method="prefill")
    slots = cache.slots

    def one_more(cache: Any, step: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = model.apply(
            variables, then[:, step], position + step, cache, slots - steps + step, method="decode"
        )
        return cache, logits

    cache, rest = jax.lax.scan(one_more, cache, jnp.arange(steps))
    return jnp.concatenate([first[None], rest]), cache


def given_answers(rows: int) -> np.ndarray:
    return np.random.default_rng(7).integers(1, 23, (rows, ANSWER)).astype(np.int32)


def reference(name: str, model: VLM, params: Any, batch: dict[str, Any], row: int) -> Answered:
    """What the numpy decoder says to one row, with the method's rule written out."""
    spec = SPECS[name]
    embedded = model.apply({"params": params}, prompt_inputs(batch), method="embed")
    there = np.flatnonzero(np.asarray(embedded.segment_ids)[row])
    visual = [at for at, place in enumerate(there) if batch["image_slots"][row, place]]
    if spec.name == "sparsity_similarity":
        rule = naive_sparsity(model)
    elif spec.name == "voco":
        rule = naive_voco(model, visual)
    elif spec.name == "atp":
        rule = naive_atp(model, params, there, visual)
    else:
        rule = naive_shares(spec, visual)
    return Naive(params["decoder"], model.decoder_size).answer(
        np.asarray(embedded.embeddings)[row, there],
        np.asarray(embedded.positions)[row, there].tolist(),
        visual,
        rule.cuts,
        rule.choose,
        given_answers(len(batch["tokens"]))[row].tolist(),
        rule.sees,
    )


class Rule(NamedTuple):
    """A method as on paper: layers in front of which it drops, what stays, and what is seen at all."""

    cuts: Sequence[int]
    choose: Choose
    sees: Sees = lambda query, key: True


def naive_shares(spec: ReducerSpec, visual: list[int]) -> Rule:
    """A share in each layer, by the attention of the layer in front."""
    by_last = spec.score == "last"
    shares = {spec.layer: spec.keep} if spec.name == "fastv" else dict(enumerate(spec.schedule))
    if spec.name == "fastv":
        cuts: Sequence[int] = [spec.layer]
    else:
        cuts = [layer for layer in shares if layer and shares[layer] < shares[layer - 1]]

    def choose(cut: int, attention: np.ndarray | None, places: list[int]) -> list[int]:
        assert attention is not None
        mean = attention.mean(0)
        np.fill_diagonal(mean, mean.diagonal() if by_last else 0)
        scores = mean[-1] if by_last else mean.sum(0)
        count = max(int(shares[cuts[cut]] * len(visual) + 0.5), 1)
        return best({place: scores[place] for place in places}, count)

    return Rule(cuts, choose)


def naive_sparsity(model: VLM) -> Rule:
    """The second cut: at the knee of what the text behind the picture looks at."""
    assert model.reducer is not None

    def choose(cut: int, attention: np.ndarray | None, places: list[int]) -> list[int]:
        assert attention is not None
        if not places:
            return []
        mean = attention.mean(0)
        text = [at for at in range(len(mean)) if at not in places and at > places[0]]
        scores = {place: float(mean[text, place].sum()) for place in places}
        return best(scores, knee_of(sorted(scores.values(), reverse=True)))

    return Rule([model.reducer.layer], choose)


def naive_voco(model: VLM, visual: list[int]) -> Rule:
    """Behind the last compression token the picture is hidden."""
    picture = visual[: -model.appended]

    def sees(query: int, key: int) -> bool:
        return key not in picture or query <= visual[-1]

    return Rule([], lambda cut, attention, places: places, sees)


def naive_atp(model: VLM, params: Any, there: np.ndarray, visual: list[int]) -> Rule:
    """Thresholds from what picture and question look at; a token stays for its score or for its place."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["reducing"])
    side = int(model.visual_tokens**0.5)
    alive = list(visual)

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    def choose(cut: int, attention: np.ndarray | None, places: list[int]) -> list[int]:
        assert attention is not None
        if not places:
            return []
        mean = attention.mean(0)
        text = [at for at in range(len(mean)) if at not in places and at > places[0]]
        scores, shares = np.zeros(len(places)), []
        for asking in (places, text):
            got = np.array([mean[asking, place].sum() for place in places])
            shares.append(got.sum() / max(len(asking), 1e-6))
            scores += got / (got + got.mean()) / 2
        important, sampled = sigmoid(np.array(shares) @ p["mix"][cut] @ p["threshold"][cut] + p["bias"][cut])
        kept = []
        for at, token in enumerate(places):
            rank = int(there[alive[at]]) - 2
            by_place = 0.25 if rank // side % 2 == 0 and rank % side % 2 == 0 else 0.0
            if scores[at] > important or by_place > sampled:
                kept.append(token)
        alive[:] = [alive[places.index(token)] for token in kept]
        return kept

    return Rule(cut_layers(SPECS["atp"], model.decoder_size.num_layers), choose)


def knee_of(falling: list[float]) -> int:
    """How many lie up to the point farthest below the chord."""
    first, last, steps = falling[0], falling[-1], max(len(falling) - 1, 1)
    below = [first + (last - first) * at / steps - value for at, value in enumerate(falling)]
    return int(np.argmax(below)) + 1 if max(below) > 1e-6 * max(abs(first), abs(last)) else len(falling)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9), st.integers(0, 3))
def test_a_curve_is_cut_at_its_knee(scores: list[float], hidden: int) -> None:
    padded = np.array([[*scores, *[5.0] * hidden]], np.float32)
    counted = np.arange(padded.shape[1])[None] < len(scores)
    falling = np.sort(padded[0, : len(scores)])[::-1].astype(float).tolist()
    steps = max(len(falling) - 1, 1)
    below = [falling[0] + (falling[-1] - falling[0]) * at / steps - value for at, value in enumerate(falling)]
    found = int(knee(jnp.asarray(padded), jnp.asarray(counted))[0])
    # Points equally far below but for rounding may be told apart either way.
    assert 1 <= found <= len(scores)
    assert below[found - 1] >= max(below) - 1e-5 or max(below) < 1e-5


def test_curves_with_knees() -> None:
    rows = np.array([[9, 8, 1, 0.5, 0], [0, 1, 2, 3, 4], [1, 1, 1, 1, 1], [1, 1, 1, 0, 1]], np.float32)
    found = knee(jnp.asarray(rows), jnp.ones(rows.shape, bool))
    np.testing.assert_array_equal(found, [3, 5, 5, 5])
    np.testing.assert_array_equal(knee(jnp.asarray(rows[:1]), jnp.zeros((1, 5), bool)), [0])


def test_patches_unlike_the_mean_stay_out(params_of: Callable[..., Any]) -> None:
    patches = np.concatenate([np.tile([[1.0, 0.1]], (4, 1)), np.tile([[0.1, 1.0]], (2, 1))])[None]
    np.testing.assert_array_equal(similar_patches(jnp.asarray(patches)), [[1, 1, 1, 1, 1, 0]])
    params, batch = params_of(), make_prompts()
    inputs = prompt_inputs(batch)
    counts = make_model(sparse()).apply({"params": params}, inputs, method="visual_counts")
    chosen = np.asarray(similar_patches(inputs.features.selected))
    np.testing.assert_array_equal(counts, chosen.sum(1))
    assert 1 <= counts.min() < 16
    embedded = make_model(sparse()).apply({"params": params}, inputs, method="embed")
    seen = np.asarray(embedded.segment_ids > 0) & (batch["image_slots"] > 0)
    np.testing.assert_array_equal(seen.sum(1)[:3], counts[:3])


def test_rooms_are_learned_and_what_does_not_fit_is_said_again(params_of: Callable[..., Any]) -> None:
    params, batch = params_of(), jax.tree.map(jnp.asarray, make_prompts())
    model, mesh = make_model(sparse(2, patches="all")), make_mesh(1, 1, 1, jax.devices()[:1])
    wanted = make_generate(model, 4, (), form="masked")(params, batch)
    fitting = Fitting(model, 4, (), mesh)
    first = fitting(params, batch)
    most = int(first.kept.max())
    assert fitting.rooms == (most,) != (16,)
    assert first.kept[3, 0] == 0, "the last has no picture"
    for rooms in ((most,), (1,)):
        fitting.rooms = rooms
        again = fitting(params, batch)
        np.testing.assert_array_equal(again.ids, wanted)
        np.testing.assert_array_equal(again.kept, first.kept)
        assert fitting.rooms == (most,)
    assert wide_enough([100, 31, 40], 576) == (108, 72, 72)
    assert wide_enough([0], 16) == (1,)


@every_reducer
@pytest.mark.parametrize(
    "size, case, form",
    [
        ("grouped", MLP, "compact"),
        ("grouped", MLP, "masked"),
        ("qwen2", MLP, "compact"),
        ("qwen3", MLP, "masked"),
        ("grouped", ADAPTIVE, "compact"),
    ],
    ids=["grouped", "masked", "qwen2", "qwen3", "adaptive"],
)
def test_kept_tokens_and_logits_are_those_of_the_naive_decoder(
    name: str, size: str, case: Any, form: str, params_of: Callable[..., Any]
) -> None:
    """Prompts of four lengths, one without a picture; 32 tokens behind each."""
    if SPECS[name].patches is not None and case is not MLP:
        pytest.skip("patches=similar is for mlp alone, and refused elsewhere")
    model, params = make_model(SPECS[name], case, size), params_of(size, case, name)
    batch = make_prompts(case, appended=model.appended)
    rows = len(batch["tokens"])
    logits, cache = answer(model, params, batch, given_answers(rows), form)
    for row in range(rows):
        wanted = reference(name, model, params, batch, row)
        assert len(wanted.kept) == len(cache.seen) - 1
        np.testing.assert_allclose(logits[:, row], wanted.logits, atol=2e-5)
        held = [int(part[row].sum()) for part in cache.seen]
        cuts = cuts_of(model)
        of_layer = [held[sum(cut <= layer for cut in cuts)] for layer in range(SIZES[size].num_layers)]
        assert of_layer == wanted.cached
        if form == "masked" and not model.appended:
            for part, kept in zip(cache.seen[1:], wanted.kept, strict=True):
                seen = np.asarray(part)[row, : batch["tokens"].shape[1]]
                before = np.cumsum(np.asarray(cache.seen[0])[row, : len(seen)]) - 1
                found = before[np.flatnonzero(seen & (batch["image_slots"][row] > 0))]
                np.testing.assert_array_equal(found, kept)
    if form == "compact" and not is_adaptive(SPECS[name]) and not model.appended:
        assert cache.k[-1].shape[2] < cache.k[0].shape[2]


def cuts_of(model: VLM) -> tuple[int, ...]:
    assert model.reducer is not None
    return cut_layers(model.reducer, model.decoder_size.num_layers)


@every_reducer
def test_a_row_does_not_depend_on_its_batch(name: str, params_of: Callable[..., Any]) -> None:
    model, params = make_model(SPECS[name]), params_of(name=name)
    batch = make_prompts(appended=model.appended)
    then = given_answers(len(batch["tokens"]))
    whole, _ = answer(model, params, batch, then)
    for row in range(len(then)):
        alone = {key: values[row : row + 1] for key, values in batch.items()}
        one, _ = answer(model, params, alone, then[row : row + 1])
        np.testing.assert_allclose(one[:, 0], whole[:, row], atol=1e-5)


@every_reducer
def test_rows_and_weights_may_be_split(name: str, params_of: Callable[..., Any]) -> None:
    model, params = make_model(SPECS[name]), params_of(name=name)
    batch = make_prompts(rows=8, appended=model.appended)
    wanted, _ = answer(model, params, batch, given_answers(8), steps=3)
    mesh = make_mesh(2, 2, 2)
    boxed = abstract_params(model, prompt_inputs(batch), jnp.zeros((8, 1), int))
    spread = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, place(boxed, mesh))
    with jax.set_mesh(mesh):
        found, _ = answer(model, spread, put_batch(batch, mesh), given_answers(8), steps=3)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("spec", [fastv(2, 1.0), fastv(4, 1.0, score="received"), scheduled(1, 1, 1)])
def test_keeping_all_is_the_plain_model_exactly(spec: ReducerSpec, params_of: Callable[..., Any]) -> None:
    params, batch = params_of(), make_prompts()
    then = given_answers(len(batch["tokens"]))
    plain, _ = answer(make_model(None), params, batch, then)
    reduced, _ = answer(make_model(spec), params, batch, then)
    np.testing.assert_array_equal(reduced, plain)


def test_a_batch_without_pictures_is_the_plain_model(params_of: Callable[..., Any]) -> None:
    params, batch = params_of(), make_prompts()
    text = {key: batch[key] for key in ("tokens", "valid")} | {"image_slots": np.zeros_like(batch["tokens"])}
    then = given_answers(len(batch["tokens"]))
    plain, _ = answer(make_model(None), params, text, then)
    reduced, _ = answer(make_model(fastv()), params, text, then)
    np.testing.assert_array_equal(reduced, plain)


def test_generation_decodes_with_what_was_kept(params_of: Callable[..., Any]) -> None:
    """`make_generate` says the same as choosing the likeliest token step by step in the masked form."""
    params, batch, new = params_of(), make_prompts(), 6
    model = make_model(fastv(1, 0.1))
    said = np.asarray(make_generate(model, new, ())(params, batch))
    plain = np.asarray(make_generate(make_model(None), new, ())(params, batch))
    assert (said != plain).any(), "dropping changes nothing, so the test would show little"
    logits, _ = answer(model, params, batch, said[:, :-1], "masked", new - 1)
    np.testing.assert_array_equal(np.argmax(logits, -1).T, said)


def prefix(valid: np.ndarray, visual: np.ndarray) -> Prefix:
    rows, length = valid.shape
    x = np.arange(rows * length, dtype=np.float32).reshape(rows, length, 1)
    positions = np.broadcast_to(np.arange(length), valid.shape)
    rank = np.zeros(valid.shape, np.int32)
    return Prefix(*map(jnp.asarray, (x, positions, valid, visual, visual.sum(1), rank)))


def test_ties_go_to_the_earlier_token_and_the_last_of_a_prompt_stays() -> None:
    valid = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]], bool)
    visual = np.array([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]], bool)
    scores = np.array([[9, 1, 1, 1, 9, 9], [9, 3, np.inf, -np.inf, 9, 9]], np.float32)
    keep = stays(prefix(valid, visual), Ranking(jnp.asarray(scores), jnp.array([2, 2])))
    np.testing.assert_array_equal(keep, [[1, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 0]])
    none = stays(prefix(valid, visual), Ranking(jnp.asarray(scores), jnp.array([0, 0])))
    np.testing.assert_array_equal(none, [[1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]])
    kept = gather(prefix(valid, visual), keep, 4)
    np.testing.assert_array_equal(kept.positions[:, :3], [[0, 1, 2], [0, 2, 3]])
    np.testing.assert_array_equal(kept.valid, [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(kept.visual, [[0, 1, 1, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(kept.whole, [3, 3])


def test_received_attention_in_blocks_is_that_of_the_whole_matrix() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 300, heads, 8)).astype(np.float32) for heads in (4, 2))
    valid = np.arange(300) < np.array([[300], [170]])
    counted = rng.random((2, 300)) < 0.5
    both = jnp.asarray(np.stack([counted, ~counted], axis=-1))
    for itself in (True, False):
        heads = Heads(jnp.asarray(q), jnp.asarray(k))
        found = received(jnp.asarray(valid), heads, jnp.asarray(counted), itself)
        two = received(jnp.asarray(valid), heads, both, itself)
        np.testing.assert_allclose(two[:, :, 0], found, atol=1e-6)
        scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, 2)) / np.sqrt(8)
        scores = np.where(np.tril(np.ones((300, 300), bool)) & valid[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        if not itself:
            weights[:, :, np.arange(300), np.arange(300)] = 0
        wanted = (weights.mean(1) * (counted & valid)[:, :, None]).sum(1)
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_shares_are_rounded_to_the_nearest() -> None:
    assert [share_of(0.5, count) for count in (1, 2, 3, 576)] == [1, 1, 2, 288]
    assert [share_of(share, 576) for share in (0.75, 0.25, 0.125, 0.05)] == [432, 144, 72, 29]
    assert share_of(0.35, 10) == 4  # 3.5; in float32 it may be below
    assert [share_of(0.05, count, 0) for count in (0, 1, 39, 40, 576)] == [0, 1, 1, 2, 28]
    counts = jnp.arange(577)
    for share in (0.35, 0.111, 0.5, 1.0):
        wanted = [share_of(share, count) for count in range(577)]
        np.testing.assert_array_equal(shares_of(share, counts, 576), wanted)
