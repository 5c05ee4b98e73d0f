"""`vlmscale evaluate` and `vlmscale schedule` on trained runs, with reducers that training did not know."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tiny import lines, read, train
from vlmscale.cli import main
from vlmscale.config import (
    Cell,
    CompressorConfig,
    LLMConfig,
    ReducerConfig,
    cell_id,
    from_dict,
    to_dict,
)
from vlmscale.cost import flops
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES
from vlmscale.validation import validate

MORE = ("--config.compressor.visual_tokens=16", "--config.train.learning_rate=0.01")
FASTV = ("--config.reducer.name=fastv", "--config.reducer.layer=1", "--config.reducer.keep=0.25")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A large and a small run of the same data."""
    folder = tmp_path_factory.mktemp("reduced")
    for name, llm in (("large", "toy-40k"), ("small", "toy-14k")):
        words = (*MORE, f"--config.llm.name={llm}", "--config.data.seed=3")
        assert train(folder / name, *words, count=40) == 0
        assert main(["evaluate", "--run", str(folder / name)]) == 0
    return folder / "large", folder / "small"


def evaluated(run: Path, capsys: Any, *words: str) -> list[dict[str, Any]]:
    """The rows that an evaluation wrote."""
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--json", *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    written = lines(run / "result.jsonl")
    assert all(row in written for row in rows)
    return rows


def test_a_reducer_has_rows_and_answers_of_its_own(runs: tuple[Path, Path], capsys: Any) -> None:
    run, _ = runs
    before = lines(run / "result.jsonl")
    answers = {path.name: path.read_text() for path in (run / "answers").iterdir()}
    rows = evaluated(run, capsys, *FASTV)
    plain = [row for row in before if row["reducer"] is None]
    assert not [row for row in rows if row in before]
    assert [row for row in lines(run / "result.jsonl") if row["reducer"] is None] == plain
    assert [row["task"] for row in rows] == [row["task"] for row in plain]
    for row, whole in zip(rows, plain, strict=True):
        assert row["reducer"] == "fastv:layer=1:keep=0.25"
        layers = 2  # of toy-40k
        assert row["tokens_per_layer"] == pytest.approx(
            whole["tokens_per_layer"] - 12 * (layers - 1) / layers
        )
        assert row["infer_flops"] < whole["infer_flops"]
        assert row["kv_bytes"] < whole["kv_bytes"]
        assert row["visual_tokens"] == whole["visual_tokens"] == 16
        assert row["heldout_loss"] is None
        assert (row["cell_id"], row["n_items"]) == (whole["cell_id"], whole["n_items"])
    for name, text in answers.items():
        assert (run / "answers" / name).read_text() == text, "the plain answers stay"
    other = evaluated(run, capsys, *FASTV[:2], "--config.reducer.keep=0.5")
    assert other[0]["reducer"] == "fastv:layer=1:keep=0.5"
    assert len(lines(run / "result.jsonl")) == len(plain) + len(rows) + len(other)
    again = evaluated(run, capsys, *FASTV)  # nothing is asked again
    assert [row["score"] for row in again] == [row["score"] for row in rows]


def test_keeping_all_says_what_the_plain_model_says(runs: tuple[Path, Path], capsys: Any) -> None:
    run, _ = runs
    rows = evaluated(run, capsys, *FASTV[:2], "--config.reducer.keep=1.0")
    plain = [row for row in lines(run / "result.jsonl") if row["reducer"] is None]
    assert [row["score"] for row in rows] == [row["score"] for row in plain]
    assert [row["tokens_per_layer"] for row in rows] == [row["tokens_per_layer"] for row in plain]


def test_a_guide_costs_what_it_takes_and_may_answer_itself(runs: tuple[Path, Path], capsys: Any) -> None:
    run, small = runs
    guided = ("--config.reducer.name=sgl", f"--config.reducer.guide={small}", "--config.reducer.layer=1")
    always = evaluated(run, capsys, *guided)
    never = evaluated(run, capsys, *guided, "--config.reducer.exit_above=0.001")
    plain = {row["task"]: row for row in lines(run / "result.jsonl") if row["reducer"] is None}
    small_rows = {row["task"]: row for row in lines(small / "result.jsonl")}
    for row, early in zip(always, never, strict=True):
        task = row["task"]
        assert row["reducer"].startswith("sgl:layer=1:keep=0.5:guide=")
        assert early["reducer"] == row["reducer"] + ":exit_above=0.001"
        assert row["infer_flops"] > plain[task]["infer_flops"] / 2 + small_rows[task]["infer_flops"] / 2
        assert answers_of(run, early) == answers_of(small, {**early, "reducer": None})
        assert early["kv_bytes"] == small_rows[task]["kv_bytes"]
    said = [
        json.loads(line) for path in (run / "answers").glob("*sgl*") for line in path.read_text().splitlines()
    ]
    assert {line["exited"] for line in said} == {True, False}
    assert all(line["guide_tokens"] > 0 for line in said)


