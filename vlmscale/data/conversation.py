"""Conversations to tokens and label masks, as pure functions of the turns.

A template (`templates.LAYOUTS`) lays turns out as text between structure tokens. The text between two of
them, or between one and a picture, is encoded in one call, and where the answer begins in it is read from the
character offsets of that encoding. Pictures are marks here; `expand` makes them slots.

Two modes say what the tokenizer is given:

- "inline": a picture stands where its placeholder does, and ids are those of transformers' own tokenizer for
  the whole text with its special tokens recognised.
- "llava": LLaVA v1.5's ids and masks (train/train.py: preprocess_multimodal, preprocess_v1,
  preprocess_plain; mm_utils.py: tokenizer_image_token). "<image>" and a newline move to the front of their
  turn, and text behind a picture is encoded as a text of its own, so that a SentencePiece-style tokenizer
  puts its prefix "▁" there too. LLaVA keeps one placeholder a turn; here each stays, a line each. Equal to
  LLaVA's on clean text: where a text holds "</s>" or "ASSISTANT: ", LLaVA takes it for structure, and may
  drop all labels of the sample. LLaVA v1.5 was trained with Vicuna's tokenizer as transformers reads it with
  legacy=False (no prefix behind "</s>"); a tokenizer.json that says otherwise gives the ids of legacy=True.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from vlmscale.data.records import PLACEHOLDER, Turn
from vlmscale.data.templates import LAYOUTS, TEMPLATES, Layout
from vlmscale.data.tokenizer import image_id, leading_ids, line_ends, padding_id, special_id, text_tokenizers
from vlmscale.errors import UserError

IMAGE_MARK = -1  # stands in tokens for one picture; no tokenizer has the id
Mode = Literal["inline", "llava"]
MODES: tuple[Mode, ...] = ("inline", "llava")
_CACHED, _CACHED_CHARACTERS = 2048, 400  # texts kept, and how long each may be: at most some 10 MB

Part = str | int  # text, or the id of a token


class Encoded(NamedTuple):
    """A conversation in tokens."""

    tokens: np.ndarray  # [t] int32, IMAGE_MARK once where each picture stands
    supervised: np.ndarray  # [t] bool: tokens that are to be predicted
    query: np.ndarray  # [q] int32: the first question by itself, as methods read it that embed the question


class Template:
    """Encodes turns with one tokenizer; made by `make_template`.

    Attributes:
      name: of `TEMPLATES`.
      mode: of `MODES`.
      tokenizer: as it was given; it is not changed.
      pad: id for padding; image: id for image slots. No model's result depends on either.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, mode: Mode) -> None:
        self.name, self.tokenizer, self.mode = name, tokenizer, mode
        self.pad, self.image = padding_id(tokenizer), image_id(tokenizer)
        self._layout = layout = LAYOUTS[name]
        ids = {token: special_id(tokenizer, token) for token in layout.special}
        self._bos = leading_ids(tokenizer) if layout.bos is None else _parts(layout.bos, ids)
        self._start, self._question, self._answer, self._after = (
            _parts(text, ids) for text in (layout.start, layout.question, layout.answer, layout.after)
        )
        self._end = _parts(layout.end, ids)
        self._at_start, self._behind = text_tokenizers(tokenizer, (*layout.special, *layout.stops))
        words = tokenizer.pre_tokenizer
        self._takes_space = isinstance(words, Metaspace) and words.prepend_scheme != "never"
        self._cached = functools.lru_cache(_CACHED)(self._encode)

    def __reduce__(self) -> tuple[Any, ...]:
        return make_template, (self.name, self.tokenizer, self.mode)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Any of these ends an answer: the end mark first; for plain each token whose text ends a line."""
        if self.name == "plain":
            return line_ends(self.tokenizer)
        names = (self._layout.end, *self._layout.stops)
        ids = [self.tokenizer.token_to_id(name) for name in names]
        return tuple(number for number in ids if number is not None)

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """Tokens of whole turns; supervised are each answer and its end mark."""
        out = self._turns(turns)
        out.flush()
        tokens, supervised = np.array(out.ids, np.int32), np.array(out.supervised, bool)
        return Encoded(tokens, supervised, self.query(turns[0].question))

    def prompt(self, question: str, history: Sequence[Turn] = ()) -> list[int]:
        """Ids with IMAGE_MARKs, up to where the answer begins.

        `encode` of the same turns and an answer begins with these ids, unless the tokenizer splits the
        prompt's last words by what follows them. Those of Llama, Vicuna and Qwen do not.
        """
        out = self._turns(history)
        out.put(self._question)
        out.put(self._shown(question))
        out.put(self._answer)
        out.flush()
        return out.ids

    def query(self, question: str) -> np.ndarray:
        """Ids [q] of a question by itself, as QueCC embeds it; of the word "image" where it has no text."""
        ids = self.text(question.replace(PLACEHOLDER, "").strip(), None, True)[0]
        return np.array(ids or self.text("image", None, True)[0], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer, up to the first of the stop ids."""
        answer = [int(number) for number in ids]
        stops = set(self.stop_ids)
        cut = next((place for place, number in enumerate(answer) if number in stops), len(answer))
        if self.name == "plain":  # a token that ends the line may hold the caption's last character as well
            cut += 1
        return str(self.tokenizer.decode(answer[:cut], skip_special_tokens=True)).strip()

    def text(self, text: str, answer: int | None, at_start: bool) -> tuple[list[int], int]:
        """Ids of the text between two tokens; special strings inside it stay ordinary text.

        Args:
          text: encoded in one call.
          answer: where the answer begins in it, in characters; None: it has none.
          at_start: whether the tokenizer takes it for the start of a text.

        Returns:
          The ids, not to be changed, and how many of them stand before the answer.
        """
        encode = self._cached if len(text) <= _CACHED_CHARACTERS else self._encode
        return encode(text, answer, at_start)

    def _encode(self, text: str, answer: int | None, at_start: bool) -> tuple[list[int], int]:
        if not text:
            return [], 0
        if at_start and text.startswith(" ") and self._takes_space:
            # SentencePiece puts its prefix before a space as well, Metaspace takes the space for the prefix.
            text, answer = " " + text, answer and answer + 1
        tokenizer = self._at_start if at_start else self._behind
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if answer is None or answer == 0:
            return encoding.ids, len(encoding.ids) if answer is None else 0
        offsets = encoding.offsets
        before = bisect_right(offsets, answer, key=itemgetter(1))
        if before < len(offsets) and offsets[before][0] < answer:
            # A token holds the prompt's last character and the answer's first: no prompt ends with it.
            left = tokenizer.encode(text[:answer], add_special_tokens=False).ids
            return left + self._behind.encode(text[answer:], add_special_tokens=False).ids, len(left)
        return encoding.ids, before

    def _turns(self, turns: Sequence[Turn]) -> _Writer:
        """Everything up to the end of these turns."""
        out = _Writer(self, self._bos)
        out.put(self._start)
        for turn in turns:
            out.put(self._question)
            out.put(self._shown(turn.question))
            out.put(self._answer)
            out.put((self._layout.lead + turn.answer, *self._end), supervised=True)
            out.put(self._after)
        return out

    def _shown(self, question: str) -> tuple[Part, ...]:
        """A question's text and its pictures, in their order."""
        count = question.count(PLACEHOLDER)
        text = question.replace(PLACEHOLDER, "").strip()
        if self._layout.images == "alone":
            return (IMAGE_MARK,) * count
        if self._layout.images == "front":
            return *(IMAGE_MARK,) * count, text
        if self.mode == "llava" and count:
            question = (f"{PLACEHOLDER}\n" * count + text).strip()
        return _parts(question, {PLACEHOLDER: IMAGE_MARK})


