"""`vlmscale advise` from its words to its lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.record import analysis_record, to_json
from analysis.study import Options, analyze
from tests.analysis.conftest import make_rows
from tests.analysis.latency_files import made_file, write_file
from vlmscale.cli import main
from vlmscale.cost.flops import inference_flops
from vlmscale.models.sizes import SIZES

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> str:
    analysis = analyze(["paper-reasoning", "paper-ocr"], Options(("logit_linear",), 100))
    path = tmp_path_factory.mktemp("report") / "analysis.json"
    path.write_text(to_json(analysis_record(analysis)))
    return str(path)


def told(words: list[str], capsys: Capture) -> dict[str, Any]:
    assert main(["advise", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_costs_are_exact_flops_and_the_menu_ends_with_the_family(law: str, capsys: Capture) -> None:
    words = ["--budget", "5e12", "--text-tokens", "50", "--gen-tokens", "10", "--law", law, "--top", "40"]
    found = told(words, capsys)
    assert [group["group"] for group in found["groups"]] == ["reasoning", "ocr"]
    for group in found["groups"]:
        assert group["candidates"] == 35
        assert len(group["picks"]) == group["affordable"]
        for pick in group["picks"]:
            size = SIZES[pick["llm_name"]]
            flops = inference_flops(size, size.vocab_size, 50 + pick["v"], 10)
            assert pick["cost"] == pytest.approx(flops)
            assert pick["cost"] <= 5e12
            assert pick["extrapolated"] == (pick["llm_name"] == "qwen1.5-14b")
            assert (pick["measured"] is None) == pick["extrapolated"]
            assert pick["interval"][0] < pick["error"] < pick["interval"][1]
        assert any("--tower" in line for line in group["remarks"])
    reasoning, ocr = found["groups"]
    assert ocr["picks"][0]["v"] == 576
    assert ocr["picks"][0]["n"] < reasoning["picks"][0]["n"]


def test_a_tower_and_a_compressor_cost_more(law: str, capsys: Capture) -> None:
    words = [
        "--budget",
        "5e12",
        "--law",
        law,
        "--llm",
        "qwen1.5-0.5b",
        "--visual-tokens",
        "36",
        "--group",
        "ocr",
    ]
    bare = told(words, capsys)["groups"][0]
    image = ["--tower", "siglip-so400m-patch14-384", "--compressor", "tokenpacker:"]
    with pytest.raises(AssertionError):
        told([*words, *image], capsys)  # 27 x 27 patches have no 6 x 6
    image = ["--tower", "clip-vit-large-patch14-336", "--compressor", "tokenpacker"]
    whole = told([*words, *image], capsys)["groups"][0]
    assert whole["method"] == "tokenpacker"
    assert whole["remarks"] == []
    assert whole["candidates"] == bare["candidates"] == 1
    assert whole["picks"][0]["cost"] - bare["picks"][0]["cost"] > 3e11  # the tower alone has 0.38 TFLOP


def test_time_by_a_roofline(law: str, capsys: Capture) -> None:
    words = [
        "--law",
        law,
        "--text-tokens",
        "50",
        "--gen-tokens",
        "10",
        "--device",
        "h200",
        "--group",
        "reasoning",
    ]
    timed = told(["--budget", "20ms", *words, "--batch", "4", "--top", "40"], capsys)
    assert timed["unit"] == "ms"
    assert timed["batch"] == 4
    assert all(pick["cost"] <= 20 for pick in timed["groups"][0]["picks"])
    counted = told(["--budget", "1e15", *words, "--batch", "4", "--top", "40"], capsys)
    least = {(p["llm_name"], p["v"]): p["least_ms"] for p in counted["groups"][0]["picks"]}
    for pick in timed["groups"][0]["picks"]:
        assert least[pick["llm_name"], pick["v"]] == pytest.approx(pick["cost"])
        assert pick["least_ms"] is None
    assert main(["advise", "--budget", "1e15", *words]) == 0
    out = capsys.readouterr().out
    assert "ms at least" in out
    assert "NVIDIA H200 (roofline; no program reaches it)" in out


def test_time_by_a_latency_file(law: str, tmp_path: Path, capsys: Capture) -> None:
    path = str(write_file(tmp_path / "latency.json", made_file()))
    words = ["--budget", "60ms", "--law", law, "--latency", path, "--gen-tokens", "10", "--batch", "8"]
    found = told([*words, "--text-tokens", "50", "--device", "h200", "--top", "40"], capsys)
    assert found["unit"] == "ms"
    remarks = found["groups"][0]["remarks"]
    assert any("qwen1.5-14b" in line and "extrapolated" in line for line in remarks)
    assert any("not in the times" in line for line in remarks)
    costs = {(p["llm_name"], p["v"]): p["cost"] for p in found["groups"][0]["picks"]}
    assert costs["qwen1.5-0.5b", 1.0] < costs["qwen1.5-0.5b", 576.0] <= 60


def test_llms_that_no_table_knows_are_charged_as_usual_ones(tmp_path: Path, capsys: Capture) -> None:
    rows = make_rows()
    pooled = [{**row, "compressor": "pool"} for row in rows if row["visual_tokens"] == 4]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows + pooled))
    path = tmp_path / "analysis.json"
    path.write_text(to_json(analysis_record(analyze([source], Options(("log_linear",), 50)))))
    assert main(["advise", "--budget", "1e8", "--law", str(path)]) == 0
    out = capsys.readouterr().out
    assert (
        "nano, micro, mini, small: not in vlmscale's table; charged as decoders of usual proportions" in out
    )
    assert (
        "reasoning (quecc): 100 MFLOP an answer, Q = 12 text tokens, 1 decoded, quecc; law log_linear" in out
    )
    assert (
        "reasoning (pool): 100 MFLOP an answer, Q = 12 text tokens, 1 decoded, pool; no law is identified"
        in out
    )
    assert "methods as measured" in out


@pytest.mark.parametrize(
    "words, part",
    [
        (["--budget", "5x"], "--budget 5x: must be FLOPs such as 5e12, or a time such as 40ms"),
        (["--budget", "-1"], "--budget -1"),
        (["--budget", "40ms"], "a time needs --latency FILE, or --device"),
        (["--budget", "40ms", "--device", "h300"], "--device h300: unknown; there are a100-40gb"),
        (["--budget", "1e12", "--batch", "4"], "--batch 4: FLOPs do not depend on it"),
        (["--budget", "1e12", "--text-tokens", "-1"], "--text-tokens -1"),
        (["--budget", "1e12", "--gen-tokens", "nan"], "--gen-tokens nan"),
        (["--budget", "1e12", "--top", "0"], "--top 0"),
        (["--budget", "1e12", "--group", "math"], "--group math: unknown; there are reasoning, ocr"),
        (["--budget", "1e12", "--llm", "gpt"], "--llm gpt: neither measured nor known"),
        (["--budget", "1e12", "--visual-tokens", "0"], "--visual-tokens 0"),
        (["--budget", "1e12", "--tower", "scenes-48"], "give both, or neither"),
        (["--budget", "10ms", "--latency", "FILE", "--device", "l4"], "was measured on NVIDIA H200"),
        (["--budget", "1e12", "--latency", "FILE"], "such as 40ms"),
        (["--budget", "1ms", "--latency", "FILE", "--tower", "x", "--compressor", "y"], "what was timed"),
        (["--budget", "1e12", "--latency", "LAW"], "no latency file"),
        (["--budget", "1e12", "--law", "FILE"], "no analysis.json"),
        (["--budget", "1e12", "--law", "NONE"], "No such file"),
    ],
)
def test_refusals(words: list[str], part: str, law: str, tmp_path: Path, capsys: Capture) -> None:
    places = {
        "FILE": str(write_file(tmp_path / "latency.json", made_file())),
        "NONE": str(tmp_path / "none.json"),
        "LAW": law,
    }
    assert main(["advise", "--law", law, *(places.get(word, word) for word in words)]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("vlmscale advise: ")
    assert streams.err.count("\n") == 1
    assert part in streams.err
