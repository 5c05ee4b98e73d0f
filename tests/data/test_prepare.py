"""Preparation: what is used and what is set aside, kills, full disks, changes, and the same bytes always."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.llava_files import contents, encoded, shown, talk, write_files, write_records
from vlmscale.data import images, prepare, shards
from vlmscale.data.dataset import Dataset, open_dataset, read_manifest, verify
from vlmscale.data.prepare import prepare_dataset
from vlmscale.errors import UserError

GOOD = {"id": "good", "conversations": talk("Hello?", "Hello.")}
JPEG = encoded()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def many(count: int, folder: Path) -> tuple[Path, Path]:
    """A JSON file of records, with a picture, several or none, some not usable; and their folder."""
    files = {f"{k:02}.jpg": encoded(seed=k) for k in range(12)} | {"half.jpg": JPEG[: len(JPEG) // 2]}
    records: list[Any] = []
    for k in range(count):
        names = [f"{(k * 7 + j) % 12:02}.jpg" for j in range(k % 4)]
        if k % 9 == 5:
            names = ["half.jpg", *names]
        record = shown(f"r{k % (count - 2)}", *names, text=f"Question {k}?\u2028")
        records.append(record if k % 13 else {"id": f"bad {k}"})
    return write_records(folder / "mix.json", records), write_files(folder / "images", files)


def reasons(path: Path) -> list[dict[str, Any]]:
    """What quarantine.jsonl holds."""
    return [json.loads(line) for line in (path / "quarantine.jsonl").read_text().splitlines()]


HOSTILE: dict[str, tuple[Any, str]] = {
    "not an object": (7, "not a record: a number"),
    "no turns": ({"id": "x"}, "bad conversations: the key is missing"),
    "no placeholder": (
        {"id": "x", "image": "good.jpg", "conversations": talk("A?", "B.")},
        "image without placeholder",
    ),
    "missing": (shown("x", "absent.jpg"), "missing image: 'absent.jpg'"),
    "above": (shown("x", "good.jpg", "../secret.jpg"), "image outside folder: '../secret.jpg'"),
    "absolute": (shown("x", "/etc/hostname"), "image outside folder: '/etc/hostname' is absolute"),
    "link": (shown("x", "link.jpg"), "image outside folder: 'link.jpg' leads out"),
    "NUL": (shown("x", "a\0.jpg"), "bad image path: 'a\\x00.jpg'"),
    "surrogate": (shown("x", "\ud800.jpg"), "bad image path: '\\ud800.jpg'"),
    "surrogate id": (shown("\ud800", "good.jpg"), "bad text: half a surrogate pair"),
    "empty": (shown("x", "zero.jpg"), "unreadable image: 'zero.jpg' has zero bytes"),
    "half": (shown("x", "good.jpg", "half.jpg"), "unreadable image: 'half.jpg' truncated or damaged"),
    "page": (shown("x", "page.jpg"), "unreadable image: 'page.jpg' not a picture"),
    "bomb": (
        shown("x", "bomb.png"),
        "unreadable image: 'bomb.png' too large: 20000x20000 is 400000000 pixels, more than the limit",
    ),
    "large file": (shown("x", "good.jpg", "good.jpg"), "unreadable image: 'good.jpg' is too large, "),
    "folder": (shown("x", "sub"), "missing image: 'sub' is no file"),
}


def test_what_cannot_be_used_is_quarantined_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "good.jpg": JPEG,
        "zero.jpg": b"",
        "half.jpg": JPEG[: len(JPEG) // 2],
        "page.jpg": b"<html>404</html>",
        "bomb.png": bomb(20_000),
        "../secret.jpg": JPEG,
        "sub/other.jpg": JPEG,
    }
    folder = write_files(tmp_path / "images", files)
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    monkeypatch.setattr(shards, "RECORD_BYTES", 2 * len(JPEG) - 1)
    decoded: list[str] = []
    monkeypatch.setattr(images.PngImagePlugin.PngImageFile, "load", lambda image: decoded.append("PNG"))
    bad = [item for item, _ in HOSTILE.values()]
    first = write_records(tmp_path / "a.json", [*bad, GOOD, shown("good", "good.jpg")])
    second = write_records(tmp_path / "b.jsonl", [shown("sub", "sub/../sub/other.jpg"), bad[0], GOOD])
    manifest = prepare_dataset([first, second], folder, tmp_path / "out", workers=1, shard_records=5)
    assert decoded == []
    aside = reasons(tmp_path / "out")
    assert [(item["source"], item["index"]) for item in aside] == [
        *((str(first), index) for index in range(len(bad))),
        (str(second), 1),
    ]
    for item, (record, reason) in zip(aside, HOSTILE.values(), strict=False):
        assert item["reason"].startswith(reason)
        assert "\n" not in item["reason"]
        assert item["id"] == (record["id"] if isinstance(record, dict) else str(item["index"]))
    used = [dict(source, sha256=None) for source in manifest["sources"]]
    assert used == [
        {"file": str(first), "sha256": None, "records": len(bad) + 2, "used": 2, "quarantined": len(bad)},
        {"file": str(second), "sha256": None, "records": 3, "used": 2, "quarantined": 1},
    ]
    assert sum(manifest["quarantined"].values()) == len(bad) + 1
    assert manifest["quarantined"]["image outside folder"] == 3
    assert manifest["duplicate_ids"] == 2
    assert manifest["records"] == {"train": 4}
    assert manifest["pictures"] == {"train": 1}  # two names, the same bytes
    assert manifest["images_shown"] == {"train": 2}
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.record(number).id for number in range(4)] == ["good", "good", "sub", "good"]
    assert dataset.index.source_index.tolist() == [16, 17, 18, 20]
    assert dataset.images(2) == [JPEG]


def test_words_are_those_of_the_file(tmp_path: Path) -> None:
    leading = [{"from": "gpt", "value": "Welcome to all"}, *talk("Hi there", "Hello")]
    source = write_records(tmp_path / "a.json", [{"conversations": leading}])
    prepare_dataset([source], None, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.record(0).turns[0].question == "Hi there"
    assert dataset.index.words.tolist() == [6]


def test_a_picture_is_decoded_once_in_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "images", {"a.jpg": JPEG, "b.jpg": JPEG, "c.jpg": encoded(seed=1)})
    items = [shown(str(k), "a.jpg", "b.jpg", "c.jpg") for k in range(4)]
    seen: list[int] = []
    decode = shards.decode_image

    def counted(data: bytes) -> Any:
        seen.append(len(data))
        return decode(data)

    monkeypatch.setattr(shards, "decode_image", counted)
    source = write_records(tmp_path / "a.json", items)
    prepare_dataset([source], folder, tmp_path / "out", workers=1, shard_records=2)
    assert len(seen) == 2 * 2


def test_the_bytes_do_not_depend_on_workers_and_progress_adds_up(tmp_path: Path) -> None:
    source, folder = many(50, tmp_path)
    calls: list[tuple[str, int, int]] = []
    settings: dict[str, Any] = {"validation": 7, "seed": 3, "shard_records": 8}
    for workers in (1, 3):
        calls.clear()
        prepare_dataset(
            [source],
            folder,
            tmp_path / str(workers),
            workers=workers,
            progress=lambda *words: calls.append(words),
            **settings,
        )
        assert calls[-1] == ("preparing records", 50, 50)
        assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
        assert len(calls) == 6 + 1
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def split_of(path: Path, split: str) -> set[int]:
    """The places in the sources of a split's records, and of those set aside."""
    return set(open_dataset(path, split).index.source_index.tolist())


