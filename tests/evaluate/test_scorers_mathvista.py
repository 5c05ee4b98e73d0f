"""MathVista: each case's outcome follows from the rule named in its test, not from our code."""

from __future__ import annotations

import pytest

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers.mathvista import mathvista

CITIES = ("hong kong", "osaka", "shanghai", "tokyo")


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("tokyo", 1),
        (" tokyo\n", 1),
        ("D", 1),
        ("(D)", 1),
        ("(d)", 1),
        ("(D) tokyo", 1),
        ("The answer is (D) tokyo.", 1),
        ('The answer is "tokyo".', 1),
        ('The answer is "D".', 1),
        ("Tokyo", 1),  # the nearest by Levenshtein
        ("toky", 1),
        ("kyoto", 1),  # 4 steps from tokyo, 5 from osaka
        ("A", 0),
        ("(A) tokyo", 0),
        ("osaka", 0),
        ("", 0),  # nearest to the shortest, which is osaka
    ],
)
def test_choices(answer: str, outcome: float) -> None:
    """extract_answer and normalize_extracted_answer of lupantech/MathVista's evaluation/.

    What the authors would ask GPT-4 about stands as it is, here and in the next tests.
    """
    for truth in ("tokyo", "D", "(D)"):
        assert mathvista(Question("q", (truth,), options=CITIES), answer) == outcome


@pytest.mark.parametrize(
    "answer, truth, outcome",
    [
        ("5", "5", 1),
        (" 5 ", "5", 1),
        ("+5", "5", 1),
        ("05", "5", 1),
        ("5.0", "5", 1),
        ("5.9", "5", 1),  # int(float()) drops the fraction
        ("-5", "5", 0),
        ("1e1", "10", 1),
        ("6", "5", 0),
        ('The answer is "5".', "5", 1),
        ('The answer is "five".', "5", 0),
        ("five", "5", 0),
        ("inf", "5", 0),
        ("", "5", 0),
    ],
)
def test_whole_numbers(answer: str, truth: str, outcome: float) -> None:
    """extract_answer.py with --quick_extract, then calculate_score.py, answer_type integer."""
    assert mathvista(Question("q", (truth,), answer_type="integer"), answer) == outcome


@pytest.mark.parametrize(
    "answer, truth, precision, outcome",
    [
        ("1.2", "1.2", 1, 1),
        ("1.23", "1.2", 1, 1),
        ("1.26", "1.2", 1, 0),
        ("1.26", "1.3", 1, 1),
        ("1", "1.0", 1, 1),
        ("0.5", "0.5", 2, 1),
        ("0.50", "0.5", 2, 1),
        ("0.5", "0.50", 2, 0),  # compared as texts, and round() writes no 0 at the end
        (".25", "0.25", 2, 1),
        ('The answer is "1.21".', "1.2", 1, 1),
        ("1,5", "1.5", 1, 0),
        ("nan", "1.5", 1, 0),
        ("one", "1.0", 1, 0),
    ],
)
def test_numbers(answer: str, truth: str, precision: int, outcome: float) -> None:
    """extract_answer.py with --quick_extract, then calculate_score.py, answer_type float."""
    assert mathvista(Question("q", (truth,), answer_type="float", precision=precision), answer) == outcome


@pytest.mark.parametrize(
    "answer, truth, outcome",
    [("[1, 2]", "[1, 2]", 1), (" [1, 2]\n", "[1, 2]", 1), ("[1,2]", "[1, 2]", 0), ("[2, 1]", "[1, 2]", 0)],
)
def test_lists(answer: str, truth: str, outcome: float) -> None:
    assert mathvista(Question("q", (truth,), answer_type="list"), answer) == outcome


@pytest.mark.parametrize(
    "answer, kind, outcome",
    [
        ("D.", "text", 1),
        ("D. tokyo", "text", 1),
        ("D: osaka", "text", 1),
        ("The answer is D.", "text", 1),
        ("The correct option is D", "text", 1),
        ("The answer is D, not the option A", "text", 0),  # in doubt: nearest as a whole
        ("The answer is a city", "text", 0),  # no letter
        ("There are 5.", "integer", 1),
        ("5 apples", "integer", 1),
        ("3 + 2 = 5", "integer", 0),  # three numbers
        ("It has 1,000 of them", "integer", 0),
        ("Chapter 5b", "integer", 0),
    ],
)
def test_what_gpt_would_be_asked_is_read_where_it_leaves_no_doubt(
    answer: str, kind: str, outcome: float
) -> None:
    """Our own rule, as its docstring has it: the authors ask GPT-4 here."""
    if kind == "integer":
        question = Question("q", ("5",), answer_type=kind)
    else:
        question = Question("q", ("D",), options=("The answer is a city or so", *CITIES[1:]))
    assert mathvista(question, answer) == outcome


def test_thousands_are_read() -> None:
    assert mathvista(Question("q", ("1000",), answer_type="integer"), "It has 1,000 of them") == 1
    assert mathvista(Question("q", ("-2.5",), answer_type="float", precision=1), "about -2.5 degrees") == 1


@pytest.mark.parametrize(
    "truth, answer, outcome", [("1.50", "1.5", 1), ("1.50", "1.499", 1), ("5", "5.2", 1), ("5", "6", 0)]
)
def test_a_precision_not_given_is_that_of_the_truth(truth: str, answer: str, outcome: float) -> None:
    assert mathvista(Question("q", (truth,), answer_type="float"), answer) == outcome


def test_a_truth_that_is_no_option_names_the_item() -> None:
    with pytest.raises(UserError, match="item q3: answers='kyoto' is none of its options"):
        mathvista(Question("q3", ("kyoto",), options=CITIES), "D")
