"""The mesh of a cell, with a stand-in for the compiler: the order of what is tried, and what is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlmscale.config import Cell, CompressorConfig, LLMConfig, MeshConfig, TrainConfig
from vlmscale.errors import UserError
from vlmscale.plan import table
from vlmscale.plan.ask import Answers
from vlmscale.plan.compiled import Compiled, Request
from vlmscale.plan.fit import Lengths, Trial, answering_mesh, find_fit, lengths_of, own_mesh, trials
from vlmscale.plan.roofline import flops_of_step, step_time
from vlmscale.plan.slices import find_slice

GIB = 2**30
PLACE = find_slice("v5e-16")
LENGTHS = Lengths(2048, 512)


def cell_of(llm: str = "qwen1.5-0.5b", batch: int = 128, **train: object) -> Cell:
    compressor = CompressorConfig("pool", 16)
    recipe = TrainConfig(batch_size=batch, steps=1000, warmup_steps=1, **train)  # type: ignore[arg-type]
    return Cell(llm=LLMConfig(llm), compressor=compressor, train=recipe)


class Compiler:
    """Says that a program needs so many bytes a device: `whole` over fsdp and tensor, and the rows' share."""

    def __init__(self, whole: float, rows: float, kept: float = 1, state: float = 0) -> None:
        self.whole, self.rows, self.kept, self.state = whole, rows, kept, state
        self.asked: list[tuple[tuple[int, int, int], int]] = []

    def __call__(self, request: Request) -> Compiled:
        if request.program != "train":
            return Compiled(0, 0, 0, 0, GIB, 16 * GIB, 1.0)
        data, fsdp, tensor = request.mesh
        train = request.cell.train
        self.asked.append((request.mesh, train.accumulate))
        rows = self.rows * (self.kept if train.remat != "block" else 1)
        needed = self.whole / (fsdp * tensor) + rows * train.batch_size / (data * fsdp) / train.accumulate
        return Compiled(round(self.state * GIB), 0, 0, 0, round(needed * GIB), 16 * GIB, 1.0)


def ways(cell: Cell, compiler: Compiler) -> list[Trial]:
    return list(trials(cell, PLACE, LENGTHS, compiler))


def test_the_fastest_of_those_that_fit_is_tried_first() -> None:
    cell = cell_of()
    found = ways(cell, Compiler(whole=1, rows=0.1))
    seconds = [step_time(cell, PLACE, way.mesh, LENGTHS.row, GIB).seconds for way in found[:3]]
    assert seconds == sorted(seconds)
    assert found[0].mesh == (16, 1, 1)  # without collectives but the sum of gradients
    assert all(data * fsdp * tensor == 16 for (data, fsdp, tensor), _, _ in found)
    assert all(128 % (mesh[0] * mesh[1] * parts) == 0 for mesh, parts, _ in found)


def test_what_does_not_fit_is_split_as_little_as_can_be() -> None:
    """Weights over tensor cost activations, over fsdp themselves; both cost more the more they are split."""
    found = ways(cell_of("qwen1.5-7b"), Compiler(whole=100, rows=0.1))
    assert min(mesh[1] * mesh[2] for mesh, _, _ in found if mesh != found[-1].mesh) >= 8


def test_layers_are_computed_again_before_the_batch_comes_in_parts() -> None:
    compiler = Compiler(whole=20, rows=1, kept=4)
    found = [(way.accumulate, way.remat) for way in ways(cell_of(remat="none"), compiler)]
    assert found[0] == (1, "block")
    assert found.index((1, "block")) < found.index((2, "block"))
    fit = find_fit(cell_of(remat="none"), PLACE, LENGTHS, compiler, compiler)
    assert fit is not None
    assert "train.remat=block" in fit.changes


def test_a_batch_that_is_smaller_than_the_slice_needs_the_tensor_axis() -> None:
    compiler = Compiler(1, 0)
    assert min(way.mesh[2] for way in ways(cell_of(batch=8), compiler)) == 2
    assert not ways(cell_of(batch=7), compiler)
    assert find_fit(cell_of(batch=7), PLACE, LENGTHS, compiler, compiler) is None


def test_blocks_of_rows_stay_whole() -> None:
    """As training has it: 16 blocks of 8 rows are one a device, and cannot come in parts."""
    cell = cell_of()
    packed = replace(cell, data=replace(cell.data, packing="pack", row_length=2048, pack_rows=8))
    found = ways(packed, Compiler(1, 0))
    assert {way.accumulate for way in found if way.mesh[2] == 1} == {1}
    odd = replace(packed, train=replace(packed.train, batch_size=8))
    assert not ways(odd, Compiler(1, 0))


