"""The official files of a benchmark: finding them, and reading their records with errors that name them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vlmscale.data.records import read_items
from vlmscale.errors import UserError
from vlmscale.evaluate.questions import Question
from vlmscale.records import read_object

_PLACES = ("{question}", "{options}", "{hint}")  # what `tasks.asked` fills in
_T = TypeVar("_T")
_WORDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    bool: "true/false",
}


@dataclass(frozen=True)
class Official:
    """Where the official files of one benchmark lie, and where pictures that are inside of them go.

    Attributes:
      task: name of the benchmark.
      given: the official file, or the directory of the official files.
      images: directory of the official pictures.
      out: directory of the task file; pictures go to images/TASK below it.
      circular: whether to write every rotation of a question's options (MMBench).
    """

    task: str
    given: Path
    images: Path
    out: Path
    circular: bool = False

    @property
    def folder(self) -> Path:
        """The directory of the official files."""
        return self.given if self.given.is_dir() else self.given.parent

    def file(self, *names: str) -> Path:
        """The file that was given, or the one of the official names that is in the directory.

        Args:
          *names: official names, "*" for what differs between releases; earlier ones win.

        Raises:
          UserError: there is none, or more than one of the same name with "*".
        """
        if not self.given.is_dir():
            return self.given
        for name in names:
            found = sorted(path for path in self.given.glob(name) if path.is_file())
            if len(found) > 1:
                listed = ", ".join(path.name for path in found)
                raise UserError(
                    f"{self.given}: holds {listed}; name the one to convert instead of the directory"
                )
            if found:
                return found[0]
        raise UserError(
            f"{self.given}: holds no {' or '.join(names)}; name the directory of the official files"
        )

    def beside(self, name: str) -> Path | None:
        """The file of this name among the official ones, or None."""
        path = self.folder / name
        return path if path.is_file() else None

    def picture(self, *names: str) -> str:
        """The first of these names that is a file below the picture directory; else the first name."""
        return str(
            next((path for name in names if (path := self.images / name).is_file()), self.images / names[0])
        )

    def store(self, name: str, data: bytes) -> str:
        """Write a picture that came inside an official file to images/TASK, by atomic rename.

        Args:
          name: without an ending, which follows from the bytes.
          data: the encoded picture.

        Raises:
          UserError: it cannot be written.
        """
        folder = self.out / "images" / self.task
        path = folder / f"{name}{_ending(data)}"
        temporary = folder / f".{path.name}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        return str(path)


@dataclass
class Converted:
    """What a converter makes of the official files.

    Attributes:
      questions: with pictures as paths that `Official.picture` or `store` gave.
      counts: of what is in the file, by a name for people.
      notes: what was left out or differs from the usual, and why; one line each.
    """

    questions: list[Question]
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, name: str) -> None:
        """One more of these."""
        self.counts[name] = self.counts.get(name, 0) + 1


Converter = Callable[[Official], Converted]


def _ending(data: bytes) -> str:
    """The ending that image readers expect of such bytes; .png where they are unknown."""
    known = {b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
    return next((ending for start, ending in known.items() if data.startswith(start)), ".png")


def read_dict(path: Path) -> dict[str, Any]:
    """The object of an official JSON file.

    Raises:
      UserError: absent, unreadable or no object.
    """
    value = read_object(path)
    if value is None:
        raise UserError(f"{path}: no such file; name the official file or the directory that holds it")
    return value


def read_list(path: Path, key: str) -> list[tuple[str, dict[str, Any]]]:
    """The records under a key of an official JSON object, each with a name for error lines."""
    values = get(read_dict(path), key, list, str(path))
    return [(f"{path}: {key}[{i}]", _record(value, f"{path}: {key}[{i}]")) for i, value in enumerate(values)]


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a JSON list, or of JSON Lines under any ending (POPE's are .json).

    Raises:
      UserError: unreadable, malformed, or a value that is no object.
    """
    if path.suffix == ".jsonl" or _starts_with_bracket(path):
        for number, (_, _, value) in enumerate(read_items(path), 1):
            where = f"{path}: record {number}"
            yield where, _record(value, where)
        return
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: is not JSON ({error}); copy the file again") from None
            yield where, _record(value, where)


def read_text(path: Path) -> str:
    """All of a text file.

    Raises:
      UserError: absent, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; name the official file or the directory that holds it"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}; copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _starts_with_bracket(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return True  # `read_items` says why


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object; copy the official file again")
    return value


def get(record: dict[str, Any], key: str, kind: type[_T], where: str) -> _T:
    """A value that an official record must have.

    Raises:
      UserError: it is absent or of another type.
    """
    if key not in record:
        raise UserError(f"{where}: has no {key!r}; is this the official file, of a split with answers?")
    value = record[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        short = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise UserError(f"{where}: {key}={short} must be {_WORDS[kind]}; copy the official file again")
    return value


def get_id(record: dict[str, Any], key: str, where: str) -> str:
    """An id, which official files write as text or as a number."""
    value = record.get(key)
    return (
        str(value) if isinstance(value, int) and not isinstance(value, bool) else get(record, key, str, where)
    )


def get_texts(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of at least one text; numbers in it become text, as official code does by formatting them.

    Raises:
      UserError: absent, no list, empty, or it holds something else.
    """
    values = get(record, key, list, where)
    if not values:
        raise UserError(f"{where}: {key} is empty; copy the official file again")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(
                f"{where}: {key} holds {value!r} where a text is needed; copy the official file again"
            )
    return tuple(str(value) for value in values)


def letter(index: int, options: int, where: str) -> str:
    """The letter of an option by its place.

    Raises:
      UserError: there is no such option.
    """
    if not 0 <= index < options:
        raise UserError(
            f"{where}: the answer is option {index}, counted from 0, but there are {options} options"
        )
    return chr(65 + index)


def verbatim(prompt: str, where: str) -> str:
    """A prompt that is asked as it stands, as a question's template.

    Raises:
      UserError: it holds one of the names that `tasks.asked` replaces.
    """
    if found := [place for place in _PLACES if place in prompt]:
        raise UserError(f"{where}: its text holds {found[0]}, which a prompt template would replace; edit it")
    return prompt
