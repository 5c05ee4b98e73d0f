"""Ids and label masks of every template against LLaVA's, transformers' and the answers themselves.

LLaVA's are a reconstruction of its preprocessing; all tokenizers are made on the spot.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.data.small_tokenizers import PREFIXES, STRUCTURE, byte_level, sentencepiece_like, through
from vlmscale.data.conversation import IMAGE_MARK, MODES, Encoded, Template, make_template
from vlmscale.data.records import PLACEHOLDER, Turn
from vlmscale.data.templates import CHATML_SYSTEM, LAYOUTS, TEMPLATES, V1_SYSTEM

transformers = pytest.importorskip("transformers")

CLEAN: list[tuple[Turn, ...]] = [
    (Turn("<image>\nWhat is this?", "It's a red circle."),),
    (Turn("What is this?\n<image>", "A llama"), Turn("Why?", "It looks left."), Turn("Is it 12?", "No, 345")),
    (Turn("Who are you?", "An assistant."), Turn("Two  spaces", "and\na new line\n\nand another")),
    (Turn("<image>\nIs it so?\nAnswer the question using a single word or phrase.", "Yes"),),
    (Turn("<image>", "(a) 漢字, (b) ünïcödé"), Turn("And\nthen?", "'tis so")),
    (Turn("Write <b>bold</b> in HTML", "<b>bold</b>"), Turn("in TeX", r"\textbf{bold}")),
    (Turn("<image>\nList them", "- one\n- two\n\n1. three"), Turn("Thanks!", "🙂 You're welcome 🦙")),
    (Turn("漢字", "漢字"), Turn("123", "456"), Turn("?", "!"), Turn(".", "...")),
    (Turn("<image>\nDescribe it at length.", "The llama looks left, and sees a US user. " * 30 + "Two"),),
    (Turn("a", "b"),) * 9,
    (Turn("First a text", "then"), Turn("<image>\na picture", "in the second turn")),
    (Turn("<image>\nWhat does the sign say?", "USER: ASSISTANT US"), Turn("Read", "assistant user 1 2 3")),
]
SEVERAL: list[tuple[Turn, ...]] = [
    (Turn("<image>\n<image>\nCompare.", "They are equal."), Turn("And <image> ?", "This one is not.")),
    (Turn("Between <image> and <image>, which?", "the first"), Turn("<image><image>", "none")),
]


# LLaVA v1.5


def slow(prefix: str) -> Callable[[str], list[int]]:
    """A call of transformers 4.37's slow LlamaTokenizer: BOS, and "▁" in front as `legacy` has it."""
    tokenizer = sentencepiece_like(prefix="never")

    def call(text: str) -> list[int]:
        ids, behind = [1], False
        for chunk in re.split("(</s>)", text):
            if chunk == "</s>":
                ids, behind = [*ids, 2], True
            elif chunk:
                front = "" if behind and prefix == "first" else "▁"
                ids += tokenizer.encode(front + chunk, add_special_tokens=False).ids
        return ids

    return call


def with_images(call: Callable[[str], list[int]], text: str) -> list[int]:
    """tokenizer_image_token: chunks by themselves, one BOS, a mark between them."""
    first, *others = [call(chunk) for chunk in text.split(PLACEHOLDER)]
    return [*first, *(token for chunk in others for token in (IMAGE_MARK, *chunk[1:]))]


