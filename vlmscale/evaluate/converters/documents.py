"""Charts and documents: ChartQA and DocVQA."""

from __future__ import annotations

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import (
    Converted,
    Official,
    get,
    get_id,
    get_texts,
    read_list,
    read_records,
)
from vlmscale.evaluate.questions import Question


def chartqa(official: Official) -> Converted:
    """ChartQA, test.

    Reads test_human.json and test_augmented.json, lists without ids: these are the half and the place in it.
    Pictures are png/NAME. A score of ChartQA is over both halves; one alone is refused.
    """
    if not official.given.is_dir():
        raise UserError(f"{official.given}: name the directory with test_human.json and test_augmented.json")
    found = Converted([])
    for half in ("human", "augmented"):
        path = official.beside(f"test_{half}.json") or official.beside(f"test/test_{half}.json")
        if path is None:
            raise UserError(
                f"{official.given}: holds no test_{half}.json; a score of ChartQA is over both halves"
            )
        for number, (where, item) in enumerate(read_records(path)):
            picture = get(item, "imgname", str, where)
            found.count(half)
            found.questions.append(
                Question(
                    f"{half}-{number}",
                    (get_id(item, "label", where),),
                    get(item, "query", str, where),
                    (official.picture(f"png/{picture}", picture, f"test/png/{picture}"),),
                    category=half,
                    split="test",
                )
            )
    return found


def docvqa(official: Official) -> Converted:
    """DocVQA task 1, validation.

    Reads val_v1.0_withQT.json, which also has the types of the questions, or val_v1.0.json; pictures are
    documents/NAME. The test split has no answers, and so no task file.
    """
    path = official.file("val_v1.0_withQT.json", "val_v1.0.json")
    found = Converted([])
    for where, item in read_list(path, "data"):
        picture = get(item, "image", str, where)
        kinds = " + ".join(get_texts(item, "question_types", where)) if item.get("question_types") else ""
        found.count(kinds or "without a type")
        found.questions.append(
            Question(
                get_id(item, "questionId", where),
                get_texts(item, "answers", where),
                get(item, "question", str, where),
                (official.picture(picture, picture.rpartition("/")[2]),),
                category=kinds,
                split=item["data_split"] if isinstance(item.get("data_split"), str) else "val",
            )
        )
    return found
