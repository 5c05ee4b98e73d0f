"""Whom a plan asks: the compiler, its earlier answers, or arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vlmscale.config import Cell, CompressorConfig, LLMConfig
from vlmscale.loading import load_sweep
from vlmscale.plan import compiled
from vlmscale.plan.ask import Answers, ends
from vlmscale.plan.compiled import Compiled, Request
from vlmscale.plan.memory import predict
from vlmscale.records import write_json


def cells() -> list[Cell]:
    return [
        Cell(llm=LLMConfig(llm), compressor=CompressorConfig("pool", count))
        for llm in ("toy-14k", "toy-40k", "toy-135k")
        for count in (1, 4, 16, 64)
    ]


def test_the_ends_of_each_llm_and_three_between() -> None:
    chosen = ends(cells())
    assert {0, 3, 4, 7, 8, 11} < chosen
    assert len(chosen) == 9
    assert ends(cells()) == chosen
    assert ends(cells()[:1]) == {0}


def test_both_stages_of_the_papers_grid_have_their_ends() -> None:
    grid = load_sweep("configs/sweeps/paper_grid.py:both", [], planned=True).cells
    assert len(grid) == 70
    chosen = [grid[number] for number in sorted(ends(grid))]
    counts = [cell.compressor.visual_tokens for cell in chosen]
    assert len(chosen) == 23
    assert (counts.count(1), counts.count(576)) == (10, 10)
    assert {cell.train.llm_rate for cell in chosen} == {0.0, 1.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that the stand-in for the compiler was asked about; it says a tenth more than arithmetic."""
    found: list[str] = []

    def answer(request: Request, cache: Path, effort: str) -> Compiled:
        found.append(request.key())
        told = predict(request)
        return replace(told, needed=round(told.needed * 1.1), by="compiler", seconds=1.0)

    monkeypatch.setattr(compiled, "compile_request", answer)
    monkeypatch.setattr(compiled.metadata, "version", lambda name: "1")
    return found


def test_who_is_asked(asked: list[str], tmp_path: Path) -> None:
    grid = cells()
    answers = Answers(grid, "ends", tmp_path)
    between = next(number for number in range(len(grid)) if number not in ends(grid))
    requests = {n: Request("train", grid[n], "v5e-8", (8, 1, 1), 128) for n in (0, between)}
    assert answers(0, requests[0]).by == "compiler"
    assert answers(between, requests[between]).by == "arithmetic"
    assert answers(0, requests[0]).by == "compiler"  # a second time from memory
    assert asked == [requests[0].key()]
    assert answers.errors[requests[0].key()] == pytest.approx(1 / 1.1 - 1, abs=1e-3)
    assert "1 programs: median 9.1%" in answers.check()
    # What was compiled before is taken, whoever was chosen.
    write_json(
        tmp_path / f"{requests[between].key()}.json",
        {"request": {}, "compiled": vars(replace(predict(requests[between]), by="compiler"))},
    )
    assert answers(between, requests[between]).by == "compiler"
    assert len(asked) == 1
    assert Answers(grid, "none", tmp_path / "other").check() == ""


def test_no_gpu_is_compiled_for(asked: list[str], tmp_path: Path) -> None:
    answers = Answers(cells(), "all", tmp_path)
    assert answers(0, Request("train", cells()[0], "h200-8", (8, 1, 1), 128)).by == "arithmetic"
    assert not asked


def test_arithmetic_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a damaged answer of earlier stand in the way."""

    def missing(name: str) -> str:
        raise compiled.metadata.PackageNotFoundError(name)

    compiled._versions.cache_clear()
    monkeypatch.setattr(compiled.metadata, "version", missing)
    request = Request("train", cells()[0], "v5e-8", (8, 1, 1), 128)
    for text in ("", "{}", '{"compiled": {"arguments": 1}}'):
        (tmp_path / f"{request.key()}.json").write_text(text)
        assert Answers(cells(), "none", tmp_path)(0, request).by == "arithmetic"
    compiled._versions.cache_clear()