@pytest.mark.parametrize(
    "more, told",
    [
        (["--config.compressor.name=resampler"], "trained with another compressor.name"),
        (["--config.data.seed=4"], "trained with another data.seed"),
    ],
)
def test_a_guide_that_sees_other_tokens_is_refused(
    more: list[str], told: str, runs: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    run, _ = runs
    other = tmp_path / "other"
    assert train(other, *MORE, "--config.data.seed=3", *more, count=20) == 0
    words = ["--config.reducer.name=sgl", f"--config.reducer.guide={other}", FASTV[1]]
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), *words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"reducer.guide={other}: {told}" in line


def test_a_guide_that_reads_the_question_embeds_it_itself(tmp_path: Path, capsys: Any) -> None:
    quecc = (*MORE, "--config.compressor.name=quecc", "--config.compressor.visual_tokens=4")
    for name, llm in (("large", "toy-40k"), ("small", "toy-14k")):
        assert train(tmp_path / name, *quecc, f"--config.llm.name={llm}", count=20) == 0
    guided = ("--config.reducer.name=sgl", f"--config.reducer.guide={tmp_path / 'small'}", FASTV[1])
    early = evaluated(tmp_path / "large", capsys, *guided, "--config.reducer.exit_above=0.001")
    small = evaluated(tmp_path / "small", capsys)
    for row in early:
        assert answers_of(tmp_path / "large", row) == answers_of(tmp_path / "small", {**row, "reducer": None})
    assert len(small) == len(early)
    assert evaluated(tmp_path / "large", capsys, *guided)[0]["query_pass_flops"] > 0


def test_another_training_of_the_guide_is_another_guide(runs: tuple[Path, Path], capsys: Any) -> None:
    run, small = runs
    guided = ("--config.reducer.name=sgl", f"--config.reducer.guide={small}", "--config.reducer.layer=1")
    evaluated(run, capsys, *guided)
    done = read(small / "done.json")
    keys = {line["key"] for path in (run / "answers").glob("*sgl*") for line in lines(path)}
    (small / "done.json").write_text(json.dumps(done | {"params_sha256": "0" * 64}))
    try:
        evaluated(run, capsys, *guided)
    finally:
        (small / "done.json").write_text(json.dumps(done))
    others = {line["key"] for path in (run / "answers").glob("*sgl*") for line in lines(path)}
    assert len(others - keys) == len(others) - len(others & keys) > 0


def test_training_takes_no_reducer(tmp_path: Path, capsys: Any) -> None:
    assert train(tmp_path / "run", *FASTV) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "reducer.name=fastv: is asked of a trained run; vlmscale evaluate --run RUN" in line


def test_what_two_models_cost(runs: tuple[Path, Path], capsys: Any) -> None:
    """By hand: the guide for all, the large model for those whose answer is not the guide's."""
    run, small = runs
    guided = ("--config.reducer.name=sgl", f"--config.reducer.guide={small}", "--config.reducer.layer=1")
    low, high, rows = 1e-4, 1.0, []
    for _ in range(14):  # until some, and not all, answers are the guide's
        certain = (low * high) ** 0.5
        words = (*guided, "--config.reducer.keep=0.3", f"--config.reducer.exit_above={certain}")
        rows = evaluated(run, capsys, *words)
        exited = [line["exited"] for row in rows for line in lines(answers_file(run, row))]
        if 0 < sum(exited) < len(exited):
            break
        low, high = (certain, high) if all(exited) else (low, certain)
    own, front, layer, shares = SIZES["toy-40k"], SIZES["toy-14k"], flops.layer_flops, []
    vocab = (rows[0]["n_total"] - rows[0]["n_nonembed"]) // own.width

    def mean(key: str, answers: list[dict[str, Any]]) -> float:
        return sum(line[key] for line in answers) / len(answers) if answers else 0.0

    for row in rows:
        said = lines(answers_file(run, row))
        stay = [line for line in said if not line["exited"]]
        shares.append(len(stay) / len(said))
        steps, rest = mean("guide_tokens", said), max(mean("tokens", stay) - 1, 0)
        text, fed = row["text_tokens_mean"], steps - 1
        prompt, few, most = text + 16, text + 1, text + 4  # 5% and 30% of 16, fractions cut off
        guide = 2 * (layer(front, prompt, 0) + layer(front, fed, prompt))
        guide += 2 * (flops.score_flops(front, text, 16, True) + flops.score_flops(front, fed, prompt, True))
        guide += 2 * (layer(front, few, 0) + layer(front, steps, few))
        guide += flops.head_flops(front, vocab, steps) + flops.head_flops(front, vocab, steps + 1)
        large = sum(layer(own, there, 0) + layer(own, rest, there) for there in (prompt, most))
        large += flops.head_flops(own, vocab, mean("tokens", stay))
        image = row["tower_flops"] + shares[-1] * row["compressor_flops"] + compressor_flops(small)
        assert row["infer_flops"] == pytest.approx(image + guide + shares[-1] * large, rel=1e-6)
    assert any(0 < share < 1 for share in shares)


