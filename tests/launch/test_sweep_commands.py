"""`vlmscale sweep` status, retry, cancel, collect, work, --dry-run: on small directories, nothing trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch.claims import Claim, FileClaims, take
from launch.cohorts import make_cohort
from launch.directory import cohort_folder, cohort_id, read_sweep
from launch.local import run_cohorts
from launch.outcome import CANCEL, CLAIMS, tries_left
from launch.state import CellDirectory
from launch.work import work
from tests.integration.tiny import DATA, lines, read, steps
from vlmscale.cli import main
from vlmscale.config import cell_id, to_dict
from vlmscale.errors import EXIT_USER
from vlmscale.loading import load_cell
from vlmscale.plan.slices import find_slice
from vlmscale.records import Status, write_json, write_lines

CONFIG = to_dict(load_cell("configs/scenes_tiny.py:toy-14k,4", [*DATA, *steps(20)]))
ROW = {"llm_name": "toy-14k", "data_mix": "scenes", "seed": 0, "n_items": 8}


def make_sweep(out: Path, states: list[str], together: int = 1) -> list[str]:
    """A launched sweep whose cells are in these states, so many to a cohort; their ids."""
    names = [f"{number:012x}" for number in range(len(states))]
    cohorts = [names[at : at + together] for at in range(0, len(names), together)]
    for name, state in zip(names, states, strict=True):
        run = out / "cells" / name
        run.mkdir(parents=True)
        write_json(run / "spec.json", {"cell_id": name, "config": CONFIG})
        Status(run).update(state=state, attempts=1)
        if state == "failed":
            Status(run).update(last_error="RuntimeError: broken", tries_left=0, attempts=3)
        if state == "done":
            put_rows(run, score=0.5)
        put_metrics(run, [*({"step": step, "step_s": 0.5} for step in range(1, 9)), {"step": 9}])
    write_json(out / "sweep.json", {"name": "fake", "cells": names, "cohorts": cohorts})
    return names


def put_rows(run: Path, score: float, tasks: tuple[str, ...] = ("colour", "count")) -> None:
    rows = [ROW | {"cell_id": run.name, "task": t, "score": score, "visual_tokens": 4} for t in tasks]
    write_lines(run / "result.jsonl", [json.dumps(row) for row in rows])


def put_metrics(run: Path, metrics: list[dict[str, Any]]) -> None:
    write_lines(run / "metrics.jsonl", [json.dumps(line) for line in metrics])


def status(out: Path, capsys: Any) -> dict[str, dict[str, Any]]:
    assert main(["sweep", "status", str(out), "--json"]) == 0
    return {cell["cell_id"]: cell for cell in json.loads(capsys.readouterr().out)["cells"]}


def states(out: Path) -> list[str]:
    return [Status(out / "cells" / name).read()["state"] for name in read(out / "sweep.json")["cells"]]


def held(out: Path, cells: list[str]) -> Claim:
    """Somebody works on the cohort of these cells."""
    claim = take(FileClaims(cohort_folder(out, cells) / CLAIMS))
    assert claim is not None
    return claim


def test_status_tells_progress_and_the_time_left(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["running", "running", "done", "failed", "pending"])
    held(out, [names[0]])
    found = status(out, capsys)
    running = found[names[0]]
    assert (running["state"], running["step"], running["steps"]) == ("running", 9, 20)
    assert running["cell"] == "toy-14k pool V=4"
    assert running["seconds_left"] == pytest.approx(0.5 * 11)
    assert running["holder"].startswith(f"process {os.getpid()} on ")
    gone = found[names[1]]
    assert (gone["holder"], gone["seconds_left"]) == (None, None)
    assert "its process has gone" in gone["last_error"]
    assert found[names[3]]["last_error"] == "RuntimeError: broken"
    assert main(["sweep", "status", str(out)]) == 0
    told = capsys.readouterr().out
    assert "0 min 06 s left" in told
    assert "5 cells: 2 running, 1 done, 1 failed, 1 pending" in told
    assert main(["sweep", "status", str(out), "--json", "--watch"]) == EXIT_USER
    assert "--watch" in capsys.readouterr().err


def test_watching_ends_when_nothing_is_left_to_do(tmp_path: Path, capsys: Any) -> None:
    make_sweep(tmp_path / "out", ["done", "failed", "cancelled"])
    assert main(["sweep", "status", str(tmp_path / "out"), "--watch"]) == 0
    assert "3 cells" in capsys.readouterr().out


def test_a_torn_line_of_metrics_is_passed_over(tmp_path: Path, capsys: Any) -> None:
    [name] = make_sweep(tmp_path / "out", ["running"])
    path = tmp_path / "out" / "cells" / name / "metrics.jsonl"
    path.write_text('{"st' + "x" * 5000 + "\n" + '{"step": 7, "step_s": 2.0}\n{"step": 8}\n{"ste')
    held(tmp_path / "out", [name])
    found = status(tmp_path / "out", capsys)[name]
    assert (found["step"], found["seconds_left"]) == (8, 24.0)


def test_the_status_of_1000_cells_takes_no_jax_and_little_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_sweep(out, ["running"] * 100 + ["done"] * 600 + ["pending"] * 300)
    code = (
        "import sys, time; began = time.monotonic(); from vlmscale.cli import main; "
        "main(['sweep', 'status', sys.argv[1]]); print(time.monotonic() - began); "
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    words = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    *_, summary, seconds = done.stdout.splitlines()
    assert summary == "1000 cells: 600 done, 300 pending, 100 running"
    assert float(seconds) < 20, "0.2 s on two cores"
    print(f"{seconds} s")


def test_retry_touches_failed_and_cancelled_cells_alone(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    before = ["failed", "failed", "cancelled", "running", "done", "preempted", "pending"]
    names = make_sweep(out, before)
    files = {name: (out / "cells" / name / "status.json").read_bytes() for name in names}
    assert main(["sweep", "retry", str(out), names[0], names[4]]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        f"{names[0]}: pending",
        "cells that are pending again: 1; run the sweep to go on",
    ]
    assert f"{names[4]}: done, left alone" in told.err
    fresh = Status(out / "cells" / names[0]).read()
    assert (fresh["state"], fresh["attempts"], fresh["last_error"], tries_left(fresh)) == (
        "pending",
        0,
        None,
        3,
    )
    assert main(["sweep", "retry", str(out)]) == 0
    assert states(out) == ["pending", "pending", "pending", *before[3:]]
    for name in names[3:]:
        assert (out / "cells" / name / "status.json").read_bytes() == files[name]
    assert main(["sweep", "retry", str(out), "00000000000f"]) == EXIT_USER
    assert "has no cell 00000000000f; the nearest is 0000000000" in capsys.readouterr().err


def test_retry_leaves_a_cohort_alone_that_somebody_works_on(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["failed", "running"], together=2)
    held(out, names)
    assert main(["sweep", "retry", str(out)]) == 0
    assert "works on it; left alone" in capsys.readouterr().err
    assert states(out) == ["failed", "running"]


def test_retry_takes_the_failed_cells_of_a_cohort_together(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["failed", "failed", "done", "failed"], together=3)
    assert main(["sweep", "retry", str(out), names[0]]) == 0
    assert f"{names[1]}: in the same cohort, pending as well" in capsys.readouterr().err
    assert states(out) == ["pending", "pending", "done", "failed"]


def test_a_cell_that_was_left_behind_is_retried_alone_when_the_others_are_done(
    tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["failed", "preempted", "done"], together=3)
    Status(out / "cells" / names[0]).update(failed_at=7)
    assert main(["sweep", "retry", str(out)]) == 0
    assert "left behind by cells that are not done" in capsys.readouterr().err
    assert states(out) == ["failed", "preempted", "done"]
    Status(out / "cells" / names[1]).update(state="done")
    assert main(["sweep", "retry", str(out)]) == 0
    assert states(out) == ["pending", "done", "done"]
    assert read(out / "sweep.json")["cohorts"] == [names[1:], names[:1]]
    assert read_sweep(out).crew(names[0]).folder == out / "cells" / names[0]


def test_cells_that_all_diverged_are_retried_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["failed", "failed"], together=2)
    for name in names:
        Status(out / "cells" / name).update(failed_at=7)
    assert main(["sweep", "retry", str(out)]) == 0
    assert states(out) == ["pending", "pending"]
    assert read(out / "sweep.json")["cohorts"] == [names]


def test_cancelled_cells_are_not_run_until_they_are_retried(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["pending", "pending", "done", "failed"])
    assert main(["sweep", "cancel", str(out), names[0], names[2]]) == 0
    told = capsys.readouterr()
    assert "cells that are cancelled: 1; asked to save and stop: 0" in told.out
    assert f"{names[2]}: done, left alone" in told.err
    assert states(out) == ["cancelled", "pending", "done", "failed"]
    run = out / "cells" / names[0]
    assert work(run, [run], lambda commit: pytest.fail("run")) == EXIT_USER
    assert main(["sweep", "work", str(out), "--cohort", names[0]]) == EXIT_USER
    assert f"{names[0]} is cancelled; vlmscale sweep retry runs it again" in capsys.readouterr().err
    assert main(["sweep", "retry", str(out), names[0]]) == 0
    assert work(run, [run], lambda commit: commit(run)) == 0
    assert states(out) == ["done", "pending", "done", "failed"]


def test_cancelling_one_cell_stops_its_cohort(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["preempted", "preempted", "done"], together=3)
    assert main(["sweep", "cancel", str(out), names[0]]) == 0
    assert f"{names[1]}: in the same cohort" in capsys.readouterr().err
    assert states(out) == ["cancelled", "cancelled", "done"]


def test_who_works_on_a_cell_is_asked_to_save_and_stop(tmp_path: Path, capsys: Any) -> None:
    """The worker is a process of its own, whose work is to wait for the signal."""
    out = tmp_path / "out"
    [name] = make_sweep(out, ["pending"])
    run = out / "cells" / name
    code = (
        "import sys, time; from pathlib import Path; from launch.work import _stoppable, work\n"
        "def wait(commit):\n"
        "    with _stoppable():\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(100)\n"
        "run = Path(sys.argv[1]); sys.exit(work(run, [run], wait))"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "begun\n"
    assert main(["sweep", "cancel", str(out)]) == 0
    told = capsys.readouterr()
    assert f"process {worker.pid} on " in told.err
    assert "cells that are cancelled: 0; asked to save and stop: 1" in told.out
    assert worker.wait(60) == EXIT_USER
    assert states(out) == ["cancelled"]
    assert not (run / CANCEL).exists()
    worker.stdout.close()


def test_one_that_finishes_before_it_hears_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    [name] = make_sweep(out, ["pending"])
    run = out / "cells" / name

    def finish(commit: Any) -> None:
        (run / CANCEL).touch()
        commit(run)

    assert work(run, [run], finish) == 0
    assert states(out) == ["done"]
    assert not (run / CANCEL).exists()


def test_collect_joins_sweeps_and_counts_a_row_once(tmp_path: Path, capsys: Any) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_sweep(here, ["done", "done", "pending"])
    names = make_sweep(there, ["done", "pending", "done"])
    put_rows(there / "cells" / names[2], score=0.25)
    file = tmp_path / "all.jsonl"
    command = ["sweep", "collect", str(here), str(there), "--out", str(file)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"6 rows of 3 finished cells, of 3 in {here}, {there}; 2 rows were in several directories" in told
    rows = lines(file)
    assert [(row["cell_id"], row["score"]) for row in rows[::2]] == list(
        zip(names, (0.5, 0.5, 0.25), strict=True)
    )
    put_rows(there / "cells" / names[0], score=0.75)
    assert main(command) == EXIT_USER
    said = capsys.readouterr().err
    assert "there/cells/000000000000/result.jsonl: task colour has score 0.75" in said
    assert lines(file) == rows, "refused and yet written"


def test_rows_of_two_reducers_are_two(tmp_path: Path, capsys: Any) -> None:
    out, file = tmp_path / "out", tmp_path / "all.jsonl"
    [name] = make_sweep(out, ["done"])
    path = out / "cells" / name / "result.jsonl"
    [row, _] = lines(path)
    rows = [row | {"reducer": None}, row | {"reducer": "fastv", "score": 0.25}]
    write_lines(path, [json.dumps(row) for row in rows])
    assert main(["sweep", "collect", str(out), str(out), "--out", str(file)]) == 0
    assert "2 rows of 1 finished cells, of 1" in capsys.readouterr().out
    assert [(row["reducer"], row["score"]) for row in lines(file)] == [(None, 0.5), ("fastv", 0.25)]


def test_what_cannot_be_collected_is_named(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    [name] = make_sweep(out, ["pending"])
    command = ["sweep", "collect", str(out), "--out", str(tmp_path / "all.jsonl")]

    def refused(*parts: str) -> None:
        assert main(command) == EXIT_USER
        [line] = capsys.readouterr().err.splitlines()
        assert all(part in line for part in parts), line

    refused("no cell is done")
    Status(out / "cells" / name).update(state="done")
    refused("result.jsonl", "copy it again")
    path = out / "cells" / name / "result.jsonl"
    path.write_text('{"cell_id"\n')
    refused("result.jsonl, line 1: no JSON object")
    path.write_text('{"cell_id": "x"}\n')
    refused("line 1: has no data_mix, llm_name")
    put_rows(path.parent, 0.5)
    command[2:3] = [str(tmp_path)]
    refused(f"{tmp_path}: is no sweep directory; `vlmscale sweep run SWEEP --out DIR` makes one")
    command[2:3] = [str(out)]
    command[-1] = str(tmp_path / "no" / "all.jsonl")
    refused("--out", "No such file")


def test_a_cohort_that_is_not_there_is_named(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["pending", "pending"], together=2)
    assert main(["sweep", "work", str(out), "--cohort", names[0]]) == EXIT_USER
    assert f"has no cohort {names[0]}" in capsys.readouterr().err
    assert main(["sweep", "work", str(out), "--cohort", "nope"]) == EXIT_USER
    assert f"{out}: has no cohort nope; it has {cohort_id(names)}\n" in capsys.readouterr().err
    make_sweep(tmp_path / "many", ["pending"] * 6)
    assert main(["sweep", "work", str(tmp_path / "many"), "--cohort", "nope"]) == EXIT_USER
    assert "has no cohort nope; vlmscale sweep run --dry-run shows all 6\n" in capsys.readouterr().err
    assert main(["sweep", "cancel", str(tmp_path / "many"), "nope"]) == EXIT_USER
    assert "has no cell nope; vlmscale sweep status shows all 6\n" in capsys.readouterr().err
    write_json(out / "sweep.json", read(out / "sweep.json") | {"cohorts": []})
    assert main(["sweep", "work", str(out), "--cohort", cohort_id(names)]) == EXIT_USER
    assert "not spread over cohorts yet" in capsys.readouterr().err


def test_a_dry_run_prints_all_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["sweep", "run", "configs/sweeps/demo.py", "--out", str(out), *DATA, *steps(20), "--dry-run"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert told.count("20 steps  pending") == 20
    assert "1 group could train together" in told
    assert f"launch.worker {out}/cohorts/" in told
    assert not out.exists()


def test_what_a_sweep_costs_is_told_and_limited_before_anything_is_written(
    tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    words = ["sweep", "run", "configs/sweeps/demo.py", "--out", str(out), *DATA, *steps(20)]
    assert main([*words, "--dry-run", "--topology", "v5e-4"]) == 0
    told = capsys.readouterr().out
    assert "predicted for v5e-4: " in told
    assert told.count(" chip-hours if the config says train.attention=splash") == 1, "all cells in one group"
    slow, measured = tmp_path / "slow.json", ["--dry-run", "--topology", "v5e-4", "--calibration"]
    shares = {find_slice("v5e-4").generation.device.kind: {"products": 0.01, "memory": 0.01}}
    slow.write_text(json.dumps({"efficiencies": shares}))
    assert main([*words, *measured, str(slow)]) == 0
    hours = [float(re.search(r"([\d.e-]+) h, ", text)[1]) for text in (told, capsys.readouterr().out)]
    assert hours[1] > 10 * hours[0]
    assert main([*words, "--topology", "v5e-4", "--max-chip-hours", "1e-9"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "chip-hours, more than --max-chip-hours 1e-09; nothing was submitted" in line
    assert main([*words, "--topology", "v5e-7", "--dry-run"]) == 2
    assert "v5e-7" in capsys.readouterr().err
    assert main([*words, "--topology", "v5e-4", "--text-tokens", "0", "--dry-run"]) == 2
    assert "--text-tokens 0: must be above 0" in capsys.readouterr().err
    assert main([*words, "--topology", "v5e-4", "--calibration", str(tmp_path / "nope.json")]) == 2
    assert str(tmp_path / "nope.json") in capsys.readouterr().err
    for word, value in (("max-chip-hours", "1"), ("text-tokens", "64"), ("calibration", str(slow))):
        assert main([*words, f"--{word}", value]) == 2
        assert f"--{word} is of a prediction: give --topology as well" in capsys.readouterr().err
    assert not out.exists()


PREEMPTED_TWICE = """
import os, sys, time
from pathlib import Path
from launch.work import work
from vlmscale.errors import PreemptedError

