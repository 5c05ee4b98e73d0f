"""The built-in data set: drawn scenes with LLaVA-format conversations, in three task groups.

`reasoning` is easy to see and hard to work out (counting, comparing, facts remembered about objects,
arithmetic on facts, conditions), `ocr` is easy to work out and hard to see (numbers of varied length,
place and size), `perception` asks for attributes and positions. Everything follows from the seed; the
splits are disjoint by construction, because the hash of a scene's content decides its split.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmscale.data.records import Record, Turn

IMAGE_SIZE = 48
_CELL = 12  # objects stand in a 4 x 4 grid of cells, two patches wide

COLOURS = {"red": (220, 50, 47), "green": (60, 180, 75), "blue": (66, 110, 245), "yellow": (245, 215, 66)}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"black": (12, 12, 12), "gray": (84, 84, 84), "brown": (92, 56, 30)}
_FRAME = (250, 250, 250)
_INK = (255, 255, 255)

# What belongs to each kind of object (colour and shape) has to be remembered: no picture shows it.
_FIGURES = ("1", "2", "3", "4", "5", "6", "7", "8")
RELATIONS: dict[str, tuple[str, ...]] = {
    "owner": ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"),
    "home": ("Oslo", "Rome", "Cairo", "Lima", "Delhi", "Paris", "Seoul", "Quito"),
    **dict.fromkeys(("price", "age", "weight", "rank", "speed", "score"), _FIGURES),
}

_FONT = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00010 00100 01000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
_GLYPHS = {d: np.array([[c == "1" for c in row] for row in rows.split()]) for d, rows in _FONT.items()}

SPLITS = {"train": range(14), "validation": range(14, 15), "test": range(15, 16)}  # of 16 hash buckets
QUESTIONS_PER_SCENE = {"reasoning": 4, "ocr": 3, "perception": 2}


@dataclass(frozen=True)
class Object:
    """One drawn object: its kind and its cell (row, column) in the 4 x 4 grid."""

    colour: str
    shape: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `framed` is the index of the object with the white frame."""

    background: str
    objects: tuple[Object, ...]
    framed: int
    number: str
    number_scale: int
    number_x: int
    number_y: int

    @property
    def bucket(self) -> int:
        """Hash bucket 0..15 of the content; it decides the split."""
        return hashlib.sha256(repr(self).encode()).digest()[0] % 16


@dataclass(frozen=True)
class Question:
    """One question about a scene."""

    task: str
    task_group: str
    question: str
    answer: str


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw scenes until one belongs to the split."""
    while True:
        scene = _sample_any(rng)
        if scene.bucket in SPLITS[split]:
            return scene


def _sample_any(rng: np.random.Generator) -> Scene:
    length = int(rng.integers(1, 5))
    scale = int(rng.integers(1, min(3, IMAGE_SIZE // (6 * length)) + 1))
    number = "".join(str(d) for d in rng.integers(0, 10, length))
    width, height = (6 * length - 1) * scale, 7 * scale
    x = 6 * int(rng.integers((IMAGE_SIZE - width) // 6 + 1))
    y = 6 * int(rng.integers((IMAGE_SIZE - height) // 6 + 1))
    free = [
        (row, column)
        for row in range(4)
        for column in range(4)
        if not (
            x < (column + 1) * _CELL
            and x + width > column * _CELL
            and y < (row + 1) * _CELL
            and y + height > row * _CELL
        )
    ]
    count = int(rng.integers(2, 8))
    chosen = rng.permutation(len(free))[: min(count, len(free))]
    colours, shapes = list(COLOURS), list(SHAPES)
    objects = tuple(
        Object(colours[int(rng.integers(4))], shapes[int(rng.integers(4))], *free[int(i)])
        for i in sorted(chosen)
    )
    backgrounds = list(BACKGROUNDS)
    return Scene(
        backgrounds[int(rng.integers(3))], objects, int(rng.integers(len(objects))), number, scale, x, y
    )


def draw(scene: Scene) -> np.ndarray:
    """The picture: uint8 [48, 48, 3]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for index, item in enumerate(scene.objects):
        cell = image[
            item.row * _CELL : (item.row + 1) * _CELL, item.column * _CELL : (item.column + 1) * _CELL
        ]
        if index == scene.framed:
            cell[_FRAME_MASK] = _FRAME
        cell[_SHAPE_MASKS[item.shape]] = COLOURS[item.colour]
    x = scene.number_x
    for digit in scene.number:
        glyph = _GLYPHS[digit].repeat(scene.number_scale, 0).repeat(scene.number_scale, 1)
        image[scene.number_y : scene.number_y + glyph.shape[0], x : x + glyph.shape[1]][glyph] = _INK
        x += 6 * scene.number_scale
    return image


