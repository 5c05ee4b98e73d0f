"""Reducers that train: masks of packed rows, the soft form and its limit, budgets, caches, meshes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compressors.cases import Case, make_batch, pack, share, tower_outputs
from tests.cost.hlo import lowered_flops
from tests.reducers.prompts import LONGEST, MLP, SIZES, TEXTS, VOCAB, atp, make_model, make_prompts, voco
from tests.train.sharded_cases import MESHES, assert_same, make_setup, run_alone, run_on
from vlmscale.cost import flops
from vlmscale.cost.reduced import two_pass_flops
from vlmscale.evaluate.generation import make_generate, prompt_inputs
from vlmscale.evaluate.rooms import TwoPass
from vlmscale.models.decoder import unstack
from vlmscale.models.hiding import Passes, last_readers, sight
from vlmscale.models.vlm import VLM
from vlmscale.reducers import ReducerSpec
from vlmscale.reducers import atp as learned
from vlmscale.sharding import make_mesh
from vlmscale.train.step import Objective, model_inputs

every_spec = pytest.mark.parametrize("spec", [voco(2), atp()], ids=["voco", "atp"])


def scanned(spec: ReducerSpec, **more: Any) -> VLM:
    return make_model(spec, MLP).clone(layout="scan", **more)


def training_batch(spec: ReducerSpec) -> dict[str, Any]:
    return make_batch(Case("mlp", (), MLP.visual_tokens + spec.appended), 4, VOCAB)


@pytest.fixture(scope="module")
def params_of(random_params: Callable[..., Any]) -> Callable[[ReducerSpec], Any]:
    def make(spec: ReducerSpec) -> Any:
        batch = training_batch(spec)
        return random_params(scanned(spec), model_inputs(batch), batch["target_positions"])["params"]

    return make


@functools.partial(jax.jit, static_argnums=0)
def states(model: VLM, params: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    places = batch["target_positions"]
    return model.apply({"params": params}, model_inputs(batch), places, method="trained_states")


def test_who_sees_what_in_a_row_of_two_conversations() -> None:
    """Four images of 2 + 1 slots, text in front and between, and none behind the last."""
    slots = [0, 1, 1, 1, 0, 2, 2, 2, 0, 0, 3, 3, 3, 0, 0, 4, 4, 4]
    end = len(slots)
    found = last_readers(jnp.array([slots]), 1)
    first, second, third, fourth = 3, 7, 12, 17  # the compression tokens
    wanted = [end, first, first, end, end, second, second, end, end, end, third, third, *[end] * 3]
    np.testing.assert_array_equal(found[0], [*wanted, fourth, fourth, end])
    mask = np.asarray(sight(found))[0]
    assert mask[first, :3].all(), "a compression token sees its image"
    assert not mask[first + 1, 1:3].any()
    assert mask[first + 1 :, 0].all(), "and text is never hidden"
    assert mask[second, first], "and the second image the first's compression token"


def test_passes_are_as_long_as_the_prompts_need() -> None:
    batch = make_prompts(appended=2)
    found = Passes.of(batch["image_slots"], batch["valid"], MLP.visual_tokens, 2)
    assert found == Passes(27, 16, 16)  # 20, 4 and 7 to whole sixteens, but there are no more than 27
    text = Passes.of(np.zeros((2, 40), int), np.ones((2, 40), bool), 16, 2)
    assert text == Passes(16, 16, 40)


@pytest.mark.parametrize("tokens", [1, 2])
def test_two_passes_say_what_one_does_and_keep_no_picture(
    tokens: int, params_of: Callable[..., Any], random_params: Callable[..., Any]
) -> None:
    """Property 6: behind the compression tokens nothing of a picture is looked at, but through them."""
    model, batch = make_model(voco(tokens)), make_prompts(appended=tokens)
    inputs = prompt_inputs(batch)
    params = random_params(model, inputs, jnp.zeros((len(TEXTS), 1), int))["params"]
    wanted = make_generate(model, 8, (), form="masked")(params, batch)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    said = TwoPass(model, 8, (), mesh)(params, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(said.ids, wanted)
    np.testing.assert_array_equal(make_generate(model, 8, ())(params, batch), wanted)

    def step(cache: Any, position: Any) -> Any:
        token = jnp.arange(1, 1 + len(TEXTS))
        slot = cache.slots - 4
        return model.apply({"params": params}, token, position, cache, slot, method="decode")[0]

    length = batch["tokens"].shape[1]
    _, cache, position = model.apply({"params": params}, inputs, length + 4, form="masked", method="prefill")
    hidden = ~cache.seen[0][:, None, :, None]
    broken = cache._replace(
        k=tuple(jnp.where(hidden, 1e3, k) for k in cache.k),
        v=tuple(jnp.where(hidden, -1e3, v) for v in cache.v),
    )
    pictures = np.asarray(hidden)[:3, 0, 2 : 2 + MLP.visual_tokens, 0]
    assert pictures.all(), "pictures are hidden"
    np.testing.assert_array_equal(step(broken, position), step(cache, position))
    passes = Passes.of(batch["image_slots"], batch["valid"], MLP.visual_tokens, tokens)
    _, short, _ = model.apply({"params": params}, inputs, length + 4, rooms=passes, method="prefill")
    assert short.slots == passes.kept + passes.second + 4
    np.testing.assert_allclose(step(short, position), step(cache, position), atol=1e-5)
    other = prompt_inputs(batch | {"selected": batch["selected"][::-1]})
    changed, *_ = model.apply({"params": params}, other, length + 4, method="prefill")
    same, *_ = model.apply({"params": params}, inputs, length + 4, method="prefill")
    assert np.abs(changed - same)[:3].max() > 1e-3, "but a picture counts, through its compression tokens"


def test_two_passes_are_lowered_to_what_is_counted(random_params: Callable[..., Any]) -> None:
    model, batch, size, new = make_model(voco()), make_prompts(appended=1), SIZES["grouped"], 4
    plain, rows, length = make_model(None), len(TEXTS), LONGEST + MLP.visual_tokens
    params = random_params(model, prompt_inputs(batch), jnp.zeros((rows, 1), int))["params"]
    passes = Passes.of(batch["image_slots"], batch["valid"], MLP.visual_tokens, 1)

    def prefill(model: VLM, rooms: Any) -> Callable[..., Any]:
        return lambda params, batch: model.apply(
            {"params": params},
            prompt_inputs(batch),
            len(batch["tokens"][0]) + new,
            rooms=rooms,
            method="prefill",
        )

    def layers(new_tokens: int, context: int) -> float:
        return size.num_layers * flops.layer_flops(size, new_tokens, context, causal=False)

    whole = lowered_flops(prefill(plain, None), params, make_prompts())
    wanted = layers(passes.first, 0) + layers(passes.second, passes.kept + new)
    found = lowered_flops(prefill(model, passes), params, batch)
    assert found == whole + rows * (wanted - layers(length, 0))
    causal = two_pass_flops(size, VOCAB, 19, 1, 7, 3)
    each = flops.layer_flops(size, 19, 0) + flops.layer_flops(size, 7, 1) + flops.layer_flops(size, 2, 8)
    assert causal == size.num_layers * each + flops.head_flops(size, VOCAB, 3)


@pytest.mark.parametrize("behind", [(0, 0), (0, 3), (2, 0)])
def test_several_pictures_and_prompts_that_end_with_one(
    behind: tuple[int, int], random_params: Callable[..., Any]
) -> None:
    """Two pictures a prompt, text in front and between: two passes are one, whatever is behind the last."""
    case, model, rows = MLP, make_model(voco()), 2
    slots, valid = np.zeros((rows, 45), np.int32), np.zeros((rows, 45), bool)
    for row, (front, between) in enumerate(((2, 3), (4, 1))):
        slots[row, front : front + 17] = 1
        slots[row, front + 17 + between : front + 34 + between] = 2
        valid[row, : front + 34 + between + behind[row]] = True
    tokens = np.random.default_rng(3).integers(1, VOCAB, slots.shape).astype(np.int32)
    batch = {"tokens": tokens, "image_slots": slots, "valid": valid, **tower_outputs(case.needs, 2 * rows)}
    params = random_params(model, prompt_inputs(batch), jnp.zeros((rows, 1), int))["params"]
    wanted = make_generate(model, 6, (), form="masked")(params, batch)
    passes = Passes.of(slots, valid, 16, 1)
    for rooms in (None, passes):
        found = make_generate(model, 6, (), rooms=rooms)(params, batch)
        np.testing.assert_array_equal(found, wanted)
    logits = [
        model.apply({"params": params}, prompt_inputs(batch), 51, method="prefill", **chosen)[0]
        for chosen in ({"form": "masked"}, {"rooms": passes})
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)


@every_spec
def test_packed_and_shared_rows_are_single_rows(spec: ReducerSpec, params_of: Callable[..., Any]) -> None:
    batch, params = training_batch(spec), params_of(spec)
    alone, shares = states(scanned(spec), params, batch)
    for packed, rows in ((pack(batch), 1), (share(pack(batch)), 2)):
        together, same = states(scanned(spec, block_rows=rows), params, packed)
        used = np.asarray(batch["target_mask"])
        found = np.asarray(together).reshape(alone.shape)
        np.testing.assert_allclose(found[used], np.asarray(alone)[used], atol=2e-5)
        if shares is not None:
            np.testing.assert_allclose(same, shares, atol=1e-5)


@every_spec
def test_scan_and_loop_are_the_same_model(spec: ReducerSpec, params_of: Callable[..., Any]) -> None:
    batch, params = training_batch(spec), params_of(spec)
    loop = params | {"decoder": unstack(params["decoder"])}
    wanted, shares = states(scanned(spec), params, batch)
    found, same = states(make_model(spec, MLP), loop, batch)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    if shares is not None:
        np.testing.assert_allclose(same, shares, atol=1e-6)
        assert (np.diff([1.0, *shares]) < 0).all(), "each cut leaves less"


def test_the_soft_mask_in_its_limit_is_the_hard_one(
    random_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steep sigmoids: what training computes then is the masked form, with the same tokens kept."""
    monkeypatch.setattr(learned, "_STEEP", 1e6)
    monkeypatch.setattr(learned, "_LEAST", 1e-30)
    model, batch = make_model(atp()), make_prompts()
    inputs = prompt_inputs(batch)
    last = batch["valid"].sum(1)[:, None] - 1
    params = random_params(model, inputs, jnp.asarray(last))["params"]
    params["reducing"]["bias"] = params["reducing"]["bias"] * 0 - jnp.array([0.2, 1.0])
    logits, cache, _ = model.apply(
        {"params": params}, inputs, batch["tokens"].shape[1], form="masked", method="prefill"
    )
    soft = model.apply({"params": params}, inputs, jnp.asarray(last))
    np.testing.assert_allclose(soft[:, 0], logits, atol=1e-4)
    _, shares = model.apply({"params": params}, inputs, jnp.asarray(last), method="trained_states")
    hard = [kept[:3].sum() / (3 * MLP.visual_tokens) for kept in cache.kept]
    np.testing.assert_allclose(shares, hard, atol=1e-4)
    assert 0 < hard[-1] < hard[0] < 1, "the test would show little"


