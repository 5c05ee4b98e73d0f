"""The mesh of a cell on a slice: the first that the compiler says fits, and what had to change for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vlmscale.config import Cell
from vlmscale.plan.abstract import vocab_rows
from vlmscale.plan.compiled import Compiled, Request
from vlmscale.plan.slices import Slice
from vlmscale.train.state import state_bytes

_STATE_SHARE = 0.6  # of a device's memory that weights, gradients and moments may take, as in training
_MOST_TENSOR = 8
Compile = Callable[[Request], Compiled]


@dataclass(frozen=True)
class Fit:
    """A cell on a slice.

    Attributes:
      request: what was compiled last.
      compiled: what the compiler said of it.
      changes: what of the config had to change, such as "train.accumulate=2".
      tried: how many programs were compiled or looked up.
    """

    request: Request
    compiled: Compiled
    changes: tuple[str, ...]
    tried: int

    @property
    def fits(self) -> bool:
        """Whether any of what was tried does."""
        return self.compiled.fits


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [part for part in range(1, number + 1) if number % part == 0]


def meshes(cell: Cell, place: Slice) -> Iterator[tuple[tuple[int, int, int], int]]:
    """(mesh, accumulate) in the order in which they are tried.

    The mesh that the config names alone, if it names one. Else the least tensor axis with which the rows of a
    batch divide over the devices, and on it the least fsdp that the state fits with, more of it, then the
    batch in more parts, then more of the tensor axis.
    """
    asked, rows, devices = cell.mesh, cell.train.batch_size, place.devices
    tensors = [asked.tensor] if asked.tensor else [t for t in divisors(devices) if t <= _MOST_TENSOR]
    nbytes = state_bytes(cell, vocab_rows(cell))
    for tensor in tensors:
        split = devices // tensor
        if devices % tensor or rows % split:
            continue
        parts = [n for n in divisors(rows // split) if n >= cell.train.accumulate] or [cell.train.accumulate]
        fsdps = [f for f in divisors(split) if asked.fsdp in (0, f) and asked.data in (0, split // f)]
        if not fsdps:
            continue
        fits = [f for f in fsdps if nbytes / tensor / f <= _STATE_SHARE * place.generation.hbm] or fsdps[-1:]
        for fsdp in [fits[0], *fits[-1:]] if len(fits) > 1 else fits:
            yield (split // fsdp, fsdp, tensor), parts[0]
        for accumulate in parts[1:]:
            yield (split // fits[-1], fits[-1], tensor), accumulate


def find_fit(cell: Cell, place: Slice, row_length: int, compile_one: Compile) -> Fit | None:
    """The first mesh that fits, else the one that came nearest; None where no mesh can hold the batch.

    Args:
      cell: the config.
      place: the slice.
      row_length: positions of a training row.
      compile_one: asks the compiler.
    """
    nearest: Fit | None = None
    tried = 0
    for mesh, accumulate in dict.fromkeys(meshes(cell, place)):
        # The plain backend keeps every score, for which no TPU has the memory; auto is bfloat16 there.
        planned = {"accumulate": accumulate, "attention": "splash"}
        changes = tuple(f"train.{k}={v}" for k, v in planned.items() if v != getattr(cell.train, k))
        dtype = "bfloat16" if cell.train.dtype == "auto" else cell.train.dtype
        train = replace(cell.train, accumulate=accumulate, attention="splash", dtype=dtype)
        changed = replace(cell, train=train)
        request = Request(changed, place.name, mesh, row_length)
        found, tried = compile_one(request), tried + 1
        fit = Fit(request, found, changes, tried)
        if found.fits:
            return fit
        if nearest is None or found.needed < nearest.compiled.needed:
            nearest = fit
    return nearest if nearest is None else replace(nearest, tried=tried)
