"""LLaVA JSON, usable and hostile; every file is made on the spot."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmscale.data.records import Quarantined, Record, Turn, load_records, write_quarantine
from vlmscale.errors import UserError


def jpeg() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with one good picture and the bad ones, beside a picture that is out of bounds."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    data = jpeg()
    for name in ("good.jpg", "sub/other.jpg", "../secret.jpg"):
        (root / name).write_bytes(data)
    (root / "half.jpg").write_bytes(data[: len(data) // 2])
    (root / "zero.jpg").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html>404</html>")
    (root / "inside.jpg").symlink_to(root / "good.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "out").symlink_to(tmp_path)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    return root


def talk(*values: str, first: str = "human") -> list[dict[str, str]]:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def shown(image: Any = "good.jpg", **more: Any) -> dict[str, Any]:
    return {"id": "x", "image": image, "conversations": talk("<image>\nWhat is it?", "Noise."), **more}


def said(*values: str, first: str = "human", **more: Any) -> dict[str, Any]:
    return {"id": "x", "conversations": talk(*values, first=first), **more}


def turned(*turns: Any) -> dict[str, Any]:
    return {"id": "x", "conversations": list(turns)}


GOOD = {"id": "good", "conversations": talk("Hello?", "Hello.")}


def write(path: Path, items: Any) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


ASK, ANSWER = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
REFUSED: dict[str, tuple[Any, str]] = {
    "number": (7, "not a record: a number where an object is needed"),
    "list": ([ASK, ANSWER], "not a record: a list where an object is needed"),
    "id a list": ({"id": ["a"], "conversations": []}, "bad id: it is a list, not text"),
    "no conversation": ({"id": "x"}, "bad conversations: the key is missing"),
    "conversation text": (
        {"id": "x", "conversations": "Hi"},
        "bad conversations: the key is text, not a list",
    ),
    "empty conversation": (turned(), "empty conversation: it has no turns"),
    "turn a text": (turned(ASK, "So."), "bad turn: turn 2 is text, not an object"),
    "no from": (turned({"value": "Hi"}), "bad turn: turn 1 has no 'from', where text is needed"),
    "no value": (turned(ASK, {"from": "gpt"}), "bad turn: turn 2 has no 'value', where text is needed"),
    "value a number": (
        turned(ASK, {"from": "gpt", "value": 3}),
        "bad turn: turn 2 has a number as 'value', where text is needed",
    ),
    "role": (
        turned({"from": "user", "value": "Hi"}),
        "unknown role: turn 1 is from 'user', not human or gpt",
    ),
    "two questions": (turned(ASK, ASK, ANSWER), "roles out of order: turn 2 is from human, expected gpt"),
    "two answers": (turned(ASK, ANSWER, ANSWER), "roles out of order: turn 3 is from gpt, expected human"),
    "two leading answers": (turned(ANSWER, ANSWER), "roles out of order: turn 2 is from gpt, expected human"),
    "answer alone": (turned(ANSWER), "empty conversation: its one turn is from gpt"),
    "no answer": (said("A?", "B.", "C?"), "question without answer: turn 3 is the last and from human"),
    "empty answer": (said("A?", " \n\t"), "empty answer: turn 2 has no text"),
    "empty question": (said("A?", "B.", " ", "D."), "empty question: turn 3 has no text"),
    "placeholder alone": (
        said("<image>\nA?", "B."),
        "placeholder without image: turn 1 has <image>, but no image",
    ),
    "null image": (shown(None), "placeholder without image: turn 1 has <image>"),
    "two placeholders": (
        shown(conversations=talk("<image> <image> A?", "B.")),
        "several placeholders: 2 <image> placeholders, and one image a record is supported",
    ),
    "placeholders in two turns": (
        shown(conversations=talk("<image>A?", "B.", "<image>C?", "D.")),
        "several placeholders: 2 <image> placeholders",
    ),
    "no placeholder": (
        shown(conversations=talk("A?", "B.")),
        "image without placeholder: no turn says <image>",
    ),
    "placeholder in answer": (
        shown(conversations=talk("A?", "<image>B.")),
        "misplaced placeholder: <image> is in turn 2 (gpt); it must be in the first human turn",
    ),
    "placeholder in dropped turn": (
        shown(conversations=talk("<image>", "A?", "B.", first="gpt")),
        "misplaced placeholder: <image> is in turn 1 (gpt)",
    ),
    "placeholder later": (
        shown(conversations=talk("A?", "B.", "<image>C?", "D.")),
        "misplaced placeholder: <image> is in turn 3 (human); it must be in the first human turn",
    ),
    "surrogate": (said("A?", "\ud800"), "bad text: half a surrogate pair in '\\ud800'"),
    "chance": (said("A?", "B.", chance=25), "bad chance: it must be a number from 0 to 1"),
    "chance text": (said("A?", "B.", chance="0.25"), "bad chance: it must be a number from 0 to 1"),
    "task": (said("A?", "B.", task=["ocr"]), "bad task: it is a list, not text"),
    "image list": (
        shown(["good.jpg"]),
        "bad image path: it is a list, not text (one image a record is supported)",
    ),
    "image empty": (shown(""), "bad image path: it is empty"),
    "image NUL": (shown("good\0.jpg"), "bad image path: 'good\\x00.jpg' is not a path"),
    "image missing": (shown("absent.jpg"), "missing image: 'absent.jpg' is no file in the image folder"),
    "image a folder": (shown("sub"), "missing image: 'sub' is no file in the image folder"),
    "image too long": (shown("a" * 5000), "missing image: 'aaaa"),
    "image absolute": (shown("/etc/hosts"), "image outside folder: '/etc/hosts' is absolute"),
    "image above": (
        shown("../secret.jpg"),
        "image outside folder: '../secret.jpg' leads out of the image folder",
    ),
    "image by link": (
        shown("link.jpg"),
        "image outside folder: 'link.jpg' leads out of the image folder through a symbolic link",
    ),
    "image by linked folder": (
        shown("out/secret.jpg"),
        "image outside folder: 'out/secret.jpg' leads out of the image folder through a symbolic link",
    ),
    "image zero": (shown("zero.jpg"), "unreadable image: 'zero.jpg' has zero bytes"),
    "image truncated": (
        shown("half.jpg"),
        "unreadable image: 'half.jpg' truncated or damaged (image file is truncated",
    ),
    "image html": (shown("page.jpg"), "unreadable image: 'page.jpg' not a picture that can be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_record_is_quarantined_with_its_reason(name: str, tmp_path: Path, folder: Path) -> None:
    item, reason = REFUSED[name]
    result = load_records(write(tmp_path / "data.json", [GOOD, item, GOOD]), folder)
    assert len(result.records) + len(result.quarantined) == 3
    (refused,) = result.quarantined
    assert refused.index == 1
    assert refused.reason.startswith(reason)
    assert "\n" not in refused.reason
    assert refused.id == ("x" if isinstance(item, dict) and item["id"] == "x" else "1")


def test_a_loop_of_links_is_refused(tmp_path: Path, folder: Path) -> None:
    (refused,) = load_records(write(tmp_path / "data.json", [GOOD, shown("loop.jpg")]), folder).quarantined
    assert refused.reason.split(":")[0] in ("bad image path", "missing image")


def test_all_at_once_adds_up_and_is_written(tmp_path: Path, folder: Path) -> None:
    items = [item for item, _ in REFUSED.values()] + [GOOD, shown(), GOOD]
    path = write(tmp_path / "data.json", items)
    result = load_records(path, folder)
    assert len(result.quarantined) == len(REFUSED)
    assert len(result.records) + len(result.quarantined) == len(items)
    assert result.source == path
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    summary = result.summary()
    assert "\n" not in summary
    assert (
        f"{len(items)} records read, 3 used (1 with an id already seen), {len(REFUSED)} quarantined"
        in summary
    )
    assert "4 misplaced placeholder" not in summary
    assert "3 misplaced placeholder" in summary
    written = tmp_path / "quarantine.jsonl"
    write_quarantine(result.quarantined, written)
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [Quarantined(**line) for line in lines] == result.quarantined
    with pytest.raises(UserError, match=r"cannot be written \(No such file or directory\)"):
        write_quarantine(result.quarantined, tmp_path / "absent" / "quarantine.jsonl")


def test_what_a_record_becomes(tmp_path: Path, folder: Path) -> None:
    items = [
        {
            "id": 17,
            "image": "sub/other.jpg",
            "conversations": talk("What is it?\n<image>\n", "  Noise. \n", " Sure? ", "Yes."),
            "task": "count",
            "task_group": "reasoning",
            "chance": 0.25,
        },
        {"conversations": talk("Welcome!", "Hi", "Hello.", first="gpt"), "image": None, "chance": None},
        {"id": "alone", "image": "sub/../inside.jpg", "conversations": talk("<image>", "Noise.")},
    ]
    result = load_records(write(tmp_path / "data.json", items), folder)
    assert result.quarantined == []
    assert result.records == [
        Record(
            "17",
            folder / "sub" / "other.jpg",
            (Turn("What is it?", "Noise."), Turn("Sure?", "Yes.")),
            "count",
            "reasoning",
            0.25,
        ),
        Record("1", None, (Turn("Hi", "Hello."),)),
        Record("alone", folder / "good.jpg", (Turn("", "Noise."),)),
    ]
    assert result.records[0].image is not None
    assert result.records[0].image.is_absolute()
    assert result.summary() == f"{tmp_path / 'data.json'}: 3 records read, 3 used, 0 quarantined"


def test_pictures_are_opened_only_on_request(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "data.json", [shown("half.jpg"), shown("zero.jpg"), shown("absent.jpg")])
    result = load_records(path, folder, check_images=False)
    assert [record.image for record in result.records] == [folder / "half.jpg"]
    assert [item.index for item in result.quarantined] == [1, 2]


def test_without_an_image_folder_text_alone_is_used(tmp_path: Path) -> None:
    result = load_records(write(tmp_path / "data.json", [GOOD, shown()]), None)
    assert len(result.records) == 1
    assert result.quarantined[0].reason.startswith("no image folder: 'good.jpg' is named")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines(mark: str, tmp_path: Path) -> None:
    odd = said("Line\u2028separator?", "Yes\u2029.")
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(item, ensure_ascii=False) for item in (GOOD, odd, 3)]
    path.write_text(mark + "\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    result = load_records(path, None)
    assert [record.turns[0].question for record in result.records] == ["Hello?", "Line\u2028separator?"]
    assert [item.index for item in result.quarantined] == [2]


FILES: dict[str, tuple[str, bytes, str]] = {
    "cut off": (
        "data.json",
        b'[\n {"id": "a",\n  "x": ]',
        "malformed JSON at line 3, column 8: Expecting value",
    ),
    "lines as list": (
        "data.json",
        b'{"id": 1}\n{"id": 2}\n',
        "malformed JSON at line 2, column 1: Extra data; if it holds one record a line, name it .jsonl",
    ),
    "bad line": (
        "data.jsonl",
        b'{"id": 1}\n\n{"id" 2}\n',
        "malformed JSON at line 3, column 7: Expecting ':'",
    ),
    "no bytes": ("data.json", b"", "malformed JSON at line 1, column 1: Expecting value"),
    "deep": ("data.json", b"[" * 200_000, "JSON that cannot be read: maximum recursion depth exceeded"),
    "long number": ("data.jsonl", b"1" * 5000, "JSON that cannot be read at line 1: Exceeds the limit"),
    "object": ("data.json", b'{"id": 1}', "holds an object where a JSON list of records is needed"),
    "empty list": ("data.json", b"[]", "holds no records; name a file with at least one"),
    "empty lines": ("data.jsonl", b"\n\n", "holds no records; name a file with at least one"),
    "latin 1": ("data.json", b'["caf\xe9"]', "is not UTF-8 at byte 5; save it as UTF-8"),
    "utf 16": ("data.json", "[]".encode("utf-16"), "is not UTF-8 at byte 0; save it as UTF-8"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    name, data, message = FILES[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_records(path, None)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [GOOD])
    for source, images, message in [
        (tmp_path / "absent.json", None, f"{tmp_path / 'absent.json'}: no such file"),
        (tmp_path, None, f"{tmp_path}: is a directory; name the JSON file in it"),
        (path, tmp_path / "absent", f"{tmp_path / 'absent'}: no such folder"),
        (path, path, f"{path}: no such folder"),
    ]:
        with pytest.raises(UserError) as caught:
            load_records(source, images)
        assert str(caught.value).startswith(message)


def test_no_usable_record_names_up_to_five_reasons(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "data.json", [shown("half.jpg"), *[said("A?", "")] * 6])
    with pytest.raises(UserError) as caught:
        load_records(path, folder)
    message = str(caught.value)
    assert message.startswith(
        f"{path}: none of its 7 records can be used: record 0 (id 'x'): unreadable image: "
    )
    assert "; record 4 (id 'x'): empty answer: turn 2 has no text" in message
    assert message.endswith("; and 2 more")
    assert "\n" not in message
