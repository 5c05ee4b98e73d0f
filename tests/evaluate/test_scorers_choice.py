"""Multiple choice: each case's outcome follows from the rule named in its test, not from our code."""

from __future__ import annotations

import math

import pytest

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import Mark, Summary, choice

ANIMALS = ("a cat", "a dog", "a red fox", "none of them")
# Every rule below is asked with B, "a dog", being right.
RIGHT = Question("q", ("B",), options=ANIMALS)
UNKNOWN = Question("q", ("B",))


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("B", 1),
        ("b", 1),
        (" B\n", 1),
        ("B.", 1),
        ("(B)", 1),
        ("(b).", 1),
        ("B. a dog", 1),
        ("B) a dog", 1),
        ("(B) whatever", 1),
        ("B: a dog", 1),
        ("a dog", 1),
        ("A Dog.", 1),
        ("A", 0),
        ("A. a dog", 0),
        ("a cat", 0),
        ("dog", 0),
        ("B or C", 0),
        ("Ba dog", 0),
        ("E", 0),
        ("", 0),
    ],
)
def test_letter(answer: str, outcome: float) -> None:
    """Our own rule, as its docstring has it."""
    assert choice.letter(RIGHT, answer) == outcome


def test_letter_of_options_that_are_letters_themselves() -> None:
    swapped = Question("q", ("A",), options=("B", "A"))
    assert choice.letter(swapped, "A") == 1
    assert choice.letter(swapped, "B") == 0
    far = Question("q", ("B",), options=("x", "y"))
    assert choice.letter(far, "Y") == 1
    assert choice.letter(UNKNOWN, "B. a dog") == 1
    assert choice.letter(UNKNOWN, "a dog") == 0


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("B", 1),
        ("B\n", 1),
        ("b", 0),
        ("B.", 0),
        ("(B)", 0),
        ("B. a dog", 1),
        ("B. ", 0),  # LLaVA's generation strips it to "B."
        ("B.a dog", 0),
        ("The answer is B.", 1),
        ("The answer is B", 0),  # the pattern wants one character behind the letter
        ("I think. The answer is B, surely", 1),
        ("The answer is A. The answer is B.", 0),
        ("the answer is B.", 0),
        ("A. The answer is B.", 0),
        ("AB", 0),
        ("a dog", 0),
        ("", 0),
    ],
)
def test_scienceqa(answer: str, outcome: float) -> None:
    """LLaVA's llava/eval/eval_science_qa.py."""
    assert choice.scienceqa(RIGHT, answer) == outcome


