"""How long a step takes on a slice, from a roofline with stated efficiencies; not measured there.

The longest of three times, each at a share of what the vendor publishes: matrix products, memory, and what
FSDP sends. They overlap in XLA's schedule, so that none is added to another.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmscale.config import Cell
from vlmscale.cost.flops import decoder_flops
from vlmscale.cost.image import Sample, sample_flops
from vlmscale.cost.peak import peak_flops
from vlmscale.models.sizes import SIZES
from vlmscale.plan.abstract import abstract_tower, vocab_rows
from vlmscale.plan.slices import Slice
from vlmscale.sharding import make_mesh
from vlmscale.train.program import make_program
from vlmscale.weights import tree

# Shares of the published peaks that large matrix products, streamed memory and collectives reach. Assumed.
PRODUCTS, MEMORY, LINKS = 0.5, 0.8, 0.7


class StepTime(NamedTuple):
    """Seconds of a step, by what would bound it."""

    flops: int  # of the whole step on all devices, recomputation included
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


def step_flops(cell: Cell, row_length: int) -> int:
    """Matrix-product FLOPs of one training step with rows that are full and all of whose text is supervised.

    As `cost.image.sample_flops`, with the forward pass that rematerialisation repeats.

    Args:
      cell: the config.
      row_length: positions of a row.
    """
    size, tokens = SIZES[cell.llm.name], cell.compressor.visual_tokens
    text = row_length - tokens
    sample = Sample(text, text, min(text, cell.data.max_text_tokens), 1.0)
    once = sample_flops(cell, vocab_rows(cell), sample)
    again = decoder_flops(size, row_length, 0) if cell.train.remat != "none" else 0.0
    return round(cell.train.batch_size * (once + again))


def step_time(cell: Cell, place: Slice, mesh: tuple[int, int, int], row_length: int, needed: int) -> StepTime:
    """A step's time.

    Args:
      cell: the config, with the accumulation that is planned.
      place: the slice.
      mesh: data, fsdp, tensor.
      row_length: positions of a row.
      needed: bytes of a device that the program works on; each is read or written about twice a step.
    """
    generation, devices = place.generation, place.devices
    flops = step_flops(cell, row_length)
    peak = peak_flops(generation.kind, "bfloat16")
    assert peak is not None
    mesh_here = make_mesh(devices=jax.devices()[:1])
    program = make_program(cell, vocab_rows(cell), mesh_here, abstract_tower(cell))
    sizes = {True: 0, False: 0}
    for trained, params in ((True, program.places.trained), (False, program.places.frozen)):
        sizes[trained] = tree.count(params)
    data, fsdp, tensor = mesh
    half = jnp.dtype(jnp.bfloat16).itemsize
    # Weights are gathered for the forward pass, the recomputation and the backward pass, in each part of a
    # batch; gradients of what trains are scattered in float32, and summed over the data axis.
    gathered = 3 * cell.train.accumulate * half * (sizes[True] + sizes[False]) / tensor * (fsdp > 1)
    summed = 4 * sizes[True] / tensor * ((fsdp > 1) + 2 / fsdp * (data > 1))
    return StepTime(
        flops,
        flops / (devices * peak * PRODUCTS),
        2 * needed * cell.train.accumulate / (generation.bandwidth * MEMORY),
        (gathered + summed) / (generation.links * LINKS),
    )
