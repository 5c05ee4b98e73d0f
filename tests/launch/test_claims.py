"""Claims: one holder at a time, whatever dies, stops or comes late; each result is committed once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launch.bucket_claims import BucketClaims
from launch.claims import Claim, ClaimStore, FileClaims, LostError, committed, holder, take, wait_and_take
from launch.outcome import TRIES, fail, held_back, tries_left, unfinished
from launch.work import work
from tests.integration.tiny import lines, read, wait_for
from vlmscale.bucket import ABSENT, Bucket
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, PreemptedError, UserError
from vlmscale.records import Status

RACER = Path(__file__).with_name("racer.py")
ELSEWHERE = {"kind": "claim", "host": "other", "pid": 1, "begun": "1", "machine": "another"}


class Objects(ClaimStore):
    """Claims on an object store, emulated: writes under if-generation-match=0, times of its own."""

    def __init__(self) -> None:
        self.objects: dict[int, tuple[dict[str, Any], float]] = {}
        self.clock = 1e9
        self.lock = threading.Lock()

    def last(self) -> int:
        return max(self.objects, default=0)

    def read(self, number: int) -> dict[str, Any]:
        return self.objects[number][0]

    def create(self, number: int, entry: dict[str, Any]) -> bool:
        with self.lock:
            if number in self.objects:  # 412 Precondition Failed
                return False
            self.objects[number] = entry, self.clock
            return True

    def renew(self, number: int) -> None:
        self.objects[number] = self.objects[number][0], self.clock

    def age_s(self, number: int) -> float:
        return self.clock - self.objects[number][1]

    def expire(self) -> None:
        self.clock += 61


class Files(FileClaims):
    """Claims in files, whose last entry a test makes old."""

    def expire(self) -> None:
        path = self.folder / f"{self.last():06d}.json"
        before = path.stat().st_mtime - 61
        os.utime(path, (before, before))


class Unlinked(Files):
    """The same on a disk without hard links."""

    def create(self, number: int, entry: dict[str, Any]) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links")))
            return super().create(number, entry)


class BucketEntries(BucketClaims):
    """Claims in a bucket, whose last entry a test makes old."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self.older: Counter[str] = Counter()  # seconds, by generation: one that is renewed has another

    def age_s(self, number: int) -> float:
        return super().age_s(number) + self.older[self.generation(number)]

    def generation(self, number: int) -> str:
        entry = self.bucket.look(f"{number:06d}.json")
        assert entry is not None
        return entry.generation

    def expire(self) -> None:
        self.older[self.generation(self.last())] += 61


