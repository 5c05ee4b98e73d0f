"""Conversations to tokens and labels, as a pure function.

The template of built-in and tiny runs: `<|user|> [image slots] question <|assistant|> answer <|end|>`,
turn after turn; supervised are the answer and its `<|end|>`. The image stands before the first question,
where LLaVA moves its placeholder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from vlmscale.data.records import Record, Turn
from vlmscale.data.tokenizer import ASSISTANT, END, IMAGE, PAD, USER, special_id

IMAGE_OFFSET = 1  # visual tokens stand behind the first <|user|>


class Template:
    """Encodes turns with one tokenizer; texts that repeat are encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad, self.image, self.user, self.assistant, self.end = (
            special_id(tokenizer, token) for token in (PAD, IMAGE, USER, ASSISTANT, END)
        )
        self._known: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Ids of ordinary text; special strings inside it stay ordinary text."""
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]

    def prompt(self, question: str, history: tuple[Turn, ...] = ()) -> list[int]:
        """Ids up to where the answer begins."""
        ids = [token for turn in history for token in self._turn(turn)[0]]
        return [*ids, self.user, *self.text(question), self.assistant]

    def query(self, question: str) -> np.ndarray:
        """Ids [q] of a question by itself, as QueCC embeds it; of the word "image" where it is empty."""
        return np.array(self.text(question.strip()) or self.text("image"), np.int32)

    def decode(self, ids: list[int]) -> str:
        """Text of an answer, up to its `<|end|>`."""
        cut = ids.index(self.end) if self.end in ids else len(ids)
        return str(self.tokenizer.decode(ids[:cut], skip_special_tokens=True)).strip()

    def conversation(self, turns: tuple[Turn, ...]) -> tuple[list[int], list[bool]]:
        """Ids of whole turns and which of them are supervised."""
        ids: list[int] = []
        supervised: list[bool] = []
        for turn in turns:
            turn_ids, answer_length = self._turn(turn)
            ids += turn_ids
            supervised += [False] * (len(turn_ids) - answer_length) + [True] * answer_length
        return ids, supervised

    def _turn(self, turn: Turn) -> tuple[list[int], int]:
        answer = [*self.text(turn.answer), self.end]
        return [self.user, *self.text(turn.question), self.assistant, *answer], len(answer)


def fit_context(record: Record, template: Template, max_text_tokens: int) -> Record | None:
    """Drop the last turns until the text fits; None when not even the first turn does.

    An image or a turn is never cut in two, so every kept sample has a supervised token.
    """
    total, kept = 0, 0
    for turn in record.turns:
        total += len(template.conversation((turn,))[0])
        if total > max_text_tokens:
            break
        kept += 1
    if kept == 0:
        return None
    return record if kept == len(record.turns) else replace(record, turns=record.turns[:kept])


@dataclass(frozen=True)
class Row:
    """One training sample before padding: tokens with image slots, and what is to be predicted where."""

    tokens: np.ndarray  # [t] int32
    image_slots: np.ndarray  # [t] bool
    target_positions: np.ndarray  # [k] int32, where to predict
    target_ids: np.ndarray  # [k] int32, what to predict there
    query: np.ndarray  # [q] int32, the first question, as methods read it that embed the question


def training_row(record: Record, template: Template, visual_tokens: int) -> Row:
    """Tokens and targets of a conversation; records without an image get no slots."""
    ids, supervised = template.conversation(record.turns)
    slots = visual_tokens if record.image is not None else 0
    tokens, image_slots = with_image(ids, template, slots)
    where = np.flatnonzero(np.insert(np.array(supervised), IMAGE_OFFSET, np.zeros(slots, bool)))
    query = template.query(record.turns[0].question)
    return Row(tokens, image_slots, (where - 1).astype(np.int32), tokens[where], query)


def with_image(ids: list[int], template: Template, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Insert image slots behind the first token: ids [t] to (tokens [t + slots], image_slots)."""
    tokens = np.array([*ids[:IMAGE_OFFSET], *[template.image] * slots, *ids[IMAGE_OFFSET:]], np.int32)
    image_slots = np.zeros(len(tokens), bool)
    image_slots[IMAGE_OFFSET : IMAGE_OFFSET + slots] = True
    return tokens, image_slots
