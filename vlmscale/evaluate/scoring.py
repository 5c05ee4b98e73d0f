"""Scorers: pure functions from (answer, truth) to 0..1."""

from __future__ import annotations

from collections.abc import Callable


def exact_match(answer: str, truth: str) -> float:
    """1.0 when the answer is the truth word for word, white space at the ends aside."""
    return float(answer.strip() == truth.strip())


SCORERS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}
