"""The objective and the training step: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlmscale import layers
from vlmscale.compressors import COMPRESSORS, Features, parse_options
from vlmscale.compressors.features import tower_features
from vlmscale.config import Cell, reducer_of
from vlmscale.data import images
from vlmscale.models.decoder import head_table
from vlmscale.models.sizes import SIZES, TOWERS, TowerSize
from vlmscale.models.vlm import VLM, Inputs, narrow
from vlmscale.reducers import REDUCERS
from vlmscale.train.loss import DEFAULT_CHUNK, chunked_cross_entropy

Params = dict[str, Any]
Arrays = dict[str, Any]


class TrainState(NamedTuple):
    """All that training changes; `params` are those of the parts that train."""

    step: jax.Array  # int32 scalar: steps done, those that were skipped among them
    params: Params
    opt_state: Any
    skipped: jax.Array  # int32 scalar: steps whose loss or gradient was not finite


class Knobs(NamedTuple):
    """Numbers of a cell that its program does not depend on, so that cells may share one."""

    learning_rate: jax.Array  # float32 scalar, the peak
    seed: jax.Array  # uint32 scalar, of what a step draws


def build_model(cell: Cell, vocab_size: int, layout: str = "scan", visual_tokens: int | None = None) -> VLM:
    """The model of a cell, behind the tower; in float32.

    Args:
      cell: the config.
      vocab_size: rows of the embedding table.
      layout: the decoder's.
      visual_tokens: tokens of an image, for a nested compressor fewer than it was made for; None for all.
    """
    compressor = cell.compressor
    tokens = compressor.visual_tokens if visual_tokens is None else visual_tokens
    return VLM(
        SIZES[cell.llm.name],
        vocab_size,
        compressor.name,
        tokens,
        layout=layout,
        options=tuple(parse_options(compressor.name, compressor.options).items()),
        tower_size=TOWERS[cell.tower.name],
        largest=compressor.visual_tokens,
        full_rows=cell.data.row_length > 0,
        reducer=reducer_of(cell) if tokens else None,
    )


def needs_of_model(model: VLM) -> frozenset[str]:
    """The fields of `Features` beside `selected` that a model's compressor reads."""
    if not model.visual_tokens or model.tower_size is None:
        return frozenset()
    return COMPRESSORS[model.compressor_name].needs(model.tower_size, dict(model.options))


def with_tower_outputs(model: VLM, batch: Arrays, tower: Params | None) -> Arrays:
    """The batch with what a tower makes of its "pixels" (uint8 [N, S, S, 3]), if it holds any.

    `tower` holds the tower's parameters; None where no compressor runs blocks itself and outputs are stored.
    """
    needs = needs_of_model(model)
    if "pixels" in batch:
        assert model.tower_size is not None
        assert tower is not None
        batch = encode(model.tower_size, needs, tower, batch, model.dtype, model.attention)
    if "tower" in needs and tower is not None:
        assert model.tower_size is not None
        blocks = (f"block_{index}" for index in range(model.tower_size.select_layer))
        batch = batch | {"tower": {block: tower[block] for block in blocks}}
    return batch


def encode(
    size: TowerSize,
    needs: frozenset[str],
    tower: Params,
    batch: Arrays,
    dtype: Any = jnp.float32,
    attention: str = "xla",
) -> Arrays:
    """The batch with the tower's outputs in place of its "pixels".

    Args:
      size: of the tower.
      needs: fields of `Features` beside `selected`.
      tower: its parameters.
      batch: "pixels" are uint8 [N, S, S, 3].
      dtype, attention: of the computation.
    """
    made = tower_features(size, tower, normalise(batch["pixels"], size), needs, dtype, attention)
    return {name: values for name, values in batch.items() if name != "pixels"} | made


def normalise(pixels: jax.Array, size: TowerSize) -> jax.Array:
    """Pictures, uint8 [N, S, S, 3], as the tower's input, float32: what `images.preprocess` gives.

    Looked up, not computed: XLA's own product, difference and quotient may round otherwise than numpy's.
    """
    levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    table = images.normalise(levels, 1 / 255, size.mean, size.std)
    return jnp.asarray(table)[pixels, jnp.arange(3)]


def features_of(batch: Arrays) -> Features | None:
    """Tower outputs in a batch; None for a blind model."""
    if "selected" not in batch:
        return None
    given: dict[str, Any] = {name: batch[name] for name in Features._fields if name in batch}
    return Features(**given)


