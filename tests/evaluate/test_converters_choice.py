"""Official files of multiple choice benchmarks come out as questions, and as prompts word by word."""

from __future__ import annotations

import base64
import builtins
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmscale.errors import UserError
from vlmscale.evaluate.converters import Report, convert
from vlmscale.evaluate.questions import Question, read_questions
from vlmscale.evaluate.tasks import BENCHMARKS, asked

LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(shade: int = 0, size: int = 8, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def converted(
    task: str, source: Path, out: Path, circular: bool = False
) -> tuple[Report, list[Question], list[str]]:
    report = convert(task, source, out, circular=circular)
    questions = read_questions(report.path)
    return report, questions, [asked(BENCHMARKS[task], question) for question in questions]


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, head.split("\t"), restval="", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(number: int, **changes: str) -> dict[str, str]:
    values = {
        "index": str(number),
        "question": "Which is right?",
        "A": "one",
        "B": "two",
        "C": "three",
        "answer": "B",
        "category": "attribute",
        "split": "dev",
        "image": base64.b64encode(picture(1, kind="JPEG")).decode(),
    }
    return values | changes


def test_mmbench_with_pictures_inside(tmp_path: Path) -> None:
    hint = 'A passage,\nin "two" lines.'
    rows = [
        row(5, hint=hint, D="nan"),
        row(7, image="5"),
        row(8, C="None", D="four", image=base64.b64encode(picture(9)).decode()),
    ]
    path = table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    report, questions, prompts = converted("mmbench", path, tmp_path / "tasks")
    assert questions[0] == Question(
        "5",
        ("B",),
        "Which is right?",
        ("images/mmbench/5.jpg",),
        ("one", "two", "three"),
        hint,
        category="attribute",
        split="dev",
    )
    assert prompts[0] == hint + "\nWhich is right?\nA. one\nB. two\nC. three" + LETTER
    assert prompts[2] == "Which is right?\nA. one\nB. two" + LETTER  # LLaVA stops at the first empty one
    assert [question.images for question in questions[1:]] == [
        ("images/mmbench/5.jpg",),
        ("images/mmbench/8.png",),
    ]
    assert (tmp_path / "tasks" / "images" / "mmbench" / "8.png").read_bytes() == picture(9)
    assert report.missing == 0


def test_mmbench_circular_rotates_options_and_letters(tmp_path: Path) -> None:
    path = table(tmp_path / "mmbench_dev_20230712.tsv", [row(5, answer="A")])
    report, questions, prompts = converted("mmbench", path, tmp_path / "tasks", circular=True)
    assert [(question.id, question.answers[0], question.group) for question in questions] == [
        ("5", "A", "5"),
        ("1000005", "C", "5"),
        ("2000005", "B", "5"),
    ]
    assert prompts[1] == "Which is right?\nA. two\nB. three\nC. one" + LETTER
    assert all(question.options[ord(question.answers[0]) - 65] == "one" for question in questions)
    assert report.notes == ("1 questions, each with the rotations of its options as a group",)


def test_mmbench_rotations_in_the_table_are_grouped(tmp_path: Path) -> None:
    rows = [row(1000005, A="two", B="three", C="one", answer="A"), row(5), row(6)]
    path = table(tmp_path / "mmbench_dev_cn_20231003.tsv", rows)
    _, questions, prompts = converted("mmbench", path, tmp_path / "tasks")
    assert [(question.id, question.group) for question in questions] == [
        ("5", "5"),
        ("6", "6"),
        ("1000005", "5"),
    ]
    assert {question.images for question in questions} == {("images/mmbench/5.jpg",)}
    assert prompts[0] == "Which is right?\nA. one\nB. two\nC. three\n请直接回答选项字母。"
    with pytest.raises(UserError, match="holds the rotations already"):
        converted("mmbench", path, tmp_path / "tasks", circular=True)


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([row(5, answer="")], r"index 5: answer='' must be a letter; test splits have no answers"),
        ([row(5, answer="D")], "the answer is option 3, counted from 0, but there are 3 options"),
        ([row(5), row(5)], "index 5 is there twice"),
        ([row(5, index="x")], r"row 2: index='x' must be a whole number"),
        ([row(5, image="6")], "image names row 6, which has no picture"),
        ([row(5, image="5")], "image names row 5, which has no picture"),
        ([row(5, image="?!")], "image is not base64"),
        ([row(5, image="")], "has no picture"),
        ([row(5, question="")], "question 5: has no text"),
        ([], "holds no question of mmbench"),
    ],
)
def test_bad_mmbench_tables(tmp_path: Path, rows: list[dict[str, str]], expected: str) -> None:
    path = table(tmp_path / "mmbench.tsv", rows)
    with pytest.raises(UserError, match=expected):
        converted("mmbench", path, tmp_path / "tasks")


