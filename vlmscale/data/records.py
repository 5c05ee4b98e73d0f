"""LLaVA JSON into checked records.

Owns reading, checking and refusing; a record that cannot be used is set aside with a reason and counted,
never skipped in silence. Templates, tokens and pixels belong to other modules.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmscale.data.images import ImageError, decode_image
from vlmscale.errors import UserError

PLACEHOLDER = "<image>"
_ROLES = ("human", "gpt")
_MAX_THREADS = 8
_TASK = re.compile(r"(?!\.)[\w .-]{0,60}")


@dataclass(frozen=True)
class Turn:
    """One question and its answer. The question is free of the image placeholder; both are stripped."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One usable conversation. `image` is absolute (None: text alone) and goes before the first question.

    `task`, `task_group` and `chance` (the score of guessing, 0..1) are read from the JSON where present.
    """

    id: str
    image: Path | None
    turns: tuple[Turn, ...]
    task: str = ""
    task_group: str = ""
    chance: float = 0.0


@dataclass(frozen=True)
class Quarantined:
    """A record that cannot be used. `reason` is one line, "class: detail"; `index` counts records from 0."""

    index: int
    id: str
    reason: str


@dataclass
class Records:
    """What a file held. `sha256` is that of the file's bytes; order is the file's."""

    records: list[Record]
    quarantined: list[Quarantined]
    source: Path
    sha256: str

    def summary(self) -> str:
        """One line: how many records were read, used and quarantined, the latter by class of reason."""
        read = len(self.records) + len(self.quarantined)
        line = f"{self.source}: {read} records read, {len(self.records)} used"
        repeated = len(self.records) - len({record.id for record in self.records})
        if repeated:
            line += f" ({repeated} with an id already seen)"
        line += f", {len(self.quarantined)} quarantined"
        classes = Counter(item.reason.split(":", 1)[0] for item in self.quarantined)
        if classes:
            line += " (" + ", ".join(f"{count} {name}" for name, count in classes.most_common()) + ")"
        return line


class _RefusedError(Exception):
    """Why one record cannot be used."""


def load_records(
    path: Path, images: Path | None, *, check_images: bool = True, image_target: int | None = None
) -> Records:
    """Reads a JSON list of LLaVA records, or JSON Lines where the name ends in .jsonl.

    Image paths are relative to `images`. With `check_images` every picture is decoded in full, once however
    many records show it, as `decode_image(..., target=image_target)` will do in training; without it only
    presence and size 0 are checked. Conversations follow LLaVA (llava/train/train.py): a leading gpt turn is
    dropped, the rest must alternate human and gpt. Refused where LLaVA would go on: a placeholder in any turn
    but the first human one (LLaVA moves it to the front of that turn), several placeholders (it merges those
    of one turn), an image that no placeholder shows, and a last question without an answer. A key that
    is null counts as absent.

    Raises:
        UserError: the file or the folder cannot be read, the JSON is malformed, or no usable record is left.
    """
    raw, digest = _read(path)
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder; name the one that image paths are relative to")
    parsed: list[tuple[Record, str | None] | Quarantined] = []
    for index, item in enumerate(raw):
        try:
            parsed.append(_parse(item, index))
        except _RefusedError as error:
            parsed.append(Quarantined(index, _id_text(item, index), str(error)))
    names = {
        entry[1]: None for entry in parsed if not isinstance(entry, Quarantined) and entry[1] is not None
    }
    found = _find_images(names, images, check_images, image_target)
    result = Records([], [], path, digest)
    for index, entry in enumerate(parsed):
        if isinstance(entry, Quarantined):
            result.quarantined.append(entry)
            continue
        record, name = entry
        place = found[name] if name is not None else None
        if isinstance(place, str):
            result.quarantined.append(Quarantined(index, record.id, place))
        else:
            result.records.append(replace(record, image=place))
    if not result.records:
        shown = "; ".join(f"record {q.index} (id {_quote(q.id)}): {q.reason}" for q in result.quarantined[:5])
        more = len(result.quarantined) - 5
        raise UserError(
            f"{path}: none of its {len(raw)} records can be used: {shown}"
            + (f"; and {more} more" * (more > 0))
        )
    return result


def write_quarantine(quarantined: list[Quarantined], path: Path) -> None:
    """Writes one JSON line (index, id, reason) for each quarantined record; an empty file if there is none.

    Raises:
        UserError: `path` cannot be written.
    """
    lines = [
        json.dumps({"index": item.index, "id": item.id, "reason": item.reason}) + "\n" for item in quarantined
    ]
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _read(path: Path) -> tuple[list[Any], str]:
    """The records of a file, unchecked, and the sha256 of its bytes."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name the JSON file in it") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name an existing JSON or JSON Lines file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    digest = hashlib.sha256(data).hexdigest()
    del data
    if path.suffix.lower() == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 and its like.
        lines = enumerate(text.split("\n"), start=1)
        raw = [_json(path, line, number) for number, line in lines if line.strip()]
    else:
        raw = _json(path, text, None)
        if not isinstance(raw, list):
            kind = _kind(raw)
            raise UserError(f"{path}: holds {kind} where a JSON list of records is needed")
    if not raw:
        raise UserError(f"{path}: holds no records; name a file with at least one")
    return raw, digest


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


