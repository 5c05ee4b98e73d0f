"""Official files of open and yes-or-no benchmarks come out as questions, and as prompts word by word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmscale.errors import UserError
from vlmscale.evaluate.converters import CONVERTERS, Report, convert
from vlmscale.evaluate.questions import Question, read_questions
from vlmscale.evaluate.tasks import BENCHMARKS, asked

WORD = "\nAnswer the question using a single word or phrase."


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def converted(
    task: str, tmp_path: Path, images: Path | None = None
) -> tuple[Report, list[Question], list[str]]:
    report = convert(task, tmp_path, tmp_path / "tasks", images)
    questions = read_questions(report.path)
    assert report.path == tmp_path / "tasks" / f"{task}.jsonl"
    assert report.items == len(questions)
    return report, questions, [asked(BENCHMARKS[task], question) for question in questions]


def people(*answers: str) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_id": i, "answer_confidence": "yes"} for i, answer in enumerate(answers, 1)
    ]


def vqav2_files(folder: Path) -> None:
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 393225, "question": "Is this {creamy} soup?", "question_id": 393225001},
    ]
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": answer,
            "answers": people(*[answer] * 9, "table"),
            "image_id": image,
            "answer_type": kind,
            "question_id": name,
        }
        for answer, image, kind, name in (
            ("yes", 393225, "yes/no", 393225001),
            ("down", 262148, "other", 262148000),
        )
    ]
    head = {"info": {}, "license": {}, "data_subtype": "val2014"}
    asks = {"task_type": "Open-Ended", "data_type": "mscoco"}
    put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", head | asks | {"questions": questions})
    put(folder / "v2_mscoco_val2014_annotations.json", head | {"annotations": annotations})


def test_vqav2_joins_questions_and_annotations(tmp_path: Path) -> None:
    vqav2_files(tmp_path)
    picture = put(tmp_path / "val2014" / "COCO_val2014_000000262148.jpg", "x")
    report, questions, prompts = converted("vqav2", tmp_path)
    assert questions[0] == Question(
        "262148000",
        (*["down"] * 9, "table"),
        "Where is he looking?",
        (str(picture),),
        category="other",
        split="val2014",
    )
    assert questions[1].answers == (*["yes"] * 9, "table")
    assert prompts == ["Where is he looking?" + WORD, "Is this {creamy} soup?" + WORD]
    assert report.counts == {"other": 1, "yes/no": 1}
    assert report.missing == 1
    assert report.first_missing == str(tmp_path / "COCO_val2014_000000393225.jpg")
    assert f"1 pictures are missing, the first is {report.first_missing}" in "\n".join(report.lines())


def test_a_question_without_annotation_is_named(tmp_path: Path) -> None:
    vqav2_files(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    value = json.loads(path.read_text())
    put(path, value | {"annotations": value["annotations"][:1]})
    with pytest.raises(UserError, match=r"annotations\.json: has no annotation for question 262148000 of"):
        converted("vqav2", tmp_path)
    assert not (tmp_path / "tasks" / "vqav2.jsonl").exists()
    path.unlink()
    with pytest.raises(
        UserError, match=r"annotations\.json: not found; put the annotations beside the questions"
    ):
        converted("vqav2", tmp_path)


def test_two_splits_in_a_directory_must_be_told_apart(tmp_path: Path) -> None:
    vqav2_files(tmp_path)
    put(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": []})
    with pytest.raises(UserError, match="name the one to convert instead of the directory"):
        converted("vqav2", tmp_path)
    path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    assert convert("vqav2", path, tmp_path / "tasks").items == 2


def test_pictures_below_the_task_folder_are_relative_to_it(tmp_path: Path) -> None:
    vqav2_files(tmp_path)
    put(tmp_path / "tasks" / "coco" / "COCO_val2014_000000262148.jpg", "x")
    _, questions, _ = converted("vqav2", tmp_path, tmp_path / "tasks" / "coco")
    assert questions[0].images == ("coco/COCO_val2014_000000262148.jpg",)


def test_vizwiz_is_named_by_its_pictures(tmp_path: Path) -> None:
    item = {
        "answers": people("basil leaves", "basil"),
        "image": "VizWiz_val_00000000.jpg",
        "question": "can you tell me what this is?",
        "answer_type": "other",
        "answerable": 1,
    }
    put(
        tmp_path / "val.json",
        [item, item | {"image": "VizWiz_val_00000001.jpg", "answer_type": "unanswerable"}],
    )
    put(tmp_path / "val" / "VizWiz_val_00000000.jpg", "x")
    report, questions, prompts = converted("vizwiz", tmp_path)
    assert questions[0] == Question(
        "VizWiz_val_00000000",
        ("basil leaves", "basil"),
        "Can you tell me what this is?",
        (str(tmp_path / "val" / "VizWiz_val_00000000.jpg"),),
        category="other",
        split="val",
    )
    assert prompts[0] == (
        "Can you tell me what this is?\n"
        "When the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    assert report.counts == {"other": 1, "unanswerable": 1}


def textvqa_file(folder: Path) -> None:
    item = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Camera"],
        "question_id": 34602,
        "answers": ["nous les gosses", *["dakota"] * 9],
        "set_name": "val",
    }
    put(
        folder / "TextVQA_0.5.1_val.json", {"data": [item], "dataset_type": "val", "dataset_version": "0.5.1"}
    )


def test_textvqa_takes_ocr_tokens_from_llava_then_rosetta_then_none(tmp_path: Path) -> None:
    textvqa_file(tmp_path)
    report, questions, prompts = converted("textvqa", tmp_path)
    assert prompts == ["What is the brand of this camera?" + WORD]
    assert "prompts name no OCR tokens" in report.notes[0]
    assert questions[0].id == "34602"
    assert questions[0].answers == ("nous les gosses", *["dakota"] * 9)
    assert report.first_missing == str(tmp_path / "003a8ae2ef43b901.jpg")
    tokens = {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["N", "DAKOTA", "DIGITAL"], "ocr_info": []}
    put(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [tokens]})
    report, _, prompts = converted("textvqa", tmp_path)
    assert prompts == ["What is the brand of this camera?\nReference OCR token: N, DAKOTA, DIGITAL" + WORD]
    theirs = {
        "question_id": "003a8ae2ef43b901",
        "image": "003a8ae2ef43b901.jpg",
        "text": "What is the brand of this camera?\nReference OCR token: L, {x}" + WORD,
        "category": "default",
    }
    path = put(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", lines([theirs]))
    report, _, prompts = converted("textvqa", tmp_path)
    assert prompts == ["What is the brand of this camera?\nReference OCR token: L, {x}" + WORD]
    assert report.notes == ("prompts name the OCR tokens of llava_textvqa_val_v051_ocr.jsonl",)
    put(path, lines([theirs | {"image": "another.jpg"}]))
    with pytest.raises(UserError, match="has no prompt for question 34602"):
        converted("textvqa", tmp_path)


def test_gqa(tmp_path: Path) -> None:
    item = {
        "semantic": [],
        "entailed": [],
        "question": "Is it overcast?",
        "imageId": "n161313",
        "isBalanced": True,
        "groups": {"global": None, "local": "13-weather"},
        "answer": "no",
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "fullAnswer": "No, it is clear.",
    }
    put(tmp_path / "testdev_balanced_questions.json", {"201307251": item})
    put(tmp_path / "images" / "n161313.jpg", "x")
    report, questions, prompts = converted("gqa", tmp_path)
    assert questions == [
        Question(
            "201307251",
            ("no",),
            "Is it overcast?",
            (str(tmp_path / "images" / "n161313.jpg"),),
            category="verify",
            split="testdev_balanced",
        )
    ]
    assert prompts == ["Is it overcast?" + WORD]
    assert report.missing == 0


def pope_files(folder: Path) -> None:
    for category in ("random", "popular", "adversarial"):
        items = [
            {
                "question_id": 1,
                "image": "COCO_val2014_1.jpg",
                "text": "Is there a snowboard in the image?",
                "label": "yes",
            },
            {
                "question_id": 2,
                "image": "COCO_val2014_1.jpg",
                "text": "Is there a car in the image?",
                "label": "no",
            },
        ]
        put(folder / f"coco_pope_{category}.json", lines(items))


def test_pope_reads_lines_and_makes_ids_unique(tmp_path: Path) -> None:
    pope_files(tmp_path)
    report, questions, prompts = converted("pope", tmp_path)
    assert [question.id for question in questions[::2]] == ["random/1", "popular/1", "adversarial/1"]
    assert questions[3].answers == ("no",)
    assert questions[3].category == "popular"
    assert prompts[0] == "Is there a snowboard in the image?" + WORD
    assert report.counts == {"random": 2, "popular": 2, "adversarial": 2}
    assert report.missing == 1  # six questions, one picture
    (tmp_path / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match=r"holds no coco_pope_popular\.json"):
        converted("pope", tmp_path)


def test_a_line_cut_in_two_and_an_odd_label_are_named(tmp_path: Path) -> None:
    pope_files(tmp_path)
    path = tmp_path / "coco_pope_random.json"
    whole = path.read_text()
    put(path, whole[:-20])
    with pytest.raises(UserError, match=r"coco_pope_random\.json: line 2: is not JSON"):
        converted("pope", tmp_path)
    put(path, whole.replace('"no"', '"perhaps"'))
    with pytest.raises(UserError, match=r"line 2: the answer 'perhaps' is neither yes nor no"):
        converted("pope", tmp_path)
    put(path, whole.replace('"question_id": 2', '"question_id": 1'))
    with pytest.raises(UserError, match="question random/1: is there twice"):
        converted("pope", tmp_path)


MME = (
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


def mme_files(folder: Path) -> None:
    for category in MME:
        split_up = category in ("artwork", "celebrity", "landmark", "posters", "scene")
        texts = folder / category / ("questions_answers_YN" if split_up else "")
        pictures = folder / category / ("images" if split_up else "")
        put(pictures / ("7.jpg" if split_up else "7.png"), "x")
        put(
            texts / "7.txt",
            f"Is this {category}?  Please answer yes or no.\tYes\n"
            "Is this none? Please answer yes or no.\tNo\n\n",
        )


def test_mme_both_layouts(tmp_path: Path) -> None:
    folder = tmp_path / "MME_Benchmark"
    mme_files(folder)
    report, questions, prompts = converted("mme", tmp_path)
    assert len(questions) == 28
    assert report.missing == 0
    found = {question.id: question for question in questions}
    assert found["artwork/7/1"] == Question(
        "artwork/7/1",
        ("Yes",),
        "Is this artwork?",
        (str(folder / "artwork" / "images" / "7.jpg"),),
        category="artwork",
        group="artwork/7",
    )
    assert found["OCR/7/2"].images == (str(folder / "OCR" / "7.png"),)
    assert prompts[:2] == ["Is this existence?" + WORD, "Is this none?" + WORD]
    put(folder / "OCR" / "7.txt", "Is this OCR? Please answer yes or no.\tYes\n")
    with pytest.raises(UserError, match=r"OCR/7\.txt: has 1 questions where MME has 2 a picture"):
        converted("mme", tmp_path)
    put(folder / "OCR" / "7.txt", "One? Yes\nTwo?\tNo\n")
    with pytest.raises(UserError, match=r"7\.txt: line 1: has no tab"):
        converted("mme", tmp_path)


def test_chartqa_has_two_halves(tmp_path: Path) -> None:
    item = {"imgname": "41699051005347.png", "query": "How many food items are shown?", "label": "14"}
    put(tmp_path / "test_human.json", [item, item | {"query": "Is it {high}?", "label": "Yes"}])
    put(tmp_path / "test_augmented.json", [item])
    put(tmp_path / "png" / "41699051005347.png", "x")
    report, questions, prompts = converted("chartqa", tmp_path)
    assert [question.id for question in questions] == ["human-0", "human-1", "augmented-0"]
    assert questions[0] == Question(
        "human-0",
        ("14",),
        "How many food items are shown?",
        (str(tmp_path / "png" / "41699051005347.png"),),
        category="human",
        split="test",
    )
    assert prompts[:2] == [
        "How many food items are shown?\nAnswer the question with a single word.",
        "Is it {high}?\nAnswer the question with a single word.",
    ]
    assert report.counts == {"human": 2, "augmented": 1}


@pytest.mark.parametrize("kinds", [None, ["table/list", "form"]])
def test_docvqa_old_and_new_files(tmp_path: Path, kinds: list[str] | None) -> None:
    item = {
        "questionId": 49153,
        "question": "What is the ‘actual’ value per 1000?",
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "answers": ["0.28", "0.28 "],
        "data_split": "val",
    }
    item |= {"question_types": kinds} if kinds else {}
    name = "val_v1.0_withQT.json" if kinds else "val_v1.0.json"
    put(
        tmp_path / name,
        {"dataset_name": "DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": [item]},
    )
    report, questions, prompts = converted("docvqa", tmp_path)
    assert questions == [
        Question(
            "49153",
            ("0.28", "0.28 "),
            "What is the ‘actual’ value per 1000?",
            (str(tmp_path / "documents" / "pybv0228_81.png"),),
            category="table/list + form" if kinds else "",
            split="val",
        )
    ]
    assert prompts == ["What is the ‘actual’ value per 1000?" + WORD]
    assert report.missing == 1


@pytest.mark.parametrize(
    "value, expected",
    [
        ('{"data": [', r"is not JSON"),
        ({"questions": []}, r"has no 'data'; is this the official file"),
        ({"data": []}, r"holds no question of docvqa"),
        ({"data": ["x"]}, r"data\[0\]: must be a JSON object"),
        ({"data": [{"questionId": 1, "image": "a.png", "question": "Q?"}]}, r"data\[0\]: has no 'answers'"),
        ({"data": [{"questionId": 1, "image": 5}]}, r"data\[0\]: image=5 must be a text"),
        (
            {"data": [{"questionId": 1, "image": "a", "question": " ", "answers": ["x"]}]},
            "question 1: has no text",
        ),
        ({"data": [{"questionId": 1, "image": "a", "question": "Q", "answers": []}]}, "answers is empty"),
        (
            {"data": [{"questionId": 1, "image": "a", "question": "Q", "answers": [None]}]},
            "answers holds None",
        ),
    ],
)
def test_bad_files_are_named_with_record_and_key(tmp_path: Path, value: Any, expected: str) -> None:
    path = put(tmp_path / "val_v1.0.json", value)
    with pytest.raises(UserError, match=expected) as error:
        converted("docvqa", tmp_path)
    assert str(path) in str(error.value) or str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tasks" / "docvqa.jsonl").exists()


@pytest.mark.parametrize("task", CONVERTERS)
def test_an_empty_directory_is_refused_with_what_is_needed(task: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no|name the directory"):
        converted(task, tmp_path)


def test_wrong_calls(tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], Report], str]] = [
        (lambda: convert("mmvet", tmp_path, tmp_path), "no converter"),
        (lambda: convert("gqa", tmp_path, tmp_path, circular=True), "no circular evaluation"),
        (lambda: convert("gqa", tmp_path / "gone", tmp_path), "gone: not found"),
        (lambda: convert("gqa", tmp_path, tmp_path, tmp_path / "gone"), "gone: is no directory"),
    ]
    for call, expected in calls:
        with pytest.raises(UserError, match=expected):
            call()
    assert set(CONVERTERS) == set(BENCHMARKS)
