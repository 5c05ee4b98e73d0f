"""The benchmarks as a table: how each is asked, scored and guessed. No jax."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.scorers import Mark, Summarise, Summary, accuracy, choice, mathvista, text, vqa, yesno

ONE_WORD = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
WORD = f"{{hint}}{{question}}\n{ONE_WORD}"
LETTER = f"{{hint}}{{question}}\n{{options}}\n{ONE_LETTER}"
Chance = Callable[[Sequence[Question]], float | None]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      group: of `GROUPS`, or "general".
      metric: what its score is called.
      mark: of one answer.
      summarise: from marks to the score.
      chance: score of guessing without a look; 0 where answers are open.
      prompt: what is asked, with {question}, {options} (a line an option, "A. text") and {hint} (as written
        in the file, and a newline).
      max_new_tokens: longest answer.
      version: of prompt and rule together; rises when a score could change.
    """

    group: str
    metric: str
    mark: Mark
    summarise: Summarise
    chance: Chance
    prompt: str
    max_new_tokens: int = 16
    version: int = 1


@dataclass(frozen=True)
class Scored:
    """A task's answers, scored.

    Attributes:
      task, metric, scorer: what was scored and by which rule, "gqa/1" being its version.
      summary: score, its standard error, and details.
      chance: score of guessing; None where that depends on options that the file does not give.
      n_items: questions.
      n_missing: of them without an answer; these count as wrong.
      marks: score of each answer, by id.
    """

    task: str
    metric: str
    scorer: str
    summary: Summary
    chance: float | None
    n_items: int
    n_missing: int
    marks: dict[str, float]


def over_options(questions: Sequence[Question]) -> float | None:
    """Mean chance of guessing one of the options; 0 where a question has none but others do."""
    if not any(question.options for question in questions):
        return None
    return statistics.fmean(1 / len(question.options) if question.options else 0.0 for question in questions)


def always(value: float) -> Chance:
    """A chance that does not depend on the questions."""
    return lambda questions: value


BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark("general", "accuracy", vqa.vqav2, accuracy, always(0), WORD),
    "vizwiz": Benchmark(
        "general",
        "accuracy",
        vqa.evalai,
        accuracy,
        always(0),
        "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        + ONE_WORD,
    ),
    "textvqa": Benchmark("ocr", "accuracy", vqa.evalai, accuracy, always(0), WORD),
    "gqa": Benchmark("reasoning", "accuracy", text.gqa, accuracy, always(0), WORD),
    "pope": Benchmark("reasoning", "accuracy", yesno.pope, yesno.summarise_pope, always(0.5), WORD),
    "mme": Benchmark(
        "reasoning", "(accuracy + accuracy+)/2800", yesno.mme, yesno.summarise_mme, yesno.chance_mme, WORD
    ),
    "mmbench": Benchmark(
        "reasoning", "accuracy", choice.mmbench, choice.summarise_mmbench, choice.chance_mmbench, LETTER, 64
    ),
    "scienceqa": Benchmark("reasoning", "accuracy", choice.scienceqa, accuracy, over_options, LETTER, 64),
    "ai2d": Benchmark("reasoning", "accuracy", choice.ai2d, accuracy, over_options, LETTER),
    "seed": Benchmark("general", "accuracy", choice.seed, accuracy, over_options, LETTER),
    "mmmu": Benchmark("reasoning", "accuracy", choice.mmmu, accuracy, over_options, LETTER, 128),
    "mathvista": Benchmark(
        "reasoning", "accuracy", mathvista.mathvista, accuracy, over_options, "{question}", 128
    ),
    "chartqa": Benchmark(
        "reasoning",
        "relaxed accuracy",
        text.chartqa,
        accuracy,
        always(0),
        "{question}\nAnswer the question with a single word.",
    ),
    "docvqa": Benchmark("ocr", "ANLS", text.docvqa, accuracy, always(0), WORD, 32),
}
GROUPS = {
    name: tuple(sorted(task for task, benchmark in BENCHMARKS.items() if benchmark.group == name))
    for name in ("reasoning", "ocr", "general")
}
# What a task file of any other name is scored by: its options' letters, or the words.
EXACT = Benchmark("own", "accuracy", text.exact_match, accuracy, always(0), "{hint}{question}")
OWN = {
    "exact_match": EXACT,
    "letter": replace(EXACT, mark=choice.letter, chance=over_options, prompt=LETTER),
}
_NAME = re.compile(r"[A-Za-z0-9][\w .-]*")


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Task names with those of a group in place of its name, each once."""
    every = [task for name in names for task in GROUPS.get(name, (name,))]
    return list(dict.fromkeys(every))


def rule_of(task: str, questions: Sequence[Question]) -> str:
    """The rule that a task of this name is scored by: its own, or of other names letter or exact_match.

    Raises:
      UserError: the name is that of a group, or of a benchmark but for its case, or no name of a file.
    """
    if task in BENCHMARKS or task in OWN:
        return task
    if task in GROUPS:
        raise UserError(f"task {task}: is a group; name one of {', '.join(GROUPS[task])}")
    if task.lower() in BENCHMARKS:
        raise UserError(f"task {task}: write {task.lower()}")
    if not _NAME.fullmatch(task):
        raise UserError(f"task {task!r}: a name has letters, digits, '_', '-', '.' and spaces alone")
    return "letter" if any(question.options for question in questions) else "exact_match"


def benchmark_of(rule: str) -> Benchmark:
    """The table's entry of a rule."""
    return (BENCHMARKS | OWN)[rule]


