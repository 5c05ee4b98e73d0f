"""The state of a cell, born where it lives: laid out in the abstract, then loaded, drawn or restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmscale import layers
from vlmscale.compressors.features import abstract_features
from vlmscale.config import Cell, MeshConfig, from_dict, reducer_of, trains_reducer
from vlmscale.content import check_trained
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES, DecoderSize
from vlmscale.models.vlm import VLM
from vlmscale.records import read_json
from vlmscale.sharding import make_mesh, place, replicated, slice_count
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.prepared import Prepared
from vlmscale.train.recipe import compute_dtype, stages, trained_parts, training_model
from vlmscale.train.step import Params, TrainState, init_params, model_inputs, needs_of_model
from vlmscale.weights import hf_config, tables
from vlmscale.weights.checkpoint import open_checkpoint
from vlmscale.weights.directory import abstract_tower
from vlmscale.weights.load import Source, initialise_missing, load_params

_STATE_SHARE = 0.6  # of a device's memory that state and gradients may take; activations need the rest
PARTS = ("decoder", "compressor", "reducing", "tower")
# Fields of a decoder's row that a checkpoint must agree with.
_ARCHITECTURE = (
    "family",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_width",
    "vocab_size",
    "tied_embeddings",
    "rope_theta",
    "norm_eps",
)


def shapes_of_batch(model: VLM) -> dict[str, Any]:
    """The smallest batch, in the abstract, that the parameters of a model can be laid out with."""
    ids = jax.ShapeDtypeStruct((1, model.image_slots + 8), np.int32)
    flags = jax.ShapeDtypeStruct(ids.shape, bool)
    names = ("tokens", "positions", "segment_ids", "target_positions", "query_tokens")
    batch: dict[str, Any] = dict.fromkeys(names, ids) | dict.fromkeys(("image_slots", "target_mask"), flags)
    batch["query_length"] = jax.ShapeDtypeStruct((1,), np.int32)
    if model.visual_tokens:
        assert model.tower_size is not None
        given = abstract_features(model.tower_size, needs_of_model(model))._asdict()
        batch |= {name: shapes for name, shapes in given.items() if shapes is not None}
    return batch


def boxed_params(model: VLM) -> Params:
    """Shapes and logical axes of decoder, compressor and a reducer that trains."""
    # Attention has no parameters, and its kernels ask for the devices that they are compiled for.
    plain = model.clone(block_rows=1, attention="xla", remat="block", dtype=jnp.float32)
    return dict(_boxed_params(plain))


@lru_cache(maxsize=64)
def _boxed_params(model: VLM) -> Params:
    batch = shapes_of_batch(model)

    def inputs(batch: dict[str, Any]) -> Any:
        return model_inputs(batch)

    return layers.abstract_params(model, jax.eval_shape(inputs, batch), batch["target_positions"])


class Places(NamedTuple):
    """Where the parameters of a cell live: trees of `jax.ShapeDtypeStruct` with shardings, by part."""

    trained: Params
    frozen: Params


def lay_out(cell: Cell, model: VLM, mesh: Mesh, tower: Params | None, frozen_dtype: Any = None) -> Places:
    """Where everything will live; strict, see `vlmscale.sharding.place`.

    Parts that train are float32.

    Args:
      cell: the config.
      model: of `recipe.training_model`.
      mesh: the devices.
      tower: parameters of the tower where the cell computes with it.
      frozen_dtype: of the other parts; None for that of the cell's computation.

    Raises:
      UserError: a large parameter would lie whole on every device of a mesh that could split it.
    """
    boxed = boxed_params(model)
    if tower is not None:
        boxed["tower"] = _boxed_tower(model, tower)
    rates = trained_parts(cell)
    trained = {part: boxed[part] for part in boxed if part in rates}
    frozen = {part: boxed[part] for part in boxed if part not in rates}
    return Places(
        place(trained, mesh, jnp.float32), place(frozen, mesh, frozen_dtype or compute_dtype(cell.train))
    )


def _boxed_tower(model: VLM, tower: Params) -> Params:
    """Shapes and axes of the tower's parameters that there are."""
    assert model.tower_size is not None
    blocks = sum(part.startswith("block_") for part in tower)
    boxed = flatten_dict(abstract_tower(model.tower_size, (blocks,), probe="head" in tower))
    return unflatten_dict({path: boxed[path] for path in flatten_dict(tower)})


