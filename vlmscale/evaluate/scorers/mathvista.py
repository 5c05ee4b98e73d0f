"""MathVista's mark: the rules of its evaluation, without the model that it asks. No jax."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers.text import distance

_LETTERS = "ABCDE"
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_LEADING_LETTER = re.compile(r"([A-Z])(?:[.:)](?:\s.*)?)?", re.DOTALL)
_NAMED_LETTER = re.compile(r"\b(?i:answer|option|choice)(?i: is)?:? ([A-Z])\b(?!')")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?![\d,]*\w)")


def mathvista(question: Question, answer: str) -> float:
    """MathVista: is what the answer comes to, of the type asked for, the right text?

    Rule: extract_answer.py and calculate_score.py of github.com/lupantech/MathVista (evaluation/), as
    lmms-eval has them. Extraction: an answer that is a choice, or a whole number or number where one is asked
    for, is taken as it is; then 'The answer is "..."' (the code's --quick_extract, off by default). Of
    everything else the authors ask GPT-4 what the answer is. Then normalisation: choices by their letter,
    else the nearest by Levenshtein distance, so that every answer picks a choice, an empty one too; whole
    numbers without their fraction; numbers to the question's precision; a list as written. Then equality.

    Here nobody is asked. In GPT-4's place an answer is read as far as it leaves no doubt: a leading letter
    ("B.", "B: text") or a named one ("the answer is B") of a choice, the one number in an answer that holds a
    single number. Otherwise the answer stands as it is. For answers of a word or a number this is the
    authors' score; for models that talk it is another, mostly lower one.

    A question with options is multiple choice: its answer is a choice's text or letter. A type or precision
    that the file does not give is that of the right answer as written; a capital letter alone is a choice.

    Raises:
      UserError: there are options and the right answer is none of them.
    """
    question, text = _typed(question), answer.strip()
    if not question.options and re.fullmatch("[A-Z]", question.answers[0].strip()):
        # A choice whose options are not known: what names no letter is wrong.
        return float(
            _extracted(text, replace(question, options=tuple(_LETTERS))) == question.answers[0].strip()
        )
    if question.options:
        return float(_choice(_extracted(text, question), question.options) == _right_choice(question))
    return float(_value(_extracted(text, question), question) == question.answers[0].strip())


def _typed(question: Question) -> Question:
    """The question with a type: where the file names none, that of its right answer."""
    truth = question.answers[0].strip()
    if question.answer_type or question.options:
        return question
    kind = next((kind for kind, read in (("integer", int), ("float", float)) if _parsed(truth, read)), "text")
    return replace(question, answer_type=kind)


def _extracted(text: str, question: Question) -> str:
    if not text or text in question.options:
        return text
    if question.answer_type in ("integer", "float") and not question.options:
        number = _parsed(text, int if question.answer_type == "integer" else float)
        if number is not None:
            return number
    if quoted := _QUOTED.search(text):
        return quoted.group(1)
    return _read_plainly(text, question)


def _read_plainly(text: str, question: Question) -> str:
    """What the authors ask GPT-4 for, where the answer leaves no doubt, or the answer."""
    if question.options:
        letters = {chr(ord("A") + i) for i in range(len(question.options))}
        if (leading := _LEADING_LETTER.fullmatch(text)) and leading.group(1) in letters:
            return leading.group(1)
        named = letters.intersection(_NAMED_LETTER.findall(text))
        return named.pop() if len(named) == 1 else text
    if question.answer_type in ("integer", "float"):
        numbers = _NUMBER.findall(text)
        return numbers[0].replace(",", "") if len(numbers) == 1 else text
    return text


def _choice(extraction: str, options: tuple[str, ...]) -> str:
    extraction = extraction.strip()
    if letters := _BRACKETED.findall(extraction):
        extraction = letters[0].upper()
    if len(extraction) == 1 and 0 <= (place := ord(extraction) - ord("A")) < len(options):
        return options[place]
    return min(options, key=lambda option: distance(extraction, option))  # the first of equally near ones


def _right_choice(question: Question) -> str:
    truth, options = question.answers[0].strip(), question.options
    # The letter first, as in other multiple choices: options may read "B" and "A".
    letter = truth.strip("().").upper()
    if len(letter) == 1 and 0 <= (place := ord(letter) - ord("A")) < len(options):
        return options[place]
    for option in options:
        if option.strip() == truth:
            return option
    raise UserError(
        f"item {question.id}: answers={truth!r} is none of its options; write the option's text or its letter"
    )


def _value(extraction: str, question: Question) -> str | None:
    """The extraction as a text of the type asked for, or None where it is no such thing."""
    if question.answer_type == "integer":
        return _parsed(extraction, lambda text: int(float(text)))
    if question.answer_type == "float":
        if question.precision is not None:
            return _parsed(extraction, lambda text: round(float(text), question.precision))
        truth = question.answers[0].strip()
        digits = len(truth.partition(".")[2])
        given = _parsed(extraction, lambda text: round(float(text), digits))
        return truth if given == _parsed(truth, lambda text: round(float(text), digits)) else given
    return extraction


def _parsed(text: str, read: Callable[[str], float]) -> str | None:
    try:
        return str(read(text))
    except (ValueError, OverflowError):
        return None
