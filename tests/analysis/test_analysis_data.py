"""Rows become tables: groups, tasks, seeds, set-ups, pooled sources, the held-out loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.data import BUILT_IN, DataError, Table, load
from analysis.evidence import monotonicity

Rows = list[dict[str, Any]]
HEAD = "llm_params_b,visual_tokens,score"


def save(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table_of(tables: tuple[Table, ...], group: str) -> Table:
    (found,) = [table for table in tables if table.group == group]
    return found


def test_paper_data_is_whole() -> None:
    for name in ("paper-reasoning", "paper-ocr"):
        table = load(name).tables[0]
        assert table.n.size == 28
        assert table.sizes.tolist() == [5e8, 1.8e9, 4e9, 7e9]
        assert table.token_counts.tolist() == [1, 4, 16, 36, 64, 144, 576]
        assert (table.target, table.by_task, table.dropped) == ("error", (), ())
        assert np.isnan([table.n_nonembed, table.gen_tokens, table.tower_flops, table.latency_ms]).all()


def test_paper_table_1_is_a_table_a_method() -> None:
    dataset = load("paper-table1")
    tables = {table.group: table for table in dataset.tables}
    assert list(tables) == ["TokenPacker", "M3", "MQT", "QueCC"]
    # Two methods are spelled out in one line and abbreviated in another.
    assert {name: table.v.tolist() for name, table in tables.items()} == {
        "TokenPacker": [1, 4, 16, 36],
        "M3": [1, 36],
        "MQT": [2, 4, 16, 36],
        "QueCC": [1, 4, 16, 36],
    }
    assert tables["M3"].tasks == ("gqa", "mmb", "pope", "vizwiz")
    assert "textvqa" not in tables["MQT"].tasks
    assert len(tables["QueCC"].tasks) == 8
    assert all(set(table.n) == {7e9} for table in tables.values())
    by_task = {table.group: table for table in tables["QueCC"].by_task}
    np.testing.assert_allclose(by_task["gqa"].error, [0.465, 0.435, 0.41, 0.395])
    assert by_task["mme"].error[0] == pytest.approx(1 - 1269.1 / 2000)
    mean = np.mean([table.error for table in tables["QueCC"].by_task], axis=0)
    np.testing.assert_allclose(tables["QueCC"].error, mean)
    for method in ("LLaVA-1.5", "PruMerge"):
        assert f"table1.csv: {method} is left out: one token count only" in dataset.warnings


def test_every_built_in_loads() -> None:
    for name in BUILT_IN:
        assert load(name).source == name


def test_paper_monotonicity() -> None:
    reasoning = monotonicity(load("paper-reasoning").tables[0])
    assert (reasoning["n"].falling, reasoning["n"].pairs) == (21, 21)
    assert (reasoning["v"].falling, reasoning["v"].pairs) == (24, 24)
    ocr = monotonicity(load("paper-ocr").tables[0])
    assert (ocr["n"].falling, ocr["n"].pairs) == (19, 21)
    assert (ocr["v"].falling, ocr["v"].pairs) == (24, 24)


def test_groups_are_plain_means_of_their_tasks(rows: Rows, write: Callable[[Rows], Path]) -> None:
    tables = {table.group: table for table in load(write(rows)).tables}
    assert set(tables) == {"reasoning", "ocr"}
    table = tables["reasoning"]
    scores = [row["score"] for row in rows if row["llm_name"] == "mini" and row["visual_tokens"] == 16]
    index = table.llm_name.index("mini") + 2
    assert table.v[index] == 16
    assert table.error[index] == pytest.approx(1 - (scores[0] + scores[1]) / 2)
    assert table.n_items[index] == 800


def test_blind_rows_are_kept_apart(rows: Rows, write: Callable[[Rows], Path]) -> None:
    for table in load(write(rows)).tables:
        assert table.v.min() == 1
        assert np.isfinite(np.log(table.v)).all()
        assert set(table.blind) == {"nano", "micro", "mini", "small"}


def test_blind_score_serves_where_no_blind_row_does(rows: Rows, write: Callable[[Rows], Path]) -> None:
    seen = [{**row, "blind_score": 0.25} for row in rows if row["visual_tokens"]]
    assert load(write(seen)).tables[0].blind == dict.fromkeys(("nano", "micro", "mini", "small"), 0.75)


def test_seeds_are_averaged(rows: Rows, write: Callable[[Rows], Path]) -> None:
    second = [{**row, "seed": 1, "score": min(1.0, row["score"] + 0.02)} for row in rows]
    one, two = load(write(rows)).tables[0], load(write(rows + second)).tables[0]
    np.testing.assert_allclose(two.error, one.error - 0.01, atol=1e-12)
    assert two.seeds.tolist() == [2] * two.n.size


def test_incomplete_cells_and_unfinished_rows_are_left_out(rows: Rows, write: Callable[[Rows], Path]) -> None:
    last = {**rows[-1], "task": "x"}
    kept = [
        row for row in rows if (row["task"], row["llm_name"], row["visual_tokens"]) != ("count", "small", 64)
    ]
    dataset = load(write([*kept, {**last, "status": "failed"}]))
    table = dataset.tables[0]
    assert dataset.unfinished == 1
    assert table.n.size == 19
    assert table.dropped == ("small, V = 64: no seed has all tasks (missing count)",)


def test_two_compressors_are_two_tables(rows: Rows, write: Callable[[Rows], Path]) -> None:
    other = [{**row, "compressor": "tokenpacker"} for row in rows if row["visual_tokens"]]
    groups = [table.group for table in load(write(rows + other)).tables]
    assert groups == ["reasoning (quecc)", "reasoning (tokenpacker)", "ocr (quecc)", "ocr (tokenpacker)"]
    assert all(table.n.size == 20 and len(table.blind) == 4 for table in load(write(rows + other)).tables)


def test_blind_rows_go_with_their_own_set_up(rows: Rows, write: Callable[[Rows], Path]) -> None:
    mine = [{**row, "lr": 1e-3} for row in rows]
    other = [{**row, "lr": 3e-3, "score": row["score"] / 2} for row in rows]
    first, second = load(write(mine + other)).tables[:2]
    assert (first.group, second.group) == ("reasoning (0.001)", "reasoning (0.003)")
    for name, error in first.blind.items():
        assert 1 - second.blind[name] == pytest.approx((1 - error) / 2)


def test_a_list_or_nan_in_a_set_up_is_a_value(rows: Rows, write: Callable[[Rows], Path]) -> None:
    odd = [{**row, "reducer": ["a", 1], "lr": float("nan")} for row in rows]
    assert [table.group for table in load(write(odd)).tables] == ["reasoning", "ocr"]


def test_a_table_a_task(rows: Rows, write: Callable[[Rows], Path]) -> None:
    reasoning, ocr = load(write(rows)).tables
    assert ocr.by_task == ()
    assert [table.group for table in reasoning.by_task] == ["count", "relate"]
    for table in reasoning.by_task:
        assert table.tasks == (table.group,)
        assert (table.by_task, table.n.size, len(table.blind)) == ((), 20, 4)
        assert set(table.n_items) == {400}
    np.testing.assert_allclose(np.mean([t.error for t in reasoning.by_task], axis=0), reasoning.error)


def test_a_task_keeps_a_cell_that_the_group_lacks(rows: Rows, write: Callable[[Rows], Path]) -> None:
    kept = [
        row for row in rows if (row["task"], row["llm_name"], row["visual_tokens"]) != ("count", "small", 64)
    ]
    reasoning = load(write(kept)).tables[0]
    assert [reasoning.n.size, *(table.n.size for table in reasoning.by_task)] == [19, 19, 20]


def test_without_a_cell(rows: Rows, write: Callable[[Rows], Path]) -> None:
    table = load(write(rows)).tables[0]
    smaller = table.without(3)
    assert smaller.llm_name == table.llm_name[:3] + table.llm_name[4:]
    for field in ("n", "v", "error", "latency_ms", "seeds"):
        np.testing.assert_array_equal(getattr(smaller, field), np.delete(getattr(table, field), 3))
    assert (smaller.group, smaller.blind, smaller.target) == (table.group, table.blind, "error")
    for before, after in zip(table.by_task, smaller.by_task, strict=True):
        np.testing.assert_array_equal(after.error, np.delete(before.error, 3))
    assert table.n.size == 20


def test_costs_are_means_over_the_cell(rows: Rows, write: Callable[[Rows], Path]) -> None:
    figures = {
        "n_nonembed": 3_000,
        "gen_tokens_mean": 2.0,
        "tower_flops": 1e6,
        "compressor_flops": 2e5,
        "query_pass_flops": 10,
        "latency_ms": 4.0,
    }
    full = [{**row, **figures} for row in rows]
    for row in full:
        if row["task"] == "relate":
            row["gen_tokens_mean"] = 4.0
    del full[-1]["latency_ms"]  # the row of task 'read' of the last cell
    reasoning, ocr = load(write(full)).tables
    assert set(reasoning.n_nonembed) == {3_000}
    assert set(reasoning.gen_tokens) == {3.0}
    assert set(reasoning.tower_flops) == {1e6}
    assert set(reasoning.compressor_flops) == {2e5}
    assert set(reasoning.query_flops) == {10}
    assert set(reasoning.latency_ms) == {4.0}
    assert np.isnan(ocr.latency_ms).tolist() == [False] * 19 + [True]


def test_a_seed_without_all_tasks_is_left_out(rows: Rows, write: Callable[[Rows], Path]) -> None:
    again = [{**row, "seed": 1} for row in rows]
    gone = next(
        row for row in again if (row["task"], row["llm_name"], row["visual_tokens"]) == ("count", "nano", 4)
    )
    again.remove(gone)
    table = load(write(rows + again)).tables[0]
    assert table.n.size == 20
    assert sorted(table.seeds.tolist()) == [1] + [2] * 19
    assert table.dropped == ("nano, V = 4: seed 1 left out (missing count)",)


def with_loss(rows: Rows) -> Rows:
    return [{**row, "heldout_loss": 1 + 1 / (1 + row["visual_tokens"])} for row in rows]


def test_held_out_loss_is_a_last_table(rows: Rows, write: Callable[[Rows], Path]) -> None:
    second = [{**row, "seed": 1, "heldout_loss": row["heldout_loss"] + 0.5} for row in with_loss(rows)]
    # Another way of asking is another table of scores, but the same trained cells.
    asked = [{**row, "prompt_id": "other"} for row in with_loss(rows) if row["visual_tokens"]]
    tables = load(write(with_loss(rows) + second + asked)).tables
    assert [table.target for table in tables] == ["error"] * 4 + ["loss"]
    table = tables[-1]
    assert (table.group, table.by_task, table.blind, table.n.size) == ("held-out loss", (), {}, 20)
    np.testing.assert_allclose(table.error, 1 + 1 / (1 + table.v) + 0.25)
    assert table.seeds.tolist() == [2] * 20
    assert set(table.text_tokens) == {12.0}
    assert np.isnan([table.chance, table.sampling_sd, table.n_items]).all()


def test_held_out_loss_by_set_up_and_from_two_cells_on(rows: Rows, write: Callable[[Rows], Path]) -> None:
    other = [{**row, "compressor": "pool"} for row in with_loss(rows) if row["visual_tokens"]]
    groups = [table.group for table in load(write(with_loss(rows) + other)).tables]
    assert groups[-2:] == ["held-out loss (quecc)", "held-out loss (pool)"]
    one = [
        row
        for row in with_loss(rows)
        if (row["llm_name"], row["visual_tokens"]) in (("nano", 0), ("nano", 1))
    ]
    rest = [row for row in rows if row not in one]
    assert {table.target for table in load(write(one + rest)).tables} == {"error"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "must be positive"),
        (float("inf"), "must be finite"),
        (5.0, "for the same cell and seed at results.jsonl:"),
    ],
)
def test_a_bad_held_out_loss_is_named(
    value: float, message: str, rows: Rows, write: Callable[[Rows], Path]
) -> None:
    full = with_loss(rows)
    full[4]["heldout_loss"] = value
    with pytest.raises(DataError, match=r"^results.jsonl:\d+: heldout_loss ") as caught:
        load(write(full))
    assert message in str(caught.value)


def make_cells(sweep: Path, rows: Rows) -> None:
    for cell in {row["cell_id"] for row in rows}:
        save(sweep / "cells" / cell / "result.jsonl", [row for row in rows if row["cell_id"] == cell])


def test_cells_of_a_sweep_without_collected_rows(rows: Rows, tmp_path: Path) -> None:
    make_cells(tmp_path / "s", rows)
    dataset = load(tmp_path / "s")
    collected = load(save(tmp_path / "t" / "results.jsonl", rows).parent)
    assert (dataset.source, dataset.rows) == ("s/cells", len(rows))
    for mine, theirs in zip(dataset.tables, collected.tables, strict=True):
        np.testing.assert_array_equal(mine.error, theirs.error)
    save(tmp_path / "s" / "cells" / "nano-4" / "result.jsonl", [{**rows[0], "score": 3}])
    with pytest.raises(
        DataError, match=r"^s/cells/nano-4/result.jsonl:1: score must be between 0 and 1, got 3$"
    ):
        load(tmp_path / "s")
    save(tmp_path / "s" / "results.jsonl", rows)  # once collected, the rows of the sweep count
    assert load(tmp_path / "s").source == "results.jsonl"


def test_a_run_directory_and_its_metrics(rows: Rows, tmp_path: Path) -> None:
    places = []
    for v in (1, 4):
        own = [row for row in rows if (row["llm_name"], row["visual_tokens"]) == ("nano", v)]
        places.append(save(tmp_path / f"run{v}" / "result.jsonl", own).parent)
        lines = [
            {"step": 1, "heldout_loss": 9.0},
            {"step": 2, "heldout_loss": 2.0 + v},
            {"step": 3, "loss": 1.0},
        ]
        save(places[-1] / "metrics.jsonl", lines)
        with (places[-1] / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "heldout_loss": 1.')  # cut by a kill
    dataset = load(*places)
    assert table_of(dataset.tables, "held-out loss").error.tolist() == [3.0, 6.0]
    # What was asked with a reducer later has other losses than training logged.
    reduced = [{**row, "reducer": "fastv"} for row in rows if row["llm_name"] == "nano"]
    save(tmp_path / "r" / "result.jsonl", reduced)
    save(tmp_path / "r" / "metrics.jsonl", [{"heldout_loss": 5.0}])
    assert {table.target for table in load(tmp_path / "r").tables} == {"error"}
    # Names that do not tell the sources apart become paths; what metrics gave is in the hash.
    assert dataset.source == ", ".join(str(place / "result.jsonl") for place in places)
    (places[0] / "metrics.jsonl").write_text('{"heldout_loss": 7.0}\n')
    assert load(*places).sha256 != dataset.sha256
    (places[0] / "metrics.jsonl").write_text('{}\n{"heldout_loss": NaN}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: heldout_loss must be finite"):
        load(*places)
    (places[0] / "metrics.jsonl").unlink()
    assert {table.target for table in load(*places).tables} == {"error"}


def test_sources_are_pooled(rows: Rows, tmp_path: Path) -> None:
    one, two = save(tmp_path / "a.jsonl", rows[:36]), save(tmp_path / "b.jsonl", rows[36:])
    pooled, whole = load(one, two), load(save(tmp_path / "c.jsonl", rows))
    assert (pooled.source, pooled.rows) == ("a.jsonl, b.jsonl", 72)
    for mine, theirs in zip(pooled.tables, whole.tables, strict=True):
        assert mine.source == pooled.source
        np.testing.assert_array_equal(mine.error, theirs.error)
    assert pooled.sha256 == load(two, one).sha256
    hashes = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two))
    assert pooled.sha256 == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert whole.sha256 == hashlib.sha256((tmp_path / "c.jsonl").read_bytes()).hexdigest()
    assert (pooled.versions, pooled.commits, pooled.devices) == (("0.1.0",), ("abc1234",), ("cpu",))
    save(two, [{**rows[0], "score": 0.999}])
    with pytest.raises(
        DataError, match=r"^b.jsonl:1: the same cell, seed and task as a.jsonl:1, but score 0.999"
    ):
        load(one, two)
    save(two, [{**rows[40], "llm_name": "nano"}])
    with pytest.raises(
        DataError, match=r"^b.jsonl:1: nano has n = 104000, but 4200 at a.jsonl:1; .*N convention"
    ):
        load(one, two)


def test_a_csv_and_a_sweep_are_pooled(rows: Rows, write: Callable[[Rows], Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEAD},task,task_group\n0.5,1,0.4,read,ocr\n")
    ocr = table_of(load(write(rows), path).tables, "ocr")
    assert (ocr.n.size, ocr.llm_name[-1]) == (21, "500M")


def test_csv_with_every_column(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(
        b"\xef\xbb\xbf LLM_Params_B , visual_tokens,Score,task,task_group,seed,n_items,chance,blind_score,"
        b"text_tokens,gen_tokens,latency_ms,llm_name,compressor,n_nonembed_b,tower_flops,infer_flops,colour,\r\n"
        b"7, 16 ,0.7,a,g,1,100,0.25,0.3,20,3,5.5,my-llm,pool,6.5,1e9,1e12,red,\r\n"
        b"\r\n,,,,,,,,,,,,,,,,,,\r\n"
        b"7,16,0.9,a,g,2,100,0.25,0.3,20,3,5.5,my-llm,pool,6.5,1e9,1e12,red,\r\n"
    )
    dataset = load(path)
    (table,) = dataset.tables
    assert (table.group, table.tasks, table.llm_name) == ("g", ("a",), ("my-llm",))
    assert (table.n[0], table.v[0], table.seeds[0], table.n_items[0]) == (7e9, 16, 2, 200)
    assert (table.chance[0], table.text_tokens[0], table.gen_tokens[0], table.latency_ms[0]) == (
        0.25,
        20,
        3,
        5.5,
    )
    assert (table.n_nonembed[0], table.tower_flops[0], table.infer_flops[0]) == (6.5e9, 1e9, 1e12)
    assert table.error[0] == pytest.approx(0.2)
    assert table.blind == {"my-llm": 0.7}
    assert "mine.csv: column 'colour' is not known and not read" in dataset.warnings


def test_csv_sizes_that_round_alike_have_their_own_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEAD}\n1.8,1,0.4\n1.801,1,0.5\n")
    assert load(path).tables[0].llm_name == ("1.8B", "1.801B")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "llm_params_b,visual_tokens,score,task\n0.5,1,0.4,a\n0.5,1,0.6,b\n7,16,0.7,a\n7,16,0.9,b\n"
    )
    (table,) = load(path).tables
    assert table.group == "mine"
    assert table.llm_name == ("500M", "7B")
    np.testing.assert_allclose(table.error, [0.5, 0.2])
    assert table.mean_text_tokens() == (50.0, False)


def test_many_rows(tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    cells = [(n, v) for n in (0.5, 1.8, 4, 7, 14) for v in (1, 4, 16, 36, 144)]
    lines = [
        f"{n},{v},{0.3 + 0.001 * task + 0.0001 * seed:.4f},t{task},{seed}"
        for n, v in cells
        for task in range(4)
        for seed in range(200)
    ]
    path.write_text(f"{HEAD},task,seed\n" + "\n".join(lines))
    dataset = load(path)
    (table,) = dataset.tables
    assert dataset.rows == 20_000
    assert table.seeds.tolist() == [200] * 25
    np.testing.assert_allclose(table.error, 1 - (0.3 + 0.0015 + 0.00995), atol=1e-9)
    assert len(table.by_task) == 4


def test_rows_survive_a_round_trip_through_json(rows: Rows, write: Callable[[Rows], Path]) -> None:
    path = write(rows) / "results.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert load(path).sha256 == load(path.parent).sha256
