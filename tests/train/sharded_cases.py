"""Some steps of plain gradient descent on any mesh, by one process or several, and how two runs compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from tests.compressors.cases import TOWER, Batch, Case, build, make_batch, tower_params
from vlmscale.config import Cell, ReducerConfig, TrainConfig
from vlmscale.distributed import host_part
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM
from vlmscale.reducers import ReducerSpec
from vlmscale.sharding import put_batch, replicated
from vlmscale.train.recipe import trained_parts
from vlmscale.train.state import abstract_state, first_state, lay_out, stack_states, stacked
from vlmscale.train.step import Knobs, Objective, TrainState, make_train_step, model_inputs
from vlmscale.weights import tree

# Eight devices on one axis split all of its matrices, and queries share keys.
SIZE = DecoderSize(32, 2, 16, 8, 48, head_dim=4, family="qwen2")
VOCAB, ROWS, STEPS, RATE = 40, 8, 20, 0.01
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
# A decay of 0 keeps the last gradient in the optimiser's state, exactly, and changes nothing else.
SGD = optax.sgd(1.0, momentum=0.0)
CLOSE = 1e-5
# Three times faster to compile, and they come behind the splitting over devices.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


@dataclass(frozen=True)
class Setup:
    """What is trained, and on what.

    Attributes:
      model: of a case.
      params: of all parts that a step computes with, on the host.
      batches: of the whole mesh, on the host; steps take them in turn.
      train: which parts train, how a batch is computed, learning rate and seed.
    """

    model: VLM
    params: Batch
    batches: tuple[Batch, ...]
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def cell(self) -> Cell:
        """A cell with this recipe, of which nothing else is read."""
        reducer = self.model.reducer
        return Cell(train=self.train, reducer=ReducerConfig(reducer.name if reducer else "none"))

    def parts(self, trained: bool) -> Batch:
        """The parameters that train, or those that do not."""
        rates = trained_parts(self.cell)
        return {part: params for part, params in self.params.items() if (part in rates) == trained}


class Ran(NamedTuple):
    """What came of some steps; whole arrays by path."""

    losses: list[float]
    gradient: dict[str, np.ndarray]  # of the first step
    params: dict[str, np.ndarray]  # behind the last, those that train
    held: dict[str, tuple[int, ...]]  # shape of what one device holds of each


def recipe(**options: Any) -> TrainConfig:
    """A recipe with the learning rate of these tests."""
    return TrainConfig(**{"learning_rate": RATE} | options)


def make_setup(
    case: Case,
    random_params: Callable[..., Any],
    size: DecoderSize = SIZE,
    rows: int = ROWS,
    reducer: ReducerSpec | None = None,
) -> Setup:
    """A case with random parameters, and two batches whose rows have one to three targets each."""
    model = build(case, size, VOCAB, reducer=reducer)
    slots = case._replace(visual_tokens=model.image_slots)
    batch = make_batch(slots, rows, VOCAB)
    params = dict(random_params(model, model_inputs(batch), batch["target_positions"])["params"])
    if batch.pop("tower", None) is not None:
        params["tower"] = {name: tower_params()[name] for name in _blocks()}
    batches = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        drawn: Batch = {
            name: rng.integers(0, VOCAB, batch[name].shape).astype(np.int32)
            for name in ("tokens", "target_ids")
        }
        drawn["target_mask"] = np.arange(batch["target_ids"].shape[1]) < rng.integers(1, 4, (rows, 1))
        batches.append(batch | drawn)
    return Setup(model, jax.tree.map(np.asarray, params), tuple(batches), recipe())


def with_pixels(setup: Setup) -> Setup:
    """The same with pictures in place of the tower's outputs, and the tower that makes them."""
    needed = {"patch_embedding", "position_embedding", "class_embedding", "pre_norm", *_blocks()}
    tower = {name: leaf for name, leaf in tower_params().items() if name in needed}
    rng, batches = np.random.default_rng(5), []
    for batch in setup.batches:
        shape = (len(batch["selected"]), TOWER.image_size, TOWER.image_size, 3)
        rest = {name: x for name, x in batch.items() if name not in ("selected", "levels", "stack")}
        batches.append(rest | {"pixels": rng.integers(0, 256, shape, np.uint8)})
    return Setup(setup.model, setup.params | {"tower": tower}, tuple(batches), setup.train)


def _blocks() -> list[str]:
    """The tower's blocks that something reads."""
    return [f"block_{index}" for index in range(TOWER.select_layer)]


def step_of(setup: Setup) -> Any:
    """The step of plain gradient descent."""
    train = setup.train
    objective = Objective(setup.model, train.loss_rows, train.loss_chunk, train.llm_rate > 0)
    return make_train_step(objective, SGD, trained_parts(setup.cell), train.accumulate)


