"""MMMU's rule for open questions: what of an answer may be the answer, and whether the right one is in it.

Rule: parse_open_response and eval_open of eval/eval_utils.py, github.com/MMMU-Benchmark/MMMU. No jax.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # plain
)


def holds(answer: str, truths: Sequence[str]) -> bool:
    """Whether a right answer is in what an answer comes to: a text within a text, or an equal number.

    Numbers are equal to two digits behind the point. A right answer of one character must have a space beside
    it, so that it is not found in every word.
    """
    right = [form for truth in truths if truth.strip() for form in _forms(truth)]
    for candidate in _candidates(answer):
        if isinstance(candidate, float):
            if candidate in right:
                return True
        elif any(isinstance(form, str) and form in candidate for form in right):
            return True
    return False


def _candidates(answer: str) -> list[str | float]:
    """What may be the answer: the ends of sentences behind words like "is", and the numbers in them."""
    text = answer.strip().strip(".").lower()
    # The authors also part at a full stop before a capital, of which a text in lower case has none.
    lines = text.split("\n")
    ends = []
    for place, line in enumerate(lines):
        markers = (*_MARKERS, "=") if place == len(lines) - 1 else _MARKERS
        behind = [line.rsplit(marker, 1)[1].strip() for marker in markers if marker in line]
        end = _shortest(behind)
        if end and end not in _TRIVIAL:
            ends.append(end)
    ends = ends or [text]
    numbers = [number for end in ends for pattern in _NUMBERS for number in pattern.findall(end)]
    return [form for candidate in (*ends, *numbers) for form in _forms(candidate)]


def _shortest(texts: Sequence[str]) -> str:
    """The first of the shortest, as the authors go through them: one behind an empty text takes its place."""
    shortest = ""
    for text in texts:
        if not shortest or len(text) < len(shortest):
            shortest = text
    return shortest


def _forms(text: str) -> list[str | float]:
    """A number to two digits, or the text in lower case, one character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