def test_heads_are_not_split_over_more_devices_than_there_are_heads() -> None:
    """Two key heads of Qwen2.5's smallest."""
    assert {way.mesh[2] for way in ways(cell_of("qwen2.5-0.5b", batch=8), Compiler(1, 0))} == {2}


def test_a_mesh_that_the_config_names_is_the_one() -> None:
    cell = replace(cell_of(), mesh=MeshConfig(fsdp=4, tensor=2))
    assert {way.mesh for way in ways(cell, Compiler(1, 0))} == {(2, 4, 2)}


def test_the_first_that_fits_is_taken_and_what_changed_is_told() -> None:
    compiler, guess = Compiler(whole=20, rows=0.5), Compiler(whole=10, rows=0.5)
    fit = find_fit(cell_of(), PLACE, LENGTHS, compiler, guess)
    assert fit is not None
    assert fit.fits
    # The guess is too low: the first that it says fits, whole, does not.
    assert compiler.asked[0][0] == (16, 1, 1)
    assert fit.train.request.mesh == compiler.asked[-1][0]
    assert fit.tried == len(compiler.asked) > 1
    _, fsdp, tensor = fit.train.request.mesh
    assert fsdp * tensor == 2
    assert fit.changes[0] == "train.attention=splash"
    own = own_mesh(fit.train.request.cell, PLACE)[1:]
    axes = zip(("fsdp", "tensor"), (fsdp, tensor), own, strict=True)
    assert fit.changes[1:] == tuple(f"mesh.{axis}={size}" for axis, size, chosen in axes if size != chosen)
    rows = Compiler(whole=20, rows=3)
    fit = find_fit(cell_of(attention="splash"), PLACE, LENGTHS, rows, rows)
    assert fit is not None
    assert "train.accumulate=2" in fit.changes
    assert fit.train.request.cell.train.dtype == "bfloat16"
    assert set(fit.parts) == {"train", "tower", "generate"}


def test_what_training_would_choose_itself_is_no_change() -> None:
    compiler = Compiler(whole=1, rows=0.1)
    fit = find_fit(cell_of(attention="splash"), PLACE, LENGTHS, compiler, compiler)
    assert fit is not None
    assert fit.train.request.mesh == own_mesh(cell_of(), PLACE) == (16, 1, 1)
    assert fit.changes == ()


def test_what_other_programs_keep_counts() -> None:
    """A tower that is computed in the step stays beside the state, and the state beside the tower."""
    cell = cell_of()
    computed = replace(cell, data=replace(cell.data, features="computed"))
    compiler = Compiler(whole=1, rows=0, state=1)
    for one, more in ((cell, 0), (computed, 1)):
        fit = find_fit(one, PLACE, LENGTHS, compiler, compiler)
        assert fit is not None
        assert (fit.train.beside > 0) == bool(more)
        assert fit.parts["tower"].beside == more * GIB
    full = Compiler(whole=16, rows=0)
    almost = find_fit(computed, PLACE, LENGTHS, full, full)
    assert almost is not None
    assert almost.train.request.mesh != (16, 1, 1)  # 16 GiB of 16 leave no room for the tower


def test_answers_that_do_not_fit_get_another_mesh() -> None:
    """With the tensor axis first; what it is, is told."""
    cell = cell_of("qwen1.5-7b", attention="splash", dtype="bfloat16")
    own = answering_mesh(cell, PLACE)
    assert own[1] > 1

    def ask(request: Request) -> Compiled:
        told = Compiled(0, 0, 0, 0, GIB, 16 * GIB, 1.0)
        too_much = request.program == "generate" and request.mesh[2] < 4
        return replace(told, needed=17 * GIB) if too_much else told

    fit = find_fit(cell, PLACE, LENGTHS, ask, ask)
    assert fit is not None
    assert fit.fits
    mesh = fit.parts["generate"].request.mesh
    assert mesh[2] == 4
    assert mesh[1] * mesh[2] >= own[1]
    assert f"evaluate: mesh.fsdp={mesh[1]}" in fit.changes
    assert "evaluate: mesh.tensor=4" in fit.changes


