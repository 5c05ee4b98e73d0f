"""What is asked: one item a question, with the conversation and the pictures in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmscale.data.conversation import IMAGE_MARK, Template
from vlmscale.data.dataset import Dataset
from vlmscale.data.records import PLACEHOLDER, Turn


@dataclass(frozen=True)
class Item:
    """One question to answer."""

    id: str
    data_set: int  # of the split's
    record: int  # of the data set
    images: int  # how many of the record's pictures it shows, from the first on
    question: str  # with a placeholder where a picture is shown
    truth: str
    history: tuple[Turn, ...]
    task: str
    task_group: str
    chance: float


def make_items(datasets: Sequence[Dataset], history: str) -> list[Item]:
    """One item a turn; with history "gold" behind the true conversation so far, else on its own.

    On its own it comes behind all pictures that were shown before it.
    """
    items = []
    for place, dataset in enumerate(datasets):
        for index in range(len(dataset)):
            record, shown = dataset.record(index), 0
            for number, turn in enumerate(record.turns):
                earlier, shown = shown, shown + turn.question.count(PLACEHOLDER)
                before, question = record.turns[:number], turn.question
                if history != "gold":
                    before, question = (), (PLACEHOLDER * earlier + "\n" + question).strip()
                name = record.id if len(record.turns) == 1 else f"{record.id}#{number}"
                labels = record.task or "records", record.task_group or "records", record.chance
                items.append(Item(name, place, index, shown, question, turn.answer, before, *labels))
    return items


def by_length(items: Sequence[Item], template: Template, most: int) -> tuple[list[Item], list[Item]]:
    """Items whose prompt has at most so many text tokens, and the others."""
    short: list[Item] = []
    long: list[Item] = []
    for item in items:
        prompt = template.prompt(item.question, item.history)
        (short if text_tokens(prompt) <= most else long).append(item)
    return short, long


def text_tokens(prompt: list[int]) -> int:
    """Tokens of a prompt without its image marks."""
    return len(prompt) - prompt.count(IMAGE_MARK)


def first_question(item: Item) -> str:
    """The question that QueCC embeds: the first of the conversation, later ones reuse its visual tokens."""
    return item.history[0].question if item.history else item.question
