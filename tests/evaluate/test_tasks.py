"""The table of benchmarks: the exact prompts, groups of tasks, and scores with answers missing or unknown."""

from __future__ import annotations

import math

import pytest

from vlmscale.errors import UserError
from vlmscale.evaluate import tasks
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.tasks import BENCHMARKS, GROUPS, OWN, Scored, asked, check, expand_tasks, rule_of

CAT = Question("1", ("cat",), "What is it?")
CHOICE = Question("1", ("B",), "Which is it?", options=("a cat", "a dog"))


def score(task: str, questions: list[Question], answers: dict[str, str]) -> Scored:
    """By the rule that the task's name has."""
    return tasks.score(task, rule_of(task, questions), questions, answers)


@pytest.mark.parametrize(
    "task, question, prompt",
    [
        ("vqav2", CAT, "What is it?\nAnswer the question using a single word or phrase."),
        ("gqa", CAT, "What is it?\nAnswer the question using a single word or phrase."),
        ("textvqa", CAT, "What is it?\nAnswer the question using a single word or phrase."),
        ("pope", CAT, "What is it?\nAnswer the question using a single word or phrase."),
        ("mme", CAT, "What is it?\nAnswer the question using a single word or phrase."),
        ("docvqa", CAT, "What is it?\nAnswer the question using a single word or phrase."),
        ("chartqa", CAT, "What is it?\nAnswer the question with a single word."),
        ("mathvista", CAT, "What is it?"),
        (
            "vizwiz",
            CAT,
            "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
        ),
        *(
            (
                task,
                CHOICE,
                "Which is it?\nA. a cat\nB. a dog\n"
                "Answer with the option's letter from the given choices directly.",
            )
            for task in ("mmbench", "scienceqa", "ai2d", "seed", "mmmu")
        ),
        (
            "mmbench",
            Question("1", ("B",), "Which?", options=("a cat", "a dog"), hint="It barks."),
            "It barks.\nWhich?\nA. a cat\nB. a dog\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        ("gqa", Question("1", ("x",), "What?", template="Q: {question} A:"), "Q: What? A:"),
        ("gqa", Question("1", ("x",), "Is {hint} or {options} or {0} seen?", template="{question}"),
         "Is {hint} or {options} or {0} seen?"),
    ],
)  # fmt: skip
def test_the_prompt(task: str, question: Question, prompt: str) -> None:
    assert asked(BENCHMARKS[task], question) == prompt


def test_prompts_of_ones_own_tasks() -> None:
    assert asked(OWN["exact_match"], CAT) == "What is it?"
    assert asked(OWN["letter"], CHOICE) == asked(BENCHMARKS["mmbench"], CHOICE)


def test_every_prompt_asks_the_question_once() -> None:
    for benchmark in BENCHMARKS.values():
        assert benchmark.prompt.count("{question}") == 1
        assert asked(benchmark, CAT).count("What is it?") == 1


def test_groups_hold_every_benchmark_once() -> None:
    assert sorted(task for tasks in GROUPS.values() for task in tasks) == sorted(BENCHMARKS)
    assert GROUPS["ocr"] == ("docvqa", "textvqa")


def test_expand_tasks() -> None:
    assert expand_tasks(["gqa", "ocr", "gqa", "mine"]) == ["gqa", "docvqa", "textvqa", "mine"]
    assert expand_tasks(["textvqa", "ocr"]) == ["textvqa", "docvqa"]


def test_the_rule_of_a_task() -> None:
    assert rule_of("mine", [CAT]) == "exact_match"
    assert rule_of("mine", [CAT, CHOICE]) == "letter"
    assert rule_of("letter", [CAT]) == "letter"
    assert rule_of("gqa", [CHOICE]) == "gqa"
    for name, told in (
        ("ocr", "is a group; name one of docvqa, textvqa"),
        ("GQA", "write gqa"),
        ("../gqa", "a name has letters"),
        ("gqa@0", "a name has letters"),
        ("", "a name has letters"),
    ):
        with pytest.raises(UserError, match=told):
            rule_of(name, [CAT])


def test_what_would_stop_the_scoring_is_found_before() -> None:
    check("mmbench", [CHOICE])
    with pytest.raises(UserError, match="item 1: answers='cat' must be a letter"):
        check("mmbench", [CAT])
    with pytest.raises(UserError, match="has 1 question"):
        check("mme", [Question("1", ("no",), images=("a.jpg",))])
    with pytest.raises(UserError, match="must be yes or no"):
        check("pope", [Question("1", ("yes", "no"))])


def test_score_of_zeros_and_ones() -> None:
    questions = [Question(str(i), ("cat",)) for i in range(10)]
    scored = score("gqa", questions, {str(i): "Cat." if i < 7 else "dog" for i in range(10)})
    assert scored.summary.score == 0.7
    assert scored.summary.raw == pytest.approx(70)
    assert scored.summary.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 10))
    assert (scored.n_items, scored.n_missing, scored.summary.counted) == (10, 0, 10)
    assert (scored.task, scored.metric, scored.scorer, scored.chance) == ("gqa", "accuracy", "gqa/1", 0)
    assert scored.marks == {str(i): float(i < 7) for i in range(10)}


