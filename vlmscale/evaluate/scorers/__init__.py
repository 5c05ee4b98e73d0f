"""Scorers: pure functions from answers to 0..1, each as the benchmark's authors have it. No jax.

A mark is the score of one answer; a summary makes the benchmark's number of all marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vlmscale.evaluate.questions import Question

Mark = Callable[[Question, str], float]


@dataclass(frozen=True)
class Summary:
    """A benchmark's score.

    Attributes:
      score: 0..1.
      stderr: of `score`, from the scatter of what is counted: sqrt(p(1 - p)/n) where each counts 0 or 1.
      raw: in the unit that the benchmark's authors report.
      counted: what `score` is a mean over: answers, or groups of them.
      details: the benchmark's other numbers by name, such as F1 or the score of a category.
    """

    score: float
    stderr: float
    raw: float
    counted: int
    details: dict[str, float] = field(default_factory=dict)


Summarise = Callable[[Sequence[Question], Sequence[str], Sequence[float]], Summary]


def mean(marks: Sequence[float]) -> tuple[float, float]:
    """Mean of marks and its standard error, the binomial one where all are 0 or 1."""
    count = len(marks)
    average = math.fsum(marks) / count
    return average, math.sqrt(math.fsum((mark - average) ** 2 for mark in marks)) / count


def accuracy(questions: Sequence[Question], answers: Sequence[str], marks: Sequence[float]) -> Summary:
    """Mean of all marks, in percent; and by category where the questions have more than one."""
    score, stderr = mean(marks)
    return Summary(score, stderr, 100 * score, len(marks), by_category(questions, marks))


def by_category(questions: Sequence[Question], marks: Sequence[float]) -> dict[str, float]:
    """Mean mark of each category, where there is more than one."""
    found: dict[str, list[float]] = {}
    for question, mark in zip(questions, marks, strict=True):
        found.setdefault(question.category or "other", []).append(mark)
    return (
        {f"category {name}": mean(part)[0] for name, part in sorted(found.items())} if len(found) > 1 else {}
    )
