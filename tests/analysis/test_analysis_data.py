"""Rows become tables; whatever is wrong in a file is one line that names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.data import DataError, load
from analysis.evidence import copied_cells, monotonicity

Rows = list[dict[str, Any]]


def test_paper_data_is_whole() -> None:
    for name in ("paper-reasoning", "paper-ocr"):
        table = load(name).tables[0]
        assert table.n.size == 28
        assert table.sizes.tolist() == [5e8, 1.8e9, 4e9, 7e9]
        assert table.token_counts.tolist() == [1, 4, 16, 36, 64, 144, 576]
    ocr = load("paper-ocr").tables[0]
    (pair,) = copied_cells(ocr)
    assert [(ocr.n[i], ocr.v[i]) for i in pair] == [(4e9, 576), (7e9, 576)]
    assert copied_cells(load("paper-reasoning").tables[0]) == []


def test_paper_monotonicity() -> None:
    reasoning = monotonicity(load("paper-reasoning").tables[0])
    assert (reasoning["n"].falling, reasoning["n"].pairs) == (21, 21)
    assert (reasoning["v"].falling, reasoning["v"].pairs) == (24, 24)
    ocr = monotonicity(load("paper-ocr").tables[0])
    assert (ocr["n"].falling, ocr["n"].pairs) == (19, 21)
    assert (ocr["v"].falling, ocr["v"].pairs) == (24, 24)


def test_groups_are_plain_means_of_their_tasks(rows: Rows, write: Callable[[Rows], Path]) -> None:
    tables = {table.group: table for table in load(write(rows)).tables}
    assert set(tables) == {"reasoning", "ocr"}
    table = tables["reasoning"]
    scores = [row["score"] for row in rows if row["llm_name"] == "mini" and row["visual_tokens"] == 16]
    index = table.llm_name.index("mini") + 2
    assert table.v[index] == 16
    assert table.error[index] == pytest.approx(1 - (scores[0] + scores[1]) / 2)
    assert table.n_items[index] == 800


def test_blind_rows_are_kept_apart(rows: Rows, write: Callable[[Rows], Path]) -> None:
    for table in load(write(rows)).tables:
        assert table.v.min() == 1
        assert np.isfinite(np.log(table.v)).all()
        assert set(table.blind) == {"nano", "micro", "mini", "small"}


def test_blind_score_serves_where_no_blind_row_does(rows: Rows, write: Callable[[Rows], Path]) -> None:
    seen = [{**row, "blind_score": 0.25} for row in rows if row["visual_tokens"]]
    assert load(write(seen)).tables[0].blind == dict.fromkeys(("nano", "micro", "mini", "small"), 0.75)


def test_seeds_are_averaged(rows: Rows, write: Callable[[Rows], Path]) -> None:
    second = [{**row, "seed": 1, "score": min(1.0, row["score"] + 0.02)} for row in rows]
    one, two = load(write(rows)).tables[0], load(write(rows + second)).tables[0]
    np.testing.assert_allclose(two.error, one.error - 0.01, atol=1e-12)
    assert two.seeds.tolist() == [2] * two.n.size


def test_incomplete_cells_and_unfinished_rows_are_left_out(rows: Rows, write: Callable[[Rows], Path]) -> None:
    last = {**rows[-1], "task": "x"}
    kept = [
        row for row in rows if (row["task"], row["llm_name"], row["visual_tokens"]) != ("count", "small", 64)
    ]
    dataset = load(write([*kept, {**last, "status": "failed"}]))
    table = dataset.tables[0]
    assert dataset.unfinished == 1
    assert table.n.size == 19
    assert table.dropped == ("small, V = 64: no seed has all tasks (missing count)",)


def test_two_compressors_are_two_tables(rows: Rows, write: Callable[[Rows], Path]) -> None:
    other = [{**row, "compressor": "tokenpacker"} for row in rows if row["visual_tokens"]]
    groups = [table.group for table in load(write(rows + other)).tables]
    assert groups == ["reasoning (quecc)", "reasoning (tokenpacker)", "ocr (quecc)", "ocr (tokenpacker)"]
    assert all(table.n.size == 20 and len(table.blind) == 4 for table in load(write(rows + other)).tables)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "llm_params_b,visual_tokens,score,task\n0.5,1,0.4,a\n0.5,1,0.6,b\n7,16,0.7,a\n7,16,0.9,b\n"
    )
    (table,) = load(path).tables
    assert table.group == "mine"
    assert table.llm_name == ("500M", "7B")
    np.testing.assert_allclose(table.error, [0.5, 0.2])
    assert table.mean_text_tokens() == (50.0, False)


HOSTILE = [
    ({"n_total": "big"}, "n_total must be a number, got 'big'"),
    ({"n_total": -5}, "n_total must be positive"),
    ({"n_total": 0}, "n_total must be positive"),
    ({"n_total": True}, "n_total must be a number"),
    ({"n_total": None}, "n_total is missing"),
    ({"score": float("nan")}, "score must be finite"),
    ({"score": 1.2}, "score must be between 0 and 1"),
    ({"score": -0.1}, "score must be between 0 and 1"),
    ({"visual_tokens": -1}, "visual_tokens must be at least 0"),
    ({"visual_tokens": 0.5}, "visual_tokens must be 0"),
    ({"visual_tokens": [1]}, "visual_tokens must be a number"),
    ({"task_group": 7}, "task_group must be a name"),
    ({"chance": 3}, "chance must be between 0 and 1"),
    ({"n_items": 0}, "n_items must be at least 1"),
    ({"llm_name": "micro"}, "micro has n = 4200, but 21000 at"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_bad_row_is_named(
    change: dict[str, Any], message: str, rows: Rows, write: Callable[[Rows], Path]
) -> None:
    bad = {**rows[0], **change}
    with pytest.raises(DataError) as caught:
        load(write([*rows[18:36], bad]))
    text = str(caught.value)
    assert text.startswith("results.jsonl:19: ")
    assert message in text
    assert "\n" not in text


def test_the_same_row_twice_is_named(rows: Rows, write: Callable[[Rows], Path]) -> None:
    with pytest.raises(DataError, match=r"results.jsonl:73: the same cell, seed and task as results.jsonl:6"):
        load(write([*rows, rows[5]]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: no finished row"),
        ("a.jsonl", "{not json\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: expected a JSON object, got list"),
        ("a.jsonl", '{"status": "failed"}\n', "a.jsonl: no finished row (1 unfinished)"),
        ("a.csv", "", "a.csv:1: column llm_params_b is missing"),
        ("a.csv", "llm_params_b,visual_tokens,score\n", "a.csv: no row under the header"),
        (
            "a.csv",
            "llm_params_b,visual_tokens,score\n7,1\n",
            "a.csv:2: llm_params_b, visual_tokens and score",
        ),
        ("a.csv", "llm_params_b,visual_tokens,score\n7,1,x\n", "a.csv:2: score must be a number"),
        ("a.csv", "llm_params_b,visual_tokens,score\n7,1,nan\n", "a.csv:2: score must be finite"),
        ("a.txt", "hello", "unknown kind of file"),
    ],
)
def test_a_bad_file_is_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_places_are_one_line(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            load(place)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load(path)


def test_rows_survive_a_round_trip_through_json(rows: Rows, write: Callable[[Rows], Path]) -> None:
    path = write(rows) / "results.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert load(path).sha256 == load(path.parent).sha256
