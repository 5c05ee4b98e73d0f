"""A sweep in a bucket: what is sent and when, who may send, and the commands that read and change it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launch.claims import Claim, LostError, committed, holder, take
from launch.directory import Crew, read_sweep
from launch.mirror import Mirror, reached
from launch.outcome import CANCEL
from launch.upload import upload
from launch.work import work
from tests.integration.tiny import lines, read
from tests.launch.test_sweep_commands import make_sweep, put_rows, status
from vlmscale.bucket import Bucket, at_once
from vlmscale.cli import main
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, UserError
from vlmscale.records import ADDRESS, Status, write_json


def prepared(out: Path, states: list[str], together: int = 1) -> list[str]:
    """A launched sweep with some data, of which one data set lies elsewhere."""
    names = make_sweep(out, states, together)
    for folder in (out / "data" / "records", out.parent / "elsewhere"):
        folder.mkdir(parents=True)
        (folder / "part.bin").write_bytes(folder.name.encode() * 100)
    data_sets = [["records", "a" * 64], [str(out.parent / "elsewhere"), "b" * 64]]
    write_json(out / "data" / "manifest.json", {"version": 2, "data_sets": data_sets})
    return names


def opened(address: str, root: Path, cell: str) -> tuple[Mirror, Crew]:
    """What a process that works on a cell has."""
    mirror = Mirror(address, root)
    mirror.fetch_files(())
    with reached(address) as sweep:
        ids = next(ids for ids in sweep.cohorts if cell in ids)
    runs = tuple(root / "cells" / name for name in ids)
    return mirror, Crew(cell, runs[0], runs)


def states(address: str) -> list[str]:
    with reached(address, ("status.json",)) as sweep:
        return [Status(sweep.run(name)).read()["state"] for name in sweep.cells]


def objects(address: str, under: str = "") -> list[str]:
    return list(Bucket(address).entries(under))


def test_a_sweep_is_given_to_a_bucket_and_again_only_what_has_changed(
    bucket: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    names = prepared(out, ["pending", "done"])
    (out / "cells" / names[1] / "checkpoints").mkdir()
    (out / "cells" / names[1] / "checkpoints" / "x").touch()
    assert main(["sweep", "push", str(out), bucket]) == 0
    assert "files sent" in capsys.readouterr().out
    assert objects(bucket) == sorted(
        [f"cells/{names[0]}/spec.json", "data/manifest.json", "data/records/part.bin", "sweep.json"]
        + [f"data/sets/{'b' * 16}/part.bin"]
        + [f"cells/{names[1]}/{file}.json" for file in ("spec", "status")]
        + [f"cells/{names[1]}/{file}.jsonl" for file in ("metrics", "result")]
    )
    manifest = json.loads(Bucket(bucket).read("data/manifest.json"))
    assert manifest["data_sets"][1] == [f"sets/{'b' * 16}", "b" * 64]
    assert states(bucket) == ["pending", "done"]
    assert upload(out, bucket) == 0
    (out / "data" / "records" / "part.bin").write_bytes(b"other")
    Status(out / "cells" / names[0]).update(state="failed")  # what is there is not touched
    assert upload(out, bucket) == 1
    assert states(bucket) == ["pending", "done"]
    other = tmp_path / "other" / "out"
    prepared(other, ["pending"])
    with pytest.raises(UserError, match="holds sweep fake with other cells"):
        upload(other, bucket)


def test_a_sweep_is_pushed_again_after_a_retry_in_the_bucket_parted_a_cohort(
    bucket: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    names = prepared(out, ["done", "failed"], together=2)
    Status(out / "cells" / names[1]).update(failed_at=5)
    push = ["sweep", "push", str(out), bucket]
    assert main(push) == 0
    Bucket(bucket).write(
        f"cells/{names[1]}/status.json", (out / "cells" / names[1] / "status.json").read_bytes()
    )
    assert main(["sweep", "retry", bucket, names[1]]) == 0
    capsys.readouterr()
    assert main(push) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith("0 files sent")
    assert read_sweep(out).cohorts == [[names[0]], [names[1]]]
    assert states(bucket) == ["done", "pending"]
    write_json(out / "sweep.json", read(out / "sweep.json") | {"cohorts": []})  # as one that is made anew
    assert main(push) == 0
    assert read_sweep(out).cohorts == [[names[0]], [names[1]]]
    Bucket(bucket).write("sweep.json", json.dumps(read(out / "sweep.json") | {"cohorts": [names]}).encode())
    assert main(push) == EXIT_USER, "what was parted here is not joined"
    assert "with other cohorts" in capsys.readouterr().err
    other = tmp_path / "other" / "out"
    prepared(other, ["pending"])
    assert main(["sweep", "push", str(other), bucket]) == EXIT_USER
    assert "holds sweep fake with other cells" in capsys.readouterr().err


def test_what_a_commit_stands_for_is_in_the_bucket_before_it(
    bucket: str, tmp_path: Path, bucket_requests: list[str]
) -> None:
    out = tmp_path / "out"
    names = prepared(out, ["pending", "pending"], together=2)
    upload(out, bucket)
    mirror = Mirror(bucket, tmp_path / "scratch")
    mirror.fetch_files(())
    with reached(bucket) as sweep:
        [crew] = sweep.crews()
    folder = mirror.root / crew.folder.relative_to(sweep.out)
    runs = [mirror.root / "cells" / name for name in names]
    bucket_requests.clear()

    def run(commit: Any) -> None:
        assert (runs[0] / ADDRESS).read_text() == f"{bucket}/cells/{names[0]}/checkpoints\n"
        assert (runs[0] / "spec.json").exists()
        for own in runs:
            put_rows(own, 0.5)
            (own / "answers").mkdir()
            (own / "answers" / "colour.jsonl").write_text("")
            (own / ".lock").touch()
            commit(own)

    assert work(folder, runs, run, place=mirror) == 0
    written = [line for line in bucket_requests if line.startswith("POST")]

    def at(name: str) -> int:
        return next(place for place, line in enumerate(written) if name in line)

    claims = f"cohorts/{folder.name}/claims"
    assert at(f"{claims}/000001.json") < at("result.jsonl") < at(f"{claims}/000002.json")
    assert committed(mirror.claims(folder)) == set(names)
    assert states(bucket) == ["done", "done"]
    found = objects(bucket, f"cells/{names[1]}/")
    assert [name.rpartition("/")[2] for name in found] == [
        "colour.jsonl",
        "result.jsonl",
        "spec.json",
        "status.json",
    ]
    assert work(folder, runs, lambda commit: pytest.fail("run again"), place=mirror) == 0


def test_a_holder_that_was_taken_over_sends_nothing(bucket: str, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    [name] = prepared(out, ["pending"])
    upload(out, bucket)
    late, crew = opened(bucket, tmp_path / "late", name)
    late.fetch([crew.folder])
    claim = take(late.claims(crew.folder))
    assert claim is not None
    (crew.folder / "metrics.jsonl").write_text("late\n")
    late.send([crew.folder], claim)
    following, its = opened(bucket, tmp_path / "next", name)
    monkeypatch.setattr("launch.claims._gone", lambda entry: entry.get("kind") == "claim")
    successor = take(following.claims(its.folder))
    assert successor is not None
    following.fetch([its.folder])
    assert (its.folder / "metrics.jsonl").read_text() == "late\n"
    (its.folder / "metrics.jsonl").write_text("next\n")
    following.send([its.folder], successor)
    (crew.folder / "metrics.jsonl").write_text("later\n")
    with pytest.raises(LostError):
        late.send([crew.folder], claim)
    renewals, renew = [], Claim.renew

    def paused_behind_the_first(self: Claim) -> None:
        renewals.append(self)
        if len(renewals) > 1:
            renew(self)

    with monkeypatch.context() as patch:
        patch.setattr(Claim, "renew", paused_behind_the_first)
        with pytest.raises(LostError):
            late.send([crew.folder], claim)
    assert Bucket(bucket).read(f"cells/{name}/metrics.jsonl") == b"next\n"


def test_what_a_dead_process_left_in_a_scratch_directory_counts_no_more(bucket: str, tmp_path: Path) -> None:
    out, root = tmp_path / "out", tmp_path / "scratch"
    [name] = prepared(out, ["pending"])
    upload(out, bucket)
    mirror, crew = opened(bucket, root, name)
    mirror.fetch([crew.folder, root / "data"])
    (crew.folder / "done.json").write_text("{}")
    (crew.folder / "spec.json").write_text("{")
    again = Mirror(bucket, root)
    again.fetch([crew.folder, root / "data"])
    assert not (crew.folder / "done.json").exists()
    assert (crew.folder / "spec.json").read_bytes() == (out / "cells" / name / "spec.json").read_bytes()


def test_files_that_are_there_are_not_fetched_again(
    bucket: str, tmp_path: Path, bucket_requests: list[str]
) -> None:
    out, root = tmp_path / "out", tmp_path / "scratch"
    prepared(out, ["pending"])
    upload(out, bucket)
    Mirror(bucket, root).fetch([root / "data"])
    assert (root / "data" / "sets" / ("b" * 16) / "part.bin").read_bytes() == b"elsewhere" * 100
    bucket_requests.clear()
    Mirror(bucket, root).fetch([root / "data"])
    assert len(bucket_requests) == 1, bucket_requests


def test_a_scratch_directory_is_of_one_process(bucket: str, tmp_path: Path) -> None:
    prepared(tmp_path / "out", ["pending"])
    upload(tmp_path / "out", bucket)
    with (
        reached(bucket, scratch=tmp_path / "scratch"),
        pytest.raises(UserError, match="another process has it"),
        reached(bucket, scratch=tmp_path / "scratch"),
    ):
        pass


def test_status_asks_for_three_files_of_a_cell_and_the_ends_of_long_ones(
    bucket: str, tmp_path: Path, capsys: Any, bucket_requests: list[str], monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    names = make_sweep(out, ["running"] * 10 + ["done"] * 600 + ["pending"] * 390)
    place = Bucket(bucket)
    long = ("x" * 100 + "\n") * 1000

    def put(name: str) -> None:
        for file in ("spec.json", "status.json", "metrics.jsonl"):
            head = long if file == "metrics.jsonl" else ""
            place.write(f"cells/{name}/{file}", (head + (out / "cells" / name / file).read_text()).encode())

    at_once(put, names)
    place.write("sweep.json", (out / "sweep.json").read_bytes())
    mirror = Mirror(bucket, tmp_path / "scratch")
    held = take(mirror.claims(mirror.root / "cells" / names[0]))
    assert held is not None
    monkeypatch.setattr("launch.status.holder", lambda store: holder(store, 1e6))  # on a slow machine too
    bucket_requests.clear()
    began = time.monotonic()
    found = status(bucket, capsys)
    seconds = time.monotonic() - began
    assert len(found) == 1000
    assert (found[names[0]]["state"], found[names[0]]["step"]) == ("running", 9)
    assert found[names[0]]["holder"] is not None
    assert found[names[1]]["holder"] is None
    listings = [line for line in bucket_requests if "matchGlob" in line]
    assert len(listings) == 3, "one for each thousand objects"
    assert len(bucket_requests) < 3000 + 3 + 60
    print(f"{len(bucket_requests)} requests, {seconds:.1f} s")


def test_a_cell_in_a_bucket_is_cancelled_and_retried(bucket: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    names = prepared(out, ["pending", "pending", "pending"])
    upload(out, bucket)
    mirror, crew = opened(bucket, tmp_path / "scratch", names[0])
    mirror._looked = time.monotonic() + 1000  # its thread would send this process a signal

    def run(commit: Any) -> None:
        (crew.folder / "metrics.jsonl").write_text("{}\n")
        assert main(["sweep", "cancel", bucket, names[0], names[1]]) == 0
        mirror.look(crew.runs)
        assert not (crew.folder / CANCEL).exists()
        other, same = opened(bucket, tmp_path / "other", names[0])
        other.look(same.runs)
        assert (same.folder / CANCEL).exists()

    assert work(crew.folder, crew.runs, run, place=mirror) == EXIT_USER
    told = capsys.readouterr()
    assert "cells that are cancelled: 1; asked to save and stop: 1" in told.out
    assert "stopped as asked" in told.err
    assert states(bucket) == ["cancelled", "cancelled", "pending"]
    assert not [name for name in objects(bucket) if name.endswith(CANCEL)]
    assert main(["sweep", "retry", bucket]) == 0
    assert "cells that are pending again: 2" in capsys.readouterr().out
    assert states(bucket) == ["pending", "pending", "pending"]
    assert Bucket(bucket).read(f"cells/{names[0]}/metrics.jsonl") == b"{}\n", "nothing else is touched"


def test_a_fault_in_a_bucket_s_cell_takes_a_try(bucket: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    [name] = prepared(out, ["pending"])
    upload(out, bucket)
    mirror, crew = opened(bucket, tmp_path / "scratch", name)

    def run(commit: Any) -> None:
        raise RuntimeError("broken")

    assert work(crew.folder, crew.runs, run, place=mirror) == 1
    elsewhere, its = opened(bucket, tmp_path / "elsewhere2", name)
    elsewhere.fetch([its.folder])
    assert Status(its.folder).read()["tries_left"] == 2
    assert take(elsewhere.claims(its.folder)) is not None, "it was released"
    assert work(its.folder, its.runs, run, place=elsewhere) == EXIT_AGAIN


def test_messages_name_the_address_that_was_given(bucket: str, tmp_path: Path, capsys: Any) -> None:
    out, rows = tmp_path / "out", ["--out", str(tmp_path / "all.jsonl")]
    [name, _] = prepared(out, ["done", "pending"])
    upload(out, bucket)
    Bucket(bucket).write(f"cells/{name}/result.jsonl", b"{\n")
    scratch = ["--scratch", str(tmp_path / "scratch")]
    for words, told in (
        (["cancel", bucket, "nope"], f"{bucket}: has no cell nope"),
        (["work", bucket, "--cohort", "nope"], f"{bucket}: has no cohort nope"),
        (["work", bucket, "--cohort", "nope", *scratch], f"{bucket}: has no cohort nope"),
        (["collect", bucket, *rows], f"{bucket}/cells/{name}/result.jsonl, line 1: no JSON object"),
        (["collect", bucket, str(out), *rows], f"{bucket}/cells/{name}/result.jsonl, line 1"),
    ):
        assert main(["sweep", *words]) == EXIT_USER
        assert capsys.readouterr().err.startswith(f"vlmscale sweep: {told}")
    Bucket(bucket).write("sweep.json", b"{}")
    assert main(["sweep", "status", bucket]) == EXIT_USER
    assert capsys.readouterr().err.startswith(f"vlmscale sweep: {bucket}/sweep.json: has no")


def test_rows_are_collected_from_buckets_and_directories(bucket: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    prepared(out, ["done", "done", "pending"])
    upload(out, bucket)
    path = tmp_path / "all.jsonl"
    assert main(["sweep", "collect", bucket, str(out), "--out", str(path)]) == 0
    assert "4 rows of 2 finished cells, of 3" in capsys.readouterr().out
    assert len(lines(path)) == 4
    assert main(["sweep", "status", f"{bucket}/nothing"]) == EXIT_USER
    assert "not found; is a sweep there?" in capsys.readouterr().err