def test_a_missing_answer_is_wrong_whatever_the_rule_says_of_an_empty_one() -> None:
    """An empty answer is a yes for POPE, and MMMU would draw: a missing one is neither."""
    pope = score("pope", [Question("1", ("yes",)), Question("2", ("no",))], {"2": "no"})
    assert (pope.summary.score, pope.n_missing, pope.marks) == (0.5, 1, {"1": 0, "2": 1})
    mmmu = score("mmmu", [CHOICE], {})
    assert (mmmu.summary.score, mmmu.n_missing) == (0, 1)
    assert score("mmmu", [CHOICE], {"1": ""}).summary.score == 0.5


def test_answers_to_no_question_are_refused() -> None:
    with pytest.raises(UserError, match=r"answer to 2: no item has this id \(2 such answers\)"):
        score("gqa", [CAT], {"1": "cat", "3": "x", "2": "y"})


def test_chance() -> None:
    assert score("mmbench", [CHOICE], {}).chance == 0.5
    assert (
        score("ai2d", [CHOICE, Question("2", ("B",), options=tuple("wxyz"))], {}).chance
        == (1 / 2 + 1 / 4) / 2
    )
    assert score("ai2d", [Question("1", ("B",))], {}).chance is None
    assert score("pope", [Question("1", ("no",))], {}).chance == 0.5
    assert score("mine", [CHOICE], {}).chance == 0.5
    # Of a picture of MME: accuracy 1/2 and accuracy+ 1/4, by (accuracy + accuracy+)/2.
    pair = [Question(str(i), ("no",), images=("a.jpg",)) for i in range(2)]
    assert score("mme", pair, {}).chance == (1 / 2 + 1 / 4) / 2


def test_details_are_by_category() -> None:
    questions = [Question(str(i), ("cat",), category="xy"[i % 2]) for i in range(4)]
    assert score("gqa", questions, {"0": "cat", "1": "dog", "2": "cat", "3": "cat"}).summary.details == {
        "category x": 1,
        "category y": 0.5,
    }
    assert score("gqa", questions[::2], {}).summary.details == {}


RIGHT = {
    "vqav2": ("cat", "Cat"), "vizwiz": ("cat", "a cat"), "textvqa": ("cat", "cat."), "gqa": ("cat", "cat"),
    "pope": ("no", "No."), "mme": ("yes", "Yes"), "mmbench": ("B", "B."), "scienceqa": ("B", "B"),
    "ai2d": ("B", "B. a dog"), "seed": ("B", "B."), "mmmu": ("B", "(B)"), "mathvista": ("5", "5"),
    "chartqa": ("100", "104"), "docvqa": ("cat", "CAT"),
}  # fmt: skip


@pytest.mark.parametrize("task", sorted(BENCHMARKS))
def test_every_benchmark_scores_its_right_answers(task: str) -> None:
    truth, answer = RIGHT[task]
    truths = (truth,) * (10 if task in ("vqav2", "vizwiz", "textvqa") else 1)
    questions = [Question(str(i), truths, images=("a.jpg",)) for i in range(2)]
    scored = score(task, questions, {"0": answer, "1": answer})
    assert (scored.summary.score, scored.summary.stderr, scored.n_missing) == (1, 0, 0)
    assert score(task, questions, {}).summary.score == 0
