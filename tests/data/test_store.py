"""The feature store: what goes in comes out, anywhere, and nothing half or damaged passes for whole."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmscale.data.store import META, ArraySpec, Store, StoreWriter, open_store, shard_size
from vlmscale.errors import UserError
from vlmscale.records import read_json, write_json

SPECS = {"selected": ArraySpec((5, 3), "bfloat16"), "mean_attention": ArraySpec((5,), "float32")}
KEY = "key"


def values(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits, so that infinities, NaN and subnormals are among them."""
    rng = np.random.default_rng(seed)
    return {
        "selected": rng.integers(0, 2**16, (count, 5, 3), np.uint16).view(ml_dtypes.bfloat16),
        "mean_attention": rng.standard_normal((count, 5)).astype(np.float32),
    }


def write(path: Path, data: dict[str, np.ndarray], cuts: list[int], shard: int = 4, stop: int = -1) -> None:
    """Append in pieces that end at `cuts`; leave after `stop` pieces, as a fault would."""
    count = len(data["selected"])
    with StoreWriter(path, KEY, count, SPECS, shard) as writer:
        ends = [end for end in (*cuts, count) if end > writer.done]
        start = writer.done
        for piece, end in enumerate(ends):
            if piece == stop:
                return
            writer.append({name: array[start:end] for name, array in data.items()})
            start = end


def same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(got) == list(SPECS)
    for name, array in got.items():
        assert array.dtype == wanted[name].dtype
        assert array.shape == wanted[name].shape
        assert array.tobytes() == wanted[name].tobytes()


def rows(data: dict[str, np.ndarray], index: object) -> dict[str, np.ndarray]:
    return {name: array[index] for name, array in data.items()}


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path, data = tmp_path_factory.mktemp("store") / "a" / "store", values(11)
    write(path, data, [3, 6])
    return path, data


