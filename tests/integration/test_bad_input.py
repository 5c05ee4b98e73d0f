"""Every mistake ends in one line on stderr that says what to do, exit code 2, and no traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.tiny import (
    DATA,
    LLAVA,
    SCENES,
    lines,
    picture,
    read,
    steps,
    talk,
    train,
    write_llava,
)
from vlmscale.cli import main

Capture = pytest.CaptureFixture[str]


def refused(words: list[str], capsys: Capture, *parts: str) -> None:
    """Run the command line; it must exit with 2 and one line, behind what was done, that has all `parts`."""
    capsys.readouterr()
    code = main(words)
    out, error = capsys.readouterr()
    assert code == 2, error
    assert out == ""
    error = re.sub(r"^[\w, ]+: \d+/\d+\n", "", error, flags=re.MULTILINE)  # stages that ended
    assert error.count("\n") == 1, error
    command = " ".join(words[: 2 if words[0] == "data" else 1])
    assert error.startswith(f"vlmscale {command}: ")
    for part in parts:
        assert part in error


def train_words(out: Path, *more: str, config: str = SCENES) -> list[str]:
    return ["train", "--config", config, "--out", str(out), *DATA, *steps(4), *more]


@pytest.mark.parametrize(
    "override, parts",
    [
        ("--config.train.step=3", ["train.step", "nearest is train.steps"]),
        ("--config.visual_tokens=4", ["nearest is compressor.visual_tokens"]),
        ("--config.train.steps", ["--config.KEY=VALUE"]),
        ("--config.train.steps=abc", ["train.steps=abc"]),
        ("--config.train.steps=3.5", ["train.steps=3.5"]),
        ("--config.train.learning_rate=fast", ["train.learning_rate=fast"]),
        ("--config.train.learning_rate=nan", ["train.learning_rate=nan", "above 0"]),
        ("--config.train.steps=0", ["train.steps=0", "above 0"]),
        ("--config.train.warmup_steps=99", ["train.warmup_steps=99", "below train.steps"]),
        ("--config.train.weight_decay=-1", ["train.weight_decay"]),
        ("--config.compressor.visual_tokens=5", ["visual_tokens=5", "1, 4, 9, 16"]),
        ("--config.compressor.name=poll", ["nearest is pool"]),
        ("--config.llm.name=toy-14K", ["nearest is toy-14k"]),
        ("--config.data.source=llava", ["data.records"]),
        ("--config.data.records=x.json", ["data.source=llava"]),
        ("--config.data.vocab_size=100", ["at least 300"]),
        ("--config.data.max_text_tokens=1", ["no usable record", "too long"]),
        ("--config.tower.checkpoint=no.safetensors", ["tower.checkpoint=no.safetensors"]),
    ],
)
def test_an_override_that_cannot_be_used(
    override: str, parts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    refused(train_words(tmp_path / "run", override), capsys, *parts)


def test_a_batch_that_does_not_divide_over_the_devices(tmp_path: Path, capsys: Capture) -> None:
    assert main(train_words(tmp_path / "run", "--config.train.batch_size=12")) == 2
    assert "multiple of the 8 devices" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("def get_config(:\n", ["SyntaxError", "line 1"]),
        ("def get_config(arg=''):\n    return missing\n", ["NameError", "missing"]),
        ("import no_such_module\n", ["no_such_module"]),
        ("1 / 0\n", ["ZeroDivisionError"]),
        ("x = 1\n", ["config.py"]),
        ("def get_config(arg=''):\n    return {}\n", ["config.py"]),
    ],
)
def test_a_config_file_that_cannot_be_used(
    text: str, parts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "config.py"
    path.write_text(text)
    refused(train_words(tmp_path / "run", config=str(path)), capsys, *parts)
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_not_there_or_takes_another_argument(tmp_path: Path, capsys: Capture) -> None:
    refused(train_words(tmp_path / "run", config="nope.py"), capsys, "nope.py", "no such file")
    words = train_words(tmp_path / "run", config="configs/scenes_tiny.py:toy-14k")
    refused(words, capsys, "scenes_tiny.py", "its argument is LLM,VISUAL_TOKENS")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("def get_sweep(overrides):\n    return (\n", ["SyntaxError"]),
        ("def get_sweep(overrides):\n    return missing\n", ["NameError"]),
        ("x = 1\n", ["get_sweep(overrides)"]),
        ("def get_sweep(overrides):\n    return []\n", ["must return", "Sweep"]),
        ("from vlmscale.config import Sweep\ndef get_sweep(o):\n    return Sweep('x', [])\n", ["0 cells"]),
    ],
)
def test_a_sweep_file_that_cannot_be_used(
    text: str, parts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "sweep.py"
    path.write_text(text)
    refused(["sweep", "run", str(path), "--out", str(tmp_path / "out")], capsys, "sweep.py", *parts)


def test_sweep_words_that_cannot_be_used(tmp_path: Path, capsys: Capture) -> None:
    words = ["sweep", "run", "configs/sweeps/demo.py", "--out", str(tmp_path / "out")]
    refused([*words, "--workers", "0"], capsys, "--workers=0")
    refused([*words, "--config.train.step=1"], capsys, "nearest is train.steps")
    refused(["sweep", "run", "no.py", "--out", str(tmp_path / "out")], capsys, "no.py")
    refused(["sweep", "status", str(tmp_path)], capsys, f"{tmp_path}: is no sweep directory")
    path = tmp_path / "file"
    path.touch()
    refused(["sweep", "status", str(path)], capsys, f"{path}: is no sweep directory")


@pytest.mark.parametrize(
    "text, parts",
    [
        ('[{"id": 1},\n {]', ["malformed JSON", "line 2, column 3"]),
        ("", ["malformed JSON", "line 1, column 1"]),
        ("[]", ["no records"]),
        ('{"id": 1}', ["a JSON list"]),
        ('[1, {"id": "a"}]', ["none of its 2 records", "not a record", "bad conversations"]),
    ],
)
def test_a_record_file_that_cannot_be_used(
    text: str, parts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    overrides = write_llava(tmp_path, [])
    (tmp_path / "records.json").write_text(text)
    words = train_words(tmp_path / "run", *overrides, config=LLAVA)
    refused(words, capsys, str(tmp_path / "records.json"), *parts)
    assert not (tmp_path / "run" / "done.json").exists()


def test_records_that_are_not_there(tmp_path: Path, capsys: Capture) -> None:
    overrides = write_llava(tmp_path, [{"id": "a", "conversations": talk("q", "b")}])
    words = train_words(tmp_path / "run", *overrides, config=LLAVA)
    refused([*words, "--config.data.images=/no/such/folder"], capsys, "/no/such/folder", "no such folder")
    other = train_words(tmp_path / "other", *overrides, config=LLAVA)
    refused([*other, "--config.data.records=/no/such.json"], capsys, "/no/such.json")
    refused([*other, f"--config.data.records={tmp_path}"], capsys, str(tmp_path))


def test_what_does_not_fit_the_context_is_cut_or_set_aside_and_counted(
    tmp_path: Path, capsys: Capture
) -> None:
    records = [
        {"id": "broken", "conversations": []},
        {"id": "short", "conversations": talk("Say it.", "hello")},
        {"id": "long", "conversations": talk("one two three " * 100, "Said.")},
        {"id": "cut", "conversations": talk("First?", "yes") + talk("Then?", "one two three " * 100)},
        {"id": "answer", "conversations": talk("Say all.", "one two three " * 100)},
    ]
    overrides = write_llava(tmp_path, records)
    run = tmp_path / "run"
    context = "--config.data.max_text_tokens=40"
    assert train(run, *overrides, context, config=LLAVA, count=4) == 0
    summary = next(line for line in capsys.readouterr().err.splitlines() if "records read" in line)
    assert "5 records read, 3 used, 2 quarantined" in summary
    assert "1 too long" in summary
    assert "1 empty conversation" in summary
    aside = lines(run / "data" / "quarantine.jsonl")
    assert [(item["index"], item["id"]) for item in aside] == [(0, "broken"), (2, "long")]
    assert "data.max_text_tokens=40" in aside[1]["reason"]
    manifest = read(run / "data" / "manifest.json")
    assert manifest["records"] == {"train": 3}
    assert manifest["shortened_conversations"] == {"train": 3}
    assert manifest["quarantined"] == 2
    # A question that is longer than anything trained on is not asked either.
    assert main(["evaluate", "--run", str(run)]) == 0
    asked = {line["id"] for line in lines(run / "answers" / "records.jsonl")}
    assert asked == {"short", "cut#0", "cut#1", "answer"}
    assert [line["id"] for line in lines(run / "not_asked.jsonl")] == ["long"]
    assert "1 question" in capsys.readouterr().err
    only_long = write_llava(tmp_path / "long", records[2:3])
    words = train_words(tmp_path / "none", *only_long, context, config=LLAVA)
    refused(words, capsys, "no usable record", "too long")


def test_an_output_directory_that_cannot_be_made(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(train_words(out), capsys, str(out))
        refused(["data", "scenes", "--out", str(out)], capsys, str(out))
        refused(["sweep", "run", "configs/sweeps/demo.py", "--out", str(out)], capsys, str(out))
    refused(["tower", "--out", str(tmp_path / "file" / "t.safetensors")], capsys, str(tmp_path / "file"))
    refused(["tower", "--out", str(tmp_path)], capsys, str(tmp_path), "is a directory")
    refused(["tower", "--out", str(tmp_path / "t"), "--steps", "0"], capsys, "--steps=0")


@pytest.mark.parametrize("content", [b"", b"x" * 50, b"\x08" + b"\0" * 7 + b"{}      "])
def test_a_tower_that_cannot_be_read(content: bytes, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "tower.safetensors"
    path.write_bytes(content)
    refused(train_words(tmp_path / "run", f"--config.tower.checkpoint={path}"), capsys, str(path))


def test_runs_that_are_none(tmp_path: Path, capsys: Capture) -> None:
    for run in (tmp_path, tmp_path / "absent"):
        for words in (["evaluate"], ["generate", "--prompt", "x"]):
            refused([*words, "--run", str(run)], capsys, str(run), "is this a run directory?")
    score = ["score", "--task", "gqa", "--items", "items.jsonl", "--answers", "answers.jsonl"]
    refused([*score, "--config.train.steps=2"], capsys, "takes no")


@pytest.mark.parametrize("visual_tokens", [0, 4])
def test_questions_that_cannot_be_answered(visual_tokens: int, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    assert train(run, f"--config.compressor.visual_tokens={visual_tokens}", count=4) == 0
    refused(["evaluate", "--run", str(run), "--tasks", "count,cuont"], capsys, "cuont", "count")
    words = ["generate", "--run", str(run), "--prompt", "Number?"]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(picture("JPEG")[:300])
    refused([*words, "--image", str(tmp_path / "no.png")], capsys, "no.png")
    refused([*words, "--image", str(broken)], capsys, "broken.jpg", "truncated")
    refused([*words, "--image", str(tmp_path)], capsys, str(tmp_path))
    refused(["generate", "--run", str(run), "--prompt", "  "], capsys, "--prompt is empty")
    refused(["generate", "--run", str(run), "--prompt", "caf\udce9"], capsys, "--prompt")


def test_words_that_the_parser_refuses(capsys: Capture) -> None:
    for words in ([], ["frobnicate"], ["train"], ["train", "--config", "x", "--outt", "y"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
