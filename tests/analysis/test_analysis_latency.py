"""The model of latencies: what it recovers, what it costs, which files it refuses, and the analysis on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.latency import (
    DECODE_TERMS,
    PREFILL_TERMS,
    FittedLatency,
    Images,
    Model,
    Part,
    Shape,
    answer_ms,
    fit_models,
    read_latency,
    usual,
)
from analysis.values import DataError
from tests.analysis.latency_files import DECODE, PREFILL, llm, made_cells, made_file, times, write_file

MODEL = Model(Part(PREFILL, 0.0, 0.0), Part(DECODE, 0.0, 0.0))
IMAGES = {
    "tower": "clip",
    "compressor": "pool",
    "query_pass": False,
    "tower_ms": [{"batch": 1, "ms": 10.0}, {"batch": 8, "ms": 40.0}],
    "compressor_ms": [
        {"llm_name": name, "visual_tokens": v, "batch": b, "ms": b * v * factor}
        for name, factor in (("a", 1.0), ("b", 2.0), ("c", 9.0))
        for v in (1, 16)
        for b in (1, 8)
    ],
}


def cost(**more: Any) -> FittedLatency:
    asked = {"text_tokens": 50.0, "gen_tokens": 10.0, "batch": 8.0, **more}
    return FittedLatency("latency.json", "NVIDIA H200", "bfloat16", 2.0, (5e8, 7e9), MODEL, **asked)


def coefficients(part: dict[str, Any], names: tuple[str, ...]) -> list[float]:
    return [part["coefficients"][name] for name in names]


def test_the_fit_finds_the_coefficients_that_made_the_times() -> None:
    llms = {
        "small": llm(5e8),
        "grouped": {**llm(2e9), "kv_bytes": llm(2e9)["kv_bytes"] / 8, "head": 3e8},
        "large": {**llm(7e9), "attention": 2 * llm(7e9)["attention"]},
    }
    found = fit_models(llms, made_cells(llms), "bfloat16")["shape"]
    np.testing.assert_allclose(coefficients(found["prefill"], PREFILL_TERMS), PREFILL, rtol=1e-8)
    np.testing.assert_allclose(coefficients(found["decode"], DECODE_TERMS), DECODE, rtol=1e-8)
    for part in found.values():
        assert part["worst_error"] < 1e-9
        assert part["left_out_worst_error"] < 1e-7


def test_of_usual_decoders_n_alone_says_all() -> None:
    models = made_file()["models"]
    np.testing.assert_allclose(coefficients(models["size"]["prefill"], PREFILL_TERMS), PREFILL, rtol=1e-8)
    np.testing.assert_allclose(coefficients(models["size"]["decode"], DECODE_TERMS), DECODE, rtol=1e-8)


def test_no_term_is_negative_and_errors_are_relative() -> None:
    """Times that fall with the batch: no coefficient can say that, so that the constant takes the middle."""
    llms = {"a": llm(1e9), "b": llm(2e9)}
    cells = [{**cell, "prefill_ms": 3.0 / cell["batch"], "decode_ms": 1.0} for cell in made_cells(llms)]
    part = fit_models(llms, cells, "bfloat16")["shape"]["prefill"]
    assert min(part["coefficients"].values()) >= 0
    assert 0 < part["median_error"] < part["worst_error"] < 1
    assert part["left_out_worst_error"] is None  # two LLMs


def test_an_llm_left_out_is_predicted_from_the_others() -> None:
    llms = {f"{size:g}": llm(size) for size in (5e8, 2e9, 7e9)}
    cells = [
        {**cell, "decode_ms": cell["decode_ms"] * (1.5 if cell["llm_name"] == "7e+09" else 1.0)}
        for cell in made_cells(llms)
    ]
    part = fit_models(llms, cells, "bfloat16")["shape"]["decode"]
    assert part["left_out_worst_error"] >= 1 / 3 - 1e-9  # the two others are exact: 1 / 1.5 - 1
    assert part["left_out_worst_error"] > part["worst_error"]


def test_too_few_cells() -> None:
    llms = {"a": llm(1e9)}
    with pytest.raises(DataError, match="3 cells were timed; a fit needs 4"):
        fit_models(llms, made_cells(llms)[:3], "float32")


def test_an_answer_is_a_prefill_and_one_step_less_than_it_has_tokens() -> None:
    shape = Shape(**llm(2e9))
    for generated, steps in ((0, 0), (1, 0), (2, 1), (10, 9)):
        one = times(shape, 16, 50, 8, generated)
        wanted = one["prefill_ms"] + steps * one["decode_ms"]
        assert float(answer_ms(MODEL, shape, 66, generated, 8)) == pytest.approx(wanted)


@given(
    st.lists(st.floats(0, 10), min_size=8, max_size=8),
    st.floats(7, 12),
    st.floats(1, 1000),
    st.floats(1, 64),
    st.floats(0, 200),
)
def test_size_for_inverts_the_cost(
    values: list[float], log_n: float, v: float, batch: float, generated: float
) -> None:
    values[2] += 0.1  # a prefill that does not grow with N is refused
    model = Model(Part(tuple(values[:4]), 0, 0), Part(tuple(values[4:]), 0, 0))
    charged = replace(cost(batch=batch, gen_tokens=generated), model=model)
    n = 10**log_n
    fixed, price = float(charged(0.0, v)), float(charged(n, v))
    assert price > fixed
    if price - fixed > 1e-4 * price:  # else the constant alone is left of it
        assert float(charged.size_for(price, v)) == pytest.approx(n, rel=1e-6)
    assert float(charged.size_for(fixed * 0.999, v)) == 0
    assert float(charged.size_for(2 * price, v)) > n


def test_costs_broadcast() -> None:
    charged = cost(images=None)
    n, v = np.array([5e8, 7e9])[:, None], np.array([1.0, 16.0, 576.0])
    price = charged(n, v)
    assert price.shape == (2, 3)
    assert (np.diff(price, axis=0) > 0).all()
    assert (np.diff(price, axis=1) > 0).all()
    sizes = charged.size_for(np.array([20.0, 2000.0])[:, None], v)
    assert sizes.shape == (2, 3)
    np.testing.assert_allclose(charged(sizes[1], v), 2000.0)
    assert charged.of(usual(7e9, 2.0), 16.0) == charged(7e9, 16.0)


def test_images_are_interpolated_between_what_was_measured(tmp_path: Path) -> None:
    images = read_latency(write_file(tmp_path / "a.json", made_file(IMAGES)), "size").images
    assert images is not None
    assert images.milliseconds(np.array([1.0, 16.0]), 1).tolist() == [12.0, 42.0]  # of three LLMs the second
    assert images.milliseconds(np.array([4.0]), 1).tolist() == [27.0]  # half way in ln V
    assert images.milliseconds(np.array([1.0]), 8).tolist() == [56.0]
    assert images.milliseconds(np.array([1.0]), 4.5).tolist() == [34.0]
    assert images.milliseconds(np.array([1.0]), 16).tolist() == [112.0]
    with_images, without = cost(images=images), cost()
    difference = with_images(2e9, 16.0) - without(2e9, 16.0)
    assert float(difference) == pytest.approx(float(images.milliseconds(np.array(16.0), 8)))
    assert float(with_images.size_for(with_images(2e9, 16.0), 16.0)) == pytest.approx(2e9)


def test_a_query_pass_is_one_more_prefill_of_the_text() -> None:
    quecc = cost(images=Images((8.0,), (0.0,), (1.0,), ((0.0,),), True))
    prefill = cost(text_tokens=50.0, gen_tokens=0.0)
    assert float(quecc(2e9, 16.0) - cost()(2e9, 16.0)) == pytest.approx(float(prefill(2e9, 0.0)))
    assert float(quecc.size_for(quecc(2e9, 16.0), 16.0)) == pytest.approx(2e9)


def test_a_file_gives_its_cost_back(tmp_path: Path) -> None:
    found = read_latency(write_file(tmp_path / "latency.json", made_file()), "size")
    asked = replace(found, text_tokens=50.0, gen_tokens=10.0, batch=8.0)
    assert found.sizes == (5e8, 7e9)
    np.testing.assert_allclose(asked(7e9, 16.0), cost()(7e9, 16.0))
    said = asked.describe()
    for part in (
        "NVIDIA H200",
        "latency.json",
        "500M to 7B",
        "Q = 50",
        "10 decoded",
        "batches of 8",
        "tower",
    ):
        assert part in said


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in made_file().items() if name != key}


def changed(*keys: str, to: Any) -> dict[str, Any]:
    whole = made_file(json.loads(json.dumps(IMAGES)))
    inside: Any = whole
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = to
    return whole


@pytest.mark.parametrize(
    "value, parts",
    [
        ("{", ["not JSON"]),
        ([], ["no latency file"]),
        ({"kind": "other"}, ["no latency file", "bench latency makes one"]),
        (made_file(version=7), ["version 7", "measure again"]),
        (made_file(dtype="int8"), ["dtype", "int8"]),
        (made_file(models=None, no_fit="3 cells were timed"), ["no coefficients (3 cells", "more cells"]),
        (without("models"), ["no coefficients", "models is missing"]),
        (without("llms"), ["llms is missing"]),
        (made_file(llms={}), ["llms is empty"]),
        (without("device"), ["device is missing"]),
        (changed("models", "size", "decode", to=None), ["models.size", "decode is missing"]),
        (
            changed("models", "size", "prefill", "coefficients", "ms_per_tflop", to=-1),
            ["models.size.prefill", "ms_per_tflop", "at least 0"],
        ),
        (
            changed("models", "size", "prefill", "coefficients", to=dict.fromkeys(PREFILL_TERMS, 0)),
            ["does not grow"],
        ),
        (changed("images", "tower_ms", to=3), ["images", "tower_ms"]),
        (changed("images", "tower_ms", to=[]), ["no batch"]),
        (changed("images", "compressor_ms", 0, "ms", to=0), ["compressor_ms", "positive"][1:]),
        (changed("images", "compressor_ms", 0, "visual_tokens", to=4), ["lacks batch 8 at 4"]),
    ],
)
def test_a_file_that_cannot_be_used(value: Any, parts: list[str], tmp_path: Path) -> None:
    path = write_file(tmp_path / "bad.json", value)
    with pytest.raises(DataError) as caught:
        read_latency(path, "size")
    assert str(caught.value).startswith(str(path))
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(DataError, match="No such file"):
        read_latency(tmp_path / "none.json", "size")


QUICK = ["--bootstrap", "20", "--law", "log_linear", "--json"]


def test_the_analysis_charges_what_the_model_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_file(tmp_path / "latency.json", made_file()))
    found = {}
    for batch, generated in (("1", "0"), ("8", "0"), ("8", "40")):
        words = ["--cost", "latency", "--latency", path, "--text-tokens", "50"]
        asked = ["--gen-tokens", generated, "--batch", batch]
        assert main(["paper-reasoning", *QUICK, *words, *asked, "--budget", "900"]) == 0
        found[batch, generated] = json.loads(capsys.readouterr().out)
    for (batch, generated), result in found.items():
        assert result["cost"]["unit"] == "ms"
        assert (result["cost"]["batch"], result["cost"]["gen_tokens"]) == (float(batch), float(generated))
        best = result["optimum"]
        charged = cost(batch=float(batch), gen_tokens=float(generated))
        assert float(charged(best["n"], best["visual_tokens"])) == pytest.approx(900)
        # No V on a fine grid that spends the same does better.
        params = result["laws"]["log_linear"]["params"]
        v = np.geomspace(1, 576, 4001)
        n = charged.size_for(900.0, v) / 1e9
        error = params["c"] - params["a"] * np.log(n) - params["b"] * np.log(v)
        assert best["error"] <= error.min() + 1e-9
    # What is spent whatever V is invites more visual tokens.
    assert found["8", "40"]["optimum"]["visual_tokens"] > found["8", "0"]["optimum"]["visual_tokens"]


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--latency", "FILE"], ["goes with --cost latency"]),
        (["--cost", "latency", "--latency", "FILE", "--attention"], ["--attention cannot change"]),
        (["--cost", "latency", "--latency", "FILE", "--intensity", "200"], ["--intensity cannot change"]),
        (["--cost", "latency", "--gen-tokens", "3"], ["--gen-tokens", "without --latency FILE"]),
        (["--cost", "latency", "--batch", "8"], ["--batch", "without --latency FILE"]),
        (["--cost", "latency", "--latency", "NONE"], ["No such file"]),
    ],
)
def test_options_that_do_not_go_together(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"FILE": write_file(tmp_path / "latency.json", made_file()), "NONE": tmp_path / "none.json"}
    assert main(["paper-reasoning", *QUICK, *(str(places.get(word, word)) for word in words)]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    for part in parts:
        assert part in streams.err


def test_a_report_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_file(tmp_path / "latency.json", made_file()))
    words = [
        "--bootstrap",
        "20",
        "--law",
        "log_linear",
        "--out",
        str(tmp_path / "report"),
        "--gen-tokens",
        "10",
    ]
    assert main(["paper-reasoning", "--cost", "latency", "--latency", path, *words, "--batch", "8"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "--cost latency --latency latency.json" in text
    assert "latency on NVIDIA H200 (bfloat16)" in text