def test_it_gives_back_what_was_written(stored: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, data = stored
    store = open_store(path, KEY)
    assert len(store) == 11
    assert store.arrays == SPECS
    assert len([name for name in files(path) if "array_record" in name]) == 3
    for picture in (0, 3, 4, 10):
        same(store[picture], rows(data, picture))
    some = [10, 0, 4, 4, 7]
    same(store.gather(some), rows(data, some))
    same(store.gather([]), rows(data, slice(0)))
    for wrong in (-1, 11):
        with pytest.raises(IndexError, match="has 11 pictures"):
            store.gather([0, wrong])
    store.verify()


def test_it_travels_to_other_processes_and_threads(stored: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, data = stored
    store = open_store(path, KEY)
    store[0]  # a reader is open now, which cannot be pickled
    copy: Store = pickle.loads(pickle.dumps(store))
    assert copy == store
    order = np.random.default_rng(0).integers(0, 11, 200)
    with ThreadPoolExecutor(4) as pool:
        for index, got in zip(order, pool.map(copy.__getitem__, order), strict=True):
            same(got, rows(data, index))


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(1, 20), unique=True).map(sorted),
    shard=st.integers(1, 9),
    stops=st.lists(st.integers(0, 4), max_size=3),
)
def test_bytes_do_not_depend_on_pieces_or_interruptions(
    cuts: list[int], shard: int, stops: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, data = tmp_path_factory.mktemp("pieces"), values(21)
    write(folder / "whole", data, [], shard)
    for stop in stops:
        write(folder / "pieces", data, cuts, shard, stop)
        assert not list((folder / "pieces").glob(".*"))
    write(folder / "pieces", data, cuts, shard)
    assert files(folder / "pieces") == files(folder / "whole")


def test_what_is_finished_is_not_written_again(tmp_path: Path) -> None:
    data = values(11)
    write(tmp_path, data, [4, 9], stop=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("pictures*")}
    assert len(before) == 2
    (tmp_path / ".pictures.array_record-00002-of-00003.tmp").write_bytes(b"half")  # of a killed process
    with pytest.raises(UserError, match=r"holds 8 of 11 pictures.*again") as error:
        open_store(tmp_path, KEY)
    assert "\n" not in str(error.value)
    with StoreWriter(tmp_path, KEY, 11, SPECS, 4) as writer:
        assert writer.done == 8
        writer.append(rows(data, slice(8, None)))
        with pytest.raises(ValueError, match="more than the store has room for"):
            writer.append(rows(data, slice(0, 1)))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert len(list(tmp_path.iterdir())) == 4
    same(open_store(tmp_path, KEY).gather(range(11)), data)


def test_a_set_without_pictures_has_shapes(tmp_path: Path) -> None:
    write(tmp_path, values(0), [])
    store = pickle.loads(pickle.dumps(open_store(tmp_path, KEY)))
    assert len(store) == 0
    assert store.arrays == SPECS
    same(store.gather([]), values(0))
    store.verify()


def test_another_store_is_refused(stored: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, _ = stored
    before = files(path)
    for attempt in (lambda: open_store(path, "other"), lambda: StoreWriter(path, "other", 11, SPECS, 4)):
        with pytest.raises(UserError, match="another tower") as error:
            attempt()
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="another version"):
        StoreWriter(path, KEY, 11, SPECS, 5)
    assert files(path) == before
    with pytest.raises(UserError, match="no store of tower outputs"):
        open_store(tmp_path, KEY)
    (tmp_path / META).write_text("[1]")
    with pytest.raises(UserError, match="damaged"):
        open_store(tmp_path, KEY)
    write_json(tmp_path / META, read_json(path / META) | {"version": 2})
    with pytest.raises(UserError, match="format 2"):
        open_store(tmp_path, KEY)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damage_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    data = values(11)
    write(tmp_path, data, [])
    name = "pictures.array_record-00001-of-00003"
    file, store = tmp_path / name, open_store(tmp_path, KEY)
    good = file.read_bytes()
    payload = good.index(data["mean_attention"][5].tobytes())
    file.write_bytes(flip(good, payload))
    again = open_store(tmp_path, KEY)
    for attempt in (lambda: again[5], lambda: again.gather([0, 5, 9]), again.verify):
        with pytest.raises(UserError, match=rf"{name}: damaged .*; remove it and run") as error:
            attempt()
        assert "\n" not in str(error.value)
    file.write_bytes(flip(good, 10))  # in a part that no reading looks at
    with pytest.raises(UserError, match="sha256"):
        store.verify()
    for broken, reason in ((good[:-1], "bytes, not"), (None, "is not there")):
        file.unlink() if broken is None else file.write_bytes(broken)
        with pytest.raises(UserError, match=rf"{name}: damaged \(.*{reason}"):
            open_store(tmp_path, KEY)
    write(tmp_path, data, [])  # the remedy that the line names
    assert file.read_bytes() == good
    same(open_store(tmp_path, KEY).gather(range(11)), data)


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    data = values(2)
    with StoreWriter(tmp_path, KEY, 2, SPECS, 4) as writer:
        with pytest.raises(ValueError, match="cannot hold"):
            writer.append({"selected": data["selected"]})
        with pytest.raises(ValueError, match="mean_attention is float64"):
            writer.append(data | {"mean_attention": data["mean_attention"].astype(float)})
        with pytest.raises(ValueError, match="mean_attention is float32 \\[1, 5\\]"):
            writer.append(data | {"mean_attention": data["mean_attention"][:1]})


def test_a_full_disk_keeps_finished_shards(mount: Callable[[str], Path], tmp_path: Path) -> None:
    """With room again the store becomes what it would have been."""
    place, data = mount("450k"), values(11)  # a shard takes 128 KiB
    filler = place / "filler"
    filler.write_bytes(b"x" * (100 << 10))
    with pytest.raises(UserError, match=r"No space left on device; 2 of 3 shards are finished") as error:
        write(place / "store", data, [])
    assert str(place / "store") in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name[-8:] for path in (place / "store").glob("*record*")) == ["of-00003"] * 2
    filler.unlink()
    write(place / "store", data, [])
    write(tmp_path / "whole", data, [])
    assert files(place / "store") == files(tmp_path / "whole")


def test_a_disk_that_is_full_from_the_start(mount: Callable[[str], Path]) -> None:
    place = mount("8k")
    (place / "filler").write_bytes(b"x" * (4 << 10))
    with pytest.raises(UserError, match="No space left on device; 0 of 3 shards"):
        write(place / "store", values(11), [])


def test_shards_hold_whole_batches_and_are_not_too_many() -> None:
    clip = 2 * 576 * 1024
    for records, size, together in ((300, 4096, 256), (558_128, clip, 23), (3_000_000, clip, 256), (0, 9, 7)):
        shard = shard_size(records, size, together)
        assert shard % together == 0
        assert -(-records // shard) <= 256
        assert shard * size < max(2**28, records * size / 256) + together * size
