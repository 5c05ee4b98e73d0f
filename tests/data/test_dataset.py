"""A prepared data set read back: by its own reader, by TFDS alone, damaged, and at full size."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from tests.data.llava_files import encoded
from vlmscale.data.dataset import add_to_manifest, open_dataset, read_manifest, verify
from vlmscale.data.images import decode_image
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.data.shards import encode_example, examine, features
from vlmscale.errors import UserError

FORMATS = {
    "a.jpg": encoded("JPEG"),
    "b.png": encoded("PNG", "RGBA", 1),
    "c.webp": encoded("WEBP", "RGB", 2),
    "d.gif": encoded("GIF", "L", 3),
    "e.bmp": encoded("BMP", "RGB", 4, (7, 90)),
    "f.tif": encoded("TIFF", "RGB", 5),
    "g.jpg": encoded("JPEG", "CMYK", 6),
    "h.png": encoded("PNG", "L", 7, (1, 1)) + b"\0\0",  # what lies behind the picture stays there too
}
ODD = "line\nline\r\n\u2028\u2029\0 é \U0001f600 \ufeff</s>"


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def items() -> list[tuple[Record, list[bytes]]]:
    """Text alone, one picture, several, one of them twice; texts that formats like to mangle."""
    names = list(FORMATS)
    made = [
        (Record("text", (), (Turn("Two and two?", "Four."), Turn(ODD, ODD)), "sums", "maths", 0.1), []),
        (
            Record(ODD, ("a.jpg", "b.png", "a.jpg"), (Turn("<image>", "A."), Turn("<image> <image>?", "B."))),
            [],
        ),
        (Record("last", (ODD,), (Turn(f"{ODD}<image>", "Z."),), chance=1 / 3), []),
    ]
    made[1:1] = [(Record(name, (name,), (Turn("What <image>?", name),), "see"), []) for name in names]
    return [(record, [FORMATS.get(name, FORMATS["a.jpg"]) for name in record.images]) for record, _ in made]


def check_stored(stored: Sequence[bytes], given: Sequence[bytes]) -> None:
    """RGB and gray as they came, other modes as PNG of the pixels that training sees."""
    for kept, data in zip(stored, given, strict=True):
        if Image.open(io.BytesIO(data)).mode in ("RGB", "L"):
            assert kept == data
        else:
            picture = Image.open(io.BytesIO(kept))
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(picture), decode_image(data))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", {"train": items(), "test": items()[:1]}, shard_records=4)
    return tmp_path / "set"


def test_everything_is_read_back_exactly(path: Path) -> None:
    dataset = open_dataset(path)
    assert len(dataset) == len(items()) == 11
    for number, (record, pictures) in enumerate(items()):
        read, images = dataset.read(number)
        assert images == dataset.images(number)
        check_stored(images, pictures)
        assert read == dataset.record(number)
        assert (read.id, read.images, read.turns, read.task) == (
            record.id,
            record.images,
            record.turns,
            record.task,
        )
        assert read.chance == pytest.approx(record.chance, rel=1e-7)
    assert dataset.record(0).chance == 0.1
    assert len(open_dataset(path, "test")) == 1
    for number in (-1, 11):
        with pytest.raises(IndexError):
            dataset.read(number)
    assert verify(dataset, quiet) == 11


def test_examples_are_those_of_tfds() -> None:
    serializer = ExampleSerializer(features().get_serialized_info())
    for record, pictures in items():
        example = {
            "id": record.id,
            "images": [io.BytesIO(data) for data in pictures],
            "image_names": list(record.images),
            "turns": [{"question": turn.question, "answer": turn.answer} for turn in record.turns],
            "task": record.task,
            "task_group": record.task_group,
            "chance": record.chance,
        }
        theirs = serializer.get_tf_example(features().encode_example(example))
        assert encode_example(record, pictures) == theirs.SerializeToString(deterministic=True)


def test_the_index_tells_what_each_record_shows(path: Path) -> None:
    dataset = open_dataset(path)
    index, records = dataset.index, [record for record, _ in items()]
    assert index.image_offsets.tolist() == np.cumsum([0, *(len(r.images) for r in records)]).tolist()
    check_stored([dataset.picture(p) for p in index.picture], [x for _, data in items() for x in data])
    assert len(index.picture_record) == len(FORMATS) == dataset.manifest["pictures"]["train"]
    for number, data in enumerate(FORMATS.values()):
        size = (index.picture_width[number], index.picture_height[number])
        assert size == Image.open(io.BytesIO(data)).size
        stored = dataset.picture(number)
        assert index.picture_bytes[number] == len(stored)
        assert index.picture_sha256[number].tobytes() == hashlib.sha256(stored).digest()
    texts = [[text for turn in r.turns for text in (turn.question, turn.answer)] for r in records]
    assert index.words.tolist() == [sum(len(text.split()) for text in of_one) for of_one in texts]
    assert index.turns.tolist() == [len(r.turns) for r in records]
    assert [dataset.manifest["tasks"][task] for task in index.task] == [r.task for r in records]
    assert index.source_index.tolist() == list(range(11))
    assert open_dataset(path, "test").index.source_index.tolist() == [11]


def test_the_manifest_counts(path: Path) -> None:
    manifest = read_manifest(path)
    assert manifest["records"] == {"train": 11, "test": 1}
    assert manifest["images_shown"] == {"train": 12, "test": 0}
    assert manifest["formats"] == {"BMP": 1, "GIF": 1, "JPEG": 2, "PNG": 2, "TIFF": 1, "WEBP": 1}
    assert manifest["modes"] == {"CMYK": 1, "L": 1, "P": 1, "RGB": 4, "RGBA": 1}
    assert manifest["tasks"] == ["", "see", "sums"]
    assert manifest["duplicate_ids"] == 1  # "text", once in each split
    assert (manifest["sources"], manifest["quarantined"], manifest["tokens"]) == ([], {}, {})
    assert [shard["records"] for shard in manifest["shards"]] == [4, 4, 3, 1]
    for shard in manifest["shards"]:
        data = (path / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    sizes = [(path / shard["file"]).stat().st_size for shard in manifest["shards"]]
    assert manifest["bytes"] == {"train": sum(sizes[:3]), "test": sizes[3]}
    assert not (path / "partial").exists()


TFDS_ALONE = """
import hashlib
import sys
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1])
examples = list(builder.as_data_source(split="train"))
assert len(examples) == builder.info.splits["train"].num_examples == 11
assert builder.info.splits["test"].num_examples == 1
assert not [name for name in ("tensorflow", "vlmscale", "jax") if name in sys.modules]
text, first, last = examples[0], examples[1], examples[-1]
assert list(text["images"]) == [] and text["task"] == b"sums" and abs(text["chance"] - 0.1) < 1e-7
assert text["turns"]["answer"][1].decode() == last["image_names"][0].decode() != ""
assert first["images"][0].shape == (30, 40, 3) and examples[5]["images"][0].shape == (90, 7, 3)
assert [picture.shape for picture in examples[-2]["images"]] == [(30, 40, 3)] * 3
for example in examples:
    for picture in example["images"]:
        print(hashlib.sha256(picture.tobytes()).hexdigest())
