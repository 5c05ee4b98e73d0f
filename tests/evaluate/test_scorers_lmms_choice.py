"""Choices and MathVista: agreement with lmms-eval on random answers, and where rules differ on purpose."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
import types
from typing import Any

import pytest

from tests.evaluate.lmms_rules import COUNT, WORDS, hits, load, texts
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import choice
from vlmscale.evaluate.scorers.mathvista import mathvista

ANIMALS = ("a cat", "a dog", "a red fox", "none of them")
CHOICES = (*WORDS, *ANIMALS, "A", "B", "C", "D", "a", "b", "A.", "B.", "(B)", "(C)", "what", "shown")


def test_scienceqa_where_the_rules_coincide() -> None:
    process = load("tasks/scienceqa/utils.py").sqa_process_results
    ours = []
    letters = [f"{letter}{rest}" for letter in "ABCD" for rest in ("", ". a dog", ". ?")] * 20
    for answer in texts(2000, CHOICES, 2, 5) + letters:
        if (
            answer in tuple("abcd")
            or re.match(r"[A-Z]\.(?! )", answer)
            or re.search(r"The answer is [A-Z].", answer)
        ):
            continue
        for right in range(4):
            question = Question("q", ("ABCD"[right],), options=ANIMALS)
            ours.append(choice.scienceqa(question, answer))
            assert ours[-1] == process({"choices": ANIMALS, "answer": right}, [answer])["exact_match"], answer
    assert len(ours) > 4 * COUNT
    hits(ours)


def test_scienceqa_where_they_differ() -> None:
    process = load("tasks/scienceqa/utils.py").sqa_process_results
    for answer, theirs, ours in (("b", 1, 0), ("B.", 1, 0), ("B.x", 1, 0), ("The answer is B.", 0, 1)):
        assert process({"choices": ANIMALS, "answer": 1}, [answer])["exact_match"] == theirs
        assert choice.scienceqa(Question("q", ("B",), options=ANIMALS), answer) == ours


def test_seed() -> None:
    theirs = load("tasks/seedbench/utils.py")
    ours = []
    for answer in texts(words=CHOICES, longest=2, seed=6):
        for right in "ABCD":
            ours.append(choice.seed(Question("q", (right,), options=ANIMALS), answer))
            doc = {"answer": right, "data_type": "image", "question_id": 0}
            result = theirs.seed_process_result(doc, [answer])["seed_all"]
            assert ours[-1] == theirs.seed_aggregation_result([result]), answer
    hits(ours)


def test_ai2d() -> None:
    pytest.importorskip("datasets", reason="lmms-eval's filters need datasets")
    theirs = load("tasks/ai2d/utils.py", "loguru").MultiChoiceRegexFilter(
        regex_pattern="([A-Z])\\.", group_select=0, ignore_case=True, ignore_punctuation=True
    )
    metrics = pytest.importorskip("lmms_eval.api.metrics", reason="lmms-eval's metrics need more packages")
    ours = []
    for answer in texts(words=CHOICES, longest=2, seed=7):
        filtered = theirs.apply([[answer]], [{}])
        for right in "ABCD":
            ours.append(choice.ai2d(Question("q", (right,), options=ANIMALS), answer))
            expected = metrics.exact_match_hf_evaluate(
                filtered, [right], ignore_case=True, ignore_punctuation=True
            )
            assert ours[-1] == expected["exact_match"], answer
    hits(ours)


def test_mmbench() -> None:
    evaluator = load("tasks/mmbench/mmbench_evals.py", "loguru", "pandas", "requests").MMBench_Evaluator()
    ours = []
    for answer in texts(words=CHOICES, longest=5, seed=11):
        inferred = evaluator.can_infer(answer, dict(zip("ABCD", ANIMALS, strict=True)))
        for right in "ABCD":
            ours.append(choice.mmbench(Question("q", (right,), options=ANIMALS), answer))
            assert ours[-1] == float(inferred == right), answer
    hits(ours)


def test_mmbench_rotations() -> None:
    pandas = pytest.importorskip("pandas", reason="lmms-eval's MMBench needs pandas")
    evaluator = load("tasks/mmbench/mmbench_evals.py", "loguru", "pandas", "requests").MMBench_Evaluator()
    draw = random.Random(12)
    for _ in range(50):
        # Only letters: where nothing is inferred, lmms-eval goes on to rules of its own.
        rows: list[dict[str, Any]] = [
            {"index": i, "answer": draw.choice("AB"), "prediction": draw.choice("ABC")}
            | dict(zip("ABCD", ANIMALS, strict=True))
            for i in range(draw.randint(1, 3))
        ]
        truths = {row["index"]: row["answer"] for row in rows}
        expected = evaluator.eval_sub_data(pandas.DataFrame(rows), truths, static_only=True)
        questions = [
            Question(str(row["index"]), (row["answer"],), options=ANIMALS, group="g") for row in rows
        ]
        marks = [
            choice.mmbench(question, row["prediction"]) for question, row in zip(questions, rows, strict=True)
        ]
        assert choice.summarise_mmbench(questions, [""] * len(rows), marks).score == expected


def test_mmmu_open() -> None:
    theirs = load("tasks/mmmu/utils.py", "loguru", "yaml")
    draw, ours = random.Random(13), []
    words = (
        *WORDS,
        "12",
        "1,200",
        "1.2e3",
        "-5",
        "12.001",
        ".5",
        "12.",
        "therefore",
        "the answer is",
        "x =",
        "Red",
    )
    for answer in texts(words=words, longest=4, seed=13):
        truths = tuple(draw.choice(("12", "1200", "red", "x", "0.5", "-5", "cat", "a dog")) for _ in range(2))
        ours.append(choice.mmmu(Question("q", truths), answer))
        expected = theirs.eval_open(list(truths), theirs.parse_open_response(answer))
        assert ours[-1] == float(expected), (answer, truths)
    hits(ours)


def test_mmmu_choices_where_the_rules_coincide(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = load("tasks/_task_utils/mmmu_mcq_utils.py", "numpy")
    monkeypatch.setattr(theirs.random, "choice", lambda letters: "")
    ours: list[float] = []
    for answer in texts(4000, CHOICES, 7, 14):
        # lmms-eval also finds a letter at the end of a word, or in front of a full stop.
        if re.search(r"[^ (][A-D][,.!?;:']*( |$)|[A-D]\.", answer):
            continue
        names = dict(zip("ABCD", ANIMALS, strict=True))
        said: Any = theirs.parse_mmmu_multi_choice_response(answer, list(names), names)
        for right in "ABCD":
            ours.append(choice.mmmu(Question("q", (right,), options=ANIMALS), answer))
            assert ours[-1] == (float(said == right) if said else 1 / 4), answer
    assert len(ours) > 4 * COUNT
    assert {0.0, 0.25, 1.0} <= set(ours)


def test_mmmu_choices_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = load("tasks/_task_utils/mmmu_mcq_utils.py", "numpy")
    monkeypatch.setattr(theirs.random, "choice", lambda letters: "")
    names = dict(zip("ABCD", ANIMALS, strict=True))
    for answer in ("B. a dog", "USB port"):
        assert theirs.parse_mmmu_multi_choice_response(answer, list(names), names) == "B"
        assert choice.mmmu(Question("q", ("B",), options=ANIMALS), answer) == 1 / 4


def test_mathvista(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the extraction on: before it lmms-eval asks a model, for which it wants a key."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    if importlib.util.find_spec("Levenshtein") is None:  # which lmms-eval does not ask for; it has its own
        metrics = pytest.importorskip(
            "lmms_eval.api.metrics", reason="lmms-eval's metrics need more packages"
        )
        own = types.ModuleType("Levenshtein")
        monkeypatch.setattr(own, "distance", metrics.levenshtein_distance, raising=False)
        monkeypatch.setitem(sys.modules, "Levenshtein", own)
    theirs = load("tasks/mathvista/mathvista_evals.py", "loguru").MathVistaEvaluator
    normalise, equal = theirs.normalize_extracted_answer, theirs.safe_equal
    evaluator = theirs.__new__(theirs)
    draw, ours = random.Random(15), []
    for word in texts(words=(*CHOICES, "tokyo", "osaka"), longest=2, seed=15):
        kind = draw.choice(("text", "integer", "float"))
        options, truth, precision = ANIMALS if kind == "text" else (), "a dog", None
        extraction = draw.choice(("a dog", "B", "A", "(B)", word.replace('"', "").replace("\n", " ")))
        if kind != "text":
            precision = draw.choice((1, 2))
            value = round(draw.uniform(-3, 3), precision)
            truth = str(int(value)) if kind == "integer" else str(value)
            extraction = draw.choice((truth, f"{value + draw.uniform(-0.1, 0.1):.3f}", "five"))
        question = Question("q", (truth,), options=options, answer_type=kind, precision=precision)
        ours.append(mathvista(question, f'The answer is "{extraction}".'))
        asked = "multi_choice" if options else "free_form"
        said = normalise(evaluator, extraction, list(options), asked, kind, precision)
        assert ours[-1] == float(equal(evaluator, said, truth)), (extraction, question)
    hits(ours)