def choose_mesh(
    cells: Sequence[Cell], prepared: Prepared, bytes_of: Callable[[Cell, int], int] | None = None
) -> Mesh:
    """The mesh that the config asks for, or where it says 0 the least `fsdp` that the state fits with.

    Devices whose memory is not known, as a CPU's, all lie along `data`.

    Args:
      cells: that train together, or one that answers.
      prepared: their data.
      bytes_of: what a cell takes with so many rows of vocabulary; None for `state_bytes`.

    Raises:
      UserError: the devices cannot be split so.
    """
    asked, limit = cells[0].mesh, (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    count = bytes_of or state_bytes
    nbytes = sum(count(cell, prepared.vocab_rows(cell)) for cell in cells)
    devices = jax.devices()
    return make_mesh(*mesh_shape(asked, len(devices), nbytes, limit, slice_count(devices)))


def mesh_shape(
    asked: MeshConfig, devices: int, nbytes: float, limit: float, slices: int = 1
) -> tuple[int, int, int]:
    """Data, fsdp and tensor where so many bytes of all devices must fit into `limit` each; 0: all fits.

    Data is 0 where it is what the others leave. Of several slices each has the whole state once.
    """
    tensor, fsdp = asked.tensor or 1, asked.fsdp
    if not fsdp and asked.data:
        fsdp = max(1, devices // (tensor * asked.data))
    elif not fsdp:
        most = max(1, devices // slices // tensor)
        splits = [split for split in range(1, most + 1) if most % split == 0]
        fits = [split for split in splits if nbytes / tensor / split <= _STATE_SHARE * limit]
        fsdp = (fits[0] if fits else splits[-1]) if limit else 1
    return asked.data, fsdp, tensor


def state_bytes(cell: Cell, vocab_rows: int) -> int:
    """Bytes of a cell's state and gradients, of all devices, its tower left out.

    Four float32 numbers a parameter that trains: itself, its gradient, two moments.
    """
    return _bytes(cell, vocab_rows, 16, jnp.dtype(compute_dtype(cell.train)).itemsize)


def loading_bytes(cell: Cell, vocab_rows: int, dtype: Any) -> int:
    """Bytes of a trained cell while it is opened to answer, of all devices, its tower left out.

    What trained is restored in float32 and then cast.
    """
    item = jnp.dtype(dtype).itemsize
    return _bytes(cell, vocab_rows, 4 + item, item)


def _bytes(cell: Cell, vocab_rows: int, trained: int, frozen: int) -> int:
    """All parameters, with so many bytes for each of those that train and of the others."""
    rates, total = trained_parts(cell), 0
    for part, boxed in boxed_params(training_model(cell, vocab_rows)).items():
        size = sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(boxed)))
        total += size * (trained if part in rates else frozen)
    return total


def activation_bytes(cell: Cell, vocab_rows: int, row_length: int) -> int:
    """Bytes of activations of one step, of all devices, about: with each layer's input kept, one recomputed.

    Args:
      cell: the config.
      vocab_rows: rows of the head.
      row_length: positions in a row of a batch.
    """
    size, train = SIZES[cell.llm.name], cell.train
    positions = train.batch_size // train.accumulate * row_length
    width = size.num_layers * size.width + 8 * size.width + 4 * size.mlp_width  # kept inputs, and one layer
    scores = 2 * size.num_heads * row_length
    logits = 2 * train.loss_chunk * vocab_rows
    return 4 * (positions * (width + scores) + logits)


def first_params(
    cell: Cell, model: VLM, places: Places, tower: Params | None, only: Iterable[str] = PARTS
) -> tuple[Params, list[str]]:
    """What training begins with, made in place: of earlier runs, of a checkpoint, or drawn.

    Args:
      cell: the config.
      model: of `recipe.training_model`.
      places: of `lay_out`.
      tower: the tower's parameters on the host, where the cell computes with it.
      only: the parts that are wanted.

    Returns:
      The parameters by part, and lines that say where they come from.

    Raises:
      UserError: a run or a checkpoint that is gone, damaged or of another model.
    """
    flat = flatten_dict({**places.trained, **places.frozen}, sep="/")
    wanted = {path: leaf for path, leaf in flat.items() if path.partition("/")[0] in set(only)}
    made, told = _from_runs(cell, flat, wanted)
    decoder = _missing(wanted, made, "decoder")
    if cell.llm.checkpoint and decoder:
        loaded, report = load_decoder(cell, decoder)
        made |= {f"decoder/{path}": leaf for path, leaf in flatten_dict(loaded, sep="/").items()}
        told.append(f"{cell.llm.checkpoint}: {report}")
    if tower is not None:
        leaves = flatten_dict(tower, sep="/")
        made |= {
            f"tower/{path}": jax.device_put(leaves[path].astype(leaf.dtype), leaf.sharding)
            for path, leaf in _missing(wanted, made, "tower").items()
        }
    missing = {path: leaf for path, leaf in wanted.items() if path not in made}
    if missing:
        shapes, seed = shapes_of_batch(model), stages(cell)[0].train.seed

        def draw() -> Params:
            batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return init_params(model.clone(block_rows=1), batch, seed)

        made |= initialise_missing(draw, missing)
    return unflatten_dict(made, sep="/"), told


def _missing(wanted: dict[str, Any], made: dict[str, jax.Array], part: str) -> dict[str, Any]:
    """Leaves of a part that are still to be made, by their paths in it."""
    return {
        path.removeprefix(f"{part}/"): leaf
        for path, leaf in wanted.items()
        if path.startswith(f"{part}/") and path not in made
    }


def _from_runs(
    cell: Cell, flat: dict[str, Any], wanted: dict[str, Any]
) -> tuple[dict[str, jax.Array], list[str]]:
    """What earlier stages trained, of each part the last that did."""
    made: dict[str, jax.Array] = {}
    told = []
    while cell.train.init_from:
        run = Path(cell.train.init_from)
        earlier = from_dict(read_json(run / "spec.json")["config"])
        _check_stage(run, earlier, cell)
        check_trained("train.init_from", run)
        kept = trained_parts(earlier)
        theirs = {path: leaf for path, leaf in flat.items() if path.partition("/")[0] in kept}
        due = {path for path in theirs if path in wanted and path not in made}
        if due:
            leaves = flatten_dict(_restore_params(run, theirs), sep="/")
            made |= {path: leaves[path].astype(wanted[path].dtype) for path in due}
            told.append(f"{len(due)} parameters from {run}")
        cell = earlier
    return made, told


def _restore_params(run: Path, flat: dict[str, Any]) -> Params:
    float32 = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
        for path, leaf in flat.items()
    }
    checkpoints = Checkpoints.of(run, read_only=True)
    found = checkpoints.restore_latest({"params": unflatten_dict(float32, sep="/")})
    checkpoints.close()
    if found is None:
        raise UserError(f"{run}: has no checkpoint to read; train it again")
    params: Params = found[1]["params"]
    return params