def test_answers_and_later_questions_choose_nothing(params_of: Callable[..., Any]) -> None:
    """What stays of a picture depends on the text between it and the first answer alone."""
    spec = atp()
    batch, params, model = training_batch(spec), params_of(spec), scanned(spec)
    _, shares = states(model, params, batch)
    first = batch["target_positions"].min(axis=1) + 1  # the first answer of each row
    places = np.arange(batch["tokens"].shape[1])
    answered = np.where(places >= first[:, None], batch["tokens"] % (VOCAB - 1) + 1, batch["tokens"])
    assert (answered != batch["tokens"]).any()
    np.testing.assert_array_equal(states(model, params, batch | {"tokens": answered})[1], shares)
    later = batch | {"target_positions": batch["target_positions"] + 2}
    assert (states(model, params, later)[1] != shares).any(), "a longer question does"


def test_a_budget_is_met_by_training_alone(params_of: Callable[..., Any]) -> None:
    """Plain descent on the penalty: thresholds move until the mean over layers is what was asked for."""
    keep = 0.4
    spec = atp(keep)
    model, params, batch = scanned(spec), params_of(spec), training_batch(spec)
    rest = {name: part for name, part in params.items() if name != "reducing"}

    def mean(shares: jax.Array) -> jax.Array:
        layers = [*learned.cut_layers(5), 5]
        return layers[0] / 5 + sum(
            share * (end - start) / 5 for share, start, end in zip(shares, layers, layers[1:], strict=False)
        )

    @jax.jit
    def step(own: Any, rate: jax.Array) -> tuple[Any, jax.Array]:
        def loss(own: Any) -> tuple[jax.Array, jax.Array]:
            _, shares = states(model, rest | {"reducing": own}, batch)
            return learned.penalty(shares, 5, keep), shares

        (_, shares), gradient = jax.value_and_grad(loss, has_aux=True)(own)
        return jax.tree.map(lambda x, g: x - rate * g, own, gradient), shares

    own = params["reducing"] | {"bias": jnp.full((3, 2), -2.0)}
    seen = []
    for number in range(120):
        own, shares = step(own, jnp.float32(0.3 * (1 - number / 120)))
        seen.append(float(mean(shares)))
    assert seen[0] > keep + 0.1
    assert seen[-1] == pytest.approx(keep, abs=0.03)


