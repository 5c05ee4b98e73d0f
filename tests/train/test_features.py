"""Storing tower outputs: the tower's own numbers, whatever stops it on the way, and honest advice before."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from vlmscale.compressors.features import tower_features
from vlmscale.data import images, store
from vlmscale.data.dataset import open_dataset
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.errors import UserError
from vlmscale.models.sizes import TOWERS
from vlmscale.train import features
from vlmscale.train.features import (
    Advice,
    FeatureJob,
    Pictures,
    advise,
    batch_size,
    check_room,
    disk_speed,
    estimate,
    pictures_of,
    write_features,
)
from vlmscale.weights import tree

SIZE = TOWERS["scenes-48"]
TOWER = Path(features.__file__).parent.parent / "assets" / "scenes-48.safetensors"
SHARDS = 2**20  # bytes; of batches of 16 that makes a shard each


def nothing(*_: object) -> None:
    return None


def draw(index: int) -> np.ndarray:
    """Any picture that depends on its number, made faster than a scene."""
    return np.random.default_rng(index).integers(0, 256, (40 + index % 7, 50, 3), np.uint8)


def encoded(index: int) -> bytes:
    """The same picture as PNG."""
    file = io.BytesIO()
    Image.fromarray(draw(index)).save(file, "PNG")
    return file.getvalue()


def make_job(
    count: int,
    needs: tuple[str, ...] = (),
    dtype: str = "float32",
    load: Callable[[int], np.ndarray] = draw,
    image_mode: str = "pad",
    compute: str = "float32",
) -> FeatureJob:
    hashes = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    params = tree.load(TOWER)
    return FeatureJob(Pictures(load, hashes), SIZE, params, frozenset(needs), image_mode, dtype, compute)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 16, and a shard for each."""
    monkeypatch.setattr(features, "_BATCH", 16)
    monkeypatch.setattr(store, "_SHARD_BYTES", 16 * 64 * 64 * 4)


def test_they_are_the_towers_over_several_batches(tmp_path: Path) -> None:
    """300 pictures are more than one batch of 256; of text alone nothing is stored but shapes are known."""
    needs = ("keys", "levels", "mean_attention", "stack", "tower")
    told: list[tuple[str, int, int]] = []
    job = make_job(300, needs)
    made = write_features(job, tmp_path / "a", lambda *progress: told.append(progress), "tower, train")
    assert told == [("tower, train", 256, 300), ("tower, train", 300, 300)]
    chosen = [0, 1, 255, 256, 299]
    pixels = np.stack([images.preprocess(draw(i), 48, SIZE.mean, SIZE.std, "pad") for i in chosen])
    wanted = tower_features(SIZE, tree.load(TOWER), jnp.asarray(pixels), frozenset(needs))
    assert list(made.arrays) == ["selected", *sorted(needs)[:-1]]
    stored = made.gather(chosen)
    for name, values in wanted.items():
        assert stored[name].dtype == np.float32
        np.testing.assert_allclose(stored[name], values, rtol=1e-5, atol=1e-5)
    empty = write_features(make_job(0, needs), tmp_path / "b", lambda *_: pytest.fail("nothing to do"))
    assert len(empty) == 0
    assert empty.arrays == made.arrays
    write_features(job, tmp_path / "a", lambda *_: pytest.fail("made twice"))