def answers_file(run: Path, row: dict[str, Any]) -> Path:
    """Where the answers lie that a row is made of."""
    told = f"~sgl-{hashlib.sha256(row['reducer'].encode()).hexdigest()[:8]}" if row["reducer"] else ""
    return run / "answers" / f"{row['task']}{told}.jsonl"


def answers_of(run: Path, row: dict[str, Any]) -> dict[str, str]:
    return {line["id"]: line["answer"] for line in lines(answers_file(run, row))}


def compressor_flops(run: Path) -> int:
    return int(lines(run / "result.jsonl")[0]["compressor_flops"])


@pytest.mark.parametrize("aim", [("--tolerance", "0.05"), ("--budget", "0.8")])
def test_a_schedule_is_found_and_can_be_evaluated(
    aim: tuple[str, str], runs: tuple[Path, Path], capsys: Any
) -> None:
    run, _ = runs
    capsys.readouterr()
    assert main(["schedule", "--run", str(run), *aim, "--items", "30", "--trials", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["visual_tokens"][0] == 16
    assert found["visual_tokens"] == sorted(found["visual_tokens"], reverse=True)
    assert 0 < found["prefill_flops_share"] <= float(aim[1] if aim[0] == "--budget" else 1)
    assert found["items"] <= 30
    if aim[0] == "--tolerance":
        assert found["score"] >= found["plain_score"] - 0.05
    shares = str(tuple(found["schedule"]))
    rows = evaluated(run, capsys, "--config.reducer.name=g_search", f"--config.reducer.schedule={shares}")
    text = rows[0]["text_tokens_mean"]
    assert rows[0]["tokens_per_layer"] == pytest.approx(
        text + sum(found["visual_tokens"]) / len(found["visual_tokens"])
    )


def test_a_reducer_is_part_of_the_cell_and_ids_of_old_cells_stay() -> None:
    cell = Cell(compressor=CompressorConfig("pool", 16))
    reduced = Cell(compressor=CompressorConfig("pool", 16), reducer=ReducerConfig("fastv"))
    assert cell_id(cell) != cell_id(reduced)
    assert from_dict(json.loads(json.dumps(to_dict(reduced)))) == reduced
    old = to_dict(cell)
    del old["reducer"]
    assert cell_id(from_dict(old)) == cell_id(cell)


@pytest.mark.parametrize(
    "reducer, told",
    [
        (ReducerConfig("fastw"), "reducer.name=fastw: unknown here (known: fastv, g_search, "),
        (ReducerConfig("fastv", layer=0), "reducer.layer=0: 1 to 2 in an LLM of 3 layers"),
        (ReducerConfig("fastv", layer=3), "reducer.layer=3: 1 to 2"),
        (ReducerConfig("fastv", keep=0.0), "reducer.keep=0: a share above 0 and at most 1"),
        (ReducerConfig("fastv", options="score=best"), "score=best: fastv knows score=last or received"),
        (
            ReducerConfig("fastv", schedule=(1.0,)),
            "reducer.schedule=(1.0,): reducer.name=fastv does not",
        ),
        (
            ReducerConfig(keep=0.3),
            "reducer.keep=0.3: reducer.name=none does not read it",
        ),
        (ReducerConfig(options="score=last"), "reducer.options=score=last: goes with reducer.name"),
        (ReducerConfig("g_search"), "reducer.schedule has 0 shares"),
        (ReducerConfig("g_search", schedule=(1, 1, 1, 1)), "has 4 shares: one a layer, 1 to 3"),
        (ReducerConfig("g_search", schedule=(0.5,)), "starts with 0.5: layer 0 sees all"),
        (ReducerConfig("g_search", schedule=(1, 0.5, 0.6)), "shares must not grow"),
        (ReducerConfig("sgl"), "reducer.name=sgl: needs --config.reducer.guide=RUN"),
        (ReducerConfig("sgl", guide="x", exit_above=0.0), "reducer.exit_above=0.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(reducer: ReducerConfig, told: str) -> None:
    cell = Cell(compressor=CompressorConfig("pool", 16), llm=LLMConfig("toy-375k"), reducer=reducer)
    with pytest.raises(UserError) as caught:
        validate(cell)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_blind_model_has_nothing_to_drop() -> None:
    with pytest.raises(UserError, match="blind model"):
        validate(Cell(compressor=CompressorConfig("pool", 0), reducer=ReducerConfig("fastv")))