def model_inputs(batch: Arrays) -> Inputs:
    """The batch as the model reads it; it may lack what belongs to no prompt, or what the method ignores."""
    given: dict[str, Any] = {name: batch[name] for name in Inputs._fields if name in batch}
    return Inputs(**given | {"features": features_of(batch), "answers": _answers(batch)})


def _answers(batch: Arrays) -> jax.Array | None:
    """Which tokens are to be said: each stands behind the position that predicts it."""
    if "target_mask" not in batch:
        return None
    rows = jnp.arange(batch["tokens"].shape[0])[:, None]
    none = jnp.zeros(batch["tokens"].shape, bool)
    # A target that is padding has position 0, and its mask says no.
    return none.at[rows, batch["target_positions"] + 1].max(batch["target_mask"])


def init_params(model: VLM, batch: Arrays, seed: int | jax.Array) -> Params:
    """Fresh parameters of all parts but the tower; `batch` gives shapes only and holds tower outputs."""
    return layers.init_params(model, jax.random.key(seed), model_inputs(batch), batch["target_positions"])


class Loss(NamedTuple):
    """What training makes smaller: the sum of the two, float32 scalars.

    The entropies of the parts of a batch add up, penalties do not (`vlmscale.validation.pays_for_a_batch`).
    """

    entropy: jax.Array
    penalty: jax.Array


