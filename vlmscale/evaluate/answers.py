"""What a model said, on disk: one line an item, there as soon as it was said, and each once.

An answer carries the key of all that it depends on, so that a later evaluation takes over what still holds
and asks the rest. No jax.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmscale.evaluate.items import Item, without_pictures
from vlmscale.records import write_lines


class Said(NamedTuple):
    """What the model said to one item."""

    text: str
    tokens: int  # generated, the end token included
    visual_tokens: int  # of the item's pictures together; 0 without one


class Journal:
    """The answers to one task at one count of visual tokens.

    Attributes:
      path: the file.
      said: answers by item id.
    """

    def __init__(self, path: Path, keys: Mapping[str, str]) -> None:
        """Read what is there.

        Args:
          path: of the file; made with the first answer.
          keys: of each item of the task; lines of other items or other keys are left, and gone from the file
            with the first new answer.
        """
        self.path, self.keys = path, keys
        self.said: dict[str, Said] = {}
        self._lines: dict[str, dict[str, Any]] = {}
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                line = _parse(text)
                if line is not None and keys.get(line["id"]) == line["key"]:
                    self.said[line["id"]] = Said(line["answer"], line["tokens"], line["visual_tokens"])
                    self._lines[line["id"]] = line
        self._open = False

    def add(self, answers: Iterable[tuple[Item, Said]]) -> None:
        """Append answers to items; they are on the disk when this returns."""
        lines = []
        for item, said in answers:
            name = item.id
            line = {
                "id": name,
                "question": without_pictures(item.text),
                "answer": said.text,
                "tokens": said.tokens,
                "visual_tokens": said.visual_tokens,
                "key": self.keys[name],
            }
            self.said[name], self._lines[name] = said, line
            lines.append(json.dumps(line) + "\n")
        if not self._open:  # what a kill cut off, and what no longer holds
            kept = list(self._lines.values())[: len(self._lines) - len(lines)]
            write_lines(self.path, [json.dumps(line) for line in kept])
            self._open = True
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, truths: Mapping[str, tuple[str, ...]], marks: Mapping[str, float]) -> None:
        """Write all answers in the order of `marks`, each with its score and the true answers."""
        whole = [
            self._lines[name] | {"truth": list(truths[name]), "score": mark}
            for name, mark in marks.items()
            if name in self._lines
        ]
        write_lines(self.path, [json.dumps(line) for line in whole])
        self._open = False

    def write_llava(self, path: Path, order: Iterable[str], model_id: str) -> None:
        """The same in LLaVA's format of an answer file (llava/eval/model_vqa_loader.py)."""
        lines = []
        for name in order:
            if (line := self._lines.get(name)) is not None:
                lines.append(
                    {
                        "question_id": name,
                        "prompt": line["question"],
                        "text": line["answer"],
                        "answer_id": line["key"],
                        "model_id": model_id,
                        "metadata": {},
                    }
                )
        write_lines(path, [json.dumps(line) for line in lines])


def _parse(text: str) -> dict[str, Any] | None:
    """A line that is whole, or None: a kill may have cut it, and an older version wrote others."""
    try:
        line = json.loads(text)
        wanted = {"id": str, "answer": str, "key": str, "tokens": int, "visual_tokens": int}
        return line if all(isinstance(line[key], kind) for key, kind in wanted.items()) else None
    except (ValueError, KeyError, TypeError):
        return None