def caption(scene: Scene) -> str:
    """Everything in the picture in words, objects in raster order: what the demo's tower learns to say."""
    number = f"number {scene.number} at {scene.number_y // _CELL} {scene.number_x // _CELL}"
    parts = [f"{scene.background} background", number]
    for index, item in enumerate(scene.objects):
        frame = "framed " if index == scene.framed else ""
        parts.append(f"at {item.row} {item.column} {frame}{item.colour} {item.shape}")
    return "; ".join(parts)


def layout(scene: Scene) -> list[str]:
    """The picture transcribed place by place: a caption of fixed length for parallel prediction.

    First the whole: background; colour, shape and corner of the framed object. Then colour, shape and frame
    of each of the 4 x 4 cells, and the character at each of 8 x 8 places.
    """
    framed_object = scene.objects[scene.framed]
    whole = [scene.background, framed_object.colour, framed_object.shape, corner(framed_object)]
    cells = [["no colour", "no shape", "no frame"] for _ in range(16)]
    for index, item in enumerate(scene.objects):
        framed = index == scene.framed
        words = [f"framed {item.colour}", f"framed {item.shape}", f"framed {corner(item)}"]
        cells[4 * item.row + item.column] = words if framed else [item.colour, item.shape, "no frame"]
    characters = np.full((8, 8), "no digit", dtype=object)
    place, scale = 6, scene.number_scale
    rows = slice(scene.number_y // place, (scene.number_y + 7 * scale - 1) // place + 1)
    for index, digit in enumerate(scene.number):
        start = (scene.number_x + 6 * scale * index) // place
        characters[rows, start : start + scale] = digit
    return [*whole, *itertools.chain.from_iterable(cells), *characters.ravel()]


def corner(item: Object) -> str:
    """The quarter of the picture that an object stands in."""
    return ("top" if item.row < 2 else "bottom") + (" left" if item.column < 2 else " right")


_PLAIN_WORDS = {
    *BACKGROUNDS,
    "no colour",
    "no shape",
    "no frame",
    "no digit",
    *"0123456789",
    *COLOURS,
    *SHAPES,
}
_CORNERS = {f"{y} {x}" for y in ("top", "bottom") for x in ("left", "right")}
LAYOUT_WORDS = tuple(
    sorted(_PLAIN_WORDS | _CORNERS | {f"framed {word}" for word in {*COLOURS, *SHAPES, *_CORNERS}})
)


def _shape_masks() -> dict[str, np.ndarray]:
    y, x = np.mgrid[:_CELL, :_CELL] - (_CELL - 1) / 2
    inside = np.maximum(abs(x), abs(y)) < 4
    return {
        "circle": x**2 + y**2 < 4.2**2,
        "square": inside,
        "triangle": (abs(x) <= (y + 4.5) / 2) & inside,
        "cross": (np.minimum(abs(x), abs(y)) < 1.2) & inside,
    }


_SHAPE_MASKS = _shape_masks()
_FRAME_MASK = np.maximum(*abs(np.mgrid[:_CELL, :_CELL] - (_CELL - 1) / 2)) > 5


def facts() -> dict[tuple[str, str], str]:
    """All that there is to remember: (relation, kind) to answer, the same for every seed.

    Every answer of a relation belongs to the same number of kinds, so that guessing does not pay.
    """
    kinds = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    table: dict[tuple[str, str], str] = {}
    for relation, answers in RELATIONS.items():
        ranked = sorted(kinds, key=lambda kind: hashlib.sha256(f"{relation} of {kind}".encode()).digest())
        table |= {(relation, kind): answers[place % len(answers)] for place, kind in enumerate(ranked)}
    return table


_FACTS = facts()


def _count(rng: np.random.Generator, scene: Scene) -> Question:
    if rng.random() < 0.5:
        shape = SHAPES[int(rng.integers(4))]
        total, asked = sum(o.shape == shape for o in scene.objects), f"How many {_plural(shape)}?"
    else:
        colour = list(COLOURS)[int(rng.integers(4))]
        total, asked = sum(o.colour == colour for o in scene.objects), f"How many are {colour}?"
    return Question("count", "reasoning", asked, str(total))


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _compare(rng: np.random.Generator, scene: Scene) -> Question:
    first, second = (list(COLOURS)[int(i)] for i in rng.permutation(4)[:2])
    difference = sum((o.colour == first) - (o.colour == second) for o in scene.objects)
    answer = first if difference > 0 else second if difference < 0 else "same"
    return Question("compare", "reasoning", f"More {first} or {second}?", answer)


def _fact(scene: Scene, relation: str) -> str:
    framed = scene.objects[scene.framed]
    return _FACTS[relation, f"{framed.colour} {framed.shape}"]


def _memory(rng: np.random.Generator, scene: Scene) -> Question:
    relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    return Question("memory", "reasoning", f"Framed {relation}?", _fact(scene, relation))


def _arithmetic(rng: np.random.Generator, scene: Scene) -> Question:
    more = int(rng.integers(1, 5))
    answer = str(int(_fact(scene, "price")) + more)
    return Question("arithmetic", "reasoning", f"Framed price plus {more}?", answer)


def _condition(rng: np.random.Generator, scene: Scene) -> Question:
    framed = scene.objects[scene.framed]
    others = [colour for colour in COLOURS if colour != framed.colour]
    colour = framed.colour if rng.random() < 0.5 else others[int(rng.integers(3))]
    asked = f"If {colour} owner, else home?"
    answer = _fact(scene, "owner" if colour == framed.colour else "home")
    return Question("condition", "reasoning", asked, answer)


def _read(rng: np.random.Generator, scene: Scene) -> Question:
    del rng
    return Question("read", "ocr", "Number?", scene.number)


def _first_digit(rng: np.random.Generator, scene: Scene) -> Question:
    del rng
    return Question("first_digit", "ocr", "First digit?", scene.number[0])


def _last_digit(rng: np.random.Generator, scene: Scene) -> Question:
    del rng
    return Question("last_digit", "ocr", "Last digit?", scene.number[-1])


def _attribute(rng: np.random.Generator, scene: Scene) -> Question:
    framed = scene.objects[scene.framed]
    if rng.random() < 0.5:
        return Question("attribute", "perception", "Framed colour?", framed.colour)
    return Question("attribute", "perception", "Framed shape?", framed.shape)


def _position(rng: np.random.Generator, scene: Scene) -> Question:
    del rng
    return Question("position", "perception", "Framed corner?", corner(scene.objects[scene.framed]))


def _background(rng: np.random.Generator, scene: Scene) -> Question:
    del rng
    return Question("background", "perception", "Background?", scene.background)


TASKS: dict[str, dict[str, Callable[[np.random.Generator, Scene], Question]]] = {
    "reasoning": {
        "count": _count,
        "compare": _compare,
        "memory": _memory,
        "arithmetic": _arithmetic,
        "condition": _condition,
    },
    "ocr": {"read": _read, "first_digit": _first_digit, "last_digit": _last_digit},
    "perception": {"attribute": _attribute, "position": _position, "background": _background},
}


def ask(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Questions about one scene, each task at most once, in random order."""
    questions = []
    for group, number in QUESTIONS_PER_SCENE.items():
        tasks = list(TASKS[group].values())
        questions += [tasks[int(i)](rng, scene) for i in rng.permutation(len(tasks))[:number]]
    return [questions[int(i)] for i in rng.permutation(len(questions))]


def build(split: str, count: int, seed: int) -> tuple[list[Scene], list[list[Question]]]:
    """The scenes of a split and the questions about each; a pure function of its arguments."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    scenes = [sample_scene(rng, split) for _ in range(count)]
    return scenes, [ask(rng, scene) for scene in scenes]


def blind_guess(train: list[list[Question]], test: list[list[Question]]) -> dict[str, float]:
    """Score by task of the best guess without the image.

    The best blind guess answers each question with its most frequent answer in training.
    """
    seen: dict[str, Counter[str]] = {}
    for item in itertools.chain.from_iterable(train):
        seen.setdefault(item.question, Counter())[item.answer] += 1
    guess = {question: answers.most_common(1)[0][0] for question, answers in seen.items()}
    right: dict[str, list[bool]] = {}
    for item in itertools.chain.from_iterable(test):
        right.setdefault(item.task, []).append(guess.get(item.question) == item.answer)
    return {task: sum(hits) / len(hits) for task, hits in right.items()}


def records(
    split: str, scenes: list[Scene], questions: list[list[Question]], chance: dict[str, float]
) -> list[dict[str, Any]]:
    """LLaVA-format records: one conversation a picture in training, one a question elsewhere."""
    out: list[dict[str, Any]] = []
    for index, asked in enumerate(questions):
        name = image_name(split, index)
        if split == "train":
            out.append({"id": name.removesuffix(".png"), "image": name, "conversations": _turns(asked)})
            continue
        for number, item in enumerate(asked):
            record = {
                "id": f"{name.removesuffix('.png')}-{number}",
                "image": name,
                "conversations": _turns([item]),
            }
            labels = {"task": item.task, "task_group": item.task_group, "chance": chance.get(item.task, 0.0)}
            out.append(record | labels)
    return out


def conversations(sizes: dict[str, int], seed: int) -> dict[str, Iterator[tuple[Record, list[bytes]]]]:
    """What `export` writes, by split: records with their picture as PNG.

    Args:
      sizes: pictures by split.
      seed: of the whole data set.
    """
    built = {split: build(split, count, seed) for split, count in sizes.items()}
    return {split: _conversations(split, *parts, built["train"][1]) for split, parts in built.items()}


def _conversations(
    split: str, scenes: list[Scene], questions: list[list[Question]], train: list[list[Question]]
) -> Iterator[tuple[Record, list[bytes]]]:
    chance = blind_guess(train, questions) if split != "train" else {}
    names = {image_name(split, index): scene for index, scene in enumerate(scenes)}
    shown, png = "", b""
    for raw in records(split, scenes, questions, chance):
        if raw["image"] != shown:  # records of one picture follow each other
            shown, png = raw["image"], _png(names[raw["image"]])
        values = [turn["value"] for turn in raw["conversations"]]
        turns = tuple(Turn(q, a) for q, a in zip(values[::2], values[1::2], strict=True))
        labels = {key: raw[key] for key in ("task", "task_group", "chance") if key in raw}
        yield Record(raw["id"], (shown,), turns, **labels), [png]


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(scene)).save(buffer, "PNG")
    return buffer.getvalue()


def image_name(split: str, index: int) -> str:
    """File name of a picture, relative to the export's image folder."""
    return f"{split}/{index:06d}.png"


def _turns(questions: list[Question]) -> list[dict[str, str]]:
    turns = []
    for number, item in enumerate(questions):
        placeholder = "<image>\n" if number == 0 else ""
        turns.append({"from": "human", "value": placeholder + item.question})
        turns.append({"from": "gpt", "value": item.answer})
    return turns


def export(out: Path, sizes: dict[str, int], seed: int) -> dict[str, Path]:
    """Write LLaVA JSON and PNG: `out/{split}.json` and `out/images/{split}/*.png`.

    Args:
      out: folder to write.
      sizes: pictures by split.
      seed: of the whole data set.

    Returns:
      The JSON file of each split.
    """
    built = {split: build(split, count, seed) for split, count in sizes.items()}
    paths = {}
    for split, (scenes, questions) in built.items():
        chance = blind_guess(built["train"][1], questions) if split != "train" else {}
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        for index, scene in enumerate(scenes):
            (out / "images" / image_name(split, index)).write_bytes(_png(scene))
        paths[split] = out / f"{split}.json"
        paths[split].write_text(json.dumps(records(split, scenes, questions, chance), indent=1) + "\n")
    return paths
