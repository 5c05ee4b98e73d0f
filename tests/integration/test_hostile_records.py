"""A folder of good and hostile records, from JSON to scores: what is usable is used, the rest is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.integration.tiny import LLAVA, lines, picture, read, talk, train, write_llava
from vlmscale.cli import main
from vlmscale.data.dataset import open_dataset


def image_record(name: str, file: str, question: str = "<image>\nWhat is this?") -> dict[str, Any]:
    return {"id": name, "image": file, "conversations": talk(question, f"a {name}")}


def gif(frames: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (20, 20), (40 * i, 0, 0)) for i in range(frames)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def gray16() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[tuple[str, str], dict[str, str]]:
    """Overrides that name the records, and the class of reason (or "") by record id."""
    images = tmp_path / "llava" / "images"
    images.mkdir(parents=True)
    jpeg = picture("JPEG", side=64)
    files = {
        "plain.jpg": jpeg,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "zero.jpg": b"",
        "html.jpg": b"<html>404</html>",
        "rgba.png": picture("PNG", "RGBA"),
        "cmyk.jpg": picture("JPEG", "CMYK"),
        "gray16.png": gray16(),
        "palette.gif": gif(1),
        "animated.gif": gif(4),
        "dot.png": picture("PNG", side=1),
        "../secret.jpg": jpeg,
    }
    for name, content in files.items():
        (images / name).write_bytes(content)
    usable = ["plain.jpg", "rgba.png", "cmyk.jpg", "gray16.png", "palette.gif", "animated.gif", "dot.png"]
    records: list[Any] = [image_record(Path(name).stem, name) for name in usable]
    reasons = dict.fromkeys((record["id"] for record in records), "")
    records += [{"id": "text", "conversations": talk("Two and two?", "four")}]
    reasons["text"] = ""
    two = talk("<image>\nOne <image>?", "no")
    hostile: list[tuple[str, dict[str, Any]]] = [
        ("missing image", image_record("absent", "absent.jpg")),
        ("unreadable image", image_record("truncated", "truncated.jpg")),
        ("unreadable image", image_record("zero", "zero.jpg")),
        ("unreadable image", image_record("html", "html.jpg")),
        ("image outside folder", image_record("outside", "../secret.jpg")),
        ("image outside folder", image_record("absolute", "/etc/hostname")),
        ("empty conversation", {"id": "no-turns", "conversations": []}),
        ("roles out of order", {"id": "order", "conversations": talk("a", "b")[:1] * 2}),
        ("several placeholders", {"id": "two", "image": "plain.jpg", "conversations": two}),
        ("empty answer", {"id": "silent", "conversations": talk("Well?", " ")}),
        ("bad task", {"id": "task", "task": "../../x", "conversations": talk("a", "b")}),
    ]
    records = [record for pair in zip(records, (r for _, r in hostile), strict=False) for record in pair] + [
        record for _, record in hostile[len(records) :]
    ]
    reasons |= {record["id"]: reason for reason, record in hostile}
    return write_llava(tmp_path / "llava", records), reasons


def test_good_records_are_used_and_every_other_has_its_reason(
    mixture: tuple[tuple[str, str], dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, reasons = mixture
    run = tmp_path / "run"
    assert train(run, *overrides, "--config.compressor.visual_tokens=4", config=LLAVA, count=6) == 0
    out, error = capsys.readouterr()
    good = {name for name, reason in reasons.items() if not reason}
    bad = {name: reason for name, reason in reasons.items() if reason}
    assert (len(good), len(bad)) == (8, 11)
    assert "19 records read, 8 used, 11 quarantined (3 unreadable image, 2 image outside folder" in error
    assert "quarantine.jsonl" in error
    assert "Traceback" not in error
    assert out.startswith("trained: ")

    records = json.loads((tmp_path / "llava" / "records.json").read_text())
    aside = lines(run / "data" / "quarantine.jsonl")
    assert {item["id"]: item["reason"].split(":")[0] for item in aside} == bad
    assert all(records[item["index"]]["id"] == item["id"] for item in aside)
    assert all("\n" not in item["reason"] for item in aside)
    manifest = read(run / "data" / "manifest.json")
    assert manifest["records"] == {"train": len(good)}
    assert manifest["quarantined"] == len(aside) == len(bad)
    dataset = open_dataset(run / "data" / "records")
    assert len(dataset.index.picture) == 7
    assert len(dataset.index.picture_record) == 6  # of two GIFs the first frames are the same
    assert manifest["summary"] in error
    assert {dataset.record(index).id for index in range(len(dataset))} == good
    assert all(np.isfinite(line["loss"]) for line in lines(run / "metrics.jsonl"))

    assert main(["evaluate", "--run", str(run)]) == 0
    [row] = lines(run / "result.jsonl")
    assert row["n_items"] == len(good)
    assert row["data_mix"] == "records.json"
    assert {line["id"] for line in lines(run / "answers" / "records.jsonl")} == good


@pytest.mark.parametrize("visual_tokens", [0, 4])
def test_text_alone_trains_and_answers(visual_tokens: int, tmp_path: Path) -> None:
    records = [{"id": str(i), "conversations": talk(f"What is {i}?", f"a {i}")} for i in range(3)]
    overrides = (*write_llava(tmp_path, records), f"--config.compressor.visual_tokens={visual_tokens}")
    run = tmp_path / "run"
    assert train(run, *overrides, config=LLAVA, count=4) == 0
    assert not len(open_dataset(run / "data" / "records").index.picture)
    assert main(["evaluate", "--run", str(run)]) == 0
    [row] = lines(run / "result.jsonl")
    assert row["n_items"] == 3
    assert main(["generate", "--run", str(run), "--prompt", "What is 1?"]) == 0