def test_validation_is_chosen_by_seed_alone(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.json", [GOOD | {"id": str(k)} for k in range(100)])
    chosen = []
    for seed, size in ((0, 100), (0, 7), (1, 7)):
        out = tmp_path / f"{seed}-{size}"
        settings: dict[str, Any] = {"workers": 1, "shard_records": size}
        manifest = prepare_dataset([source], None, out, validation=20, seed=seed, **settings)
        assert manifest["records"] == {"train": 80, "validation": 20}
        assert split_of(out, "train") | split_of(out, "validation") == set(range(100))
        chosen.append(split_of(out, "validation"))
    assert chosen[0] == chosen[1] != chosen[2]
    for count in (100, -1):
        with pytest.raises(UserError, match="leaves none to train on"):
            prepare_dataset([source], None, tmp_path / "x", validation=count)
    with pytest.raises(UserError, match="was prepared with 20 validation records, seed 1; use the same"):
        prepare_dataset([source], None, out, validation=20, seed=2)


# Every attempt is a process of its own, forked from one that has imported all and started no thread.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from vlmscale.data.prepare import prepare_dataset

def attempt(out, workers):
    child = os.fork()
    if child == 0:
        prepare_dataset([source], folder, out, workers=workers, validation=9, shard_records=3)
        os._exit(0)
    return child

if __name__ == "__main__":
    source, folder, base, workers = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(int(sys.argv[5]))
    assert os.waitpid(attempt(base / "whole", workers), 0)[1] == 0
    finished = lambda: len(list((base / "killed" / "partial").glob("*-*.json")))
    kills, kept, ended = int(sys.argv[6]), 0, 0
    while not ended:
        child, kept = attempt(base / "killed", workers), finished()
        wanted = kept + draw.randrange(3) if kills else sys.maxsize
        while finished() < wanted and not ended:  # a fast one may be done before it is killed
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if ended:
            assert status == 0
            break
        time.sleep(draw.uniform(0, 0.002))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] in (signal.SIGKILL, 0)
        kills -= 1
    assert kills <= int(sys.argv[6]) // 2, "it was over before it was killed"
    print(kept)
