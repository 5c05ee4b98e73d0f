"""Checkpoints: bit for bit on any mesh, never from a damaged or unfinished step, and on after a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.integration.processes import ROOT, at_work, free_port, told
from tests.integration.tiny import wait_for
from vlmscale.errors import UserError, disk_fault
from vlmscale.sharding import AXES, make_mesh
from vlmscale.train import checkpoint
from vlmscale.train import steps as places
from vlmscale.train.checkpoint import Checkpoints, DamagedError
from vlmscale.train.steps import MANIFEST

Items = dict[str, Any]
Mount = Callable[[str], Path]
SECONDS = 150  # for two processes together
MESHES = {"8": (8, 1, 1), "4": (4, 1, 1), "1": (1, 1, 1), "2,2,2": (2, 2, 2), "fsdp": (1, 8, 1)}
FLIPPED = 0x04  # the bit of a byte that is turned over


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def spread(items: Items, mesh: Mesh, first: str = "tensor") -> Any:
    """Shardings: the leading axis over the whole mesh where it divides."""
    axes = (first, *(axis for axis in AXES if axis != first))

    def one(leaf: Any) -> NamedSharding:
        split = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec(axes if split else None) if split else PartitionSpec())

    return jax.tree.map(one, items)


def abstract_of(items: Items, mesh: Mesh | None = None, first: str = "tensor") -> Items:
    """What to ask for: the shapes of `items` on a mesh, by default where they are."""
    places = jax.tree.map(lambda leaf: leaf.sharding, items) if mesh is None else spread(items, mesh, first)
    return jax.tree.map(lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), items, places)


def make_items(seed: int = 0, width: int = 24, mesh: Mesh | None = None) -> Items:
    """Parameters and an optimiser's state after a few steps, as training has them; no two seeds agree."""
    rng = np.random.default_rng(seed)
    odd = np.array([-0.0, np.inf, 1e-42, 7.0], np.float32).view(np.uint32)
    odd = np.concatenate([odd, np.array([0x7FC01234, 0xFF800001], np.uint32)]).view(np.float32)  # payloads
    params = {
        "decoder": {
            "kernel": rng.standard_normal((width, 16)).astype(np.float32),
            "scale": jnp.asarray(rng.standard_normal(width), jnp.bfloat16),
            "blocks": [rng.standard_normal((3, 8)).astype(np.float32), np.int32(seed)],
        },
        "odd": odd,
        "frozen": rng.standard_normal(5).astype(np.float32),
    }
    params = jax.tree.map(jnp.asarray, params)
    labels = {"decoder": "trained", "odd": "trained", "frozen": "frozen"}
    parts = {"trained": optax.adamw(1e-3, mu_dtype=jnp.bfloat16), "frozen": optax.set_to_zero()}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, labels))
    state = optimizer.init(params)
    state = jax.tree.map(lambda x: jnp.asarray(99 * rng.standard_normal(x.shape), x.dtype), state)
    items = {"params": params, "opt_state": state, "count": {"skipped": jnp.int32(seed + 5)}, "extra": {}}
    return jax.tree.map(  # also on a mesh of several processes
        lambda value, on: jax.make_array_from_callback(value.shape, on, lambda index: value[index]),
        jax.tree.map(np.asarray, items),
        spread(items, mesh or mesh_of((8, 1, 1))),
    )


def same(restored: Any, items: Any) -> bool:
    """Equal in structure, types of nodes included, dtypes and bits."""
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(items), strict=True)
    return jax.tree.structure(restored) == jax.tree.structure(items) and all(
        one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
        for one, other in pairs
    )


class Lines(list[str]):
    """What was told."""

    def one(self) -> str:
        assert len(self) == 1, self
        assert "\n" not in self[0]
        return self[0]