def test_scienceqa_knows_five_letters_and_the_options() -> None:
    """eval_science_qa.py: get_pred_idx is -1 beyond the choices, and --options are A to E."""
    assert choice.scienceqa(Question("q", ("E",)), "E") == 1
    assert choice.scienceqa(Question("q", ("F",)), "F") == 0
    assert choice.scienceqa(Question("q", ("F",)), "The answer is F.") == 0
    assert choice.scienceqa(Question("q", ("a dog",), options=ANIMALS), "B") == 1


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("B", 1),
        ("b", 1),
        ("B.", 1),
        ("B. a dog", 1),
        ("B.a dog", 1),
        ("b. a dog", 0),  # the pattern wants a capital, and "b a dog" is not "b"
        ("(B)", 1),
        ("(b).", 1),
        ("B)", 1),
        ("B) a dog", 0),
        ("a dog", 0),
        ("A. B.", 0),
        ("The answer is B.", 0),
        ("\n B", 1),
        ("BB", 0),
        ("", 0),
    ],
)
def test_ai2d(answer: str, outcome: float) -> None:
    """lmms_eval/tasks/ai2d: MultiChoiceRegexFilter of utils.py, exact_match of ai2d.yaml."""
    assert choice.ai2d(RIGHT, answer) == outcome
    assert choice.ai2d(UNKNOWN, answer) == outcome


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("B", 1),
        ("b", 1),
        (" B ", 1),
        ("B.", 1),
        ("B. a dog", 1),
        ("(B)", 0),
        ("Because", 1),
        ("a dog", 0),
        ("A", 0),
        ("AB", 0),
        ("BA", 1),
        ("The answer is B", 0),
        ("", 0),
    ],
)
def test_seed(answer: str, outcome: float) -> None:
    """seed_process_result and seed_aggregation_result of lmms_eval/tasks/seedbench/utils.py."""
    assert choice.seed(RIGHT, answer) == outcome


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("B", 1),
        ("B.", 1),
        ("(B)", 1),
        ("(B).", 1),
        ("B: a dog", 1),
        ("B, surely", 1),
        ("the answer is :B", 1),
        ("b", 0),
        ("A", 0),
        ("A B", 0),
        ("B.a dog", 1),  # no letter by itself, but only one option's text
        ("It is a Dog!", 1),
        ("a dog or a cat", 0),
        ("A dog is there now", 1),  # "A" may be an article: by the text
        ("A is right", 0),
        ("A is not right but B.", 1),  # "A" with more than three words, then "B."
        ("The fox and B", 1),
        ("E", 0),  # E is a letter even where there are four options
        ("E a dog", 0),
        ("dog", 0),
        ("", 0),
        ("Failed to obtain answer via API", 0),
    ],
)
def test_mmbench(answer: str, outcome: float) -> None:
    """can_infer_option, then can_infer_text, of lmms_eval/tasks/mmbench/mmbench_evals.py; no GPT behind."""
    assert choice.mmbench(RIGHT, answer) == outcome


def rotations(*groups: tuple[str, str, tuple[int, ...]]) -> Summary:
    """Of (group, category, marks)."""
    questions: list[Question] = []
    marks: list[float] = []
    for group, category, right in groups:
        questions += [
            Question(f"{len(marks)}{i}", ("A",), category=category, group=group) for i in range(len(right))
        ]
        marks += [float(mark) for mark in right]
    return choice.summarise_mmbench(questions, [""] * len(marks), marks)


def test_mmbench_is_circular_where_there_are_rotations() -> None:
    """eval_sub_data: a question is right if all of its rotations are; hit rates are means over questions."""
    summary = rotations(
        ("1", "x", (1, 1, 1, 1)), ("2", "x", (1, 0, 1)), ("3", "y", (0, 1)), ("", "y", (1,)), ("", "y", (1,))
    )
    assert summary.counted == 5
    assert summary.score == 3 / 5
    assert summary.raw == pytest.approx(60)
    assert summary.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    expected = {"vanilla": 4 / 5, "circular": 3 / 5, "category x": 1 / 2, "category y": 2 / 3}
    assert summary.details == pytest.approx(expected)


def test_mmbench_is_vanilla_without_rotations() -> None:
    summary = rotations(("", "", (1,)), ("", "", (0,)), ("7", "", (1,)))
    assert (summary.score, summary.counted) == (2 / 3, 3)
    assert summary.details == {"vanilla": 2 / 3}


def test_rotations_need_not_follow_each_other() -> None:
    questions = [Question(str(i), ("A",), group=group) for i, group in enumerate("abab")]
    summary = choice.summarise_mmbench(questions, [""] * 4, [1, 1, 1, 0])
    assert (summary.score, summary.details["vanilla"], summary.counted) == (1 / 2, 1, 2)


