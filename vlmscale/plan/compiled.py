"""What the TPU compiler says of a cell's programs: bytes of a device, or by how much they do not fit.

Each program is compiled ahead of time in a process of its own (`python -m vlmscale.plan.compiled`), for
libtpu holds locks and logs for the life of a process, and nothing of it must reach the caller's devices.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from vlmscale.config import Cell, from_dict, to_dict
from vlmscale.errors import UserError
from vlmscale.plan.slices import Slice, find_slice
from vlmscale.records import read_json, write_json

_GIB = 2**30
_QUIET = {  # the first two keep libtpu from asking a metadata server; the third lets others use it meanwhile
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
}
# What the compiler says, in one of two ways, of a program that is too large.
_OVER = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """One program on one device of a slice.

    Attributes:
      arguments, outputs, temporary, code: bytes; outputs without those that take an argument's place.
      needed: bytes in all.
      limit: bytes that the compiler may use.
      seconds: the compilation took.
    """

    arguments: int
    outputs: int
    temporary: int
    code: int
    needed: int
    limit: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the device can hold it."""
        return self.needed <= self.limit


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
      cell: its config; of it the training step.
      topology: name of the slice.
      mesh: data, fsdp, tensor.
      row_length: positions of a training row.
    """

    cell: Cell
    topology: str
    mesh: tuple[int, int, int]
    row_length: int

    def key(self) -> str:
        """What the answer depends on: cells of one shape share it."""
        cell = to_dict(self.cell)
        shape = {
            "tower": cell["tower"]["name"],
            "llm": cell["llm"]["name"],
            "compressor": cell["compressor"],
            "vocabulary": [cell["data"][name] for name in ("tokenizer", "vocab_size", "max_text_tokens")],
            "train": {name: cell["train"][name] for name in _SHAPES},
            "evaluate": [cell["evaluate"][name] for name in ("batch_size", "max_new_tokens")],
        }
        versions = [metadata.version(name) for name in ("jax", "libtpu", "flax")]
        parts = [shape, self.topology, self.mesh, self.row_length, versions]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


_SHAPES = (
    *("batch_size", "accumulate", "remat", "attention", "dtype", "loss_chunk", "loss_rows", "clip_norm"),
    *("compressor_rate", "llm_rate", "tower_rate"),
)


def needs_libtpu() -> None:
    """Refuse where the TPU compiler is not installed.

    Raises:
      UserError: it is not.
    """
    if util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler (libtpu) is not installed; pip install 'vlmscale[tpu]'")


def compile_request(request: Request, cache: Path) -> Compiled:
    """What the compiler says; from the cache where it was asked before.

    Raises:
      UserError: libtpu is not installed, or the mesh cannot hold the cell.
      RuntimeError: the compiler failed otherwise.
    """
    needs_libtpu()
    path = cache / f"{request.key()}.json"
    if path.exists():
        return Compiled(**read_json(path)["compiled"])
    told = asdict(request) | {"cell": to_dict(request.cell)}
    done = subprocess.run(
        [sys.executable, "-m", "vlmscale.plan.compiled"],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        env=os.environ | _QUIET,
        check=False,
    )
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"compiling for {request.topology}: {done.stderr[-2000:]}")
    found = Compiled(**json.loads(done.stdout.splitlines()[-1]))
    cache.mkdir(parents=True, exist_ok=True)
    write_json(path, {"request": told, "compiled": asdict(found)})
    return found


def lowered(request: Request) -> Any:
    """The program, ready to be compiled; under the mesh of the slice."""
    import jax

    from vlmscale.plan.abstract import (
        abstract_batch,
        abstract_knobs,
        abstract_tower,
        topology_mesh,
        vocab_rows,
    )
    from vlmscale.train.program import make_program

    place, cell = find_slice(request.topology), request.cell
    mesh = topology_mesh(place, *request.mesh)
    program = make_program(cell, vocab_rows(cell), mesh, abstract_tower(cell))
    batch = abstract_batch(cell, program.model, mesh, request.row_length)
    with jax.set_mesh(mesh):
        return program.step.lower(program.abstract, program.places.frozen, batch, abstract_knobs(mesh))


def measure(request: Request, place: Slice) -> Compiled:
    """Compile here and now."""
    start, program = time.perf_counter(), lowered(request)
    try:
        stats = program.compile().memory_analysis()
    except Exception as error:
        over = _OVER.search(str(error))
        if over is None:
            raise
        needed, limit = (round(float(over[i]) * _UNITS[over[i + 1]]) for i in (1, 3))
        return Compiled(0, 0, 0, 0, needed, limit, time.perf_counter() - start)
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary, code = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    needed = arguments + outputs + temporary + code
    return Compiled(
        *(arguments, outputs, temporary, code, needed),
        round(place.generation.hbm),
        time.perf_counter() - start,
    )


def main() -> int:
    """Answer the request on stdin with a line of JSON."""
    told = json.loads(sys.stdin.read())
    cell = from_dict(told["cell"])
    request = Request(cell, told["topology"], tuple(told["mesh"]), told["row_length"])
    try:
        print(json.dumps(asdict(measure(request, find_slice(request.topology)))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
