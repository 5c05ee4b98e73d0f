"""What is asked: the items of a task, from a prepared data set or from a task file."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmscale.config import EvaluateConfig
from vlmscale.data.conversation import IMAGE_MARK, Template
from vlmscale.data.dataset import Dataset
from vlmscale.data.records import PLACEHOLDER, Turn
from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question, read_questions
from vlmscale.evaluate.tasks import asked, benchmark_of, check, expand_tasks, rule_of


@dataclass(frozen=True)
class Item:
    """One question to answer.

    Attributes:
      question: what is scored.
      text: what is asked, with a placeholder where a picture is shown.
      images: how many pictures it shows.
      history: turns in front of it.
      data_set, record: where its pictures lie, the first of the record's; -1 where they are `files`.
      files: its pictures, where they are files of their own; or their encoded bytes.
    """

    question: Question
    text: str
    images: int
    history: tuple[Turn, ...] = ()
    data_set: int = -1
    record: int = -1
    files: tuple[Path | bytes, ...] = ()

    @property
    def id(self) -> str:
        """Unique in its task."""
        return self.question.id

    def blind(self) -> Item:
        """The same without its pictures."""
        history = tuple(Turn(without_pictures(turn.question), turn.answer) for turn in self.history)
        return replace(self, text=without_pictures(self.text), images=0, history=history, files=())

    def unseen(self) -> Item:
        """The same with nothing to see where its pictures stand."""
        return replace(self, images=0, files=())


@dataclass(frozen=True)
class Task:
    """Items that are scored together.

    Attributes:
      name, group, split: as the rows say.
      rule: how it is scored, see `tasks.rule_of`.
      items: in order of the file.
      max_new_tokens: longest answer.
      asked_as: how its questions are put, for the rows: the history, or the rule's name and version, with
        "+template" where questions have prompts of their own.
      digest: of what the items' pictures are, where they lie in a prepared data set.
      chance: score of guessing, where the items say; None for that of the benchmark.
    """

    name: str
    group: str
    split: str
    rule: str
    items: tuple[Item, ...]
    max_new_tokens: int
    asked_as: str
    digest: str = ""
    chance: float | None = None

    @property
    def questions(self) -> list[Question]:
        """What is scored."""
        return [item.question for item in self.items]


def key_of(item: Item, task: Task, told: Any) -> str:
    """What an answer depends on, as 16 hex digits: text, pictures, longest answer, and what `told` prints."""
    pictures: list[Any] = [task.digest, item.data_set, item.record, item.images]
    for file in item.files:
        if isinstance(file, bytes):
            pictures.append(hashlib.sha256(file).hexdigest())
        else:
            pictures += [file.name, _size(file)]
    parts = repr((item.text, item.history, pictures, task.max_new_tokens, told))
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _size(file: Path) -> int:
    """Bytes of a file; -1 where there is none, or none that can be asked for."""
    try:
        return file.stat().st_size
    except (OSError, ValueError):
        return -1


def make_items(datasets: Sequence[Dataset], history: str) -> list[tuple[str, str, float, Item]]:
    """One item a turn of the records, each with its task, group and chance.

    With history "gold" it comes behind the true conversation so far, else on its own, behind all pictures
    that were shown before it.
    """
    items = []
    taken: Counter[tuple[str, str]] = Counter()
    for place, dataset in enumerate(datasets):
        for index in range(len(dataset)):
            record, shown = dataset.record(index), 0
            task = record.task or "records"
            for number, turn in enumerate(record.turns):
                earlier, shown = shown, shown + turn.question.count(PLACEHOLDER)
                before, text = record.turns[:number], turn.question
                if history != "gold":
                    before, text = (), (PLACEHOLDER * earlier + "\n" + text).strip()
                name = record.id if len(record.turns) == 1 else f"{record.id}#{number}"
                taken[task, name] += 1
                if taken[task, name] > 1:  # ids of records need not be unique, those of items must
                    name = f"{name}~{taken[task, name]}"
                question = Question(name, (turn.answer,), without_pictures(turn.question))
                item = Item(question, text, shown, before, place, index)
                items.append((task, record.task_group or "records", record.chance, item))
    return items


def record_tasks(
    datasets: Sequence[Dataset], split: str, history: str, max_new_tokens: int
) -> dict[str, Task]:
    """The tasks of a split of prepared data, by name in order."""
    digest = hashlib.sha256("".join(dataset.manifest["sha256"] for dataset in datasets).encode()).hexdigest()
    found: dict[str, list[tuple[str, float, Item]]] = {}
    for name, group, chance, item in make_items(datasets, history):
        found.setdefault(name, []).append((group, chance, item))
    tasks = {}
    for name, parts in sorted(found.items()):
        items = tuple(item for _, _, item in parts)
        chance = statistics.fmean(chance for _, chance, _ in parts)
        group = parts[0][0]
        # Whatever its name: records say nothing of a benchmark's options and pairs.
        tasks[name] = Task(name, group, split, "exact_match", items, max_new_tokens, history, digest, chance)
    return tasks


def file_task(name: str, data: Path) -> Task:
    """The task in `data`/`name`.jsonl.

    Raises:
      UserError: there is no such file, or one of its lines cannot be used.
    """
    rule_of(name, ())
    path = data / f"{name}.jsonl"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in data.glob("*.jsonl"))) or "no task file"
        raise UserError(f"--data {data}: has no {name}.jsonl; it has {there}")
    questions = read_questions(path)
    rule = rule_of(name, questions)
    benchmark = benchmark_of(rule)
    try:
        check(rule, questions)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    items = []
    for question in questions:
        files = tuple(path.parent / image for image in question.images)  # an absolute path stays
        text = asked(benchmark, question)
        if (marks := text.count(PLACEHOLDER)) not in (0, len(files)):
            raise UserError(
                f"{path}: item {question.id}: shows {PLACEHOLDER} {marks} times and names {len(files)} "
                "pictures; write it once for each, or leave it away"
            )
        if not marks:
            text = f"{PLACEHOLDER}\n" * len(files) + text
        items.append(Item(question, text, len(files), files=files))
    splits = {question.split for question in questions}
    split = (splits.pop() or "all") if len(splits) == 1 else "mixed"
    asked_as = f"{rule}/{benchmark.version}" + "+template" * any(one.template for one in questions)
    return Task(name, benchmark.group, split, rule, tuple(items), benchmark.max_new_tokens, asked_as)


def file_tasks(names: Sequence[str], data: Path) -> list[Task]:
    """The tasks of these names, or of groups, in a directory of task files.

    Raises:
      UserError: as `file_task`, or there is no name.
    """
    if not names:
        raise UserError(f"--data {data}: name what to evaluate, such as --tasks gqa,pope")
    return [file_task(name, data) for name in expand_tasks(names)]


def check_files(configs: Sequence[EvaluateConfig]) -> None:
    """Find before training what would stop the evaluation behind it.

    Raises:
      UserError: as `file_task`.
    """
    for names, data in dict.fromkeys((config.tasks, config.data) for config in configs if config.data):
        file_tasks(words(names), Path(data))


def words(names: str) -> list[str]:
    """Names that commas separate."""
    return [word.strip() for word in names.split(",") if word.strip()]


def prompt_of(item: Item, template: Template) -> list[int]:
    """Ids of an item's prompt, with a mark for each picture."""
    return template.prompt(item.text, item.history)


def text_tokens(prompt: list[int]) -> int:
    """Tokens of a prompt without its image marks."""
    return len(prompt) - prompt.count(IMAGE_MARK)


def first_question(item: Item) -> str:
    """The question that QueCC embeds: the first of the conversation, later ones reuse its visual tokens."""
    return item.history[0].question if item.history else item.text


def without_pictures(text: str) -> str:
    """A question without its placeholders."""
    return text.replace(PLACEHOLDER, "").strip()
