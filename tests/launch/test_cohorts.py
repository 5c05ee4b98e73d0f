"""Which cells of a sweep train together."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cohorts import Cohort, fix_cohorts, make_cohort, plan_cohorts
from launch.state import CellDirectory, open_sweep
from tests.integration.tiny import DATA, SCENES, read, steps
from vlmscale.cli import main
from vlmscale.config import Cell, Sweep, cell_id
from vlmscale.errors import EXIT_USER
from vlmscale.loading import load_cell
from vlmscale.records import Status
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.state import activation_bytes, state_bytes

PLENTY = 2.0**40


def cell_of(*words: str) -> Cell:
    return load_cell(SCENES, [*DATA, *steps(20), *(f"--config.{word}" for word in words)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare([cell_of()], tmp_path_factory.mktemp("prepared") / "data", lambda *_: None)


def directories(cells: list[Cell], root: Path) -> list[CellDirectory]:
    return [CellDirectory(cell_id(cell), cell, root / cell_id(cell)) for cell in cells]


def plan(cells: list[Cell], data: Prepared, workers: int = 1, memory: float = PLENTY) -> list[list[int]]:
    """Numbers of the cells of each cohort."""
    made = directories(cells, Path("cells"))
    number = {cell.id: index for index, cell in enumerate(made)}
    return sorted([number[cell.id] for cell in part] for part in plan_cohorts(made, data, workers, memory))


def test_cells_that_share_tower_and_order_train_together(data: Prepared) -> None:
    counts = [cell_of(f"compressor.visual_tokens={count}") for count in (0, 1, 4, 16)]
    others = [cell_of("compressor.name=mqt"), cell_of("train.learning_rate=0.5", "llm.name=toy-40k")]
    assert plan([*counts, *others], data) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    "word",
    [
        "train.seed=1",
        "train.batch_size=16",
        "train.steps=30",
        "train.checkpoint_every=7",
        "train.dtype=bfloat16",
        "data.seed=3",
    ],
)
def test_what_changes_the_batches_or_the_steps_parts_cells(word: str, data: Prepared) -> None:
    assert plan(
        [cell_of(), cell_of("compressor.visual_tokens=1"), cell_of(word, "compressor.visual_tokens=16")], data
    ) == [[0, 1], [2]]


def test_seeds_of_one_order_train_together(data: Prepared) -> None:
    cells = [cell_of(f"train.seed={seed}", "train.order_seed=0") for seed in (1, 2, 3)]
    assert plan([cell_of(), *cells], data) == [[0, 1, 2, 3]]


def test_packed_rows_part_cells_of_other_counts(data: Prepared) -> None:
    words = ("data.packing=pack", "data.row_length=256")
    cells = [
        cell_of(*words, f"compressor.visual_tokens={count}", f"compressor.name={name}")
        for count, name in ((1, "pool"), (4, "pool"), (4, "quecc"))
    ]
    assert plan(cells, data) == [[0], [1, 2]]


def test_rows_that_cut_texts_part_only_cells_that_they_cut_otherwise(data: Prepared) -> None:
    def cells(length: int) -> list[Cell]:
        return [
            cell_of(f"data.row_length={length}", f"compressor.visual_tokens={count}") for count in (1, 4, 64)
        ]

    assert plan(cells(512), data) == [[0, 1, 2]]
    assert plan(cells(72), data) == [[0, 1], [2]]


def test_no_worker_is_left_without_work_and_the_work_is_even(data: Prepared) -> None:
    cells = [cell_of(f"compressor.visual_tokens={count}") for count in (0, 1, 4, 9, 16, 64)]
    parts = plan(cells, data, workers=2)
    assert len(parts) == 2
    assert sorted(index for part in parts for index in part) == list(range(6))
    made = directories(cells, Path("cells"))
    work = [sum(made[index].work for index in part) for part in parts]
    assert max(work) < 0.7 * sum(work)
    assert len(plan(cells[:2], data, workers=8)) == 2


def test_cells_of_one_shape_stay_together(data: Prepared) -> None:
    same = [cell_of(f"train.seed={seed}", "train.order_seed=0") for seed in (0, 1, 2)]
    others = [cell_of(f"compressor.visual_tokens={count}", "train.order_seed=0") for count in (0, 1, 16)]
    assert [0, 1, 2] in [sorted(set(part) & {0, 1, 2}) for part in plan([*same, *others], data, workers=2)]


def test_a_cohort_fits_into_memory(data: Prepared) -> None:
    cells = [cell_of(f"compressor.visual_tokens={count}") for count in (1, 4, 16, 64)]
    rows = data.vocab_rows(cells[0])
    needs = [
        (
            state_bytes(cell, rows),
            activation_bytes(cell, rows, data.samples("train", cell).one_per_row().shape.length),
        )
        for cell in cells
    ]
    two = sum(state for state, _ in needs[:2]) * 1.01 + max(activations for _, activations in needs)
    parts = plan(cells, data, memory=two)
    assert sorted(map(len, parts)) == [2, 2]
    assert plan(cells, data, memory=1.0) == [[0], [1], [2], [3]]  # one that fits nowhere still has its own


def test_membership_is_fixed_at_the_first_launch(data: Prepared, tmp_path: Path) -> None:
    cells = [cell_of(f"compressor.visual_tokens={count}") for count in (0, 1, 4)]
    made = open_sweep(Sweep("s", cells), tmp_path)
    first = fix_cohorts(made, tmp_path, data, workers=1)
    assert [len(cohort.cells) for cohort in first] == [3]
    assert first[0].path == tmp_path / "cohorts" / first[0].id
    again = fix_cohorts(open_sweep(Sweep("s", cells), tmp_path), tmp_path, data, workers=3, memory=1.0)
    assert [cohort.id for cohort in again] == [cohort.id for cohort in first]
    assert read(tmp_path / "sweep.json")["cohorts"] == [[cell.id for cell in made]]


@pytest.mark.parametrize("memory", ["0", "-3", "nan"])
def test_no_memory_at_all_is_refused_before_anything_is_prepared(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlmscale.train.prepared.prepare", lambda *_: pytest.fail("it is prepared"))
    words = ["sweep", "run", "configs/sweeps/demo.py", "--out", str(tmp_path), f"--memory={memory}"]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == EXIT_USER
        assert capsys.readouterr().err == f"vlmscale sweep: --memory={memory}: must be above 0\n"
    assert not list(tmp_path.iterdir())


def test_a_cohort_of_one_is_an_ordinary_run(tmp_path: Path) -> None:
    [cell] = directories([cell_of()], tmp_path)
    cohort = make_cohort([cell], tmp_path)
    assert (cohort.id, cohort.path) == (cell.id, cell.path)


def test_a_cohort_is_finished_when_what_can_be_done_is(tmp_path: Path) -> None:
    made = directories([cell_of(), cell_of("compressor.visual_tokens=1")], tmp_path)
    cohort: Cohort = make_cohort(made, tmp_path)
    for cell in made:
        cell.path.mkdir(parents=True)
    assert not cohort.finished
    Status(made[0].path).update(state="done")
    assert not cohort.finished
    Status(made[1].path).update(state="failed")
    assert not cohort.finished
    Status(made[1].path).update(failed_at=3)
    assert cohort.finished
    Status(made[0].path).update(state="failed", failed_at=5)
    assert not cohort.finished, "when all have failed the next launch tries again"
