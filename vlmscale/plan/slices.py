"""Slices by name: their topology, hosts, and what a device of theirs has. Pure tables, no jax.

Names of TPUs are Google's: of v4, v5p and 7x the number counts cores, of which a chip has two; of v5e and v6e
chips. Of GPUs the number counts GPUs, eight in a host at most.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from vlmscale.cost.peak import peak_flops
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
      hbm: bytes of a device's memory that a program may take.
      bandwidth: of that memory, bytes/s.
      links: bytes/s that a device sends to its neighbours at most, all links one way.
      slices: topology by the number in a slice's name.
      outside: the same to devices of other hosts, where that is another network; 0 where it is not.
      measured: FLOP/s of a device that no vendor publishes, as a CPU's; 0 for those of `vlmscale.cost.peak`.
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
    outside: float = 0.0
    measured: float = 0.0

    @property
    def peak(self) -> float:
        """FLOP/s of a device in bfloat16."""
        return self.measured or peak_flops(self.kind, "bfloat16") or 0.0

    @property
    def gpu(self) -> bool:
        """Whether it is no TPU, and so nothing that libtpu compiles for."""
        return not self.libtpu


# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x: bandwidth and interconnect of a chip; the interconnect
# is given in both directions together. HBM is what libtpu 0.0.42 says that a program may take of a device,
# 0.25 to 1.25 GiB less than there is.
GENERATIONS = {
    "v4": Generation("v4", "TPU v4", 30.75 * _GIB, 1228 * _GB, 300 * _GB / 2, _CUBES, cores=True),
    "v5e": Generation("v5e", "TPU v5 lite", 15.75 * _GIB, 819 * _GB, 200 * _GB / 2, _FLAT),
    "v5p": Generation("v5p", "TPU v5", 95.74 * _GIB, 2765 * _GB, 600 * _GB / 2, _CUBES, cores=True),
    "v6e": Generation("v6e", "TPU v6 lite", 31.25 * _GIB, 1640 * _GB, 448 * _GB / 2, _FLAT),
    "7x": Generation(
        "tpu7x", "TPU7x", 94.75 * _GIB, 7380 / 2 * _GB, 1200 / 2 * _GB / 2, _CUBES, cores=True, devices=2
    ),
}
_GPUS = {number: str(number) for number in (1, 2, 4, 8, *(8 * 2**power for power in range(1, 8)))}


def _gpu(kind: str, gib: float, bandwidth: float, links: float) -> Generation:
    """A GPU of so much memory, of which jax takes what XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 lets it."""
    hbm, outside = 0.92 * gib * _GIB, 400 / 8 * _GB
    return Generation("", kind, hbm, bandwidth * _GB, links * _GB, _GPUS, host=8, outside=outside)


# NVIDIA's datasheets: A100 (1758950), H100, H200, HGX B200, L40S. Memory in GiB is what nvidia-smi shows;
# NVLink in GB/s one way, of L40S PCIe. Between hosts 400 Gbit/s a GPU, as DGX systems have.
GENERATIONS |= {
    "a100-40gb": _gpu("NVIDIA A100-SXM4-40GB", 40, 1555, 300),
    "a100-80gb": _gpu("NVIDIA A100-SXM4-80GB", 80, 2039, 300),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 79.6, 3350, 450),
    "h200": _gpu("NVIDIA H200", 140.4, 4800, 450),
    "b200": _gpu("NVIDIA B200", 179, 8000, 900),
    "l40s": _gpu("NVIDIA L40S", 45, 864, 32),
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

    @property
    def slowest_link(self) -> float:
        """Bytes/s of a device to the others, the network between hosts counted where there are several."""
        own = self.generation
        return own.outside if self.hosts > 1 and own.outside else own.links


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
        what = "cores" if generation.cores else "GPUs" if generation.gpu else "chips"
        raise UserError(f"--topology {name}: no such slice; {words} has {known} {what}")
    return Slice(name, generation, generation.slices[int(number)])
