"""A small prepared data set with records of every kind, and a template for its text."""

from __future__ import annotations

from pathlib import Path

from tests.data.llava_files import encoded
from vlmscale.data.conversation import Template, make_template
from vlmscale.data.dataset import Dataset, open_dataset
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import PLACEHOLDER, Record, Turn
from vlmscale.data.tokenizer import train_tokenizer

COUNT = 23


def conversation(index: int) -> Record:
    """Record `index`: index % 3 images, one turn to three, and a text that no other has."""
    images = index % 3
    turns = [Turn(PLACEHOLDER * min(images, 1) + f"What is {index}?", f"It is {index}." * (1 + index % 4))]
    if index % 2:
        turns.append(Turn(f"And {index} more?", "No."))
    if images == 2:
        turns.append(Turn(f"{PLACEHOLDER} and {index}?", f"Yes, {index}."))
    names = tuple(f"{index}-{place}.png" for place in range(images))
    return Record(f"record-{index}", names, tuple(turns))


def make_dataset(out: Path, count: int = COUNT) -> Dataset:
    """`count` records, in shards of five."""
    records = [conversation(index) for index in range(count)]
    pictures = [
        [encoded("PNG", seed=10 * index + place, size=(9 + place, 7)) for place in range(len(record.images))]
        for index, record in enumerate(records)
    ]
    write_dataset(out, {"train": zip(records, pictures, strict=True)}, shard_records=5)
    return open_dataset(out)


def toy_template() -> Template:
    """Trained on the records."""
    turns = [turn for index in range(COUNT) for turn in conversation(index).turns]
    texts = [text for turn in turns for text in (turn.question, turn.answer)]
    return make_template("toy", train_tokenizer(texts, 400), "inline")
