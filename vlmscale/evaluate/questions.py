"""Task files: the questions of a benchmark, one JSON object a line (docs/evaluation.md). No jax.

A line that cannot be used stops the reading with one line that names it: a score over what happened to be
readable is a score of another benchmark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmscale.data.records import read_items
from vlmscale.errors import UserError

_KINDS = ("text", "integer", "float", "list")
_MOST_OPTIONS = 26
_TEXTS = ("question", "hint", "template", "category", "group", "split")
KEYS = ("id", "image", "answers", "options", "answer_type", "precision", *_TEXTS)


@dataclass(frozen=True)
class Question:
    """One line of a task file.

    Attributes:
      id: unique in the file; a number in the file is its text here.
      answers: what the annotators said; of a multiple choice the letter of the right option.
      question: without its placeholder and prompt.
      images: paths as written; () for text alone.
      options: of a multiple choice, in order of their letters.
      hint: context in front of the question.
      template: prompt in place of the task's own, see `tasks.Benchmark.prompt`.
      category: what scores are also reported by; of MME and POPE one of theirs.
      group: questions that count together: the two of an MME picture, the rotations of an MMBench question.
      split: of the benchmark, where the file says.
      answer_type, precision: MathVista's: text, integer, float or list, "" for that of the right answer;
        digits behind the point.
    """

    id: str
    answers: tuple[str, ...]
    question: str = ""
    images: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    hint: str = ""
    template: str = ""
    category: str = ""
    group: str = ""
    split: str = ""
    answer_type: str = ""
    precision: int | None = None


def read_questions(path: Path, asked: bool = True) -> list[Question]:
    """The questions of a task file.

    Args:
      path: JSON Lines, or a JSON list.
      asked: whether a model is to be asked, for which every line needs a question.

    Raises:
      UserError: the file cannot be read; a line lacks what is needed, has an unknown key, a value of a wrong
        type, no options where there is a list of them, or an id that an earlier line has.
    """
    found: list[Question] = []
    lines: dict[str, int] = {}
    for number, (_, _, value) in enumerate(read_items(path), 1):
        where = f"{path}: item {number}"
        if not isinstance(value, dict):
            raise UserError(f"{where}: must be a JSON object with id and answers")
        name = _id(value, where)
        where = f"{path}: item {name}"
        if name in lines:
            raise UserError(
                f"{where}: is there twice, as number {lines[name]} and {number}; ids must be unique"
            )
        lines[name] = number
        found.append(_question(name, value, where, asked))
    return found


def read_answers(path: Path) -> dict[str, str]:
    """Answers by id, of lines {"id", "answer"} or of LLaVA's {"question_id", "text"}.

    Raises:
      UserError: the file cannot be read, a line lacks one of the two or has it in a wrong type, or an id is
        there twice.
    """
    answers: dict[str, str] = {}
    for number, (_, _, value) in enumerate(read_items(path), 1):
        where = f"{path}: answer {number}"
        if not isinstance(value, dict):
            raise UserError(f"{where}: must be a JSON object with id and answer")
        if "id" not in value and "question_id" in value:
            value = {"id": value["question_id"], "answer": value.get("text", value.get("answer"))}
        name = _id(value, where)
        answer = value.get("answer")
        if not isinstance(answer, str):
            raise UserError(f"{path}: answer to {name}: answer={answer!r} must be a text, in quotes")
        if name in answers:
            raise UserError(f"{path}: answer to {name}: is there twice; keep one")
        answers[name] = answer
    return answers


def _id(value: dict[str, Any], where: str) -> str:
    name = value.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"{where}: id={name!r} must be a text or a whole number")
    if isinstance(name, str) and not name.isprintable():
        raise UserError(f"{where}: id={name!r} holds characters that cannot be printed")
    return str(name)


def _question(name: str, value: dict[str, Any], where: str, asked: bool) -> Question:
    if unknown := [key for key in value if key not in KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}")
    texts = {key: _text(value, key, where) for key in _TEXTS}
    if asked and not texts["question"].strip():
        raise UserError(f"{where}: has no question")
    kind = value.get("answer_type") or ""
    if kind and kind not in _KINDS:
        raise UserError(f"{where}: answer_type={kind!r} must be one of {', '.join(_KINDS)}")
    precision = value.get("precision")
    if precision is not None:
        whole = isinstance(precision, int | float) and not isinstance(precision, bool)
        if not whole or not math.isfinite(precision) or precision != int(precision) or precision < 0:
            raise UserError(f"{where}: precision={precision!r} must be a whole number, 0 or above")
        precision = int(precision)
    return Question(
        name,
        _texts(value, "answers", where, needed=True),
        images=_texts(value, "image", where),
        options=_texts(value, "options", where),
        answer_type=kind,
        precision=precision,
        **texts,
    )


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {key}={text!r} must be a text, in quotes")
    return _whole(text, key, where)


def _whole(text: str, key: str, where: str) -> str:
    """The text, refused where it has half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key}={text!r} is no valid text") from None
    return text


def _texts(value: dict[str, Any], key: str, where: str, needed: bool = False) -> tuple[str, ...]:
    """A text or a list of them; () where the key is absent and not needed."""
    texts = value.get(key)
    if texts is None and not needed:
        return ()
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {key}={texts!r} must be a text or a list of texts, in quotes")
    for text in texts:
        _whole(text, key, where)
    if not texts:
        raise UserError(f"{where}: {key} is an empty list; name at least one, or leave the key away")
    if key == "options" and len(texts) > _MOST_OPTIONS:
        raise UserError(f"{where}: has {len(texts)} options; letters are there for {_MOST_OPTIONS}")
    if key != "answers" and (empty := [text for text in texts if not text.strip()]):
        raise UserError(f"{where}: {key} holds the empty text {empty[0]!r}")
    return tuple(texts)