class _Writer:
    """Puts parts one behind the other; text up to the next token is encoded at once."""

    def __init__(self, template: Template, bos: Sequence[Part]) -> None:
        self.ids = [part for part in bos if isinstance(part, int)]
        self.supervised = [False] * len(self.ids)
        self._template = template
        self._text = ""
        self._answer: int | None = None
        self._at_start = True

    def put(self, parts: Iterable[Part], supervised: bool = False) -> None:
        for part in parts:
            if isinstance(part, str):
                if supervised and self._answer is None:
                    self._answer = len(self._text)
                self._text += part
            else:
                self.flush()
                self.ids.append(part)
                self.supervised.append(supervised)
                self._at_start = part == IMAGE_MARK and self._template.mode == "llava"

    def flush(self) -> None:
        if not self._text:
            return
        ids, before = self._template.text(self._text, self._answer, self._at_start)
        self.ids += ids
        self.supervised += [False] * before + [True] * (len(ids) - before)
        self._text, self._answer, self._at_start = "", None, False


def make_template(name: str, tokenizer: Tokenizer, mode: str = "inline") -> Template:
    """A template for one tokenizer, such as one of `train_tokenizer` or `read_tokenizer`.

    Args:
      name: of `TEMPLATES`.
      tokenizer: is not changed.
      mode: "inline" or "llava" (see above); the pictures of toy stand in front of their turn in both.

    Raises:
      UserError: there is no such template or mode; the tokenizer lacks a token that the template needs, or
        cannot tell it from the same string in a text.
    """
    if name not in LAYOUTS:
        raise UserError(f"there is no template {name!r}: use one of {', '.join(TEMPLATES)}")
    if mode not in MODES:
        raise UserError(f"there is no template mode {mode!r}: use one of {', '.join(MODES)}")
    missing = _missing(LAYOUTS[name], tokenizer)
    if missing:
        fitting = [other for other in TEMPLATES if not _missing(LAYOUTS[other], tokenizer)]
        raise UserError(
            f"template {name!r} needs the token {missing[0]}, which the tokenizer lacks: "
            f"use a template that fits it ({', '.join(fitting)})"
        )
    template = Template(name, tokenizer, mode)
    for token in LAYOUTS[name].special:
        if tokenizer.token_to_id(token) in template.text(token, None, True)[0]:
            raise UserError(
                f"template {name!r} needs {token} as a special token, and the tokenizer takes it for a word "
                "of its vocabulary: list it among the added tokens of tokenizer.json"
            )
    return template