def asked(benchmark: Benchmark, question: Question) -> str:
    """The text that a model is asked, without placeholders of pictures."""
    template = question.template or benchmark.prompt
    options = "\n".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(question.options))
    hint = f"{question.hint}\n" if question.hint else ""
    parts = {"{hint}": hint, "{question}": question.question, "{options}": options}
    if not question.options:
        template = template.replace("{options}\n", "")
    for name in parts:  # not str.format: questions and templates may hold braces
        template = template.replace(name, "\0" + name[1:-1] + "\0")
    for name, part in parts.items():
        template = template.replace("\0" + name[1:-1] + "\0", part)
    return template


def check(rule: str, questions: Sequence[Question]) -> None:
    """Find before anything is asked what would stop the scoring.

    Raises:
      UserError: a question lacks what the rule reads, or the pictures of MME have no pairs.
    """
    benchmark = benchmark_of(rule)
    marks = [benchmark.mark(question, "") for question in questions]
    benchmark.summarise(questions, [""] * len(marks), marks)


def score(task: str, rule: str, questions: Sequence[Question], answers: dict[str, str]) -> Scored:
    """Score the answers to a task.

    Args:
      task: its name.
      rule: of `rule_of`.
      questions: all of the task; one without an answer counts as wrong.
      answers: by id.

    Raises:
      UserError: there are answers to no question of the task, or a question lacks what the rule reads.
    """
    if unknown := sorted(set(answers) - {question.id for question in questions}):
        raise UserError(
            f"answer to {unknown[0]}: no item has this id ({len(unknown)} such answers); "
            f"name the items that were answered"
        )
    benchmark = benchmark_of(rule)
    given = [answers.get(question.id, "") for question in questions]
    marks = [
        benchmark.mark(question, answer) if question.id in answers else 0.0
        for question, answer in zip(questions, given, strict=True)
    ]
    summary = benchmark.summarise(questions, given, marks)
    return Scored(
        task,
        benchmark.metric,
        f"{rule}/{benchmark.version}",
        summary,
        benchmark.chance(questions),
        len(questions),
        len(questions) - len(answers),
        {question.id: mark for question, mark in zip(questions, marks, strict=True)},
    )