"""


@pytest.mark.parametrize("workers, kills", [(1, 12), (2, 4)])
def test_killed_and_taken_up_again_gives_the_same_bytes(workers: int, kills: int, tmp_path: Path) -> None:
    source, folder = many(90, tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = [sys.executable, str(script), str(source), str(folder), str(tmp_path)]
    words += [str(workers), "0", str(kills)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1  # shards that were kept to the end
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 7 + 27 + 3


class _StopError(Exception):
    """Stands for a kill."""


def test_killed_between_any_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each rename once, those of the last step included."""
    source, folder = many(12, tmp_path)
    settings: dict[str, Any] = {"workers": 1, "shard_records": 4, "validation": 3}
    prepare_dataset([source], folder, tmp_path / "whole", **settings)
    whole, real, left = contents(tmp_path / "whole"), Path.replace, [0]

    def replace(path: Path, target: Path) -> Path:
        if not left[0]:
            raise _StopError
        left[0] -= 1
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    for number in range(100):
        out, left[0] = tmp_path / f"killed-{number}", number
        with contextlib.suppress(_StopError):
            prepare_dataset([source], folder, out, **settings)
        if left[0]:
            break
        left[0] = 100
        prepare_dataset([source], folder, out, **settings)
        assert contents(out) == whole
    assert number == 1 + 4 * 2 + 2 + 4 + 3 + 1  # plan, shards, indices, names, the rest, all done


def test_a_picture_that_changes_before_the_end_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "images", {"a.jpg": JPEG})
    source = write_records(tmp_path / "a.json", [shown("a", "a.jpg"), shown("b", "b.jpg"), GOOD])

    def stop(*_: object) -> None:
        raise _StopError

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finish", stop)
        with pytest.raises(_StopError):
            prepare_dataset([source], folder, tmp_path / "out", workers=1, shard_records=1)
    finished = contents(tmp_path / "out" / "partial")
    assert len(finished) == 8
    write_files(folder, {"a.jpg": encoded(seed=9), "b.jpg": JPEG})
    done: list[int] = []
    progress = lambda what, count, total: done.append(count)  # noqa: E731
    settings: dict[str, Any] = {"workers": 1, "shard_records": 1}
    manifest = prepare_dataset([source], folder, tmp_path / "out", progress=progress, **settings)
    assert done == [2, 3]  # the shard of text alone was kept
    assert manifest["records"] == {"train": 3}
    assert open_dataset(tmp_path / "out").images(0) == [encoded(seed=9)]


