"""POPE and MME: each case's outcome follows from the rule named in its test, not from our code."""

from __future__ import annotations

import math

import pytest

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import Mark, Summary, yesno


@pytest.mark.parametrize(
    "answer, said",
    [
        ("yes", "yes"),
        ("Yes", "yes"),
        ("no", "no"),
        ("No", "no"),
        ("No.", "no"),
        ("NO", "yes"),
        ("no!", "yes"),
        ("No, there is not", "no"),
        ("There is not a dog", "no"),
        ("There isn't a dog", "yes"),
        ("Yes. No dog", "yes"),
        ("dog. No", "yes"),
        ("Yes, no doubt", "no"),
        ("a\nno", "yes"),
        (" no\n", "no"),
        ("nothing", "yes"),
        ("", "yes"),
        (".no", "yes"),
    ],
)
def test_pope(answer: str, said: str) -> None:
    """eval_pope of LLaVA's llava/eval/eval_pope.py, on an answer that LLaVA's generation has stripped."""
    for truth in ("yes", "no", "Yes", " No"):
        assert yesno.pope(Question("q", (truth,)), answer) == float(said == truth.strip().lower())


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("no", "no"),
        ("NO", "no"),
        ("No, it is", "no"),
        ("not sure", "no"),
        ("I know", "other"),  # "i kn" has no "no" in it
        ("know", "no"),
        ("a yes", "other"),
        ('"yes"', "yes"),
        ("y", "other"),
        ("n", "other"),
        ("", "other"),
        ("maybe", "other"),
        ("yesno", "yes"),
        ("noyes", "no"),
        (" yes\n", "yes"),
        ("none", "no"),
    ],
)
def test_mme(answer: str, said: str) -> None:
    """parse_pred_ans of MME's eval_tool/calculation.py: yes before no, in the first four characters."""
    for truth in ("yes", "no"):
        assert yesno.mme(Question("q", (truth,)), answer) == float(said == truth)


@pytest.mark.parametrize("mark", [yesno.pope, yesno.mme])
def test_a_truth_must_be_yes_or_no(mark: Mark) -> None:
    with pytest.raises(UserError, match=r"item q7: answers=.'maybe'. must be yes or no"):
        mark(Question("q7", ("maybe",)), "yes")


