"""The arrays of a cell in the abstract, on devices that need not be here: batches, prompts and towers."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmscale.compressors import COMPRESSORS
from vlmscale.compressors.features import abstract_features, abstract_tower_params, blocks_read
from vlmscale.config import Cell
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.models.vlm import VLM
from vlmscale.plan.slices import Slice
from vlmscale.sharding import make_mesh, replicated
from vlmscale.train.step import Knobs, needs_of_model

Arrays = dict[str, Any]
_ROWS: Any = ("data", "fsdp")


def vocab_rows(cell: Cell) -> int:
    """Rows of a cell's embedding table: of its LLM, or of the tokenizer that would be trained."""
    return SIZES[cell.llm.name].vocab_size if cell.data.tokenizer else cell.data.vocab_size


def abstract_tower(cell: Cell, needs: frozenset[str]) -> Arrays:
    """Shapes of the tower's parameters, as far as outputs with these needs read them."""
    size = TOWERS[cell.tower.name]
    blocks = blocks_read(size, needs)
    spare = {f"block_{index}" for index in range(blocks, size.num_layers)}
    if "probe_attention" not in needs:
        spare.add("head")
    return {part: shapes for part, shapes in abstract_tower_params(size).items() if part not in spare}


def topology_mesh(place: Slice, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over the devices of a slice, or of several, as libtpu describes them.

    Raises:
      UserError: the three do not multiply to its devices.
    """
    from jax.experimental import topologies

    one: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if place.chips == 1 else {}
    name = f"{place.generation.libtpu}:{place.topology}"
    if place.generation.libtpu == "v4":
        one["chip_config_name"] = "megacore"  # a chip is a device
    if place.count > 1:
        one["num_slices"] = place.count
    devices = topologies.get_topology_desc(name, "tpu", **one).devices
    return make_mesh(data, fsdp, tensor, devices)  # in the order that training would have


def by_row(mesh: Mesh, shape: tuple[int, ...], dtype: Any, parts: int = 1) -> jax.ShapeDtypeStruct:
    """An array [rows, ...] split over the devices by row; of a batch in parts [parts, rows / parts, ...]."""
    if parts == 1:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(_ROWS)))
    whole = (parts, shape[0] // parts, *shape[1:])
    return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, PartitionSpec(None, _ROWS)))


def abstract_pixels(cell: Cell, mesh: Mesh, count: int, parts: int = 1) -> jax.ShapeDtypeStruct:
    """Pictures of the tower's size, uint8 [count, S, S, 3]."""
    side = TOWERS[cell.tower.name].image_size
    return by_row(mesh, (count, side, side, 3), jnp.uint8, parts)


def abstract_outputs(cell: Cell, model: VLM, mesh: Mesh, count: int, parts: int = 1) -> Arrays:
    """What the tower made of so many pictures, as far as a model's compressor reads it."""
    given = abstract_features(TOWERS[cell.tower.name], needs_of_model(model))._asdict()
    return {
        name: by_row(mesh, (count, *x.shape[1:]), model.dtype, parts)
        for name, x in given.items()
        if x is not None and name != "tower"
    }


def abstract_batch(cell: Cell, model: VLM, mesh: Mesh, row_length: int) -> Arrays:
    """A training batch of rows of one length, every position of which may be a target; one picture a row.

    Args:
      cell: the config.
      model: of its training program.
      mesh: the devices.
      row_length: positions of a row.
    """
    train, parts, size = cell.train, cell.train.accumulate, cell.train.batch_size
    names = ("tokens", "positions", "segment_ids", "image_slots", "target_positions", "target_ids")
    batch: Arrays = {name: by_row(mesh, (size, row_length), jnp.int32, parts) for name in names}
    batch["target_mask"] = by_row(mesh, (size, row_length), jnp.bool_, parts)
    if not model.visual_tokens:
        return batch
    if COMPRESSORS[model.compressor_name].text == "query":
        batch["query_tokens"] = by_row(mesh, (size, cell.data.max_text_tokens), jnp.int32, parts)
        batch["query_length"] = by_row(mesh, (size,), jnp.int32, parts)
    if train.tower_rate:
        return batch | {"pixels": abstract_pixels(cell, mesh, size, parts)}
    return batch | abstract_outputs(cell, model, mesh, size, parts)


def abstract_prompts(cell: Cell, model: VLM, mesh: Mesh, length: int) -> Arrays:
    """A batch of prompts of one length, one picture each, in whole rows of every device.

    Args:
      cell: the config.
      model: that answers.
      mesh: the devices.
      length: positions of a prompt, with the slots of its picture.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-cell.evaluate.batch_size // parts) * parts
    batch: Arrays = {name: by_row(mesh, (rows, length), jnp.int32) for name in ("tokens", "image_slots")}
    batch["valid"] = by_row(mesh, (rows, length), jnp.bool_)
    if not model.visual_tokens:
        return batch
    if COMPRESSORS[model.compressor_name].text == "query":
        batch["text_query"] = by_row(mesh, (rows, 1, SIZES[cell.llm.name].width), model.dtype)
    return batch | abstract_outputs(cell, model, mesh, rows)


def abstract_knobs(mesh: Mesh) -> Knobs:
    """Learning rate and seed of one cell."""
    kinds: Any = (jnp.float32, jnp.uint32)
    rate, seed = (jax.ShapeDtypeStruct((), kind, sharding=replicated(mesh)) for kind in kinds)
    return Knobs(cast(jax.Array, rate), cast(jax.Array, seed))


def loop_layout(decoder: Arrays) -> Arrays:
    """`vlmscale.models.decoder.unstack` of shapes with places."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)

    layers = decoder["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    rest = {name: value for name, value in decoder.items() if name != "layers"}
    return rest | {f"layers_{index}": jax.tree.map(one, layers) for index in range(count)}
