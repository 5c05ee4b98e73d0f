"""Benchmarks from task files: asked, answered, scored and filed, whatever interrupts or splits the work."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from tests.integration.processes import at_work, free_port
from tests.integration.processes import told as story
from tests.integration.tiny import child, lines, train, wait_for
from vlmscale.cli import main
from vlmscale.data import scenes
from vlmscale.evaluate import asking
from vlmscale.evaluate.answers import Journal
from vlmscale.evaluate.items import file_task, prompt_of, record_tasks, text_tokens
from vlmscale.evaluate.loaded import LoadedRun, load_run
from vlmscale.evaluate.runner import Asked, evaluate
from vlmscale.models.sizes import SIZES
from vlmscale.sharding import make_mesh, replicated

COLOURS = ("red", "green", "blue", "yellow")
ITEMS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose answers differ from each other."""
    path = tmp_path_factory.mktemp("benchmarks") / "run"
    assert train(path, "--config.train.learning_rate=0.01", count=60) == 0
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The same, not evaluated yet."""
    place = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(place)], check=True)
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with pictures of their own: questions of several lengths, options, pairs."""
    place = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (30 + number, 50, 3), np.uint8)).save(place / f"{number}.png")
    pictures, asked = scenes.build("test", 4, 0)
    many = []
    for number, scene in enumerate(pictures):
        Image.fromarray(scenes.draw(scene)).save(place / f"scene{number}.png")
        for one in asked[number]:  # as the run was asked in training, some behind more words
            words = "really " * (len(many) % 3) + one.question
            item = {
                "id": len(many),
                "image": f"scene{number}.png",
                "question": words,
                "answers": [one.answer, "1"],
            }
            many.append(item | {"template": "{question}"})
    many = many[:ITEMS]
    write(place, "gqa", many)
    letters = [
        {"id": f"q{i}", "image": f"{i}.png", "question": "Which?", "options": COLOURS, "answers": "A"}
        for i in range(8)
    ]
    write(place, "ai2d", letters)
    pair = {"image": ["0.png", "1.png"], "question": "Same?", "answers": "A", "options": ["yes", "no"]}
    blind = {"question": "How many?", "answers": "B", "options": ["0", "1"]}
    write(place, "own", [{"id": "two", **pair}, {"id": "none", **blind}])
    return place


def write(place: Path, task: str, items: list[dict[str, Any]]) -> None:
    (place / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def said(run: Path, name: str) -> dict[str, str]:
    """Answers on disk by id; each once."""
    found = lines(run / "answers" / f"{name}.jsonl")
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line["answer"] for line in found}


