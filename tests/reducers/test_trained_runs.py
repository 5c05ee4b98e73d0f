"""`vlmscale train` with reducers that train, and what is done with such runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tiny import lines, picture, read, train
from vlmscale.cli import main
from vlmscale.config import (
    Cell,
    CompressorConfig,
    LLMConfig,
    ReducerConfig,
    TrainConfig,
    cell_id,
    image_slots,
)
from vlmscale.cost import flops
from vlmscale.cost.image import Sample, sample_flops
from vlmscale.cost.reduced import two_pass_flops
from vlmscale.cost.training import step_flops
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES
from vlmscale.plan.compiled import Request
from vlmscale.validation import attention_backends, validate

LLM = "toy-40k"
WORDS = ("--config.compressor.visual_tokens=16", "--config.train.learning_rate=0.01", "--config.data.seed=3")
VOCO = ("--config.reducer.name=voco", "--config.reducer.options=tokens=2")
ATP = ("--config.reducer.name=atp", "--config.reducer.keep=0.6")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain run, and second stages behind it with each of the two."""
    folder = tmp_path_factory.mktemp("trained")
    words = (*WORDS, f"--config.llm.name={LLM}")
    assert train(folder / "plain", *words, count=10) == 0
    for name, chosen in (("voco", VOCO), ("atp", ATP)):
        begin = f"--config.train.init_from={folder / 'plain'}"
        assert train(folder / name, *words, *chosen, begin, count=20) == 0
    return {name: folder / name for name in ("plain", "voco", "atp")}


