"""Objects of a bucket, on an emulator: conditions, pages, and what is said where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlmscale.bucket import ABSENT, Bucket, at_once, md5_of
from vlmscale.errors import UserError


def test_a_write_is_refused_unless_the_object_is_as_it_was_seen(bucket: str) -> None:
    place = Bucket(bucket)
    first = place.write("a/b c.txt", b"one", ABSENT)
    with pytest.raises(FileExistsError):
        place.write("a/b c.txt", b"two", ABSENT)
    second = place.write("a/b c.txt", b"two", first.generation)
    with pytest.raises(FileExistsError):
        place.write("a/b c.txt", b"three", first.generation)
    assert place.read("a/b c.txt") == b"two"
    assert place.look("a/b c.txt") == second != first
    assert place.read("a/b c.txt", 1) == b"wo"
    assert (place / "a").entries() == {"b c.txt": second}
    place.delete("a/b c.txt")
    place.delete("a/b c.txt")
    assert place.look("a/b c.txt") is None
    with pytest.raises(FileNotFoundError):
        place.read("a/b c.txt")
    assert place.write("empty", b"").size == 0
    assert place.read("empty") == b""


def test_files_of_any_size_come_back_as_they_were(bucket: str, tmp_path: Path) -> None:
    place = Bucket(bucket)
    for number, size in enumerate((0, 1000, 9_000_000)):
        path = tmp_path / str(number)
        path.write_bytes(bytes(range(256)) * (size // 256))
        place.upload(path.name, path)
        entry = place.look(path.name)
        assert entry is not None
        assert entry.checksums[1] == md5_of(path)
        place.download(path.name, tmp_path / "back" / path.name, entry.size)
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(FileNotFoundError):
        place.download("none", tmp_path / "back" / "none", 1)
    assert len(list((tmp_path / "back").iterdir())) == 3


def test_a_listing_takes_a_request_for_each_thousand(bucket: str, bucket_requests: list[str]) -> None:
    place = Bucket(bucket)
    at_once(lambda number: place.write(f"cells/{number:04d}/status.json", b"{}"), range(1001))
    place.write("cells/0000/checkpoints/1/deep", b"")
    bucket_requests.clear()
    assert len(place.entries("cells/")) == 1002
    assert len(bucket_requests) == 2
    assert len(place.entries(pattern="cells/*/*")) == 1001
    assert list(place.entries("cells/0007/")) == ["cells/0007/status.json"]
    assert at_once(place.read, place.entries(pattern="cells/000*/*")) == [b"{}"] * 10


@pytest.mark.parametrize("address", ["gs://", "gs:///x", "gs://b/a*", "gs://b//x", "s3://b/x", "runs/x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="give gs://BUCKET/PATH"):
        Bucket(address)


def test_a_bucket_that_is_not_there_is_said_so(bucket: str) -> None:
    with pytest.raises(UserError, match="gs://nowhere/x: there is no bucket nowhere"):
        Bucket("gs://nowhere/x").entries()


def test_without_gcsfs_one_line_says_what_to_install() -> None:
    code = """
import sys
sys.modules["gcsfs"] = None
from vlmscale.bucket import Bucket
from vlmscale.errors import UserError
try:
    Bucket("gs://bucket/x")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "gs://bucket/x: gs:// needs gcsfs; pip install 'vlmscale[gcs]'\n"
