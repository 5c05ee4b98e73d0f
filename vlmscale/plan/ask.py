"""Who says what a program takes: the compiler of some cells, arithmetic of others; and how the two differ."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vlmscale.config import Cell
from vlmscale.plan.compiled import Compiled, Compiler, Request, known
from vlmscale.plan.memory import predict
from vlmscale.plan.slices import find_slice

WAYS = ("all", "ends", "none")
_CHECKS = 3  # cells between the ends that are compiled all the same


class Answers:
    """Bytes of programs, by the compiler where it was chosen or asked before.

    Attributes:
      errors: of arithmetic, as a share of what the compiler says, by the key of a program that both know.
    """

    def __init__(self, cells: Sequence[Cell], way: str, cache: Path, effort: str = "full") -> None:
        """Nothing is asked yet.

        Args:
          cells: what is planned.
          way: of `WAYS`; "ends" compiles the least and the most visual tokens of cells that are else alike.
          cache: directory of what was compiled before.
          effort: of the compiler, as `vlmscale.plan.compiled.compile_request` has it.
        """
        self._compiler = Compiler(cache, effort)
        self._chosen = {"all": set(range(len(cells))), "ends": ends(cells), "none": set()}[way]
        self.errors: dict[str, float] = {}

    def __call__(self, number: int, request: Request) -> Compiled:
        """What a program of the cell of a number takes."""
        if find_slice(request.topology).generation.gpu:
            return predict(request)
        if number in self._chosen:
            found: Compiled | None = self._compiler(request)
        else:
            found = known(request, self._compiler.cache, self._compiler.effort)
        guess = predict(request)
        if found is None:
            return guess
        if found.arguments:  # not of a program that was refused
            self.errors[request.key()] = guess.needed / found.needed - 1
        return found

    def check(self) -> str:
        """One line on how far arithmetic is from the compiler; "" where nothing was compiled."""
        if not self.errors:
            return ""
        sizes = sorted(map(abs, self.errors.values()))
        return (
            f"arithmetic against the compiler, {len(sizes)} programs: median {statistics.median(sizes):.1%}, "
            f"worst {sizes[-1]:.1%} of the bytes of a device"
        )


def ends(cells: Sequence[Cell]) -> set[int]:
    """Numbers of the cells with the least and the most visual tokens among those that are else alike.

    And of `_CHECKS` others, drawn from the seed 0.
    """
    groups: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        rest = asdict(cell)
        del rest["compressor"]["visual_tokens"]
        del rest["train"]["init_from"]
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(number)
    chosen: set[int] = set()
    for numbers in groups.values():
        ordered = sorted(numbers, key=lambda number: cells[number].compressor.visual_tokens)
        chosen |= {ordered[0], ordered[-1]}
    between = sorted(set(range(len(cells))) - chosen)
    return chosen | set(random.Random(0).sample(between, min(_CHECKS, len(between))))