def pope_of(*cases: tuple[str, str, str]) -> Summary:
    """Of (category, truth, answer)."""
    questions = [Question(str(i), (truth,), category=name) for i, (name, truth, _) in enumerate(cases)]
    answers = [answer for _, _, answer in cases]
    marks = [yesno.pope(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return yesno.summarise_pope(questions, answers, marks)


def test_pope_numbers_by_hand() -> None:
    hits = [("", "yes", "Yes")] * 3
    summary = pope_of(*hits, ("", "no", "Yes"), ("", "yes", "No"), ("", "no", "no"), ("", "no", "no"))
    assert summary.score == pytest.approx(5 / 7)
    assert summary.raw == pytest.approx(500 / 7)
    assert summary.stderr == pytest.approx(math.sqrt(5 / 7 * 2 / 7 / 7))
    assert summary.counted == 7
    assert summary.details == pytest.approx(
        {"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "yes_rate": 4 / 7}
    )


def test_pope_by_category() -> None:
    summary = pope_of(
        ("random", "yes", "yes"), ("random", "no", "no"), ("popular", "yes", "yes"), ("popular", "no", "yes")
    )
    assert summary.details["category random"] == summary.details["f1 random"] == 1
    assert summary.details["category popular"] == 0.5
    assert summary.details["f1 popular"] == pytest.approx(2 / 3)
    assert summary.details["f1_mean"] == pytest.approx(5 / 6)
    assert summary.details["f1"] == pytest.approx(2 * (2 / 3) / (5 / 3))


@pytest.mark.parametrize("truth", ["yes", "no"])
@pytest.mark.parametrize("answer", ["yes", "no"])
def test_pope_divides_by_nothing_without_harm(truth: str, answer: str) -> None:
    details = pope_of(("", truth, answer)).details
    expected = float(truth == answer == "yes")
    assert details["precision"] == details["recall"] == details["f1"] == expected
    assert details["yes_rate"] == float(answer == "yes")


def test_pope_counts_a_missing_answer_as_wrong() -> None:
    questions = [Question("a", ("yes",)), Question("b", ("no",))]
    summary = yesno.summarise_pope(questions, ["", ""], [0.0, 0.0])
    assert summary.score == summary.details["recall"] == 0


def mme_of(*cases: tuple[str, str, str, int]) -> Summary:
    """Of (category, group, image, mark)."""
    questions = [
        Question(str(i), ("yes",), category=category, group=group, images=(image,) if image else ())
        for i, (category, group, image, _) in enumerate(cases)
    ]
    return yesno.summarise_mme(questions, [""] * len(cases), [float(mark) for *_, mark in cases])


def test_mme_of_all_categories_is_2800() -> None:
    names = (*yesno.PERCEPTION[:-1], "OCR", *yesno.COGNITION)
    summary = mme_of(*((name, "", f"{name}.jpg", 1) for name in names for _ in range(2)))
    assert (summary.raw, summary.score, summary.stderr, summary.counted) == (2800, 1, 0, 14)
    assert (summary.details["perception"], summary.details["cognition"]) == (2000, 800)
    assert summary.details["category OCR"] == 200


def test_mme_by_hand() -> None:
    """calculation.py: a picture with both right has 100 + 100, with one 50 + 0; a category is their mean."""
    summary = mme_of(
        ("count", "", "1", 1), ("count", "", "2", 1), ("count", "", "1", 1), ("count", "", "2", 0),
        ("code_reasoning", "x", "", 0), ("code_reasoning", "x", "", 0),
    )  # fmt: skip
    assert summary.details == {
        "category count": 125,
        "category code_reasoning": 0,
        "perception": 125,
        "cognition": 0,
    }
    assert summary.raw == 125
    assert summary.score == 125 / 2800  # the other twelve count as nothing
    assert summary.counted == 3
    # v of the two pictures of count is 1 and 1/4, the variance of their mean (3/8)^2 / 2.
    assert summary.stderr == pytest.approx(math.sqrt((3 / 8) ** 2 / 2) / 14)


def test_mme_pairs_follow_each_other_where_nothing_else_is_known() -> None:
    summary = mme_of(("count", "", "", 1), ("color", "", "", 1), ("count", "", "", 1), ("color", "", "", 0))
    assert summary.details["category count"] == 200
    assert summary.details["category color"] == 50


def test_mme_group_goes_before_picture_and_pictures_belong_to_their_category() -> None:
    summary = mme_of(
        ("count", "g", "1", 1), ("count", "g", "2", 1),
        ("color", "", "1", 1), ("color", "", "1", 0),
    )  # fmt: skip
    assert (summary.details["category count"], summary.details["category color"]) == (200, 50)


def test_mme_of_no_category_and_of_one_of_ones_own() -> None:
    assert mme_of(("", "", "", 1), ("", "", "", 1)).details == {"category other": 200, "other": 200}
    own = mme_of(("mine", "", "", 1), ("mine", "", "", 0), ("count", "", "", 1), ("count", "", "", 1))
    assert own.details == {
        "category mine": 50,
        "category count": 200,
        "other": 50,
        "perception": 200,
    }
    assert own.score == 250 / 400


@pytest.mark.parametrize(
    "cases, named",
    [
        ([("count", "g", "", 1)], "category count, group g: has 1"),
        ([("count", "", "1.jpg", 1)] * 3, r"category count, image 1\.jpg: has 3"),
        ([("count", "", "", 1)] * 3, "category count, pair 2 of those without group and image: has 1"),
    ],
)
def test_mme_refuses_what_is_no_pair(cases: list[tuple[str, str, str, int]], named: str) -> None:
    with pytest.raises(UserError, match=named):
        mme_of(*cases)
