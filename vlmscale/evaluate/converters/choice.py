"""Multiple choice in JSON: ScienceQA and SEED-Bench."""

from __future__ import annotations

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import (
    Converted,
    Official,
    get,
    get_id,
    get_texts,
    letter,
    read_dict,
    read_list,
    verbatim,
)
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.tasks import ONE_LETTER


def scienceqa(official: Official) -> Converted:
    """ScienceQA, test: problems.json and pid_splits.json; pictures are test/ID/image.png.

    All questions of the split are written, those without a picture as text alone; LLaVA-1.5's "SQA-I" is the
    score of category "image". The prompt is LLaVA's CQM-A: context, question and options, each in its line.
    """
    problems = official.beside("problems.json")
    splits = official.beside("pid_splits.json")
    if problems is None or splits is None:
        lacks = "pid_splits.json" if problems else "problems.json"
        raise UserError(
            f"{official.folder}: holds no {lacks}; ScienceQA needs problems.json and pid_splits.json"
        )
    items = read_dict(problems)
    found = Converted([])
    for name in get_texts(read_dict(splits), "test", str(splits)):
        where = f"{problems}: problem {name}"
        if name not in items:
            raise UserError(f"{problems}: has no problem {name} of {splits.name}; copy both again")
        item = get(items, name, dict, str(problems))
        question, options = get(item, "question", str, where), get_texts(item, "choices", where)
        picture = item.get("image")
        if picture is not None and not isinstance(picture, str):
            raise UserError(
                f"{where}: image={picture!r} must be a text or null; copy the official file again"
            )
        context = get(item, "hint", str, where).strip() or "N/A"
        listed = " ".join(f"({chr(65 + i)}) {option}" for i, option in enumerate(options))
        asked = f"Context: {context}\nQuestion: {question}\nOptions: {listed}".replace("  ", " ").strip()
        kind = "image" if picture else "text"
        found.count(kind)
        found.questions.append(
            Question(
                name,
                (letter(get(item, "answer", int, where), len(options), where),),
                question,
                (
                    official.picture(
                        f"test/{name}/{picture}", f"{name}/{picture}", f"images/test/{name}/{picture}"
                    ),
                )
                if picture
                else (),
                options,
                template=verbatim(f"{asked}\n{ONE_LETTER}", where),
                category=kind,
                split="test",
            )
        )
    return found


def seed(official: Official) -> Converted:
    """SEED-Bench 1, the questions about pictures: SEED-Bench.json; pictures are SEED-Bench-image/NAME.

    Questions about videos are left out and counted.
    """
    path = official.file("SEED-Bench.json")
    kinds = {number: name for name, number in get(read_dict(path), "question_type", dict, str(path)).items()}
    found, videos = Converted([]), 0
    for where, item in read_list(path, "questions"):
        if get(item, "data_type", str, where) != "image":
            videos += 1
            continue
        number = get(item, "question_type_id", int, where)
        if number not in kinds:
            raise UserError(
                f"{where}: question_type_id={number} is not in question_type; copy the file again"
            )
        options = tuple(get_id(item, f"choice_{name}", where) for name in "abcd")
        answer = get(item, "answer", str, where)
        if answer not in ("A", "B", "C", "D"):
            raise UserError(f"{where}: answer={answer!r} must be A, B, C or D; copy the official file again")
        picture = get(item, "data_id", str, where)
        found.count(kinds[number])
        found.questions.append(
            Question(
                get_id(item, "question_id", where),
                (answer,),
                get(item, "question", str, where),
                (official.picture(f"SEED-Bench-image/{picture}", picture),),
                options,
                category=kinds[number],
                split="image",
            )
        )
    if videos:
        found.notes.append(f"{videos} questions left out: they are about videos, not pictures")
    return found
