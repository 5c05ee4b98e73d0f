"""TPU slices by name: their topology, hosts, and what a device of theirs has. Pure tables, no jax.

Names are Google's: of v4, v5p and 7x the number counts cores, of which a chip has two; of v5e and v6e chips.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from vlmscale.cost.peak import find_device
from vlmscale.errors import UserError

_GB, _GIB = 1e9, 2**30
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
}


@dataclass(frozen=True)
class Generation:
    """What a TPU generation is.

    Attributes:
      libtpu: its name in libtpu's topologies.
      kind: what jax calls a device, as in `vlmscale.cost.peak`.
      hbm: bytes of a device's memory.
      bandwidth: of that memory, bytes/s.
      links: bytes/s that a device sends to its neighbours at most, all links one way.
      slices: topology by the number in a slice's name.
      cores: whether that number counts cores, two a chip.
      devices: jax devices of a chip.
      host: chips of a host.
    """

    libtpu: str
    kind: str
    hbm: float
    bandwidth: float
    links: float
    slices: dict[int, str]
    cores: bool = False
    devices: int = 1
    host: int = 4


def _bandwidth(name: str) -> float:
    return find_device(name).bandwidth


# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x: HBM and interconnect of a chip; the latter is given in
# both directions together.
GENERATIONS = {
    "v4": Generation("v4", "TPU v4", 32 * _GIB, _bandwidth("v4"), 300 * _GB / 2, _CUBES, cores=True),
    "v5e": Generation("v5e", "TPU v5 lite", 16 * _GIB, _bandwidth("v5e"), 200 * _GB / 2, _FLAT),
    "v5p": Generation("v5p", "TPU v5", 95 * _GIB, _bandwidth("v5p"), 600 * _GB / 2, _CUBES, cores=True),
    "v6e": Generation("v6e", "TPU v6 lite", 32 * _GIB, _bandwidth("v6e"), 448 * _GB / 2, _FLAT),
    "7x": Generation(
        "tpu7x", "TPU7x", 192 / 2 * _GIB, _bandwidth("7x"), 1200 / 2 * _GB / 2, _CUBES, cores=True, devices=2
    ),
}
_SPELLINGS = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7x": "7x", "v7x": "7x"}


@dataclass(frozen=True)
class Slice:
    """A slice that can be rented.

    Attributes:
      name: such as v5e-256.
      generation: of `GENERATIONS`.
      topology: such as 16x16.
    """

    name: str
    generation: Generation
    topology: str

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def devices(self) -> int:
        """Of jax."""
        return self.chips * self.generation.devices

    @property
    def hosts(self) -> int:
        """Machines, one process each."""
        return max(1, self.chips // self.generation.host)


def find_slice(name: str) -> Slice:
    """The slice of a name such as v5e-256, v5litepod-16, v4-8 or 7x-64.

    Raises:
      UserError: there is none; the line lists what there is.
    """
    words, _, number = name.strip().lower().rpartition("-")
    generation = GENERATIONS.get(_SPELLINGS.get(words, words))
    if generation is None:
        near = difflib.get_close_matches(words, [*GENERATIONS, *_SPELLINGS], n=1)
        known = ", ".join(f"{key}-N" for key in GENERATIONS)
        raise UserError(
            f"--topology {name}: no such slice; there are {known}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )
    if not number.isdecimal() or int(number) not in generation.slices:
        known = ", ".join(map(str, generation.slices))
        what = "cores" if generation.cores else "chips"
        raise UserError(f"--topology {name}: no such slice; {words} has {known} {what}")
    return Slice(name, generation, generation.slices[int(number)])