def test_what_fits_nowhere_is_told_at_its_nearest() -> None:
    compiler, guess = Compiler(whole=1000, rows=0.5), Compiler(whole=1000, rows=0.5)
    fit = find_fit(cell_of(), PLACE, LENGTHS, compiler, guess)
    assert fit is not None
    assert not fit.fits
    assert (fit.tried, set(fit.parts)) == (1, {"train"})  # one figure of the compiler, of the nearest way
    needed = [
        1000 / (fsdp * tensor) + 64 / (data * fsdp) / parts for (data, fsdp, tensor), parts in guess.asked
    ]
    assert fit.train.told.needed == round(min(needed) * GIB)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=3), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8, tensor=4)]
)
def test_a_mesh_that_does_not_divide_the_slice(mesh: MeshConfig) -> None:
    with pytest.raises(UserError, match="v5e-16 has 16 devices") as caught:
        find_fit(replace(cell_of(), mesh=mesh), PLACE, LENGTHS, Compiler(1, 0), Compiler(1, 0))
    assert "can have 1, 2, 4, 8, 16" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lengths() -> None:
    cell = cell_of()
    assert lengths_of(cell) == (384, 384)  # 256 and 16, in whole blocks of 128
    assert lengths_of(cell, 100) == (128, 128)
    packed = replace(cell, data=replace(cell.data, row_length=2048, max_text_tokens=2048))
    assert lengths_of(packed, 100) == (2048, 2176)  # rows have one length, whatever the texts
    short = replace(packed, llm=LLMConfig("toy-40k"))
    assert lengths_of(short).prompt == 2048  # what exceeds the context is not asked


def test_programs_of_one_shape_have_one_key() -> None:
    one = Request("train", cell_of(), "v5e-16", (16, 1, 1), 2048)
    other = replace(one.cell, train=replace(one.cell.train, seed=5, learning_rate=0.1, steps=7))
    assert replace(one, cell=other).key() == one.key()
    for changed in (
        replace(one, mesh=(8, 2, 1)),
        replace(one, topology="v6e-16"),
        replace(one, length=1024),
        replace(one, cell=cell_of("qwen1.5-1.8b")),
        replace(one, cell=cell_of(remat="none")),
    ):
        assert changed.key() != one.key()


def test_a_step_of_twice_the_rows_takes_twice_as_long() -> None:
    small, large = (step_time(cell_of(batch=batch), PLACE, (16, 1, 1), 2048, GIB) for batch in (128, 256))
    assert large.flops == 2 * small.flops
    assert small.bound == "products"
    assert large.seconds == pytest.approx(2 * small.seconds)
    assert flops_of_step(cell_of(remat="none"), 2048) < flops_of_step(cell_of(), 2048)
    assert step_time(cell_of(), PLACE, (16, 1, 1), 2048, 16 * GIB * 1000).bound == "memory"
    split = step_time(cell_of(batch=16), PLACE, (1, 16, 1), 128, GIB)
    assert split.links > 0


def test_the_tower_is_one_program_for_all_llms() -> None:
    """Neither the LLM nor the number of tokens changes what the tower does; the outputs that are read do."""
    cell = cell_of()
    one = Request("tower", cell, "v5e-16", (16, 1, 1), 0)
    other = replace(cell, llm=LLMConfig("qwen1.5-7b"), compressor=CompressorConfig("pool", 4))
    assert replace(one, cell=other).key() == one.key()
    levels = replace(cell, compressor=CompressorConfig("tokenpacker", 16))
    assert replace(one, cell=levels).key() != one.key()
    assert replace(one, program="generate").key() != one.key()


class Stub(Answers):
    """Answers of the stand-in."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler, self.errors = compiler, {}

    def __call__(self, number: int, request: Request) -> Compiled:
        return self.compiler(request)


def test_hours_and_money(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text('{"v5e": 2.0}')
    rows, (small, large) = table.plan(
        [cell_of(), cell_of(batch=7)],
        ["v5e-16", "v6e-16"],
        Stub(Compiler(10, 0.5)),
        table.read_prices(tmp_path / "prices.json"),
        lambda done, total: None,
    )
    priced, other, odd, _ = rows
    assert priced.step_s is not None
    assert priced.hours == pytest.approx(priced.step_s * 1000 / 3600)  # its tower's outputs are stored
    assert priced.chip_hours == pytest.approx(16 * (priced.hours or 0))
    assert priced.price == pytest.approx(2 * (priced.chip_hours or 0))
    assert other.price is None
    assert (odd.fits, odd.mesh) == (False, None)
    assert (small.topology, small.cells, large.cells) == ("v5e-16", 1, 1)
    shown = table.show(rows, [small, large], "and a check")
    assert "no mesh: 7 rows do not divide over 16 devices; with tensor=2, the most for 2 heads" in shown
    assert "v5e-16: 1 cells" in shown
    assert shown.endswith("and a check")
    assert len(json.loads(table.to_json(rows, [small, large], Stub(Compiler(1, 1))))["plans"]) == 4


@pytest.mark.parametrize(
    "text", ["[]", "{", *(f'{{"v5e": {price}}}' for price in ('"cheap"', 0, "true", "NaN")), '{"v5ee": 1}']
)
def test_prices_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"prices\.json"):
        table.read_prices(path)
