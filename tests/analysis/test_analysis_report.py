"""The report and the command: self-contained, the same for the same seed, honest when there is nothing to
fit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from analysis.__main__ import main
from analysis.cost import FlopsCost
from analysis.laws import LAWS
from analysis.report import write_report
from analysis.study import Options
from tests.analysis.conftest import make_rows

Rows = list[dict[str, Any]]
FEW = Options(bootstrap=100)
# Laws that compile fast; the report's form does not depend on which.
QUICK = Options(laws=("log_linear", "power", "regular", "paper", "logit_linear"), bootstrap=100)
ORDER = [
    "Error against inference cost",
    "Laws",
    "How sure is the ratio",
    "Does more help, without any law?",
    "How many visual tokens: V*(Q)",
    "What to deploy for a budget",
    "Task by task",
    "What to run next",
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
            inline = (value or "").startswith(("#", "data:image/png;base64,"))
            if name in ("src", "href", "xlink:href") and not inline:
                (self.links if tag == "a" else self.fetched).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)


def read(path: Path) -> tuple[str, _Page]:
    text = path.read_text()
    page = _Page()
    page.feed(text)
    return text, page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of a report, and what it says."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return folder / "out", write_report(folder, folder / "out", QUICK)


def test_report_is_self_contained_and_in_order(report: tuple[Path, dict[str, Any]]) -> None:
    out, _ = report
    text, page = read(out / "report.html")
    assert page.fetched == []
    assert set(page.links) == {"https://arxiv.org/abs/2411.03312"}
    assert page.bad == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ORDER
    figures = sorted((out / "figures").glob("*.png"))
    assert text.count("<svg") == len(figures) >= 20
    for name in ("report.md", "analysis.json", *figures):
        assert (out / name).stat().st_size > 500
    markdown = (out / "report.md").read_text()
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == ORDER
    for name in re.findall(r"\]\((figures/.*?)\)", markdown):
        assert (out / name).is_file()


def test_report_finds_the_truth_of_its_rows(report: tuple[Path, dict[str, Any]]) -> None:
    out, result = report
    (ocr,) = result["more_groups"]
    assert result["group"] == "reasoning"
    assert result["laws"][result["best_law"]]["ratio"] == pytest.approx(4.2, rel=0.25)
    assert ocr["laws"][ocr["best_law"]]["ratio"] == pytest.approx(0.27, rel=0.25)
    assert len(result["data"]["sha256"]) == 64
    assert len(result["deploy"]) == 3
    for item in result["deploy"]:
        assert item["measured"]["cost"] <= item["budget"]
        assert item["law"]["cost"] <= item["budget"]
    assert [task["task"] for task in result["tasks"]["tasks"]] == ["count", "relate"]
    text = (out / "report.md").read_text()
    # The paper's groups stand beside, with the ratios of the published cells.
    assert "4.72" in text
    assert "0.737" in text


def test_same_seed_same_bytes(rows: Rows, write: Callable[[Rows], Path], tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = Options(laws=("log_linear", "logit_linear"), bootstrap=50, seed=seed)
        write_report(write(rows), tmp_path / name, options)
        texts.append([(tmp_path / name / file).read_bytes() for file in ("analysis.json", "report.html")])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_json_schema_and_the_same_object_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["paper-reasoning", "--bootstrap", "300", "--json", "--out", str(out)]) == 0
    streams = capsys.readouterr()
    result = json.loads(streams.out)
    assert result == json.loads((out / "analysis.json").read_text())
    assert streams.out == (out / "analysis.json").read_text()
    number, pair = (
        {"type": "number"},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    )
    law = {
        "type": "object",
        "required": [
            "params",
            "sse",
            "r2",
            "aicc",
            "ratio",
            "ratio_ci",
            "verdict",
            "flags",
            "lono_rms",
            "lovo_rms",
        ],
        "properties": {
            "params": {"type": "object", "additionalProperties": number},
            **dict.fromkeys(("sse", "r2", "aicc", "ratio", "lono_rms", "lovo_rms"), number),
            "ratio_ci": pair,
            "verdict": {"enum": ["identified", "bound active", "unidentified"]},
            "flags": {"type": "array", "items": {"type": "string"}},
        },
    }
    schema = {
        "type": "object",
        "required": ["data", "laws", "best_law", "optimum", "warnings"],
        "properties": {
            "laws": {"type": "object", "additionalProperties": law, "required": list(LAWS)},
            "best_law": {"const": "logit_linear"},
            "optimum": {
                "required": ["visual_tokens", "ci", "corner", "indifference"],
                "properties": {
                    "visual_tokens": number,
                    "ci": pair,
                    "indifference": pair,
                    "corner": {"type": "null"},
                },
            },
            "warnings": {"type": "array", "items": {"type": "string"}},
        },
    }
    jsonschema.validate(result, schema)
    laws = result["laws"]
    assert set(laws) == set(LAWS)
    named = {
        "log_linear": {"c", "a", "b"},
        "power": {"K", "alpha", "beta"},
        "paper": {"K", "alpha", "beta", "D"},
        "regular": {"c", "a", "b", "lam", "alpha", "beta", "K", "D"},
        "logit_linear": {"p0", "p1", "p2"},
    }
    assert {name: set(laws[name]["params"]) for name in named} == named
    assert result["optimum"]["visual_tokens"] == pytest.approx(13.46, abs=0.01)
    assert laws["paper"]["flags"] == ["bound_active"]
    assert laws["regular"]["verdict"] == "unidentified"
    assert any("bound D = 0" in line for line in result["warnings"])
    text = (out / "report.md").read_text()
    assert "The published claims beside the evidence" in text
    assert "P(16 is the nearest tested)" in text


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


def _losses(rows: Rows) -> Rows:
    return [{**row, "heldout_loss": 3 - 2 * row["score"]} for row in rows if row["task"] == "read"]


@pytest.mark.parametrize(
    ("thin", "expected"),
    [
        (_one_size, "1 LLM size and 5 token counts"),
        (_one_count, "4 LLM sizes and 1 token count"),
        (_one_cell, "1 LLM size and 1 token count"),
        (_four_cells, "too few for an interval"),
        (_only_blind, "nothing to fit"),
        (_one_group, "ratio"),
        (_all_right, "every cell has the same error"),
        (_step, "not identified"),
        (_losses, "held-out loss"),
    ],
)
def test_thin_tables_are_reported_without_a_made_up_number(
    thin: Callable[[Rows], Rows], expected: str, rows: Rows, write: Callable[[Rows], Path], tmp_path: Path
) -> None:
    result = write_report(write(thin(rows)), tmp_path / "out", QUICK)
    text, page = read(tmp_path / "out" / "report.html")
    assert expected in text
    assert page.bad == []
    for token in ("nan", "NaN", "Infinity", "None"):
        assert not re.search(rf">[^<]*\b{token}\b[^<]*<", text), token
    for group in (result, *result["more_groups"]):
        if group["best_law"] is None or not group["laws"][group["best_law"]]["ratio_identified"]:
            assert group["best_tokens"] == []
            assert all(item["law"] is None and item["free"] is None for item in group["deploy"])


def test_a_loss_takes_the_unbounded_laws_alone(
    rows: Rows, write: Callable[[Rows], Path], tmp_path: Path
) -> None:
    result = write_report(write(_losses(rows)), tmp_path / "out", FEW)
    loss = next(group for group in result["more_groups"] if group["group"] == "held-out loss")
    assert loss["data"]["target"] == "loss"
    assert set(loss["refused_laws"]) == {"logit_linear", "probit_linear", "log_accuracy"}
    assert set(loss["laws"]) == set(LAWS) - set(loss["refused_laws"])
    # The loss is 3 - 2 score, so along both axes it falls twice as fast as the error of the same cells.
    assert loss["laws"]["log_linear"]["ratio"] == pytest.approx(
        result["laws"]["log_linear"]["ratio"], rel=1e-6
    )
    slopes = [group["laws"]["log_linear"]["slopes"] for group in (result, loss)]
    assert slopes[1] == pytest.approx([2 * slope for slope in slopes[0]], rel=1e-6)


def test_hostile_names_stay_text(rows: Rows, write: Callable[[Rows], Path], tmp_path: Path) -> None:
    nasty = [{**row, "task_group": '<script>alert("x")</script> $a_b$ | %s'} for row in rows]
    write_report(write(nasty), tmp_path / "out", Options(laws=("log_linear",), bootstrap=20))
    text, page = read(tmp_path / "out" / "report.html")
    assert "<script" not in text
    assert page.bad == []


def test_command_prints_a_line_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "paper-reasoning",
        "paper-ocr",
        "--bootstrap",
        "100",
        "--law",
        "log-linear",
        "--law",
        "logit_linear",
    ]
    assert main(words) == 0
    streams = capsys.readouterr()
    assert streams.out.splitlines() == [
        "reasoning: ratio 4.72 [4.33, 5.16] (logit_linear), V* = 13.5 [11.8, 14.9]",
        "ocr: ratio 0.73 [0.64, 0.82] (logit_linear), V* = 576 (a corner: V_max)",
    ]
    assert "a copy?" in streams.err
    assert "without the copied cell (7B, V = 576) the ratio is 0.737" in streams.err


def test_cost_options_move_the_optimum(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def best(*words: str) -> float:
        assert main(["paper-reasoning", "--law", "log_linear", "--bootstrap", "100", "--json", *words]) == 0
        return float(json.loads(capsys.readouterr().out)["optimum"]["visual_tokens"])

    assert best() == pytest.approx(13.446, rel=1e-3)
    assert best("--text-tokens", "0") == 1
    assert best("--gen-tokens", "10") == pytest.approx(16.1, abs=0.05)
    assert best("--gen-tokens", "10", "--intensity", "206", "--batch", "32") == pytest.approx(30.8, abs=0.05)
    assert best("--query-pass") == pytest.approx(26.9, abs=0.05)
    assert best("--system-tokens", "35") == pytest.approx(22.9, abs=0.05)
    assert best("--tower-flops", "3.84e11", "--budget", "2e12") == pytest.approx(13.446, rel=1e-3)
    assert best("--token-flops", "1e9", "--budget", "2e12") < 13.4
    assert best("--attention", "--budget", "2e12") != best()
    cells = [
        f"{n},{v},{0.3 + 0.04 * i + 0.01 * j},{3 + n * (0.2 + 0.02 * v)}"
        for i, n in enumerate((1, 2, 4, 8))
        for j, v in enumerate((1, 4, 16))
    ]
    (tmp_path / "a.csv").write_text("llm_params_b,visual_tokens,score,latency_ms\n" + "\n".join(cells) + "\n")
    words = [
        str(tmp_path / "a.csv"),
        "--law",
        "log_linear",
        "--bootstrap",
        "100",
        "--json",
        "--cost",
        "latency",
    ]
    assert main([*words, "--budget", "5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cost"]["unit"] == "ms"
    assert result["cost"]["coefficients"] == pytest.approx([3, 0.2, 0, 0.02], abs=1e-9)
    # 0.02 ms a token and 0.2 a pass are 10 tokens: V* = 10 / (ratio - 1) as for Q = 10.
    ratio = result["laws"]["log_linear"]["ratio"]
    assert result["optimum"]["visual_tokens"] == pytest.approx(min(max(10 / (ratio - 1), 1), 16), rel=1e-3)


def test_command_refuses_bad_data_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "a.csv"
    table.write_text("llm_params_b,visual_tokens,score\n-7,1,0.5\n")
    assert main([str(table), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: a.csv:2: llm_params_b must be positive, got '-7'\n"
    assert not (tmp_path / "out").exists()
    table.write_text("llm_params_b,visual_tokens,score\n7,1,0.5\n")
    assert main([str(table)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert main(["paper-ocr", "--out", str(tmp_path / "file"), "--bootstrap", "100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["paper-ocr", "--cost", "latency"]) == 2
    assert "latency_ms" in capsys.readouterr().err
    assert main(["paper-ocr", "--law", "cubic"]) == 2
    assert "known: log_linear" in capsys.readouterr().err
    for arguments in (["--bootstrap", "0"], ["--bootstrap", "x"], ["--seed", "-1"], ["--budget", "0"]):
        with pytest.raises(SystemExit) as caught:
            main(["paper-ocr", "--out", str(tmp_path), *arguments])
        assert caught.value.code == 2


def test_a_cold_start_imports_no_training_library() -> None:
    code = (
        "import sys\nfrom analysis.__main__ import main\n"
        "assert main(['paper-ocr', '--law', 'log_linear', '--bootstrap', '100']) == 0\n"
        "bad = {'flax', 'orbax', 'grain', 'tensorflow', 'tensorflow_datasets', 'torch', 'vlmscale', "
        "'matplotlib'}\n"
        "assert not bad & {name.split('.')[0] for name in sys.modules}, bad & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_text_tokens_of_the_data_are_the_default(
    rows: Rows, write: Callable[[Rows], Path], tmp_path: Path
) -> None:
    own = write_report(write(rows), tmp_path / "a", Options(laws=("log_linear",), bootstrap=20))
    given = write_report(
        write(rows), tmp_path / "b", Options(laws=("log_linear",), bootstrap=20, cost=FlopsCost(24))
    )
    assert own["cost"]["text_tokens"] == 12.0
    assert given["optimum"]["visual_tokens"] == pytest.approx(2 * own["optimum"]["visual_tokens"], rel=1e-9)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "vlmscale analyze runs/demo --out" in capsys.readouterr().out
