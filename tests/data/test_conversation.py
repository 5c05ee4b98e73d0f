"""Template, label mask, image slots and context limit, on a small tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from vlmscale.data.conversation import Template, fit_context, training_row, with_image
from vlmscale.data.records import Record, Turn
from vlmscale.data.tokenizer import ASSISTANT, END, IMAGE, PAD, SPECIAL, USER, load_tokenizer, train_tokenizer

TURNS = (
    Turn("How many circles?", "3"),
    Turn("Number?", "4096"),
    Turn("Wie heißt das? 🙂", "Ein Käse <|end|> <|user|>"),
    Turn("", "said without a question"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text for turn in TURNS * 5 for text in (turn.question, turn.answer)], 330)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> Template:
    return Template(tokenizer)


def record(*turns: Turn, image: bool = True) -> Record:
    return Record("r", Path("picture.png") if image else None, turns or TURNS)


def test_supervised_is_every_answer_and_its_end(template: Template) -> None:
    ids, supervised = template.conversation(TURNS)
    answers = [token for token, counts in zip(ids, supervised, strict=True) if counts]
    parts, start = [], 0
    for place, token in enumerate(answers):
        if token == template.end:
            parts.append(template.tokenizer.decode(answers[start:place]))
            start = place + 1
    assert parts == [turn.answer for turn in TURNS]
    assert start == len(answers)
    for token, counts in zip(ids, supervised, strict=True):
        assert not (counts and token in (template.user, template.assistant, template.pad, template.image))


def test_a_conversation_is_its_prompts_and_answers(template: Template) -> None:
    for number, turn in enumerate(TURNS):
        prompt = template.prompt(turn.question, TURNS[:number])
        so_far = template.conversation(TURNS[: number + 1])[0]
        answer = [*template.text(turn.answer), template.end]
        assert so_far == prompt + answer
        assert prompt.count(template.user) == prompt.count(template.assistant) == number + 1
        assert template.decode([*answer, 7, 8, 9]) == turn.answer
        assert template.decode(template.text(turn.answer)) == turn.answer  # cut off before its end


@pytest.mark.parametrize("special", SPECIAL)
def test_special_strings_in_a_text_are_plain_text(special: str, template: Template, tmp_path: Path) -> None:
    text = f"a{special}b {special}"
    ids = template.text(text)
    assert not {getattr(template, name) for name in ("pad", "image", "user", "assistant", "end")} & set(ids)
    assert template.tokenizer.decode(ids) == text
    # The same holds for a tokenizer that was written and read back.
    template.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text).ids == ids


def test_special_tokens_have_ids_of_their_own_and_digits_stay_single(template: Template) -> None:
    ids = [template.tokenizer.token_to_id(token) for token in (PAD, IMAGE, USER, ASSISTANT, END)]
    assert ids == [template.pad, template.image, template.user, template.assistant, template.end]
    assert len(set(ids)) == 5
    assert len(template.text("40960")) == 5


@pytest.mark.parametrize("slots", [0, 1, 9])
def test_image_slots_stand_behind_the_first_token(slots: int, template: Template) -> None:
    ids = template.prompt("Number?")
    tokens, image_slots = with_image(ids, template, slots)
    assert list(np.flatnonzero(image_slots)) == list(range(1, 1 + slots))
    assert set(tokens[image_slots]) <= {template.image}
    assert list(tokens[~image_slots]) == ids
    assert tokens.dtype == np.int32


@pytest.mark.parametrize("slots", [0, 4])
@pytest.mark.parametrize("image", [True, False])
def test_targets_are_the_next_token_at_the_place_before_it(
    slots: int, image: bool, template: Template
) -> None:
    row = training_row(record(image=image), template, slots)
    ids, supervised = template.conversation(TURNS)
    expected = slots if image else 0
    assert row.image_slots.sum() == (row.tokens == template.image).sum() == expected
    assert len(row.tokens) == len(ids) + expected
    assert list(row.target_ids) == [t for t, counts in zip(ids, supervised, strict=True) if counts]
    for place, target in zip(row.target_positions, row.target_ids, strict=True):
        assert row.tokens[place + 1] == target
    first = row.target_positions[0]
    assert row.tokens[first] == template.assistant  # the first answer token is predicted from here
    assert (np.diff(row.target_positions) > 0).all()
    assert row.query.tolist() == template.text(TURNS[0].question)  # no template and no answer
    silent = training_row(record(*TURNS[3:]), template, slots)
    assert silent.query.tolist() == template.text("image")


def test_context_is_cut_at_turns(template: Template) -> None:
    lengths = np.cumsum([len(template.conversation((turn,))[0]) for turn in TURNS])
    whole = record()
    assert fit_context(whole, template, int(lengths[-1])) is whole
    for kept, total in enumerate(lengths, start=1):
        for room in (total, total + 1):
            fitted = fit_context(whole, template, int(room))
            assert fitted is not None
            assert fitted.turns == TURNS[:kept]
            assert len(template.conversation(fitted.turns)[0]) <= room
    assert fit_context(whole, template, int(lengths[0]) - 1) is None
    assert (fitted.id, fitted.image) == (whole.id, whole.image)


def test_a_short_turn_behind_a_long_one_is_not_kept(template: Template) -> None:
    first, long, last = Turn("a", "b"), Turn("x " * 50, "y"), Turn("c", "d")
    fitted = fit_context(record(first, long, last), template, 40)
    assert fitted is not None
    assert fitted.turns == (first,)
