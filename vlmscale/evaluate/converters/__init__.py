"""Converters: from the official files of each benchmark to a task file. No jax.

A task file is JSON Lines, see `vlmscale.evaluate.questions`. Which official files each converter reads is in
its docstring and in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.evaluate.converters import ai2d, choice, documents, mathvista, mmbench, mmmu, vqa, yesno
from vlmscale.evaluate.converters.official import Converted, Converter, Official
from vlmscale.evaluate.questions import Question
from vlmscale.records import make_directory, write_lines

CONVERTERS: dict[str, Converter] = {
    "vqav2": vqa.vqav2,
    "vizwiz": vqa.vizwiz,
    "textvqa": vqa.textvqa,
    "gqa": vqa.gqa,
    "pope": yesno.pope,
    "mme": yesno.mme,
    "mmbench": mmbench.mmbench,
    "scienceqa": choice.scienceqa,
    "ai2d": ai2d.ai2d,
    "seed": choice.seed,
    "mmmu": mmmu.mmmu,
    "mathvista": mathvista.mathvista,
    "chartqa": documents.chartqa,
    "docvqa": documents.docvqa,
}


@dataclass(frozen=True)
class Report:
    """What a conversion wrote.

    Attributes:
      task, path: the benchmark and its task file.
      items: questions in the file.
      counts: of them by a name for people, such as a category.
      missing: distinct pictures that are named in the file but are not there.
      first_missing: the first of these, "" where there is none.
      notes: what was left out or differs from the usual, and why; one line each.
    """

    task: str
    path: Path
    items: int
    counts: dict[str, int]
    missing: int
    first_missing: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        found = [f"{self.task}: {self.items} questions in {self.path}"]
        found += [f"  {name}: {number}" for name, number in sorted(self.counts.items())]
        if self.missing:
            found.append(f"  {self.missing} pictures are missing, the first is {self.first_missing}")
        return found + [f"  {note}" for note in self.notes]


def convert(task: str, source: Path, out: Path, images: Path | None = None, circular: bool = False) -> Report:
    """Write OUT/TASK.jsonl from the official files of a benchmark.

    Args:
      task: of `CONVERTERS`.
      source: the official file, or the directory of the official files under their official names.
      out: directory of task files; made where it is not there.
      images: directory of the official pictures; the one of the official files where it is not given.
      circular: write every rotation of a question's options; MMBench alone has these.

    Raises:
      UserError: an unknown task, official files that are absent, damaged or without answers, ids that are
        there twice, or an output that cannot be written. A picture that is not there is reported instead.
    """
    if task not in CONVERTERS:
        raise UserError(f"task {task!r}: no converter; there are {', '.join(CONVERTERS)}")
    if circular and task != "mmbench":
        raise UserError(f"--circular: {task} has no circular evaluation, only mmbench does; leave it away")
    if not source.exists():
        raise UserError(
            f"{source}: not found; name the official file of {task} or the directory that holds it"
        )
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: is no directory; name that of the official pictures of {task}")
    make_directory(out)
    official = Official(task, source, images or (source if source.is_dir() else source.parent), out, circular)
    converted = CONVERTERS[task](official)
    if not converted.questions:
        raise UserError(
            f"{source}: holds no question of {task}; {'; '.join(converted.notes) or 'copy it again'}"
        )
    _check(converted.questions, source)
    path = out / f"{task}.jsonl"
    write_lines(path, [json.dumps(_line(question, out)) for question in converted.questions])
    return _report(task, path, converted)


def _check(questions: list[Question], source: Path) -> None:
    """What a reader of the task file would refuse, told by the official id."""
    seen: set[str] = set()
    for question in questions:
        where = f"{source}: question {question.id}"
        if question.id in seen:
            raise UserError(f"{where}: is there twice; ids must be unique, so copy the official file again")
        seen.add(question.id)
        if not question.question.strip():
            raise UserError(f"{where}: has no text; copy the official file again")
        if empty := [i for i, option in enumerate(question.options) if not option.strip()]:
            raise UserError(f"{where}: option {chr(65 + empty[0])} is empty; copy the official file again")


def _line(question: Question, out: Path) -> dict[str, Any]:
    """The object of a task file, without keys that say nothing."""
    images = [_name(image, out) for image in question.images]
    line: dict[str, Any] = {"id": question.id}
    if images:
        line["image"] = images[0] if len(images) == 1 else images
    line |= {"question": question.question, "answers": list(question.answers)}
    if question.options:
        line["options"] = list(question.options)
    texts = {key: getattr(question, key) for key in ("hint", "template", "category", "group", "split")}
    line |= {key: text for key, text in texts.items() if text}
    if question.answer_type != "text":
        line["answer_type"] = question.answer_type
    if question.precision is not None:
        line["precision"] = question.precision
    return line


def _name(image: str, out: Path) -> str:
    """Relative to the task file's folder for what lies below it, which may then move; else absolute."""
    path, folder = Path(os.path.abspath(image)), Path(os.path.abspath(out))
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _report(task: str, path: Path, converted: Converted) -> Report:
    pictures = dict.fromkeys(image for question in converted.questions for image in question.images)
    missing = [image for image in pictures if not Path(image).is_file()]
    first = missing[0] if missing else ""
    counts, notes = converted.counts, tuple(converted.notes)
    return Report(task, path, len(converted.questions), counts, len(missing), first, notes)
