"""Slices by name: their topology, hosts, and what a device of theirs has. Pure tables, no jax.

Names of TPUs are Google's: of v4, v5p and 7x the number counts cores, of which a chip has two; of v5e and v6e
chips. Of GPUs the number counts GPUs, eight in a host at most. 2xv5e-16 is two slices joined for one job.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from vlmscale.cost.peak import Device, find_device
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
    """What a kind of device is.

    Attributes:
      device: what jax calls it, its FLOP/s and the bytes/s of its memory.
      libtpu: its name in libtpu's topologies; "" of what is no TPU.
      hbm: bytes of a device's memory that a program may take.
      links: bytes/s that a device sends to its neighbours at most, all links one way.
      slices: topology by the number in a slice's name.
      cores: whether that number counts cores, two a chip.
      devices: jax devices of a chip.
      host: chips of a host.
      outside: as `links`, to devices of other hosts, where that is another network; 0 where it is not.
      between: as `links`, to devices of other slices; 0 where no figure is published.
    """

    device: Device
    libtpu: str
    hbm: float
    links: float
    slices: dict[int, str]
    cores: bool = False
    devices: int = 1
    host: int = 4
    outside: float = 0.0
    between: float = 0.0

    @property
    def gpu(self) -> bool:
        """Whether it is no TPU, and so nothing that libtpu compiles for."""
        return not self.libtpu


def _tpu(
    name: str, libtpu: str, gib: float, gbps: float, slices: dict[int, str], gbits: float = 0, **more: Any
) -> Generation:
    """A TPU by its memory in GiB, its interconnect in GB/s, all links, both directions together, and Gbit/s.

    The last are of a chip's share of the data centre's network.
    """
    device, own = find_device(name), gib * _GIB
    return Generation(device, libtpu, own, gbps / 2 * _GB, slices, between=gbits / 8 * _GB, **more)


def _gpu(name: str, gib: float, gbps: float) -> Generation:
    """A GPU by its memory in GiB and what it sends to others in its host, in GB/s.

    Of the memory jax takes what XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 lets it. Between hosts 400 Gbit/s, as in
    DGX systems.
    """
    device, outside = find_device(name), 400 / 8 * _GB
    return Generation(device, "", 0.92 * gib * _GIB, gbps * _GB, _GPUS, host=8, outside=outside)


_GPUS = {number: str(number) for number in (1, 2, 4, 8, *(8 * 2**power for power in range(1, 8)))}
# TPUs: interconnect and share of the data centre's network of a chip (of v5e and v6e that of a pod by its
# 256 chips), cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; memory is what libtpu 0.0.42 says that a
# program may take of a device, 0.25 to 1.25 GiB less than there is. GPUs: memory as nvidia-smi shows it;
# NVLink of NVIDIA's datasheets (A100, H100, H200, HGX B200), of L40S PCIe.
GENERATIONS = {
    "v4": _tpu("v4", "v4", 30.75, 300, _CUBES, cores=True),
    "v5e": _tpu("v5e", "v5e", 15.75, 200, _FLAT, 25),
    "v5p": _tpu("v5p", "v5p", 95.74, 600, _CUBES, 50, cores=True),
    "v6e": _tpu("v6e", "v6e", 31.25, 448, _FLAT, 100),
    "7x": _tpu("7x", "tpu7x", 94.75, 1200 / 2, _CUBES, cores=True, devices=2),
    "a100-40gb": _gpu("a100-40gb", 40, 300),
    "a100-80gb": _gpu("a100-80gb", 80, 300),
    "h100": _gpu("h100", 79.6, 450),
    "h200": _gpu("h200", 140.4, 450),
    "b200": _gpu("b200", 179, 900),
    "l40s": _gpu("l40s", 45, 32),
}
_SPELLINGS = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7x": "7x", "v7x": "7x"}


@dataclass(frozen=True)
class Slice:
    """A slice that can be rented, or several alike that one job spans.

    Attributes:
      name: such as v5e-256, of two of them 2xv5e-256.
      generation: of `GENERATIONS`.
      topology: such as 16x16, of each.
      count: how many slices.
    """

    name: str
    generation: Generation
    topology: str
    count: int = 1

    @property
    def kind(self) -> str:
        """Its generation's name."""
        one = self.name.removeprefix(f"{self.count}x") if self.count > 1 else self.name
        return one.rpartition("-")[0]

    @property
    def chips(self) -> int:
        """How many, of all slices."""
        return self.count * math.prod(map(int, self.topology.split("x")))

    @property
    def devices(self) -> int:
        """Of jax."""
        return self.chips * self.generation.devices

    @property
    def hosts(self) -> int:
        """Machines, one process each."""
        return self.count * max(1, self.chips // self.count // self.generation.host)

    @property
    def slowest_link(self) -> float:
        """Bytes/s of a device to the others, the network between hosts counted where there are several."""
        own = self.generation
        return own.outside if self.hosts > 1 and own.outside else own.links


def find_slice(name: str) -> Slice:
    """The slice of a name such as v5e-256, v5litepod-16, v4-8 or 7x-64, or several alike, such as 2xv5e-16.

    Raises:
      UserError: there is none; the line lists what there is. Or several of them cannot be joined.
    """
    several = re.fullmatch(r"(\d+)x([^-].*)", name.strip().lower())
    if several is not None:
        return joined(find_slice(several[2]), int(several[1]))
    words, _, number = name.strip().lower().rpartition("-")
    words = _SPELLINGS.get(words, words)
    generation = GENERATIONS.get(words)
    if generation is None:
        near = difflib.get_close_matches(words, [*GENERATIONS, *_SPELLINGS], n=1)
        known = ", ".join(f"{key}-N" for key in GENERATIONS)
        raise UserError(
            f"--topology {name}: no such slice; there are {known}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )
    if not number.isdecimal() or int(number) not in generation.slices:
        known = ", ".join(map(str, generation.slices))
        what = "cores" if generation.cores else "GPUs" if generation.gpu else "chips"
        raise UserError(f"--topology {name}: no such slice; {words} has {known} {what}")
    return Slice(f"{words}-{int(number)}", generation, generation.slices[int(number)])


def joined(place: Slice, count: int) -> Slice:
    """Several slices alike that one job spans, their devices joined by the data centre's network.

    Args:
      place: one of them.
      count: how many; 1 gives it back.

    Raises:
      UserError: no slices; GPUs, of which a larger number is one slice; or TPUs of which no speed of that
        network is published.
    """
    if count < 1:
        raise UserError(f"{count} slices of {place.name}: give 1 or more")
    if count == 1:
        return place
    if place.generation.gpu:
        raise UserError(f"{count} slices of {place.name}: GPUs have none; name more of them, such as h200-16")
    if not place.generation.between:
        known = ", ".join(name for name, kind in GENERATIONS.items() if kind.between)
        raise UserError(
            f"{count} slices of {place.name}: how fast they are joined is not known; it is of {known}"
        )
    return replace(place, name=f"{count}x{place.name}", count=count)