def llava_v1(turns: tuple[Turn, ...], prefix: str) -> tuple[list[int], list[bool]]:
    """preprocess_multimodal and preprocess_v1 with has_image, lengths counted as they count them."""
    call = slow(prefix)
    text = V1_SYSTEM + " "
    for turn in turns:
        question = turn.question
        if PLACEHOLDER in question:
            question = (PLACEHOLDER + "\n" + question.replace(PLACEHOLDER, "").strip()).strip()
        text += f"USER: {question} ASSISTANT: {turn.answer}</s>"
    ids = with_images(call, text)
    supervised = [True] * len(ids)
    supervised[0], place = False, 1
    for number, part in enumerate(text.split("</s>")):
        if not part:
            break
        question, _ = part.split(" ASSISTANT: ")
        length = len(with_images(call, part))
        instruction = len(with_images(call, question + " ASSISTANT: ")) - 2
        if number and prefix == "first":  # not tokenizer.legacy
            length, instruction = length - 1, instruction - 1
        supervised[place : place + instruction] = [False] * instruction
        place += length
    assert place == len(ids), "LLaVA would call this a tokenization mismatch"
    return ids, supervised


def check(encoded: Encoded, ids: list[int], supervised: list[bool]) -> None:
    assert encoded.tokens.tolist() == ids
    assert encoded.supervised.tolist() == supervised
    assert (encoded.tokens.dtype, encoded.supervised.dtype) == (np.int32, bool)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_v1_in_llava_mode_is_llavas(prefix: str) -> None:
    template = make_template("v1", sentencepiece_like(prefix=prefix), "llava")
    for turns in CLEAN:
        check(template.encode(turns), *llava_v1(turns, prefix))


def test_the_stray_prefix_behind_a_picture_is_there() -> None:
    tokenizer = sentencepiece_like()
    behind: dict[str, list[str]] = {}
    for mode in MODES:
        ids = make_template("v1", tokenizer, mode).encode(CLEAN[0]).tokens.tolist()
        place = ids.index(IMAGE_MARK)
        behind[mode] = [tokenizer.id_to_token(number) for number in ids[place + 1 : place + 4]]
    assert behind == {"llava": ["▁", "<0x0A>", "What"], "inline": ["<0x0A>", "What", "▁is"]}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("caption", ["a llama on a mat", "漢字, 12", "'quoted'\nand more"])
def test_plain_in_llava_mode_is_llavas(caption: str, prefix: str) -> None:
    """preprocess_plain: BOS and the picture are not supervised, the caption and its newline are."""
    template = make_template("plain", sentencepiece_like(prefix=prefix), "llava")
    ids = with_images(slow(prefix), f"{PLACEHOLDER}{caption}\n")
    for question in ("<image>\nWrite a caption.", "Write a caption.\n<image>"):
        check(template.encode((Turn(question, caption),)), ids, [False] * 2 + [True] * (len(ids) - 2))
    assert template.prompt("<image>\nWrite a caption.") == [1, IMAGE_MARK]


def test_plain_without_bos_or_picture() -> None:
    """No question of any turn is left, and a tokenizer without BOS gets none."""
    tokenizer = byte_level()
    template = make_template("plain", tokenizer)
    encoded = template.encode((Turn("Say it", "one."), Turn("<image>\n<image>", "two")))
    marks = np.flatnonzero(encoded.tokens == IMAGE_MARK).tolist()
    assert np.flatnonzero(~encoded.supervised).tolist() == marks
    assert len(marks) == 2
    assert tokenizer.decode(encoded.tokens[: marks[0]].tolist()) == "one.\n"
    assert tokenizer.decode(encoded.tokens[marks[1] + 1 :].tolist()) == "two\n"


# transformers


