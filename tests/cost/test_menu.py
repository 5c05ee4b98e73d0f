"""Which LLMs there are to choose from, and what an image costs before them."""

from __future__ import annotations

from typing import Any

import pytest

from vlmscale.config import Cell, CompressorConfig, LLMConfig, TowerConfig
from vlmscale.cost.image import image_flops
from vlmscale.cost.menu import (
    PAPER_ORIGIN,
    Image,
    Listed,
    chosen_image,
    known_name,
    list_llms,
    measured_image,
)
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES

PAPER = [{"llm_name": name, "n": n} for name, n in (("500M", 5e8), ("1.8B", 1.8e9), ("4B", 4e9), ("7B", 7e9))]


def test_the_papers_llms_are_those_of_qwen() -> None:
    listed = list_llms(PAPER, PAPER_ORIGIN, (), 2)
    assert [item.name for item in listed] == [f"qwen1.5-{size}b" for size in ("0.5", "1.8", "4", "7", "14")]
    assert [item.n for item in listed[:4]] == [5e8, 1.8e9, 4e9, 7e9]  # as the law counts them
    assert listed[4].n == SIZES["qwen1.5-14b"].num_params()
    assert known_name("30B", 3e10, PAPER_ORIGIN) is None


def test_elsewhere_a_size_is_no_name() -> None:
    listed = list_llms(PAPER, "this data", (), 2)
    assert [(item.name, item.llm) for item in listed] == [(cell["llm_name"], None) for cell in PAPER]


def test_the_family_of_what_was_measured_is_on_the_menu() -> None:
    cells = [{"llm_name": "toy-135k", "n": 139_456}, {"llm_name": "mine", "n": 1e5}]
    names = [item.name for item in list_llms(cells, "this sweep", (), 2)]
    assert set(names) == {"toy-14k", "toy-40k", "toy-135k", "toy-375k", "mine"}
    assert names.index("mine") == 2  # by size


def test_wanted_llms() -> None:
    listed = list_llms(PAPER, PAPER_ORIGIN, ("qwen3-8b", "qwen1.5-7b"), 2)
    assert [(item.name, item.n) for item in listed] == [
        ("qwen1.5-7b", 7e9),
        ("qwen3-8b", SIZES["qwen3-8b"].num_params()),
    ]
    with pytest.raises(UserError, match="--llm qwen9: neither measured nor known"):
        list_llms(PAPER, PAPER_ORIGIN, ("qwen9",), 2)


def test_a_chosen_image_is_counted_as_training_counts_it() -> None:
    listed = Listed("toy-40k", 4e4, None)
    compressor = CompressorConfig("quecc", 4)
    cell = Cell(tower=TowerConfig("scenes-48"), llm=LLMConfig("toy-40k"), compressor=compressor)
    flops = image_flops(cell, 4, 20, 20)
    assert chosen_image("scenes-48", "quecc", listed, 4, 20) == Image(flops.tower + flops.compressor, True)
    assert chosen_image("scenes-48", "pool", listed, 4, 20).query_pass is False
    unknown = Listed("mine", SIZES["toy-40k"].num_params(512), None)
    assert chosen_image("scenes-48", "quecc", unknown, 4, 20).flops == flops.tower + flops.compressor


@pytest.mark.parametrize(
    "tower, compressor, part",
    [
        ("clip", "pool", "--tower clip: unknown"),
        ("scenes-48", "poll", "compressor.name=poll"),
        ("scenes-48", "tokenpacker", "visual_tokens=5"),
    ],
)
def test_an_image_that_cannot_be_chosen(tower: str, compressor: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        chosen_image(tower, compressor, Listed("toy-14k", 1e4, None), 5, 20)


def test_what_the_cells_say_of_an_image() -> None:
    def cell(v: float, tower: float | None, compressor: float | None, query: float | None) -> dict[str, Any]:
        return {"v": v, "tower_flops": tower, "compressor_flops": compressor, "query_flops": query}

    cells = [
        cell(1, 10.0, 2.0, 0.0),
        cell(1, 10.0, 4.0, 0.0),
        cell(4, 10.0, None, 3.0),
        cell(9, None, 1.0, 1.0),
    ]
    assert measured_image(cells, 1) == Image(13.0, False)
    assert measured_image(cells, 4) == Image(10.0, True)
    assert measured_image(cells, 9) is None
    assert measured_image(cells, 16) is None