def test_bfloat16_rounds_all_but_what_methods_rank_by(small: None, tmp_path: Path) -> None:
    needs = ("mean_attention", "keys")
    whole = write_features(make_job(20, needs), tmp_path / "f", nothing).gather(range(20))
    half = write_features(make_job(20, needs, "bfloat16"), tmp_path / "b", nothing).gather(range(20))
    for name in ("selected", "keys"):
        np.testing.assert_array_equal(half[name], whole[name].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(half["mean_attention"], whole["mean_attention"])
    job = make_job(20, needs, "bfloat16", compute="bfloat16")
    rough = write_features(job, tmp_path / "r", nothing).gather(range(20))["selected"].astype(np.float32)
    assert not np.array_equal(rough, half["selected"].astype(np.float32))
    assert np.abs(rough - whole["selected"]).mean() < 0.05 * np.abs(whole["selected"]).mean()


def test_the_key_is_of_all_that_counts() -> None:
    job = make_job(3)
    hashes = job.pictures.sha256.copy()
    hashes[2, 31] ^= 1
    params = tree.load(TOWER)
    params["block_0"]["mlp"] = {name: dict(values) for name, values in params["block_0"]["mlp"].items()}
    part = next(iter(params["block_0"]["mlp"].values()))
    name = next(iter(part))
    part[name] = part[name] + np.float32(1)
    changes: list[dict[str, Any]] = [
        {"pictures": Pictures(draw, hashes)},
        {"pictures": Pictures(draw, hashes[:2])},
        {"size": dataclasses.replace(SIZE, mean=(0.5, 0.5, 0.4))},
        {"params": params},
        {"needs": frozenset({"keys"})},
        {"image_mode": "crop"},
        {"dtype": "bfloat16"},
        {"compute": "bfloat16"},
    ]
    keys = {job.key, *(dataclasses.replace(job, **change).key for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert make_job(3).key == dataclasses.replace(job, needs=frozenset({"tower"})).key == job.key


def test_another_job_does_not_touch_a_store(small: None, tmp_path: Path) -> None:
    write_features(make_job(20), tmp_path, nothing)
    before = files(tmp_path)
    with pytest.raises(UserError, match="another tower"):
        write_features(make_job(20, image_mode="crop"), tmp_path, nothing)
    assert files(tmp_path) == before


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_stopped_and_resumed_is_uninterrupted(stop: int, small: None, tmp_path: Path) -> None:
    """70 pictures are five batches, the last of 6."""
    write_features(make_job(70, ("keys",)), tmp_path / "whole", nothing)

    def interrupt(_: str, done: int, total: int) -> None:
        if done >= min(16 * stop, total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(make_job(70, ("keys",)), tmp_path / "parts", interrupt)
    told: list[int] = []
    write_features(make_job(70, ("keys",)), tmp_path / "parts", lambda _, done, __: told.append(done))
    assert len(told) <= 5 - (stop - 2)  # what was finished is not computed again
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train import test_features as t
t.features._BATCH, t.store._SHARD_BYTES = 16, 16 * 64 * 64 * 4
def progress(_, done, __):
    if done == 48:
        os.kill(os.getpid(), signal.SIGKILL)
t.write_features(t.make_job(70), Path(sys.argv[1]), progress)
"""


def test_killed_and_resumed_is_uninterrupted(small: None, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "parts")], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"holds \d+ of 70 pictures"):
        store.open_store(tmp_path / "parts", make_job(70).key)
    write_features(make_job(70), tmp_path / "parts", nothing)
    write_features(make_job(70), tmp_path / "whole", nothing)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_pictures_are_decoded_while_the_tower_computes(small: None, tmp_path: Path) -> None:
    begun = threading.Event()

    def load(index: int) -> np.ndarray:
        if index == 16:
            begun.set()
        return draw(index)

    def progress(_: str, done: int, __: int) -> None:
        assert done > 16 or begun.wait(30), "the second batch waits for the first to end"

    write_features(make_job(40, load=load), tmp_path, progress)


def test_a_picture_that_cannot_be_read_keeps_what_is_finished(small: None, tmp_path: Path) -> None:
    def load(index: int) -> np.ndarray:
        if index == 50:
            raise UserError("record 'x': image 'y' is gone")
        return draw(index)

    with pytest.raises(UserError, match="image 'y' is gone"):
        write_features(make_job(70, load=load), tmp_path, nothing)
    told: list[int] = []
    write_features(make_job(70), tmp_path, lambda _, done, __: told.append(done))
    assert told[0] > 16


@pytest.mark.parametrize("count", [1, 300, 2000])
@pytest.mark.parametrize("needs", [(), ("mean_attention", "levels")])
def test_the_estimate_is_what_it_takes(count: int, needs: tuple[str, ...], tmp_path: Path) -> None:
    """Through the writer alone, with a tower's shapes."""
    arrays = features.stored_arrays(SIZE, frozenset(needs), "bfloat16")
    record = sum(spec.nbytes for spec in arrays.values())
    together = batch_size(SIZE, frozenset(needs))
    rng = np.random.default_rng(0)
    with store.StoreWriter(tmp_path, "", count, arrays, store.shard_size(count, record, together)) as writer:
        writer.append(
            {
                name: rng.standard_normal((count, *spec.shape), np.float32).astype(spec.dtype)
                for name, spec in arrays.items()
            }
        )
    taken = sum(path.stat().st_size for path in tmp_path.glob("pictures*"))
    guess = estimate(count, SIZE, frozenset(needs), "bfloat16")
    assert taken <= guess <= 1.02 * taken + 2**17
    assert estimate(0, SIZE, frozenset(needs), "bfloat16") == 0


def test_known_sizes() -> None:
    """CLIP-L/336 on LLaVA's first stage: 576 x 1024 numbers a picture."""
    clip = TOWERS["clip-vit-large-patch14-336"]
    nbytes = estimate(558_128, clip, frozenset(), "bfloat16")
    assert 1 < nbytes / (558_128 * 576 * 1024 * 2) < 1.001
    assert (
        estimate(100, clip, frozenset({"levels"}), "float32")
        > 5 * estimate(100, clip, frozenset(), "float32") / 1.01
    )
    assert batch_size(SIZE, frozenset()) == 256
    assert 1 <= batch_size(clip, frozenset({"stack"})) < batch_size(clip, frozenset()) < 64


def test_a_disk_that_is_too_small_is_told_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job, out = make_job(10_000), tmp_path / "deep" / "store"
    need = estimate(10_000, SIZE, frozenset(), "float32")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    for attempt in (
        lambda: write_features(job, out, nothing),
        lambda: advise(job, out, 10_000),
        lambda: check_room(job, out),
    ):
        with pytest.raises(UserError, match=r"10000 pictures need 158 MiB, 157 MiB are free") as error:
            attempt()
        assert str(out) in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "deep").exists()
    out.mkdir(parents=True)
    (out / "pictures").write_bytes(b"x")  # what is there already need not be written
    assert check_room(job, out) == (need - 1, need - 1)


def test_when_it_pays() -> None:
    """100 pictures of 1 MB shown 300 times: 10 ms each in the tower, read at 1 GB/s."""
    advice = Advice(100, 300, 10**8, 10**9, tower=0.010, decode=0.004, write=1e9, read=1e9)
    assert advice.build_s == pytest.approx(1)
    assert advice.recompute_s == pytest.approx(3)
    assert advice.read_s == pytest.approx(0.3)
    assert advice.epochs == 1
    assert "an epoch takes 3 s to recompute and 0.3 s to read: storing is cheaper from 1 ep" in str(advice)
    assert "100 pictures: 96 MiB, 953 MiB are free" in str(advice)
    slow_disk = dataclasses.replace(advice, read=1.5e8, write=1e7)  # 2 s to read, 10 s to write, saves 1 s
    assert slow_disk.epochs == 11
    decoding = dataclasses.replace(advice, decode=0.020)
    assert decoding.recompute_s == pytest.approx(6)
    slower = dataclasses.replace(advice, read=1e8)
    assert slower.epochs is None
    assert "recomputing is cheaper however often" in str(slower)
    assert "\n" not in str(slower)


def test_advice_measures(small: None, tmp_path: Path) -> None:
    slow = threading.Lock()

    def load(index: int) -> np.ndarray:
        with slow:
            threading.Event().wait(0.01)
        return draw(index)

    advice = advise(make_job(40, load=load), tmp_path / "a" / "b", 120)
    assert (advice.pictures, advice.shown) == (40, 120)
    assert advice.nbytes == estimate(40, SIZE, frozenset(), "float32")
    assert advice.decode >= 0.01
    assert advice.tower > 0
    assert advice.recompute_s >= 1.2
    assert list(tmp_path.iterdir()) == []
    assert min(disk_speed(tmp_path, 1000, 30)) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_pictures_of_a_data_set(small: None, tmp_path: Path) -> None:
    """Distinct ones, by content; one that is damaged is named by its record."""
    drawn = [encoded(number) for number in range(3)]
    shown = Turn("<image>\nq", "a")
    items = [
        (Record("first", ("a.png",), (shown,)), [drawn[0]]),
        (Record("text", (), (Turn("q", "a"),)), []),
        (Record("both", ("b.png", "c.png"), (Turn("<image> <image>", "a"),)), drawn[1:]),
        (Record("again", ("copy.png",), (shown,)), [drawn[0]]),
    ]
    write_dataset(tmp_path / "data", {"train": items})
    dataset = open_dataset(tmp_path / "data")
    pictures = pictures_of(dataset, SIZE.image_size)
    assert pictures.sha256.shape == (3, 32)
    by_hash = {hashlib.sha256(data).digest(): number for number, data in enumerate(drawn)}
    for number, digest in enumerate(pictures.sha256):
        np.testing.assert_array_equal(pictures.load(number), draw(by_hash[digest.tobytes()]))
    job = dataclasses.replace(make_job(0), pictures=pictures)
    made = write_features(job, tmp_path / "store", nothing)
    last = int(dataset.index.picture[dataset.index.image_offsets[3]])
    pixels = images.preprocess(draw(0), 48, SIZE.mean, SIZE.std, "pad")
    wanted = tower_features(SIZE, job.params, jnp.asarray(pixels[None]), frozenset())
    np.testing.assert_allclose(made[last]["selected"], wanted["selected"][0], rtol=1e-5, atol=1e-5)


def test_a_damaged_picture_is_named_by_its_record() -> None:
    index = SimpleNamespace(
        picture_record=np.array([4]), picture_slot=np.array([1]), picture_sha256=np.zeros((1, 32), np.uint8)
    )
    dataset: Any = SimpleNamespace(
        path=Path("folder"),
        index=index,
        picture=lambda number: encoded(number)[:2000],
        record=lambda number: Record(f"r{number}", ("a.png", "b.png"), (Turn("q", "a"),)),
    )
    with pytest.raises(UserError, match=r"^folder: record 'r4': image 'b.png' truncated .*prepare") as error:
        pictures_of(dataset, 48).load(0)
    assert "\n" not in str(error.value)
