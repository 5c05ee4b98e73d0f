"""The arrays of a cell in the abstract, on devices that need not be here: batches, prompts and towers."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmscale.compressors import COMPRESSORS
from vlmscale.compressors.features import abstract_features, abstract_tower_params
from vlmscale.config import Cell
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.models.vlm import VLM
from vlmscale.plan.slices import Slice
from vlmscale.sharding import make_mesh, replicated
from vlmscale.train.step import Knobs, needs_of_model

Arrays = dict[str, Any]


def vocab_rows(cell: Cell) -> int:
    """Rows of a cell's embedding table: of its LLM, or of the tokenizer that would be trained."""
    return SIZES[cell.llm.name].vocab_size if cell.data.tokenizer else cell.data.vocab_size


def abstract_tower(cell: Cell) -> Arrays | None:
    """Shapes of the tower's parameters where a step computes with it."""
    return abstract_tower_params(TOWERS[cell.tower.name]) if cell.train.tower_rate else None


def topology_mesh(place: Slice, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over the devices of a slice, as libtpu describes them.

    Raises:
      UserError: the three do not multiply to its devices.
    """
    from jax.experimental import topologies

    one: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if place.chips == 1 else {}
    name = f"{place.generation.libtpu}:{place.topology}"
    if place.generation.libtpu == "v4":
        one["chip_config_name"] = "megacore"  # a chip is a device
    devices = topologies.get_topology_desc(name, "tpu", **one).devices
    return make_mesh(data, fsdp, tensor, devices)  # in the order that training would have


def abstract_batch(cell: Cell, model: VLM, mesh: Mesh, row_length: int) -> Arrays:
    """A training batch of rows of one length, every position of which may be a target; one picture a row.

    Args:
      cell: the config.
      model: of its training program.
      mesh: the devices.
      row_length: positions of a row.
    """
    train, parts = cell.train, cell.train.accumulate
    rows: Any = ("data", "fsdp")

    def array(dtype: Any, count: int, *shape: int) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(rows) if parts == 1 else PartitionSpec(None, rows)
        whole = (count, *shape) if parts == 1 else (parts, count // parts, *shape)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, spec))

    size = train.batch_size
    names = ("tokens", "positions", "segment_ids", "image_slots", "target_positions", "target_ids")
    batch: Arrays = {name: array(jnp.int32, size, row_length) for name in names}
    batch["target_mask"] = array(jnp.bool_, size, row_length)
    if not model.visual_tokens:
        return batch
    if COMPRESSORS[model.compressor_name].text == "query":
        batch["query_tokens"] = array(jnp.int32, size, cell.data.max_text_tokens)
        batch["query_length"] = array(jnp.int32, size)
    tower = TOWERS[cell.tower.name]
    if train.tower_rate:
        side = tower.image_size
        return batch | {"pixels": array(jnp.uint8, size, side, side, 3)}
    given = abstract_features(tower, needs_of_model(model))._asdict()
    return batch | {
        name: array(model.dtype, size, *x.shape[1:])
        for name, x in given.items()
        if x is not None and x.ndim > 1
    }


def abstract_knobs(mesh: Mesh) -> Knobs:
    """Learning rate and seed of one cell."""
    kinds: Any = (jnp.float32, jnp.uint32)
    rate, seed = (jax.ShapeDtypeStruct((), kind, sharding=replicated(mesh)) for kind in kinds)
    return Knobs(cast(jax.Array, rate), cast(jax.Array, seed))