def _check_stage(run: Path, earlier: Cell, cell: Cell) -> None:
    """Refuse an earlier run that the cell cannot begin with."""
    for key in (
        "tower.name",
        "llm.name",
        "compressor.name",
        "compressor.visual_tokens",
        "compressor.options",
    ):
        section, _, name = key.partition(".")
        theirs, ours = getattr(getattr(earlier, section), name), getattr(getattr(cell, section), name)
        if theirs != ours:
            raise UserError(f"train.init_from={run}: has {key}={theirs}, this config {ours}")
    if trains_reducer(earlier) and reducer_of(earlier) != reducer_of(cell):
        raise UserError(
            f"train.init_from={run}: was trained with reducer.name={earlier.reducer.name}, this config has "
            f"reducer.name={cell.reducer.name} or other values of it"
        )
    if earlier.llm.checkpoint and not cell.llm.checkpoint:
        raise UserError(
            f"train.init_from={run}: began with llm.checkpoint={earlier.llm.checkpoint}; name it here too"
        )
    if earlier.train.tower_rate and cell.compressor.visual_tokens and cell.data.features != "computed":
        raise UserError(
            f"train.init_from={run}: trained its tower; set --config.data.features=computed, since outputs "
            "that were stored are of another"
        )


def load_decoder(cell: Cell, places: dict[str, Any]) -> tuple[Params, Any]:
    """The decoder of `llm.checkpoint`, a language model or a LLaVA with one, in the "scan" layout.

    Args:
      cell: the config.
      places: by path in the decoder, with shardings.

    Raises:
      UserError: it is damaged, or another model than `llm.name`.
    """
    directory = Path(cell.llm.checkpoint)
    config, where = hf_config.read_config(directory), directory / "config.json"
    kind = hf_config.kind_of(config, where)
    if kind == "tower":
        raise UserError(f"llm.checkpoint={directory}: holds a vision tower alone; name a language model")
    tree: Params = unflatten_dict(places, sep="/")
    if kind == "llava":
        llava = hf_config.llava_config(config, where)
        theirs, whole = llava.decoder, tables.llava(llava.tower.style)
        ignored = (*whole.ignored, r"^vision_tower\.", r"^multi_modal_projector\.")
        table, tree = replace(whole, ignored=ignored), {"decoder": tree}
    else:
        theirs, table = hf_config.decoder_size(config, where), tables.DECODER
    _check_architecture(where, theirs, cell.llm.name)
    with open_checkpoint(directory) as checkpoint:
        params, report = load_params(tree, [Source(checkpoint, table)])
    return (params["decoder"] if kind == "llava" else params), report


