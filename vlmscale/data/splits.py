"""From a data config to the splits of a run: records, and where their pictures come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlmscale.config import DataConfig
from vlmscale.data import scenes
from vlmscale.data.images import decode_image
from vlmscale.data.records import Quarantined, Record, Turn, load_records


@dataclass
class Split:
    """Records and the distinct pictures they show.

    `load_image(i)` gives picture i as uint8 [H, W, 3]; `image_of[r]` is the picture of record r, -1 for
    text alone.
    """

    records: list[Record]
    image_of: np.ndarray
    num_images: int
    load_image: Callable[[int], np.ndarray]


@dataclass
class Splits:
    """All splits of a run and what was set aside on the way."""

    train: Split
    validation: Split | None
    test: Split | None
    quarantined: list[Quarantined]
    describe: Callable[[], str]

    @property
    def summary(self) -> str:
        """One line: how many records there are and how many were set aside, as of now."""
        return self.describe()


def load_splits(config: DataConfig, image_size: int) -> Splits:
    """Draw the scenes or read the LLaVA records.

    LLaVA records have no split of their own here: they are trained on, and evaluated as "train".

    Raises:
      UserError: nothing usable, or unreadable.
    """
    if config.source == "llava":
        images = Path(config.images) if config.images else None
        read = load_records(Path(config.records), images, image_target=image_size)
        train = _from_files(read.records, image_size)
        return Splits(
            train, None, None, read.quarantined, lambda: replace(read, records=train.records).summary()
        )
    sizes = {"train": config.train_images, "validation": config.validation_images, "test": config.test_images}
    built = {split: scenes.build(split, count, config.seed) for split, count in sizes.items()}
    questions = {split: asked for split, (_, asked) in built.items()}
    parts = {}
    for split, (drawn, asked) in built.items():
        chance = scenes.blind_guess(questions["train"], asked)
        parts[split] = _from_scenes(split, drawn, asked, chance)
    quarantined: list[Quarantined] = []

    def describe() -> str:
        counts = ", ".join(f"{len(part.records)} {split}" for split, part in parts.items())
        return f"scenes (seed {config.seed}): {counts} conversations, {len(quarantined)} quarantined"

    return Splits(parts["train"], parts["validation"], parts["test"], quarantined, describe)


def _from_files(records: list[Record], image_size: int) -> Split:
    paths = sorted({record.image for record in records if record.image is not None})
    index = {path: number for number, path in enumerate(paths)}
    image_of = np.array([-1 if r.image is None else index[r.image] for r in records])
    return Split(records, image_of, len(paths), lambda i: decode_image(paths[i], target=image_size))


def _from_scenes(
    split: str,
    drawn: list[scenes.Scene],
    asked: list[list[scenes.Question]],
    chance: dict[str, float],
) -> Split:
    records, image_of = [], []
    names = {scenes.image_name(split, number): number for number in range(len(drawn))}
    for raw in scenes.records(split, drawn, asked, chance):
        values = [turn["value"].removeprefix("<image>\n") for turn in raw["conversations"]]
        turns = tuple(Turn(q, a) for q, a in zip(values[::2], values[1::2], strict=True))
        labels = {key: raw[key] for key in ("task", "task_group", "chance") if key in raw}
        records.append(Record(raw["id"], Path(raw["image"]), turns, **labels))
        image_of.append(names[raw["image"]])
    return Split(records, np.array(image_of), len(drawn), lambda i: scenes.draw(drawn[i]))


def write_records(path: Path, split: Split) -> None:
    """One JSON line a record with the index of its picture: what training and evaluation read back."""
    with path.open("w", encoding="utf-8") as file:
        for record, image in zip(split.records, split.image_of, strict=True):
            turns = [[turn.question, turn.answer] for turn in record.turns]
            labels = {"task": record.task, "task_group": record.task_group, "chance": record.chance}
            file.write(json.dumps({"id": record.id, "image": int(image), "turns": turns} | labels) + "\n")


def read_records(path: Path) -> tuple[list[Record], np.ndarray]:
    """The inverse of `write_records`: records (their `image` is only None or not) and picture indices."""
    records, image_of = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        turns = tuple(Turn(question, answer) for question, answer in raw["turns"])
        image = None if raw["image"] < 0 else Path(str(raw["image"]))
        records.append(Record(raw["id"], image, turns, raw["task"], raw["task_group"], raw["chance"]))
        image_of.append(raw["image"])
    return records, np.array(image_of)


def texts(records: Iterable[Record]) -> Iterable[str]:
    """All questions and answers: what the run's tokenizer is trained on."""
    for record in records:
        for turn in record.turns:
            yield turn.question
            yield turn.answer