@dataclass(frozen=True)
class Objective:
    """What training makes smaller: the weighted cross-entropy of the supervised positions, with a penalty.

    Attributes:
      model: of a cell, in its dtype.
      loss_rows: 0: every supervised token of a batch counts the same. n: the mean over groups of n rows of
        the mean in each, as LLaVA's loss is with n rows a device (a group without one is left out).
      chunk: positions of a device whose logits exist at once.
      train_table: whether the decoder trains, and with it the head.
    """

    model: VLM
    loss_rows: int = 0
    chunk: int = DEFAULT_CHUNK
    train_table: bool = True

    def weights(self, mask: jax.Array) -> jax.Array:
        """What each position counts: bool [..., B, K] to float32, whose sum is 1, or 0 if none is True."""
        if not self.loss_rows:
            return mask / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
        *lead, rows, targets = mask.shape
        groups = mask.reshape(*lead, rows // self.loss_rows, self.loss_rows * targets)
        counts = jnp.sum(groups, axis=-1, keepdims=True)
        used = jnp.maximum(jnp.sum(counts > 0), 1).astype(jnp.float32)
        return (groups / jnp.maximum(counts, 1).astype(jnp.float32) / used).reshape(mask.shape)

    def __call__(
        self,
        params: Params,
        batch: Arrays,
        weights: jax.Array,
        step: jax.Array | None = None,
        seed: int | jax.Array = 0,
    ) -> jax.Array:
        """The cross-entropy of `parts`, whose arguments it has."""
        return self.parts(params, batch, weights, step, seed).entropy

    def parts(
        self,
        params: Params,
        batch: Arrays,
        weights: jax.Array,
        step: jax.Array | None = None,
        seed: int | jax.Array = 0,
    ) -> Loss:
        """The sum over positions of weight times cross-entropy, and what a reducer that trains pays.

        A nested compressor that trains all of its counts gives the mean of their sums (M3, arXiv 2405.17430),
        one that trains a drawn count the sum at that of `step`, or at all tokens where `step` is None (MQT,
        arXiv 2405.19315, draws from its second stage on).

        Args:
          params: of all parts: "decoder", "compressor", and "tower" where the batch holds pixels or the
            compressor runs its blocks.
          batch: of the pipeline.
          weights: [B, K] float32 of the targets.
          step: number of the step, for what is drawn.
          seed: of what is drawn.
        """
        model = self.model
        batch = with_tower_outputs(model, batch, params.get("tower"))
        inputs, places = model_inputs(batch), batch["target_positions"]
        method = COMPRESSORS[model.compressor_name]
        if inputs.features is None or method.nested is None:
            return self._sum(model, params, inputs, places, batch, weights)
        largest, counts = model.visual_tokens, method.nested(model.visual_tokens)
        if method.trains_all:
            total = jnp.float32(0)  # no reducer trains with these
            for count in counts:
                shorter, moved = narrow(inputs, places, largest, count, model.block_rows, model.full_rows)
                smaller = model.clone(visual_tokens=count, largest=largest)
                total += self._sum(smaller, params, shorter, moved, batch, weights).entropy
            return Loss(total / len(counts), jnp.float32(0))
        if step is not None:
            drawn = jax.random.randint(jax.random.fold_in(jax.random.key(seed), step), (), 0, len(counts))
            inputs = inputs._replace(visual_count=jnp.asarray(counts, jnp.int32)[drawn])
        return self._sum(model, params, inputs, places, batch, weights)

    def plain(self, params: Params, batch: Arrays, weights: jax.Array) -> jax.Array:
        """As a call, at the model's own number of visual tokens whatever the method trains."""
        batch = with_tower_outputs(self.model, batch, params.get("tower"))
        places = batch["target_positions"]
        return self._sum(self.model, params, model_inputs(batch), places, batch, weights).entropy

    def _sum(
        self, model: VLM, params: Params, inputs: Inputs, places: jax.Array, batch: Arrays, weights: jax.Array
    ) -> Loss:
        behind = {part: params[part] for part in ("decoder", "compressor", "reducing") if part in params}
        states, shares = model.apply({"params": behind}, inputs, places, method="trained_states")
        table = head_table(model.decoder_size, params["decoder"])
        entropy = chunked_cross_entropy(
            states, table, batch["target_ids"], weights, chunk=self.chunk, train_table=self.train_table
        )
        spec = model.reducer
        if shares is None or spec is None or (soft := REDUCERS[spec.name].soft) is None:
            return Loss(entropy, jnp.float32(0))
        return Loss(entropy, soft.penalty(shares, model.decoder_size.num_layers, spec.keep))


def loss_sum(
    model: VLM, params: Params, batch: Arrays, step: jax.Array | None = None, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy summed over supervised positions, and how many there are."""
    mask = batch["target_mask"]
    return Objective(model)(params, batch, mask.astype(jnp.float32), step, seed), jnp.sum(mask)


def plain_loss_sum(model: VLM, params: Params, batch: Arrays) -> tuple[jax.Array, jax.Array]:
    """As `loss_sum`, at the model's own number of visual tokens whatever the method trains."""
    mask = batch["target_mask"]
    return Objective(model).plain(params, batch, mask.astype(jnp.float32)), jnp.sum(mask)


Step = Callable[[TrainState, Params, Arrays, Knobs], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    rates: Mapping[str, float],
    accumulate: int = 1,
) -> Step:
    """The step `(state, frozen, batch, knobs) -> (state, metrics)`.

    The optimizer's update is multiplied with the learning rate and with the rate of each part. A step whose
    loss or gradient is not finite changes nothing but the two counters, so that the state is good whatever a
    batch holds. A batch without a supervised token gives loss 0 and zero gradients, never a NaN. What a step
    draws at random depends on the seed and the number of the step alone.

    Args:
      objective: what is made smaller.
      optimizer: for a learning rate of 1.
      rates: of the parts that train.
      accumulate: parts that a batch comes in; with more than one its arrays are [accumulate, ...] and the
        gradients of the parts are added up in float32.

    Returns:
      The step; `frozen` holds the parameters of parts that do not train. Metrics are "loss" (the
      cross-entropy), "grad_norm" and "target_tokens".
    """

    def gradient(state: TrainState, frozen: Params, batch: Arrays, knobs: Knobs) -> tuple[Any, Params]:
        weights = objective.weights(batch["target_mask"])

        def loss(params: Params, batch: Arrays, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = objective.parts(frozen | params, batch, weights, state.step, knobs.seed)
            return found.entropy + found.penalty, found.entropy

        run = jax.value_and_grad(loss, has_aux=True)
        if accumulate == 1:
            return run(state.params, batch, weights)

        def add(carry: tuple[Any, Params], part: tuple[Arrays, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, run(state.params, *part)), None

        zero = jnp.float32(0)
        zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, state.params))
        total: tuple[Any, Params] = jax.lax.scan(add, zeros, (batch, weights))[0]
        return total

    def train_step(
        state: TrainState, frozen: Params, batch: Arrays, knobs: Knobs
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, entropy), grads = gradient(state, frozen, batch, knobs)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        scaled = {
            part: jax.tree.map(lambda x, rate=rates[part]: x * (knobs.learning_rate * rate), update)
            for part, update in updates.items()
        }
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = (optax.apply_updates(state.params, scaled), opt_state)
        params, opt_state = jax.tree.map(
            lambda after, before: jnp.where(good, after, before), new, (state.params, state.opt_state)
        )
        metrics = {"loss": entropy, "grad_norm": norm, "target_tokens": jnp.sum(batch["target_mask"])}
        return TrainState(state.step + 1, params, opt_state, state.skipped + ~good), metrics

    return train_step