def test_the_penalty_is_a_mean_and_the_loss_reported_without_it(params_of: Callable[..., Any]) -> None:
    spec = atp()
    objective, batch, params = Objective(scanned(spec)), training_batch(spec), params_of(spec)
    weights = objective.weights(batch["target_mask"])
    found = objective.parts(params, batch, weights)
    _, shares = states(scanned(spec), params, batch)
    assert float(found.penalty) == pytest.approx(float(learned.penalty(shares, 5, 0.5)), rel=1e-6)
    assert float(objective(params, batch, weights)) == float(found.entropy)
    half = Objective(scanned(voco())).parts
    plain = training_batch(voco())
    assert (
        half(params_of(voco()), plain, Objective(scanned(voco())).weights(plain["target_mask"])).penalty == 0
    )


@every_spec
@pytest.mark.parametrize("mesh", ["fsdp", "all"])
def test_it_trains_on_a_mesh_as_alone(
    spec: ReducerSpec, mesh: str, random_params: Callable[..., Any]
) -> None:
    setup = make_setup(MLP, random_params, reducer=spec)
    wanted, found = run_alone(setup), run_on(setup, make_mesh(*MESHES[mesh]))
    assert "reducing" in {path.split("/")[0] for path in wanted.gradient}
    assert_same(found, wanted)
