"""MathVista, testmini."""

from __future__ import annotations

from typing import Any

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import (
    Converted,
    Official,
    get,
    get_texts,
    letter,
    read_dict,
    verbatim,
)
from vlmscale.evaluate.questions import Question

_CHOICE = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
)
_KIND = (
    "Hint: Please answer the question requiring {kind} "
    "and provide the final {what}, e.g., {such}, at the end."
)
_HINTS = {
    ("integer", None): _KIND.format(kind="an integer answer", what="value", such="1, 2, 3"),
    ("float", 1): _KIND.format(
        kind="a floating-point number with one decimal place", what="value", such="1.2, 1.3, 1.4"
    ),
    ("float", 2): _KIND.format(
        kind="a floating-point number with two decimal places", what="value", such="1.23, 1.34, 1.45"
    ),
    ("list", None): _KIND.format(
        kind="a Python list as an answer", what="list", such="[1, 2, 3], [1.2, 1.3, 1.4]"
    ),
}


def mathvista(official: Official) -> Converted:
    """MathVista, testmini: testmini.json, an object by problem id; pictures are images/ID.jpg.

    What is asked is the authors' published query, of the record's "query" (the release on Hugging Face has
    it) or of query.json beside the file; where there is neither, it is put together in the same form: hint,
    question with its unit, choices. The answer to a multiple choice is written as its option's letter.
    """
    path = official.file("testmini.json", "data/testmini.json")
    given = path.with_name("query.json")
    queries = read_dict(given) if given.is_file() else {}
    found = Converted([])
    made = 0
    values = read_dict(path)
    for name in values:
        where = f"{path}: problem {name}"
        item = get(values, name, dict, str(path))
        kind = get(item, "answer_type", str, where)
        choice = get(item, "question_type", str, where) == "multi_choice"
        options = get_texts(item, "choices", where) if choice else ()
        answer = get(item, "answer", str, where)
        if not answer:
            raise UserError(
                f"{where}: has no answer; those of the test split are not published, use testmini"
            )
        if choice:
            if answer not in options:
                raise UserError(
                    f"{where}: answer={answer!r} is none of its choices; copy the official file again"
                )
            answer = letter(options.index(answer), len(options), where)
        precision = _precision(item, where)
        query = item.get("query") or queries.get(name)
        if not isinstance(query, str):
            query, made = _query(item, kind, options, precision, where), made + 1
        metadata = get(item, "metadata", dict, where)
        category, picture = get(metadata, "task", str, where), get(item, "image", str, where)
        found.count(category)
        found.questions.append(
            Question(
                name,
                (answer,),
                get(item, "question", str, where),
                (official.picture(picture, picture.rpartition("/")[2], f"data/{picture}"),),
                options,
                template=verbatim(query, where),
                category=category,
                split=get(metadata, "split", str, where),
                answer_type=kind,
                precision=precision,
            )
        )
    found.notes.append(f"{len(found.questions) - made} published queries, {made} made in the same form")
    return found


def _precision(item: dict[str, Any], where: str) -> int | None:
    value = item.get("precision")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise UserError(
            f"{where}: precision={value!r} must be a whole number or null; copy the official file again"
        )
    return int(value)


def _query(
    item: dict[str, Any], kind: str, options: tuple[str, ...], precision: int | None, where: str
) -> str:
    """The query as the authors' query.json has it. Their newer code puts the hint behind the choices."""
    hint = _CHOICE if options else _HINTS.get((kind, precision if kind == "float" else None))
    if hint is None:
        raise UserError(
            f"{where}: no hint for answer_type={kind!r} with precision={precision}; copy the file again"
        )
    unit = item.get("unit")
    lines = [hint, f"Question: {get(item, 'question', str, where)}" + (f" (Unit: {unit})" if unit else "")]
    if options:
        lines += ["Choices:", *(f"({chr(65 + i)}) {option}" for i, option in enumerate(options))]
    return "\n".join(lines).strip()
