"""Open and yes-or-no answers: agreement with lmms-eval on random ones, and where rules differ on purpose."""

from __future__ import annotations

import random
import re

import pytest

from tests.evaluate.lmms_rules import COUNT, hits, load, texts
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import text, vqa, yesno

# Few words, so that annotators agree with each other and with the answer.
FEW = (
    "cat",
    "Cat.",
    "the cat",
    "two",
    "2",
    "dont",
    "don't",
    "red-blue",
    "red, blue",
    "1,000",
    "it's",
    "a",
    "cat?",
)


@pytest.mark.parametrize("task", ["textvqa", "vizwiz_vqa"])
def test_textvqa_and_vizwiz(task: str) -> None:
    theirs = load(f"tasks/{task}/utils.py", "loguru")
    process = getattr(theirs, f"{task}_process_results")
    draw, ours = random.Random(1), []
    for answer in texts(words=FEW, longest=2):
        truths = tuple(texts(10, FEW[: draw.randint(2, len(FEW))], 2, draw.randrange(10**6)))
        ours.append(vqa.evalai(Question("q", truths), answer))
        expected = process({"answers": list(truths), "question_id": 1}, [answer])["exact_match"]
        assert ours[-1] == pytest.approx(expected, abs=1e-12), (answer, truths)
    hits(ours)