@pytest.fixture
def open_all() -> Iterator[Callable[..., Checkpoints]]:
    """A function that opens folders, which are closed behind the test, failed or not."""
    opened: list[Checkpoints] = []

    def make(folder: Path, **options: Any) -> Checkpoints:
        opened.append(Checkpoints(folder, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


Open = Callable[..., Checkpoints]


def saved(folder: Path, *steps: int, keep: int = 2, width: int = 24) -> dict[int, Items]:
    """Save steps, each with values of its own, and close."""
    made = {step: make_items(step, width) for step in steps}
    checkpoints = Checkpoints(folder, keep)
    for step, items in made.items():
        checkpoints.save(step, items)
    checkpoints.close()
    return made


def arrays_file(folder: Path, item: str) -> Path:
    """The largest file with arrays of an item."""
    return max((folder / item / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path, share: float = 0.5) -> None:
    """Turn one bit over in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= FLIPPED
    path.write_bytes(bytes(content))


def check_latest(checkpoints: Checkpoints, step: int, items: Items, abstract: Items | None = None) -> None:
    """The newest step that restores is this one, with these values."""
    found = checkpoints.restore_latest(abstract_of(items) if abstract is None else abstract)
    assert found is not None
    assert found[0] == step
    assert same(found[1], items)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trips


@pytest.mark.parametrize("target", MESHES)
def test_bits_and_types_come_back_on_any_mesh(target: str, tmp_path: Path, open_all: Open) -> None:
    made = saved(tmp_path, 3)[3]
    abstract = abstract_of(made, mesh_of(MESHES[target]), first="data")
    restored = open_all(tmp_path).restore(3, abstract)
    assert same(restored, made)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding
    assert isinstance(restored["opt_state"][0], optax.EmptyState)
    assert restored["extra"] == {}


def test_items_are_restored_apart(tmp_path: Path, open_all: Open) -> None:
    made = saved(tmp_path, 1)[1]
    abstract = abstract_of(made)
    checkpoints = open_all(tmp_path)
    for name in made:
        assert same(checkpoints.restore(1, {name: abstract[name]}), {name: made[name]})
    check_latest(checkpoints, 1, {"params": made["params"]}, {"params": abstract["params"]})


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path, open_all: Open) -> None:
    grow = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    items = {"params": {"w": jnp.zeros((64, 1024))}}
    abstract = abstract_of(items)
    checkpoints = open_all(tmp_path, keep=5)
    for step in range(5):
        checkpoints.save(step, items)
        items = grow(grow(items))
    for step in range(5):
        assert (checkpoints.restore(step, abstract)["params"]["w"] == 2 * step).all()


def test_the_folder_is_a_plain_one_of_orbax(tmp_path: Path) -> None:
    made = saved(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "damaged-2")
    manager = ocp.CheckpointManager(tmp_path)
    assert manager.all_steps() == [1]
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_of(made[1])["params"]))
    assert same(manager.restore(1, args=args)["params"], made[1]["params"])
    manager.close()


def test_steps_and_names(tmp_path: Path, open_all: Open) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert not Checkpoints.any_in(folder)
    checkpoints = open_all(folder)
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
    assert checkpoints.restore_latest(abstract_of(make_items())) is None
    assert not folder.exists()
    with pytest.raises(UserError, match=r"there is no step 4; there are \[\]"):
        checkpoints.restore(4, abstract_of(make_items()))
    checkpoints.save(12, make_items())
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.latest()) == ([12], 12)
    assert Checkpoints.any_in(folder)
    with pytest.raises(ValueError, match="step 12 is there already"):
        checkpoints.save(12, make_items())
    with pytest.raises(ValueError, match="no array to save"):
        checkpoints.save(13, {"params": {}, "opt_state": optax.EmptyState()})
    shutil.rmtree(folder)
    (folder / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "damaged-6").mkdir()
    assert not Checkpoints.any_in(folder)


# Damage


def test_orbax_alone_returns_other_values_from_a_flipped_bit(tmp_path: Path) -> None:
    """Why arrays have digests; should this fail one day, Orbax checks its files itself."""
    made = saved(tmp_path, 1, width=4096)[1]
    flip(arrays_file(tmp_path / "1", "params"))
    handler = ocp.StandardCheckpointHandler()
    found = handler.restore(
        tmp_path / "1" / "params", args=ocp.args.StandardRestore(abstract_of(made)["params"])
    )
    assert not same(found, made["params"])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "cut to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": flip,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_when_the_folder_is_opened(damage: str, tmp_path: Path) -> None:
    saved(tmp_path / "made", 1, 2)
    files = [path.relative_to(tmp_path / "made") for path in (tmp_path / "made" / "2").rglob("*/*")]
    files = [path for path in files if (tmp_path / "made" / path).is_file()]
    assert len(files) > 20
    for file in files:
        folder = tmp_path / "copy"
        shutil.copytree(tmp_path / "made", folder)
        DAMAGES[damage](folder / file)
        lines = Lines()
        checkpoints = Checkpoints(folder, tell=lines.append)
        assert checkpoints.steps() == [1], file
        assert names(folder) == ["1", "damaged-2"]
        line = lines.one()
        assert line.startswith(f"{folder}: step 2 is damaged ({file.relative_to('2').as_posix()} ")
        assert line.endswith(" and set aside as damaged-2; training goes on from step 1")
        checkpoints.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("item", ["params", "opt_state"])
@pytest.mark.parametrize("damage", ["flipped", "zeroed"])
def test_damage_to_large_files_is_found_by_their_arrays(
    item: str, damage: str, tmp_path: Path, open_all: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is small here: only sizes, and what is restored, can tell."""
    monkeypatch.setattr(places, "_SMALL", -1)
    made = saved(tmp_path, 4, 8, width=4096)
    DAMAGES[damage](arrays_file(tmp_path / "8", item))
    lines = Lines()
    checkpoints = open_all(tmp_path, tell=lines.append)
    assert (checkpoints.steps(), lines) == ([4, 8], [])
    with pytest.raises(DamagedError, match="step 8 is damaged"):
        checkpoints.restore(8, abstract_of(made[8]))
    assert (checkpoints.steps(), lines) == ([4, 8], [])
    check_latest(checkpoints, 4, made[4], abstract_of(made[8], mesh_of((4, 1, 1))))
    assert "set aside as damaged-8; training goes on from step 4" in lines.one()
    if damage == "flipped":
        assert f"({item}/" in lines.one()
        assert "has other values than were saved" in lines.one()
    checkpoints.save(8, made[8])  # the same number again
    checkpoints.wait()
    check_latest(checkpoints, 8, made[8])
    assert names(tmp_path) == ["4", "8", "damaged-8"]


def test_without_a_good_step_training_begins_again(tmp_path: Path, open_all: Open) -> None:
    made = saved(tmp_path, 5, 6)
    checkpoints, lines = open_all(tmp_path, tell=(lines := Lines()).append), lines
    for step in (5, 6):  # under the eyes of an open folder
        (tmp_path / str(step) / "params" / "_METADATA").unlink()
    assert checkpoints.restore_latest(abstract_of(made[6])) is None
    assert [line.split(": ")[1].split(" is")[0] for line in lines] == ["step 5", "step 6"]
    assert lines[0].endswith("set aside as damaged-5; no good step is left")
    checkpoints.save(5, made[5])
    checkpoints.wait()
    (tmp_path / "5" / MANIFEST).write_text("{")
    again = open_all(tmp_path, tell=(lines := Lines()).append)
    assert again.steps() == []
    assert "step 5 is damaged (manifest.json is unreadable)" in lines.one()
    assert names(tmp_path) == ["damaged-5", "damaged-6"]  # one of a number


def test_a_step_without_a_manifest_counts_as_long_as_it_restores(tmp_path: Path, open_all: Open) -> None:
    made = saved(tmp_path, 1, 2, 3, 4, keep=4, width=4096)
    for step in (2, 3, 4):
        (tmp_path / str(step) / MANIFEST).unlink()
    os.truncate(arrays_file(tmp_path / "3", "params"), 10)
    shutil.rmtree(tmp_path / "4")
    (tmp_path / "4").mkdir()
    lines = Lines()
    checkpoints = open_all(tmp_path, tell=lines.append)
    assert "step 4 is damaged (it is empty)" in lines.one()
    lines.clear()
    check_latest(checkpoints, 2, made[2])
    assert lines.one().startswith(f"{tmp_path}: step 3 is damaged (unreadable: ")
    assert lines.one().endswith("set aside as damaged-3; training goes on from step 2")


def test_read_only_changes_nothing(tmp_path: Path, open_all: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_SMALL", -1)
    made = saved(tmp_path, 1, 2, 3, keep=3, width=4096)
    (tmp_path / "3" / "params" / "_METADATA").unlink()
    flip(arrays_file(tmp_path / "2", "params"))
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    lines = Lines()
    checkpoints = open_all(tmp_path, tell=lines.append, read_only=True)
    assert checkpoints.steps() == [1, 2]
    found = checkpoints.restore_latest({"params": abstract_of(made[1])["params"]})
    assert found is not None
    assert found[0] == 1
    assert same(found[1]["params"], made[1]["params"])
    assert checkpoints.latest() == 1
    assert [line.rpartition("; ")[2] for line in lines] == [
        "the newest good one is step 2",
        "the newest good one is step 1",
    ]
    with pytest.raises(ValueError, match="read only"):
        checkpoints.save(5, made[1])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EACCES, "Permission denied", "x")])
def test_what_the_files_are_not_to_blame_for_sets_nothing_aside(
    error: Exception, tmp_path: Path, open_all: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(tmp_path, 1, 2)
    checkpoints = open_all(tmp_path, tell=(lines := Lines()).append)

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("reading failed") from error

    with monkeypatch.context() as patched:
        patched.setattr(ocp.StandardCheckpointHandler, "restore", fail)
        with pytest.raises(ValueError, match="reading failed"):
            checkpoints.restore_latest(abstract_of(made[2]))
    nowhere = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made[2])
    with pytest.raises(AttributeError):
        checkpoints.restore_latest(nowhere)
    assert (checkpoints.steps(), lines) == ([1, 2], [])


# Other parameters


def test_other_parameters_are_one_line(tmp_path: Path, open_all: Open) -> None:
    made = saved(tmp_path, 1, 2)[2]
    checkpoints = open_all(tmp_path, tell=(lines := Lines()).append)

    def refused(item: str, change: Callable[[Items], Any]) -> str:
        abstract = abstract_of(made)
        change(abstract[item])
        with pytest.raises(UserError, match="holds other parameters than this version") as caught:
            checkpoints.restore_latest({item: abstract[item]})
        assert type(caught.value) is UserError
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path}: its checkpoint")
        return str(caught.value).partition("(")[2].partition(")")[0]

    def other(**changes: Any) -> Callable[[Items], None]:
        def change(params: Items) -> None:
            leaf = params["frozen"]
            new = {"shape": leaf.shape, "dtype": leaf.dtype} | changes
            params["frozen"] = jax.ShapeDtypeStruct(**new, sharding=leaf.sharding)

        return change

    known = "params/frozen is float32[5] there and"
    assert refused("params", lambda tree: tree.pop("frozen")) == f"{known} missing here"
    assert refused("params", other(dtype=jnp.bfloat16)) == f"{known} bfloat16[5] here"
    assert refused("params", other(shape=(6,))) == f"{known} float32[6] here"
    rename = refused("params", lambda tree: tree.update(weight=tree.pop("frozen")))
    assert rename == f"{known} missing here"
    new = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.tree.leaves(made)[0].sharding)
    assert refused("extra", lambda tree: tree.update(n=new)) == "extra/n is missing there and int32[] here"
    assert refused("count", dict.clear) == "count/skipped is int32[] there and missing here"
    with pytest.raises(UserError, match=r"ema/n is missing there and int32\[\] here"):
        checkpoints.restore(2, {"ema": {"n": new}})
    assert (checkpoints.steps(), lines) == ([1, 2], [])


