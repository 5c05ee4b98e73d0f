"""What is timed and what is told about it; never how long it took."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.latency import KIND, read_latency
from vlmscale.cli import main
from vlmscale.cost.answer import vocab_rows
from vlmscale.errors import UserError
from vlmscale.evaluate import latency
from vlmscale.evaluate.generation import make_generate, pad_prompts
from vlmscale.evaluate.latency import Grid, measure, random_params
from vlmscale.models.sizes import SIZES
from vlmscale.models.vlm import VLM


def grid(**more: Any) -> Grid:
    chosen: dict[str, Any] = {
        **{"llms": ("toy-14k", "toy-40k"), "visual_tokens": (1, 4), "text_tokens": (6,), "batches": (1, 2)},
        **{"gen_tokens": 3, "repeats": 1},
    }
    return Grid(**{**chosen, **more})


def quiet(done: int, total: int) -> None:
    pass


def test_every_cell_is_timed_once_and_progress_ends() -> None:
    steps: list[tuple[int, int]] = []
    found = measure(
        grid(tower="scenes-48", compressor="quecc"), lambda done, total: steps.append((done, total))
    )
    keys = [(c["llm_name"], c["visual_tokens"], c["text_tokens"], c["batch"]) for c in found["cells"]]
    assert keys == grid().cells
    assert len(keys) == 8
    assert found["failures"] == []
    for cell in found["cells"]:
        assert cell["gen_tokens"] == 3
        assert math.isfinite(cell["prefill_ms"])
        assert min(cell["prefill_ms"], cell["decode_ms"]) > 0
    images = found["images"]
    assert images["query_pass"] is True
    assert [row["batch"] for row in images["tower_ms"]] == [1, 2]
    assert len(images["compressor_ms"]) == 8
    assert steps == [(i, 18) for i in range(1, 19)]
    assert found["llms"]["toy-40k"]["params"] == SIZES["toy-40k"].num_params(512)
    assert found["device"]["platform"] == "cpu"


def test_the_timed_programs_say_what_generation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a prefill and a decode loop is that of `make_generate` with the same weights."""
    said: list[tuple[dict[str, Any], np.ndarray, np.ndarray]] = []
    programs = latency._programs

    def listening(model: VLM, gen_tokens: int) -> Any:
        timed = programs(model, gen_tokens)

        def decode(params: Any, token: Any, position: Any, cache: Any) -> Any:
            last, cache = timed.decode(params, token, position, cache)
            said.append((params, np.asarray(token), np.asarray(last)))
            return last, cache

        return timed._replace(decode=decode)

    monkeypatch.setattr(latency, "_programs", listening)
    measure(grid(llms=("toy-40k",), visual_tokens=(4,), batches=(2,)), quiet)
    params, first, last = said[-1]
    ids = np.random.default_rng(0).integers(0, 512, (2, 10)).tolist()
    model = VLM(SIZES["toy-40k"], 512, "mlp", 0, layout="loop")
    answers = make_generate(model, 3, ())(params, jax.device_put(pad_prompts(ids, -1, 0, 10)))
    assert np.asarray(answers)[:, 0].tolist() == first.tolist()
    assert np.asarray(answers)[:, 2].tolist() == last.tolist()


def test_compressors_that_read_the_text_or_the_tower() -> None:
    for name in ("llava_mini", "vistog", "pool:placement=after"):
        found = measure(grid(llms=("toy-14k",), batches=(2,), tower="scenes-48", compressor=name), quiet)
        assert len(found["images"]["compressor_ms"]) == 2
        assert found["images"]["query_pass"] is False


def test_a_prompt_that_is_too_long_is_told_and_the_rest_goes_on() -> None:
    found = measure(grid(llms=("toy-14k",), text_tokens=(6, 2045), batches=(1,)), quiet)
    assert [cell["text_tokens"] for cell in found["cells"]] == [6, 6]
    assert [row["visual_tokens"] for row in found["failures"]] == [1, 4]
    assert (
        found["failures"][0]["reason"] == "2046 tokens of prompt and 3 of answer; the LLM's context is 2048"
    )


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")])
def test_what_does_not_fit_in_memory_is_told_and_the_rest_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_cell = latency._time_cell

    def full(programs: Any, params: Any, length: int, batch: int, asked: Grid) -> tuple[float, float]:
        if batch == 2:
            raise error
        return time_cell(programs, params, length, batch, asked)

    monkeypatch.setattr(latency, "_time_cell", full)
    found = measure(grid(llms=("toy-14k",)), quiet)
    assert [cell["batch"] for cell in found["cells"]] == [1, 1]
    assert [(row["batch"], row["reason"]) for row in found["failures"]] == [(2, "out of memory")] * 2


