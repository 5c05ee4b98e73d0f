"""Task and answer files: what is read, and that what cannot be used is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmscale.errors import UserError
from vlmscale.evaluate.questions import KEYS, Question, read_answers, read_questions

LINE = {"id": "1", "question": "What?", "answers": ["cat"]}


def written(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_a_line_with_everything(tmp_path: Path) -> None:
    line = {
        "id": "7",
        "image": ["a.jpg", "b.jpg"],
        "question": "Which?",
        "answers": ["B", "C"],
        "options": ["one", "two", "three"],
        "hint": "Look.",
        "template": "{question}",
        "category": "count",
        "group": "g",
        "split": "test",
        "answer_type": "float",
        "precision": 2.0,
    }
    assert set(line) == set(KEYS)
    (question,) = read_questions(written(tmp_path / "task.jsonl", line))
    assert question == Question(
        "7", ("B", "C"), "Which?", ("a.jpg", "b.jpg"), ("one", "two", "three"), "Look.", "{question}",
        "count", "g", "test", "float", 2,
    )  # fmt: skip


def test_a_line_with_the_least(tmp_path: Path) -> None:
    line = {"id": 5, "question": "What?", "answers": "cat"}
    (question,) = read_questions(written(tmp_path / "task.jsonl", line))
    assert question == Question("5", ("cat",), "What?")
    assert (question.images, question.options, question.answer_type, question.precision) == (
        (),
        (),
        "",
        None,
    )


@pytest.mark.parametrize("name", ["task.json", "task.jsonl"])
def test_a_list_and_lines_are_the_same(tmp_path: Path, name: str) -> None:
    lines = [LINE, LINE | {"id": 2, "image": "a.jpg"}]
    path = tmp_path / name
    path.write_text(json.dumps(lines) if name == "task.json" else "\n".join(map(json.dumps, lines)), "utf-8")
    assert [(question.id, question.images) for question in read_questions(path)] == [
        ("1", ()),
        ("2", ("a.jpg",)),
    ]


def test_null_is_as_if_the_key_were_not_there(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("image", "options", "hint", "category", "precision"))
    assert read_questions(written(tmp_path / "task.jsonl", LINE | nothing)) == [
        Question("1", ("cat",), "What?")
    ]


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    (question,) = read_questions(written(tmp_path / "task.jsonl", LINE | {"answers": ["", "cat"]}))
    assert question.answers == ("", "cat")


def test_without_a_model_to_ask_no_question_is_needed(tmp_path: Path) -> None:
    path = written(tmp_path / "task.jsonl", {"id": "1", "answers": ["cat"]})
    assert read_questions(path, asked=False) == [Question("1", ("cat",))]
    with pytest.raises(UserError, match="item 1: has no question"):
        read_questions(path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"question": "  "}, "item 1: has no question"),
        ({"question": 3}, "item 1: question=3 must be a text"),
        ({"answers": None}, "item 1: answers=None must be a text or a list of texts"),
        ({"answers": []}, "item 1: answers is an empty list"),
        ({"answers": [1]}, r"item 1: answers=\[1\] must be"),
        ({"answers": 1}, "item 1: answers=1 must be"),
        ({"options": []}, "item 1: options is an empty list"),
        ({"options": ["one", " "]}, "item 1: options holds the empty text ' '"),
        ({"options": {"A": "one"}}, "item 1: options={'A': 'one'} must be"),
        ({"image": []}, "item 1: image is an empty list"),
        ({"image": ""}, "item 1: image holds the empty text ''"),
        ({"image": 4}, "item 1: image=4 must be"),
        ({"anwsers": ["cat"]}, "item 1: unknown key 'anwsers'; the keys are id, image, answers"),
        ({"category": 1}, "item 1: category=1 must be a text"),
        ({"group": ["g"]}, r"item 1: group=\['g'\] must be a text"),
        ({"answer_type": "number"}, "item 1: answer_type='number' must be one of text, integer, float, list"),
        ({"answer_type": ["text"]}, "item 1: answer_type="),
        ({"precision": 1.5}, "item 1: precision=1.5 must be a whole number"),
        ({"precision": -1}, "item 1: precision=-1 must be"),
        ({"precision": True}, "item 1: precision=True must be"),
        ({"precision": "2"}, "item 1: precision='2' must be"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = written(tmp_path / "task.jsonl", LINE | change)
    with pytest.raises(UserError, match=said) as error:
        read_questions(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_answers_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="item 1: answers=None must be"):
        read_questions(written(tmp_path / "task.jsonl", {"id": "1", "question": "What?"}))


@pytest.mark.parametrize("name", [None, "", True, 1.5, ["1"]])
def test_an_id_that_is_none_is_named_by_its_number(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match=r"item 2: id=.* must be a text or a whole number"):
        read_questions(written(tmp_path / "task.jsonl", LINE, LINE | {"id": name}))


def test_a_line_that_is_no_object_is_named_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="item 2: must be a JSON object with id and answers"):
        read_questions(written(tmp_path / "task.jsonl", LINE, ["1"]))


def test_an_id_twice_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="item 1: is there twice, as number 1 and 3"):
        read_questions(written(tmp_path / "task.jsonl", LINE, LINE | {"id": 2}, LINE | {"id": 1}))


@pytest.mark.parametrize("read", [read_questions, read_answers])
def test_no_file_and_nothing_in_it(tmp_path: Path, read: Any) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no records"):
        read(written(tmp_path / "empty.jsonl"))


def test_answers_of_ours_and_of_llava(tmp_path: Path) -> None:
    path = written(
        tmp_path / "answers.jsonl",
        {"id": "1", "answer": "cat"},
        {"question_id": 2, "text": "dog", "prompt": "What?", "model_id": "llava"},
        {"question_id": 3, "answer": "fox"},
        {"id": 4, "question_id": 9, "answer": ""},
    )
    assert read_answers(path) == {"1": "cat", "2": "dog", "3": "fox", "4": ""}


@pytest.mark.parametrize(
    "line, said",
    [
        ({"id": 1}, "answer to 1: answer=None must be a text"),
        ({"id": 1, "text": "cat"}, "answer to 1: answer=None must be a text"),
        ({"id": 1, "answer": ["cat"]}, r"answer to 1: answer=\['cat'\] must be a text"),
        ({"answer": "cat"}, "answer 1: id=None must be"),
        (["cat"], "answer 1: must be a JSON object with id and answer"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_answers(written(tmp_path / "answers.jsonl", line))


def test_an_answer_twice_is_named(tmp_path: Path) -> None:
    path = written(
        tmp_path / "answers.jsonl", {"id": 1, "answer": "cat"}, {"question_id": "1", "text": "cat"}
    )
    with pytest.raises(UserError, match="answer to 1: is there twice"):
        read_answers(path)
