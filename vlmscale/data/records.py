"""LLaVA JSON into checked records, one at a time.

Owns the reading of JSON record by record, so that a file of a gigabyte never lies in memory as objects, and
the checks of a record and of its image paths; one that cannot be used is refused with a reason. Pictures and
the prepared data set belong to `shards.py` and `prepare.py`, templates and tokens to `conversation.py`.
"""

from __future__ import annotations

import codecs
import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError

PLACEHOLDER = "<image>"
_ROLES = ("human", "gpt")
_TASK = re.compile(r"(?!\.)[\w .-]{0,60}")
_SPACE = re.compile(r"[ \t\n\r]*")
_WINDOW = 2**22  # bytes of a JSON list that are decoded together
_BOM = codecs.BOM_UTF8
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Turn:
    """A question, with PLACEHOLDER wherever a picture is shown, and its answer; both are stripped."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One usable conversation.

    `images` are names as written in the JSON, one for each placeholder of the questions, in order; () is
    text alone. `task`, `task_group` and `chance` (the score of guessing, 0..1) are the JSON's, where given.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    task: str = ""
    task_group: str = ""
    chance: float = 0.0


class RefusedError(Exception):
    """Why one record cannot be used: one line, "class: detail"."""


def read_items(path: Path) -> Iterator[tuple[int, int, Any]]:
    """The values of a JSON list, or of JSON Lines where the name ends in .jsonl, in the order of the file.

    Yields:
        (start, end, value): the bytes [start, end) of the file hold the value's JSON and nothing else but
        white space. One value at a time is in memory.

    Raises:
        UserError: the file cannot be read, the JSON is malformed, or it holds no record.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:  # which cannot be mapped
                yield from _read(path, b"")
            else:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    yield from _read(path, data)
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name the JSON file in it") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name an existing JSON or JSON Lines file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read(path: Path, data: bytes | mmap.mmap) -> Iterator[tuple[int, int, Any]]:
    """`read_items` on the bytes of a file."""
    read = _read_lines if path.suffix.lower() == ".jsonl" else _read_list
    empty = True
    for item in read(path, data, len(_BOM) if data[: len(_BOM)] == _BOM else 0):
        empty = False
        yield item
    if empty:
        raise UserError(f"{path}: holds no records; name a file with at least one")


def _read_lines(path: Path, data: bytes | mmap.mmap, start: int) -> Iterator[tuple[int, int, Any]]:
    """The values of a JSON Lines file."""
    number = 0
    while start < len(data):
        # Not splitlines(): JSON strings may hold U+2028 and its like.
        end = data.find(b"\n", start)
        end, number = len(data) if end < 0 else end, number + 1
        line, _ = _decode(path, data, start, end, final=True)
        if line.strip():
            yield start, end, _json(path, line, number)
        start = end + 1


def _read_list(path: Path, data: bytes | mmap.mmap, start: int) -> Iterator[tuple[int, int, Any]]:
    """The values of a JSON list, decoded window by window."""
    offset = _skip(data, start)
    if data[offset : offset + 1] != b"[":
        value = _json(path, _decode(path, data, start, len(data), final=True)[0], None)
        raise UserError(f"{path}: holds {_kind(value)} where a JSON list of records is needed")
    offset = _skip(data, offset + 1)
    closed, size = data[offset : offset + 1] == b"]", _WINDOW
    offset += closed
    while not closed:
        final = offset + size >= len(data)
        text, ascii_ = _decode(path, data, offset, min(offset + size, len(data)), final=final)
        at = 0
        try:
            while not closed:
                space = _space_end(text, at) - at  # where the window before ended within it
                offset, at = offset + space, at + space
                value, end, following, closed = _list_item(text, at)
                stop = offset + (end - at if ascii_ else len(text[at:end].encode()))
                yield offset, stop, value
                offset, at = stop + following - end, following  # what is between is ASCII
        except json.JSONDecodeError as error:
            if final or not _cut_off(error):
                place = offset + len(text[at : error.pos].encode())
                raise _malformed(path, data, start, place, error.msg) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists thousands deep
            raise UserError(f"{path}: JSON that cannot be read: {str(error).split(';')[0]}") from None
        size = _WINDOW if at else 2 * size  # one value that is longer than the window
    rest = _skip(data, offset)
    if rest < len(data):
        raise _malformed(path, data, start, rest, "Extra data")


def _list_item(text: str, at: int) -> tuple[Any, int, int, bool]:
    """The value that begins at a position of a list: (value, its end, where to go on, the list is closed).

    Raises:
        json.JSONDecodeError: malformed, or the text ends before the next comma or bracket.
    """
    value, end = _DECODER.raw_decode(text, at)
    following = _space_end(text, end)
    if text[following : following + 1] == "]":
        return value, end, following + 1, True
    if text[following : following + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, following)
    return value, end, _space_end(text, following + 1), False