def run_alone(setup: Setup, steps: int = STEPS) -> Ran:
    """On one device, without a mesh."""
    params, parts = setup.parts(trained=True), setup.train.accumulate
    state = TrainState(jnp.int32(0), params, SGD.init(params), jnp.int32(0))
    batches = setup.batches
    if parts > 1:
        batches = tuple(
            {name: x.reshape(parts, len(x) // parts, *x.shape[1:]) for name, x in batch.items()}
            for batch in batches
        )
    step = jax.jit(step_of(setup), compiler_options=QUICK)
    knobs = Knobs(jnp.float32(setup.train.learning_rate), jnp.uint32(setup.train.seed))
    return _steps(step, state, setup.parts(trained=False), batches, knobs, steps)[0]


def run_on(setup: Setup, mesh: Mesh, steps: int = STEPS) -> Ran:
    """On a mesh, as a cohort's only cell."""
    return run_together([setup], mesh, steps)[0]


def run_together(setups: Sequence[Setup], mesh: Mesh, steps: int = STEPS) -> list[Ran]:
    """Cells of one shape on a mesh, laid out and jitted as a group of a cohort is.

    They share what does not train, and the batches, of which each process supplies its own rows.

    Raises:
      AssertionError: the state lies elsewhere behind the last step than before the first.
    """
    one, cells = setups[0], len(setups)
    with jax.set_mesh(mesh):
        places = lay_out(one.cell, one.model, mesh, one.params.get("tower"))
        states = [first_state(SGD, spread(setup.params, places.trained), mesh) for setup in setups]
        abstract = stacked(abstract_state(SGD, places.trained, mesh), cells)
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        step = jax.jit(
            jax.vmap(step_of(one), in_axes=(0, None, None, 0)) if cells > 1 else step_of(one),
            donate_argnums=0,
            out_shardings=(where, replicated(mesh)),
            compiler_options=QUICK,
        )
        rates = np.array([setup.train.learning_rate for setup in setups], np.float32)
        seeds = np.array([setup.train.seed for setup in setups], np.uint32)
        knobs = Knobs(rates, seeds) if cells > 1 else Knobs(rates[0], seeds[0])
        (index, count), batches = host_part(mesh), []
        for batch in one.batches:
            own = {name: np.split(values, count)[index] for name, values in batch.items()}
            batches.append(put_batch(own, mesh, count, one.train.accumulate))
        frozen = spread(one.params, places.frozen)
        placed = jax.device_put(knobs, replicated(mesh))
        return _steps(step, stack_states(states), frozen, batches, placed, steps, where, cells)


def spread(params: Batch, places: Batch) -> Batch:
    """The host's arrays where they are to lie; each process puts what its devices hold."""
    whole = flatten_dict(params)
    put = {
        path: jax.make_array_from_callback(to.shape, to.sharding, whole[path].__getitem__)
        for path, to in flatten_dict(places).items()
    }
    return unflatten_dict(put)


def _steps(
    step: Any,
    state: TrainState,
    frozen: Batch,
    batches: Sequence[Batch],
    knobs: Knobs,
    steps: int,
    where: Any = None,
    cells: int = 1,
) -> list[Ran]:
    losses, gradient = [], {}
    for number in range(steps):
        state, metrics = step(state, frozen, batches[number % len(batches)], knobs)
        if not number:
            gradient = tree.flatten(state.opt_state[0].trace)
        # Several processes with several CPU devices each hang with 32 programs in flight (jax 0.10.2).
        losses.append(metrics["loss"].block_until_ready())
    if where is not None:
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == where
    assert not np.any(jax.device_get(state.skipped))
    leaves = flatten_dict(state.params, sep="/")
    held = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in leaves.items()}
    curve, params = np.array(jax.device_get(losses)).reshape(steps, cells), tree.flatten(state.params)
    if cells == 1:
        return [Ran(list(map(float, curve[:, 0])), gradient, params, held)]
    return [
        Ran(
            list(map(float, curve[:, cell])),
            {path: leaf[cell] for path, leaf in gradient.items()},
            {path: leaf[cell] for path, leaf in params.items()},
            held,
        )
        for cell in range(cells)
    ]


def assert_same(found: Ran, wanted: Ran) -> None:
    """Gradients, loss curve and parameters agree within `CLOSE`.

    Gradients by the norm of what they differ by, relative to the norm of all of them; and so that no
    parameter hides in the sum, each by the largest entry that it differs by, relative to its own largest or
    to a hundredth of that norm, if that is more: some have a gradient of 0 but for rounding. Losses relative,
    each entry of the parameters absolute.

    Raises:
      AssertionError: they do not.
    """
    assert found.gradient.keys() == wanted.gradient.keys() == found.params.keys() == wanted.params.keys()
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in wanted.gradient.values()))
    apart = {path: found.gradient[path] - leaf for path, leaf in wanted.gradient.items()}
    worst = sorted(
        (float(np.abs(apart[path]).max() / max(np.abs(leaf).max(), norm / 100)), path)
        for path, leaf in wanted.gradient.items()
    )[::-1]
    assert worst[0][0] <= CLOSE, [f"{path} by {error:.1e}" for error, path in worst if error > CLOSE]
    assert np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in apart.values())) <= CLOSE * norm
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=CLOSE)
    for path, leaf in wanted.params.items():
        np.testing.assert_allclose(found.params[path], leaf, rtol=0, atol=CLOSE, err_msg=path)
