"""Checkpoints in a bucket: bit for bit on another mesh, and never from a damaged or unfinished step."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_checkpoint import Items, Lines, abstract_of, make_items, mesh_of, same
from vlmscale.bucket import Bucket
from vlmscale.errors import UserError
from vlmscale.records import ADDRESS
from vlmscale.train.checkpoint import Checkpoints, DamagedError

COMMITTED = "commit_success.txt"


def saved(address: str, *steps: int, keep: int = 2, **options: Any) -> dict[int, Items]:
    """Save steps, each with values of its own, and close."""
    made = {step: make_items(step) for step in steps}
    checkpoints = Checkpoints(address, keep, **options)
    for step, items in made.items():
        checkpoints.save(step, items)
    checkpoints.close()
    return made


def folders(address: str) -> list[str]:
    return sorted({name.partition("/")[0] for name in Bucket(address).entries()})


def array_of(place: Bucket, step: int) -> str:
    """The largest object of a step, which holds values of arrays."""
    found = place.entries(f"{step}/params/")
    return max(found, key=lambda name: found[name].size)


def flip(place: Bucket, step: int) -> None:
    name = array_of(place, step)
    content = bytearray(place.read(name))
    content[len(content) // 2] ^= 4
    place.write(name, bytes(content))


def cut(place: Bucket, step: int) -> None:
    name = array_of(place, step)
    place.write(name, place.read(name)[:-1])


def lose(place: Bucket, step: int) -> None:
    place.delete(array_of(place, step))


def garble(place: Bucket, step: int) -> None:
    place.write(f"{step}/manifest.json", b"{")


def test_the_last_steps_stay_and_restore_onto_another_mesh(bucket: str, tmp_path: Path) -> None:
    made = saved(bucket, 1, 2, 3)
    assert folders(bucket) == ["2", "3"]
    (tmp_path / ADDRESS).write_text(bucket + "\n")
    checkpoints = Checkpoints.of(tmp_path, read_only=True)
    assert (str(checkpoints.path), checkpoints.steps()) == (bucket, [2, 3])
    for mesh in (mesh_of((8, 1, 1)), mesh_of((2, 2, 2)), mesh_of((1, 1, 1))):
        found = checkpoints.restore_latest(abstract_of(made[3], mesh))
        assert found is not None
        assert found[0] == 3
        assert same(found[1], made[3])
    only = {"params": abstract_of(made[2])["params"]}
    assert same(checkpoints.restore(2, only)["params"], made[2]["params"])
    with pytest.raises(UserError, match="there is no step 9"):
        checkpoints.restore(9, only)
    checkpoints.close()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [(flip, "has changed"), (cut, "bytes of"), (lose, "is missing"), (garble, "manifest.json is unreadable")],
)
def test_a_damaged_step_is_set_aside(
    damage: Callable[[Bucket, int], None], fault: str, bucket: str, tmp_path: Path
) -> None:
    made, place, lines = saved(bucket, 1, 2), Bucket(bucket), Lines()
    damage(place, 2)
    reader = Checkpoints(bucket, tell=lines.append, read_only=True)
    assert reader.steps() == [1]
    assert f"{bucket}: step 2 is damaged (" in lines.one()
    assert fault in lines.one()
    assert folders(bucket) == ["1", "2"]
    with pytest.raises(DamagedError):
        reader.restore(2, abstract_of(made[2]))
    reader.close()
    lines.clear()
    checkpoints = Checkpoints(bucket, tell=lines.append)
    assert lines.one().endswith("set aside as damaged-2; training goes on from step 1")
    found = checkpoints.restore_latest(abstract_of(made[1]))
    assert found is not None
    assert same(found[1], made[1])
    checkpoints.save(2, made[2])  # the same number again
    checkpoints.close()
    assert folders(bucket) == ["1", "2", "damaged-2"]
    assert checkpoints.steps() == [1, 2]


def test_a_step_that_was_not_finished_is_none(bucket: str) -> None:
    saved(bucket, 1, 2)
    place = Bucket(bucket)
    place.delete(f"2/{COMMITTED}")  # as a killed save, or a killed deletion, leaves it
    reader = Checkpoints(bucket, read_only=True)
    assert reader.steps() == [1]
    reader.close()
    checkpoints = Checkpoints(bucket, tell=(lines := Lines()).append)
    assert (folders(bucket), lines) == (["1"], [])
    checkpoints.save(2, make_items(2))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_what_has_to_come_before_a_step_comes_before_it(bucket: str) -> None:
    seen: list[list[str]] = []

    def before() -> None:
        seen.append(sorted(name for name in Bucket(bucket).entries() if name.endswith(COMMITTED)))
        if len(seen) == 2:
            raise OSError(errno.EIO, "the bucket is away")

    checkpoints = Checkpoints(bucket, before=before)
    checkpoints.save(1, make_items(1))
    checkpoints.save(2, make_items(2))
    with pytest.raises(Exception, match="the bucket is away"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_items(2))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert [f"1/{COMMITTED}" in names for names in seen] == [False, True, True]


def test_a_copy_on_a_disk_is_whole(bucket: str, tmp_path: Path) -> None:
    """As `gcloud storage cp -r` makes it: how a model that was trained on TPUs comes home."""
    made, place = saved(bucket, 5), Bucket(bucket)
    for name in place.entries():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(place.read(name))
    told: Lines = []
    checkpoints = Checkpoints(tmp_path, tell=told.append)
    found = checkpoints.restore_latest(abstract_of(made[5], mesh_of((2, 2, 2))))
    assert not told
    assert found is not None
    assert found[0] == 5
    assert same(found[1], made[5])
    checkpoints.close()
    part = next(path for path in (tmp_path / "5" / "params").rglob("*") if path.is_file())
    part.write_bytes(part.read_bytes() + b"x")
    assert Checkpoints(tmp_path, read_only=True, tell=told.append).latest() is None
    assert "is damaged" in told[0]