def _cut_off(error: json.JSONDecodeError) -> bool:
    """Whether more text might mend it: the fault is at the end, or a string that does not end."""
    return error.pos > len(error.doc) - 16 or error.msg.startswith("Unterminated string")


def _space_end(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # it matches nothing at all, too
    return match.end()


def _skip(data: bytes | mmap.mmap, at: int) -> int:
    """The first byte from `at` on that is not white space."""
    while at < len(data) and data[at] in b" \t\n\r":
        at += 1
    return at


def _decode(path: Path, data: bytes | mmap.mmap, start: int, end: int, *, final: bool) -> tuple[str, bool]:
    """Text of bytes [start, end), but no cut character at the end unless `final`; and whether it is ASCII."""
    try:
        text, _ = codecs.utf_8_decode(data[start:end], "strict", final)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {start + error.start}; save it as UTF-8") from None
    return text, text.isascii()


def _malformed(path: Path, data: bytes | mmap.mmap, start: int, place: int, message: str) -> UserError:
    """The line for bad JSON at byte `place` of a file whose text begins at byte `start`."""
    lines, at = 1, start
    while (found := data.find(b"\n", at, place)) >= 0:
        lines, at = lines + 1, found + 1
    column = len(data[at:place].decode()) + 1
    return UserError(f"{path}: malformed JSON at line {lines}, column {column}: {message}")


def _json(path: Path, text: str, line: int | None) -> Any:
    """One JSON value; `line` is the number of its line in a JSON Lines file, None for a whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        hint = "; if it holds one record a line, name it .jsonl" * (error.msg == "Extra data" and not line)
        raise UserError(f"{path}: malformed JSON at {place}: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists thousands deep
        place = f" at line {line}" if line else ""
        raise UserError(f"{path}: JSON that cannot be read{place}: {str(error).split(';')[0]}") from None


def parse_record(item: Any, index: int) -> Record:
    """The record that a JSON value holds; `index` is its id where it has none.

    Conversations follow LLaVA (llava/train/train.py): a leading gpt turn is dropped, the rest must alternate
    human and gpt. `image` is a text or a list of texts; placeholders stand anywhere in human turns, one for
    each image (LLaVA moves them to the front of their turn; here the templates decide). Refused where LLaVA
    would go on: a placeholder in a gpt turn, another number of placeholders than of images, and a last
    question without an answer. A key that is null counts as absent. Images are not looked for.

    Raises:
        RefusedError: it cannot be used.
    """
    if not isinstance(item, dict):
        raise RefusedError(f"not a record: {_kind(item)} where an object is needed")
    identity = item.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise RefusedError(f"bad id: it is {_kind(identity)}, not text")
    images = _images(item.get("image"))
    messages = _messages(item.get("conversations"))
    _check_placeholders(messages, len(images))
    chance = 0.0 if item.get("chance") is None else item["chance"]
    if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
        raise RefusedError("bad chance: it must be a number from 0 to 1")
    texts = {key: "" if item.get(key) is None else item[key] for key in ("task", "task_group")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise RefusedError(f"bad {key}: it is {_kind(value)}, not text")
    if not _TASK.fullmatch(texts["task"]):  # a file of answers is named after it
        raise RefusedError(f"bad task: {quote(texts['task'])}; use up to 60 letters, digits, spaces, . _ -")
    record = Record(id_text(item, index), images, _turns(messages), **texts, chance=float(chance))
    _check_unicode([record.id, *texts.values(), *(text for _, text in messages)])
    return record


def count_words(texts: Iterable[str]) -> int:
    """Words between white space, placeholders among them: `modality_lengths` of llava/train/train.py."""
    return sum(len(text.split()) for text in texts)


def locate_image(name: str, root: Path) -> Path:
    """The file that `name` means under `root`, which is resolved, with no step out of it.

    Raises:
        RefusedError: it is absolute, leads out of the folder, is no file, or has zero bytes.
    """
    if Path(name).is_absolute():
        raise RefusedError(
            f"image outside folder: {quote(name)} is absolute; write it relative to the folder"
        )
    try:
        place = (root / name).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL byte, half a surrogate pair, a loop of links
        raise RefusedError(f"bad image path: {quote(name)} is not a path") from None
    if not place.is_relative_to(root):
        linked = ".." not in Path(name).parts
        how = "leads out of the image folder" + " through a symbolic link" * linked
        raise RefusedError(f"image outside folder: {quote(name)} {how}")
    try:
        if not place.is_file():
            raise RefusedError(f"missing image: {quote(name)} is no file in the image folder")
        if not place.stat().st_size:
            raise RefusedError(f"unreadable image: {quote(name)} has zero bytes")
    except OSError as error:
        raise RefusedError(f"missing image: {quote(name)} ({error.strerror or error})") from None
    return place


def _images(value: Any) -> tuple[str, ...]:
    """The names under the key "image": one text, or a list of them."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise RefusedError(f"bad image path: it is {_kind(name)}, not text or a list of texts")
        if not name.strip():
            raise RefusedError("bad image path: it is empty; leave the key out for text alone")
    return tuple(names)


def _messages(turns: Any) -> list[tuple[str, str]]:
    """(role, text) of each turn, roles known; nothing else is checked."""
    if not isinstance(turns, list):
        found = "missing" if turns is None else f"{_kind(turns)}, not a list"
        raise RefusedError(f"bad conversations: the key is {found}")
    if not turns:
        raise RefusedError("empty conversation: it has no turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RefusedError(f"bad turn: turn {number} is {_kind(turn)}, not an object")
        for key in ("from", "value"):
            if not isinstance(turn.get(key), str):
                what = f"{_kind(turn[key])} as" if turn.get(key) is not None else "no"
                raise RefusedError(f"bad turn: turn {number} has {what} {key!r}, where text is needed")
        if turn["from"] not in _ROLES:
            raise RefusedError(f"unknown role: turn {number} is from {quote(turn['from'])}, not human or gpt")
        messages.append((turn["from"], turn["value"]))
    return messages


def _check_placeholders(messages: list[tuple[str, str]], images: int) -> None:
    """One placeholder for each image, all of them in human turns."""
    counts = [text.count(PLACEHOLDER) for _, text in messages]
    total = sum(counts)
    if total and not images:
        raise RefusedError(
            f"placeholder without image: turn {_first(counts)} has {PLACEHOLDER}, but no image key"
        )
    if images and not total:
        raise RefusedError(f"image without placeholder: no turn says {PLACEHOLDER}")
    answers = [count if role == "gpt" else 0 for count, (role, _) in zip(counts, messages, strict=True)]
    if any(answers):
        raise RefusedError(
            f"misplaced placeholder: {PLACEHOLDER} is in turn {_first(answers)} (gpt); "
            "it must be in a human turn"
        )
    if total > images:
        raise RefusedError(
            f"several placeholders: {total} {PLACEHOLDER} placeholders, but {images} named under image"
        )
    if total < images:
        raise RefusedError(
            f"image without placeholder: {images} images, but {total} {PLACEHOLDER} placeholders"
        )


def _first(counts: list[int]) -> int:
    """Number, from 1, of the first turn with a placeholder."""
    return next(number for number, count in enumerate(counts, start=1) if count)


def _turns(messages: list[tuple[str, str]]) -> tuple[Turn, ...]:
    """Question and answer pairs; drops a leading gpt turn, as LLaVA does."""
    dropped = 1 if messages[0][0] == "gpt" else 0
    for number, (role, _) in enumerate(messages[dropped:], start=1 + dropped):
        expected = _ROLES[(number - 1 - dropped) % 2]
        if role != expected:
            raise RefusedError(f"roles out of order: turn {number} is from {role}, expected {expected}")
    kept = messages[dropped:]
    if not kept:
        raise RefusedError("empty conversation: its one turn is from gpt, which is dropped as a first turn")
    if len(kept) % 2:
        raise RefusedError(f"question without answer: turn {len(messages)} is the last and from human")
    turns = []
    for start in range(0, len(kept), 2):
        question = kept[start][1].strip()
        answer = kept[start + 1][1].strip()
        if not question:
            raise RefusedError(f"empty question: turn {dropped + start + 1} has no text")
        if not answer:
            raise RefusedError(f"empty answer: turn {dropped + start + 2} has no text")
        turns.append(Turn(question, answer))
    return tuple(turns)


def _check_unicode(texts: Iterable[str]) -> None:
    """JSON can spell half a surrogate pair, which no tokeniser takes."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RefusedError(f"bad text: half a surrogate pair in {quote(text)}") from None


def id_text(item: Any, index: int) -> str:
    """The record's id as text; its index where there is none that can be shown."""
    identity = item.get("id") if isinstance(item, dict) else None
    usable = isinstance(identity, str | int) and not isinstance(identity, bool)
    return str(identity) if usable else str(index)


def _kind(value: Any) -> str:
    """A JSON value's type in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def quote(text: str) -> str:
    """Text on one line, in quotes, cut to a length that can be read."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
