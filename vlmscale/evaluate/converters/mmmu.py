"""MMMU, validation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import Converted, Official, get, verbatim
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.tasks import ONE_LETTER, ONE_WORD

_PICTURES = tuple(f"image_{i}" for i in range(1, 8))
_NAME = re.compile(r"[\w.-]+")


def mmmu(official: Official) -> Converted:
    """MMMU, the parquet files of its release on Hugging Face: SUBJECT/validation-*.parquet; pictures inside.

    The prompt is that of the MMMU authors' own run of LLaVA-1.5 (configs/llava1.5.yaml): options as
    "(A) text", an empty line, the instruction; "<image 1>" and its like stay in the text as they stand, and
    pictures come in front. That run shows the first picture alone; here all are kept, in their order.
    """
    if official.given.is_dir():
        paths = sorted(official.given.glob("*/validation-*.parquet"))
        paths = paths or sorted(official.given.glob("validation-*.parquet"))
        if not paths:
            raise UserError(
                f"{official.given}: holds no SUBJECT/validation-*.parquet; name the official release"
            )
    else:
        paths = [official.given]
    found, several = Converted([]), 0
    for path in paths:
        for where, row in _rows(path):
            question = _question(official, row, where)
            several += len(question.images) > 1
            found.count(question.category)
            found.questions.append(question)
    found.notes.append(
        f"{several} questions have several pictures; all are kept (the authors' LLaVA saw the first)"
    )
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, by batches: a file's pictures together may be large.

    Raises:
      UserError: pyarrow is not installed, or it cannot read the file.
    """
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"{path}: is parquet, which needs pyarrow; run pip install pyarrow") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (OSError, ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); copy it again"
        ) from None


def _question(official: Official, row: dict[str, Any], where: str) -> Question:
    name = get(row, "id", str, where)
    where = f"{where} ({name})"
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: id={name!r} cannot name its pictures; copy the official file again")
    text, answer = get(row, "question", str, where), get(row, "answer", str, where)
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = (answer,)
    if get(row, "question_type", str, where) == "multiple-choice":
        options = _list(get(row, "options", str, where), "options", where)
        if len(answer) != 1 or not 0 <= ord(answer) - 65 < len(options):
            raise UserError(
                f"{where}: answer={answer!r} is no letter of its {len(options)} options (test has none)"
            )
        listed = "".join(f"({chr(65 + i)}) {option}\n" for i, option in enumerate(options))
        prompt = f"{text}\n{listed}\n{ONE_LETTER}"
    else:
        if answer in ("", "?"):
            raise UserError(
                f"{where}: has no answer; those of the test split are not published, use validation"
            )
        if answer.startswith("[") and answer.endswith("]"):
            answers = _list(answer, "answer", where)
        prompt = f"{text}\n{ONE_WORD}"
    images = []
    for key in _PICTURES:
        if (value := row.get(key)) is not None:
            data = value.get("bytes") if isinstance(value, dict) else None
            if not isinstance(data, bytes) or not data:
                raise UserError(f"{where}: {key} holds no picture; copy the official file again")
            images.append(official.store(f"{name}_{key.removeprefix('image_')}", data))
    subject = name.removeprefix("validation_").rpartition("_")[0]
    return Question(
        name,
        answers,
        text,
        tuple(images),
        options,
        template=verbatim(prompt, where),
        category=subject or "other",
        split=name.partition("_")[0],
    )


def _list(text: str, key: str, where: str) -> tuple[str, ...]:
    """A Python list in a text, which is how the release writes options and several right answers."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        values = None
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(v, str | int | float) for v in values)
    ):
        raise UserError(f"{where}: {key}={text[:60]!r} must be a list of texts; copy the official file again")
    return tuple(str(value) for value in values)
