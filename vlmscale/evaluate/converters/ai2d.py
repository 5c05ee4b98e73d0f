"""AI2D: diagrams, some of which are asked about by letters that are drawn over their labels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import (
    Converted,
    Official,
    get,
    get_texts,
    letter,
    read_dict,
    read_text,
)
from vlmscale.evaluate.questions import Question


def ai2d(official: Official) -> Converted:
    """AI2D 1.0, test: the folder of ai2d-all.zip with ai2d_test_ids.csv put into it.

    Reads questions/NAME.png.json of the pictures in ai2d_test_ids.csv (a number a line), categories.json
    where it is there, and images/NAME.png. A question with "abcLabel" asks for letters in place of the
    labels: its picture is abc_images/NAME.png where there is such a folder, else it is drawn here from
    annotations/, else it is the plain one, which the report says.
    """
    root = official.given
    if not root.is_dir():
        raise UserError(f"{root}: name the AI2D folder with questions/ and ai2d_test_ids.csv")
    ids = official.beside("ai2d_test_ids.csv")
    files = sorted((root / "questions").glob("*.json"), key=lambda path: (len(path.name), path.name))
    if ids is None or not files:
        lacks = "ai2d_test_ids.csv" if files else "questions/*.json"
        raise UserError(f"{root}: holds no {lacks}; name the AI2D folder, with the test ids in it")
    wanted = {line.strip() for line in read_text(ids).split("\n") if line.strip()}
    tags = read_dict(root / "categories.json") if (root / "categories.json").is_file() else {}
    found, others, plain = Converted([]), 0, 0
    for path in files:
        item = read_dict(path)
        picture = get(item, "imageName", str, str(path))
        questions = get(item, "questions", dict, str(path))
        if Path(picture).stem not in wanted:
            others += len(questions)
            continue
        category = tags.get(picture, "")
        for text in questions:
            where = f"{path}: question {text[:60]!r}"
            entry = get(questions, text, dict, where)
            image = official.picture(f"images/{picture}", picture)
            if entry.get("abcLabel"):
                lettered = _lettered(official, picture)
                image, plain = lettered or image, plain + (lettered is None)
            found.questions.append(
                _question(text, entry, image, category if isinstance(category, str) else "", where)
            )
            found.count(found.questions[-1].category or "without a category")
    if others:
        found.notes.append(f"{others} questions left out: their pictures are not in {ids.name}")
    if plain:
        found.notes.append(
            f"{plain} questions ask for letters that their pictures do not show: there is neither "
            f"abc_images nor annotations for them"
        )
    return found


def _question(text: str, entry: dict[str, Any], image: str, category: str, where: str) -> Question:
    options = get_texts(entry, "answerTexts", where)
    right = letter(get(entry, "correctAnswer", int, where), len(options), where)
    name = get(entry, "questionId", str, where)
    return Question(name, (right,), text, (image,), options, category=category, split="test")


def _lettered(official: Official, picture: str) -> str | None:
    """The picture with letters over its labels; None where nothing says what to draw."""
    ready = official.picture(f"abc_images/{picture}", f"../abc_images/{picture}")
    if Path(ready).is_file():
        return ready
    notes = official.given / "annotations" / f"{picture}.json"
    plain = Path(official.picture(f"images/{picture}", picture))
    if not notes.is_file() or not plain.is_file():
        return None
    where = str(notes)
    labels = get(read_dict(notes), "text", dict, where)
    try:
        with Image.open(plain) as opened:
            drawn = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{plain}: cannot be read as a picture ({error}); copy it again") from None
    for name in labels:
        label = get(labels, name, dict, where)
        box = get(label, "rectangle", list, f"{where}: {name}")
        _draw(drawn, box, get(label, "replacementText", str, f"{where}: {name}"), f"{where}: {name}")
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return official.store(f"{Path(picture).stem}_letters", buffer.getvalue())


def _draw(picture: Image.Image, box: list[Any], text: str, where: str) -> None:
    """A white box with the letter in its middle, as large as it fits."""
    try:
        (left, top), (right, bottom) = box
        left, right = sorted((int(left), int(right)))
        top, bottom = sorted((int(top), int(bottom)))
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: rectangle={box!r} must be two points; copy the official file again"
        ) from None
    pen = ImageDraw.Draw(picture)
    pen.rectangle((left, top, right, bottom), fill="white")
    font = ImageFont.load_default(max(8, min(bottom - top, right - left)))
    pen.text(((left + right) / 2, (top + bottom) / 2), text, fill="black", font=font, anchor="mm")
