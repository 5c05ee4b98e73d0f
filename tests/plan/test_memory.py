"""Memory by arithmetic: what is exact is counted by hand, the rest moves as it must."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vlmscale.cli import main
from vlmscale.config import Cell, CompressorConfig, LLMConfig, TowerConfig, TrainConfig
from vlmscale.cost.image import compressor_call
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.plan import compiled
from vlmscale.plan.compiled import Request
from vlmscale.plan.memory import compressor_residuals, predict, predict_training, tower_bytes

LLM, TOWER = "qwen1.5-0.5b", "siglip-base-patch16-224"


def cell_of(visual_tokens: int = 0, batch: int = 16, **train: object) -> Cell:
    recipe = TrainConfig(batch_size=batch, attention="splash", dtype="bfloat16", **train)  # type: ignore[arg-type]
    compressor = CompressorConfig("pool", visual_tokens)
    cell = Cell(tower=TowerConfig(TOWER), compressor=compressor, llm=LLMConfig(LLM), train=recipe)
    cell.data.tokenizer = LLM
    return cell


def test_arguments_of_a_blind_step_are_its_state_and_its_batch() -> None:
    """Three float32 numbers a parameter, two counters and the optimiser's two, seven arrays of a batch."""
    params, rows, length = SIZES[LLM].num_params(), 16, 512
    batch = rows * length * (6 * 4 + 1)
    arguments, _, _ = predict_training(cell_of(), (1, 1, 1), length)
    scalars = arguments - 12 * params - batch
    assert 8 <= scalars <= 32
    split, _, _ = predict_training(cell_of(), (2, 1, 1), length)
    assert split == 12 * params + batch // 2 + scalars


def test_fsdp_splits_the_state() -> None:
    """All but norms, which are small and lie on every device."""
    whole, _, _ = predict_training(cell_of(), (4, 1, 1), 512)
    parts, _, _ = predict_training(cell_of(), (1, 4, 1), 512)
    params = SIZES[LLM].num_params()
    assert 8.99 * params < whole - parts < 9 * params


def test_what_is_kept_grows_with_what_is_not_computed_again() -> None:
    ways = ("block", "dots", "none")
    temporary = {way: predict_training(cell_of(remat=way), (1, 1, 1), 2048)[1] for way in ways}
    assert temporary["block"] < temporary["dots"] < temporary["none"]
    longer = predict_training(cell_of(remat="none"), (1, 1, 1), 4096)[1]
    assert longer > 1.5 * temporary["none"]


def test_a_batch_in_parts_keeps_less_and_adds_gradients() -> None:
    once, parts = (predict_training(cell_of(batch=64, accumulate=n), (1, 1, 1), 2048)[1] for n in (1, 4))
    assert parts < once
    small = [predict_training(cell_of(batch=4, accumulate=n), (1, 1, 1), 128)[1] for n in (1, 4)]
    gradients = 4 * SIZES[LLM].num_params()
    assert small[1] - small[0] > 0.9 * gradients  # nothing else of it is large


def test_a_frozen_decoder_has_neither_gradients_nor_moments() -> None:
    cell = cell_of(visual_tokens=49, llm_rate=0.0)
    arguments, temporary, _ = predict_training(cell, (1, 1, 1), 512)
    params = SIZES[LLM].num_params()
    assert 2 * params < arguments < 2.2 * params
    assert temporary < 4 * params


def test_a_towers_parameters() -> None:
    size = TOWERS[TOWER]
    assert tower_bytes(cell_of(49), (4, 1, 1)) == 2 * size.num_params(size.select_layer)
    assert tower_bytes(cell_of(49), (1, 4, 1)) < 2 * size.num_params(size.select_layer) / 3


def test_a_compressor_keeps_its_activations() -> None:
    """Of pooling and a projector of two layers: the pooled input, and the hidden layer around its GELU."""
    width, hidden = TOWERS[TOWER].width, SIZES[LLM].width
    found = compressor_residuals(compressor_call(cell_of(49), 49, 64))
    assert 49 * (width + hidden) <= found <= 49 * (width + 5 * hidden)


@pytest.mark.parametrize("program", ["train", "tower", "generate"])
def test_every_program_is_predicted(program: str) -> None:
    request = Request(program, cell_of(visual_tokens=49), "v5e-16", (16, 1, 1), 512)
    found = predict(request)
    assert found.by == "arithmetic"
    assert 0 < found.arguments < found.needed < found.limit
    assert found.needed == found.arguments + found.temporary + found.code


def test_longer_answers_keep_more() -> None:
    request = Request("generate", cell_of(49), "v5e-16", (16, 1, 1), 512)
    assert predict(replace(request, length=2048)).temporary > 3 * predict(request).temporary


def test_a_gpu_is_planned_without_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.util, "find_spec", lambda name: None)
    words = ["plan", "configs/llava_finetune.py:qwen1.5-0.5b,16,pool", "--topology", "h100-8", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    [row] = found["plans"]
    assert {part["by"] for part in row["programs"].values()} == {"arithmetic"}
    assert row["changes"] == ["train.attention=cudnn"] or row["changes"][0].startswith("train.accumulate")
    assert row["chip_hours"] == pytest.approx(8 * row["hours"])
    assert found["errors"] == {}
    # One GPU holds neither the state of 14B nor any part of it.
    words[1] = words[1].replace("0.5b", "14b")
    assert main([*words[:3], "h100-1", "--json"]) == 2
    [row] = json.loads(capsys.readouterr().out)["plans"]
    assert row["used_gib"] > row["limit_gib"]
    assert list(row["programs"]) == ["train"]
