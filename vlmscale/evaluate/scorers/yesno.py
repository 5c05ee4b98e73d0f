"""Marks and summaries of yes and no questions: POPE and MME. No jax."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import Summary, mean

_SAYS_NO = frozenset(("No", "not", "no"))
_PREFIX = 4  # characters in which MME looks for yes or no
_PERCENT = 100.0
_FULL = 200.0  # points of an MME category
_CATEGORIES = 14
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "ocr",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope(question: Question, answer: str) -> float:
    """POPE: an answer means no where its first sentence has the word "No", "no" or "not", and yes otherwise.

    Rule: the authors' evaluate.py (github.com/AoiDragon/POPE), which LLaVA's llava/eval/eval_pope.py copied:
    text up to the first full stop, commas taken out, words split at single spaces. "NO" and "no!" are
    therefore a yes, and so is an empty answer. The paper (arXiv 2305.10355) does not go into it.
    lmms-eval compares the whole text, lowered, with "yes" or "no": "Yes." and "No, there is not" are wrong
    for it whatever the truth is.

    Raises:
      UserError: the right answer is not yes or no.
    """
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    said = "no" if _SAYS_NO.intersection(words) else "yes"
    return float(said == _truth(question))


def summarise_pope(questions: Sequence[Question], answers: Sequence[str], marks: Sequence[float]) -> Summary:
    """POPE: accuracy, with precision, recall and F1 of "yes", and the rate of "yes".

    LLaVA-1.5 (arXiv 2310.03744) reports the F1 of each of random, popular and adversarial, and papers since
    then their mean; that is f1_mean where there is more than one category. What would be divided by nothing
    is 0. What was said is taken from the marks, so that a missing answer is a wrong one.
    """
    score, stderr = mean(marks)
    pairs = [(_truth(question), mark == 1) for question, mark in zip(questions, marks, strict=True)]
    details = _retrieval(pairs)
    categories: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        categories.setdefault(question.category or "other", []).append(place)
    if len(categories) > 1:
        f1s = []
        for name, places in sorted(categories.items()):
            details[f"category {name}"] = mean([marks[place] for place in places])[0]
            f1s.append(_retrieval([pairs[place] for place in places])["f1"])
            details[f"f1 {name}"] = f1s[-1]
        details["f1_mean"] = math.fsum(f1s) / len(f1s)
    return Summary(score, stderr, _PERCENT * score, len(marks), details)


def mme(question: Question, answer: str) -> float:
    """MME: an answer is yes or no if it is that word, or has it within its first four characters.

    Rule: parse_pred_ans of the authors' eval_tool/calculation.py, on the text in lower case: "yes" is looked
    for first; where neither is found the answer is "other", which is wrong. "Not sure" and "know" are thus a
    no. lmms-eval also takes full stops out and reads "y" and "n", which the authors call other.

    Raises:
      UserError: the right answer is not yes or no.
    """
    start = answer.strip().lower()[:_PREFIX]
    said = "yes" if "yes" in start else "no" if "no" in start else "other"
    return float(said == _truth(question))


def summarise_mme(questions: Sequence[Question], answers: Sequence[str], marks: Sequence[float]) -> Summary:
    """MME: of each category accuracy plus accuracy+ in percent, summed over categories.

    accuracy+ is the share of pictures of which both questions were answered right (arXiv 2306.13394, section
    2.1; eval_tool/calculation.py, which pairs the lines of a file two by two). Two questions belong together
    by `group`, else by picture, else as they follow each other in their category. `raw` is the sum,
    `score` the same over 2800, also where some of the fourteen categories are missing; of categories that are
    not the authors', or of none, over 200 for each.

    The standard error takes pictures as independent: of v = (accuracy + accuracy+)/200 of a picture, the
    variance of the mean within each category, summed over categories. `counted` is pictures.

    Raises:
      UserError: a picture does not have two questions, or a right answer is not yes or no.
    """
    found: dict[str, list[float]] = {}
    for (category, name), members in _pairs(questions, marks).items():
        if len(members) != 2:
            raise UserError(
                f"MME: category {category}, {name}: has {len(members)} question(s) where there must be 2; "
                f"give both questions of a picture the same group, or the same image"
            )
        both = float(sum(members) == 2)
        found.setdefault(category, []).append((sum(members) / 2 + both) / 2)
    means = {category: mean(values) for category, values in found.items()}
    points = {category: _FULL * average for category, (average, _) in sorted(means.items())}
    raw = math.fsum(points.values())
    stderr = math.sqrt(math.fsum(error**2 for _, error in means.values())) / len(means)
    counted = sum(len(values) for values in found.values())
    share = _share(points)
    details = _sums(points) | {f"category {category}": value for category, value in points.items()}
    return Summary(share * raw / (_FULL * len(points)), share * stderr, raw, counted, details)


def chance_mme(questions: Sequence[Question]) -> float:
    """Score of guessing: half of the questions, a quarter of the pictures."""
    return 0.375 * _share({question.category or "other": 0.0 for question in questions})


def _share(points: dict[str, float]) -> float:
    """What part of MME the categories are: the authors' fourteen are all of it, of others nobody knows."""
    official = all(category.lower() in PERCEPTION + COGNITION for category in points)
    return len(points) / _CATEGORIES if official else 1.0


def _sums(points: dict[str, float]) -> dict[str, float]:
    """Points of perception, of cognition and of categories that are not the authors'."""
    sums: dict[str, float] = {}
    for category, value in points.items():
        name = category.lower()
        part = "perception" if name in PERCEPTION else "cognition" if name in COGNITION else "other"
        sums[part] = sums.get(part, 0.0) + value
    return sums


def _pairs(questions: Sequence[Question], marks: Sequence[float]) -> dict[tuple[str, str], list[float]]:
    """Marks of the questions that belong together, by category and by what they share."""
    pairs: dict[tuple[str, str], list[float]] = {}
    alone: dict[str, int] = {}
    for question, mark in zip(questions, marks, strict=True):
        _truth(question)
        category = question.category or "other"
        if question.group:
            name = f"group {question.group}"
        elif question.images:
            name = f"image {', '.join(question.images)}"
        else:
            alone[category] = alone.get(category, -1) + 1
            name = f"pair {alone[category] // 2 + 1} of those without group and image"
        pairs.setdefault((category, name), []).append(mark)
    return pairs


def _retrieval(pairs: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Precision, recall and F1 of saying yes, and how often it was said."""
    hits = sum(truth == "yes" and right for truth, right in pairs)
    yeses = sum((truth == "yes") == right for truth, right in pairs)
    truths = sum(truth == "yes" for truth, _ in pairs)
    precision = hits / yeses if yeses else 0.0
    recall = hits / truths if truths else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_rate": yeses / len(pairs)}


def _truth(question: Question) -> str:
    truth = question.answers[0].strip().lower()
    if truth not in ("yes", "no") or len(question.answers) > 1:
        raise UserError(f"item {question.id}: answers={list(question.answers)} must be yes or no")
    return truth
