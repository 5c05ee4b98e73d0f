"""Advice from an analysis.json: the picks are those of brute force, and so are ties and prices."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.advice import (
    Candidate,
    advise,
    groups_of,
    measured_methods,
    predictor,
    read_record,
    show,
    show_methods,
)
from analysis.record import analysis_record, to_json
from analysis.study import Options, analyze
from analysis.values import DataError
from tests.analysis.conftest import make_row, make_rows
from tests.analysis.latency_files import write_file
from tests.analysis.published_sets import fitted_law

SIZES = {"500M": 0.5e9, "1.8B": 1.8e9, "4B": 4e9, "7B": 7e9, "huge": 14e9}
COUNTS = (1.0, 4.0, 16.0, 36.0, 64.0, 144.0, 576.0)


@cache
def paper() -> dict[str, Any]:
    """The record of the published data, by way of its text."""
    analysis = analyze(["paper-reasoning", "paper-ocr"], Options(("logit_linear", "log_linear"), 300))
    found: dict[str, Any] = json.loads(to_json(analysis_record(analysis)))
    return found


def price(n: float, v: float) -> float:
    return 2 * n * (50 + v)


def menu() -> list[Candidate]:
    return [Candidate(name, n, v, price(n, v)) for name, n in SIZES.items() for v in COUNTS]


def test_the_record_predicts_as_the_fit_does() -> None:
    group = groups_of(paper(), "reasoning")[0]
    law, found = predictor(group), fitted_law("paper-reasoning", "logit_linear")
    assert law is not None
    n, v = np.array([5e8, 7e9, 3e10]), np.array([1.0, 576.0, 5.0])
    error, draws = law(n, v)
    np.testing.assert_allclose(error, found.predict(n, v), rtol=1e-12)
    assert draws.shape == (300, 3)
    # What the printed parameters say of the marginals follows from the joint draws.
    spread = law.law.natural(law.draws, law.frame)
    for name, (low, high) in group["laws"]["logit_linear"]["param_intervals"].items():
        ends = np.quantile(spread[name], [0.025, 0.975], method="closest_observation")
        np.testing.assert_allclose(ends, [low, high], rtol=1e-5)


@given(st.floats(10.5, 13.5), st.sampled_from(["reasoning", "ocr"]), st.integers(1, 40))
def test_picks_ties_and_prices_are_those_of_brute_force(log_budget: float, name: str, top: int) -> None:
    group, budget, items = groups_of(paper(), name)[0], 10**log_budget, menu()
    law = predictor(group)
    assert law is not None
    pairs = [law(np.array([item.n]), np.array([item.v])) for item in items]
    error = {item: float(own[0]) for item, (own, _) in zip(items, pairs, strict=True)}
    draws = {item: own[:, 0] for item, (_, own) in zip(items, pairs, strict=True)}
    span = {
        item: tuple(np.quantile(own, [0.025, 0.975], method="closest_observation"))
        for item, own in draws.items()
    }
    bought = sorted((item for item in items if item.cost <= budget), key=lambda item: error[item])
    found = advise(group, items, budget, top, price)
    assert (found.candidates, found.affordable) == (35, len(bought))
    assert [(x.llm_name, x.v) for x in found.picks] == [(x.llm_name, x.v) for x in bought[:top]]
    for pick, item in zip(found.picks, bought, strict=False):
        others = [x for x in bought if x is not item]
        assert pick.error == pytest.approx(error[item])
        assert pick.interval == pytest.approx(span[item])
        assert pick.share == pytest.approx(item.cost / budget)
        assert pick.within_sd == sum(abs(error[x] - error[item]) <= found.residual_sd for x in others)
        assert pick.overlapping == sum(
            span[x][0] <= span[item][1] and span[item][0] <= span[x][1] for x in others
        )
        assert pick.extrapolated == (item.n > 7e9)
    inside = [item for item in bought if item.n <= 7e9]
    wanted = (inside[0].llm_name, inside[0].v) if inside and bought[0].n > 7e9 else None
    assert (found.inside and (found.inside.llm_name, found.inside.v)) == wanted
    if not bought:
        assert found.other_llms == found.other_tokens == ()
        return
    best = bought[0]
    for alternatives, key in ((found.other_llms, "llm_name"), (found.other_tokens, "v")):
        assert len(alternatives) == (4 if key == "llm_name" else 6)
        for other in alternatives:
            own = [x for x in items if f"{getattr(x, key):g}" == other.what] if key == "v" else []
            own = own or [x for x in items if x.llm_name == other.what]
            enough = [x.cost / budget for x in own if error[x] <= error[best]]
            if enough:
                assert other.times_budget == pytest.approx(min(enough))
                assert other.needed_n is None
            mine = [x for x in bought if x in own]
            if mine:
                assert other.loss == pytest.approx(error[mine[0]] - error[best])
                ends = np.quantile(draws[mine[0]] - draws[best], [0.025, 0.975], method="closest_observation")
                assert other.loss_interval == pytest.approx(ends)
            else:
                assert other.best is None


def test_a_size_off_the_menu_errs_what_the_first_pick_does() -> None:
    group = groups_of(paper(), "ocr")[0]
    law = predictor(group)
    assert law is not None
    found = advise(group, menu(), 5e12, 1, price)
    off = [x for x in found.other_tokens if x.needed_n is not None]
    assert {x.what for x in off} >= {"1", "4"}
    for other in off:
        assert other.needed_n is not None
        v = float(other.what)
        assert law(np.array([other.needed_n]), np.array([v]))[0][0] == pytest.approx(found.picks[0].error)
        assert other.times_budget == pytest.approx(price(other.needed_n, v) / 5e12)


def test_the_papers_claim() -> None:
    """Where the text costs nothing: one token and the largest LLM for reasoning, many tokens for OCR."""
    record = paper()
    short = [Candidate(name, n, v, 2 * n * (1 + v)) for name, n in SIZES.items() for v in COUNTS]
    budget = 2 * 7e9 * 2  # buys the measured LLMs alone
    picked = {
        name: advise(groups_of(record, name)[0], short, budget, 1, price).picks[0]
        for name in ("reasoning", "ocr")
    }
    assert (picked["reasoning"].llm_name, picked["reasoning"].v) == ("7B", 1)
    assert picked["ocr"].v >= 16
    assert picked["ocr"].n < 2e9


def test_what_is_shown() -> None:
    group = groups_of(paper(), "reasoning")[0]
    said = show(advise(group, menu(), 5e12, 2, price), 5e12, "FLOP", "an answer")
    assert said.startswith("reasoning: 5 TFLOP an answer; law logit_linear, residual sd 0.33 pt")
    assert "1 huge" in said
    assert "(extrapolated)" in said
    assert said.count("(the best within what was measured)") == 1
    assert "the price of another V" in said
    nothing = show(advise(group, menu(), 1.0, 2, price), 1.0, "FLOP", "an answer")
    assert "buys none of 35 candidates; the cheapest costs 51 GFLOP" in nothing


def analyze_rows(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[str, Any] = json.loads(
        to_json(analysis_record(analyze([path], Options(("log_linear",), 50))))
    )
    return found


def unidentified(folder: Path) -> dict[str, Any]:
    """Errors that know nothing of N or V."""
    rng = np.random.default_rng(1)
    rows = [
        make_row(name, n, v, "read", "ocr", 0.5 + rng.normal(0, 0.05))
        for name, n in (("a", 1000), ("b", 4000), ("c", 16000))
        for v in (1, 4, 16)
    ]
    return analyze_rows(rows, folder)


def test_without_a_law_the_measured_cells_are_compared(tmp_path: Path) -> None:
    record = unidentified(tmp_path)
    group = groups_of(record)[0]
    assert predictor(group) is None
    cells = group["data"]["cells"]
    items = [Candidate(cell["llm_name"], cell["n"], cell["v"], price(cell["n"], cell["v"])) for cell in cells]
    items.append(Candidate("never measured", 5e4, 1.0, 1.0))
    found = advise(group, items, price(4000, 16), 3, price)
    assert found.law is None
    assert found.reason
    assert found.candidates == 9
    bought = sorted(
        (cell for cell in cells if price(cell["n"], cell["v"]) <= price(4000, 16)),
        key=lambda cell: cell["error"],
    )
    assert [pick.error for pick in found.picks] == [cell["error"] for cell in bought[:3]]
    for pick, cell in zip(found.picks, bought, strict=False):
        noise = 1.96 * cell["sampling_sd"]
        assert pick.interval == pytest.approx((cell["error"] - noise, cell["error"] + noise))
        assert pick.within_sd is None
        assert not pick.extrapolated
    assert all(other.needed_n is None for other in found.other_tokens)
    assert "no law is identified (" in show(found, 1e6, "FLOP", "an answer")


def test_methods_are_listed_at_their_measured_points(tmp_path: Path) -> None:
    rows = make_rows()
    other = [
        {**row, "compressor": "pool", "score": row["score"] * 0.9}
        for row in rows
        if row["visual_tokens"] == 4
    ]
    record = analyze_rows(rows + other, tmp_path)
    assert {item["llm_name"] for item in record["methods"]} == {"nano", "micro", "mini", "small"}
    points = [(item["llm_name"], p) for item in record["methods"] for p in item["points"]]
    asked: list[tuple[str, float]] = []

    def charge(name: str, point: dict[str, Any]) -> float | None:
        asked.append((name, point["v"]))
        return None if name == "nano" else point["v"]

    found = measured_methods(record, charge, 4.0, 3)
    assert len(asked) == len(points)
    cheap = sorted(p["error"] for name, p in points if name != "nano" and p["v"] <= 4)
    assert [x.error for x in found] == cheap[:3]
    said = show_methods(found, "FLOP")
    assert "quecc" in said
    assert len(said.splitlines()) == 4
    assert "none" in show_methods((), "ms")


def damaged(**more: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps(paper()))
    record["prediction"] = {**record["prediction"], **more}
    return record


@pytest.mark.parametrize(
    "value, part",
    [
        ("{", "not JSON"),
        ([1], "no analysis.json"),
        ({"group": "a"}, "no analysis.json"),
        ({k: v for k, v in paper().items() if k != "prediction"}, "run vlmscale analyze again"),
    ],
)
def test_a_record_that_cannot_be_used(value: Any, part: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "analysis.json", value)
    with pytest.raises(DataError, match=part) as caught:
        read_record(path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(DataError, match="No such file"):
        read_record(tmp_path / "none.json")


@pytest.mark.parametrize(
    "more, part",
    [
        ({"law": "cubic"}, "prediction.law 'cubic' is unknown"),
        ({"theta": [1.0]}, "prediction is damaged"),
        ({"draws": [[1.0, 2.0]]}, "prediction is damaged"),
        ({"centre_ln_n": None}, "prediction is damaged"),
    ],
)
def test_a_prediction_that_cannot_be_used(more: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError, match=part):
        advise(groups_of(damaged(**more))[0], menu(), 1e12, 1, price)


def test_an_unknown_group() -> None:
    with pytest.raises(DataError, match="--group math: unknown; there are reasoning, ocr"):
        groups_of(paper(), "math")