def test_mmbench_chance() -> None:
    def of(group: str, options: int) -> Question:
        return Question("q", ("A",), group=group, options=tuple("vwxyz"[:options]))

    assert choice.chance_mmbench([of("", 4), of("", 2)]) == (1 / 4 + 1 / 2) / 2
    assert choice.chance_mmbench([of("1", 2), of("1", 2), of("", 4)]) == (1 / 4 + 1 / 4) / 2
    assert choice.chance_mmbench([UNKNOWN, UNKNOWN]) is None


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("B", 1),
        ("B.", 1),
        ("(B)", 1),
        ("(A) or rather (B)", 1),
        ("(B) or rather (A)", 0),
        ("A B", 1),  # both are found and the last counts
        ("B A", 0),
        ("It is A or B or C", 0),
        ("The answer is B", 1),
        ("(B) and then C", 1),  # letters in brackets go first
        ("B. a dog", 1 / 4),
        ("b", 1 / 4),
        ("a dog", 1 / 4),
        ("what I see here is a dog", 1),
        ("what I see is a dog, a cat", 0),
        ("what I see is a cat, a dog", 1),
        ("what I see here is a horse", 1 / 4),
        ("E", 1 / 4),
        ("", 1 / 4),
    ],
)
def test_mmmu_choices(answer: str, outcome: float) -> None:
    """parse_multi_choice_response of MMMU's eval/eval_utils.py; its random draw by what it is worth."""
    assert choice.mmmu(RIGHT, answer) == outcome


@pytest.mark.parametrize(
    "answer, truths, outcome",
    [
        ("12", ("12",), 1),
        ("12.001", ("12",), 1),  # to two digits
        ("12.01", ("12",), 0),
        ("1,200", ("1200",), 1),
        ("The answer is 12", ("12",), 1),
        ("x = 3\ny = 12", ("12",), 1),
        ("x = 12\ny is 3", ("12",), 0),  # "=" counts in the last line alone
        ("12 apples are there", ("12",), 1),  # no marker: the whole answer is searched
        ("12 apples, so 3", ("12",), 0),
        ("It costs $1,200", ("1200",), 1),
        ("1.2e3", ("1200",), 1),
        ("-5", ("5",), 0),
        ("Red", ("red",), 1),
        ("it is dark red", ("red",), 1),
        ("dark", ("dark red",), 0),
        ("option x here", ("x",), 1),
        ("text", ("x",), 0),
        ("blue", ("red", "blue"), 1),
        ("", ("red",), 0),
    ],
)
def test_mmmu_open(answer: str, truths: tuple[str, ...], outcome: float) -> None:
    """parse_open_response and eval_open of MMMU's eval/eval_utils.py."""
    assert choice.mmmu(Question("q", truths), answer) == outcome


def test_mmmu_reads_letters_where_options_are_unknown() -> None:
    cases = {"B": 1, "(B)": 1, "A": 0, "The answer is B": 1, "a dog it is, I would say so": 0, "": 0}
    for answer, outcome in cases.items():
        assert choice.mmmu(UNKNOWN, answer) == outcome


@pytest.mark.parametrize(
    "truth, options, right",
    [
        ("B", ANIMALS, "B"),
        ("b", ANIMALS, "B"),
        (" B ", (), "B"),
        ("a dog", ANIMALS, "B"),
        ("A Dog", ANIMALS, "B"),
        ("x", ("y", "x"), "B"),
        ("A", ("B", "A"), "A"),
    ],
)
def test_the_right_letter(truth: str, options: tuple[str, ...], right: str) -> None:
    assert choice.right_letter(Question("q", (truth,), options=options)) == right


MARKS = (choice.letter, choice.scienceqa, choice.ai2d, choice.seed, choice.mmbench, choice.mmmu)


@pytest.mark.parametrize("mark", MARKS)
def test_an_answer_that_is_no_option_names_the_item(mark: Mark) -> None:
    with pytest.raises(UserError, match="item q9: answers='E' must be one of A, B, C, D or an option's text"):
        mark(Question("q9", ("E",), options=ANIMALS), "B")


@pytest.mark.parametrize("mark", MARKS[:-1])
def test_an_answer_without_options_must_be_a_letter(mark: Mark) -> None:
    with pytest.raises(
        UserError, match="item q9: answers='a dog' must be a letter, or there must be options"
    ):
        mark(Question("q9", ("a dog",)), "B")


@pytest.mark.parametrize("mark", MARKS)
def test_the_right_letter_alone_is_right_for_everyone(mark: Mark) -> None:
    for question in (RIGHT, UNKNOWN):
        assert mark(question, "B") == 1
        assert mark(question, "A") == 0
