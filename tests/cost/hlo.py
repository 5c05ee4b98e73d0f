"""FLOPs of the matrix products and convolutions in the text of an HLO module, as XLA is handed it.

A second count beside `vlmscale.cost.count`, which reads jaxprs: it sees what jax lowered, not what it traced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax

_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")


class _Instruction(NamedTuple):
    shape: tuple[int, ...]  # () of tuples too
    operation: str
    operands: tuple[str, ...]
    rest: str  # all that follows the operation's name: operands, or a constant's value, and attributes


_Computation = dict[str, _Instruction]


def lowered_flops(function: Callable[..., Any], *arguments: Any, trips: int | None = None) -> int:
    """FLOPs of the HLO that jax lowers a function to, before any optimisation.

    Args:
      function: of arrays or trees of them.
      *arguments: arrays or their shapes.
      trips: of the loops whose length is only known when they run; None refuses them.
    """
    text = jax.jit(function, keep_unused=True).lower(*arguments).as_text(dialect="hlo")
    return hlo_flops(text, trips)


def hlo_flops(text: str, trips: int | None = None) -> int:
    """As `lowered_flops`, of the text itself."""
    computations, entry = _parse(text)

    @cache
    def count(name: str) -> int:
        own = computations[name]
        return sum(flops_of(line, own) for line in own.values())

    def flops_of(line: _Instruction, own: _Computation) -> int:
        if line.operation == "dot":
            left = own[line.operands[0]].shape
            return 2 * math.prod(line.shape) * math.prod(left[axis] for axis in _axes(line.rest))
        if line.operation == "convolution":
            kernel, labels = own[line.operands[1]].shape, _one(r"dim_labels=\w+?_(\w+)->", line.rest)
            summed = math.prod(side for side, label in zip(kernel, labels, strict=True) if label != "o")
            return 2 * math.prod(line.shape) * summed
        if line.operation == "while":
            condition, body = (_one(rf"{part}=%?([\w.-]+)", line.rest) for part in ("condition", "body"))
            within = count(body)
            return within * _trips(computations[condition], trips) if within else 0
        called = [name for names in _CALLED.findall(line.rest) for name in re.findall(r"[\w.-]+", names)]
        counts = [count(name) for name in called if name in computations]
        return max(counts, default=0) if line.operation == "conditional" else sum(counts)

    return count(entry)


_CALLED = re.compile(
    r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=(\{.*?\}|[^,]+)"
)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
            entry = name if line.startswith("ENTRY") else entry
            current = computations[name] = {}
        elif match := _LINE.match(line):
            name, kind, operation, rest = match.groups()
            sides = "" if kind.startswith("(") else _one(r"\[([\d,]*)\]", kind)
            names = tuple(
                part.split(" ")[-1].removeprefix("%") for part in rest.partition(")")[0].split(", ")
            )
            shape = tuple(int(side) for side in sides.split(",") if side)
            current[name] = _Instruction(shape, operation, names, rest)
    return computations, entry


def _trips(condition: _Computation, unknown: int | None) -> int:
    """Of a loop that counts from 0 up to a constant, as `scan` and `fori_loop` make them."""
    (compared,) = (line for line in condition.values() if line.operation == "compare")
    end = condition[compared.operands[1]]
    if end.operation == "constant" and "direction=LT" in compared.rest:
        return int(_one(r"(\d+)\)", end.rest))
    if unknown is None:
        raise ValueError("a loop whose length is only known when it runs")
    return unknown


def _axes(attributes: str) -> list[int]:
    return [int(axis) for axis in _one(r"lhs_contracting_dims=\{([\d,]*)\}", attributes).split(",") if axis]


def _one(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, (pattern, text)
    return match[1]
