"""LLaVA records and picture files for tests, made on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(kind: str = "JPEG", mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """The bytes of a random picture, (width, height) pixels large."""
    count = size[0] * size[1] * len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    buffer = io.BytesIO()
    Image.frombytes(mode, size, pixels.tobytes()).save(buffer, kind)
    return buffer.getvalue()


def talk(*values: str) -> list[dict[str, str]]:
    """A conversation that begins with the human."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def shown(name: str, *images: str, text: str = "What is it?") -> dict[str, Any]:
    """A record that shows these images."""
    return {
        "id": name,
        "image": list(images),
        "conversations": talk("<image>" * len(images) + text, f"A {name}."),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """An image folder with these files."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_records(path: Path, items: Any) -> Path:
    """A JSON file, or JSON Lines."""
    lines = (
        "".join(json.dumps(item) + "\n" for item in items) if path.suffix == ".jsonl" else json.dumps(items)
    )
    path.write_text(lines, encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
