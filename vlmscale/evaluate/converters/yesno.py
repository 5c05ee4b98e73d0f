"""Questions that are answered by yes or no: POPE and MME."""

from __future__ import annotations

from pathlib import Path

from vlmscale.errors import UserError
from vlmscale.evaluate.converters.official import Converted, Official, get, get_id, read_records, read_text
from vlmscale.evaluate.questions import Question

_POPE = ("random", "popular", "adversarial")
_MME = (
    *(
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
_ASK = "Please answer yes or no."
_ENDINGS = (".jpg", ".png", ".jpeg")


def pope(official: Official) -> Converted:
    """POPE on COCO: coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json.

    These are JSON Lines. Each counts its questions from 1, so ids here are CATEGORY/NUMBER. Pictures are
    COCO's val2014.
    """
    if not official.given.is_dir():
        raise UserError(f"{official.given}: name the directory with coco_pope_random.json and the other two")
    found = Converted([])
    for category in _POPE:
        path = official.beside(f"coco_pope_{category}.json")
        if path is None:
            raise UserError(
                f"{official.given}: holds no coco_pope_{category}.json; POPE's score is over all three"
            )
        for where, item in read_records(path):
            picture, answer = get(item, "image", str, where), get(item, "label", str, where)
            _check(answer, where)
            found.count(category)
            found.questions.append(
                Question(
                    f"{category}/{get_id(item, 'question_id', where)}",
                    (answer,),
                    get(item, "text", str, where),
                    (official.picture(picture, f"val2014/{picture}"),),
                    category=category,
                    split="test",
                )
            )
    return found


def mme(official: Official) -> Converted:
    """MME, the official release folder with its 14 categories.

    A category holds images/ and questions_answers_YN/, or pictures and texts side by side; a text has a
    picture's two questions, "QUESTION<tab>Yes" a line. LLaVA-1.5 asks for a word in place of the official
    "Please answer yes or no.", which is therefore taken away.
    """
    root = official.given
    nested = root / "MME_Benchmark"
    root = nested if nested.is_dir() else root
    found = Converted([])
    for category in _MME:
        folder = root / category
        if not folder.is_dir():
            raise UserError(
                f"{root}: holds no folder {category}; name the official release with its 14 categories"
            )
        split_up = folder / "questions_answers_YN"
        texts = split_up if split_up.is_dir() else folder
        elsewhere = official.images / category
        pictures = (folder / "images" if split_up.is_dir() else folder, elsewhere / "images", elsewhere)
        paths = sorted(path for path in texts.glob("*.txt") if path.is_file())
        if not paths:
            raise UserError(f"{texts}: holds no texts with questions; copy the official release again")
        for path in paths:
            found.questions += _pair(path, pictures, category)
            found.counts[category] = found.counts.get(category, 0) + 2
    return found


def _pair(path: Path, folders: tuple[Path, ...], category: str) -> list[Question]:
    """The two questions of a picture."""
    stem = path.stem
    places = [folder / f"{stem}{ending}" for folder in folders for ending in _ENDINGS]
    picture = next((place for place in places if place.is_file()), places[0])
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if len(lines) != 2:
        raise UserError(f"{path}: has {len(lines)} questions where MME has 2 a picture; copy it again")
    questions = []
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        question, tab, answer = line.partition("\t")
        if not tab:
            raise UserError(f"{where}: has no tab between question and answer; copy it again")
        _check(answer.strip(), where)
        questions.append(
            Question(
                f"{category}/{stem}/{number}",
                (answer.strip(),),
                question.replace(_ASK, "").strip(),
                (str(picture),),
                category=category,
                group=f"{category}/{stem}",
            )
        )
    return questions


def _check(answer: str, where: str) -> None:
    if answer.lower() not in ("yes", "no"):
        raise UserError(f"{where}: the answer {answer!r} is neither yes nor no; copy the official file again")
