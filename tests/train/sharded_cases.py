"""A few steps of plain gradient descent on any mesh, in one process or several, and how two such runs compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from tests.compressors.cases import TOWER, Batch, Case, build, make_batch, tower_params
from vlmscale.config import Cell, TrainConfig
from vlmscale.distributed import host_part
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM
from vlmscale.sharding import put_batch, replicated
from vlmscale.train.recipe import trained_parts
from vlmscale.train.state import Places, abstract_state, first_state, lay_out
from vlmscale.train.step import Knobs, Objective, TrainState, make_train_step, model_inputs
from vlmscale.weights import tree

# All that an axis of eight devices can split, it does; and queries are grouped.
SIZE = DecoderSize(32, 2, 16, 8, 48, head_dim=4, family="qwen2")
VOCAB, STEPS, RATE = 40, 20, 0.1
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
# The decay of 0 keeps the last gradient in the optimiser's state, and changes nothing else.
SGD = optax.sgd(1.0, momentum=0.0)
CLOSE = 1e-5
# A third of the time of compilation; neither has a part in how a program is split.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


@dataclass(frozen=True)
class Setup:
    """What is trained, on which batches.

    Attributes:
      model: of a case.
      params: of all parts that a step computes with, on the host.
      batches: of the whole mesh, on the host; steps take them in turn.
      train: the recipe: which parts train, and how a batch is computed.
    """

    model: VLM
    params: Batch
    batches: tuple[Batch, ...]
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def cell(self) -> Cell:
        """A cell with this recipe; only its recipe is read."""
        return Cell(train=self.train)


class Ran(NamedTuple):
    """What came of some steps; whole arrays by path."""

    losses: list[float]
    gradient: dict[str, np.ndarray]  # of the first step
    params: dict[str, np.ndarray]  # behind the last


def make_setup(
    case: Case, random_params: Callable[..., Any], rows: int = 8, size: DecoderSize = SIZE, **options: Any
) -> Setup:
    """A case with random parameters and two batches whose rows have one to three targets each."""
    model, batch = build(case, size, VOCAB), make_batch(case, rows, VOCAB)
    params = dict(random_params(model, model_inputs(batch), batch["target_positions"])["params"])
    if "tower" in batch:
        params["tower"] = _blocks(batch.pop("tower"))
    batches = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        drawn = {
            name: rng.integers(0, VOCAB, batch[name].shape).astype(np.int32)
            for name in ("tokens", "target_ids")
        }
        drawn["target_mask"] = np.arange(batch["target_ids"].shape[1]) < rng.integers(1, 4, (rows, 1))
        batches.append(batch | drawn)
    return Setup(model, jax.tree.map(np.asarray, params), tuple(batches), TrainConfig(**options))


def _blocks(tower: Batch) -> Batch:
    """The blocks of the test's tower that a method runs itself."""
    return {f"block_{index}": tower[f"block_{index}"] for index in range(TOWER.select_layer)}


def step_of(setup: Setup) -> Any:
    """The step of plain gradient descent."""
    train = setup.train
    objective = Objective(setup.model, train.loss_rows, train.loss_chunk, train.llm_rate > 0)
    return make_train_step(objective, SGD, trained_parts(setup.cell), train.accumulate)


def run_alone(setup: Setup, steps: int = STEPS) -> Ran:
    """On one device, without a mesh."""
    trained = {part: setup.params[part] for part in setup.params if part in trained_parts(setup.cell)}
    frozen = {part: setup.params[part] for part in setup.params.keys() - trained.keys()}
    state = TrainState(jnp.int32(0), trained, SGD.init(trained), jnp.int32(0))
    parts, step = setup.train.accumulate, jax.jit(step_of(setup), compiler_options=QUICK)
    batches = [
        batch
        if parts == 1
        else {name: x.reshape(parts, len(x) // parts, *x.shape[1:]) for name, x in batch.items()}
        for batch in setup.batches
    ]
    return _steps(step, state, frozen, batches, Knobs(jnp.float32(RATE), jnp.uint32(0)), steps)


def run_on(setup: Setup, mesh: Mesh, steps: int = STEPS) -> Ran:
    """On a mesh, laid out and jitted as a cohort's group is; this process supplies its own rows.

    Raises:
      AssertionError: an array does not lie where it should.
    """
    with jax.set_mesh(mesh):
        places = lay_out(setup.cell, setup.model, mesh, setup.params.get("tower"))
        state = first_state(SGD, spread(setup.params, places.trained), mesh)
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(SGD, places.trained, mesh))
        step = jax.jit(
            step_of(setup),
            donate_argnums=0,
            out_shardings=(where, replicated(mesh)),
            compiler_options=QUICK,
        )
        (index, count), parts = host_part(mesh), setup.train.accumulate
        batches = []
        for batch in setup.batches:
            own = {name: np.split(values, count)[index] for name, values in batch.items()}
            batches.append(put_batch(own, mesh, count, parts))
        knobs = jax.device_put(Knobs(np.float32(RATE), np.uint32(0)), replicated(mesh))
        return _steps(step, state, spread(setup.params, places.frozen), batches, knobs, steps, where)


def spread(params: Batch, places: Batch) -> Batch:
    """The host's arrays where they are to lie; any process puts what its devices hold."""
    whole = flatten_dict(params)
    put = {
        path: jax.make_array_from_callback(to.shape, to.sharding, whole[path].__getitem__)
        for path, to in flatten_dict(places).items()
    }
    return unflatten_dict(put)


def _steps(
    step: Any, state: Any, frozen: Batch, batches: list[Batch], knobs: Knobs, steps: int, where: Any = None
) -> Ran:
    losses, gradient = [], {}
    for number in range(steps):
        state, metrics = step(state, frozen, batches[number % len(batches)], knobs)
        if not number:
            gradient = tree.flatten(state.opt_state[0].trace)
        losses.append(metrics["loss"])
    if where is not None:
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == where
    assert int(state.skipped) == 0
    return Ran([float(loss) for loss in losses], gradient, tree.flatten(state.params))
