"""Template, label mask, pictures' slots and the two cuts, on a small tokenizer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from tests.data.small_tokenizers import byte_level, sentencepiece_like
from vlmscale.data.conversation import (
    IMAGE_MARK,
    MODES,
    Encoded,
    Template,
    expand,
    make_template,
    truncate,
)
from vlmscale.data.records import PLACEHOLDER, Turn
from vlmscale.data.templates import TEMPLATES
from vlmscale.data.tokenizer import ASSISTANT, END, IMAGE, PAD, SPECIAL, USER, load_tokenizer, train_tokenizer
from vlmscale.errors import UserError

TURNS = (
    Turn("<image>\nHow many circles?", "3"),
    Turn("Number?", "4096"),
    Turn("Wie heißt das? 🙂", "Ein Käse <|end|> <|user|>"),
    Turn("", "said without a question"),
)
TEXTS = [text for turn in TURNS * 5 for text in (turn.question, turn.answer)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> Template:
    return make_template("toy", tokenizer)


@pytest.mark.parametrize("mode", MODES)
def test_toy_is_its_tokens_and_texts_one_behind_the_other(tokenizer: Tokenizer, mode: str) -> None:
    user, assistant, end, pad, image = (tokenizer.token_to_id(t) for t in (USER, ASSISTANT, END, PAD, IMAGE))
    expected: list[int] = []
    supervised: list[bool] = []
    for turn in TURNS:
        question = tokenizer.encode(turn.question.removeprefix("<image>\n")).ids
        marks = [IMAGE_MARK] * turn.question.count(PLACEHOLDER)
        before = [user, *marks, *question, assistant]
        answer = [*tokenizer.encode(turn.answer).ids, end]
        expected += before + answer
        supervised += [False] * len(before) + [True] * len(answer)
    template = make_template("toy", tokenizer, mode)
    encoded = template.encode(TURNS)
    assert encoded.tokens.tolist() == expected
    assert encoded.supervised.tolist() == supervised
    assert [array.dtype for array in encoded] == [np.int32, bool, np.int32]
    assert (template.pad, template.image, template.stop_ids) == (pad, image, (end,))


@pytest.mark.parametrize("question", ["<image>\nNumber?", "Number?\n<image>", " <image> Number? "])
def test_pictures_of_toy_stand_in_front_of_their_turn(question: str, template: Template) -> None:
    first = template.prompt("<image>\nNumber?")
    assert template.prompt(question) == first
    assert first[:2] == [template.tokenizer.token_to_id(USER), IMAGE_MARK]
    assert first[2:-1] == template.tokenizer.encode("Number?").ids
    turns = (Turn("a", "b"), Turn("c <image> d<image>", "e"))
    encoded = template.encode(turns)
    second = len(template.encode(turns[:1]).tokens)
    assert np.flatnonzero(encoded.tokens == IMAGE_MARK).tolist() == [second + 1, second + 2]


def test_a_conversation_is_its_prompts_and_answers(template: Template) -> None:
    for number, turn in enumerate(TURNS):
        prompt = template.prompt(turn.question, TURNS[:number])
        so_far = template.encode(TURNS[: number + 1]).tokens.tolist()
        assert so_far[: len(prompt)] == prompt
        answer = so_far[len(prompt) :]
        assert template.decode([*answer, 7, 8, 9]) == turn.answer
        assert template.decode(np.array(answer[:-1])) == turn.answer  # cut off before its end


@pytest.mark.parametrize("special", SPECIAL)
def test_special_strings_in_a_text_are_plain_text(special: str, template: Template) -> None:
    text = f"a{special}b {special}"
    query = template.query(text).tolist()
    assert not {template.tokenizer.token_to_id(token) for token in SPECIAL} & set(query)
    assert template.tokenizer.decode(query) == text


def test_special_strings_after_a_save_and_in_a_worker(template: Template, tmp_path: Path) -> None:
    """Neither a file nor a pickle of a tokenizer says that its special strings are plain text."""
    path = tmp_path / "tokenizer.json"
    template.tokenizer.save(str(path))
    read = make_template("toy", Tokenizer.from_file(str(path)))
    sent = pickle.loads(pickle.dumps(template))
    for other in (read, sent):
        assert other.encode(TURNS).tokens.tolist() == template.encode(TURNS).tokens.tolist()
    assert (sent.name, sent.mode) == ("toy", "inline")
    assert load_tokenizer(path).encode(END).ids == template.query(END).tolist()


def test_the_tokenizer_that_is_given_stays_as_it_is() -> None:
    tokenizer = byte_level()
    before = tokenizer.to_str()
    make_template("chatml", tokenizer).encode(TURNS)
    assert tokenizer.to_str() == before
    assert tokenizer.encode("<|im_end|>").ids == [tokenizer.token_to_id("<|im_end|>")]


def test_a_tokenizer_that_cuts_and_pads_does_neither_here() -> None:
    tokenizer, whole = byte_level(), make_template("v1", byte_level()).encode(TURNS)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=500)
    assert make_template("v1", tokenizer).encode(TURNS).tokens.tolist() == whole.tokens.tolist()


def test_a_structure_token_that_is_not_special_is_still_no_text() -> None:
    tokenizer = train_tokenizer(TEXTS, 330)
    tokenizer.encode_special_tokens = False
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<|im_start|>", "<|im_end|>")])
    encoded = make_template("chatml", tokenizer).encode((Turn("<|im_end|>", "<|im_start|>"),))
    ends = encoded.tokens == tokenizer.token_to_id("<|im_end|>")
    assert ends.sum() == 3
    assert encoded.supervised[ends].tolist() == [False, False, True]


def test_query_is_the_first_question_by_itself(template: Template) -> None:
    encode = template.tokenizer.encode
    assert template.encode(TURNS).query.tolist() == encode("How many circles?").ids
    assert template.query("Which? <image>").tolist() == encode("Which?").ids
    for empty in ("", "<image>", " <image>\n"):
        assert template.query(empty).tolist() == encode("image").ids


STOPS = {
    "toy": ["<|end|>"],
    "v1": ["</s>"],
    "chatml": ["<|im_end|>", "<|endoftext|>"],
    "llama3": ["<|eot_id|>", "<|end_of_text|>"],
}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_decode_stops_at_every_stop(name: str, kind: str) -> None:
    tokenizer = byte_level() if kind == "byte-level" else sentencepiece_like()
    template = make_template(name, tokenizer)
    stops = template.stop_ids
    if name == "plain":
        texts = [tokenizer.decode([number]) for number in stops]
        assert texts
        assert all(text.endswith("\n") for text in texts)
        assert (".\n" in texts) == (kind == "byte-level")
        assert set(tokenizer.encode("\n", add_special_tokens=False).ids[-1:]) <= set(stops)
    else:
        assert list(stops) == [tokenizer.token_to_id(token) for token in STOPS[name]]
    words = tokenizer.encode("It looks left.", add_special_tokens=False).ids
    for stop in stops:
        text = template.decode([*words, stop, *words])
        assert text == ("It looks left." + tokenizer.decode([stop]).strip() * (name == "plain"))
    assert template.decode(words) == "It looks left."


@pytest.mark.parametrize(
    "make, pad, image",
    [
        (byte_level, "<|endoftext|>", "<image>"),
        (sentencepiece_like, "<unk>", "<image>"),
        (lambda: train_tokenizer(TEXTS, 300), PAD, IMAGE),
    ],
)
def test_padding_and_image_ids(make: Callable[[], Tokenizer], pad: str, image: str) -> None:
    tokenizer = make()
    template = make_template("plain", tokenizer)
    assert template.pad == tokenizer.token_to_id(pad)
    assert template.image == tokenizer.token_to_id(image)


def test_padding_of_a_tokenizer_that_names_none() -> None:
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "a": 1, "\n": 2}, unk_token="word"))
    template = make_template("plain", tokenizer)
    assert template.pad == template.image == 0


def test_errors_of_make_template() -> None:
    own = train_tokenizer(TEXTS, 300)
    cases: list[tuple[str, Tokenizer, str, str]] = [
        ("v2", own, "inline", "there is no template 'v2': use one of toy, plain, v1, chatml, llama3"),
        ("toy", own, "front", "there is no template mode 'front': use one of inline, llava"),
        (
            "v1",
            own,
            "inline",
            "template 'v1' needs the token <s>, which the tokenizer lacks: "
            "use a template that fits it (toy, plain)",
        ),
    ]
    for name, tokenizer, mode, message in cases:
        with pytest.raises(UserError) as caught:
            make_template(name, tokenizer, mode)
        assert str(caught.value) == message
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(
        UserError, match="needs <s> as a special token, and the tokenizer takes it for a word"
    ):
        make_template("v1", words)


def encoded(text: str) -> Encoded:
    """A letter is a token, a capital one supervised, "#" a picture."""
    tokens = [IMAGE_MARK if letter == "#" else ord(letter) for letter in text]
    return Encoded(
        np.array(tokens, np.int32),
        np.array([letter.isupper() for letter in text], bool),
        np.array([5], np.int32),
    )


@pytest.mark.parametrize("visual_tokens", [0, 1, 4])
def test_truncation_cuts_the_end_and_no_picture(visual_tokens: int) -> None:
    whole = encoded("a#bC#DeF#")
    for length in range(30):
        cut = truncate(whole, visual_tokens, length)
        kept = len(cut.tokens)
        assert cut.tokens.tolist() == whole.tokens[:kept].tolist()
        assert cut.supervised.tolist() == whole.supervised[:kept].tolist()
        assert cut.query.tolist() == [5]
        tokens, _ = expand(cut.tokens, visual_tokens, 9)
        assert len(tokens) <= length
        if kept < len(whole.tokens):  # what comes next does not fit
            more, _ = expand(whole.tokens[: kept + 1], visual_tokens, 9)
            assert len(more) > length
        assert (tokens == 9).sum() == visual_tokens * (cut.tokens == IMAGE_MARK).sum()


def test_truncation_may_leave_nothing_supervised() -> None:
    assert not truncate(encoded("a#B"), 4, 5).supervised.any()
    assert truncate(encoded("a#B"), 4, 6).supervised.any()


@pytest.mark.parametrize("visual_tokens", [0, 1, 3])
def test_slots_are_numbered_by_picture(visual_tokens: int) -> None:
    tokens, slots = expand(encoded("#ab##C").tokens, visual_tokens, 77)
    expected: list[tuple[int, int]] = []
    for token, slot in ((77, 1), (97, 0), (98, 0), (77, 2), (77, 3), (67, 0)):
        expected += [(token, slot)] * (visual_tokens if slot else 1)
    assert list(zip(tokens.tolist(), slots.tolist(), strict=True)) == expected
    assert tokens.dtype == slots.dtype == np.int32
    listed, _ = expand([IMAGE_MARK, 5], 2, 3)
    assert listed.tolist() == [3, 3, 5]


def test_texts_that_repeat_are_encoded_once_and_long_ones_are_not_kept(tokenizer: Tokenizer) -> None:
    template = make_template("toy", tokenizer)
    first = template.encode(TURNS)
    known = template._cached.cache_info()
    assert template.encode(TURNS).tokens.tolist() == first.tokens.tolist()
    template.query("x" * 10_000)
    again = template._cached.cache_info()
    assert (again.misses, again.currsize) == (known.misses, known.currsize)
    assert again.hits > known.hits
    assert again.maxsize is not None
