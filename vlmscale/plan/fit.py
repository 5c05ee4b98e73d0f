"""The mesh of a cell on a slice: the fastest with which its programs fit, and what is to change for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from vlmscale.config import Cell, MeshConfig, image_slots
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.plan.abstract import vocab_rows
from vlmscale.plan.compiled import Compiled, Request
from vlmscale.plan.memory import predict, tower_bytes
from vlmscale.plan.programs import programs_of
from vlmscale.plan.roofline import Efficiencies, step_time
from vlmscale.plan.slices import Slice
from vlmscale.train.recipe import compute_dtype
from vlmscale.train.state import loading_bytes, mesh_shape, state_bytes
from vlmscale.validation import best_attention, pays_for_a_batch

MOST_TENSOR = 8
ANSWERS = "evaluate: "  # in front of a change that answers need, which no config says
_WORTH = 0.97  # of the time of the mesh that training would choose, for which another is taken
_SHORT = 1e-3  # s; no mesh is preferred to another for less
_MOST_TRIES = 3  # of each way, that the compiler is asked about
Ask = Callable[[Request], Compiled]


class Lengths(NamedTuple):
    """Positions of a training row, and of a prompt."""

    row: int
    prompt: int


@dataclass(frozen=True)
class Part:
    """A program on a device of a slice.

    Attributes:
      request: what was asked.
      told: by the compiler or by arithmetic.
      beside: bytes of what other programs of the process keep there meanwhile.
    """

    request: Request
    told: Compiled
    beside: int = 0

    @property
    def used(self) -> int:
        """Bytes in all."""
        return self.told.needed + self.beside

    @property
    def fits(self) -> bool:
        """Whether the device can hold it."""
        return self.used <= self.told.limit


@dataclass(frozen=True)
class Fit:
    """A cell on a slice.

    Attributes:
      parts: by the name of the program; where training does not fit it alone, at the nearest mesh.
      changes: what of the config had to change, such as "train.accumulate=2".
      tried: how many meshes were asked about.
    """

    parts: dict[str, Part]
    changes: tuple[str, ...]
    tried: int

    @property
    def train(self) -> Part:
        """The training step."""
        return self.parts["train"]

    @property
    def largest(self) -> Part:
        """The program that takes most; not answers that fit with fsdp, which take what is free."""
        elastic = {name for name, part in self.parts.items() if name == "generate" and part.fits}
        firm = [p for name, p in self.parts.items() if name not in elastic or p.request.mesh[1] == 1]
        return max(firm, key=lambda part: part.used)

    @property
    def fits(self) -> bool:
        """Whether all do."""
        return all(part.fits for part in self.parts.values())


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [part for part in range(1, number + 1) if number % part == 0]


class Trial(NamedTuple):
    """A way to train that may fit."""

    mesh: tuple[int, int, int]
    accumulate: int
    remat: str


def trials(
    cell: Cell, place: Slice, lengths: Lengths, guess: Ask, shares: Efficiencies | None = None
) -> Iterator[Trial]:
    """Ways to train, in the order in which they are tried.

    First as the config has it, then with layers that are computed again, then with the batch in more and more
    parts. In each of these the meshes that fit by arithmetic, the fastest first (that which training would
    choose itself, unless another is 3% faster; of equals the one with the least tensor axis and the least
    fsdp); in the end the way that comes nearest to fitting.

    Args:
      cell: the config; axes that it names are kept.
      place: the slice.
      lengths: of rows.
      guess: gives the bytes of a program without a compiler.
      shares: efficiencies of the roofline.
    """
    found = list(_meshes(cell, place))
    remats = list(dict.fromkeys((cell.train.remat, "block")))
    levels = [(remat, 0) for remat in remats]
    levels += [("block", number) for number in range(1, max((len(parts) for _, parts in found), default=0))]
    nearest: tuple[float, Trial] | None = None
    own = own_mesh(cell, place)
    for remat, number in levels:
        fits: list[tuple[float, Trial]] = []
        for mesh, parts in found:
            if number >= len(parts):
                continue
            trial = Trial(mesh, parts[number], remat)
            changed, _ = _planned(cell, place, trial)
            try:
                part = _train_part(changed, place, trial, lengths, guess)
            except UserError:  # a parameter that this mesh cannot split
                if any(vars(cell.mesh).values()):
                    raise
                continue
            if part.fits:
                seconds = step_time(changed, place, mesh, lengths.row, part.told.needed, shares).seconds
                fits.append((max(seconds, _SHORT) * (_WORTH if mesh == own else 1), trial))
            elif nearest is None or part.used < nearest[0]:
                nearest = part.used, trial
        fits.sort(key=lambda pair: (pair[0], pair[1].mesh[::-1]))
        yield from (trial for _, trial in fits[:_MOST_TRIES])
    if nearest is not None:
        yield nearest[1]


def _meshes(cell: Cell, place: Slice) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Meshes over whose devices rows and heads divide, and in how many parts each may have a batch."""
    heads = common_heads(cell)
    asked, rows, devices = cell.mesh, cell.train.batch_size // cell.data.pack_rows, place.devices
    inside = devices // place.count  # fsdp and tensor may not reach into another slice
    tensors = [asked.tensor] if asked.tensor else [t for t in divisors(devices) if t <= MOST_TENSOR]
    for tensor in tensors:
        split = devices // tensor
        if inside % tensor or rows % split or heads % tensor:
            continue
        parts = [n for n in divisors(rows // split) if n >= cell.train.accumulate] or [cell.train.accumulate]
        if pays_for_a_batch(cell):
            parts = [cell.train.accumulate]
        for fsdp in divisors(inside // tensor):
            if asked.fsdp in (0, fsdp) and asked.data in (0, split // fsdp):
                yield (split // fsdp, fsdp, tensor), parts


def common_heads(cell: Cell) -> int:
    """What the tensor axis must divide: heads and key heads of the LLM, and heads of a tower that runs."""
    heads, tower = llm_heads(cell), TOWERS[cell.tower.name]
    return math.gcd(heads, tower.num_heads) if "tower" in programs_of(cell) else heads


def llm_heads(cell: Cell) -> int:
    """What divides the LLM's heads and its key heads."""
    size = SIZES[cell.llm.name]
    return math.gcd(size.num_heads, size.num_kv_heads)


def why_no_mesh(cell: Cell, place: Slice) -> str:
    """One line for a cell that no mesh of a slice can hold."""
    rows, heads = cell.train.batch_size // cell.data.pack_rows, common_heads(cell)
    tensors = (
        [cell.mesh.tensor] if cell.mesh.tensor else divisors(math.gcd(heads, place.devices // place.count))
    )
    most = max(tensor for tensor in tensors if tensor <= MOST_TENSOR or tensor == cell.mesh.tensor)
    what = "rows" if cell.data.pack_rows == 1 else f"blocks of {cell.data.pack_rows} rows"
    return (
        f"no mesh: {rows} {what} do not divide over {place.devices} devices; with tensor={most}, the most "
        f"for {heads} heads, they must be a multiple of {place.devices // most}"
    )


def _train_part(cell: Cell, place: Slice, trial: Trial, lengths: Lengths, ask: Ask) -> Part:
    """The training step of a planned cell, beside a tower that is computed in every step."""
    beside = 0
    if cell.data.features == "computed" and "tower" in programs_of(cell):
        beside = tower_bytes(cell, trial.mesh)
    request = Request("train", cell, place.name, trial.mesh, lengths.row)
    return Part(request, ask(request), beside)


def check_mesh(cell: Cell, place: Slice) -> None:
    """Refuse axes that the devices of a slice cannot have.

    Raises:
      UserError: with what is possible.
    """
    asked = {axis: size for axis, size in vars(cell.mesh).items() if size}
    product, devices = math.prod(asked.values()), place.devices
    if devices % product or (len(asked) == len(vars(cell.mesh)) and product != devices):
        words = ", ".join(f"mesh.{axis}={size}" for axis, size in asked.items())
        possible = ", ".join(map(str, divisors(devices)))
        raise UserError(
            f"{words}: {place.name} has {devices} devices, to which data, fsdp and tensor must multiply; an "
            f"axis can have {possible}"
        )
    crosses = (devices // place.count) % (product // asked.get("data", 1))
    if crosses or asked.get("data", place.count) % place.count:
        words = ", ".join(f"mesh.{axis}={size}" for axis, size in asked.items())
        raise UserError(
            f"{words}: {place.name} is {place.count} slices, and fsdp and tensor may not reach from one into "
            f"another; mesh.data must be a multiple of {place.count}"
        )


def find_fit(
    cell: Cell,
    place: Slice,
    lengths: Lengths,
    ask: Ask,
    guess: Ask = predict,
    shares: Efficiencies | None = None,
) -> Fit | None:
    """The first way to train that fits, else the nearest, with the other programs; None without any.

    Args:
      cell: the config.
      place: the slice.
      lengths: of rows and prompts.
      ask: gives the bytes of a program.
      guess: the same without a compiler, for the order of trials.
      shares: efficiencies of the roofline, for the same.

    Raises:
      UserError: the config names a mesh that the slice cannot have.
    """
    check_mesh(cell, place)
    nearest: Fit | None = None
    tried, names = 0, programs_of(cell)
    for trial in trials(cell, place, lengths, guess, shares):
        changed, changes = _planned(cell, place, trial)
        part, tried = _train_part(changed, place, trial, lengths, ask), tried + 1
        if nearest is None or part.used < nearest.train.used:
            nearest = Fit({"train": part}, changes, tried)
        if part.fits:
            nearest = Fit({"train": part}, changes, tried)
            break
    if nearest is None or not nearest.train.fits:
        return nearest if nearest is None else replace(nearest, tried=tried)
    parts = dict(nearest.parts)
    if "tower" in names:
        request = replace(parts["train"].request, program="tower", length=0)
        beside = parts["train"].told.arguments if cell.data.features == "computed" else 0
        parts["tower"] = Part(request, ask(request), beside)
    changed = parts["train"].request.cell
    parts["generate"], more = _answering(changed, place, lengths.prompt, ask, guess)
    return Fit(parts, nearest.changes + more, tried)


def _answering(cell: Cell, place: Slice, length: int, ask: Ask, guess: Ask) -> tuple[Part, tuple[str, ...]]:
    """The program that answers, on the mesh that `evaluate` chooses or where it does not fit one that does.

    Others have as little fsdp as can be: what it gathers may be gathered whole.
    """
    own, devices = answering_mesh(cell, place), place.devices
    inside = devices // place.count
    others = [
        (devices // tensor // fsdp, fsdp, tensor)
        for tensor in divisors(math.gcd(llm_heads(cell), inside))
        for fsdp in divisors(inside // tensor)
        if tensor <= MOST_TENSOR and fsdp * tensor >= own[1]
    ]
    meshes = [own, *sorted(others, key=lambda mesh: mesh[1:])]
    nearest: Part | None = None
    asked = 0
    for mesh in dict.fromkeys(meshes):
        request = Request("generate", cell, place.name, mesh, length)
        if mesh != own and guess(request).needed > place.generation.hbm:
            continue
        part, asked = Part(request, ask(request)), asked + 1
        if part.fits:
            axes = (("fsdp", mesh[1]), ("tensor", mesh[2]))
            return part, () if mesh == own else tuple(f"{ANSWERS}mesh.{axis}={n}" for axis, n in axes)
        if nearest is None or part.used < nearest.used:
            nearest = part
        if asked > _MOST_TRIES:
            break
    assert nearest is not None
    return nearest, ()


def _planned(cell: Cell, place: Slice, trial: Trial) -> tuple[Cell, tuple[str, ...]]:
    """The cell as it would be trained, and what of the config had to change for it."""
    # The plain backend keeps every score, for which no accelerator has the memory; auto is bfloat16 there.
    attention = best_attention(cell, "gpu" if place.generation.gpu else "tpu")
    planned = {"accumulate": trial.accumulate, "remat": trial.remat, "attention": attention}
    changes = tuple(f"train.{k}={v}" for k, v in planned.items() if v != getattr(cell.train, k))
    own = own_mesh(cell, place)
    axes = zip(("fsdp", "tensor"), trial.mesh[1:], own[1:], strict=True)
    changes += tuple(f"mesh.{axis}={size}" for axis, size, chosen in axes if size != chosen)
    dtype = "bfloat16" if cell.train.dtype == "auto" else cell.train.dtype
    train = replace(
        cell.train, accumulate=trial.accumulate, remat=trial.remat, attention=attention, dtype=dtype
    )
    return replace(cell, train=train), changes


def own_mesh(cell: Cell, place: Slice) -> tuple[int, int, int]:
    """The mesh that training would choose by itself."""
    return _shape(cell.mesh, place, state_bytes(cell, vocab_rows(cell)))


def answering_mesh(cell: Cell, place: Slice) -> tuple[int, int, int]:
    """The mesh that `evaluate` chooses: the least fsdp that the parameters fit with while they are read."""
    return _shape(MeshConfig(), place, loading_bytes(cell, vocab_rows(cell), compute_dtype(cell.train)))


def _shape(asked: MeshConfig, place: Slice, nbytes: float) -> tuple[int, int, int]:
    hbm = place.generation.hbm
    data, fsdp, tensor = mesh_shape(asked, place.devices, nbytes, hbm, place.count)
    return data or place.devices // (fsdp * tensor), fsdp, tensor


def lengths_of(cell: Cell, text_tokens: int | None = None) -> Lengths:
    """Positions of rows and prompts.

    Args:
      cell: the config.
      text_tokens: the longest text of a conversation, where rows are as long as the longest needs; None for
        `data.max_text_tokens`, to which it is cut.
    """
    text, visual = cell.data.max_text_tokens, image_slots(cell)
    if text_tokens is not None and not cell.data.row_length:
        text = min(text, text_tokens)
    room = SIZES[cell.llm.name].context - cell.evaluate.max_new_tokens - visual  # longer ones are not asked
    row = cell.data.row_length or _whole(text + visual)
    return Lengths(row, _whole(min(text, room) + visual))


def _whole(length: int) -> int:
    return -(-length // 128) * 128