@pytest.fixture(params=["files", "files without links", "objects", "a bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "a bucket":
        return BucketEntries(Bucket(request.getfixturevalue("bucket")))
    made = {"files": Files, "files without links": Unlinked}.get(request.param)
    return made(tmp_path / "claims") if made else Objects()


def claimed(store: ClaimStore) -> Claim:
    claim = take(store, 60)
    assert claim is not None
    return claim


def test_a_claim_is_held_until_it_is_released(store: Any) -> None:
    assert holder(store) is None
    claim = claimed(store)
    assert holder(store, 60)["pid"] == os.getpid()
    assert take(store, 60) is None
    claim.commit("a")
    assert take(store, 60) is None, "a commit keeps the claim"
    claim.release()
    assert holder(store, 60) is None
    again = claimed(store)
    assert again.number > claim.number
    assert committed(store) == {"a"}


def test_a_late_finisher_is_refused(store: Any) -> None:
    late = claimed(store)
    store.expire()
    assert holder(store, 60) is None
    successor = claimed(store)
    with pytest.raises(LostError, match="took it over"):
        late.commit("a")
    with pytest.raises(LostError):
        late.renew()
    late.release()
    assert holder(store, 60) is not None, "it releases nothing of its successor's"
    assert committed(store) == set()
    successor.commit("a")
    with pytest.raises(LostError):
        late.commit("a")
    assert committed(store) == {"a"}


def test_renewing_keeps_a_claim(store: Any) -> None:
    claim = claimed(store)
    store.expire()
    claim.renew()
    assert take(store, 60) is None


def test_of_many_that_see_a_claim_expired_one_gets_it(store: Any) -> None:
    for _ in range(20):
        claimed(store)
        store.expire()
        barrier, found = threading.Barrier(6), []

        def race(barrier: threading.Barrier = barrier, found: list[Any] = found) -> None:
            barrier.wait()
            found.append(take(store, 60))

        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(claim is not None for claim in found) == 1
        store.expire()


@pytest.mark.parametrize("skew_s", [-1e6, 1e6])
def test_clocks_of_machines_are_not_read(skew_s: float, tmp_path: Path, monkeypatch: Any) -> None:
    store = Files(tmp_path)
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + skew_s)
    assert store.create(1, ELSEWHERE)
    assert take(store, 60) is None
    assert 0 <= store.age_s(1) < 30
    store.expire()
    assert store.age_s(1) > 60
    assert take(store, 60) is not None


def test_a_process_of_this_machine_that_has_gone_holds_nothing(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from launch.claims import *; "
    code += "take(FileClaims(Path(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    store = FileClaims(tmp_path)
    assert store.last() == 1
    if store.read(1)["machine"] is None:
        pytest.skip("finds processes through /proc")
    assert take(store) is not None


def test_waiting_ends_when_the_holder_shows_life_or_has_expired(store: Any) -> None:
    store.create(1, ELSEWHERE)
    store.expire()
    assert wait_and_take(store, 60) is not None
    other = claimed_by_another(store)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.2):
            store.renew(other)

    if isinstance(store, Objects):
        store.clock += 10
    thread = threading.Thread(target=live)
    thread.start()
    assert wait_and_take(store, 60) is None
    stop.set()
    thread.join()


def claimed_by_another(store: Any) -> int:
    number = int(store.last()) + 1
    assert store.create(number, ELSEWHERE)
    return number


def test_an_entry_whose_answer_was_lost_is_our_own(bucket: str, monkeypatch: Any) -> None:
    store, write = BucketClaims(Bucket(bucket)), Bucket.write

    def made_twice(self: Bucket, name: str, content: bytes, generation: str | None = None) -> Any:
        write(self, name, content, generation)
        return write(self, name, content, generation)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", made_twice)
        assert store.create(1, ELSEWHERE)
    assert store.read(1)["pid"] == ELSEWHERE["pid"]
    assert not store.create(1, ELSEWHERE)
    with pytest.raises(FileExistsError):
        store.bucket.write("000001.json", b"", ABSENT)


@pytest.mark.parametrize("skew_s", [-1e6, 1e6])
def test_clocks_of_machines_are_not_read_with_a_bucket(skew_s: float, bucket: str, monkeypatch: Any) -> None:
    store, real = BucketEntries(Bucket(bucket)), time.time()
    monkeypatch.setattr(time, "time", lambda: real + skew_s)
    assert store.create(1, ELSEWHERE)
    assert take(store, 60) is None
    assert 0 <= store.age_s(1) < 30
    store.expire()
    assert take(store, 60) is not None


def test_a_torn_entry_holds_until_it_expires(tmp_path: Path) -> None:
    store = Files(tmp_path)
    (tmp_path / "000001.json").write_text('{"ki')
    (tmp_path / ".left.tmp").write_text("")
    assert holder(store, 60) == {}
    assert take(store, 60) is None
    store.expire()
    assert take(store, 60) is not None


def test_what_was_committed_before_a_kill_counts(tmp_path: Path) -> None:
    claim = claimed(FileClaims(tmp_path / "claims"))
    claim.commit(tmp_path.name)
    claim.release()
    assert Status(tmp_path).read()["state"] == "pending"
    assert work(tmp_path, [tmp_path], lambda commit: pytest.fail("run again")) == 0
    assert Status(tmp_path).read()["state"] == "done"


def test_a_holder_elsewhere_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    FileClaims(tmp_path / "claims").create(1, ELSEWHERE)
    assert work(tmp_path, [tmp_path], lambda commit: pytest.fail("run")) == EXIT_AGAIN
    assert "process 1 on other works on it" in capsys.readouterr().err


def raises(error: Exception) -> Any:
    def run(commit: Any) -> None:
        raise error

    return run


def test_a_mistake_takes_all_tries_a_fault_one_and_a_stop_none(tmp_path: Path) -> None:
    status = Status(tmp_path)
    for _ in range(5):
        assert work(tmp_path, [tmp_path], raises(PreemptedError("saved"))) == EXIT_AGAIN
    assert status.read()["state"] == "preempted"
    assert tries_left(status.read()) == TRIES == 3
    for left in (2, 1, 0):
        assert work(tmp_path, [tmp_path], raises(RuntimeError("broken"))) == 1
        assert tries_left(status.read()) == left
    assert status.read()["last_error"] == "RuntimeError: broken"
    assert work(tmp_path, [tmp_path], lambda commit: pytest.fail("run again")) == EXIT_USER
    status.update(state="pending", tries_left=TRIES)
    assert work(tmp_path, [tmp_path], raises(UserError("no such file"))) == EXIT_USER
    assert "no such file" in held_back([tmp_path])


def test_a_failed_cell_of_a_cohort_takes_the_finished_ones_along_nowhere(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        run.mkdir()

    def half(commit: Any) -> None:
        commit(runs[0])
        raise RuntimeError("broken")

    assert work(tmp_path / "both", runs, half) == 1
    assert [Status(run).read()["state"] for run in runs] == ["done", "failed"]
    fail(runs, "again", 1)
    assert unfinished(runs) == [runs[1]]
    assert tries_left(Status(runs[1]).read()) == 1


def racers(root: Path, count: int, life_s: float, sleep_s: float) -> list[subprocess.Popen[bytes]]:
    return [start(root, life_s, sleep_s, seed) for seed in range(count)]


def start(root: Path, life_s: float, sleep_s: float, seed: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(RACER), str(root), str(life_s), str(sleep_s), str(seed)]
    here = os.environ | {"PYTHONPATH": str(RACER.parent.parent.parent)}
    return subprocess.Popen(words, env=here, stderr=subprocess.DEVNULL)


def make_cells(root: Path, count: int) -> list[Path]:
    cells = [root / "cells" / f"{number:03d}" for number in range(count)]
    for cell in cells:
        cell.mkdir(parents=True)
    return cells


def log(root: Path, what: str) -> Counter[str]:
    return Counter(line["cell"] for line in lines(root / "log.jsonl") if line["what"] == what)


def check_all_done_once(cells: list[Path]) -> None:
    for cell in cells:
        store = FileClaims(cell / "claims")
        entries = [store.read(number) for number in range(1, store.last() + 1)]
        [commit] = [entry for entry in entries if entry["kind"] == "commit"]
        assert read(cell / "status.json")["state"] == "done"
        [row] = lines(cell / "result.jsonl")
        assert row["cell_id"] == commit["cell"] == cell.name


def test_two_launchers_on_200_cells_run_each_once(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, 200)
    both = racers(tmp_path, 2, life_s=60, sleep_s=0.01)
    assert wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(lines(tmp_path / "log.jsonl")) == 2)
    (tmp_path / "go").touch()
    assert [process.wait(300) for process in both] == [0, 0]
    assert log(tmp_path, "ran") == Counter(cell.name for cell in cells)
    assert log(tmp_path, "committed") == log(tmp_path, "ran")
    assert len({line["pid"] for line in lines(tmp_path / "log.jsonl")}) == 2, "one did it all"
    check_all_done_once(cells)


@pytest.mark.slow
def test_launchers_killed_and_stopped_at_random_commit_each_result_once(tmp_path: Path) -> None:
    life_s, sleep_s, rng = 1.0, 0.6, random.Random(0)
    cells = make_cells(tmp_path, 160)
    (tmp_path / "go").touch()
    alive = racers(tmp_path, 3, life_s, sleep_s)
    hits = Counter[str]()
    stopped: list[tuple[float, subprocess.Popen[bytes]]] = []
    while sum(hits.values()) < 20:
        time.sleep(rng.uniform(0.1, 0.5))
        index, kind = rng.randrange(3), rng.choice(["kill", "stop"])
        process = alive[index]
        assert process.poll() is None, "the cells do not last as long as the test needs"
        if kind == "kill":
            process.kill()
            process.wait()
        else:
            process.send_signal(signal.SIGSTOP)
            stopped.append((time.monotonic() + life_s * rng.uniform(1.5, 2.5), process))
        hits[kind] += 1
        alive[index] = start(tmp_path, life_s, sleep_s, 3 + sum(hits.values()))
        for due, late in [item for item in stopped if item[0] < time.monotonic()]:
            stopped.remove((due, late))
            late.send_signal(signal.SIGCONT)
    for _, late in stopped:
        time.sleep(life_s / 2)
        late.send_signal(signal.SIGCONT)
    assert all(process.wait(300) == 0 for process in [*alive, *(late for _, late in stopped)])
    assert min(hits["kill"], hits["stop"]) > 4
    check_all_done_once(cells)
    assert set(log(tmp_path, "committed").values()) == {1}
    print(json.dumps({"hits": hits, "refused": log(tmp_path, "refused").total()}))


def test_one_that_was_stopped_longer_than_its_claim_lives_is_refused(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, 1)
    (tmp_path / "go").touch()
    late = start(tmp_path, 1.0, 12.0, 5)
    assert wait_for(lambda: holder(FileClaims(cell / "claims"), 1.0) is not None)
    late.send_signal(signal.SIGSTOP)
    assert wait_for(lambda: holder(FileClaims(cell / "claims"), 1.0) is None)
    assert work(cell, [cell], lambda commit: commit(cell), life_s=1.0) == 0
    late.send_signal(signal.SIGCONT)
    assert late.wait(120) == 0
    assert log(tmp_path, "refused") == Counter([cell.name])
    assert log(tmp_path, "committed") == Counter()
    assert Status(cell).read()["state"] == "done"
    assert Status(cell).read()["last_error"] is None