def rows_of(run: Path, capsys: Any, *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--json", *words]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return rows


def refused(words: list[str], capsys: Any) -> str:
    capsys.readouterr()
    assert main(words) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return str(line)


def test_a_run_with_compression_tokens_answers_through_them(runs: dict[str, Path], capsys: Any) -> None:
    run, size = runs["voco"], SIZES[LLM]
    losses = [line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    vocabulary = read(run / "data" / "manifest.json")["vocab_size"]
    for row in rows_of(run, capsys):
        assert row["reducer"] == "voco:tokens=2"
        assert row["visual_tokens"] == 16
        assert row["heldout_loss"] > 0
        text, new = row["text_tokens_mean"], row["gen_tokens_mean"]
        assert row["tokens_per_layer"] == pytest.approx(text + 18)
        held = row["kv_bytes"] / (2 * 4 * size.num_kv_heads * size.head_dim * size.num_layers)
        assert held == pytest.approx(text + 2 + new - 1, abs=0.01)
        before = row["tower_flops"] + row["compressor_flops"]
        least, most = (
            two_pass_flops(size, vocabulary, ahead + 18, ahead + 2, text - ahead, new) + before
            for ahead in (0, 4)
        )
        assert min(least, most) <= row["infer_flops"] <= max(least, most)
    shown = run.parent / "shown.png"
    shown.write_bytes(picture())
    assert main(["generate", "--run", str(run), "--image", str(shown), "--prompt", "What is this?"]) == 0


def test_a_run_with_learned_thresholds_says_what_it_kept(runs: dict[str, Path], capsys: Any) -> None:
    run = runs["atp"]
    said = []
    for row in rows_of(run, capsys):
        assert row["reducer"] == "atp:keep=0.6"
        text = row["text_tokens_mean"]
        assert text + 8 <= row["tokens_per_layer"] <= text + 16  # of two layers the first sees all
        assert row["heldout_loss"] > 0
    for path in (run / "answers").iterdir():
        said += lines(path)
    kept = [line["kept"] for line in said]
    assert all(len(counts) == 1 and 0 <= counts[0] <= 16 for counts in kept)


def test_a_reducer_that_trains_stays_with_its_run(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    plain, voco = (str(runs[name]) for name in ("plain", "voco"))
    for run, words in ((plain, VOCO), (voco, ("--config.reducer.options=tokens=4",)), (plain, ATP)):
        line = refused(["evaluate", "--run", run, *words], capsys)
        assert "a reducer that trains stays with its run" in line
    plain_words = ["--config.reducer.name=none", "--config.reducer.options="]
    line = refused(["evaluate", "--run", voco, *plain_words], capsys)
    assert "a reducer that trains stays with its run" in line
    assert "a reducer that trains stays with" in refused(
        ["schedule", "--run", voco, "--tolerance", "0.1"], capsys
    )
    guided = ["evaluate", "--run", plain, "--config.reducer.name=sgl", f"--config.reducer.guide={voco}"]
    assert "a guide is a plain model" in refused([*guided, "--config.reducer.layer=1"], capsys)
    exported = ["convert", "--run", voco, "--out", str(tmp_path / "hf")]
    assert "which no model of transformers has" in refused(exported, capsys)
    begin = f"--config.train.init_from={voco}"
    capsys.readouterr()
    assert train(tmp_path / "next", *WORDS, f"--config.llm.name={LLM}", begin) == 2
    assert "was trained with reducer.name=voco" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reducer, more, told",
    [
        (ReducerConfig("voco"), {"compressor": CompressorConfig("m3", 16)}, "not at many as"),
        (ReducerConfig("voco"), {"train": TrainConfig(attention="splash")}, "take xla or cudnn"),
        (ReducerConfig("atp"), {"train": TrainConfig(attention="cudnn")}, "take xla"),
        (ReducerConfig("atp"), {"train": TrainConfig(reducer_rate=0.0)}, "train.reducer_rate=0"),
        (ReducerConfig("atp", keep=0.25), {}, "reducer.keep=0.25: the mean share over 3 layers"),
        (ReducerConfig("voco", options="tokens=16"), {}, "fewer than compressor.visual_tokens=16"),
        (ReducerConfig("voco", options="tokens=3"), {}, "voco knows tokens=1 or 2 or 4"),
        (ReducerConfig("voco", keep=0.4), {}, "reducer.name=voco does not read it"),
        (ReducerConfig("atp"), {"train": TrainConfig(accumulate=2)}, "train.accumulate=2: reducer.name=atp"),
        (ReducerConfig(), {"train": TrainConfig(reducer_rate=0.5)}, "reducer.name=none does not train"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(reducer: ReducerConfig, more: Any, told: str) -> None:
    parts = {"compressor": CompressorConfig("pool", 16), "llm": LLMConfig("toy-375k"), "reducer": reducer}
    with pytest.raises(UserError) as caught:
        validate(Cell(**parts | more))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_training_costs_and_can_run_on() -> None:
    plain = Cell(compressor=CompressorConfig("pool", 16), llm=LLMConfig("toy-375k"))
    voco = Cell(**vars(plain) | {"reducer": ReducerConfig("voco", options="tokens=4")})
    atp = Cell(**vars(plain) | {"reducer": ReducerConfig("atp")})
    assert [image_slots(cell) for cell in (plain, voco, atp)] == [16, 20, 16]
    assert image_slots(voco, 0) == 0
    assert attention_backends(voco) == ["xla", "cudnn"]
    assert attention_backends(atp) == ["xla"]
    size, sample = SIZES["toy-375k"], Sample(10, 3, 2, 1.0)
    longer = sum(sign * flops.decoder_step_flops(size, 10 + slots) for sign, slots in ((1, 20), (-1, 16)))
    assert sample_flops(voco, 99, sample) - sample_flops(plain, 99, sample) == pytest.approx(longer)
    scores = 2 * flops.score_flops(size, 26, 0, False)  # two modules in three layers
    default = Cell(**vars(plain) | {"reducer": ReducerConfig("voco", options="tokens=1")})
    assert cell_id(default) == cell_id(Cell(**vars(plain) | {"reducer": ReducerConfig("voco")}))
    keys = {Request("train", cell, "v5e-4", (1, 4, 1), 128).key() for cell in (plain, voco, atp)}
    assert len(keys) == 3, "each is compiled"
    assert sample_flops(atp, 99, sample) - sample_flops(plain, 99, sample) == pytest.approx(3 * scores)
    assert step_flops(atp, 99, sample) - step_flops(plain, 99, sample) == pytest.approx(4 * scores)