def recognised(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of transformers for a whole text with special tokens in it; the image token becomes the mark."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    image = tokenizer.token_to_id(PLACEHOLDER)
    return [IMAGE_MARK if number == image else number for number in theirs(text)["input_ids"]]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_inline_v1_and_plain_are_the_whole_text_in_transformers(prefix: str, kind: str) -> None:
    tokenizer = sentencepiece_like(kind, prefix)
    v1, plain = make_template("v1", tokenizer), make_template("plain", tokenizer)
    for turns in CLEAN + SEVERAL:
        text = "".join(f"USER: {turn.question} ASSISTANT: {turn.answer}</s>" for turn in turns)
        assert v1.encode(turns).tokens.tolist() == recognised(tokenizer, f"{V1_SYSTEM} {text}")
        answers = recognised(tokenizer, f"{PLACEHOLDER}{turns[0].answer}\n")
        assert plain.encode((Turn(PLACEHOLDER, turns[0].answer),)).tokens.tolist() == answers


SAID = "{% generation %}{{ m['content'] }}END{% endgeneration %}"
CHATML = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>system\nSYSTEM<|im_end|>\n{% endif %}"
    "{% if m['role'] == 'assistant' %}<|im_start|>assistant\nSAID{{ '\n' }}"
    "{% else %}<|im_start|>user\n{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ '\n\n' }}"
    "{% if m['role'] == 'assistant' %}SAID{% else %}{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
)
CHATS = {
    "chatml": CHATML.replace("SYSTEM", CHATML_SYSTEM).replace("SAID", SAID).replace("END", "<|im_end|>"),
    "llama3": LLAMA3.replace("SAID", SAID).replace("END", "<|eot_id|>"),
}


@pytest.mark.parametrize("kind", ["byte-level", "bpe"])
@pytest.mark.parametrize("name", CHATS)
def test_ids_and_assistant_mask_of_a_chat_template(name: str, kind: str) -> None:
    tokenizer = byte_level() if kind == "byte-level" else sentencepiece_like(kind)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATS[name])
    image = tokenizer.token_to_id(PLACEHOLDER)
    template = make_template(name, tokenizer)
    for turns in CLEAN + SEVERAL:
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        chat = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = [IMAGE_MARK if number == image else number for number in chat["input_ids"]]
        check(template.encode(turns), ids, [value == 1 for value in chat["assistant_masks"]])
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        ids = [IMAGE_MARK if number == image else number for number in prompt]
        assert template.prompt(turns[-1].question, turns[:-1]) == ids


# Hostile text

PIECES = [
    *STRUCTURE,
    *("<unk>", "<pad>", "<IMAGE>", "< image>", "<image", "image>", "<Image>", "<im"),
    *("ASSISTANT:", " ASSISTANT: ", "USER:", "USER: ", "Human:", "###", "system\n", "assistant\n", "user"),
    *("\n", "\n\n", "\r\n", "\t", " ", "  ", "   ", "\x00", "\x1c", "\x7f", "\xa0", "\u2028", "\u3000"),
    *("\u200b", "\ufeff", "\u200d", "\ufe0f", "\u202e", "\u0301", "e\u0301", "\u0338=", "x\u0323\u0307", "▁"),
    *("🙂", "👩‍👩‍👧‍👦", "🇩🇪", "漢字", "ﬁ", "한국어", "각", "שלום", "नमस्ते", "ß", "İ", "Å", "Ω", "𝔘", "é"),
    *(
        "a",
        "It's",
        "n't",
        "12345",
        ".",
        "...",
        "?!",
        "'",
        '"',
        "\\n",
        "</s",
        "/s>",
        "<|",
        "|>",
        "<0x0A>",
        "{{ x }}",
    ),
    *("the llama", "What is this?", "US", "- one\n- two", "http://a.b/c?d=e&f", "```py\n\tx = 1\n```"),
]


def hostile_text(rng: random.Random, most: int) -> str:
    """Stripped, as texts of records are, and not empty."""
    pieces = []
    for _ in range(rng.randint(1, most)):
        if rng.random() < 0.1:
            code = rng.randrange(0x110000 - 2048)
            pieces.append(chr(code if code < 0xD800 else code + 2048))
        pieces.append(rng.choice(PIECES))
    return "".join(pieces).strip() or "x"