def test_the_same_again_returns_at_once_and_others_are_refused(tmp_path: Path) -> None:
    source, folder = many(20, tmp_path)
    out = tmp_path / "out"
    manifest = prepare_dataset([source], folder, out)
    before = contents(out)
    assert prepare_dataset([source], folder, out) == manifest
    os.utime(folder / "01.jpg", ns=(1, 1))  # another time, the same bytes
    assert prepare_dataset([source], folder, out) == manifest
    assert contents(out) == before
    other = write_records(tmp_path / "other.json", [GOOD])
    with pytest.raises(UserError, match=rf"{out}: holds other data, prepared from {source}; choose another"):
        prepare_dataset([other], folder, out)
    with pytest.raises(UserError, match="holds other data"):
        prepare_dataset([source, other], folder, out)
    (out / "pictures.npz").write_bytes(before["pictures.npz"][:100])
    with pytest.raises(UserError, match=r"pictures\.npz: cannot be read"):
        prepare_dataset([source], folder, out)
    with pytest.raises(UserError, match="at least one, and none of them twice"):
        prepare_dataset([source, source], folder, tmp_path / "twice")
    with pytest.raises(UserError, match="at least one"):
        prepare_dataset([], folder, tmp_path / "none")


CHANGES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "other bytes": ({"03.jpg": encoded(seed=99)}, "'03.jpg' changed in"),
    "same size": ({"03.jpg": bytes([*encoded(seed=3)[:-1], 0])}, "'03.jpg' changed in"),
    "gone": ({"05.jpg": None}, "'05.jpg' changed in"),
    "mended": ({"half.jpg": JPEG}, "'half.jpg' changed in"),
    "there now": ({"absent.jpg": JPEG}, "'absent.jpg' appeared in"),
    "two": ({"03.jpg": b"", "05.jpg": b""}, "'03.jpg' and 1 more pictures changed in"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_picture_changed_after_preparation_is_noticed(case: str, tmp_path: Path) -> None:
    source, folder = many(20, tmp_path)
    extra = write_records(tmp_path / "extra.json", [shown("x", "absent.jpg")])
    prepare_dataset([source, extra], folder, tmp_path / "out")
    changes, message = CHANGES[case]
    for name, data in changes.items():
        (folder / name).unlink(missing_ok=True)
        if data is not None:
            write_files(folder, {name: data})
    with pytest.raises(UserError) as caught:
        prepare_dataset([source, extra], folder, tmp_path / "out")
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_folder_that_is_named_late_is_noticed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "images", {"a.jpg": JPEG})
    source = write_records(tmp_path / "a.json", [GOOD, shown("x", "a.jpg")])
    for first, second, message in (
        (None, folder, f"appeared in {folder}"),
        (folder, None, r"changed \(no image folder is named"),
    ):
        out = tmp_path / str(first is None)
        prepare_dataset([source], first, out)
        with pytest.raises(UserError, match=f"'a.jpg' {message}"):
            prepare_dataset([source], second, out)


def test_an_unfinished_preparation_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_records(tmp_path / "a.json", [GOOD])
    other = write_records(tmp_path / "b.json", [GOOD, GOOD])

    def stop(*_: object) -> None:
        raise _StopError

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finish", stop)
        with pytest.raises(_StopError):
            prepare_dataset([source], None, tmp_path / "out")
    for sources, seed in (([other], 0), ([source], 1)):
        with pytest.raises(
            UserError, match="an unfinished preparation of other sources or settings is there"
        ):
            prepare_dataset(sources, None, tmp_path / "out", seed=seed)
    prepare_dataset([source], None, tmp_path / "out")


def test_only_one_prepares_a_directory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_records(tmp_path / "a.json", [GOOD])
    real, seen = prepare.finish, []

    def finish(*words: Any) -> Any:
        with pytest.raises(UserError, match="another process is preparing it; wait for it to end") as caught:
            prepare_dataset([source], None, tmp_path / "out")
        seen.append(caught)
        return real(*words)

    monkeypatch.setattr(prepare, "finish", finish)
    prepare_dataset([source], None, tmp_path / "out")
    assert len(seen) == 1