# Kills

# Saves step 1, then step 2 with a kill somewhere on the way.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests.train.test_checkpoint import make_items
from vlmscale.train import checkpoint, steps
folder, moment = Path(sys.argv[1]), sys.argv[2]

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(step, do):
    def call(*arguments, **options):
        if (folder / str(step)).exists():
            killed()
        return do(*arguments, **options)
    return call

if moment == "manifest":
    steps.write_json = after(1, steps.write_json)
if moment == "rename":
    steps._checksum = lambda path, do=steps._checksum, **options: (
        killed() if path.name == "manifest.json" and (folder / "1").exists() else do(path, **options))
if moment == "deletion":
    shutil.rmtree = after(2, shutil.rmtree)
checkpoints = checkpoint.Checkpoints(folder, keep=1)
checkpoints.save(1, make_items(1))
checkpoints.wait()
checkpoints.save(2, make_items(2, width=2**18 if moment == "arrays" else 24))
if moment == "arrays":
    while not any((folder / "2.orbax-checkpoint-tmp").rglob("ocdbt.process_0/d/*")):
        pass
    killed()
checkpoints.wait()
"""


@pytest.mark.parametrize("moment", ["arrays", "manifest", "rename", "deletion"])
def test_a_killed_save_leaves_no_step_and_no_rubbish(moment: str, tmp_path: Path, open_all: Open) -> None:
    log = tmp_path / "log"
    folder = tmp_path / "checkpoints"
    with log.open("wb") as outputs:
        words = [sys.executable, "-c", KILLED, str(folder), moment]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(words, stdout=outputs, stderr=outputs, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL, log.read_text()
    step = 2 if moment == "deletion" else 1
    leftovers = {"deletion": ["2", "old-1.orbax-checkpoint-tmp"]}.get(moment, ["1", "2.orbax-checkpoint-tmp"])
    assert names(folder) == leftovers
    assert (folder / leftovers[1] / MANIFEST).exists() == (moment in ("rename", "deletion"))
    lines = Lines()
    checkpoints = open_all(folder, tell=lines.append)
    assert (names(folder), lines) == ([str(step)], [])
    check_latest(checkpoints, step, make_items(step))


# Retention


def test_the_last_good_steps_stay_until_the_next_is_on_disk(
    tmp_path: Path, open_all: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, gate, reached = Checkpoints._seal, threading.Event(), threading.Event()

    def slow(self: Checkpoints) -> None:
        reached.set()
        assert gate.wait(60)
        if self._saving[0] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(self)

    saved(tmp_path, 1, 2)
    monkeypatch.setattr(Checkpoints, "_seal", slow)
    checkpoints = open_all(tmp_path)
    for step, left in ((3, [2, 3]), (4, [2, 3]), (5, [3, 5])):
        gate.clear()
        reached.clear()
        before = checkpoints.steps()
        checkpoints.save(step, make_items(step))
        assert reached.wait(60)  # all is written but the step's name
        assert checkpoints.steps() == before
        gate.set()
        if step == 4:
            with pytest.raises(OSError, match="No space left"):
                checkpoints.wait()
        else:
            checkpoints.wait()
        assert checkpoints.steps() == left
    assert names(tmp_path) == ["3", "5"]


def test_damaged_steps_do_not_count_among_those_that_stay(tmp_path: Path, open_all: Open) -> None:
    saved(tmp_path, 1, 2)
    checkpoints = open_all(tmp_path)
    (tmp_path / "2" / "params" / "_METADATA").unlink()
    checkpoints.save(3, make_items(3))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


# Disks


def fill(place: Path, leave: int) -> None:
    """Fill a disk up to `leave` bytes."""
    with (place / "filler").open("wb") as file:
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        file.write(b"x" * max(0, free - leave))


def refused(checkpoints: Checkpoints, items: Items, later: Items | None = None) -> int | None:
    """The errno by which `disk_fault` knows why step 2 cannot be saved; `wait` or the next save raises."""
    started = time.monotonic()
    try:
        checkpoints.save(2, items)
        checkpoints.wait() if later is None else checkpoints.save(3, later)
    except Exception as error:  # whatever Orbax makes of it
        assert time.monotonic() - started < SECONDS / 3  # threads of Orbax's may wait minutes for each other
        fault = disk_fault(error)
        return fault.errno if fault is not None else None
    return None


@pytest.mark.parametrize("leave", [0, 8 << 10, 40 << 10, 128 << 10, 400 << 10])
@pytest.mark.parametrize("raised_by", ["wait", "save"])
def test_a_full_disk_is_raised_and_saving_goes_on_with_room(
    leave: int, raised_by: str, mount: Mount, open_all: Open, caplog: pytest.LogCaptureFixture
) -> None:
    place = mount("6m")
    folder = place / "checkpoints"
    made = {step: make_items(step, width=4096) for step in (1, 2, 3)}
    checkpoints = open_all(folder)
    checkpoints.save(1, made[1])
    checkpoints.wait()
    fill(place, leave)
    assert refused(checkpoints, made[2], made[3] if raised_by == "save" else None) == errno.ENOSPC
    assert names(folder) == ["1"]  # its room is free again
    assert not [record.getMessage() for record in caplog.records if record.name == "absl"]
    for one in (checkpoints, open_all(folder)):
        check_latest(one, 1, made[1])
    (place / "filler").unlink()
    for one, step in ((checkpoints, 2), (open_all(folder), 3)):
        one.save(step, made[step])
        one.wait()
        assert one.steps() == [step - 1, step]
        assert same(one.restore(step, abstract_of(made[step])), made[step])


@pytest.mark.parametrize("probed", [True, False])
def test_a_read_only_disk_is_raised_and_can_be_read(
    probed: bool, mount: Mount, open_all: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not probed:  # then Orbax finds out, after it has begun
        monkeypatch.setattr(Checkpoints, "_may_write", lambda self, step: True)
    place = mount("4m")
    folder = place / "checkpoints"
    checkpoints = open_all(folder)
    made = make_items(1)
    checkpoints.save(1, made)
    checkpoints.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for one in (checkpoints, open_all(folder)):
        assert refused(one, make_items(2)) == errno.EROFS
        assert one.steps() == [1]
        assert same(one.restore(1, abstract_of(made)), made)
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    checkpoints.save(2, make_items(2))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("obstacle", ["file", "rights"])
def test_a_folder_that_cannot_be_written_is_raised(obstacle: str, tmp_path: Path, open_all: Open) -> None:
    folder = tmp_path / "run" / "checkpoints"
    if obstacle == "file":
        (tmp_path / "run").write_text("")
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        folder.mkdir(parents=True)
        folder.chmod(0o500)
    assert refused(open_all(folder), make_items()) in (errno.ENOTDIR, errno.EACCES)


def test_the_log_of_orbax_alone_is_silent(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    Checkpoints(tmp_path).close()
    log = logging.getLogger("absl")
    place = ("x/orbax/checkpoint/y.py", "x/other/y.py")
    for path in place:
        log.handle(log.makeRecord("absl", logging.ERROR, path, 1, path, (), None))
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == [place[1]]


# Digests


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn"]
)
def test_a_digest_sees_every_bit_and_its_place_and_no_sharding(dtype: str) -> None:
    rng = np.random.default_rng(1)
    kind = jnp.dtype(dtype)
    raw = rng.integers(0, 2 if dtype == "bool" else 256, 16 * 24 * kind.itemsize, np.uint8)
    values = raw.view(kind).reshape(16, 24)

    def digest(values: np.ndarray) -> int:
        return int(checkpoint.digests({"x": {"y": jnp.asarray(values)}})["x/y"])

    right = digest(values)
    for shape, spec in (((8, 1, 1), (("data",),)), ((2, 2, 2), ("fsdp", ("tensor", "data")))):
        placed = jax.device_put(values, NamedSharding(mesh_of(shape), PartitionSpec(*spec)))
        assert int(checkpoint.digests({"x": {"y": placed}})["x/y"]) == right
    seen = {right}
    for at in range(0, raw.size, 7):
        changed = raw.copy()
        changed[at] ^= 1
        seen.add(digest(changed.view(kind).reshape(16, 24)))
    assert len(seen) == 1 + len(range(0, raw.size, 7))
    assert right not in (digest(values[::-1]), digest(values[:, ::-1]), digest(np.zeros_like(values)))
    assert digest(values.reshape(24, 16)) == right  # of bits; shapes are compared before


# Two processes

# One of two that save and restore as one. Both sessions write what they found to a file.
CHILD = """
import hashlib, json, os, sys, traceback
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
coordinator, number, folder, out, session = sys.argv[1:]
jax.distributed.initialize(
    coordinator, 2, int(number), initialization_timeout=60, cluster_detection_method="deactivate"
)
import numpy as np
from tests.train.test_checkpoint import abstract_of, make_items, mesh_of, own_shards
from vlmscale.errors import UserError
from vlmscale.train import steps
from vlmscale.train.checkpoint import Checkpoints

