"""Whatever is wrong in a file or a place is one line that names it and the line; no input is a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.data import DataError, load

Rows = list[dict[str, Any]]
HEAD = "llm_params_b,visual_tokens,score"

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
    ({"llm_name": "a\nb"}, r"llm_name must be a name, got 'a\nb'"),
    ({"llm_name": "\ud800"}, "llm_name must be a name"),
    ({"task": "x" * 10_000}, "task has 10000 characters"),
    ({"task": ""}, "task must be a name, got ''"),
    ({"score": True}, "score must be a number, got True"),
    ({"score": {"a": 1}}, "score must be a number, got {'a': 1}"),
    ({"score": "y" * 10_000}, "score must be a number, got 'yyy"),
    ({"n_total": 10**400}, "n_total must be finite"),
    ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"infer_flops": float("inf")}, "infer_flops must be finite"),
    ({"n_nonembed": 0}, "n_nonembed must be positive"),
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
    assert len(text) < 250


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: no finished row"),
        ("a.jsonl", "{not json\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: expected a JSON object, got list"),
        ("a.jsonl", '{"status": "failed"}\n', "a.jsonl: no finished row (1 unfinished)"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"score": ' + "1" * 5_000 + "}\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"score": 0.5}\n', "a.jsonl:1: llm_name is missing"),
        ("a.jsonl", '\n\n{"a": "\0"}\n', "a.jsonl:3: a NUL byte"),
        ("a.csv", "", "a.csv: empty file"),
        ("a.csv", "\n\n", "a.csv: empty file"),
        ("a.csv", "llm_params_b,visual_tokens\n7,1\n", "a.csv:1: column score is missing"),
        ("a.csv", "llm_params_b;visual_tokens;score\n7;1;0.5\n", "is missing; separate columns by commas"),
        ("a.csv", f"{HEAD},Score\n7,1,0.5,0.5\n", "a.csv:1: column 'score' is there 2 times"),
        ("a.csv", f"{HEAD}\n", "a.csv: no row under the header"),
        ("a.csv", f"{HEAD}\n7,1\n", "a.csv:2: 2 fields under a header of 3 columns"),
        ("a.csv", f"{HEAD}\n7,1,0.5,9\n", "a.csv:2: 4 fields under a header of 3 columns"),
        ("a.csv", f"{HEAD}\n7, ,0.5\n", "a.csv:2: visual_tokens is empty"),
        ("a.csv", f"{HEAD}\n7,1,x\n", "a.csv:2: score must be a number, got 'x'"),
        ("a.csv", f"{HEAD}\n7,1,nan\n", "a.csv:2: score must be finite"),
        ("a.csv", f"{HEAD}\n7,-inf,0.5\n", "a.csv:2: visual_tokens must be finite"),
        ("a.csv", f"{HEAD}\n7,1,True\n", "a.csv:2: score must be a number"),
        ("a.csv", f"{HEAD}\n7,1_6,0.5\n", "a.csv:2: visual_tokens must be a number"),
        ("a.csv", f"{HEAD}\n-7,1,0.5\n", "a.csv:2: llm_params_b must be positive"),
        ("a.csv", f"{HEAD}\n7,-1,0.5\n", "a.csv:2: visual_tokens must be at least 0"),
        ("a.csv", f"{HEAD}\n7,0.5,0.5\n", "a.csv:2: visual_tokens must be 0 (no image) or at least 1"),
        ("a.csv", f"{HEAD}\n7e9,1,0.5\n", "a.csv:2: llm_params_b is in billions; '7e9' looks like a count"),
        (
            "a.csv",
            f"{HEAD}\n1e-300,1,0.5\n",
            "a.csv:2: llm_params_b is in billions; '1e-300' is less than one",
        ),
        ("a.csv", f"{HEAD},n_nonembed_b\n7,1,0.5,6e9\n", "a.csv:2: n_nonembed_b is in billions"),
        ("a.csv", f"{HEAD},seed\n7,1,0.5,1.5\n", "a.csv:2: seed must be a whole number"),
        ("a.csv", f"{HEAD},task\n7,1,0.5,a\x07b\n", "a.csv:2: task must be a name"),
        ("a.csv", f'{HEAD}\n7,1,"0.5\n', "not CSV (unexpected end of data)"),
        ("a.csv", f"{HEAD}\n7,1,0.5\n7,4,\0\n", "a.csv:3: a NUL byte"),
        ("a.csv", f"{HEAD}\n7,1,{'5' * 200_000}\n", "a.csv:2: not CSV (field larger than field limit"),
        ("a.csv", f"{HEAD}\n7,1,{'5' * 100_000}\n", "a.csv:2: score must be finite, got '555"),
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
    (tmp_path / "folder.csv").mkdir()
    for place in (tmp_path, tmp_path / "nothing.jsonl", tmp_path / "folder.csv", "paper-nothing", "a\0.csv"):
        with pytest.raises(DataError, match="no such file") as caught:
            load(place)
        assert "\n" not in str(caught.value)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a.jsonl:2: not UTF-8 text \(byte 3\)"):
        load(path)


def test_unreadable_places_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / ("x" * 5_000 + ".csv"))
    path = tmp_path / "a.csv"
    path.write_text(f"{HEAD}\n7,1,0.5\n")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"^a.csv: cannot be read \(Permission denied\)"):
        load(path)


def test_line_separators_in_a_text_are_no_line_ends(rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "".join(json.dumps({**row, "note": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="")
    assert load(path).rows == len(rows)
