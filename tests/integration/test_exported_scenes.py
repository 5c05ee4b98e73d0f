"""The built-in data set, written out as LLaVA files, trains and scores like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.tiny import LLAVA, lines, read, train
from vlmscale.cli import main


def test_exported_scenes_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    words = ["data", "scenes", "--out", str(data), "--train", "12", "--validation", "2", "--test", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for split in ("train", "validation", "test"):
        assert str(data / f"{split}.json") in out
    assert len(list((data / "images" / "train").glob("*.png"))) == 12
    overrides = [
        f"--config.data.records={data / 'train.json'}",
        f"--config.data.images={data / 'images'}",
        "--config.compressor.visual_tokens=1",
    ]
    assert train(run, *overrides, config=LLAVA, count=6) == 0
    assert "12 records read, 12 used, 0 quarantined" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(run)]) == 0
    [row] = lines(run / "result.jsonl")
    assert row["n_items"] == 12 * 9
    assert row["prompt_id"] == "toy-v1/gold"
    assert len(lines(run / "answers" / "records.jsonl")) == 12 * 9

    again = tmp_path / "test-run"
    overrides[0] = f"--config.data.records={data / 'test.json'}"
    assert train(again, *overrides, config=LLAVA, count=4) == 0
    assert main(["evaluate", "--run", str(again)]) == 0
    rows = lines(again / "result.jsonl")
    assert {row["task_group"] for row in rows} == {"reasoning", "ocr", "perception"}
    assert sum(row["n_items"] for row in rows) == 3 * 9
    written = {record["task"]: record["chance"] for record in read(data / "test.json")}
    # A prepared data set holds it with 7 digits.
    assert {row["task"]: row["chance"] for row in rows} == pytest.approx(written, rel=1e-6)