def test_other_faults_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> tuple[float, float]:
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(latency, "_time_cell", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        measure(grid(), quiet)


def test_weights_are_random_and_of_the_type_that_is_asked_for() -> None:
    shapes = {
        "a": jax.ShapeDtypeStruct((64, 32), jnp.float32),
        "norm": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    made = random_params(shapes, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("bfloat16")}
    assert made["norm"].tolist() == [1.0] * 8
    assert 0.01 < float(jnp.std(made["a"].astype(jnp.float32))) < 0.03


@pytest.mark.parametrize(
    "more, part",
    [
        ({"llms": ("toy-14",)}, "--llm toy-14: unknown"),
        ({"visual_tokens": (0,)}, "--visual-tokens"),
        ({"batches": (1, 0)}, "--batch"),
        ({"gen_tokens": 1}, "--gen-tokens 1: at least 2"),
        ({"repeats": 0}, "--repeats 0"),
        ({"tower": "scenes-48"}, "give both, or neither"),
        ({"compressor": "pool"}, "give both, or neither"),
        ({"tower": "clip", "compressor": "pool"}, "--tower clip: unknown"),
        ({"tower": "scenes-48", "compressor": "poll"}, "compressor.name=poll"),
        ({"tower": "scenes-48", "compressor": "pool:kind=a"}, "pool has no option 'kind'"),
        ({"tower": "scenes-48", "compressor": "pool", "visual_tokens": (5,)}, "visual_tokens=5"),
    ],
)
def test_a_grid_that_cannot_be_timed(more: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        grid(**more)


WORDS = [
    "bench",
    "latency",
    "--llm",
    "toy-14k,toy-40k,toy-135k",
    "--visual-tokens",
    "1,16",
    "--text-tokens",
    "8",
]


def test_the_command_writes_a_file_that_the_analysis_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "latency.json"
    words = ["--batch", "1,2", "--gen-tokens", "3", "--repeats", "1", "--out", str(path)]
    assert main([*WORDS, *words, "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(path.read_text())
    assert json.loads(streams.out) == found
    assert "timing: 12/12" in streams.err
    assert found["kind"] == KIND
    assert found["dtype"] == "float32"
    assert found["versions"]["jax"] == jax.__version__
    for model in found["models"].values():
        for part in model.values():
            assert min(part["coefficients"].values()) >= 0
            assert part["median_error"] <= part["worst_error"]
            assert part["left_out_worst_error"] is not None
    assert read_latency(path, "shape").sizes[0] == SIZES["toy-14k"].num_params(vocab_rows("toy-14k"))


def test_the_table_names_what_was_not_timed_and_why_nothing_was_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "latency", "--llm", "toy-14k", "--visual-tokens", "1", "--text-tokens", "8,4000"]
    images = ["--tower", "scenes-48", "--compressor", "pool", "--repeats", "1"]
    assert main([*words, *images, "--out", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert "not timed: llm_name toy-14k, visual_tokens 1, text_tokens 4000, batch 1: 4001 tokens" in out
    assert "1 not timed, 1 cells timed" in out
    assert "no model of the times: 1 cells were timed; a fit needs 4" in out
    assert "scenes-48: batch 1: " in out
    assert "pool: V = 1, batch 1: " in out
    assert json.loads((tmp_path / "a.json").read_text())["models"] is None


@pytest.mark.parametrize(
    "more, part",
    [
        (["--batch", "x"], "--batch x: 'x' is no whole number above 0"),
        (["--visual-tokens", ","], "--visual-tokens is empty"),
        (["--llm", ""], "--llm is empty"),
        (["--llm", "toy"], "--llm toy: unknown"),
        (["--attention", "flash"], "--attention flash: unknown"),
        (["--attention", "cudnn"], "--attention cudnn: "),
        (["--out", "."], "--out .: is a directory"),
        (["--gen-tokens", "1"], "--gen-tokens 1"),
    ],
)
def test_the_command_refuses(
    more: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--out", str(tmp_path / "a.json"), *more]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("vlmscale bench latency: ")
    assert streams.err.count("\n") == 1
    assert part in streams.err
    assert not (tmp_path / "a.json").exists()
