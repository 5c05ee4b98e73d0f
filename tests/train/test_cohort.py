"""Cells that train together give what each gives alone, share what they can, and are resumed as a unit."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.integration.tiny import DATA, SCENES, lines, read, saved_steps, steps
from vlmscale.config import Cell, cell_id
from vlmscale.errors import UserError
from vlmscale.loading import load_cell
from vlmscale.sharding import make_mesh
from vlmscale.train.cohort import Groups, Member, alike
from vlmscale.train.loop import PreemptedError, train
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.run import open_run
from vlmscale.train.together import read_together

STEPS = 20
FREEZE = "--config.train.llm_rate=0.0"  # as in LLaVA's first stage
COMPUTED = "--config.data.features=computed"


def nothing(*_: object) -> None:
    return None


def cell_of(name: str, visual_tokens: int, *words: str) -> Cell:
    often = ("--config.train.checkpoint_every=5", "--config.train.heldout_every=10")
    method = (f"--config.compressor.name={name}", f"--config.compressor.visual_tokens={visual_tokens}")
    return load_cell(SCENES, [*DATA, *steps(STEPS), *often, *method, *words])


def members(cells: Sequence[Cell], root: Path, data: Prepared) -> list[Member]:
    """Opened run directories, named as those of a sweep."""
    made = [Member(cell, root / "cells" / cell_id(cell)) for cell in cells]
    for cell, run in made:
        open_run(cell, run, data.path, "sweep")
    return made


def together(
    cells: Sequence[Cell], root: Path, data: Prepared, progress: Callable[..., None] = nothing
) -> list[Member]:
    made = members(cells, root, data)
    train(made, root / "cohort", data, progress)
    return made


def apart(cells: Sequence[Cell], root: Path, data: Prepared) -> list[Member]:
    made = members(cells, root, data)
    for member in made:
        train([member], member.run, data, nothing)
    return made


def losses(run: Path) -> list[float]:
    logged = lines(run / "metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    return [line["loss"] for line in logged]


def check_equal(one: Sequence[Member], other: Sequence[Member]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(losses(mine.run), losses(theirs.run), rtol=1e-5)
        mine_logged, theirs_logged = lines(mine.run / "metrics.jsonl"), lines(theirs.run / "metrics.jsonl")
        for name in ("grad_norm", "heldout_loss"):
            values = [[line[name] for line in part if name in line] for part in (mine_logged, theirs_logged)]
            assert values[0]
            np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    cells = [cell_of("pool", 4), cell_of("quecc", 4)]
    return prepare(cells, tmp_path_factory.mktemp("stored") / "data", nothing)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    cells = [cell_of("pool", 4, COMPUTED), cell_of("quecc", 4, COMPUTED)]
    return prepare(cells, tmp_path_factory.mktemp("computed") / "data", nothing)


MANY = (("pool", 0), ("pool", 1), ("quecc", 4), ("m3", 4))


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_cohort_gives_what_its_cells_give_alone(
    stage: str, stored: Prepared, computed: Prepared, tmp_path: Path
) -> None:
    """The first stage with the tower in the step and a frozen LLM, the second with all that trains."""
    if stage == "first":
        cells = [cell_of(name, count, COMPUTED, FREEZE) for name, count in MANY if count]
        data = computed
    else:
        cells, data = [cell_of(name, count) for name, count in MANY], stored
    check_equal(together(cells, tmp_path / "one", data), apart(cells, tmp_path / "each", data))
    folder = tmp_path / "one" / "cohort" / "checkpoints"
    assert saved_steps(tmp_path / "one" / "cohort") == [15, 20]
    assert folder.exists()


def test_what_cells_share_is_there_once(computed: Prepared, tmp_path: Path) -> None:
    cells = [
        cell_of(name, count, COMPUTED, FREEZE) for name, count in (("pool", 1), ("pool", 4), ("quecc", 4))
    ]
    reading = read_together(computed, "train", cells, training=True)
    # Questions make another layout of the same number of tokens.
    assert reading.number == (0, 1, 2)
    with reading.training(8, 0, 0, (0, 1)) as stream:
        batch = next(stream)
    assert [name for name in batch if name.endswith("pixels")] == ["pixels"]
    shapes = [reading.of_cell(batch, index)["tokens"].shape for index in range(3)]
    assert shapes[0][1] < shapes[1][1] == shapes[2][1]
    with jax.set_mesh(make_mesh()):
        groups = Groups(members(cells, tmp_path, computed), computed, make_mesh(), 1, lambda _: False)
        for group in groups.groups:
            groups.begin(group, nothing)
    first, *others = groups.groups
    assert groups.shared_tower is first.frozen["tower"]
    for group in others:
        assert group.frozen["decoder"] is first.frozen["decoder"]
        assert group.frozen["tower"] is first.frozen["tower"]
        assert set(group.state.params) == {"compressor"}  # type: ignore[union-attr]


def test_a_cohort_is_stopped_and_resumed_as_a_unit(stored: Prepared, tmp_path: Path) -> None:
    cells = [cell_of("pool", 1), cell_of("pool", 4), cell_of("quecc", 4)]
    straight = together(cells, tmp_path / "straight", stored)

    def stop(step: int, *_: object) -> None:
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="step 10"):
        together(cells, tmp_path / "broken", stored, stop)
    broken = together(cells, tmp_path / "broken", stored)
    for mine, theirs in zip(broken, straight, strict=True):
        assert read(mine.run / "done.json")["resumed_from"] == [10]
        assert (
            read(mine.run / "done.json")["params_sha256"] == read(theirs.run / "done.json")["params_sha256"]
        )
        assert losses(mine.run) == losses(theirs.run)
    # What each cell is evaluated with lies in its own directory.
    assert all(saved_steps(member.run) == [STEPS] for member in broken)


def seeds(*words: str) -> list[Cell]:
    return [
        cell_of(
            "pool",
            4,
            f"--config.train.seed={seed}",
            "--config.train.order_seed=0",
            f"--config.train.learning_rate={rate}",
            *words,
        )
        for seed, rate in ((0, 1e-3), (1, 1e-3), (1, 3e-3))
    ]


def test_cells_of_one_shape_run_as_one_program_and_give_the_same(stored: Prepared, tmp_path: Path) -> None:
    found = {}
    for way in ("always", "never"):
        cells = seeds(f"--config.train.batch_cells={way}")
        assert alike(cells) == [(0, 1, 2)]
        found[way] = together(cells, tmp_path / way, stored)
        items = {path.name for path in (tmp_path / way / "cohort" / "checkpoints" / "20").iterdir()}
        assert len([name for name in items if name.endswith("params")]) == (1 if way == "always" else 3)
    check_equal(found["always"], found["never"])
    curves = [losses(member.run) for member in found["always"]]
    assert curves[0] != curves[1] != curves[2]


def test_how_cells_of_one_shape_run_is_measured_once_and_kept(stored: Prepared, tmp_path: Path) -> None:
    cells, told = seeds(), []

    def stop(step: int, *_: object) -> None:
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    made = members(cells, tmp_path, stored)
    with pytest.raises(PreemptedError):
        train(made, tmp_path / "cohort", stored, stop, told.append)
    decided = read(tmp_path / "cohort" / "cohort.json")
    assert set(decided["batched"]) == {"0,1,2"}
    assert set(decided["seconds"]["0,1,2"]) == {"batched", "apart"}
    assert [line for line in told if "3 cells of one shape" in line]
    (tmp_path / "cohort" / "cohort.json").write_text(json.dumps(decided))
    again: list[str] = []
    train(made, tmp_path / "cohort", stored, nothing, again.append)
    assert not [line for line in again if "of one shape" in line]
    straight = together(
        seeds(f"--config.train.batch_cells={'always' if decided['batched']['0,1,2'] else 'never'}"),
        tmp_path / "straight",
        stored,
    )
    for mine, theirs in zip(made, straight, strict=True):
        assert losses(mine.run) == losses(theirs.run)


@pytest.mark.parametrize("way", ["always", "never"])
def test_a_cell_that_diverges_is_left_behind_by_the_others(
    way: str, stored: Prepared, tmp_path: Path
) -> None:
    cells = seeds(f"--config.train.batch_cells={way}")
    alone = together(cells, tmp_path / "good", stored)
    cells[1].train.learning_rate = 1e30
    made = members(cells, tmp_path / "bad", stored)
    told: list[str] = []

    def stop(step: int, *_: object) -> None:
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError):
        train(made, tmp_path / "bad" / "cohort", stored, stop, told.append)
    train(made, tmp_path / "bad" / "cohort", stored, nothing, told.append)
    for place in (0, 2):
        np.testing.assert_allclose(losses(made[place].run), losses(alone[place].run), rtol=1e-5)
        assert (made[place].run / "done.json").exists()
    status = read(made[1].run / "status.json")
    assert status["state"] == "failed"
    assert 1 <= status["failed_at"] <= 5
    assert f"not finite at step {status['failed_at']} (records train/" in status["last_error"]
    assert not (made[1].run / "done.json").exists()
    assert [line for line in told if "is left behind" in line]
    assert all(math.isfinite(line["loss"]) for line in lines(made[1].run / "metrics.jsonl"))


def test_a_step_that_is_not_finite_is_skipped_and_counted(stored: Prepared, tmp_path: Path) -> None:
    """With steps so large that nothing stays finite, the parameters stay the last good ones."""
    cell = cell_of("pool", 4, "--config.train.nonfinite=skip", "--config.train.learning_rate=1e30")
    [made] = members([cell], tmp_path, stored)
    told: list[str] = []
    train([made], made.run, stored, nothing, told.append)
    logged = lines(made.run / "metrics.jsonl")
    skipped = [line["step"] for line in logged if "skipped" in line]
    assert read(made.run / "done.json")["skipped"] == len(skipped) >= STEPS - 5
    assert all("loss" not in line for line in logged if "skipped" in line)
    assert sum("skipped" in line for line in told) == len(skipped)
    assert "records train/" in told[-1]


def test_cells_of_other_orders_cannot_read_together(stored: Prepared, tmp_path: Path) -> None:
    other: Any = cell_of("pool", 4, "--config.train.seed=1")
    with pytest.raises(ValueError, match="same samples in the same order"):
        read_together(stored, "train", [cell_of("pool", 4), other], training=True)


def test_nothing_that_trains_is_refused() -> None:
    with pytest.raises(UserError, match=r"nothing trains: train\.llm_rate is 0"):
        cell_of("pool", 4, FREEZE, "--config.train.compressor_rate=0.0")
    with pytest.raises(UserError, match="a blind model has nothing else"):
        cell_of("pool", 0, FREEZE)
