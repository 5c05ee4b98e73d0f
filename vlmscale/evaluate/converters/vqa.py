"""Open questions with the answers of several people: VQAv2, VizWiz, TextVQA; and GQA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import (
    Converted,
    Official,
    get,
    get_id,
    get_texts,
    read_dict,
    read_list,
    read_records,
    verbatim,
)
from vlmscale.evaluate.questions import Question
from vlmscale.evaluate.tasks import ONE_WORD

_VQAV2 = re.compile(r"v2_OpenEnded_mscoco_(.+)_questions\.json")


def vqav2(official: Official) -> Converted:
    """VQA v2.0, balanced real images.

    Reads v2_OpenEnded_mscoco_SPLIT_questions.json and, beside it, v2_mscoco_SPLIT_annotations.json; pictures
    are COCO_SPLIT_%012d.jpg. The test splits have no annotations, and so no task file.
    """
    path = official.file("v2_OpenEnded_mscoco_*_questions.json")
    match = _VQAV2.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: must keep its official name, v2_OpenEnded_mscoco_SPLIT_questions.json")
    split = match[1]
    given = path.parent / f"v2_mscoco_{split}_annotations.json"
    if not given.is_file():
        raise UserError(
            f"{given}: not found; put the annotations beside the questions (test splits have none)"
        )
    annotations = {
        get_id(item, "question_id", where): (where, item) for where, item in read_list(given, "annotations")
    }
    found = Converted([])
    for where, item in read_list(path, "questions"):
        name = get_id(item, "question_id", where)
        if name not in annotations:
            raise UserError(f"{given}: has no annotation for question {name} of {path.name}; copy both again")
        place, annotation = annotations[name]
        kind = get(annotation, "answer_type", str, place)
        picture = f"COCO_{split}_{get(item, 'image_id', int, where):012d}.jpg"
        found.count(kind)
        found.questions.append(
            Question(
                name,
                _answers(annotation, place),
                get(item, "question", str, where),
                (official.picture(picture, f"{split}/{picture}"),),
                category=kind,
                split=split,
            )
        )
    return found


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The texts of [{"answer": text, ...}, ...]."""
    answers = get(record, "answers", list, where)
    if not answers:
        raise UserError(f"{where}: answers is empty; copy the official file again")
    for answer in answers:
        if not isinstance(answer, dict):
            raise UserError(
                f"{where}: answers holds {answer!r} where an object is needed; copy the file again"
            )
    return tuple(get(answer, "answer", str, where) for answer in answers)


def vizwiz(official: Official) -> Converted:
    """VizWiz-VQA, validation.

    Reads val.json, a list; ids are the names of the pictures, which have one question each. Questions are
    capitalised as in lmms-eval, which reproduces LLaVA-1.5's.
    """
    path = official.file("val.json", "Annotations/val.json")
    found = Converted([])
    for where, item in read_records(path):
        picture = get(item, "image", str, where)
        kind = get(item, "answer_type", str, where)
        found.count(kind)
        found.questions.append(
            Question(
                Path(picture).stem,
                _answers(item, where),
                get(item, "question", str, where).capitalize(),
                (official.picture(picture, f"val/{picture}", f"images/{picture}"),),
                category=kind,
                split=path.stem,
            )
        )
    return found


def textvqa(official: Official) -> Converted:
    """TextVQA 0.5.1, validation.

    Reads TextVQA_0.5.1_val.json. LLaVA-1.5 names OCR tokens in its prompts: its own
    llava_textvqa_val_v051_ocr.jsonl gives these word by word where it is beside; else they are made from
    TextVQA_Rosetta_OCR_v0.2_val.json; else nothing is named. Pictures are train_images/ID.jpg.
    """
    path = official.file("TextVQA_0.5.1_val.json", "TextVQA_0.5.1_*.json")
    theirs, rosetta = (official.beside(name) for name in ("llava_textvqa_val_v051_ocr.jsonl", _ROSETTA))
    prompts = _llava_prompts(theirs) if theirs else {}
    tokens = _rosetta(rosetta) if rosetta and not theirs else {}
    found = Converted([])
    for where, item in read_list(path, "data"):
        name, image = get_id(item, "question_id", where), get(item, "image_id", str, where)
        question, template = get(item, "question", str, where).capitalize(), ""
        if theirs:
            if (image, question.lower().strip()) not in prompts:
                raise UserError(f"{theirs}: has no prompt for question {name} of {path.name}; take it away")
            template = verbatim(prompts[image, question.lower().strip()], where)
        elif rosetta:
            if image not in tokens:
                raise UserError(f"{rosetta}: has no tokens of picture {image} of {path.name}; copy it again")
            listed = ", ".join(tokens[image])
            template = verbatim(f"{question.strip()}\nReference OCR token: {listed}\n{ONE_WORD}", where)
        picture = f"{image}.jpg"
        found.questions.append(
            Question(
                name,
                get_texts(item, "answers", where),
                question,
                (
                    official.picture(
                        picture, f"train_images/{picture}", f"train_val_images/train_images/{picture}"
                    ),
                ),
                template=template,
                split=path.stem.rpartition("_")[2],
            )
        )
    used = theirs or rosetta
    found.notes.append(
        f"prompts name the OCR tokens of {used.name}"
        if used
        else f"prompts name no OCR tokens, which LLaVA-1.5's do: neither {_ROSETTA} nor LLaVA's file is there"
    )
    return found


_ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"


def _llava_prompts(path: Path) -> dict[tuple[str, str], str]:
    """LLaVA's prompts by picture and question in lower case, which is how its scorer finds the answers."""
    prompts: dict[tuple[str, str], str] = {}
    for where, item in read_records(path):
        text = get(item, "text", str, where)
        lines = text.split("\n")
        question = lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]
        prompts[Path(get(item, "image", str, where)).stem, question.lower().strip()] = text
    return prompts


def _rosetta(path: Path) -> dict[str, list[str]]:
    """OCR tokens by picture."""
    tokens: dict[str, list[str]] = {}
    for where, item in read_list(path, "data"):
        values = get(item, "ocr_tokens", list, where)
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{where}: ocr_tokens must be texts; copy the official file again")
        tokens[get(item, "image_id", str, where)] = values
    return tokens


def gqa(official: Official) -> Converted:
    """GQA 1.2, testdev balanced: testdev_balanced_questions.json, an object by id; pictures are ID.jpg."""
    path = official.file("testdev_balanced_questions.json", "questions1.2/testdev_balanced_questions.json")
    found = Converted([])
    values = read_dict(path)
    for name in values:
        where = f"{path}: question {name}"
        item = get(values, name, dict, str(path))
        kind = get(get(item, "types", dict, where), "structural", str, where)
        picture = f"{get_id(item, 'imageId', where)}.jpg"
        found.count(kind)
        found.questions.append(
            Question(
                name,
                (get(item, "answer", str, where),),
                get(item, "question", str, where),
                (official.picture(picture, f"images/{picture}"),),
                category=kind,
                split=path.stem.removesuffix("_questions"),
            )
        )
    return found