run = Path(sys.argv[1])
def once(commit):
    with (run / "ran").open("a") as file:
        print(os.getppid(), file=file)
    time.sleep(0.1)
    if len((run / "ran").read_text().splitlines()) < 6:
        raise PreemptedError("saved")
    commit(run)
sys.exit(work(run, [run], once))
"""


def fake_cohorts(tmp_path: Path, count: int) -> list[Any]:
    cells = [
        load_cell("configs/scenes_tiny.py:toy-14k,4", [f"--config.train.seed={n}"]) for n in range(count)
    ]
    made = [CellDirectory(cell_id(cell), cell, tmp_path / "cells" / cell_id(cell)) for cell in cells]
    return [make_cohort([cell], tmp_path) for cell in made]


def test_what_was_saved_is_run_again_without_counting(tmp_path: Path, monkeypatch: Any) -> None:
    [cohort] = fake_cohorts(tmp_path, 1)

    def command(cohort: Any, *_: Any) -> list[str]:
        return [sys.executable, "-c", PREEMPTED_TWICE, str(cohort.path)]

    monkeypatch.setattr("launch.local.command", command)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    assert not run_cohorts([cohort], 1)
    assert Status(cohort.path).read()["state"] == "done"
    assert len((cohort.path / "ran").read_text().splitlines()) == 6


def test_a_launcher_leaves_to_others_what_they_hold_and_waits_for_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    first, second = fake_cohorts(tmp_path, 2)
    for cohort in (first, second):
        cohort.path.mkdir(parents=True)
        (cohort.path / "ran").write_text("x\n" * 5)

    def command(cohort: Any, *_: Any) -> list[str]:
        return [sys.executable, "-c", PREEMPTED_TWICE, str(cohort.path)]

    monkeypatch.setattr("launch.local.command", command)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    claim = take(FileClaims(first.path / CLAIMS))
    assert claim is not None

    def finish() -> None:
        while Status(second.path).read()["state"] != "done":
            time.sleep(0.05)
        claim.commit(first.cells[0].id)
        Status(first.path).update(state="done")
        claim.release()

    thread = threading.Thread(target=finish)
    thread.start()
    assert not run_cohorts([first, second], 2)
    thread.join()
    assert (first.path / "ran").read_text() == "x\n" * 5, "run while another held it"
    assert len((second.path / "ran").read_text().splitlines()) == 6
    assert work(first.path, first.runs, lambda commit: pytest.fail("run again")) == 0
