"""LLaVA JSON, record by record: what is usable, what is refused, and how a file is read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from vlmscale.data import records
from vlmscale.data.records import (
    Record,
    RefusedError,
    Turn,
    count_words,
    locate_image,
    parse_record,
    read_items,
)
from vlmscale.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder beside a picture that is out of bounds; no file is looked into here."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("good.jpg", "sub/other.jpg", "../secret.jpg"):
        (root / name).write_bytes(b"x")
    (root / "zero.jpg").write_bytes(b"")
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
        "several placeholders: 2 <image> placeholders, but 1 named under image",
    ),
    "placeholders in two turns": (
        shown(conversations=talk("<image>A?", "B.", "<image>C?", "D.")),
        "several placeholders: 2 <image> placeholders",
    ),
    "a placeholder too few": (
        shown(["good.jpg", "good.jpg"]),
        "image without placeholder: 2 images, but 1 <image> placeholder",
    ),
    "no placeholder": (
        shown(conversations=talk("A?", "B.")),
        "image without placeholder: no turn says <image>",
    ),
    "placeholder in answer": (
        shown(conversations=talk("A?", "<image>B.")),
        "misplaced placeholder: <image> is in turn 2 (gpt); it must be in a human turn",
    ),
    "placeholder in answer too": (
        shown(conversations=talk("<image>A?", "<image>B.")),
        "misplaced placeholder: <image> is in turn 2 (gpt)",
    ),
    "placeholder in dropped turn": (
        shown(conversations=talk("<image>", "A?", "B.", first="gpt")),
        "misplaced placeholder: <image> is in turn 1 (gpt)",
    ),
    "surrogate": (said("A?", "\ud800"), "bad text: half a surrogate pair in '\\ud800'"),
    "chance": (said("A?", "B.", chance=25), "bad chance: it must be a number from 0 to 1"),
    "chance text": (said("A?", "B.", chance="0.25"), "bad chance: it must be a number from 0 to 1"),
    "task": (said("A?", "B.", task=["ocr"]), "bad task: it is a list, not text"),
    "task path": (said("A?", "B.", task="../../x"), "bad task: '../../x'; use up to 60 letters"),
    "image a number": (shown(7), "bad image path: it is a number, not text or a list of texts"),
    "image list of null": (shown([None]), "bad image path: it is null, not text or a list of texts"),
    "image empty": (shown(""), "bad image path: it is empty"),
    "image list with empty": (shown(["good.jpg", " "]), "bad image path: it is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_record_is_refused_with_its_reason(name: str) -> None:
    item, reason = REFUSED[name]
    with pytest.raises(RefusedError) as caught:
        parse_record(item, 3)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert records.id_text(item, 3) == ("x" if isinstance(item, dict) and item["id"] == "x" else "3")


PATHS = {
    "good\0.jpg": "bad image path: 'good\\x00.jpg' is not a path",
    "\ud800.jpg": "bad image path: '\\ud800.jpg' is not a path",
    "absent.jpg": "missing image: 'absent.jpg' is no file in the image folder",
    "sub": "missing image: 'sub' is no file in the image folder",
    "a" * 5000: "missing image: 'aaaa",
    "/etc/hosts": "image outside folder: '/etc/hosts' is absolute",
    "../secret.jpg": "image outside folder: '../secret.jpg' leads out of the image folder",
    "link.jpg": "image outside folder: 'link.jpg' leads out of the image folder through a symbolic link",
    "out/secret.jpg": "image outside folder: 'out/secret.jpg' leads out of the image folder through a",
    "zero.jpg": "unreadable image: 'zero.jpg' has zero bytes",
}


@pytest.mark.parametrize("name", PATHS)
def test_an_image_path_that_cannot_be_used(name: str, folder: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        locate_image(name, folder)
    assert str(caught.value).startswith(PATHS[name])


def test_image_paths_stay_in_the_folder_and_loops_end(folder: Path) -> None:
    assert locate_image("sub/../inside.jpg", folder) == folder / "good.jpg"
    with pytest.raises(RefusedError, match=r"bad image path|missing image"):
        locate_image("loop.jpg", folder)


def test_what_a_record_becomes() -> None:
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
        {"id": "alone", "image": ["a.jpg"], "conversations": talk("<image>", "Noise.")},
        {"id": "", "image": [], "conversations": talk("Hi", "Hello.")},
        {
            "id": "many",
            "image": ["a.jpg", "b.jpg", "a.jpg"],
            "conversations": talk("<image> or <image>?", "None.", "And <image>\u2028?", "\0\U0001f600"),
        },
    ]
    assert [parse_record(item, index) for index, item in enumerate(items)] == [
        Record(
            "17",
            ("sub/other.jpg",),
            (Turn("What is it?\n<image>", "Noise."), Turn("Sure?", "Yes.")),
            "count",
            "reasoning",
            0.25,
        ),
        Record("1", (), (Turn("Hi", "Hello."),)),
        Record("alone", ("a.jpg",), (Turn("<image>", "Noise."),)),
        Record("", (), (Turn("Hi", "Hello."),)),
        Record(
            "many",
            ("a.jpg", "b.jpg", "a.jpg"),
            (Turn("<image> or <image>?", "None."), Turn("And <image>\u2028?", "\0\U0001f600")),
        ),
    ]


def test_words_are_counted_as_llava_does() -> None:
    assert count_words(["<image>\nWhat is it?", " A  dog. ", ""]) == 4 + 2


def values(path: Path) -> list[Any]:
    """The values of a file; each must be what its bytes say."""
    data, found = path.read_bytes(), []
    for start, end, value in read_items(path):
        assert json.loads(data[start:end]) == value
        found.append(value)
    return found


@pytest.mark.parametrize("window", [1, 7, 64, 2**22])
def test_a_list_is_read_in_windows_of_any_size(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_WINDOW", window)
    draw = random.Random(0)
    kinds = [
        12345,
        -0.5e-3,
        True,
        None,
        [],
        {},
        "",
        'é\u2028 \U0001f600\\"]',
        {"a": [1, {"b": "],["}], "c": "x" * 99},
    ]
    path = tmp_path / "data.json"
    for ascii_only in (True, False):
        for indent in (None, 1):
            wanted = [draw.choice(kinds) for _ in range(60)]
            text = json.dumps(wanted, ensure_ascii=ascii_only, indent=indent)
            path.write_text(f"\ufeff \n{text} \r\n", encoding="utf-8")
            assert values(path) == wanted


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines(mark: str, tmp_path: Path) -> None:
    wanted = [{"id": "a"}, {"id": "Line\u2028separator?"}, 3]
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(item, ensure_ascii=False) for item in wanted]
    path.write_text(mark + "\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    assert values(path) == wanted


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
    "no list end": (
        "data.json",
        b'[{"id": 1}',
        "malformed JSON at line 1, column 11: Expecting ',' delimiter",
    ),
    "no string end": (
        "data.json",
        b'[1,\n "x]',
        "malformed JSON at line 2, column 2: Unterminated string starting at",
    ),
    "two lists": ("data.json", b"\xef\xbb\xbf[1]\n ]", "malformed JSON at line 2, column 2: Extra data"),
    "late column": (
        "data.json",
        '[1,\n"é", "é" 2]'.encode(),
        "malformed JSON at line 2, column 10: Expecting",
    ),
    "empty list": ("data.json", b"[]", "holds no records; name a file with at least one"),
    "empty lines": ("data.jsonl", b"\n\n", "holds no records; name a file with at least one"),
    "latin 1": ("data.json", b'["caf\xe9"]', "is not UTF-8 at byte 5; save it as UTF-8"),
    "utf 16": ("data.json", "[]".encode("utf-16"), "is not UTF-8 at byte 0; save it as UTF-8"),
}


@pytest.mark.parametrize("window", [4, 2**22])
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read(
    case: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_WINDOW", window)
    name, data, message = FILES[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(read_items(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: no such file; name an existing JSON"):
        list(read_items(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="is a directory; name the JSON file in it"):
        list(read_items(tmp_path))
