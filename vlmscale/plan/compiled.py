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
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from vlmscale.config import Cell, from_dict, to_dict
from vlmscale.errors import UserError
from vlmscale.plan.slices import Slice, find_slice
from vlmscale.records import write_json
from vlmscale.train.frozen import needs_of

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
EFFORTS = ("full", "fast")
# XLA's own scale from -1 to 1: fast leaves out most of what makes a program quick and little of what makes it
# small. docs/plan.md has what that changes.
_OPTIONS: dict[str, dict[str, Any] | None] = {"full": None, "fast": {"exec_time_optimization_effort": -1.0}}
_CLOSE = 0.9  # of what there is; a program that takes more is compiled with full effort
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """One program on one device of a slice.

    Attributes:
      arguments, outputs, temporary, code: bytes; outputs without those that take an argument's place.
      needed: bytes in all.
      limit: bytes that there are.
      seconds: the compilation took.
      by: who says so, "compiler" or "arithmetic".
    """

    arguments: int
    outputs: int
    temporary: int
    code: int
    needed: int
    limit: int
    seconds: float
    by: str = "compiler"


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
      program: of `vlmscale.plan.programs`.
      cell: its config, with the attention and the dtype that are planned.
      topology: name of the slice.
      mesh: data, fsdp, tensor.
      length: positions of a training row, or of a prompt; 0 for the tower.
    """

    program: str
    cell: Cell
    topology: str
    mesh: tuple[int, int, int]
    length: int

    def key(self) -> str:
        """What the answer depends on: cells of one shape share it."""
        cell = to_dict(self.cell)
        train = {name: cell["train"][name] for name in _SHAPES[self.program]}
        shape = {"tower": cell["tower"]["name"], "compressor": cell["compressor"], "train": train}
        if self.program == "tower":
            # Which outputs are made and how many pictures there are, which few settings decide.
            shape["compressor"] = sorted(needs_of(self.cell))
            shape["features"] = cell["data"]["features"]
        else:
            shape["llm"], shape["reducer"] = cell["llm"]["name"], cell["reducer"]
            data, flags = cell["data"], ("tokenizer", "row_length")
            shape["data"] = [data["vocab_size"], data["max_text_tokens"], *(bool(data[x]) for x in flags)]
        if self.program == "generate":
            shape["evaluate"] = [cell["evaluate"][name] for name in ("batch_size", "max_new_tokens")]
        parts = [self.program, shape, self.topology, self.mesh, self.length, _versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _versions() -> list[str]:
    """Of all that makes a program: jax, flax, the compiler ("" where it is not installed), and this code."""
    found = []
    for name in ("jax", "libtpu", "flax"):
        try:
            found.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            found.append("")
    code, root = hashlib.sha256(), Path(__file__).parent.parent
    for pattern in _CODE:
        for path in sorted(root.glob(pattern)):
            code.update(path.read_bytes())
    return [*found, code.hexdigest()]


# What programs are made of.
_CODE = (
    *("attention.py", "layers.py", "sharding.py", "models/*.py", "compressors/*.py", "reducers/*.py"),
    *("train/loss.py", "train/step.py", "train/program.py", "train/recipe.py"),
    *("evaluate/generation.py", "plan/programs.py", "plan/abstract.py"),
)
# Of the recipe, what a program's shape depends on.
_RATES = ("compressor_rate", "llm_rate", "tower_rate", "reducer_rate")
_SHAPES = {
    "train": (
        *("batch_size", "accumulate", "remat", "attention", "dtype", "loss_chunk", "loss_rows", "clip_norm"),
        *_RATES,
    ),
    "tower": ("batch_size", "accumulate", "attention", "dtype"),
    "generate": ("dtype", *_RATES),
}


def needs_libtpu() -> None:
    """Refuse where the TPU compiler is not installed.

    Raises:
      UserError: it is not.
    """
    if util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler (libtpu) is not installed; pip install 'vlmscale[tpu]'")


def known(request: Request, cache: Path, effort: str = "full") -> Compiled | None:
    """What the compiler said before with this effort or a greater one, if it was asked."""
    for name in EFFORTS[: EFFORTS.index(effort) + 1]:
        try:
            text = (_folder(cache, name) / f"{request.key()}.json").read_text()
            return Compiled(**json.loads(text)["compiled"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or cut off, or of another form
            continue
    return None


def _folder(cache: Path, effort: str) -> Path:
    return cache if effort == "full" else cache / effort


def compile_request(request: Request, cache: Path, effort: str = "full") -> Compiled:
    """What the compiler says; from the cache where it was asked before.

    Args:
      request: the program.
      cache: folder of answers.
      effort: of `EFFORTS`. A program that "fast" finds to fill a device or not to fit is compiled with full
        effort; so is decoding with weights split over `fsdp`, which full effort gathers ahead, into
        up to three times the bytes.

    Raises:
      UserError: libtpu is not installed, the mesh cannot hold the cell, or the compiler failed otherwise.
    """
    needs_libtpu()
    if request.program == "generate" and request.mesh[1] > 1:
        effort = "full"
    found = known(request, cache, effort) or _compile(request, cache, effort)
    if effort != "full" and found.needed > _CLOSE * found.limit:
        return compile_request(request, cache)
    return found


def _compile(request: Request, cache: Path, effort: str) -> Compiled:
    told = asdict(request) | {"cell": to_dict(request.cell), "effort": effort}
    done = subprocess.run(
        [sys.executable, "-m", "vlmscale.plan.compiled"],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        env=os.environ | _QUIET,
        check=False,
    )
    said = done.stderr.strip().splitlines() or ["nothing was said"]
    if done.returncode == 2:
        raise UserError(said[-1])
    if done.returncode:
        what = f"{request.program} of {request.cell.llm.name} for {request.topology}"
        why = "killed, perhaps for memory: try --workers 1" if done.returncode < 0 else said[-1]
        raise UserError(f"compiling {what} ended with code {done.returncode}: {why}")
    found = Compiled(**json.loads(done.stdout.splitlines()[-1]))
    folder = _folder(cache, effort)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{request.key()}.json", {"request": told, "compiled": asdict(found)})
    return found


class Compiler:
    """The compiler behind its cache, for several threads: a request that is under way is waited for."""

    def __init__(self, cache: Path, effort: str = "full") -> None:
        self.cache, self.effort, self._lock = cache, effort, threading.Lock()
        self._running: dict[str, Future[Compiled]] = {}

    def __call__(self, request: Request) -> Compiled:
        """As `compile_request`."""
        key = request.key()
        with self._lock:
            mine = key not in self._running
            future = self._running.setdefault(key, Future())
        if mine:
            try:
                future.set_result(compile_request(request, self.cache, self.effort))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def lower_request(request: Request) -> Any:
    """The program, ready to be compiled."""
    from vlmscale.plan.abstract import topology_mesh
    from vlmscale.plan.programs import lowered

    mesh = topology_mesh(find_slice(request.topology), *request.mesh)
    return lowered(request.program, request.cell, mesh, request.length)


def measure(request: Request, place: Slice, effort: str = "full") -> Compiled:
    """Compile here and now, with an effort of `EFFORTS`."""
    start, program = time.perf_counter(), lower_request(request)
    try:
        stats = program.compile(compiler_options=_OPTIONS[effort]).memory_analysis()
    except Exception as error:
        over = _OVER.search(str(error))
        if over is None:
            raise
        needed, limit = (round(float(over[i]) * _UNITS[over[i + 1]]) for i in (1, 3))
        return Compiled(0, 0, 0, 0, needed, limit, time.perf_counter() - start)
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary, code = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    # What does not fit is refused above; the parts may add up to more, since some lie where others have been.
    limit = round(place.generation.hbm)
    needed = min(limit, arguments + outputs + temporary + code)
    return Compiled(arguments, outputs, temporary, code, needed, limit, time.perf_counter() - start)


def main() -> int:
    """Answer the request on stdin with a line of JSON."""
    told = json.loads(sys.stdin.read())
    cell = from_dict(told["cell"])
    request = Request(told["program"], cell, told["topology"], tuple(told["mesh"]), told["length"])
    try:
        print(json.dumps(asdict(measure(request, find_slice(request.topology), told["effort"]))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
