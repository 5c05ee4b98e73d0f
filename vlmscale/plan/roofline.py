"""How long a step takes on a slice: a roofline with stated efficiencies, assumed or calibrated.

The longest of three times, each at a share of what the vendor publishes: matrix products, memory, and what
devices send. They overlap in XLA's schedule, so that none is added to another.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from vlmscale.config import Cell, from_dict, image_slots, to_dict
from vlmscale.cost.image import Sample, tower_flops
from vlmscale.cost.training import step_flops
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.plan.abstract import vocab_rows
from vlmscale.plan.memory import training_places
from vlmscale.plan.slices import Slice
from vlmscale.records import read_json
from vlmscale.train.frozen import needs_of
from vlmscale.weights import tree


class Efficiencies(NamedTuple):
    """Shares of the published peaks that large matrix products, streamed memory and collectives reach.

    The defaults are assumed.
    """

    products: float = 0.5
    memory: float = 0.8
    links: float = 0.7


class StepTime(NamedTuple):
    """Seconds of a step, by what would bound it."""

    flops: float  # of the whole step on all devices, recomputation included
    products: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest."""
        return max(self.products, self.memory, self.links)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("products", "memory", "links"), key=lambda name: float(getattr(self, name)))


def read_calibration(path: Path) -> dict[str, Efficiencies]:
    """Efficiencies by the kind of device, of a file of `vlmscale bench step`.

    Raises:
      UserError: the file cannot be read, or a share is none.
    """
    found = read_json(path, f"{path}: no such file; `vlmscale bench step --out FILE` writes one")
    if not isinstance(found, dict) or not isinstance(found.get("efficiencies"), dict):
        raise UserError(f"{path}: is no calibration; `vlmscale bench step --out FILE` writes one")
    calibrated = {}
    for kind, shares in found["efficiencies"].items():
        if not isinstance(shares, dict):
            raise UserError(f'{path}: {kind}: must be an object such as {{"products": 0.5}}')
        for name, share in shares.items():
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if name not in Efficiencies._fields or not number or not 0 < share <= 1:
                known = ", ".join(Efficiencies._fields)
                raise UserError(f"{path}: {kind}: {name}={share!r}: one of {known}, above 0 and at most 1")
        calibrated[kind] = Efficiencies(**shares)
    return calibrated


def flops_of_step(cell: Cell, row_length: int) -> float:
    """Products of a training step's own program, its rows full and all of their text supervised.

    Args:
      cell: the config.
      row_length: positions of a row.
    """
    text = row_length - image_slots(cell)
    sample = Sample(text, text, min(text, cell.data.max_text_tokens), 1.0)
    if not cell.train.tower_rate:  # a frozen tower is a program of its own
        cell = replace(cell, data=replace(cell.data, features="stored"))
    return cell.train.batch_size * step_flops(cell, vocab_rows(cell), sample)


def step_time(
    cell: Cell,
    place: Slice,
    mesh: tuple[int, int, int],
    row_length: int,
    needed: int,
    shares: Efficiencies | None = None,
) -> StepTime:
    """A step's time.

    Args:
      cell: the config, with the accumulation that is planned.
      place: the slice.
      mesh: data, fsdp, tensor.
      row_length: positions of a row.
      needed: bytes of a device that the program works on; each is read or written about twice a step, weights
        three times more and accumulated gradients twice in each further part of a batch.
      shares: efficiencies; None for those that are assumed.
    """
    generation, devices, shares = place.generation, place.devices, shares or Efficiencies()
    flops = flops_of_step(cell, row_length)
    trained, frozen = _counts(cell)
    again = (3 * 2 * (trained + frozen) + 2 * 4 * trained) / (mesh[1] * mesh[2])
    touched = 2 * needed + (cell.train.accumulate - 1) * again
    return StepTime(
        flops,
        flops / (devices * generation.device.flops * shares.products),
        touched / (generation.device.bandwidth * shares.memory),
        _sending(cell, place, mesh, row_length) / shares.links,
    )


def _sending(cell: Cell, place: Slice, mesh: tuple[int, int, int], row_length: int) -> float:
    """Seconds that a device sends for at the full speed of its links, or of the network between slices.

    Over the latter go the gradients of what trains, summed inside each slice before, so that each device has
    its part of them to send; the two overlap.
    """
    inside = sent_bytes(cell, mesh, row_length) / place.slowest_link
    if place.count == 1:
        return inside
    trained, _ = _counts(cell)
    others = (place.count - 1) / place.count
    summed = 4 * trained * 2 * others / (place.chips / place.count)
    return max(inside, summed / place.generation.between)


def sent_bytes(cell: Cell, mesh: tuple[int, int, int], row_length: int) -> float:
    """What a device sends in a step, about.

    Weights are gathered over fsdp for the forward pass, the recomputation and the backward pass, in each part
    of a batch; gradients of what trains are scattered in float32, and summed over data; over tensor the
    outputs of attention and MLP are summed, forward, again and backward.
    """
    trained, frozen = _counts(cell)
    (data, fsdp, tensor), train, size = mesh, cell.train, SIZES[cell.llm.name]
    half = jnp.dtype(jnp.bfloat16).itemsize
    gathered = 3 * train.accumulate * half * (trained + frozen) / tensor * (fsdp - 1) / fsdp
    summed = 4 * trained / tensor * ((fsdp - 1) / fsdp + 2 / fsdp * (data - 1) / data)
    outputs = half * train.batch_size / (data * fsdp) * row_length * size.width * size.num_layers
    return gathered + summed + 6 * outputs * 2 * (tensor - 1) / tensor


def _counts(cell: Cell) -> tuple[int, int]:
    """Parameters that a step trains, and others that it computes with."""
    return _counted(json.dumps(to_dict(cell), sort_keys=True))


@lru_cache(maxsize=256)
def _counted(config: str) -> tuple[int, int]:
    """By the config as text: a cell can be changed, and every mesh that is tried asks three times."""
    places = training_places(from_dict(json.loads(config)), (1, 1, 1))
    return tree.count(places.trained), tree.count(places.frozen)


def tower_time(cell: Cell, place: Slice, shares: Efficiencies | None = None) -> float:
    """Seconds that a step's pictures take in a frozen tower, bound by products."""
    shares = shares or Efficiencies()
    flops = cell.train.batch_size * tower_flops(TOWERS[cell.tower.name], needs_of(cell))
    return flops / (place.devices * place.generation.device.flops * shares.products)