def run():
    lines, found = [], {}
    steps._SMALL = -1
    mesh = mesh_of((2, 2, 2))
    checkpoints = Checkpoints(Path(folder), keep=3, tell=lines.append)
    found["opened"] = checkpoints.steps()
    if session == "saves":
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make_items(step, 4096, mesh))
        checkpoints.wait()
        try:
            checkpoints.restore(9, {})
        except UserError as error:
            found["refused"] = str(error)
    else:
        abstract = abstract_of(make_items(0, 4096, mesh))
        step, restored = checkpoints.restore_latest(abstract)
        found["restored"] = [step, own_shards(restored)]
        checkpoints.save(7, restored)
    checkpoints.close()
    return found | {"steps": checkpoints.steps(), "latest": checkpoints.latest(), "lines": lines}

try:
    Path(out).write_text(json.dumps(run()))
    jax.distributed.shutdown()
except BaseException:  # at once: jax's own exit would first wait minutes for the other process
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
"""


def own_shards(items: Items) -> list[list[Any]]:
    """Path, bounds and hash of every shard on this process's devices."""
    return [
        [
            jax.tree_util.keystr(path),
            [list(cut.indices(length)[:2]) for cut, length in zip(shard.index, leaf.shape, strict=True)],
            hashlib.sha256(np.ascontiguousarray(shard.data)).hexdigest(),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(items)
        for shard in leaf.addressable_shards
    ]


def in_two(folder: Path, session: str, place: Path) -> list[dict[str, Any]]:
    """What two processes say of a session on a folder."""
    place.mkdir()
    outs = [place / f"{number}.json" for number in range(2)]
    where = f"127.0.0.1:{free_port()}"
    words = [[where, str(number), str(folder), str(out), session] for number, out in enumerate(outs)]
    with at_work(CHILD, words, place) as children:

        def over() -> bool:
            codes = [child.poll() for child, _ in children]
            return None not in codes or any(codes)

        in_time = wait_for(over, SECONDS)
        story = told(children)
    assert in_time, f"not done after {SECONDS} s\n{story}"
    assert [child.returncode for child, _ in children] == [0, 0], story
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.slow
def test_two_processes_save_for_one_and_one_for_two(
    tmp_path: Path, open_all: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_SMALL", -1)  # as in the children: only sizes and digests tell
    folder = tmp_path / "checkpoints"
    for one in in_two(folder, "saves", tmp_path / "first"):
        assert (one["opened"], one["steps"], one["latest"], one["lines"]) == ([], [2, 3, 4], 4, [])
        assert "there is no step 9; there are [2, 3, 4]" in one["refused"]
    assert names(folder) == ["2", "3", "4"]
    made = {step: make_items(step, width=4096) for step in (2, 3, 4, 5, 6)}
    checkpoints = open_all(folder, keep=4)
    for mesh in ((8, 1, 1), (1, 1, 1)):
        check_latest(checkpoints, 4, made[4], abstract_of(made[4], mesh_of(mesh)))

    # The other way round, from the fourth newest: the last but two is damaged where process 1 alone reads.
    checkpoints.save(5, made[5])
    checkpoints.save(6, made[6])
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 5, 6]
    (folder / "6" / "params" / "_METADATA").unlink()
    flip(arrays_file(folder / "5", "params"))
    for path in (folder / "4").glob("opt_state/ocdbt.process_1/d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    both = in_two(folder, "restores", tmp_path / "second")
    fresh = {tuple(map(str, shard)) for shard in own_shards(make_items(3, 4096, mesh_of((2, 2, 2))))}
    for one in both:
        assert (one["opened"], one["steps"], one["latest"]) == ([3, 4, 5], [3, 7], 7)
        assert one["restored"][0] == 3
        assert {tuple(map(str, shard)) for shard in one["restored"][1]} <= fresh
    shards = {tuple(map(str, shard)) for one in both for shard in one["restored"][1]}
    assert shards == fresh
    assert [line.partition(" (")[0].rpartition(" is")[0][-6:] for line in both[0]["lines"]] == [
        "step 6",
        "step 5",
        "step 4",
    ]
    assert "params/decoder/kernel has other values than were saved" in both[0]["lines"][1]
    assert "process 1 cannot read it" in both[0]["lines"][2]
    assert both[1]["lines"] == []  # told once
    assert names(folder) == ["3", "7", "damaged-4", "damaged-5", "damaged-6"]
    check_latest(checkpoints, 7, made[3])
