"""Marks of multiple choice: ScienceQA, AI2D, SEED-Bench, MMBench, MMMU and files of one's own. No jax.

The right answer is a letter, or one of the options' text; options may be unknown, where rules that read the
letter still work.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import Summary, by_category, mean, open_answer

_FIRST = tuple("ABCDE")  # letters where options are unknown, and all that ScienceQA and MMBench look for
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:,]?")
_LETTER_AND_MORE = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s.*", re.DOTALL)
_SCIENCEQA = re.compile(r"The answer is ([A-Z]).")
_AI2D = re.compile(r"\s*([A-Z])\.")
# What may stand around a letter, in the order that MMBench tries it.
_AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_QUANTIFIED = 3  # words above which MMBench holds an "A" for an article
_WORDY = 5  # words above which MMMU looks for the options' texts


def letter(question: Question, answer: str) -> float:
    """For tasks of one's own: the letter ("B", "B.", "(B)", "B. text") or the option's text, in any case.

    A letter of the question goes before a text, so that "a" means option A also where an option reads "a";
    a word that only begins with a letter ("a cat") is no letter.
    """
    right, text, options = right_letter(question), answer.strip(), _options(question)
    for form in (_LETTER_ALONE, _LETTER_AND_MORE):
        if found := form.fullmatch(text):
            said = "".join(name for name in found.groups() if name).upper()
            if not options or said in options:
                return float(said == right)
    return float(right in options and _plain(text) == _plain(options[right]))


def scienceqa(question: Question, answer: str) -> float:
    """ScienceQA as LLaVA scores it: a letter from A to E, "B. text", or "The answer is B." exactly once.

    Rule: llava/eval/eval_science_qa.py. Everything else, and a letter beyond the options, is wrong. The
    authors' own code (github.com/lupantech/ScienceQA) guesses at random instead. lmms-eval also takes "b" and
    "B.text" and does not read "The answer is B.".
    """
    right, text = right_letter(question), answer.strip()
    said = ""
    if text in _FIRST:
        said = text
    elif text[:1] in _FIRST and text[1:3] == ". ":
        said = text[0]
    elif len(found := _SCIENCEQA.findall(text)) == 1:
        said = found[0]
    return float(said == right and said in _FIRST[: len(question.options) or len(_FIRST)])


def ai2d(question: Question, answer: str) -> float:
    """AI2D as lmms-eval scores it: the letter in front of a full stop, else the whole answer, is the letter.

    Rule: lmms_eval/tasks/ai2d: MultiChoiceRegexFilter, whose pattern is fixed in its code (the regex_pattern
    of ai2d.yaml goes unused), then exact_match without case and ASCII punctuation. "(b)" is right, "B) text"
    and an option's text are wrong. The paper (arXiv 1603.07396) has no rule for generated text.
    """
    text = answer.strip()
    if found := _AI2D.match(text):
        text = found.group(1)
    return float(text.lower().translate(_NO_PUNCTUATION) == right_letter(question).lower())


def seed(question: Question, answer: str) -> float:
    """SEED-Bench: the first character of the answer is the letter, case ignored.

    Rule: seed_process_result of lmms-eval. LLaVA (scripts/convert_seed_for_submission.py) wants the whole
    answer to be the letter; for answers that are one letter they agree. The authors rank the options by
    likelihood (arXiv 2307.16125), which is another number. An answer "a dog" counts as A.
    """
    return float(answer.strip()[:1].lower() == right_letter(question).lower())


def mmbench(question: Question, answer: str) -> float:
    """MMBench: the option that an answer names by its letter, else by its text; unclear is wrong.

    Rule: can_infer of the authors' evaluation (VLMEvalKit's of the paper, arXiv 2307.06281; lmms-eval's
    tasks/mmbench/mmbench_evals.py). Exactly one of the letters A to E as a word of its own; an "A" in an
    answer of more than three words may be an article and does not count so; then with punctuation around it;
    then exactly one option whose text is in the answer. Where that finds nothing the authors ask GPT, and
    guess if it does not know; here that counts as wrong.
    """
    right = right_letter(question)
    return float((_named(answer) or _quoted(answer, _options(question))) == right)


def summarise_mmbench(
    questions: Sequence[Question], answers: Sequence[str], marks: Sequence[float]
) -> Summary:
    """MMBench: a question counts as right if it is so in all of its rotations (CircularEval).

    Questions of one `group` are rotations of one question, the first in the file being the one as asked; one
    without a group is by itself. `score` is the circular accuracy where there are rotations, else the vanilla
    one, over the first of each group; `counted` is groups.
    """
    groups = _groups(questions)
    firsts = [members[0] for members in groups]
    vanilla = [marks[first] for first in firsts]
    circular = [float(all(marks[member] == 1 for member in members)) for members in groups]
    rotated = any(len(members) > 1 for members in groups)
    counts = circular if rotated else vanilla
    score, stderr = mean(counts)
    details = by_category([questions[first] for first in firsts], counts) | {"vanilla": mean(vanilla)[0]}
    if rotated:
        details["circular"] = score
    return Summary(score, stderr, 100 * score, len(groups), details)


def chance_mmbench(questions: Sequence[Question]) -> float | None:
    """Score of guessing: all rotations of a question right by luck; None where no options are known."""
    if not any(question.options for question in questions):
        return None
    chances = [
        math.prod(1 / len(questions[i].options) if questions[i].options else 0.0 for i in members)
        for members in _groups(questions)
    ]
    return mean(chances)[0]


def mmmu(question: Question, answer: str) -> float:
    """MMMU: the option that the answer names last, or an open answer that holds the right one.

    Rule: eval/eval_utils.py of github.com/MMMU-Benchmark/MMMU. Choices: of "(B)" the last, else of " B " the
    last, else in an answer of more than five words the option whose text is there last. "B. text" holds
    none of these. What is not found the authors draw at random: the mark is the draw's mean, 1/options.
    lmms-eval finds more: a letter with a space or a full stop behind it, which the "A " of "NASA " is too.

    A question with options is a choice, without them open; with a capital letter alone for its answer it is a
    choice of unknown options: the letters A to E are looked for, and what is not found is wrong.
    """
    if question.options:
        options = _options(question)
        said = _mmmu_choice(answer, tuple(options), options)
        return float(said == right_letter(question)) if said else 1 / len(options)
    if len(question.answers) == 1 and re.fullmatch("[A-Z]", question.answers[0].strip()):
        return float(_mmmu_choice(answer, _FIRST, {}) == right_letter(question))
    return float(open_answer.holds(answer, question.answers))


def right_letter(question: Question) -> str:
    """The letter of the right option.

    Raises:
      UserError: the right answer is neither a letter of the question nor one of its options.
    """
    truth = question.answers[0].strip()
    if len(question.answers) > 1:
        raise UserError(f"item {question.id}: has {len(question.answers)} answers; of a choice one is right")
    options = _options(question)
    upper = truth.upper()
    if re.fullmatch("[A-Z]", upper) and (not options or upper in options):
        return upper
    for name, text in options.items():
        if _plain(text) == _plain(truth):
            return name
    known = (
        f"one of {', '.join(options)} or an option's text"
        if options
        else "a letter, or there must be options"
    )
    raise UserError(f"item {question.id}: answers={question.answers[0]!r} must be {known}")


def _options(question: Question) -> dict[str, str]:
    return {chr(ord("A") + i): text for i, text in enumerate(question.options)}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _groups(questions: Sequence[Question]) -> list[list[int]]:
    """Places of the questions that count together, in the order of the file."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault((question.group, -1 if question.group else place), []).append(place)
    return list(groups.values())


def _named(answer: str) -> str:
    """MMBench's can_infer_option: the one letter that stands by itself, or ""."""
    words = answer.split()
    found = [name for name in _FIRST if name in words]
    if len(found) == 1 and not ("A" in words and len(words) > _QUANTIFIED):
        return found[0]
    for before, behind in _AROUND:
        found = [name for name in _FIRST if before + name + behind in words]
        if len(found) == 1:
            return found[0]
    return ""


def _quoted(answer: str, options: dict[str, str]) -> str:
    """MMBench's can_infer_text: the one option whose text is in the answer, or ""."""
    lowered = answer.lower()
    found = [name for name, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else ""


def _mmmu_choice(answer: str, names: Sequence[str], options: dict[str, str]) -> str:
    """MMMU's parse_multi_choice_response: the letter, or "" where the authors draw one."""
    text = answer.strip()
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        if found := [name for name in names if form.format(name) in text]:
            return max(found, key=lambda name: text.rfind(form.format(name)))
    lowered = text.lower()
    if len(text.split()) <= _WORDY:
        return ""
    found = [name for name in names if name in options and options[name].lower() in lowered]
    return max(found, key=lambda name: lowered.rfind(options[name].lower()), default="")