def _check_architecture(where: Path, theirs: DecoderSize, name: str) -> None:
    """Refuse a config.json of another decoder than the named row, by the first field that differs."""
    ours = SIZES[name]
    for field in _ARCHITECTURE:
        found, wanted = getattr(theirs, field), getattr(ours, field)
        if found != wanted:
            fits = [
                row
                for row, size in SIZES.items()
                if all(getattr(size, part) == getattr(theirs, part) for part in _ARCHITECTURE)
            ]
            hint = f"it fits llm.name={' or '.join(fits)}" if fits else "it fits no decoder of the size table"
            raise UserError(f"{where}: {field} is {found}, but llm.name={name} has {wanted}; {hint}")


def first_state(optimizer: optax.GradientTransformation, params: Params, mesh: Mesh) -> TrainState:
    """The state before the first step; the optimiser's arrays lie as the parameters do."""
    shapes = jax.eval_shape(optimizer.init, params)
    where = jax.tree.map(lambda leaf: leaf.sharding, _like_params(optimizer, shapes, params, mesh))
    opt_state = jax.jit(optimizer.init, out_shardings=where)(params)
    zero = jax.device_put(np.int32(0), replicated(mesh))
    return TrainState(zero, params, opt_state, zero.copy())


def abstract_state(optimizer: optax.GradientTransformation, places: Params, mesh: Mesh) -> TrainState:
    """Shapes and places of a state, to restore one."""
    # Without places: what one optimiser was traced for on one mesh jax knows on the others.
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), places)
    shapes = jax.eval_shape(optimizer.init, plain)
    zero: Any = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))
    return TrainState(zero, places, _like_params(optimizer, shapes, places, mesh), zero)


def _like_params(optimizer: Any, shapes: Any, params: Params, mesh: Mesh) -> Any:
    """The optimiser's abstract arrays, each beside its parameter, and scalars on every device."""

    def beside(leaf: Any, param: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding)

    def everywhere(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))

    return optax.tree_map_params(optimizer, beside, shapes, params, transform_non_params=everywhere)


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """Several states of one shape as one, along a new first axis."""
    if len(states) == 1:
        return states[0]
    return jax.jit(lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))(*states)


def stacked(abstract: TrainState, count: int) -> TrainState:
    """Shapes and places of `stack_states` of so many."""
    if count == 1:
        return abstract

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=where)

    return jax.tree.map(one, abstract)


def unstack_params(state: TrainState, number: int, count: int) -> Params:
    """The parameters of one of several states."""
    return state.params if count == 1 else jax.tree.map(partial(_pick, number), state.params)


def _pick(number: int, leaf: jax.Array) -> jax.Array:
    return leaf[number]
