"""What is asked: pictures come with their questions; what is too long is told by its place, not its id."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluate.asked import items_of
from vlmscale.data.dataset import Dataset, open_dataset
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    turns = (Turn("<image>\nFirst?", "a"), Turn("Second?", "b"), Turn("<image> and <image>?", "c"))
    several = Record("several", ("1", "2", "3"), turns)
    same = [Record("same", (), (Turn(text, "x"),)) for text in ("one", "two " * 50, "three")]
    shown = [(several, [picture(shade) for shade in (1, 2, 3)]), *((record, []) for record in same)]
    write_dataset(tmp_path / "set", {"train": shown})
    return open_dataset(tmp_path / "set")


def test_a_question_by_itself_brings_the_pictures_shown_before_it(dataset: Dataset) -> None:
    alone, behind = (items_of([dataset], history)[:3] for history in ("none", "gold"))
    assert [item.images for item in alone] == [item.images for item in behind] == [1, 1, 3]
    for item in alone:
        assert item.text.count("<image>") == item.images
        assert item.history == ()
    assert [item.text for item in behind] == ["<image>\nFirst?", "Second?", "<image> and <image>?"]
    assert [len(item.history) for item in behind] == [0, 1, 2]
    assert alone[2].text == "<image>\n<image> and <image>?"


def test_records_with_one_id_are_told_apart(dataset: Dataset) -> None:
    found = items_of([dataset], "none")
    assert [item.id for item in found[3:]] == ["same", "same~2", "same~3"]
    assert [item.record for item in found] == [0, 0, 0, 1, 2, 3]
    assert [item.question.question for item in found[3:]] == ["one", ("two " * 50).strip(), "three"]
