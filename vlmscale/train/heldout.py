"""The held-out loss of all cells of a cohort: one pass over the validation split, its pictures once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlmscale.data.pipeline import Batch
from vlmscale.train.cohort import Group, Groups
from vlmscale.train.prepared import Prepared
from vlmscale.train.recipe import make_objective
from vlmscale.train.step import Arrays, Params
from vlmscale.train.together import Part, Reading, make_encode, make_put, read_together

ROWS = 200  # of a batch, at most
_POSITIONS = 2**15  # of a batch, about
Sums = Callable[[Params, Params, Arrays], tuple[jax.Array, jax.Array]]


class Heldout:
    """Mean loss per supervised token on the validation split."""

    def __init__(self, reading: Reading, groups: Groups, mesh: Mesh, part: Part) -> None:
        """Set up; see `of`."""
        self.reading, self.part = reading, part
        self.size = heldout_rows(reading, mesh)
        self.put, self.encode = make_put(mesh, part), make_encode(reading.cells, groups.shared_tower)
        self._sums = {group.indices: _summing(group) for group in groups.groups}

    @classmethod
    def of(cls, groups: Groups, prepared: Prepared, mesh: Mesh, part: Part) -> Heldout | None:
        """For the cells of a cohort; None where there is no such split."""
        if "validation" not in prepared.manifest["records"]:
            return None
        cells = [member.cell for member in groups.members]
        return cls(read_together(prepared, "validation", cells, training=False), groups, mesh, part)

    def __call__(self, groups: Sequence[Group]) -> dict[int, float]:
        """The loss of every cell of these groups, by its number."""
        parts: dict[int, list[tuple[float, int]]] = {}
        for host in self.reading.in_order(self.size, self.part):
            batch = self.encode(self.put(host))
            for group in groups:
                own, state = self.reading.of_cell(batch, group.indices[0]), group.state
                assert state is not None
                found = jax.device_get(self._sums[group.indices](state.params, group.frozen, own))
                for place, index in enumerate(group.indices):
                    total, count = group.of_cell(found, place)
                    parts.setdefault(index, []).append((float(total), int(count)))
        return {index: _mean(found) for index, found in parts.items()}


def heldout_rows(reading: Reading, mesh: Mesh) -> int:
    """Rows of a batch: as many as fit where training fits, a multiple of the devices that split them."""
    longest = max(layout.shape.length for _, layout in reading.layouts)
    most = min(ROWS, max(1, _POSITIONS // longest))
    train, data = reading.cells[0].train, reading.cells[0].data
    if data.features == "computed":
        most = min(most, train.batch_size // train.accumulate)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-most // devices) * devices


def _summing(group: Group) -> Sums:
    objective = make_objective(group.cell, group.model.clone(block_rows=1))

    def sums(params: Params, frozen: Params, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        mask = batch["target_mask"]
        total = objective(frozen | params, batch, mask.astype(jnp.float32))
        return total, jnp.sum(mask)

    return jax.jit(jax.vmap(sums, in_axes=(0, None, None)) if len(group.members) > 1 else sums)


def mean_loss(sums: Callable[[Batch], tuple[jax.Array, jax.Array]], stream: Iterable[Batch]) -> float:
    """Loss per supervised token over all batches; `sums` gives the summed loss of one and its tokens."""
    return _mean([jax.device_get(sums(batch)) for batch in stream])


def _mean(parts: Sequence[tuple[Any, Any]]) -> float:
    return float(sum(total for total, _ in parts) / max(sum(count for _, count in parts), 1))
