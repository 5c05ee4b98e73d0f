"""The mesh of a cell, with a stand-in for the compiler: the order of what is tried, and what is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlmscale.config import Cell, CompressorConfig, LLMConfig, MeshConfig, TrainConfig
from vlmscale.errors import UserError
from vlmscale.plan import table
from vlmscale.plan.compiled import Compiled, Request
from vlmscale.plan.fit import find_fit, meshes
from vlmscale.plan.roofline import step_flops, step_time
from vlmscale.plan.slices import find_slice
from vlmscale.train.state import state_bytes

GIB = 2**30
PLACE = find_slice("v5e-16")


def cell_of(llm: str = "qwen1.5-0.5b", batch: int = 128, **train: object) -> Cell:
    compressor = CompressorConfig("pool", 16)
    recipe = TrainConfig(batch_size=batch, steps=1000, warmup_steps=1, **train)  # type: ignore[arg-type]
    return Cell(llm=LLMConfig(llm), compressor=compressor, train=recipe)


class Compiler:
    """Says that a program needs so many bytes a device: `whole` over fsdp and tensor, and the rows' share."""

    def __init__(self, whole: float, rows: float) -> None:
        self.whole, self.rows = whole, rows
        self.asked: list[tuple[tuple[int, int, int], int]] = []

    def __call__(self, request: Request) -> Compiled:
        data, fsdp, tensor = request.mesh
        train = request.cell.train
        self.asked.append((request.mesh, train.accumulate))
        needed = (
            self.whole / (fsdp * tensor) + self.rows * train.batch_size / (data * fsdp) / train.accumulate
        )
        return Compiled(0, 0, 0, 0, round(needed * GIB), 16 * GIB, 1.0)


def test_meshes_are_tried_from_the_cheapest_on() -> None:
    """Small: all devices along data first; then split weights, then the batch in parts, then tensor."""
    found = list(meshes(cell_of(), PLACE))
    assert found[0] == ((16, 1, 1), 1)
    assert found[1] == ((1, 16, 1), 1)
    assert [parts for _, parts in found[2:5]] == [2, 4, 8]
    assert found[5] == ((8, 1, 2), 1)
    for (data, fsdp, tensor), parts in found:
        assert data * fsdp * tensor == 16
        assert 128 % (data * fsdp * parts) == 0


def test_a_large_state_is_split_from_the_start() -> None:
    cell = cell_of("qwen1.5-7b")
    (_, fsdp, _), _ = next(iter(meshes(cell, PLACE)))
    share = state_bytes(cell, 151_936) / fsdp
    assert share <= 0.6 * 16 * GIB < 2 * share


def test_a_batch_that_is_smaller_than_the_slice_needs_the_tensor_axis() -> None:
    (_, _, tensor), _ = next(iter(meshes(cell_of(batch=8), PLACE)))
    assert tensor == 2
    assert not list(meshes(cell_of(batch=7), PLACE))
    assert find_fit(cell_of(batch=7), PLACE, 2048, Compiler(1, 0)) is None


def test_a_mesh_that_the_config_names_is_the_one() -> None:
    cell = replace(cell_of(), mesh=MeshConfig(fsdp=4, tensor=2))
    assert {mesh for mesh, _ in meshes(cell, PLACE)} == {(2, 4, 2)}


def test_the_first_that_fits_is_taken_and_what_changed_is_told() -> None:
    compiler = Compiler(whole=20, rows=0.5)
    fit = find_fit(cell_of(), PLACE, 2048, compiler)
    assert fit is not None
    assert fit.fits
    assert fit.request.mesh == (1, 16, 1)  # 20 whole are too many, 20 / 16 + 4 fit
    assert fit.changes == ("train.attention=splash",)
    assert fit.tried == len(compiler.asked) == 2
    fit = find_fit(cell_of(attention="splash"), PLACE, 2048, Compiler(whole=20, rows=3))
    assert fit is not None
    assert fit.changes == ("train.accumulate=2",)
    assert fit.request.cell.train.dtype == "bfloat16"


def test_what_fits_nowhere_is_told_at_its_nearest() -> None:
    compiler = Compiler(whole=1000, rows=0.5)
    fit = find_fit(cell_of(), PLACE, 2048, compiler)
    assert fit is not None
    assert not fit.fits
    assert fit.tried == len(compiler.asked) > 5
    needed = [
        1000 / (fsdp * tensor) + 64 / (data * fsdp) / parts for (data, fsdp, tensor), parts in compiler.asked
    ]
    assert fit.compiled.needed == round(min(needed) * GIB)


def test_programs_of_one_shape_have_one_key() -> None:
    one = Request(cell_of(), "v5e-16", (16, 1, 1), 2048)
    other = replace(one.cell, train=replace(one.cell.train, seed=5, learning_rate=0.1, steps=7))
    assert replace(one, cell=other).key() == one.key()
    for changed in (
        replace(one, mesh=(8, 2, 1)),
        replace(one, topology="v6e-16"),
        replace(one, row_length=1024),
        replace(one, cell=cell_of("qwen1.5-1.8b")),
        replace(one, cell=cell_of(remat="none")),
    ):
        assert changed.key() != one.key()


def test_a_step_of_twice_the_rows_takes_twice_as_long() -> None:
    small, large = (step_time(cell_of(batch=batch), PLACE, (16, 1, 1), 2048, GIB) for batch in (128, 256))
    assert large.flops == 2 * small.flops
    assert small.bound == "products"
    assert large.seconds == pytest.approx(2 * small.seconds)
    assert step_flops(cell_of(remat="none"), 2048) < step_flops(cell_of(), 2048)
    assert step_time(cell_of(), PLACE, (16, 1, 1), 2048, 16 * GIB * 1000).bound == "memory"
    split = step_time(cell_of(batch=16), PLACE, (1, 16, 1), 128, GIB)
    assert split.links > 0


def test_hours_and_money(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "compile_request", lambda request, cache: Compiler(10, 0.5)(request))
    (tmp_path / "prices.json").write_text('{"v5e": 2.0}')
    cells = [("one", cell_of()), ("odd", cell_of(batch=7))]
    rows = table.plan(
        cells, ["v5e-16", "v6e-16"], tmp_path, table.read_prices(tmp_path / "prices.json"), print
    )
    priced, other, odd, _ = rows
    assert priced.step_s is not None
    assert priced.hours == pytest.approx(priced.step_s * 1000 / 3600)
    assert priced.chip_hours == pytest.approx(16 * (priced.hours or 0))
    assert priced.price == pytest.approx(2 * (priced.chip_hours or 0))
    assert other.price is None
    assert (odd.fits, odd.mesh) == (False, None)
    shown = table.show(rows)
    assert "batch does not divide" in shown
    assert len(json.loads(table.to_json(rows))["plans"]) == 4


@pytest.mark.parametrize("text", ["[]", '{"v5e": "cheap"}', '{"v5e": 0}', '{"v5e": true}', "{"])
def test_prices_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"prices\.json"):
        table.read_prices(path)