def truncate(encoded: Encoded, visual_tokens: int, length: int) -> Encoded:
    """The conversation cut at its end to `length` positions, of which a picture takes `visual_tokens`.

    A picture that does not fit whole goes, and all behind it. LLaVA cuts at the same place, but through
    pictures. Whether a supervised token is left is for the caller to see and count.
    """
    taken = np.cumsum(np.where(encoded.tokens == IMAGE_MARK, visual_tokens, 1))
    kept = int(np.searchsorted(taken, length, side="right"))
    return Encoded(encoded.tokens[:kept], encoded.supervised[:kept], encoded.query)


def expand(
    tokens: np.ndarray | Sequence[int], visual_tokens: int, fill_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Give each picture its slots.

    Args:
      tokens: [t] with IMAGE_MARKs.
      visual_tokens: slots of a picture; with 0 the marks go.
      fill_id: token that stands in the slots.

    Returns:
      (tokens, image_slots), both [t + pictures * (visual_tokens - 1)] int32; a slot of the i-th picture is
      i, from 1 on, and 0 is text.
    """
    tokens = np.asarray(tokens, np.int32)
    mark = tokens == IMAGE_MARK
    times = np.where(mark, visual_tokens, 1)
    slots = np.where(mark, np.cumsum(mark), 0).astype(np.int32)
    return np.repeat(np.where(mark, np.int32(fill_id), tokens), times), np.repeat(slots, times)


def _missing(layout: Layout, tokenizer: Tokenizer) -> list[str]:
    """Structure tokens that a tokenizer does not have."""
    return [token for token in layout.special if tokenizer.token_to_id(token) is None]


def _parts(text: str, ids: Mapping[str, int]) -> tuple[Part, ...]:
    """A text cut at the strings that stand for tokens, and these as their ids."""
    if not ids:
        return (text,) if text else ()
    pieces = re.split(f"({'|'.join(map(re.escape, ids))})", text)
    return tuple(ids.get(piece, piece) for piece in pieces if piece)
