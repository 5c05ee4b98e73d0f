"""What a sweep will take, by arithmetic, before anything is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch.price import Predicted, as_predicted, check_limit, predicted, together
from launch.state import CellDirectory, directories
from vlmscale.config import Cell, leaves
from vlmscale.errors import UserError
from vlmscale.loading import load_cell, load_sweep
from vlmscale.plan.ask import Answers
from vlmscale.plan.roofline import Efficiencies, step_time, tower_time
from vlmscale.plan.slices import find_slice
from vlmscale.plan.table import plan

TUNE, SMALL = "configs/llava_finetune.py", "qwen1.5-0.5b"


def named(cells: Sequence[Cell]) -> list[CellDirectory]:
    """As of a sweep on disk; ids would need the checkpoints that the configs name."""
    return [CellDirectory(f"{number:012x}", cell, Path(f"{number}")) for number, cell in enumerate(cells)]


@pytest.fixture(scope="module")
def tune() -> Cell:
    return load_cell(f"{TUNE}:{SMALL},144,tokenpacker", [])


def test_the_figures_are_those_of_the_plan(tune: Cell, tmp_path: Path) -> None:
    first = load_cell(f"configs/llava_pretrain.py:{SMALL},144,tokenpacker", [])
    cells, slices = [first, tune], ("v5e-16", "h200-8")
    rows, _ = plan(cells, slices, Answers(cells, "none", tmp_path), {}, lambda done, total: None, 128)
    for number, name in enumerate(slices):
        found = predicted(named(cells), find_slice(name), text_tokens=128)
        assert [one.id for one in found] == ["000000000000", "000000000001"]
        for one, row in zip(found, rows[number::2], strict=True):
            assert (one.topology, one.chips, one.reason) == (row.topology, 16 if number == 0 else 8, "")
            assert (one.hours, one.chip_hours) == (row.hours, pytest.approx(row.chip_hours))
            assert one.changes == row.changes


def test_two_slices_take_half_the_time_and_gradients_between_them(tune: Cell) -> None:
    one, two = (predicted(named([tune]), find_slice("v5e-16"), count)[0] for count in (1, 2))
    assert (two.topology, two.chips) == ("2xv5e-16", 32)
    assert one.hours is not None
    assert two.hours is not None
    assert 0.45 * one.hours < two.hours < one.hours
    place, mesh = find_slice("2xv5e-4"), (8, 1, 1)
    inside = step_time(tune, replace(place, count=1, topology="2x4"), mesh, 2048, 0)
    across = step_time(tune, place, mesh, 2048, 0)
    assert (inside.products, inside.memory) == (across.products, across.memory)
    assert across.links > 4 * inside.links  # 25 Gbit/s a chip are few


def test_a_calibration_counts(tune: Cell) -> None:
    place = find_slice("v5e-16")
    slow = {place.generation.device.kind: Efficiencies(products=0.25)}
    [assumed], [measured] = (predicted(named([tune]), place, calibration=given) for given in (None, slow))
    assert assumed.hours is not None
    assert measured.hours is not None
    assert measured.hours > 1.5 * assumed.hours


def test_the_demo_is_priced_and_what_cannot_run_says_why() -> None:
    cells = directories(load_sweep("configs/sweeps/demo.py", []), Path("out"))
    found = predicted(cells[:2], find_slice("v5e-4"))
    assert [one.id for one in found] == [cell.id for cell in cells[:2]]
    assert all(one.hours is not None and 0 < one.hours < 0.1 for one in found)
    [none] = predicted(cells[:1], find_slice("v5e-256"))
    assert (none.hours, none.chip_hours) == (None, None)
    assert "rows do not divide over 256 devices" in none.reason
    [large] = predicted(named([load_cell(f"{TUNE}:qwen1.5-14b,144,tokenpacker", [])]), find_slice("v5e-1"))
    assert large.hours is None
    assert "GiB too much (train" in large.reason


def test_slices_that_cannot_be(tune: Cell) -> None:
    for name, count, told in (
        ("h200-8", 2, "2 slices of h200-8: GPUs have none"),
        ("v4-16", 2, "2 slices of v4-16: how fast they are joined is not known"),
        ("v5e-16", 0, "0 slices of v5e-16: give 1 or more"),
    ):
        with pytest.raises(UserError, match=told):
            predicted(named([tune]), find_slice(name), count)
    torn = load_cell(f"{TUNE}:{SMALL},144,tokenpacker", ["--config.mesh.fsdp=32"])
    with pytest.raises(UserError, match=r"mesh.fsdp=32: 2xv5e-16 is 2 slices, .* multiple of 2"):
        predicted(named([torn]), find_slice("v5e-16"), 2)


def priced(name: str, hours: float | None, tower: float = 0.0) -> Predicted:
    return Predicted(name, f"label of {name}", "v5e-16", 16, hours, tower, (), "" if hours else "no mesh")


def test_cells_that_train_together_share_a_tower(tune: Cell) -> None:
    cost = together([priced("a", 3.0, 1.0), priced("b", 2.5, 0.5), priced("c", None)])
    assert cost == (2.0 + 2.0 + 1.0, 5.0 * 16)
    assert together([]) == (0.0, 0.0)
    cell = replace(tune, data=replace(tune.data, features="computed"))
    stored = replace(tune, data=replace(tune.data, features="stored"))
    place = find_slice("v5e-16")
    one, other = predicted(named([cell, stored]), place)
    assert one.tower_hours == pytest.approx(tune.train.steps * tower_time(cell, place) / 3600)
    assert other.tower_hours == 0


def test_the_first_cell_above_the_limit_is_named() -> None:
    found = [priced("a", 1.0), priced("b", 3.0), priced("c", 4.0)]
    check_limit(found, 64)
    with pytest.raises(UserError) as caught:
        check_limit(found, 20.5)
    assert str(caught.value) == (
        "cell b (label of b) on v5e-16: predicted to take 48 chip-hours, more than --max-chip-hours 20.5; "
        "nothing was submitted"
    )
    with pytest.raises(UserError, match=r"predicted to take 0.000123 chip-hours, more than .* 1e-06;"):
        check_limit([priced("c", 1.234e-4 / 16)], 1e-6)
    with pytest.raises(UserError, match=r"cell d .*: cannot run there: no mesh; nothing was submitted"):
        check_limit([priced("d", None)], 1000)
    for limit in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--max-chip-hours .*: must be a number above 0"):
            check_limit(found, limit)


def test_a_cell_runs_as_it_was_predicted(tune: Cell) -> None:
    [found] = predicted(named([tune]), find_slice("v5e-16"))
    assert "train.attention=splash" in found.changes
    more = (*found.changes, "mesh.tensor=2", "evaluate: mesh.fsdp=1")
    made = as_predicted(tune, replace(found, changes=more))
    assert (made.train.attention, made.mesh.tensor, made.mesh.fsdp) == ("splash", 2, tune.mesh.fsdp)
    for (name, value, kind), (_, other, _) in zip(leaves(tune), leaves(made), strict=True):
        assert value == other or not kind["changes_result"], f"{name} changes the cell's id"