def test_the_evalai_processor() -> None:
    theirs = load("tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    for answer in texts(longest=6):
        assert vqa._processed(answer) == theirs(answer)
    for contraction, spelling in theirs.CONTRACTIONS.items():
        assert vqa._CONTRACTIONS.get(contraction, contraction) == spelling
    assert len(vqa._CONTRACTIONS) == len(theirs.CONTRACTIONS) - 2  # "let's" and "she's" stay as they are


def test_vqav2() -> None:
    process = load("tasks/vqav2/utils.py", "loguru").vqav2_process_results_val
    draw, ours = random.Random(2), []
    for answer in texts(words=FEW, longest=2):
        truths = tuple(texts(10, FEW[: draw.randint(1, len(FEW))], 2, draw.randrange(10**6)))
        ours.append(vqa.vqav2(Question("q", truths), answer))
        said = [{"answer": truth, "answer_id": i} for i, truth in enumerate(truths)]
        expected = process({"answers": said, "question_id": 1}, [answer])["exact_match"]
        assert ours[-1] == pytest.approx(expected, abs=1e-12), (answer, truths)
    hits(ours)


def test_vqav2_differs_in_doubled_commas() -> None:
    theirs = load("tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    assert theirs.process_punctuation("1,,2") == "12"
    assert vqa._without_punctuation("1,,2") == "1  2"


def test_gqa_where_the_rules_coincide_and_where_not() -> None:
    metrics = pytest.importorskip("lmms_eval.api.metrics", reason="lmms-eval's metrics need more packages")

    def theirs(answer: str, truth: str) -> float:
        found = metrics.exact_match_hf_evaluate([answer], [truth], ignore_case=True, ignore_punctuation=True)
        return float(found["exact_match"])

    draw, ours = random.Random(8), []
    for answer in texts(4000, ("yes", "No", "left", "cat", "Red", "the"), 2, 8):
        bare = answer.rstrip(".")
        if re.search(r"[^\w\s]", bare) or bare != bare.strip():
            continue
        truth = draw.choice(("yes", "no", "left", "red cat", bare.lower()))
        ours.append(text.gqa(Question("q", (truth,)), answer))
        assert ours[-1] == theirs(answer, truth), (answer, truth)
    assert len(ours) > COUNT
    hits(ours)
    assert (theirs("t-shirt", "tshirt"), text.gqa(Question("q", ("tshirt",)), "t-shirt")) == (1, 0)
    assert (theirs("yes!", "yes"), text.gqa(Question("q", ("yes",)), "yes!")) == (1, 0)


def test_chartqa() -> None:
    theirs = load("tasks/chartqa/utils.py").relaxed_correctness
    draw, ours = random.Random(9), []
    for _ in range(COUNT):
        value = draw.choice((0.0, 12.0, draw.uniform(-100, 100)))
        truth = draw.choice((f"{value:.1f}", f"{value:.0f}%", "Yes", "1,000", "nan", f"{value}"))
        near = f"{value * draw.uniform(0.9, 1.1):.2f}" + draw.choice(("", "", "%"))
        answer = draw.choice((near, truth, truth.upper(), truth + ".", "yes", "inf", "", "%"))
        ours.append(text.chartqa(Question("q", (truth,)), answer))
        assert ours[-1] == float(theirs(answer, truth)), (answer, truth)
    hits(ours)


def test_docvqa() -> None:
    metrics = pytest.importorskip("lmms_eval.api.metrics", reason="lmms-eval's metrics need more packages")
    draw, ours = random.Random(10), []
    for answer in texts(longest=3, seed=10):
        truths = tuple(texts(draw.randint(1, 3), longest=3, seed=draw.randrange(10**6)))
        if draw.random() < 0.5:
            place = draw.randrange(len(answer) + 1)
            truths = (*truths, answer[:place] + draw.choice("xyz ") + answer[place + draw.randint(0, 2) :])
        ours.append(text.docvqa(Question("q", truths), answer))
        expected = metrics.anls(list(truths), [answer])["anls"]
        assert ours[-1] == pytest.approx(expected, abs=1e-12), (answer, truths)
    hits(ours)


def test_pope_where_the_answer_is_the_word() -> None:
    theirs = load("tasks/pope/utils.py")
    draw = random.Random(3)
    questions, answers, results = [], [], []
    for i in range(COUNT):
        questions.append(Question(str(i), (draw.choice(("yes", "no")),)))
        answers.append(draw.choice(("yes", "no", "Yes", "No")))
        doc = {"answer": questions[-1].answers[0], "question_id": i}
        results.append(theirs.pope_process_results(doc, [answers[-1]])["pope_accuracy"])
    marks = [yesno.pope(question, answer) for question, answer in zip(questions, answers, strict=True)]
    hits(marks)
    summary = yesno.summarise_pope(questions, answers, marks)
    assert summary.score == pytest.approx(theirs.pope_aggregate_accuracy(results))
    for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
        assert summary.details[name] == pytest.approx(getattr(theirs, f"pope_aggregate_{key}")(results))


def test_pope_reads_sentences_where_lmms_eval_does_not() -> None:
    theirs = load("tasks/pope/utils.py")
    for answer, truth in (("Yes.", "yes"), ("No, there is not.", "no"), ("", "yes")):
        doc = {"answer": truth, "question_id": 0}
        assert theirs.pope_process_results(doc, [answer])["pope_accuracy"]["score"] == 0
        assert yesno.pope(Question("q", (truth,)), answer) == 1
    # And its rate of yes is that of the truths.
    said_no = [{"prediction": "no", "ground_truth": "yes", "score": 0.0}]
    assert theirs.pope_aggregate_yes_ratio(said_no) == 1
    assert yesno.summarise_pope([Question("q", ("yes",))], ["no"], [0.0]).details["yes_rate"] == 0


def test_mme() -> None:
    theirs = load("tasks/mme/utils.py", "loguru")
    draw = random.Random(4)
    answers = [answer for answer in texts(5000) if not re.match(r"\W*\.|[yn]$|\.", answer, re.IGNORECASE)]
    answers = [answer for answer in answers if "." not in answer[:4]][: 2 * COUNT]
    answers += draw.choices(("yes", "Yes.", "no", "No, never", "not", "maybe"), k=2 * COUNT)
    names = (*yesno.PERCEPTION[:-1], "OCR", *yesno.COGNITION)
    for part in (yesno.PERCEPTION, yesno.COGNITION):
        chosen = [name for name in names if name.lower() in part]
        questions, results, said = [], [], []
        for i in range(COUNT // 2):
            category = draw.choice(chosen)
            for truth in ("yes", "no"):
                said.append(draw.choice(answers))
                questions.append(Question(f"{i}{truth}", (truth,), category=category, images=(f"{i}.jpg",)))
                doc = {"answer": truth, "category": category, "question_id": i}
                results.append(next(iter(theirs.mme_process_results(doc, [said[-1]]).values())))
        marks = [yesno.mme(question, answer) for question, answer in zip(questions, said, strict=True)]
        assert marks == [result["score"] for result in results]
        hits(marks)
        assert yesno.summarise_mme(questions, said, marks).raw == pytest.approx(
            theirs.mme_aggregate_results(results)
        )


def test_mme_reads_single_letters_in_lmms_eval_alone() -> None:
    parse = load("tasks/mme/utils.py", "loguru").parse_pred_ans
    for answer, truth in (("y", "yes"), ("N", "no"), ("....no", "no")):
        assert parse(answer) == truth
        assert yesno.mme(Question("q", (truth,)), answer) == 0
