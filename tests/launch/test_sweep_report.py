"""What `vlmscale sweep run` leaves when all cells are done: a report, or a line why there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.state import open_sweep
from vlmscale.cli import main
from vlmscale.loading import load_sweep

FILE = """
from vlmscale.config import Sweep
from vlmscale.loading import load_cell

def get_sweep(overrides=()):
    specs = [f"configs/scenes_tiny.py:toy-14k,{count}" for count in (COUNTS)]
    return Sweep("done", [load_cell(spec, overrides) for spec in specs])
"""


def finished(tmp_path: Path, counts: tuple[int, ...], methods: tuple[str, ...]) -> list[str]:
    """The command of a sweep whose cells have all been trained and evaluated already."""
    path, out = tmp_path / "done.py", tmp_path / "out"
    path.write_text(FILE.replace("COUNTS", repr(counts)))
    cells = open_sweep(load_sweep(str(path), []), out)
    for cell, count, method in zip(cells, counts, methods, strict=True):
        cell.path.mkdir(parents=True)
        (cell.path / "status.json").write_text('{"state": "done"}')
        row = {"cell_id": cell.id, "seed": 0, "llm_name": "toy-14k", "n_total": 14_000, "data_mix": "scenes"}
        row |= {"visual_tokens": count, "compressor": method, "task": "count", "task_group": "reasoning"}
        row |= {"score": 0.2 + count / 100, "n_items": 400, "infer_flops": 10**6 + count, "tower_flops": 10}
        (cell.path / "result.jsonl").write_text(json.dumps(row) + "\n")
    return ["sweep", "run", str(path), "--out", str(out)]


def test_a_finished_sweep_of_methods_has_its_table_and_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = finished(tmp_path, (0, 1, 4, 16), ("none", "pool", "tokenpacker", "pool"))
    report = tmp_path / "out" / "report"
    assert main(command) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == f"report: {report / 'report.html'}"
    assert (report / "figures" / "methods.png").stat().st_size > 10_000
    markdown = (report / "report.md").read_text()
    assert "## Methods compared" in markdown
    assert "No scaling law is fitted: every cell has the same LLM size" in markdown
    written = (report / "report.html").stat().st_mtime_ns
    assert main(command) == 0
    assert (report / "report.html").stat().st_mtime_ns == written


def test_one_cell_with_an_image_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finished(tmp_path, (0, 1), ("none", "pool"))) == 0
    assert "no report: fewer than two cells with an image" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report").exists()