"""


def test_tfds_alone_reads_it(path: Path) -> None:
    words = [sys.executable, "-c", TFDS_ALONE, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pixels = [decode_image(data) for _, pictures in items() for data in pictures]
    assert done.stdout.split() == [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pixels]


@pytest.mark.parametrize(
    "kind, mode", [("GIF", "P"), ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"), ("PNG", "LA")]
)
def test_modes_that_tfds_reads_otherwise_are_stored_as_training_sees_them(kind: str, mode: str) -> None:
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    colour = Image.merge("RGB", [gray, gray.rotate(90), gray.rotate(180)])
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    buffer = io.BytesIO()
    {"I;16": deep, "P": colour.quantize(16)}.get(mode, gray.convert(mode if mode != "I;16" else "L")).save(
        buffer, kind
    )
    data = buffer.getvalue()
    facts, stored = examine(data)
    assert (facts.format, facts.mode, facts.size) == (kind, mode, len(stored))
    assert stored != data
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), decode_image(data))


def test_a_data_set_is_pickled_as_its_path_and_split(path: Path) -> None:
    dataset = open_dataset(path)
    assert dataset.read(1) == dataset.read(1)
    assert len(dataset.index.words) == 11
    data = pickle.dumps(dataset)
    assert len(data) < 400
    again = pickle.loads(data)
    assert again == dataset
    assert again.read(10) == dataset.read(10)


def test_the_manifest_takes_what_others_measure(path: Path) -> None:
    before = read_manifest(path)
    returned = add_to_manifest(path, "tokens", {"v1": {"mean": 3.5}})
    assert read_manifest(path) == returned == before | {"tokens": {"v1": {"mean": 3.5}}}
    assert not list(path.glob("*.tmp"))


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_one_clear_line(path: Path) -> None:
    shard = path / "llava-train.array_record-00001-of-00003"
    flip(shard, shard.read_bytes().find(FORMATS["e.bmp"]) + 100)
    dataset = open_dataset(path)
    assert dataset.read(4) == dataset.read(4)
    with pytest.raises(UserError) as caught:
        dataset.read(5)
    assert str(caught.value).startswith(f"{shard}: record 5 of train cannot be read (")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        verify(dataset, quiet)
    assert str(caught.value).startswith(f"{shard}: record 5 of train cannot be read (")
    assert verify(open_dataset(path, "test"), quiet) == 1


def test_verify_sees_what_no_record_holds_and_what_the_index_denies(path: Path) -> None:
    shard = path / "llava-train.array_record-00000-of-00003"
    flip(shard, -2000)  # padding
    with pytest.raises(UserError, match=r"00000-of-00003: its bytes are not those that manifest\.json names"):
        verify(open_dataset(path), quiet)
    flip(shard, -2000)
    with np.load(path / "index-train.npz") as saved:
        columns = {key: saved[key].copy() for key in saved.files}
    columns["picture_sha256"][4, 0] ^= 1
    np.savez(path / "index-train.npz", **columns)
    with pytest.raises(UserError, match="00001-of-00003: the pictures of record 5 of train are not those"):
        verify(open_dataset(path), quiet)


def edit(**values: Any) -> Callable[[Path], None]:
    """A change of the manifest."""

    def change(path: Path) -> None:
        file = path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Half of a file goes."""

    def change(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "no prepared data set; make it with"),
    "half a manifest": (cut("manifest.json"), "manifest.json: cannot be read"),
    "another": (edit(name="imagenet"), "is not the manifest of a prepared data set"),
    "later": (edit(version=9), "has version 9, not 1; prepare the data again"),
    "no index": (lambda path: (path / "index-train.npz").unlink(), "index-train.npz: not found"),
    "half an index": (cut("index-train.npz"), "index-train.npz: cannot be read"),
    "another index": (edit(records={"train": 12}), "index-train.npz: cannot be read (11 records, but 12"),
    "no shard": (
        lambda path: (path / "llava-train.array_record-00002-of-00003").unlink(),
        "array_record-00002-of-00003: not found; copy the whole directory again",
    ),
    "half a shard": (
        cut("llava-train.array_record-00002-of-00003"),
        "array_record-00002-of-00003: record 10 of train cannot be read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_directory_that_is_not_whole(case: str, path: Path) -> None:
    change, message = BROKEN[case]
    change(path)

    def use() -> None:
        dataset = open_dataset(path)
        assert len(dataset.index.words)
        dataset.read(10)

    with pytest.raises(UserError) as caught:
        use()
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_data_set(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no split 'validation'; it has train, test"):
        open_dataset(path, "validation")
    for place in (tmp_path / "absent", path / "manifest.json"):
        with pytest.raises(UserError, match="no prepared data set"):
            open_dataset(place)
    (path / "partial").mkdir()
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="its preparation is not finished"):
        open_dataset(path)


def test_records_in_memory_that_cannot_be_written(tmp_path: Path) -> None:
    turns = (Turn("<image>?", "A."),)
    for record, pictures, message in [
        (Record("x", ("a",), turns), [], "'x' has 0 pictures, 1 image names and 1 <image>"),
        (Record("x", ("a",), (Turn("?", "A."),)), [FORMATS["a.jpg"]], "and 0 <image> placeholders"),
        (Record("x", ("a",), turns), [b"GIF89a"], "record 'x': picture truncated or damaged"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_dataset(tmp_path / "set", {"train": [(record, pictures)]})
    with pytest.raises(ValueError, match="split 'train' has no records"):
        write_dataset(tmp_path / "set", {"train": []})
    write_dataset(tmp_path / "set", {"train": items()})  # what was begun is no obstacle
    assert verify(open_dataset(tmp_path / "set"), quiet) == 11
    with pytest.raises(UserError, match="holds a prepared data set already"):
        write_dataset(tmp_path / "set", {"train": items()})
