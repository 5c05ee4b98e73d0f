"""From a trained run to answers and rows: complete, typed, and the same whatever the batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np
import pytest
from PIL import Image

from tests.evaluate.asked import answers, items_of
from tests.integration.tiny import lines, picture, read, train
from vlmscale.cli import main
from vlmscale.data import scenes
from vlmscale.data.dataset import open_dataset
from vlmscale.data.records import Turn
from vlmscale.evaluate.generation import make_generate, prompt_batch
from vlmscale.evaluate.loaded import LoadedRun, answer_one, load_run
from vlmscale.records import ResultRow
from vlmscale.train.step import build_model, model_inputs

# The row of the records that join training and analysis, as the documents list it.
ROW = (
    "run_id cell_id cohort_id sweep seed llm_name n_total n_nonembed vision_tower tower_flops compressor "
    "compressor_params compressor_flops query_pass_flops reducer tokens_per_layer kv_bytes visual_tokens "
    "text_tokens_mean gen_tokens_mean image_size data_mix data_samples stage_steps lr train_flops "
    "infer_flops latency_ms device dtype task task_group split prompt_id scorer metric score_raw score "
    "stderr n_items n_failed details chance blind_score heldout_loss wall_s vlmscale_version git_commit "
    "finished_at status"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough that answers differ from each other."""
    path = tmp_path_factory.mktemp("runner") / "run"
    assert train(path, "--config.train.learning_rate=0.01", count=60) == 0
    assert main(["evaluate", "--run", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


def test_rows_have_every_field_with_its_type(run: Path) -> None:
    rows = lines(run / "result.jsonl")
    hints = get_type_hints(ResultRow)
    assert list(hints) == ROW.split()
    for row in rows:
        assert list(row) == ROW.split()
        for name, value in row.items():
            kind = hints[name]
            wanted = {list[int]: (list,), dict[str, float]: (dict,)}.get(kind) or getattr(
                kind, "__args__", (kind,)
            )
            assert isinstance(value, wanted) or (float in wanted and isinstance(value, int)), (name, value)
            assert not isinstance(value, bool)
        assert 0 <= row["score"] <= 1
        assert 0 <= row["chance"] <= 1
        assert row["score_raw"] == pytest.approx(100 * row["score"])
        assert row["stderr"] == pytest.approx((row["score"] * (1 - row["score"]) / row["n_items"]) ** 0.5)
        assert row["n_failed"] == 0
        assert row["visual_tokens"] == 4
        assert row["n_nonembed"] < row["n_total"]
        assert min(row[name] for name in ("tower_flops", "train_flops", "infer_flops", "kv_bytes")) > 0
        assert row["split"] == "test"
        assert row["status"] == "done"
        assert row["heldout_loss"] > 0
        assert 1 <= row["gen_tokens_mean"] <= 8
    assert [row["task"] for row in rows] == sorted({row["task"] for row in rows})
    assert sum(row["n_items"] for row in rows) == 8 * 9
    assert read(run / "status.json")["state"] == "done"


def test_answers_are_filed_by_item_and_explain_the_score(run: Path) -> None:
    rows = {row["task"]: row for row in lines(run / "result.jsonl")}
    dataset = open_dataset(run / "data" / "records", "test")
    asked = {record.id: record for record in map(dataset.record, range(len(dataset)))}
    assert {path.stem for path in (run / "answers").iterdir()} == set(rows)
    seen: list[str] = []
    for task, row in rows.items():
        answered = lines(run / "answers" / f"{task}.jsonl")
        assert len(answered) == row["n_items"]
        hits = 0
        for line in answered:
            [turn] = asked[line["id"]].turns
            assert line["question"] == turn.question.removeprefix("<image>\n")
            assert line["truth"] == [turn.answer]
            assert asked[line["id"]].task == task
            assert line["score"] == (line["answer"].strip() == turn.answer)
            hits += line["score"]
        assert hits == pytest.approx(row["score"] * row["n_items"])
        seen += [line["id"] for line in answered]
    assert sorted(seen) == sorted(asked)


def test_answers_do_not_depend_on_the_batch_or_its_order(loaded: LoadedRun, tmp_path: Path) -> None:
    items = items_of(loaded.prepared.datasets["test"], "none")
    found = {}
    for size in (3, 72, 400):
        config = dataclasses.replace(loaded.cell.evaluate, batch_size=size)
        other = dataclasses.replace(loaded, cell=dataclasses.replace(loaded.cell, evaluate=config))
        told: list[tuple[int, int]] = []
        order = items if size == 3 else items[::-1]
        note = lambda *done, told=told: told.append(done)  # noqa: E731
        said = answers(other, order, "test", 4, tmp_path / str(size), note)
        found[size] = said if order is items else said[::-1]
        assert told[-1] == (72, 72)
    assert found[3] == found[72] == found[400]
    assert len({said.text for said in found[3]}) > 3, "a model that always says the same proves nothing"


def test_cached_decoding_is_the_same_as_no_cache(loaded: LoadedRun) -> None:
    """Greedy, one forward pass a token over the whole text, without any cache."""
    items = items_of(loaded.prepared.datasets["test"], "none")[:4]
    [dataset], [reader] = loaded.prepared.datasets["test"], loaded.prepared.pictures("test", [loaded.cell])
    assert reader is not None
    shown = [reader.read(dataset, item.record, dataset.images(item.record))[0]["selected"] for item in items]
    features = np.stack(shown)
    template, slots = loaded.prepared.template, loaded.cell.compressor.visual_tokens
    model = build_model(loaded.cell, loaded.prepared.tokenizer.get_vocab_size(), "loop")
    prompts = [template.prompt(item.text) for item in items]
    length = max(map(len, prompts)) + slots - 1
    batch: dict[str, Any] = prompt_batch(prompts, template, slots, length)
    batch["selected"] = features
    [end] = template.stop_ids
    made = np.asarray(make_generate(model, 6, template.stop_ids)(loaded.params, batch))

    @jax.jit
    def logits(batch: dict[str, Any], where: int) -> jax.Array:
        return model.apply({"params": loaded.params}, model_inputs(batch), where)[:, 0]

    for row, prompt in enumerate(prompts):
        said: list[int] = []
        while len(said) < 6 and end not in said:
            whole: dict[str, Any] = prompt_batch([[*prompt, *said]], template, slots, length + 6)
            size = len(prompt) + len(said) + slots - 1
            whole["positions"] = np.arange(length + 6)[None]
            whole["segment_ids"] = (np.arange(length + 6) < size)[None].astype(np.int32)
            whole["selected"] = features[[row]]
            said.append(int(np.argmax(logits(whole, np.array([[size - 1]], np.int32))[0])))
        assert made[row].tolist() == said + [end] * (6 - len(said))


def test_one_task_replaces_its_row_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {row["task"]: row for row in lines(run / "result.jsonl")}
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--tasks", "read,count", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in told["rows"]] == ["count", "read"]
    after = {row["task"]: row for row in lines(run / "result.jsonl")}
    assert list(after) == list(before)
    clocks = {"finished_at": None}
    assert {k: v | clocks for k, v in after.items()} == {k: v | clocks for k, v in before.items()}


def test_generate_prints_one_json_object_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(picture())
    answers = []
    for words in ([], ["--image", str(image)]):
        capsys.readouterr()
        assert main(["generate", "--run", str(run), "--prompt", "Number?", "--json", *words]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        told = json.loads(out)
        assert told["prompt"] == "Number?"
        assert isinstance(told["text"], str)
        assert all(isinstance(token, int) for token in told["token_ids"])
        answers.append(told["text"])
    assert main(["generate", "--run", str(run), "--prompt", "Number?", "--image", str(image)]) == 0
    assert capsys.readouterr().out == answers[1] + "\n"


def test_a_picture_gets_the_answer_that_evaluation_gave(run: Path, tmp_path: Path) -> None:
    """One question by the command line's path, from a file, is the item of the evaluation."""
    drawn, _ = scenes.build("test", 8, 0)
    image = tmp_path / "scene.png"
    Image.fromarray(scenes.draw(drawn[2])).save(image)
    [item] = [i for i in lines(run / "answers" / "read.jsonl") if i["id"].startswith("test/000002-")]
    assert answer_one(load_run(run), image, item["question"]).text == item["answer"]


def test_gold_history_puts_true_turns_before_a_question(loaded: LoadedRun) -> None:
    datasets = loaded.prepared.datasets["train"]
    alone, behind = (items_of(datasets, history)[:9] for history in ("none", "gold"))
    assert (
        [item.id for item in alone] == [item.id for item in behind] == [f"train/000000#{i}" for i in range(9)]
    )
    assert all(item.history == () for item in alone)
    assert behind[2].history == datasets[0].record(0).turns[:2]
    assert behind[2].history[0] == Turn(alone[0].text, alone[0].question.answers[0])
    # The picture is shown in the first turn; a later question by itself brings it along.
    assert behind[2].text == alone[2].text.removeprefix("<image>\n")
    assert [item.images for item in alone] == [item.images for item in behind] == [1] * 9


def test_a_run_that_is_not_trained_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_bytes((run / "spec.json").read_bytes())
    assert main(["evaluate", "--run", str(tmp_path)]) == 2
    assert "training is not finished" in capsys.readouterr().err
