"""The built-in data set: reproducible, disjoint, true, and the same in memory and on disk."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlmscale.config import DataConfig
from vlmscale.data import scenes
from vlmscale.data.dataset import Dataset
from vlmscale.data.images import decode_image
from vlmscale.data.scenes import Question, Scene
from vlmscale.data.splits import open_splits, prepare_records

COUNT = 150
Built = dict[str, tuple[list[Scene], list[list[Question]]]]


@pytest.fixture(scope="module")
def built() -> Built:
    return {split: scenes.build(split, COUNT, seed=5) for split in scenes.SPLITS}


def answer(scene: Scene, question: str) -> str:
    """Worked out anew from what the scene holds, by reading the question."""
    framed = scene.objects[scene.framed]
    shapes, colours = Counter(o.shape for o in scene.objects), Counter(o.colour for o in scene.objects)
    one = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
    words = question.rstrip("?").lower().split()

    def fact(relation: str) -> str:
        return scenes.facts()[relation, f"{framed.colour} {framed.shape}"]

    match words:
        case ["how", "many", "are", colour]:
            return str(colours[colour])
        case ["how", "many", plural]:
            return str(shapes[one[plural]])
        case ["more", first, "or", second]:
            left, right = colours[first], colours[second]
            return "same" if left == right else first if left > right else second
        case ["if", colour, "owner,", "else", "home"]:
            return fact("owner" if framed.colour == colour else "home")
        case ["framed", relation, "plus", more]:
            return str(int(fact(relation)) + int(more))
        case ["framed", relation] if relation in scenes.RELATIONS:
            return fact(relation)
        case ["framed", "colour"]:
            return framed.colour
        case ["framed", "shape"]:
            return framed.shape
        case ["framed", "corner"]:
            return f"{['top', 'bottom'][framed.row // 2]} {['left', 'right'][framed.column // 2]}"
        case ["background"]:
            return scene.background
        case ["number"]:
            return scene.number
        case [place, "digit"]:
            return scene.number[{"first": 0, "last": -1}[place]]
    raise AssertionError(question)


def test_every_answer_is_right(built: Built) -> None:
    tasks = set()
    for drawn, asked in built.values():
        for scene, questions in zip(drawn, asked, strict=True):
            assert Counter(q.task_group for q in questions) == scenes.QUESTIONS_PER_SCENE
            assert len({q.task for q in questions}) == len(questions)
            for item in questions:
                assert item.answer == answer(scene, item.question), (scene, item)
                assert item.task in scenes.TASKS[item.task_group]
                tasks.add(item.task)
    assert tasks == {task for group in scenes.TASKS.values() for task in group}


def test_everything_follows_from_the_seed(built: Built) -> None:
    again = scenes.build("test", COUNT, seed=5)
    assert again == built["test"]
    assert scenes.build("test", 20, seed=6)[0] != again[0][:20]
    fewer = scenes.build("test", 20, seed=5)[0]
    assert fewer == again[0][:20]


def test_splits_share_no_picture(built: Built) -> None:
    pictures = {
        split: {scenes.draw(scene).tobytes() for scene in drawn} for split, (drawn, _) in built.items()
    }
    # Whatever the seeds: content alone decides.
    pictures["train"] |= {scenes.draw(scene).tobytes() for scene in scenes.build("train", COUNT, seed=9)[0]}
    assert not pictures["train"] & pictures["test"]
    assert not pictures["train"] & pictures["validation"]
    assert not pictures["validation"] & pictures["test"]
    for split, (drawn, _) in built.items():
        assert {scene.bucket for scene in drawn} <= set(scenes.SPLITS[split])
    buckets = [bucket for split in scenes.SPLITS.values() for bucket in split]
    assert len(buckets) == len(set(buckets))


def test_scenes_fit_their_picture(built: Built) -> None:
    for scene in built["train"][0]:
        places = [(item.row, item.column) for item in scene.objects]
        assert places == sorted(set(places))
        image = scenes.draw(scene)
        assert image.shape == (48, 48, 3)
        assert image.dtype == np.uint8
        # Every digit's strokes are there in full: nothing is drawn over the number.
        ink = (image == 255).all(-1).sum()
        strokes = sum(scenes._GLYPHS[digit].sum() for digit in scene.number)
        assert ink == strokes * scene.number_scale**2
        framed = scene.objects[scene.framed]
        cell = image[framed.row * 12 : framed.row * 12 + 12, framed.column * 12 : framed.column * 12 + 12]
        assert (cell[0] == 250).all()
        for item in scene.objects:
            centre = image[item.row * 12 + 6, item.column * 12 + 6]
            assert tuple(centre) == scenes.COLOURS[item.colour]


def test_layout_has_one_length_and_known_words(built: Built) -> None:
    """The whole (background, then the framed object's colour, shape and corner), cells, characters."""
    for scene in built["train"][0]:
        words = scenes.layout(scene)
        assert len(words) == 4 + 3 * 16 + 8 * 8
        assert set(words) <= set(scenes.LAYOUT_WORDS)
        framed = scene.objects[scene.framed]
        corner = answer(scene, "Framed corner?")
        assert words[:4] == [scene.background, framed.colour, framed.shape, corner]
        cells = np.array(words[4:52]).reshape(4, 4, 3)
        for number, item in enumerate(scene.objects):
            said = [item.colour, item.shape, "no frame"]
            if number == scene.framed:
                said = [f"framed {item.colour}", f"framed {item.shape}", f"framed {corner}"]
            assert list(cells[item.row, item.column]) == said
        assert (cells[..., 0] != "no colour").sum() == len(scene.objects)
        row = np.array(words[52:]).reshape(8, 8)[scene.number_y // 6]
        read = "".join(word for word in row if word != "no digit")
        assert read[:: scene.number_scale] == scene.number


def test_caption_names_every_object(built: Built) -> None:
    for scene in built["validation"][0]:
        said = re.findall(r"at (\d) (\d) (framed )?(\w+) (\w+)", scenes.caption(scene))
        wanted = [
            (str(o.row), str(o.column), "framed " if i == scene.framed else "", o.colour, o.shape)
            for i, o in enumerate(scene.objects)
        ]
        assert said == wanted


def test_facts_are_balanced() -> None:
    table = scenes.facts()
    for relation, answers in scenes.RELATIONS.items():
        known = [fact for (name, _), fact in table.items() if name == relation]
        assert Counter(known) == dict.fromkeys(answers, 16 // len(answers))


def test_blind_guess_is_the_best_answer_to_each_question() -> None:
    def item(question: str, answer: str, task: str = "t") -> Question:
        return Question(task, "g", question, answer)

    train = [[item("a?", "1"), item("a?", "2")], [item("a?", "2"), item("b?", "x")]]
    test = [
        [item("a?", "2"), item("a?", "1")],
        [item("a?", "2"), item("b?", "x", "u"), item("new?", "y", "u")],
    ]
    assert scenes.blind_guess(train, test) == {"t": 2 / 3, "u": 1 / 2}


def test_blind_guess_against_every_possible_guess() -> None:
    """On the questions that it was made from, no fixed answer a question does better."""
    _, asked = scenes.build("train", 60, seed=1)
    flat = [item for questions in asked for item in questions]
    best: dict[str, list[int]] = {}
    for question in {item.question for item in flat}:
        same = [item for item in flat if item.question == question]
        hits = max(sum(item.answer == guess for item in same) for guess in {item.answer for item in same})
        best.setdefault(same[0].task, []).append(hits)
    totals = Counter(item.task for item in flat)
    wanted = {task: sum(hits) / totals[task] for task, hits in best.items()}
    assert scenes.blind_guess(asked, asked) == pytest.approx(wanted)


def nothing(*_: object) -> None:
    return None


def prepared(config: DataConfig, out: Path) -> dict[str, Dataset]:
    return {split: parts[0] for split, parts in open_splits(prepare_records(config, out, nothing)).items()}


def test_export_reads_back_as_what_was_in_memory(tmp_path: Path) -> None:
    sizes = {"train": 12, "validation": 3, "test": 5}
    paths = scenes.export(tmp_path / "export", sizes, seed=4)
    config = DataConfig(train_images=12, validation_images=3, test_images=5, seed=4)
    memory = prepared(config, tmp_path / "memory")
    for split, count in sizes.items():
        images = str(tmp_path / "export" / "images")
        config = DataConfig(source="llava", records=str(paths[split]), images=images)
        disk, drawn = prepared(config, tmp_path / split)["train"], memory[split]
        assert not disk.manifest["quarantined"]
        assert [disk.read(i) for i in range(len(disk))] == [drawn.read(i) for i in range(len(drawn))]
        assert len(disk.index.picture_record) == count
        np.testing.assert_array_equal(disk.index.picture, drawn.index.picture)
    train, test = ([data.record(i) for i in range(len(data))] for data in (memory["train"], memory["test"]))
    assert any(record.chance > 0 for record in test)
    assert all(len(record.turns) == 9 for record in train)
    assert all(len(record.turns) == 1 for record in test)


def test_a_prepared_scene_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    data = prepared(DataConfig(train_images=4, validation_images=2, test_images=2), tmp_path / "out")
    drawn, _ = scenes.build("test", 2, 0)
    for index in range(len(data["test"])):
        record, [png] = data["test"].read(index)
        number = int(record.images[0].removeprefix("test/").removesuffix(".png"))
        np.testing.assert_array_equal(decode_image(png), scenes.draw(drawn[number]))
        assert record.turns[0].question.startswith("<image>\n")


def test_scenes_of_another_number_replace_those_that_lie_there(tmp_path: Path) -> None:
    for count in (4, 6):
        config = DataConfig(train_images=count, validation_images=2, test_images=2)
        assert len(prepared(config, tmp_path / "out")["train"]) == count
