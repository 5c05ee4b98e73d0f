"""What ten people said: the outcome of each case follows from the rule named in its test, not our code."""

from __future__ import annotations

import pytest

from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import Mark, vqa


def answered(**said: int) -> Question:
    """How many annotators gave each answer; "_" in a name stands for a space."""
    truths = [name.replace("_", " ") for name, count in said.items() for _ in range(count)]
    assert len(truths) == 10
    return Question("q", tuple(truths))


@pytest.mark.parametrize("agree, outcome", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
@pytest.mark.parametrize("mark", [vqa.vqav2, vqa.evalai])
def test_the_mean_over_nine_of_ten_annotators(mark: Mark, agree: int, outcome: float) -> None:
    """vqaEval.py by hand: of n who agree, n subsets have n - 1 and 10 - n have n; each min(1, n/3)."""
    said = answered(**{"cat": agree, "dog": 10 - agree}) if agree else answered(dog=10)
    assert mark(said, "cat") == pytest.approx(outcome)
    assert mark(answered(cat=10), "cat") == 1


@pytest.mark.parametrize(
    "answer, truth, equal",
    [
        ("Cat", "cat", True),
        (" cat\n", "cat", True),
        ("the cat", "cat", True),
        ("a an the", "", True),
        ("two", "2", True),
        ("none", "0", True),
        ("eleven", "11", False),
        ("dont", "don't", True),
        ("couldntve", "couldn't've", False),  # only one apostrophe is put back
        ("couldn'tve", "couldn't've", True),
        ("cat.", "cat", True),
        ("3.5", "3.5", True),
        ("3.", "3", True),
        ("cat?", "cat", True),  # a space, which splitting drops
        ("ice-cream", "ice cream", True),
        ("ice -cream", "icecream", False),
        ("ice- cream", "ice cream", True),
        ("cat, dog", "cat dog", True),
        ("1,000", "1000", True),
        ("1,000-2", "10002", True),  # one comma within a number, and all punctuation vanishes
        ("yes/no", "yes no", True),
        ("it's", "its", False),
        ("what's\tup", "what's up", True),
        ("cats", "cat", False),
        ("", "cat", False),
    ],
)
def test_vqav2(answer: str, truth: str, equal: bool) -> None:
    """processPunctuation and processDigitArticle of GT-Vision-Lab/VQA's vqaEval.py where people differ."""
    differing = Question("q", (truth,) * 9 + ("something else",))
    assert vqa.vqav2(differing, answer) == float(equal)


@pytest.mark.parametrize(
    "answer, truth, equal",
    [
        ("Stop", "stop", True),
        ("STOP.", "stop", True),
        ("the end", "end", True),
        ("1,000", "1000", True),
        ("1,000-2", "1000 2", True),  # no comma is left that could make all punctuation vanish
        ("cat,dog", "catdog", True),
        ("cat?dog", "catdog", True),
        ("mcdonald's", "mcdonald 's", True),
        ("mcdonald's", "mcdonalds", False),
        ("ten", "10", True),
        ("10.5", "10.5", True),
        ("coca-cola", "coca cola", True),
        ("a.m.", "am", True),
        (":30", ":30", True),
        ("unanswerable", "unanswerable", True),
        ("Unanswerable.", "unanswerable", True),
        ("youre", "you're", True),
        ("", "stop", False),
    ],
)
def test_textvqa_and_vizwiz(answer: str, truth: str, equal: bool) -> None:
    """EvalAIAnswerProcessor of LLaVA's llava/eval/m4c_evaluator.py."""
    assert vqa.evalai(Question("q", (truth,) * 9 + ("something else",)), answer) == float(equal)


def test_vqav2_normalises_where_all_agree_too() -> None:
    """The documented difference: vqaEval.py compares raw texts there, so that "Yes" would be wrong."""
    assert vqa.vqav2(answered(yes=10), "Yes.") == 1
    assert vqa.vqav2(answered(two=10), "2") == 1


def test_fewer_annotators() -> None:
    for mark in (vqa.vqav2, vqa.evalai):
        assert mark(Question("q", ("cat",)), "Cat") == 1
        assert mark(Question("q", ("cat",)), "dog") == 0
        assert mark(Question("q", ("cat", "cat")), "cat") == 1
        assert mark(Question("q", ("cat", "dog")), "cat") == pytest.approx(1 / 2)
        assert mark(Question("q", ("cat", "cat", "dog")), "cat") == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
        assert mark(Question("q", ("cat", "dog", "dog", "dog")), "cat") == pytest.approx((0 + 3 * 1 / 3) / 4)
        assert mark(Question("q", ("cat",) * 4), "cat") == 1


def test_a_known_contraction_keeps_its_authors_mistake() -> None:
    assert vqa.vqav2(Question("q", ("somebodyd", "x", "somebodyd", "x", "x")), "somebody'd") > 0
