"""MMBench: a table with the pictures inside, and its circular evaluation."""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import Converted, Official, letter
from vlmscale.evaluate.questions import Question

_ROUND = 1_000_000  # the official circular rows count on from their question's index in steps of this
_CHINESE = "{hint}{question}\n{options}\n请直接回答选项字母。"
_NEEDED = ("index", "question", "A", "B", "answer", "image")
# What the reader of LLaVA's script (pandas) takes for an empty cell, and what the script itself does.
_EMPTY = {
    *("", " ", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>"),
    *("n/a", "na", "null", "nan", "none"),
}


def mmbench(official: Official) -> Converted:
    """MMBench, a .tsv of a split with answers, such as mmbench_dev_20230712.tsv; pictures are inside.

    Some releases hold all rotations of a question's options as rows of their own, numbered on in steps of a
    million; these are grouped. Of others, `circular` writes the rotations as LLaVA's --all-rounds asks them.
    A table whose name has "_cn" is asked LLaVA's Chinese instruction.
    """
    path = official.file("mmbench_dev_20230712.tsv", "MMBench_DEV_EN*.tsv", "*.tsv")
    rows = dict(_rows(path))
    rotated = any(index >= _ROUND for index in rows)
    if rotated and official.circular:
        raise UserError(f"{path}: holds the rotations already, as rows of their own; leave --circular away")
    template = _CHINESE if "_cn" in path.stem.lower() else ""
    stored: dict[str, str] = {}
    found = Converted([])
    for index, row in rows.items():
        where = f"{path}: row with index {index}"
        group = str(index % _ROUND) if rotated or official.circular else ""
        question = _question(where, index, row, (_picture(official, path, rows, index, stored),))
        question = replace(question, group=group, template=template)
        found.count(question.category or "without a category")
        found.questions.append(question)
        if official.circular:
            found.questions += _rotations(question, index)
    # The question as asked first: its score without rotations is that of the first line of its group.
    found.questions.sort(key=lambda question: int(question.id) // _ROUND if rotated else 0)
    groups = {question.group for question in found.questions}
    if rotated or official.circular:
        found.notes.append(f"{len(groups)} questions, each with the rotations of its options as a group")
    else:
        found.notes.append("one line a question; --circular writes the rotations of the options, too")
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows by index.

    Raises:
      UserError: unreadable, a column that is needed is absent, or an index that is no number or there twice.
    """
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    seen: set[int] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            lacks = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
            if lacks:
                raise UserError(
                    f"{path}: has no column {lacks[0]!r}; name an MMBench table of a split with answers"
                )
            for number, row in enumerate(reader, 2):
                text = row["index"] or ""
                if not text.isdecimal():
                    raise UserError(
                        f"{path}: row {number}: index={text!r} must be a whole number; copy it again"
                    )
                if int(text) in seen:
                    raise UserError(f"{path}: index {text} is there twice; copy the table again")
                seen.add(int(text))
                # A short row has None for what is missing; a long one has its rest under None.
                yield int(text), {key: value or "" for key, value in row.items() if isinstance(key, str)}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the official .tsv") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}; copy it again") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); copy it again") from None


def _question(where: str, index: int, row: dict[str, str], images: tuple[str, ...]) -> Question:
    options: list[str] = []
    for name in "ABCDE":
        if _empty(row.get(name, "")):
            break  # LLaVA, too, stops at the first one
        options.append(row[name])
    answer = row["answer"].strip()
    if len(answer) != 1 or not "A" <= answer <= "E":
        raise UserError(f"{where}: answer={answer!r} must be a letter; test splits have no answers")
    hint = row.get("hint", "")
    return Question(
        str(index),
        (letter(ord(answer) - 65, len(options), where),),
        row["question"],
        images,
        tuple(options),
        "" if _empty(hint) else hint,
        category=row.get("category", ""),
        split=row.get("split", ""),
    )


def _rotations(question: Question, index: int) -> list[Question]:
    """The other rounds: each time the first option goes to the end, and the answer's letter with it."""
    count, answer = len(question.options), ord(question.answers[0]) - 65
    return [
        replace(
            question,
            id=str(index + turn * _ROUND),
            options=question.options[turn:] + question.options[:turn],
            answers=(chr(65 + (answer - turn) % count),),
        )
        for turn in range(1, count)
    ]


def _picture(
    official: Official, path: Path, rows: dict[int, dict[str, str]], index: int, stored: dict[str, str]
) -> str:
    """Write the picture of a row once; in later releases rows name the row that has it."""
    where, seen = f"{path}: row with index {index}", {index}
    while (text := rows[index]["image"].strip()).isdecimal() and len(text) < 16:
        index = int(text)
        if index not in rows or index in seen:
            raise UserError(f"{where}: image names row {index}, which has no picture; copy the table again")
        seen.add(index)
    if text not in stored:
        owner = index % _ROUND  # the rotations of a question show one picture
        same = owner in rows and rows[owner]["image"].strip() == text
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: image is not base64 ({error}); copy the table again") from None
        if not data:
            raise UserError(f"{where}: has no picture; copy the table again")
        stored[text] = official.store(str(owner if same else index), data)
    return stored[text]


def _empty(text: str) -> bool:
    return text.lower() in _EMPTY
