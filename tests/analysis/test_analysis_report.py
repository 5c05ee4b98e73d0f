"""The report: self-contained, the same for the same seed, and honest when there is nothing to fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.report import write_report

Rows = list[dict[str, Any]]
ORDER = [
    "Error against inference cost",
    "Laws",
    "Does more help, without any law?",
    "How many visual tokens: V*(Q)",
    "What to deploy at three budgets",
    "All cells",
    "What this data cannot tell",
    "Reproduce",
]


class _Page(HTMLParser):
    """Collects what a page would fetch, its ids, and whether its elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.look(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.look(tag, attrs)

    def look(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                (self.links if tag == "a" else self.fetched).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)


def read(path: Path) -> tuple[str, _Page]:
    text = path.read_text()
    page = _Page()
    page.feed(text)
    return text, page


def test_report_is_self_contained_and_in_order(
    rows: Rows, write: Callable[[Rows], Path], tmp_path: Path
) -> None:
    result = write_report(write(rows), tmp_path / "out", bootstrap=200)
    text, page = read(tmp_path / "out" / "report.html")
    assert page.fetched == []
    assert set(page.links) == {"https://arxiv.org/abs/2411.03312"}
    assert page.bad == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ORDER
    assert text.count("<svg") == len(result["figures"])
    for name in ("report.md", "analysis.json", *result["figures"]):
        assert (tmp_path / "out" / name).stat().st_size > 500
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == ORDER
    for name in re.findall(r"\]\((figures/.*?)\)", markdown):
        assert (tmp_path / "out" / name).is_file()


def test_report_finds_the_truth_of_its_rows(
    rows: Rows, write: Callable[[Rows], Path], tmp_path: Path
) -> None:
    result = write_report(write(rows), tmp_path / "out", bootstrap=500)
    reasoning, ocr = result["groups"]
    assert reasoning["laws"][0]["verdict"]["ratio"] == pytest.approx(4.2, rel=0.25)
    assert ocr["laws"][0]["verdict"]["ratio"] == pytest.approx(0.27, rel=0.25)
    assert [group["laws"][0]["verdict"]["ratio"] for group in result["paper"]] == pytest.approx(
        [4.715, 0.7257], abs=1e-3
    )
    assert result["paper"][1]["without_copies"]["ratio"] == pytest.approx(0.737, abs=2e-3)
    assert len(result["data"]["sha256"]) == 64
    assert len(reasoning["deploy"]) == 3
    for item in reasoning["deploy"]:
        assert item["measured"]["cost"] <= item["budget"]
        assert item["law"]["cost"] <= item["budget"]


def test_same_seed_same_json(rows: Rows, write: Callable[[Rows], Path], tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_report(write(rows), tmp_path / name, bootstrap=100, seed=seed)
        texts.append([(tmp_path / name / file).read_bytes() for file in ("analysis.json", "report.html")])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def _one_size(rows: Rows) -> Rows:
    return [row for row in rows if row["llm_name"] == "mini"]


def _one_count(rows: Rows) -> Rows:
    return [row for row in rows if row["visual_tokens"] in (0, 16)]


def _one_cell(rows: Rows) -> Rows:
    return [row for row in rows if row["visual_tokens"] == 16 and row["llm_name"] == "mini"]


def _four_cells(rows: Rows) -> Rows:
    return [row for row in rows if row["visual_tokens"] in (1, 64) and row["llm_name"] in ("nano", "mini")]


def _only_blind(rows: Rows) -> Rows:
    return [row for row in rows if row["visual_tokens"] == 0]


def _one_group(rows: Rows) -> Rows:
    return [row for row in rows if row["task"] == "read"]


def _all_right(rows: Rows) -> Rows:
    return [{**row, "score": 1.0} for row in rows]


def _step(rows: Rows) -> Rows:
    return [{**row, "score": float(row["visual_tokens"] > 10)} for row in rows]


@pytest.mark.parametrize(
    ("thin", "expected"),
    [
        (_one_size, "1 LLM size and 5 token counts"),
        (_one_count, "4 LLM sizes and 1 token count"),
        (_one_cell, "1 LLM size and 1 token count"),
        (_four_cells, "too few for an interval"),
        (_only_blind, "nothing to fit"),
        (_one_group, "ratio"),
        (_all_right, "not identified"),
        (_step, "not identified"),
    ],
)
def test_thin_tables_are_reported_without_a_made_up_number(
    thin: Callable[[Rows], Rows], expected: str, rows: Rows, write: Callable[[Rows], Path], tmp_path: Path
) -> None:
    result = write_report(write(thin(rows)), tmp_path / "out", bootstrap=100)
    text, page = read(tmp_path / "out" / "report.html")
    assert expected in text
    assert page.bad == []
    for token in ("nan", "NaN", "Infinity", "None"):
        assert not re.search(rf">[^<]*\b{token}\b[^<]*<", text), token
    for group in result["groups"]:
        for law in group["laws"]:
            if not law["verdict"]["identified"]:
                assert law["verdict"]["ratio"] is None


def test_hostile_names_stay_text(rows: Rows, write: Callable[[Rows], Path], tmp_path: Path) -> None:
    nasty = [{**row, "task_group": '<script>alert("x")</script> $a_b$ | %s'} for row in rows]
    write_report(write(nasty), tmp_path / "out", bootstrap=20)
    text, page = read(tmp_path / "out" / "report.html")
    assert "<script" not in text
    assert page.bad == []


def test_command(
    rows: Rows, write: Callable[[Rows], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(write(rows)), str(tmp_path / "out")
    assert main([source, "--out", out, "--bootstrap", "50", "--json"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out) == json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert "wrote" in streams.err
    assert main(["paper-ocr", "--out", out, "--bootstrap", "50"]) == 0
    assert "ocr: ratio 0.73" in capsys.readouterr().out


def test_command_refuses_bad_data_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("llm_params_b,visual_tokens,score\n-7,1,0.5\n")
    assert main([str(tmp_path / "a.csv"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: a.csv:2: llm_params_b must be positive, got '-7'\n"
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert main(["paper-ocr", "--out", str(tmp_path / "file"), "--bootstrap", "10"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for arguments in (["--bootstrap", "0"], ["--bootstrap", "x"], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as caught:
            main(["paper-ocr", "--out", str(tmp_path), *arguments])
        assert caught.value.code == 2


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "vlmscale analyze runs/demo --out" in capsys.readouterr().out
