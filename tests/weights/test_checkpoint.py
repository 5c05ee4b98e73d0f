"""Hugging Face weight files: against numpy's slicing, the safetensors library and transformers."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from transformers import LlamaConfig, LlamaForCausalLM

from vlmscale.errors import UserError, disk_fault
from vlmscale.weights.checkpoint import INDEX, UNREADABLE, WEIGHTS, open_checkpoint, write_checkpoint

FLOATS = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]
INTEGERS = [np.bool_, *(f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8))]
DTYPES = [np.dtype(kind) for kind in FLOATS + INTEGERS]
SHAPES = st.just(()) | array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
Arrays = dict[str, np.ndarray]


def random(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits at all, NaNs among them; only bool has bits that it may not hold."""
    bits = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return (bits % 2 if dtype == np.bool_ else bits).view(dtype).reshape(shape)


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equality of type, shape and bits."""
    return (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def some() -> Arrays:
    names = ["b", "a", "deep.er", "c"]
    return {name: random(np.dtype("f4"), (4, 3), seed) for seed, name in enumerate(names)}


@st.composite
def arrays_and_slices(draw: st.DrawFn) -> tuple[Arrays, dict[str, tuple[slice, ...]]]:
    arrays, slices = {}, {}
    for name in draw(st.sets(st.text('ab.é"\\\n', min_size=1, max_size=4), min_size=1, max_size=4)):
        shape = draw(SHAPES)
        array = random(draw(st.sampled_from(DTYPES)), shape, draw(st.integers(0, 99)))
        laid = draw(
            st.sampled_from([lambda x: x, lambda x: x.swapaxes(0, -1), lambda x: x[::-1], lambda x: x[::2]])
        )
        arrays[name] = laid(array) if shape else array
        index = []
        for length in arrays[name].shape[: draw(st.integers(0, len(shape)))]:
            start, stop = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
            index.append(slice(draw(st.sampled_from([start, None])), draw(st.sampled_from([stop, None]))))
        slices[name] = tuple(index)
    return arrays, slices


@settings(max_examples=100)
@given(arrays_and_slices(), st.integers(1, 600))
def test_what_is_written_is_read_back_whole_and_in_part(
    drawn: tuple[Arrays, dict[str, tuple[slice, ...]]], limit: int
) -> None:
    arrays, slices = drawn
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files = write_checkpoint(directory, arrays.items(), limit)
        assert sorted(files) == sorted(directory.iterdir())
        with open_checkpoint(directory) as checkpoint:
            assert list(checkpoint.tensors) == sorted(arrays)
            for name, array in arrays.items():
                tensor = checkpoint.tensors[name]
                assert (tensor.dtype, tensor.shape) == (array.dtype, array.shape)
                assert tensor.file in files
                assert same(checkpoint.read(name), array)
                part = checkpoint.read(name, slices[name])
                assert same(part, array[slices[name]])
                assert part.flags.c_contiguous
                assert part.flags.writeable


@settings(max_examples=50)
@given(arrays_and_slices())
def test_a_file_is_what_the_library_writes(drawn: tuple[Arrays, Any]) -> None:
    arrays = {name: np.array(array, order="C") for name, array in drawn[0].items()}
    with tempfile.TemporaryDirectory() as directory:
        (file,) = write_checkpoint(Path(directory), arrays.items())
        safetensors.numpy.save_file(arrays, f"{directory}/library", {"format": "pt"})
        assert file.read_bytes() == Path(directory, "library").read_bytes()
        loaded = safetensors.numpy.load_file(file)
        assert all(same(loaded[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_torch_reads_and_writes_the_same_numbers(tmp_path: Path, kind: torch.dtype) -> None:
    numbers = torch.tensor([[1, 0, -3], [100, 2, -70]]).to(kind)
    safetensors.torch.save_file({"x": numbers}, tmp_path / WEIGHTS)
    with open_checkpoint(tmp_path) as checkpoint:
        ours = checkpoint.read("x")
    assert ours.astype(int).tolist() == numbers.int().tolist()
    (file,) = write_checkpoint(tmp_path / "back", [("x", ours)])
    theirs = safetensors.torch.load_file(file)["x"]
    assert theirs.dtype == kind
    assert torch.equal(theirs, numbers)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A tiny model of bfloat16 and where transformers saved it; the embedding is larger than a shard."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=160
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory, max_shard_size=4000)
    return model, directory


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.int16).flatten().tolist()


def test_shards_of_transformers_are_read(llama: tuple[LlamaForCausalLM, Path]) -> None:
    model, directory = llama
    with open_checkpoint(directory) as checkpoint:
        assert len({tensor.file for tensor in checkpoint.tensors.values()}) > 2
        assert checkpoint.tensors.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert checkpoint.read(name).view(np.int16).flatten().tolist() == bits(tensor)


@pytest.mark.parametrize("limit, kind", [(4000, "sharded"), (10**6, "single")])
def test_files_are_those_of_transformers(
    llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, limit: int, kind: str
) -> None:
    model, sharded = llama
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    with open_checkpoint(sharded) as checkpoint:
        tensors = ((name, checkpoint.read(name)) for name in model.state_dict())
        files = write_checkpoint(tmp_path / "ours", tensors, limit)
    saved = {path.name for path in (tmp_path / "theirs").glob("model*")}
    assert {path.name for path in files} == saved
    assert (INDEX in saved) == (kind == "sharded")
    for path in files:
        assert path.read_bytes() == (tmp_path / "theirs" / path.name).read_bytes(), path.name
    (tmp_path / "ours" / "config.json").write_bytes((sharded / "config.json").read_bytes())
    back = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    assert {name: bits(tensor) for name, tensor in back.items()} == {
        name: bits(tensor) for name, tensor in model.state_dict().items()
    }


def test_a_part_is_the_callers_own_and_outlives_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, some().items())
    before = (tmp_path / WEIGHTS).read_bytes()
    with open_checkpoint(tmp_path) as checkpoint:
        part, again = checkpoint.read("a", (slice(1, 3),)), checkpoint.read("a", (slice(1, 3),))
        part += 1
        assert same(again, some()["a"][1:3])
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert same(again, some()["a"][1:3])
    assert (tmp_path / WEIGHTS).read_bytes() == before
    with pytest.raises(ValueError, match="after close"):
        checkpoint.read("a")


def test_only_the_part_takes_memory(tmp_path: Path) -> None:
    """With the address space limited there is no room for the whole tensor beside its mapping."""
    rows, columns = 2**12, 2**13  # 128 MiB, sparse
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}}
    )
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + rows * columns * 4)
    with open_checkpoint(tmp_path) as checkpoint:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**26, limits[1]))
        try:
            shapes = [
                checkpoint.read("x", index).shape
                for index in ((slice(9, 99),), (slice(None), slice(8, 80)), (slice(5, 6), slice(1, None)))
            ]
            with pytest.raises(MemoryError):
                np.ones((rows, columns), np.float32)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    assert shapes == [(90, columns), (rows, 72), (1, columns - 1)]


def test_links_of_a_hub_snapshot_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123"
    files = write_checkpoint(snapshot, some().items(), 50)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(files):
        file.rename(tmp_path / "blobs" / f"{number}")
        file.symlink_to(f"../../blobs/{number}")
    with open_checkpoint(snapshot) as checkpoint:
        assert all(same(checkpoint.read(name), array) for name, array in some().items())
    (tmp_path / "blobs" / "0").unlink()
    with pytest.raises(UserError, match="model-00001-of-00004"):
        open_checkpoint(snapshot)
    (tmp_path / "blobs" / "4").unlink()
    with pytest.raises(UserError, match=r"index\.json is no file, or a link"):
        open_checkpoint(snapshot)


def test_files_outside_the_index_are_ignored_and_tensors_outside_it_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, some().items(), 100)
    (tmp_path / "consolidated.safetensors").write_text("damaged")
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["c"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == some().keys()
    write_checkpoint(tmp_path / "single", [("x", np.ones(2))])
    (tmp_path / "single" / WEIGHTS).rename(tmp_path / WEIGHTS)  # comes before the index, as in transformers
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == {"x"}


def edit_index(**changes: Any) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"].update(changes)
        (directory / INDEX).write_text(json.dumps(index))

    return edit


def put(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda directory: (directory / name).write_bytes(data)


def cut(directory: Path) -> None:
    file = directory / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def twice(directory: Path) -> None:
    file = directory / "model-00002-of-00002.safetensors"
    safetensors.numpy.save_file(some(), file)


ONE, TWO = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}


def header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


NO_SAFETENSORS = [
    cut,
    *(put(ONE, content) for content in (b"", header("garbage!"), header("{}", 9999), header("{}", 2**62))),
    put(ONE, header(json.dumps({"x": ENTRY})) + bytes(12)),
]
NO_MAPS = ["[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
OUTSIDE = ["y/../../x.safetensors", "..\\x.safetensors", "/etc/x.safetensors", "C:x.safetensors"]


@pytest.mark.parametrize(
    "damage, said",
    [
        *((damage, f"{ONE}: cannot be read as safetensors .*again") for damage in NO_SAFETENSORS),
        (put(ONE, LFS), f"{ONE}: .*git lfs pull"),
        (put(INDEX, LFS), f"{INDEX}: .*git lfs pull"),
        (put(INDEX, b"\xff"), f"{INDEX}: cannot be read as JSON"),
        (put(INDEX, '{"weight_map": {"a": '), f"{INDEX}: cannot be read as JSON"),
        (put(INDEX, "[" * 10**6), f"{INDEX}: cannot be read as JSON"),
        *((put(INDEX, text), f"{INDEX}: has no weight_map") for text in NO_MAPS),
        (lambda directory: (directory / TWO).unlink(), f"{INDEX}: names {TWO}, which is not there; download"),
        (edit_index(lost=ONE), f"{INDEX}: says that tensor lost is in {ONE}, but no file has it; "),
        (edit_index(a=TWO), f"{INDEX}: says that tensor a is in {TWO}, but {ONE} has it; "),
        (twice, f"tensor a is in {ONE} and in {TWO}"),
        (edit_index(a="../x.safetensors"), r"names '\.\./x\.safetensors'.*do not trust"),
        *((edit_index(a=name), "do not trust") for name in OUTSIDE),
        (edit_index(a="pytorch_model.bin"), "only .safetensors files"),
        (
            lambda directory: (directory / INDEX).unlink(),
            f"has {ONE}, {TWO}, but neither.*cut off, run it again",
        ),
    ],
)
def test_damaged_directories_are_a_users_error(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    directory = tmp_path / "model"
    write_checkpoint(directory, some().items(), 100)
    (tmp_path / "x.safetensors").write_bytes((directory / ONE).read_bytes())  # what ../ would have found
    open_checkpoint(directory).close()
    damage(directory)
    with pytest.raises(UserError, match=said) as caught:
        open_checkpoint(directory)
    assert str(caught.value).startswith(str(directory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names, said",
    [
        ([], "has neither model.safetensors nor"),
        (
            ["config.json", "pytorch_model.bin"],
            r"\(pytorch_model\.bin\), which are never opened.*save_pretrained",
        ),
        ([f"consolidated.{i:02d}.pth" for i in range(5)], r"consolidated\.02\.pth and 2 more\)"),
        (
            ["model.fp16.safetensors"],
            r"has model\.fp16\.safetensors, but neither model\.safet.*rename the file",
        ),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter .*merge it into its base"),
        (["adapter_config.json", "pytorch_model.bin"], "has only pickle"),
    ],
)
def test_directories_without_weights_say_what_to_do(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path)


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="absent: no such directory; name"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="file: is a file; name"):
        open_checkpoint(tmp_path / "file")


def test_read_names_the_nearest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [("layers.0.q_proj.weight", np.ones(1)), ("norm.weight", np.ones(1))])
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(
            UserError, match=r"no tensor layers\.0\.q\.weight; the nearest is layers\.0\.q_proj\."
        ):
            checkpoint.read("layers.0.q.weight")
        with pytest.raises(UserError, match="no tensor zzz; it has layers"):
            checkpoint.read("zzz")


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 5),),
        (slice(5, 5),),
        (slice(-1, None),),
        (slice(None), slice(0, -1)),
        (slice(3, 2),),
        (slice(0, 4, 2),),
        (slice(None),) * 3,
    ],
)
def test_an_index_outside_the_shape_is_refused(tmp_path: Path, index: tuple[slice, ...]) -> None:
    write_checkpoint(tmp_path, some().items())
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(UserError, match=r"tensor a has shape \(4, 3\), which .* does not fit"):
            checkpoint.read("a", index)
        checkpoint.read("a", (slice(4, 4), slice(0, 3, 1)))


def test_an_unknown_type_is_refused_only_when_read(tmp_path: Path) -> None:
    eight = torch.ones(4, 2, dtype=torch.float8_e4m3fn)
    safetensors.torch.save_file({"eight": eight, "whole": torch.ones(2)}, tmp_path / WEIGHTS)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["eight"][1:] == (UNREADABLE, (4, 2))
        assert checkpoint.read("whole").tolist() == [1, 1]
        with pytest.raises(
            UserError, match=r"tensor eight is stored as F8_E4M3; convert it to one of .*BF16"
        ):
            checkpoint.read("eight")


def test_bytes_depend_on_the_arguments_alone(tmp_path: Path) -> None:
    metadata = {name: name for name in "dbca"}
    written = set()
    for number, entries in enumerate((metadata, metadata, dict(sorted(metadata.items())))):
        files = write_checkpoint(tmp_path / f"{number}", some().items(), 100, entries)
        written.add(b"".join(file.read_bytes() for file in files))
    assert len(written) == 1
    with safetensors.safe_open(str(files[0]), "numpy") as file:
        assert file.metadata() == metadata


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files = write_checkpoint(tmp_path, some().items(), 100)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_no_more_than_a_shard_and_a_tensor_are_held(tmp_path: Path) -> None:
    alive: list[Callable[[], np.ndarray | None]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for number in range(30):
            array = np.zeros(25 if number == 7 else 10, np.uint8)
            alive.append(weakref.ref(array))
            yield f"{number}", array
            del array
            most = max(most, sum(link() is not None for link in alive))

    files = write_checkpoint(tmp_path, tensors(), 40)
    assert len(files) > 8
    assert 4 <= most <= 5


def test_an_unfinished_export_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed at any rename leaves what `open_checkpoint` refuses and a second export completes."""
    renames = 0
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        nonlocal renames
        renames -= 1
        if renames < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # the dead clean nothing up
    for allowed in range(3):
        renames = allowed
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, some().items(), 100)
        assert len(list(tmp_path.glob("model*"))) == allowed
        assert len(list(tmp_path.glob(".model*"))) == 3 - allowed
        with pytest.raises(UserError, match="neither"):
            open_checkpoint(tmp_path)
    monkeypatch.undo()
    (tmp_path / ".model-00009.tmp").touch()  # of an export into more shards
    files = write_checkpoint(tmp_path, some().items(), 100)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(same(checkpoint.read(name), array) for name, array in some().items())


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from some().items()
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_checkpoint(tmp_path, tensors(), 100)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_checkpoint(tmp_path, [("x", np.zeros(2**16))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())

    def full(_: int) -> None:  # as a disk on the network may say it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_checkpoint(tmp_path, some().items(), 100)
    fault = disk_fault(caught.value)
    assert fault is not None
    assert fault.strerror == "No space left on device"
    assert not list(tmp_path.iterdir())


def test_weights_are_never_written_over(tmp_path: Path) -> None:
    for limit, name in ((10**6, WEIGHTS), (100, INDEX)):
        directory = tmp_path / name
        files = write_checkpoint(directory, some().items(), limit)
        before = [file.read_bytes() for file in files]
        with pytest.raises(UserError, match=f"{directory}: has {name} already; remove it or"):
            write_checkpoint(directory, [("x", np.ones(2))])
        assert [file.read_bytes() for file in files] == before
    with pytest.raises(UserError, match="is a file; name another"):
        write_checkpoint(files[0], some().items())


@pytest.mark.parametrize(
    "tensors, said",
    [
        ([], "no tensors"),
        ([*some().items(), ("a", np.ones(2))], "tensor a: the name is taken"),
        ([("__metadata__", np.ones(2))], "tensor __metadata__: the name is taken"),
        ([("x", np.ones(2, np.complex128))], "tensor x: complex128 cannot be stored"),
        ([("x", np.ones(2, ">f4"))], "tensor x: >f4 cannot be stored"),
        ([("x", np.array(["text"]))], "tensor x: <U4 cannot be stored"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, tensors: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_checkpoint(tmp_path, tensors, 10)
    assert not list(tmp_path.iterdir())