def test_a_task_file_becomes_answers_and_rows(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", str(run), "--tasks", "gqa,ai2d,own", "--data", str(data), "--blind", "--llava-answers"]
    assert main(["evaluate", *words, "--json"]) == 0
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {name: row["task_group"] for name, row in rows.items()} == {
        "gqa": "reasoning",
        "ai2d": "reasoning",
        "own": "own",
    }
    assert {name: row["scorer"] for name, row in rows.items()} == {
        "gqa": "gqa/1",
        "ai2d": "ai2d/1",
        "own": "letter/1",
    }
    assert (rows["gqa"]["chance"], rows["ai2d"]["chance"], rows["own"]["chance"]) == (0, 0.25, 0.5)
    assert [rows[name]["prompt_id"] for name in ("gqa", "ai2d")] == [
        "toy-v1/gqa/1+template",
        "toy-v1/ai2d/1",
    ]
    for name, row in rows.items():
        filed = lines(run / "answers" / f"{name}.jsonl")
        assert row["score"] == pytest.approx(np.mean([line["score"] for line in filed]))
        blind = lines(run / "answers" / f"{name}@0.jsonl")
        assert row["blind_score"] == pytest.approx(np.mean([line["score"] for line in blind]))
        assert all(line["visual_tokens"] == 0 for line in blind)
        assert row["n_items"] == len(filed) == len(blind)
    [two, none] = lines(run / "answers" / "own.jsonl")
    assert (two["visual_tokens"], none["visual_tokens"]) == (8, 0)
    assert len(set(said(run, "gqa").values())) > 1, "a model that always says the same proves nothing"
    told = lines(run / "answers" / "gqa.llava.jsonl")
    assert [line["question_id"] for line in told] == [str(number) for number in range(ITEMS)]
    assert {line["question_id"]: line["text"] for line in told} == said(run, "gqa")
    assert rows["gqa"]["details"] == {}
    # Scored again from the files alone.
    again = ["--items", str(data / "gqa.jsonl"), "--answers", str(run / "answers" / "gqa.llava.jsonl")]
    assert main(["score", "--task", "gqa", *again, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert (scored["score"], scored["stderr"]) == (rows["gqa"]["score"], rows["gqa"]["stderr"])
    # A later evaluation asks nothing again, and still tells what was said blind.
    assert main(["evaluate", "--run", str(run), "--tasks", "gqa", "--data", str(data), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["blind_score"] == rows["gqa"]["blind_score"]


@pytest.fixture
def undisturbed(trained: Path, data: Path, tmp_path: Path) -> dict[str, str]:
    """Answers to gqa in one go."""
    place = tmp_path / "undisturbed"
    subprocess.run(["cp", "-r", str(trained), str(place)], check=True)
    evaluate(load_run(place), Asked(["gqa"], data))
    return said(place, "gqa")


def test_what_was_said_is_never_asked_again(
    run: Path, data: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between any two batches, and with a torn last line."""
    loaded = load_run(run, overrides=["--config.evaluate.batch_size=8"])
    add, asked, filed, stops = Journal.add, [], [], [1]

    def stopped(journal: Journal, answers: Any) -> None:
        batch = list(answers)
        asked.extend(item.id for item, _ in batch)
        add(journal, batch)
        filed.append(len(batch))
        if filed == [8] * stops[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, Asked(["gqa"], data))
    for _ in range(2):
        with (run / "answers" / "gqa.jsonl").open("a") as file:
            file.write('{"id": "torn", "answ')
        filed.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate(loaded, Asked(["gqa"], data))
        stops[0] = 1
    filed.clear()
    stops[0] = 9
    evaluate(loaded, Asked(["gqa"], data))
    assert len(asked) == len(set(asked)) == ITEMS
    assert said(run, "gqa") == undisturbed


@pytest.mark.slow
def test_killed_at_random_it_goes_on(run: Path, data: Path, undisturbed: dict[str, str]) -> None:
    """SIGKILL to the command itself, until one attempt ends by itself."""
    words = ["evaluate", "--run", str(run), "--tasks", "gqa", "--data", str(data)]
    words.append("--config.evaluate.batch_size=8")
    path, rng, kept, kills = run / "answers" / "gqa.jsonl", random.Random(0), [], 0
    while True:
        process = child(words)
        if kills < 3:
            # Behind the first new answers of this attempt, so that every one gets on.
            while process.poll() is None and (
                not path.exists() or len(path.read_bytes().splitlines()) <= len(kept)
            ):
                pass
            try:
                process.wait(rng.random() * 0.2)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.communicate()
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        assert whole[: len(kept)] == kept, "what was there has been said again, or is lost"
        kept = whole
    assert kills
    assert said(run, "gqa") == undisturbed


def on(run: LoadedRun, *shape: int, devices: int = 8) -> LoadedRun:
    """The same run on other devices."""
    mesh = make_mesh(*shape, jax.devices()[:devices])
    return replace(run, mesh=mesh, params=jax.device_put(run.params, replicated(mesh)))


def test_answers_do_not_depend_on_batch_devices_or_order(
    run: Path, data: Path, undisturbed: dict[str, str]
) -> None:
    for size, shape, devices in ((1, (1, 1, 1), 1), (7, (2, 1, 1), 2), (64, (1, 4, 2), 8)):
        (run / "answers" / "gqa.jsonl").unlink(missing_ok=True)
        loaded = on(
            load_run(run, overrides=[f"--config.evaluate.batch_size={size}"]), *shape, devices=devices
        )
        evaluate(loaded, Asked(["gqa"], data))
        assert said(run, "gqa") == undisturbed
    order = lines(data / "gqa.jsonl")[::-1]
    other = run.parent / "other"
    other.mkdir()
    for item in order:
        item["image"] = str(data / item["image"])
    write(other, "gqa", order)
    (run / "answers" / "gqa.jsonl").unlink()
    evaluate(load_run(run), Asked(["gqa"], other))
    assert said(run, "gqa") == undisturbed
    assert list(said(run, "gqa")) == [str(item["id"]) for item in order]


def test_weights_split_over_devices_answer_alike(run: Path, data: Path, undisturbed: dict[str, str]) -> None:
    evaluate(
        load_run(run, overrides=["--config.mesh.fsdp=4", "--config.mesh.tensor=2"]), Asked(["gqa"], data)
    )
    assert said(run, "gqa") == undisturbed


def test_a_changed_question_or_picture_is_asked_again(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "tasks"
    subprocess.run(["cp", "-r", str(data), str(other)], check=True)
    loaded, asked = load_run(run), []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, said: asked.extend(said) or add(self, said))
    evaluate(loaded, Asked(["ai2d"], other))
    assert len(asked) == 8
    items = lines(other / "ai2d.jsonl")
    items[2]["question"] = "Which one?"
    items[3]["options"] = ["cyan", *COLOURS[1:]]
    items[4]["answers"] = "B"  # which changes the score alone
    write(other, "ai2d", items)
    Image.new("RGB", (9, 9)).save(other / "5.png")
    asked.clear()
    evaluate(loaded, Asked(["ai2d"], other))
    assert sorted(item.id for item, _ in asked) == ["q2", "q3", "q5"]


def test_items_that_fail_are_named_counted_and_tried_again(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tasks"
    subprocess.run(["cp", "-r", str(data), str(other)], check=True)
    (other / "1.png").unlink()
    hostile = {5: "a\0.png", 6: "x" * 300 + ".png"}
    (other / "2.png").write_bytes((data / "2.png").read_bytes()[:200])
    items = lines(other / "ai2d.jsonl")
    items[7]["question"] = "Which " * 2000
    for number, name in hostile.items():
        items[number]["image"] = name
    write(other, "ai2d", items)
    words = ["evaluate", "--run", str(run), "--tasks", "ai2d", "--data", str(other)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "5 not answered, counted as wrong" in out
    assert "ai2d: item q1: picture" in err
    assert "1.png: No such file" in err
    failed = {line["id"]: line["reason"] for line in lines(run / "failures.jsonl")}
    assert set(failed) == {"q1", "q2", "q5", "q6", "q7"}
    assert "2.png" in failed["q2"]
    assert "tokens" in failed["q7"]
    [row] = lines(run / "result.jsonl")
    assert (row["n_items"], row["n_failed"]) == (8, 5)
    assert set(said(run, "ai2d")) == {"q0", "q3", "q4"}
    assert "and 2 more items were not answered" in err
    for name in ("1.png", "2.png"):
        (other / name).write_bytes((data / name).read_bytes())
    for number in hostile:
        items[number]["image"] = "0.png"
    write(other, "ai2d", items)
    assert main(words) == 0
    assert [line["id"] for line in lines(run / "failures.jsonl")] == ["q7"]
    assert lines(run / "result.jsonl")[0]["n_failed"] == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda items: items.append(items[0]), "item q0: is there twice"),
        (lambda items: items[1].update(options=[]), "item q1: options is an empty list"),
        (lambda items: items[2].update(answers=3), "item q2: answers=3 must be a text"),
        (lambda items: items[3].update(image=7), "item q3: image=7 must be a text"),
        (lambda items: items[4].pop("question"), "item q4: has no question"),
        (lambda items: items[5].update(anwsers="A"), "item q5: unknown key 'anwsers'"),
        (lambda items: items[6].update(question="<image> <image>?"), "item q6: shows <image> 2 times"),
        (lambda items: items[7].update(answers="Z"), "item q7: answers='Z' must be one of A, B, C, D"),
        (lambda items: items[7].update(id="two\nlines"), "holds characters that cannot be printed"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_one_line(
    change: Callable[[Any], None],
    told: str,
    trained: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = lines(data / "ai2d.jsonl")
    change(items)
    write(tmp_path, "ai2d", items)
    assert main(["evaluate", "--run", str(trained), "--tasks", "ai2d", "--data", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert told in err
    assert "ai2d.jsonl" in err
    assert err.count("\n") == 0
    assert not (trained / "result.jsonl").exists()


def test_options_of_the_command_that_cannot_be(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, told in (
        (["--data", str(data)], "name what to evaluate"),
        (["--data", str(data), "--tasks", "gqq"], "has no gqq.jsonl; it has ai2d, gqa, own"),
        (["--data", str(data), "--tasks", "../tasks/gqa"], "a name has letters"),
        (["--tasks", "gqa"], "--data DIR names a directory of task files"),
        (["--config.train.steps=3"], "--config.mesh.*, --config.reducer.* may change"),
    ):
        assert main(["evaluate", "--run", str(trained), *words]) == 2
        assert told in capsys.readouterr().err


def test_many_counts_share_the_tower(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of pictures is encoded once, whatever is made of it."""
    path = tmp_path / "run"
    nested = ("--config.compressor.name=mqt", "--config.compressor.visual_tokens=4")
    assert train(path, *nested, count=4) == 0
    encoded = []
    complete = asking._complete
    monkeypatch.setattr(asking, "_complete", lambda *words: encoded.append(1) or complete(*words))
    rows = evaluate(load_run(path), Asked(["gqa"], data, [1, 2, 4], blind=True))
    assert [row.visual_tokens for row in rows] == [1, 2, 4]
    assert len({row.blind_score for row in rows}) == 1
    assert len(encoded) == 1
    names = {file.stem for file in (path / "answers").iterdir()}
    assert names == {"gqa@0", "gqa@1", "gqa@2", "gqa@4"}
    every = {name: said(path, name) for name in names}
    (path / "answers" / "gqa@2.jsonl").unlink()
    evaluate(load_run(path), Asked(["gqa"], data, [2]))
    assert said(path, "gqa@2") == every["gqa@2"]


def test_a_picture_too_many_for_one_count_is_no_failure_at_another(tmp_path: Path, data: Path) -> None:
    """And what one evaluation filed of failures another of other counts leaves."""
    path = tmp_path / "run"
    nested = ("--config.compressor.name=m3", "--config.compressor.visual_tokens=64")
    assert train(path, *nested, count=4) == 0
    context = SIZES["toy-14k"].context
    [item] = lines(data / "ai2d.jsonl")[:1]
    item["question"] = "word " * (context // 2)
    loaded, other = load_run(path), tmp_path / "tasks"
    other.mkdir()
    item["image"] = str(data / item["image"])
    template = loaded.prepared.template
    while True:  # as long as it can be with one token
        write(other, "ai2d", [item])
        [one] = file_task("ai2d", other).items
        if text_tokens(prompt_of(one, template)) + 1 + 16 <= context:
            break
        item["question"] = item["question"][: -len("word ")]
    evaluate(loaded, Asked(["ai2d"], other, [1, 64]))
    rows = {row["visual_tokens"]: row["n_failed"] for row in lines(path / "result.jsonl")}
    assert rows == {1: 0, 64: 1}
    evaluate(loaded, Asked(["ai2d"], other, [1]))
    assert [line["visual_tokens"] for line in lines(path / "failures.jsonl")] == [64]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("name=quecc",), id="quecc"),
        pytest.param(("name=prumerge", "options=count=adaptive"), id="adaptive"),
        pytest.param(("visual_tokens=0",), id="blind"),
    ],
)
def test_pictures_of_a_task_file_are_read_as_those_of_the_data(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """The run's own questions from a task file get the answers that its own evaluation gives."""
    path, place = tmp_path / "run", tmp_path / "tasks"
    words = [f"--config.compressor.{word}" for word in ("visual_tokens=4", *overrides)]
    assert train(path, *words, "--config.train.learning_rate=0.01", count=20) == 0
    place.mkdir()
    run, items = load_run(path), []
    for number, scene in enumerate(scenes.build("test", 8, 0)[0]):
        Image.fromarray(scenes.draw(scene)).save(place / f"{number}.png")
    for name, task in record_tasks(run.prepared.datasets["test"], "test", "none", 8).items():
        if name != "read":
            continue
        for item in task.items:
            picture = int(item.id.split("/")[1].split("-")[0])
            question = {"question": item.question.question, "answers": list(item.question.answers)}
            items.append({"id": item.id, "image": f"{picture}.png", **question})
    write(place, "mine", items)
    evaluate(run, Asked(["read"]))
    evaluate(run, Asked(["mine"], place))
    own, files = (lines(path / "answers" / f"{name}.jsonl") for name in ("read", "mine"))
    assert len(own) == len(items) > 3
    for name in ("id", "answer", "visual_tokens", "score"):
        assert [line[name] for line in own] == [line[name] for line in files]


@pytest.mark.slow
def test_two_processes_answer_as_one(run: Path, data: Path, tmp_path: Path) -> None:
    """With and without pictures, one of which is missing; half was answered before."""
    other = tmp_path / "tasks"
    subprocess.run(["cp", "-r", str(data), str(other)], check=True)
    items = lines(other / "gqa.jsonl")
    items[3]["image"] = "none.png"
    write(other, "gqa", items)
    alone = tmp_path / "alone"
    subprocess.run(["cp", "-r", str(run), str(alone)], check=True)
    evaluate(load_run(alone), Asked(["gqa"], other, blind=True))
    (run / "answers").mkdir()
    half = (alone / "answers" / "gqa.jsonl").read_text().splitlines(keepends=True)[: ITEMS // 2]
    (run / "answers" / "gqa.jsonl").write_text("".join(half))
    code = (
        "import sys, jax; jax.config.update('jax_num_cpu_devices', 4); "
        "from vlmscale.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["evaluate", "--run", str(run), "--tasks", "gqa", "--data", str(other), "--blind"]
    words += ["--config.mesh.fsdp=8", "--config.evaluate.batch_size=8"]
    where = f"127.0.0.1:{free_port()}"
    commands = [[*words, "--distributed", f"{where},2,{index}"] for index in range(2)]
    with at_work(code, commands, tmp_path) as children:
        assert wait_for(lambda: all(child.poll() is not None for child, _ in children), 300)
        codes = [child.returncode for child, _ in children]
    assert codes == [0, 0], story(children)
    for name in ("gqa", "gqa@0"):
        assert said(run, name) == said(alone, name)
    assert lines(run / "failures.jsonl") == lines(alone / "failures.jsonl")
    given = ("score", "stderr", "n_failed", "blind_score", "heldout_loss")
    [row], [wanted] = lines(run / "result.jsonl"), lines(alone / "result.jsonl")
    assert {name: row[name] for name in given} == pytest.approx({name: wanted[name] for name in given})
    texts = [log.read_text() for _, log in children]
    assert ["wrote" in text for text in texts] == [True, False]
