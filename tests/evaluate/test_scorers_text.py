"""Short open answers: each case's outcome follows from the rule named in its test, not from our code."""

from __future__ import annotations

import random

import pytest

from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import text


def question(*truths: str) -> Question:
    return Question("q", truths)


@pytest.mark.parametrize(
    "answer, truths, outcome",
    [
        ("red", ("red",), 1),
        (" red\n", ("red",), 1),
        ("Red", ("red",), 0),
        ("red.", ("red",), 0),
        ("blue", ("red", "blue"), 1),
        ("green", ("red", "blue"), 0),
        ("", ("red",), 0),
        ("", ("",), 1),
        ("dark red", ("red",), 0),
        ("a  b", ("a b",), 0),
        ("5", ("5",), 1),
        ("5.0", ("5",), 0),
    ],
)
def test_exact_match_is_word_for_word(answer: str, truths: tuple[str, ...], outcome: float) -> None:
    assert text.exact_match(question(*truths), answer) == outcome


@pytest.mark.parametrize(
    "answer, truth, outcome",
    [
        ("yes", "yes", 1),
        ("Yes", "yes", 1),
        ("Yes.", "yes", 1),
        ("YES...", "yes", 1),
        ("yes!", "yes", 0),
        (".yes", "yes", 0),
        ("yes, it is", "yes", 0),
        ("the left", "left", 0),
        ("Left ", "left", 1),
        ("t-shirt", "tshirt", 0),
        ("T-shirt", "t-shirt", 1),
        ("two", "2", 0),
        ("fire  truck", "fire truck", 0),
        ("", "yes", 0),
        ("yes", "Yes", 1),
    ],
)
def test_gqa(answer: str, truth: str, outcome: float) -> None:
    """LLaVA's scripts/convert_gqa_for_eval.py on a stripped answer, then equality as in GQA's eval.py."""
    assert text.gqa(question(truth), answer) == outcome


@pytest.mark.parametrize(
    "answer, truth, outcome",
    [
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-100", "100", 0),
        ("-104", "-100", 1),
        ("12%", "12%", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("12.5%", "12%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("0.001", "0", 0),
        ("1,000", "1000", 0),
        ("1,000", "1,000", 1),
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        ("red", "Red", 1),
        ("reds", "red", 0),
        ("1e2", "100", 1),
        ("nan", "100", 0),
        ("inf", "100", 0),
        ("%", "%", 1),
        ("", "5", 0),
    ],
)
def test_chartqa(answer: str, truth: str, outcome: float) -> None:
    """relaxed_correctness of Qwen-VL's eval_mm/evaluate_vqa.py, after arXiv 2203.10244, section 5.1."""
    assert text.chartqa(question(truth), answer) == outcome


def test_chartqa_takes_any_of_several_truths() -> None:
    assert text.chartqa(question("10", "20"), "20.5") == 1


@pytest.mark.parametrize(
    "answer, truths, outcome",
    [
        ("hello", ("hello",), 1),
        ("Hello", ("hELLO",), 1),
        ("hallo", ("hello",), 4 / 5),
        ("helloo", ("hello",), 5 / 6),
        ("hell", ("hello",), 4 / 5),
        ("ab", ("ac",), 1 / 2),  # the script's >= 0.5; by the paper's equation 0
        ("abc", ("axy",), 0),
        ("", ("hello",), 0),
        ("", ("",), 1),
        ("hello", ("",), 0),
        (" hello\n", ("hello",), 1),
        ("new  york", ("new york",), 1),  # joined for the distance
        ("new  yorx", ("new york",), 8 / 9),  # divided by the length as written, which is 9
        ("12", ("11", "12", "99"), 1),
        ("kitten", ("sitting",), 4 / 7),
        ("completely different", ("no",), 0),
    ],
)
def test_docvqa(answer: str, truths: tuple[str, ...], outcome: float) -> None:
    """ANLS as in the Robust Reading Competition's script (arXiv 1907.00490, threshold 0.5)."""
    assert text.docvqa(question(*truths), answer) == pytest.approx(outcome, abs=1e-12)


@pytest.mark.parametrize(
    "one, other, steps",
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_distance(one: str, other: str, steps: int) -> None:
    assert text.distance(one, other) == text.distance(other, one) == steps


def test_distance_is_a_metric() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abc", k=draw.randrange(7))) for _ in range(12)]
    for a in words:
        for b in words:
            assert (text.distance(a, b) == 0) == (a == b)
            assert all(text.distance(a, c) <= text.distance(a, b) + text.distance(b, c) for c in words)
