"""Marks by what ten annotators said: VQAv2, TextVQA and VizWiz. No jax."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from vlmscale.evaluate.questions import Question

_ENOUGH = 3  # annotators who agree make an answer fully right
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The authors wrote (?!<=\d) where they meant (?<!\d): it looks for "<=" and holds at every full stop, so that
# "1." loses its own too. And they handed re.UNICODE, which is 32, to sub() as the count.
_FULL_STOP, _FULL_STOPS_REMOVED = re.compile(r"\.(?!\d)"), 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(value)
    for value, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
# How the authors spell contractions; each is also found with any one of its apostrophes left out.
_SPELLINGS = """
    'ow's'at 'twas I'd've I'm I've ain't aren't can't could've couldn't couldn't've didn't doesn't don't
    hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    spelling[:i] + spelling[i + 1 :]: spelling
    for spelling in _SPELLINGS.split()
    for i, character in enumerate(spelling)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the one that the authors have the wrong way round


def vqav2(question: Question, answer: str) -> float:
    """VQAv2: how many of the annotators gave this answer, three of them making it fully right.

    Rule: processPunctuation, processDigitArticle and the leave-one-out mean of the authors' vqaEval.py
    (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation). The formula of the paper (arXiv
    1505.00468) is min(n/3, 1); the code, which is followed, averages it over the subsets of nine annotators.

    The authors' code normalises both sides only where the annotators differ: where all ten say "yes", the
    answer "Yes" is wrong for it. LLaVA runs its answers through the EvalAI processor before it hands them in,
    and lmms-eval normalises always; so does this. Where annotators differ it is the authors' code to the
    letter. lmms-eval also takes "1,,2" for a number with a comma in it.

    With other than ten annotators the mean is over as many subsets as there are; see `_agreement`.
    """
    return _agreement([_normalised(truth) for truth in question.answers], _normalised(answer))


def evalai(question: Question, answer: str) -> float:
    """TextVQA and VizWiz: the VQA accuracy of texts that went through the EvalAI answer processor.

    Rule: EvalAIAnswerProcessor and TextVQAAccuracyEvaluator of LLaVA's llava/eval/m4c_evaluator.py (from
    MMF's pythia/tasks/processors.py), as lmms-eval has them for both. The processor lowers the case first,
    takes every comma and question mark out and sets "'s" off as a word, then normalises as VQAv2 does.

    With other than ten annotators the mean is over as many subsets as there are; see `_agreement`.
    """
    return _agreement([_processed(truth) for truth in question.answers], _processed(answer))


def _agreement(truths: Sequence[str], answer: str) -> float:
    """Mean over the annotators of min(1, n/3), n being how many of the others gave this answer.

    The formula is for ten. Of fewer than four there are no three others: then all others are enough, and of a
    single one an equal text.
    """
    if len(truths) == 1:
        return float(answer == truths[0])
    same, enough = sum(truth == answer for truth in truths), min(_ENOUGH, len(truths) - 1)
    return math.fsum(min(1.0, (same - (truth == answer)) / enough) for truth in truths) / len(truths)


def _processed(text: str) -> str:
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _normalised(lowered)


def _normalised(text: str) -> str:
    """A text as VQA compares it: no punctuation, articles or case, digits for number words, apostrophes."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Punctuation next to a space vanishes and other becomes a space; in a text with "1,000" all vanishes."""
    numeric = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if numeric or beside_space else " ")
    return _FULL_STOP.sub("", cleaned, count=_FULL_STOPS_REMOVED)