def hostile(count: int) -> list[tuple[Turn, ...]]:
    """Conversations with a picture in each turn, and sometimes two; an answer may say "<image>"."""
    rng = random.Random(0)
    conversations = []
    for number in range(count):
        turns = []
        for _ in range(rng.randint(1, 3)):
            parts = [hostile_text(rng, 5).replace(PLACEHOLDER, "") for _ in range(rng.choice((2, 2, 3)))]
            answer = hostile_text(rng, 8) + rng.choice(("", "", "", " <image> too"))
            turns.append(Turn(PLACEHOLDER.join(parts).strip(), answer))
        if number % 200 == 0:  # 10,000 characters
            turns.append(Turn(PLACEHOLDER, rng.choice(("x", "漢字 ", "a b\n", "</s> ")).strip() * 10000))
            turns[-1] = Turn(PLACEHOLDER, turns[-1].answer[:10000].strip())
        conversations.append(tuple(turns))
    return conversations


def supervised_runs(encoded: Encoded) -> list[np.ndarray]:
    """The supervised tokens, turn by turn."""
    edges = np.flatnonzero(np.diff(encoded.supervised.astype(np.int8), prepend=0, append=0))
    return [encoded.tokens[start:stop] for start, stop in edges.reshape(-1, 2)]


def check_answers(template: Template, kind: str, turns: tuple[Turn, ...]) -> None:
    """What is supervised is each answer and its end; the prompt of a turn ends where it begins."""
    layout = LAYOUTS[template.name]
    encoded = template.encode(turns)
    runs = supervised_runs(encoded)
    assert len(runs) == len(turns)
    for run, turn in zip(runs, turns, strict=True):
        text = template.tokenizer.decode(run.tolist(), skip_special_tokens=False)
        end = through(kind, layout.lead + turn.answer + layout.end)
        assert text in (end, " " * (template.mode == "llava") + end)
    for token in layout.special:  # none of them came out of a text
        number = template.tokenizer.token_to_id(token)
        layouts = (layout.question, layout.answer, layout.end, layout.after)
        expected = len(turns) * sum(text.count(token) for text in layouts)
        expected += (layout.bos or "").count(token) + layout.start.count(token)
        assert (encoded.tokens == number).sum() == expected
    pictures = sum(turn.question.count(PLACEHOLDER) for turn in turns)
    assert (encoded.tokens == IMAGE_MARK).sum() == pictures
    prompt = template.prompt(turns[-1].question, turns[:-1])
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert np.flatnonzero(encoded.supervised)[-len(runs[-1])] == len(prompt)


@pytest.fixture(scope="module")
def conversations() -> list[tuple[Turn, ...]]:
    return hostile(2000)


@pytest.mark.parametrize("kind", ["byte-level", "bpe"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_is_every_answer_and_its_end(name: str, kind: str, conversations: Any) -> None:
    tokenizer = byte_level() if kind == "byte-level" else sentencepiece_like()
    modes = [make_template(name, tokenizer, mode) for mode in MODES]
    for number, turns in enumerate(conversations):
        check_answers(modes[number % 2], kind, turns)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_unigram_finds_no_structure_token_in_a_text(name: str, conversations: Any) -> None:
    """It looks for the pieces of its vocabulary, "</s>" and "<0x0A>" among them, in whatever it is given.

    The bytes stay, here as in transformers, because they are found by their names.
    """
    modes = [make_template(name, sentencepiece_like("unigram", "always"), mode) for mode in MODES]
    checked = 0
    for number, turns in enumerate(conversations[:300]):
        if not any("<0x0A>" in turn.question + turn.answer for turn in turns):
            check_answers(modes[number % 2], "unigram", turns)
            checked += 1
    assert checked > 100


def test_a_token_across_the_answers_first_character_is_not_used() -> None:
    """Nothing but pre-tokenizers keeps a vocabulary from having such tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["USER: a ASSISTANT: Yes", "assistant\nYes"] * 20, trainer)
    tokenizer.add_special_tokens(STRUCTURE)
    turns = (Turn("a", "Yes"), Turn("a", "Yes so"))
    assert ": Yes" in tokenizer.decode(tokenizer.encode(" ASSISTANT: Yes").ids[-1:])
    for name in ("v1", "chatml"):
        check_answers(make_template(name, tokenizer), "byte-level", turns)
