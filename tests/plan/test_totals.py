"""What a sweep takes together: cells in one cohort share a tower's pass, all share a store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmscale.config import Cell, CompressorConfig, LLMConfig, TowerConfig, TrainConfig
from vlmscale.models.sizes import TOWERS
from vlmscale.plan.compiled import Compiled, Request
from vlmscale.plan.fit import Fit, Part
from vlmscale.plan.memory import predict
from vlmscale.plan.roofline import step_time, tower_time
from vlmscale.plan.slices import find_slice
from vlmscale.plan.totals import cohorts, store_bytes, totals

PLACE, TOWER = find_slice("v5e-16"), "siglip-base-patch16-224"


def cell_of(llm: str, count: int, **train: object) -> Cell:
    recipe = TrainConfig(batch_size=16, steps=100, warmup_steps=1, dtype="bfloat16", **train)  # type: ignore[arg-type]
    cell = Cell(TowerConfig(TOWER), CompressorConfig("pool", count), LLMConfig(llm), train=recipe)
    cell.data.features = "computed"
    return cell


def fit_of(cell: Cell) -> Fit:
    parts = {}
    for program in ("train", "tower"):
        request = Request(program, cell, PLACE.name, (16, 1, 1), 512)
        parts[program] = Part(request, predict(request))
    return Fit(parts, (), 1)


def pairs(*cells: Cell) -> list[tuple[Cell, Fit | None]]:
    return [(cell, fit_of(cell)) for cell in cells]


def test_two_cells_of_one_llm_and_one_of_another() -> None:
    cells = [cell_of("toy-135k", 4), cell_of("toy-135k", 49), cell_of("toy-375k", 4)]
    planned = pairs(*cells)
    found = totals(planned, PLACE)
    tower = 16 * 100 * tower_time(cells[0], PLACE) / 3600
    steps = [
        step_time(cell, PLACE, (16, 1, 1), 512, fit.train.told.needed).seconds for cell, fit in planned if fit
    ]
    trained = 16 * 100 * sum(steps) / 3600
    assert (found.cells, found.cohorts) == (3, 2)
    assert found.towers == pytest.approx(3 * tower)
    assert found.apart == pytest.approx(trained + 3 * tower)
    assert found.together == pytest.approx(trained + 2 * tower)
    assert found.stored == pytest.approx(trained + tower)
    size = TOWERS[TOWER]
    assert found.store_tib * 2**40 == pytest.approx(1600 * size.num_patches * size.width * 2)


def test_what_does_not_fit_is_left_out() -> None:
    small, large = cell_of("toy-135k", 4), cell_of("toy-375k", 4)
    told = Compiled(0, 0, 0, 0, 2, 1, 0.0)
    none = Fit({"train": Part(Request("train", large, PLACE.name, (16, 1, 1), 512), told)}, (), 1)
    found = totals([(small, fit_of(small)), (large, none), (large, None)], PLACE)
    assert found.cells == 1


def test_states_that_do_not_fit_beside_one_another_are_cohorts_apart() -> None:
    cells = [cell_of("toy-135k", count) for count in (1, 4, 49)]
    fits = [(cell, fit_of(cell)) for cell in cells]
    assert len(cohorts(fits)) == 1
    first = fits[0][1].train
    rest = max(fit.train.used - fit.train.told.arguments for _, fit in fits)
    tight = []
    for cell, fit in fits:
        told = replace(fit.train.told, limit=round(2.5 * first.told.arguments) + rest)
        tight.append((cell, replace(fit, parts=fit.parts | {"train": replace(fit.train, told=told)})))
    assert [len(group) for group in cohorts(tight)] == [2, 1]


def test_other_data_are_no_cohort() -> None:
    one, other = cell_of("toy-135k", 4), cell_of("toy-135k", 49)
    other.data.max_text_tokens = 100
    assert len(cohorts([(cell, fit_of(cell)) for cell in (one, other)])) == 2
    assert store_bytes([replace(one, compressor=CompressorConfig("pool", 0))]) == 0
    # What two methods read of one tower is stored once: the selected layer is in both.
    packer = replace(one, compressor=CompressorConfig("tokenpacker", 49))
    size = TOWERS[TOWER]
    per_layer = 1600 * size.num_patches * size.width * 2
    assert store_bytes([one, packer]) == store_bytes([packer]) == (1 + len(size.levels)) * per_layer
