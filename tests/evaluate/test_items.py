"""What is asked: pictures come with their questions; what is too long is told by its place, not its id."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from vlmscale.data.conversation import make_template
from vlmscale.data.dataset import Dataset, open_dataset
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.data.tokenizer import train_tokenizer
from vlmscale.evaluate.items import by_length, make_items


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
    alone, behind = (make_items([dataset], history)[:3] for history in ("none", "gold"))
    assert [item.images for item in alone] == [item.images for item in behind] == [1, 1, 3]
    for item in alone:
        assert item.question.count("<image>") == item.images
        assert item.history == ()
    assert [item.question for item in behind] == ["<image>\nFirst?", "Second?", "<image> and <image>?"]
    assert [len(item.history) for item in behind] == [0, 1, 2]
    assert alone[2].question == "<image>\n<image> and <image>?"


def test_one_of_several_records_with_an_id_is_too_long(dataset: Dataset) -> None:
    items = make_items([dataset], "none")
    template = make_template("toy", train_tokenizer(["one two three"], 300))
    short, long = by_length(items, template, 30)
    assert [(item.id, item.record) for item in long] == [("same", 2)]
    assert [item.record for item in short] == [0, 0, 0, 1, 3]