def test_an_mmbench_table_without_its_columns(tmp_path: Path) -> None:
    path = put(tmp_path / "x.tsv", "index\tquestion\tA\tB\timage\n")
    with pytest.raises(UserError, match="has no column 'answer'"):
        converted("mmbench", path, tmp_path / "tasks")


def test_scienceqa_asks_context_question_and_options(tmp_path: Path) -> None:
    item = {
        "question": "Which of these states is farthest north?",
        "choices": ["West  Virginia", "Louisiana"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "lecture": "",
        "solution": "",
        "split": "test",
    }
    text = item | {"image": None, "hint": "Think. ", "answer": 1}
    problems = put(tmp_path / "problems.json", {"1": item, "4": item, "5": text})
    put(tmp_path / "pid_splits.json", {"train": ["1"], "test": ["4", "5"]})
    put(tmp_path / "images" / "test" / "4" / "image.png", "x")
    report, questions, prompts = converted("scienceqa", tmp_path, tmp_path / "tasks")
    assert prompts == [
        "Context: N/A\nQuestion: Which of these states is farthest north?\n"
        "Options: (A) West Virginia (B) Louisiana" + LETTER,
        "Context: Think.\nQuestion: Which of these states is farthest north?\n"
        "Options: (A) West Virginia (B) Louisiana" + LETTER,
    ]
    assert questions[0].images == (str(tmp_path / "images" / "test" / "4" / "image.png"),)
    assert questions[1].images == ()
    assert [(question.answers, question.category) for question in questions] == [
        (("A",), "image"),
        (("B",), "text"),
    ]
    assert questions[0].options == ("West  Virginia", "Louisiana")
    assert report.counts == {"image": 1, "text": 1}
    put(problems, {"4": item})
    with pytest.raises(UserError, match=r"has no problem 5 of pid_splits\.json"):
        converted("scienceqa", tmp_path, tmp_path / "tasks")
    put(problems, {"4": item | {"answer": 2}, "5": text})
    with pytest.raises(UserError, match="problem 4: the answer is option 2"):
        converted("scienceqa", tmp_path, tmp_path / "tasks")
    put(problems, {"4": item | {"question": "What is {options}?"}, "5": text})
    with pytest.raises(UserError, match=r"problem 4: its text holds \{options\}"):
        converted("scienceqa", tmp_path, tmp_path / "tasks")


def test_seed_leaves_videos_out(tmp_path: Path) -> None:
    item = {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": 4,
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    video = item | {
        "data_id": "94328.webm",
        "data_type": "video",
        "question_id": "v1738",
        "question_type_id": 10,
    }
    kinds = {"Instances Counting": 5, "Action Recognition": 10}
    put(tmp_path / "SEED-Bench.json", {"questions": [item, video], "question_type": kinds})
    put(tmp_path / "SEED-Bench-image" / "1454426_2591111986", "x")
    report, questions, prompts = converted("seed", tmp_path, tmp_path / "tasks")
    assert questions == [
        Question(
            "101669",
            ("A",),
            "How many towels are in the image?",
            (str(tmp_path / "SEED-Bench-image" / "1454426_2591111986"),),
            ("One", "Two", "Three", "4"),
            category="Instances Counting",
            split="image",
        )
    ]
    assert prompts == ["How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. 4" + LETTER]
    assert report.notes == ("1 questions left out: they are about videos, not pictures",)


def test_ai2d_draws_letters_where_a_question_asks_for_them(tmp_path: Path) -> None:
    def entry(name: str, letters: bool) -> dict[str, Any]:
        return {"abcLabel": letters, "answerTexts": ["B", "A"], "correctAnswer": 1, "questionId": name}

    for number in (0, 10):
        asks = {"What is A?": entry(f"{number}.png-0", True), "What eats?": entry(f"{number}.png-1", False)}
        put(tmp_path / "questions" / f"{number}.png.json", {"imageName": f"{number}.png", "questions": asks})
        put(tmp_path / "images" / f"{number}.png", picture(size=64))
    put(tmp_path / "ai2d_test_ids.csv", "10\n")
    put(tmp_path / "categories.json", {"10.png": "foodChainsWebs"})
    report, questions, prompts = converted("ai2d", tmp_path, tmp_path / "tasks")
    plain = str(tmp_path / "images" / "10.png")
    assert questions[0] == Question(
        "10.png-0", ("B",), "What is A?", (plain,), ("B", "A"), category="foodChainsWebs", split="test"
    )
    assert prompts[0] == "What is A?\nA. B\nB. A" + LETTER
    assert "2 questions left out" in report.notes[0]
    assert "1 questions ask for letters that their pictures do not show" in report.notes[1]
    box = {"rectangle": [[10, 10], [40, 30]], "replacementText": "A", "value": "fox", "labelId": "T0"}
    notes = put(tmp_path / "annotations" / "10.png.json", {"imageName": "10.png", "text": {"T0": box}})
    report, questions, _ = converted("ai2d", tmp_path, tmp_path / "tasks")
    assert [question.images for question in questions] == [("images/ai2d/10_letters.png",), (plain,)]
    with Image.open(tmp_path / "tasks" / "images" / "ai2d" / "10_letters.png") as drawn:
        assert drawn.getpixel((11, 11)) == (255, 255, 255)
        assert drawn.getpixel((50, 50)) == (0, 0, 0)
        shades = {drawn.getpixel((x, y)) for x in range(10, 41) for y in range(10, 31)}
        assert len(shades) > 1  # the letter
    assert len(report.notes) == 1
    put(notes, {"text": {"T0": box | {"rectangle": [1, 2]}}})
    with pytest.raises(UserError, match=r"T0: rectangle=\[1, 2\] must be two points"):
        converted("ai2d", tmp_path, tmp_path / "tasks")
    ready = put(tmp_path / "abc_images" / "10.png", picture(5))
    _, questions, _ = converted("ai2d", tmp_path, tmp_path / "tasks")
    assert questions[0].images == (str(ready),)


def mmmu_row(name: str, pictures: int, **changes: str) -> dict[str, Any]:
    images = {
        f"image_{i}": {"bytes": picture(i), "path": f"{name}_{i}.png"} if i <= pictures else None
        for i in range(1, 8)
    }
    texts = {
        "id": name,
        "question": "<image 1> What is {it}?",
        "options": "['$6', '<image 2>']",
        "explanation": "",
        "img_type": "['Tables']",
        "answer": "B",
        "topic_difficulty": "Medium",
        "question_type": "multiple-choice",
        "subfield": "Managerial Accounting",
    }
    return texts | changes | images


def test_mmmu_reads_parquet_with_pictures_inside(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    rows = [
        mmmu_row("validation_Accounting_1", 2),
        mmmu_row("validation_Accounting_2", 1, question_type="open", options="[]", answer="8.4"),
        mmmu_row("validation_Art_Theory_3", 1, question_type="open", options="[]", answer="['a', '2']"),
    ]
    path = tmp_path / "Accounting" / "validation-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    report, questions, prompts = converted("mmmu", tmp_path, tmp_path / "tasks")
    assert questions[0] == Question(
        "validation_Accounting_1",
        ("B",),
        "<image 1> What is {it}?",
        ("images/mmmu/validation_Accounting_1_1.png", "images/mmmu/validation_Accounting_1_2.png"),
        ("$6", "<image 2>"),
        template=prompts[0],
        category="Accounting",
        split="validation",
    )
    assert prompts[0] == (
        "<image 1> What is {it}?\n(A) $6\n(B) <image 2>\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert prompts[1] == "<image 1> What is {it}?\nAnswer the question using a single word or phrase."
    assert [question.answers for question in questions[1:]] == [("8.4",), ("a", "2")]
    assert questions[2].category == "Art_Theory"
    assert (tmp_path / "tasks" / "images" / "mmmu" / "validation_Accounting_1_2.png").read_bytes() == picture(
        2
    )
    assert report.notes[0].startswith("1 questions have several pictures")
    parquet.write_table(pyarrow.Table.from_pylist([mmmu_row("validation_Art_1", 1, answer="?")]), path)
    with pytest.raises(
        UserError, match=r"row 1 \(validation_Art_1\): answer='\?' is no letter of its 2 options"
    ):
        converted("mmmu", tmp_path, tmp_path / "tasks")
    put(path, b"PAR1 cut off")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        converted("mmmu", tmp_path, tmp_path / "tasks")


def test_mmmu_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "Art" / "validation-00000-of-00001.parquet", b"")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install pyarrow"):
        convert("mmmu", tmp_path, tmp_path / "tasks")


def mathvista_item(name: str, **changes: Any) -> dict[str, Any]:
    metadata = {"split": "testmini", "task": "geometry problem solving", "category": "math-targeted-vqa"}
    item = {
        "question": "Find $m\\angle H$",
        "image": f"images/{name}.jpg",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": "97",
        "question_type": "free_form",
        "answer_type": "integer",
        "pid": name,
        "metadata": metadata,
    }
    return item | changes


def test_mathvista_queries(tmp_path: Path) -> None:
    choice = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["97", "102"],
        "answer": "102",
    }
    items = {
        "1": mathvista_item("1", answer_type="float", precision=1.0, answer="1.2"),
        "2": mathvista_item("2", unit="g"),
        "5": mathvista_item("5", **choice),
        "6": mathvista_item("6", answer_type="list", answer="[1, 2]"),
        "7": mathvista_item("7", query="Published."),
    }
    path = put(tmp_path / "testmini.json", items)
    put(tmp_path / "images" / "5.jpg", "x")
    report, questions, prompts = converted("mathvista", tmp_path, tmp_path / "tasks")
    assert prompts == [
        "Hint: Please answer the question requiring a floating-point number with one decimal place and "
        "provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: Find $m\\angle H$",
        "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., "
        "1, 2, 3, at the end.\nQuestion: Find $m\\angle H$ (Unit: g)",
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the "
        "end.\nQuestion: Find $m\\angle H$\nChoices:\n(A) 97\n(B) 102",
        "Hint: Please answer the question requiring a Python list as an answer and provide the final list, "
        "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.\nQuestion: Find $m\\angle H$",
        "Published.",
    ]
    assert questions[2] == Question(
        "5",
        ("B",),
        "Find $m\\angle H$",
        (str(tmp_path / "images" / "5.jpg"),),
        ("97", "102"),
        template=prompts[2],
        category="geometry problem solving",
        split="testmini",
    )
    assert (questions[0].answer_type, questions[0].precision) == ("float", 1)
    assert report.notes == ("1 published queries, 4 made in the same form",)
    assert report.missing == 4
    put(tmp_path / "query.json", {name: f"Query {name}." for name in items})
    _, _, prompts = converted("mathvista", path, tmp_path / "tasks")
    assert prompts == ["Query 1.", "Query 2.", "Query 5.", "Query 6.", "Published."]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"answer": ""}, "problem 1: has no answer; those of the test split are not published"),
        (
            {"question_type": "multi_choice", "answer_type": "text", "choices": ["a", "b"], "answer": "c"},
            "problem 1: answer='c' is none of its choices",
        ),
        ({"precision": 1.5}, r"precision=1\.5 must be a whole number or null"),
        ({"answer_type": "float", "precision": 3}, "no hint for answer_type='float' with precision=3"),
        ({"metadata": {}}, "problem 1: has no 'task'"),
    ],
)
def test_bad_mathvista_problems(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    put(tmp_path / "testmini.json", {"1": mathvista_item("1", **changes)})
    with pytest.raises(UserError, match=expected):
        converted("mathvista", tmp_path, tmp_path / "tasks")
