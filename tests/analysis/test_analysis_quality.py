"""The validator: what cannot be used is an error, what is doubtful one line; sound data says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.data import DataError, load
from analysis.quality import copied_cells

Rows = list[dict[str, Any]]
Write = Callable[[Rows], Path]
SIZES, COUNTS = (0.5, 1.8, 4, 7), (1, 4, 16, 36)
GRID = [(n, v) for n in SIZES for v in COUNTS]


def score(n: float, v: float) -> float:
    return round(0.3 + 0.04 * np.log(n) + 0.01 * np.log(max(v, 1)), 4)


def lines(path: Path, cells: Iterable[tuple[Any, ...]], head: str = "") -> tuple[str, ...]:
    """Warnings of a CSV file `mine.csv` with these rows."""
    text = "\n".join(",".join(map(str, cell)) for cell in cells)
    (path / "mine.csv").write_text(f"llm_params_b,visual_tokens,score{head}\n{text}\n")
    return load(path / "mine.csv").warnings


def sound() -> list[tuple[Any, ...]]:
    return [(n, v, score(n, v)) for n, v in GRID]


def test_sound_data_says_nothing(tmp_path: Path, rows: Rows, write: Write) -> None:
    assert lines(tmp_path, sound()) == ()
    assert load("paper-reasoning").warnings == ()
    high = [{**row, "chance": 0.0} for row in rows if row["visual_tokens"]]
    assert load(write(high)).warnings == ()


def test_the_copied_cell_of_the_paper_is_flagged_and_kept() -> None:
    dataset = load("paper-ocr")
    (ocr,) = dataset.tables
    (pair,) = copied_cells(ocr)
    assert [(ocr.n[i], ocr.v[i]) for i in pair] == [(4e9, 576), (7e9, 576)]
    assert ocr.n.size == 28
    assert copied_cells(ocr.without(pair[1])) == []
    assert dataset.warnings == (
        "ocr: 1 score is rounded to 3 decimals or fewer, most have 6 or more (first: ocr.csv:25, 0.205)",
        "ocr: (7B, V = 576) has the score of (4B, V = 576) to all decimals, 0.3460536811: a copy?",
    )
    assert copied_cells(load("paper-reasoning").tables[0]) == []


@pytest.mark.parametrize(
    ("value", "copied"),
    [
        (0.3460536811, True),
        (0.34605368, True),
        (0.3460537, False),  # seven decimals
        (0.34, False),
        (103 / 300, False),  # an honest repeat: 103 of 300 items
        (0.343333333, False),
    ],
)
def test_a_copy_has_eight_decimals_and_is_no_count(value: float, copied: bool, tmp_path: Path) -> None:
    cells = sound()
    for i in (3, 9):
        cells[i] = (*cells[i][:2], value)
    found = lines(tmp_path, cells)
    assert bool(found) == copied
    assert all("(4B, V = 4) has the score of (500M, V = 36)" in line for line in found)


def test_known_item_counts_make_no_copies(tmp_path: Path) -> None:
    assert (
        lines(
            tmp_path,
            [(*GRID[i], 0.3460536811 if i in (3, 9) else 0.1 + i / 97, 999) for i in range(16)],
            ",n_items",
        )
        == ()
    )


def test_a_copy_in_one_task_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells = [(n, v, f"{rng.uniform(0.2, 0.6):.10f}", task) for n, v in GRID for task in "ab"]
    cells[6] = (*cells[6][:2], cells[2][2], "a")
    (line,) = lines(tmp_path, cells, ",task")
    assert line.startswith("mine, a: (500M, V = 36) has the score of (500M, V = 4) to all decimals")


def test_a_copied_loss_is_found(rows: Rows, write: Write) -> None:
    losses = [{**row, "heldout_loss": 2.123456789, "chance": 0.0} for row in rows if row["visual_tokens"]]
    table = load(write(losses)).tables[-1]
    assert len(copied_cells(table)) == 19
    varied = replace(table, error=2 + np.arange(20) / 7.3)
    assert copied_cells(varied) == []


def test_many_copies_are_cut_short(rows: Rows, write: Write) -> None:
    losses = [{**row, "heldout_loss": 2.123456789, "chance": 0.0} for row in rows if row["visual_tokens"]]
    found = load(write(losses)).warnings
    assert len(found) == 6
    assert found[0].startswith(
        "held-out loss: (nano, V = 4) has the loss of (nano, V = 1) to all decimals, 2.123456789"
    )
    assert found[-1] == "held-out loss: and 14 more copied cells"


def test_a_row_given_twice_counts_once(rows: Rows, write: Write) -> None:
    seen = [{**row, "chance": 0.0} for row in rows if row["visual_tokens"]]
    again = load(write([*seen, seen[5], seen[9]]))
    assert again.warnings == (
        "2 rows are given again with the same score and counted once "
        "(first: results.jsonl:61 as results.jsonl:6)",
    )
    assert again.rows == len(seen)
    for mine, theirs in zip(again.tables, load(write(seen)).tables, strict=True):
        np.testing.assert_array_equal(mine.error, theirs.error)
        np.testing.assert_array_equal(mine.n_items, theirs.n_items)


def test_a_row_given_twice_with_two_scores_is_an_error(rows: Rows, write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(write([*rows, {**rows[5], "score": 0.5}]))
    assert str(caught.value).startswith(
        "results.jsonl:73: the same cell, seed and task as results.jsonl:6, but score 0.5 against "
    )
    assert str(caught.value).endswith("; tell repeats apart by `seed` or remove one")
    with pytest.raises(DataError, match=r"^mine.csv:4: the same cell, seed and task as mine.csv:2"):
        lines(tmp_path, [(7, 1, 0.5), (7, 4, 0.5), (7, 1, 0.6)])
    assert not any("again" in line for line in lines(tmp_path, [(7, 1, 0.5, 0), (7, 1, 0.6, 1)], ",seed"))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ((0.5, 1.5, 0.5), "mine.csv:3: score must be between 0 and 1, got 1.5"),
        ((0.5, -0.1, 0.5), "mine.csv:3: score must be between 0 and 1, got -0.1"),
        ((50, 60, 0.5), "mine.csv:2: score must be between 0 and 1, got 50; {hint}"),
        ((0.5, 60, 100), "mine.csv:3: score must be between 0 and 1, got 60; {hint}"),
        ((0.5, 0.6, 55), "mine.csv:4: score must be between 0 and 1, got 55"),
        ((50, 60, 1510.7), "mine.csv:2: score must be between 0 and 1, got 50"),
        ((50, 60, -1), "mine.csv:2: score must be between 0 and 1, got 50"),
    ],
)
def test_scores_are_fractions(scores: tuple[float, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        lines(tmp_path, [(7, v, value) for v, value in zip((1, 4, 16), scores, strict=True)])
    assert str(caught.value) == message.format(hint="the scores look like percentages: divide them by 100")


def test_scores_divided_twice(tmp_path: Path) -> None:
    found = lines(tmp_path, [(n, v, f"{value / 100:.4f}") for n, v, value in sound()] + [(7, 0, 0.3)])
    assert "mine: all scores with an image are below 0.01: percentages divided by 100 twice?" in found


def test_one_size_one_count_few_cells(tmp_path: Path) -> None:
    def of(cells: Iterable[tuple[float, float]]) -> tuple[str, ...]:
        return lines(tmp_path, [(n, v, score(n, v)) for n, v in cells])

    assert of((7, v) for v in range(1, 10)) == ("mine: one LLM size only (7B): nothing tells what size does",)
    assert of((n, 16) for n in (0.5, 1, 2, 4, 8, 16, 32, 64)) == (
        "mine: one visual token count only (16): nothing tells what V does",
    )
    assert of([(1, 1)]) == (
        "mine: 1 cell with an image, too few for a law (at least 4)",
        "mine: one LLM size only (1B): nothing tells what size does",
        "mine: one visual token count only (1): nothing tells what V does",
    )
    assert of([(0.5, 1), (0.5, 4), (7, 1), (7, 4)]) == (
        "mine: 4 cells with an image: intervals are weak below 8",
    )
    assert of([(0.5, 0), (7, 0)]) == (
        "2 rows without an image are the blind reference, which no law sees",
        "mine: 0 cells with an image, too few for a law (at least 4)",
    )


def test_incomplete_grid(tmp_path: Path) -> None:
    gone = {(0.5, 36), (4, 16)}
    cells = [cell for cell in sound() if cell[:2] not in gone]
    assert lines(tmp_path, cells) == (
        "mine: incomplete grid, 2 of 4 x 4 cells missing (N = 500M, V = 36; N = 4B, V = 16)",
    )
    star = [cell for cell in sound() if cell[0] == 7 or cell[1] == 1]
    (line,) = [text for text in lines(tmp_path, star) if "grid" in text]
    assert line.endswith(
        "9 of 4 x 4 cells missing (N = 500M, V = 4; N = 500M, V = 16; N = 500M, V = 36; ...)"
    )


def test_one_name_with_two_sizes(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        lines(tmp_path, [(7, 1, 0.5, "vicuna"), (6.74, 4, 0.6, "vicuna")], ",llm_name")
    assert str(caught.value) == (
        "mine.csv:3: vicuna has n = 6740000000, but 7000000000 at mine.csv:2; "
        "take one N convention (total, non-embedding or nominal parameters) for all rows"
    )


def test_two_near_sizes_without_a_common_token_count(tmp_path: Path) -> None:
    cells = [(n, v, score(n, v)) for n, v in GRID if n != 7]
    mixed = [*cells, (7, 1, 0.4), (7, 4, 0.41), (6.74, 16, 0.42), (6.74, 36, 0.43)]
    (line,) = [text for text in lines(tmp_path, mixed) if "share no" in text]
    assert line == (
        "N = 6.74B and 7B share no visual token count: check for one LLM under two conventions of N "
        "(total, non-embedding, nominal)"
    )
    assert not any("share no" in text for text in lines(tmp_path, [*mixed, (6.74, 4, 0.42)]))
    far = [*cells, (7, 1, 0.4), (10, 16, 0.42)]
    assert not any("share no" in text for text in lines(tmp_path, far))


@pytest.mark.parametrize(
    ("llms", "said"),
    [
        ({"qwen1.5-7b": 7, "Qwen1.5-0.5B": 0.62}, "qwen1.5-7b"),
        ({"0.5B": 0.62, "7B": 7}, "7B"),
        ({"pythia-160m": 0.162, "pythia-1b": 1.2}, "pythia-160m"),
        ({"qwen1.5-7b": 7.72, "qwen1.5-0.5b": 0.62}, None),  # all counted
        ({"qwen1.5-7b": 7, "qwen1.5-0.5b": 0.5}, None),  # all nominal
        ({"qwen1.5-7b": 7, "llama-13b": 13.4}, None),  # within 5%
        ({"phi-3-mini": 3.8, "vicuna-1.5-7b": 6.5}, None),  # one name only has a size
        ({"llama-7b": 7, "x4bit": 3}, None),
    ],
)
def test_nominal_and_counted_sizes(llms: dict[str, float], said: str | None, tmp_path: Path) -> None:
    cells = [(n, v, score(n, v), name) for name, n in llms.items() for v in COUNTS]
    found = lines(tmp_path, cells, ",llm_name")
    assert [line for line in found if "N convention" in line] == (
        []
        if said is None
        else [line for line in found if line.startswith(f"N of {said} is the size in its name, but ")]
    )
    assert any("N convention" in line for line in found) == (said is not None)


def test_sizes_that_serve_as_names_are_no_convention(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("llm_params_b,visual_tokens,score,llm_name\n7.72,1,0.5,qwen-7b\n")
    lines(tmp_path, sound())
    both = load(tmp_path / "mine.csv", tmp_path / "other.csv").warnings
    assert not any("size in its name" in line for line in both)


def test_rounded_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    full = [(n, v, f"{rng.uniform(0.2, 0.6):.8f}") for n, v in GRID]
    assert lines(tmp_path, full) == ()
    full[5] = (*full[5][:2], "0.31")
    assert lines(tmp_path, full) == (
        "mine: 1 score is rounded to 3 decimals or fewer, most have 6 or more (first: mine.csv:7, 0.31)",
    )
    # Three quarters of 300 items, among thirds and others: an honest short score.
    counted = [(n, v, (61 + 7 * i) / 300) for i, (n, v) in enumerate(GRID)]
    counted[5] = (*counted[5][:2], 0.75)
    assert lines(tmp_path, counted) == ()
    assert lines(tmp_path, [(*cell, 400) for cell in full], ",n_items") == ()


def test_cells_at_chance(rows: Rows, write: Write) -> None:
    low = [{**row, "chance": 0.0} for row in rows if row["visual_tokens"]]
    for row in low:
        if row["task_group"] == "ocr":
            row["chance"], row["score"] = 0.25, 0.6
            if row["llm_name"] == "micro" and row["visual_tokens"] < 16:
                row["score"] = 0.25 + 0.043  # one sampling sd of 400 items is 0.0227
    assert load(write(low)).warnings == (
        "ocr: 2 of 20 cells no better than chance within two sampling sd (first: micro, V = 1): "
        "a law fits guessing there",
    )
    for row in low:
        del row["n_items"]  # without the noise, only what is not above chance counts
    assert load(write(low)).warnings == ()


def test_blind_rows_are_counted(rows: Rows, write: Write) -> None:
    said = load(write([{**row, "chance": 0.0} for row in rows])).warnings
    assert said == ("12 rows without an image are the blind reference, which no law sees",)


def test_dropped_cells_are_named_five_at_most(rows: Rows, write: Write) -> None:
    seen = [{**row, "chance": 0.0} for row in rows if row["visual_tokens"]]
    first = [row for row in seen if row["task"] == "count"][:7]
    found = [
        line for line in load(write([row for row in seen if row not in first])).warnings if "grid" not in line
    ]
    assert len(found) == 6
    assert found[0] == "reasoning: nano, V = 1: no seed has all tasks (missing count)"
    assert found[-1] == "reasoning: and 2 more left out"
