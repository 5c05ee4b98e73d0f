"""Marks of short open answers: word for word, GQA, ChartQA and DocVQA. No jax.

White space around an answer is no part of it in any scorer here: LLaVA strips what its models generate before
it writes an answer file, and lmms-eval strips it before it scores.
"""

from __future__ import annotations

from vlmscale.evaluate.questions import Question

_TOLERANCE = 0.05
_ANLS_THRESHOLD = 0.5


def exact_match(question: Question, answer: str) -> float:
    """1 where the answer is word for word one of the right ones, case and punctuation counted."""
    return float(answer.strip() in {truth.strip() for truth in question.answers})


def gqa(question: Question, answer: str) -> float:
    """GQA: equality of the whole answer with the right one.

    The authors' eval.py compares two texts for equality and leaves to the model to write in lower case.
    LLaVA's scripts/convert_gqa_for_eval.py, which its published numbers went through, drops full stops at the
    end and lowers the case before that; this is the rule here, of both sides: the
    official truths are so already. lmms-eval drops all ASCII punctuation and
    lowers both sides, so that "t-shirt" is right for it where the truth is "tshirt", and here it is not.
    """
    return float(_plain(answer) in {_plain(truth) for truth in question.answers})


def chartqa(question: Question, answer: str) -> float:
    """ChartQA: relaxed correctness, numbers within 5 % and everything else word for word without case.

    Paper: arXiv 2203.10244, end of section 5.1. It leaves open what a number is; the rule here is the one
    that its numbers are reported by since Pix2Struct (Qwen-VL's eval_mm/evaluate_vqa.py, lmms-eval): a text
    that float() reads, "12%" being 0.12; a truth of 0 is compared as a text, as nothing is within 5 % of it.
    Thus "5" is wrong where the truth is "5%", and "1,000" is no number.
    """
    return float(any(_relaxed(answer.strip(), truth) for truth in question.answers))


def docvqa(question: Question, answer: str) -> float:
    """DocVQA: ANLS, the normalised Levenshtein similarity to the nearest right answer, 0 below 0.5.

    Paper: arXiv 1907.00490, equation 1. Paper and code differ at exactly half: by the paper a distance of 0.5
    counts 0, by the authors' script of the Robust Reading Competition (and by lmms-eval, which has it) the
    similarity of 0.5. The script is followed. It lowers the case and joins white space to single spaces for
    the distance, yet divides by the longer of the two as they were written; so does this.
    """
    given = answer.strip()
    similarity = max(_similarity(given, truth) for truth in question.answers)
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def distance(one: str, other: str) -> int:
    """Levenshtein distance: fewest characters to insert, delete or replace."""
    if len(one) < len(other):
        one, other = other, one
    above = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        row = [i]
        for j, right in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


def _similarity(answer: str, truth: str) -> float:
    length = max(len(answer), len(truth))
    if not length:
        return 1.0
    return 1 - distance(" ".join(answer.lower().split()), " ".join(truth.lower().split())) / length


def _relaxed(answer: str, truth: str) -> bool:
    given, right = _number(answer), _number(truth)
    if given is None or not right:  # nothing is within 5 % of 0
        return answer.lower() == truth.lower()
    return abs(given - right) / abs(right) <= _TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
