"""The shipped data definitions load, fit a cell, and say how their originals are fetched."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from vlmscale.config import Cell, DataConfig, LLMConfig
from vlmscale.loading import find_config
from vlmscale.validation import validate

ROOT = Path(__file__).resolve().parent.parent / "configs" / "data"
STAGES = {
    "llava_pretrain": ("plain", "crop", "blip_laion_cc_sbu_558k.json", "558,128"),
    "llava_instruct": ("v1", "pad", "llava_v1_5_mix665k.json", "665,298"),
}


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(find_config(f"configs/data/{name}.py")))


def test_every_definition_is_tested() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_definition_makes_a_valid_cell(name: str) -> None:
    template, mode, _, _ = STAGES[name]
    data: DataConfig = load(name)["get_data"]()
    assert (data.source, data.template, data.image_mode) == ("llava", template, mode)
    assert (data.tokenization, data.packing, data.row_length) == ("llava", "pack", 2048)
    assert data.prepared == f"data/{name}"
    cell = Cell(llm=LLMConfig(name="vicuna-7b-v1.5"), data=data)
    cell.train.batch_size = 16
    validate(cell)


@pytest.mark.parametrize("name", STAGES)
def test_the_argument_names_the_prepared_directory(name: str) -> None:
    assert load(name)["get_data"]("elsewhere/set").prepared == "elsewhere/set"


@pytest.mark.parametrize("name", STAGES)
def test_the_docstring_says_how_to_come_to_that_directory(name: str) -> None:
    _, _, records, count = STAGES[name]
    module = load(name)
    text = module["__doc__"]
    assert f"--out {module['get_data']().prepared} " in text
    assert f"--records {'LLaVA-Pretrain' if name == 'llava_pretrain' else 'LLaVA-Instruct'}/{records}" in text
    assert count in text
    assert "hf download" in text


def test_the_folders_of_the_mix_add_up() -> None:
    lines = load("llava_instruct")["__doc__"].split("Layout")[1].split("The prepared set")[0].splitlines()
    counts = [int(line.split()[-1].replace(",", "")) for line in lines if line.strip() and line[-1].isdigit()]
    assert len(counts) == 6
    assert sum(counts) == 665_298