def test_nothing_usable_names_up_to_five_reasons_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.json", [shown("x", "a.jpg"), *[{"id": "x"}] * 6])
    with pytest.raises(UserError) as caught:
        prepare_dataset([source], tmp_path, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(
        f"{source}: none of its 7 records can be used: record 0 (id 'x'): missing image: "
    )
    assert message.endswith("; and 2 more")
    assert "\n" not in message
    assert contents(tmp_path / "out") == {}
    write_records(source, [GOOD])
    prepare_dataset([source], tmp_path, tmp_path / "out")


def test_pictures_without_a_folder_and_folders_that_are_none(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.json", [GOOD, shown("x", "a.jpg")])
    prepare_dataset([source], None, tmp_path / "out")
    assert reasons(tmp_path / "out")[0]["reason"].startswith("no image folder: 'a.jpg' is named")
    for folder in (tmp_path / "absent", source):
        with pytest.raises(UserError, match="no such folder; name the one"):
            prepare_dataset([source], folder, tmp_path / "other")
    with pytest.raises(UserError, match="no such file"):
        prepare_dataset([tmp_path / "absent.json"], None, tmp_path / "other")
    with pytest.raises(UserError, match="output directory"):
        prepare_dataset([source], None, source / "below")
    assert not (tmp_path / "other").exists()


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_told_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "images", {"large.jpg": JPEG + b"\0" * 5_000_000})
    source = write_records(
        tmp_path / "a.json", [shown("a", "large.jpg", "large.jpg"), shown("b", "large.jpg")]
    )
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda path: Usage(0, 0, 5_500_000))
        with pytest.raises(UserError) as caught:
            prepare_dataset([source], folder, tmp_path / "out")
        needed = -(-3 * 5_000_000 // 2**20)
        told = [int(word) for word in str(caught.value).split() if word.isdigit()]
        assert needed <= told[0] <= needed + 2
        assert told[1] == 6
        assert "make room, or choose another directory" in str(caught.value)
        assert not list((tmp_path / "out").rglob("*.array_record*"))
    prepare_dataset([source], folder, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_finished_shards_are_kept(
    workers: int, mount: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room goes away after it was checked; with room again, only what is missing is done."""
    source, folder = many(60, tmp_path)
    small_disk = mount("3m")
    out = small_disk / "out"
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: Usage(0, 0, 2**40))
    (small_disk / "filler").write_bytes(b"x" * 2_200_000)
    with pytest.raises(UserError) as caught:
        prepare_dataset([source], folder, out, shard_records=4, workers=workers)
    assert str(caught.value).startswith(f"{out}")
    assert "No space left on device; finished shards are kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = contents(out / "partial")
    assert [name for name in kept if name.endswith(".array_record")]
    assert not [name for name in kept if name.endswith(".tmp")]
    (small_disk / "filler").unlink()
    done: list[int] = []
    prepare_dataset(
        [source],
        folder,
        out,
        shard_records=4,
        workers=workers,
        progress=lambda what, count, total: done.append(count),
    )
    assert len(done) == 15 - len(
        [name for name in kept if name.startswith("train") and name.endswith("json")]
    )
    prepare_dataset([source], folder, tmp_path / "whole", shard_records=4, workers=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_records(tmp_path / "a.json", [GOOD] * 3)
    real = prepare._write_shards

    def changed(*words: Any) -> None:
        source.write_text("[" + "x" * 1000 + "]")
        real(*words)

    monkeypatch.setattr(prepare, "_write_shards", changed)
    with pytest.raises(UserError, match=r"a\.json: changed while it was read; run again"):
        prepare_dataset([source], None, tmp_path / "out")


def test_a_copy_is_as_good(tmp_path: Path) -> None:
    source, folder = many(30, tmp_path)
    prepare_dataset([source], folder, tmp_path / "out", workers=1, shard_records=8)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    copy = open_dataset(tmp_path / "copy")
    assert (
        verify(copy, lambda what, done, total: None)
        == len(copy)
        == read_manifest(copy.path)["records"]["train"]
    )
    assert copy == Dataset(tmp_path / "copy", "train")


def test_a_wrong_image_folder_is_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    source = write_records(tmp_path / "a.json", [GOOD, *(shown(str(n), f"{n}.jpg") for n in range(20))])
    for folder, message in (
        (tmp_path / "wrong", f"is in {tmp_path / 'wrong'}"),
        (None, "no folder was given"),
    ):
        with pytest.raises(UserError, match=f"none of the 20 images .*'0.jpg'.*{message}"):
            prepare_dataset([source], folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_files(tmp_path / "wrong", {"7.jpg": JPEG})
    assert prepare_dataset([source], tmp_path / "wrong", tmp_path / "out")["records"] == {"train": 2}
