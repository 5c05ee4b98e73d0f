"""What a Slurm cluster wants of its jobs: one TOML file a site, given by `--site`. docs/slurm.md has one."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.devices import mesh_devices
from vlmscale.config import MeshConfig
from vlmscale.errors import UserError

_NAMED = ("account", "partition", "qos", "constraint", "time")
_MEMORY = re.compile(r"(\d+)([KMGT]?)", re.I)
_KILOBYTES = {"K": 1, "": 2**10, "M": 2**10, "G": 2**20, "T": 2**30}  # as sbatch reads them
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
_MARGIN_S = 60  # in which a cell starts and does something


@dataclass(frozen=True)
class Site:
    """Keys of the file; each may be left away, for what the cluster does by itself.

    Attributes:
      account: to which hours are charged.
      partition: or several with commas.
      qos: quality of service.
      constraint: on nodes.
      time: limit of one go of a task, as sbatch reads it; a cell may take many.
      mem: memory of a node, as sbatch reads it; a cell on some of its devices asks for their share.
      sbatch: more options of sbatch.
      report: options of the job that writes the report and needs no accelerator, after those above.
      devices_per_node: accelerators of a node; where there are none, CPU devices.
      gres: how a node's accelerators are asked for, such as "gpu" or "gpu:h100"; "" where there are none.
      nodes: of a cell whose config names no mesh.
      cpus_per_node: cores that go with all devices of a node; 0 for what the cluster gives.
      signal_s: seconds before the time limit at which a cell is told to save.
      setup: lines of bash before the cell: modules, exports.
      srun: options of srun, such as those of a container plugin.
      container: words before the command, such as apptainer exec --nv IMAGE.
      command: words that run vlmscale there; by default the Python that submits.
    """

    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = ""
    mem: str = ""
    sbatch: list[str] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    devices_per_node: int = 1
    gres: str = ""
    nodes: int = 1
    cpus_per_node: int = 0
    signal_s: int = 120
    setup: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    container: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=lambda: [sys.executable, "-P", "-m", "vlmscale.cli"])

    @property
    def options(self) -> list[str]:
        """Of sbatch, for all jobs but their size."""
        named = [f"--{name}={value}" for name in _NAMED if (value := getattr(self, name))]
        return [*named, *self.sbatch]

    @property
    def vlmscale(self) -> list[str]:
        """Words before those of a vlmscale command."""
        return [*self.container, *self.command]

    def shape(self, mesh: MeshConfig, about: str) -> tuple[int, int]:
        """Nodes, and accelerators of each, that a cell takes.

        Args:
          mesh: of its config; data=0 is all devices of `nodes`, or of more where the other axes need them.
          about: the cell, for a message.

        Raises:
          UserError: the mesh does not fill whole nodes.
        """
        each = self.devices_per_node
        inner = max(mesh.fsdp, 1) * max(mesh.tensor, 1)
        whole = mesh_devices(mesh, max(self.nodes, -(-inner // each)) * each, about)
        if whole <= each:
            return 1, whole
        if whole % each:
            raise UserError(
                f"{about}: its mesh has {whole} devices, which are no whole nodes of {each} "
                "(devices_per_node of the site); choose another mesh"
            )
        return whole // each, each

    def share(self, devices: int) -> tuple[int, str]:
        """Cores and memory that go with so many of a node's devices; 0 and "" are the cluster's own."""
        each, mem = self.devices_per_node, self.mem
        number = _MEMORY.fullmatch(mem)
        if devices < each and number and int(number[1]):  # 0 is all that the node has
            # In megabytes: of the site's own unit a share need not be whole.
            whole = int(number[1]) * _KILOBYTES[number[2].upper()]
            mem = f"{max(1, whole * devices // (each * 2**10))}M"
        cores = self.cpus_per_node
        return max(1, cores * devices // each) if cores else 0, mem


def read_site(path: Path | None) -> Site:
    """A site's file; without one the cluster's own defaults.

    Raises:
      UserError: it cannot be read, is no TOML, or has a key that is unknown or of the wrong type.
    """
    if path is None:
        return Site()
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--site {path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"--site {path}: is no TOML ({error})") from None
    known = {item.name: _plain(item) for item in dataclasses.fields(Site)}
    for name, value in found.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise UserError(f"--site {path}: unknown key {name}; the nearest is {near}")
        _check(f"--site {path}: {name}", value, known[name])
    if found.get("container") and not found.get("command"):
        raise UserError(f'--site {path}: container needs command, the words that run it there: ["vlmscale"]')
    site = Site(**found)
    limit = _seconds(site.time)
    if limit is not None and limit < site.signal_s + _MARGIN_S:
        raise UserError(
            f"--site {path}: time = {site.time!r} leaves no time to work before cells are told to save; "
            f"it must be signal_s={site.signal_s} and {_MARGIN_S} seconds at least"
        )
    return site


def _seconds(time: str) -> int | None:
    """A time as sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:...].

    None where there is no limit.
    """
    found = _TIME.fullmatch(time)
    if found is None or not int(re.sub(r"\D", "", time)):  # 0 is no limit
        return None  # of other words, UNLIMITED among them, sbatch says what it thinks
    days, a, b, c = (int(part or 0) for part in (found["d"], found["a"], found["b"], found["c"]))
    if found["d"] is not None:
        return ((days * 24 + a) * 60 + b) * 60 + c
    return (a * 60 + b) * 60 + c if found["c"] is not None else a * 60 + b


def _plain(item: Any) -> Any:
    return item.default if item.default is not dataclasses.MISSING else []


def _check(about: str, value: Any, default: Any) -> None:
    kind = type(default)
    kinds = {str: "a string", int: "a whole number", list: "a list of strings"}
    whole = type(value) is kind and (kind is not list or all(isinstance(word, str) for word in value))
    if not whole:
        raise UserError(f"{about} = {value!r}: must be {kinds[kind]}")
    words = value if kind is list else [str(value)]
    if any("\n" in word for word in words):
        raise UserError(f"{about}: has a line break; give a list of lines")
    if kind is int and value < (1 if default else 0):
        raise UserError(f"{about} = {value}: must be {1 if default else 0} or more")