def _parse(item: Any, index: int) -> tuple[Record, str | None]:
    """A record without its image, and the image's path as written (None for text alone)."""
    if not isinstance(item, dict):
        raise _RefusedError(f"not a record: {_kind(item)} where an object is needed")
    identity = item.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise _RefusedError(f"bad id: it is {_kind(identity)}, not text")
    name = item.get("image")
    if name is not None and not isinstance(name, str):
        raise _RefusedError(
            f"bad image path: it is {_kind(name)}, not text (one image a record is supported)"
        )
    if name is not None and not name.strip():
        raise _RefusedError("bad image path: it is empty; leave the key out for text alone")
    messages = _messages(item.get("conversations"))
    _check_placeholders(messages, name)
    chance = 0.0 if item.get("chance") is None else item["chance"]
    if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
        raise _RefusedError("bad chance: it must be a number from 0 to 1")
    texts = {key: "" if item.get(key) is None else item[key] for key in ("task", "task_group")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise _RefusedError(f"bad {key}: it is {_kind(value)}, not text")
    if not _TASK.fullmatch(texts["task"]):  # a file of answers is named after it
        raise _RefusedError(f"bad task: {_quote(texts['task'])}; use up to 60 letters, digits, spaces, . _ -")
    record = Record(_id_text(item, index), None, _turns(messages), **texts, chance=float(chance))
    _check_unicode([record.id, *texts.values(), *(text for _, text in messages)])
    return record, name


def _messages(turns: Any) -> list[tuple[str, str]]:
    """(role, text) of each turn, roles known; nothing else is checked."""
    if not isinstance(turns, list):
        found = "missing" if turns is None else f"{_kind(turns)}, not a list"
        raise _RefusedError(f"bad conversations: the key is {found}")
    if not turns:
        raise _RefusedError("empty conversation: it has no turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise _RefusedError(f"bad turn: turn {number} is {_kind(turn)}, not an object")
        for key in ("from", "value"):
            if not isinstance(turn.get(key), str):
                what = f"{_kind(turn[key])} as" if turn.get(key) is not None else "no"
                raise _RefusedError(f"bad turn: turn {number} has {what} {key!r}, where text is needed")
        if turn["from"] not in _ROLES:
            raise _RefusedError(
                f"unknown role: turn {number} is from {_quote(turn['from'])}, not human or gpt"
            )
        messages.append((turn["from"], turn["value"]))
    return messages


def _check_placeholders(messages: list[tuple[str, str]], image: str | None) -> None:
    """At most one placeholder, in the first human turn, if and only if there is an image."""
    counts = [text.count(PLACEHOLDER) for _, text in messages]
    total = sum(counts)
    if total and image is None:
        raise _RefusedError(
            f"placeholder without image: turn {_first(counts)} has {PLACEHOLDER}, but no image key"
        )
    if total > 1:
        raise _RefusedError(
            f"several placeholders: {total} {PLACEHOLDER} placeholders, and one image a record is supported"
        )
    if image is not None and not total:
        raise _RefusedError(f"image without placeholder: no turn says {PLACEHOLDER}")
    humans = [number for number, (role, _) in enumerate(messages, start=1) if role == "human"]
    if total and (not humans or _first(counts) != humans[0]):
        role = messages[_first(counts) - 1][0]
        raise _RefusedError(
            f"misplaced placeholder: {PLACEHOLDER} is in turn {_first(counts)} ({role}); "
            "it must be in the first human turn"
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
            raise _RefusedError(f"roles out of order: turn {number} is from {role}, expected {expected}")
    kept = messages[dropped:]
    if not kept:
        raise _RefusedError("empty conversation: its one turn is from gpt, which is dropped as a first turn")
    if len(kept) % 2:
        raise _RefusedError(f"question without answer: turn {len(messages)} is the last and from human")
    turns = []
    for start in range(0, len(kept), 2):
        question = kept[start][1].replace(PLACEHOLDER, "").strip()
        answer = kept[start + 1][1].strip()
        if not question and PLACEHOLDER not in kept[start][1]:
            raise _RefusedError(f"empty question: turn {dropped + start + 1} has no text")
        if not answer:
            raise _RefusedError(f"empty answer: turn {dropped + start + 2} has no text")
        turns.append(Turn(question, answer))
    return tuple(turns)


def _check_unicode(texts: Iterable[str]) -> None:
    """JSON can spell half a surrogate pair, which no tokeniser takes."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _RefusedError(f"bad text: half a surrogate pair in {_quote(text)}") from None


def _find_images(
    names: Iterable[str], images: Path | None, check: bool, target: int | None
) -> dict[str, Path | str]:
    """For each image path as written, the file, or the reason why there is none to use."""
    found: dict[str, Path | str] = {}
    if images is None:
        return {name: f"no image folder: {_quote(name)} is named, but no folder was given" for name in names}
    root = images.resolve()
    for name in names:
        try:
            found[name] = _locate(name, root)
        except _RefusedError as error:
            found[name] = str(error)
    if check:
        paths = {place: None for place in found.values() if isinstance(place, Path)}
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:  # Pillow frees the GIL
            faults = dict(zip(paths, pool.map(lambda path: _image_fault(path, target), paths), strict=True))
        for name, place in found.items():
            if isinstance(place, Path) and (fault := faults[place]):
                found[name] = f"unreadable image: {_quote(name)} {fault}"
    return found


def _locate(name: str, root: Path) -> Path:
    """The file that `name` means under `root`, with no step out of it."""
    if Path(name).is_absolute():
        raise _RefusedError(
            f"image outside folder: {_quote(name)} is absolute; write it relative to the folder"
        )
    try:
        place = (root / name).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL byte, half a surrogate pair, a loop of links
        raise _RefusedError(f"bad image path: {_quote(name)} is not a path") from None
    if not place.is_relative_to(root):
        linked = ".." not in Path(name).parts
        how = "leads out of the image folder" + " through a symbolic link" * linked
        raise _RefusedError(f"image outside folder: {_quote(name)} {how}")
    try:
        if not place.is_file():
            raise _RefusedError(f"missing image: {_quote(name)} is no file in the image folder")
        if not place.stat().st_size:
            raise _RefusedError(f"unreadable image: {_quote(name)} has zero bytes")
    except OSError as error:
        raise _RefusedError(f"missing image: {_quote(name)} ({error.strerror or error})") from None
    return place


def _image_fault(path: Path, target: int | None) -> str | None:
    """What is wrong with a picture, or None."""
    try:
        decode_image(path, target=target)
    except ImageError as error:
        return str(error)
    return None


def _id_text(item: Any, index: int) -> str:
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


def _quote(text: str) -> str:
    """Text on one line, in quotes, cut to a length that can be read."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
