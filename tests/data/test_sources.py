"""Samples as the pipeline reads them: pictures of what was not cut off, as pixels or as stored outputs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from tests.data.prepared_files import COUNT, conversation
from vlmscale.data.conversation import IMAGE_MARK, Template
from vlmscale.data.dataset import Dataset
from vlmscale.data.images import decode_image, tower_pixels
from vlmscale.data.lengths import Limits
from vlmscale.data.records import Record
from vlmscale.data.sources import DatasetSource, Joined, Pixels, Stored
from vlmscale.data.store import ArraySpec, StoreWriter, open_store
from vlmscale.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.5, 0.5)
ALL = Limits(1000)


@pytest.mark.parametrize("mode", ["resize", "pad", "crop"])
def test_pixels_are_the_pictures_as_the_tower_reads_them(
    mode: str, dataset: Dataset, template: Template
) -> None:
    source = pickle.loads(pickle.dumps(DatasetSource(dataset, template, Pixels(6, MEAN, STD, mode), ALL)))
    assert len(source) == COUNT
    for index in range(COUNT):
        encoded, pictures = source.read(index)
        np.testing.assert_array_equal(encoded.tokens, template.encode(conversation(index).turns).tokens)
        assert len(pictures) == index % 3
        for picture, data in zip(pictures, dataset.images(index), strict=True):
            wanted = tower_pixels(decode_image(data), 6, MEAN, STD, mode)
            np.testing.assert_array_equal(picture["pixels"], wanted)
            assert picture["pixels"].shape == source.blank["pixels"].shape
            assert picture["pixels"].dtype == source.blank["pixels"].dtype == np.uint8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_outputs_are_those_of_the_pictures(
    dtype: str, dataset: Dataset, template: Template, tmp_path: Path
) -> None:
    pictures = len(dataset.index.picture_bytes)
    values = np.arange(pictures * 6).reshape(pictures, 2, 3).astype(dtype)
    specs = {"selected": ArraySpec((2, 3), dtype), "levels": ArraySpec((1,), "float32")}
    with StoreWriter(tmp_path / "store", "key", pictures, specs, 4) as writer:
        for start in range(0, pictures, 4):
            part = values[start : start + 4]
            writer.append({"selected": part, "levels": np.zeros((len(part), 1), np.float32)})
    reader = Stored(open_store(tmp_path / "store", "key"), ("selected",))
    source = pickle.loads(pickle.dumps(DatasetSource(dataset, template, reader, ALL)))
    assert {name: (x.shape, x.dtype) for name, x in source.blank.items()} == {
        "selected": ((2, 3), np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32))
    }
    offsets = dataset.index.image_offsets
    for index in range(COUNT):
        shown = source.read(index)[1]
        numbers = dataset.index.picture[offsets[index] : offsets[index + 1]]
        assert [set(picture) for picture in shown] == [{"selected"}] * len(numbers)
        for picture, number in zip(shown, numbers, strict=True):
            np.testing.assert_array_equal(picture["selected"], values[number])


def test_pictures_that_are_cut_off_are_not_read(dataset: Dataset, template: Template) -> None:
    pixels, seen = Pixels(6, MEAN, STD, "pad"), set()
    for limits in (Limits(12), Limits(1000, 30, 9), Limits(1000, 25, 16)):
        source = DatasetSource(dataset, template, pixels, limits)
        for index in range(COUNT):
            encoded, pictures = source.read(index)
            marks = int((encoded.tokens == IMAGE_MARK).sum())
            whole = DatasetSource(dataset, template, pixels, ALL).read(index)[1]
            assert len(pictures) == marks <= len(whole)
            for ours, theirs in zip(pictures, whole, strict=False):
                np.testing.assert_array_equal(ours["pixels"], theirs["pixels"])
            seen.add(len(whole) - marks)
    assert {0, 1} <= seen


def test_a_blind_model_reads_no_pictures(dataset: Dataset, template: Template) -> None:
    source = DatasetSource(dataset, template, None, ALL)
    assert source.blank == {}
    assert [source.read(index)[1] for index in range(COUNT)] == [[]] * COUNT


def test_sources_follow_each_other(dataset: Dataset, template: Template) -> None:
    one = DatasetSource(dataset, template, Pixels(6, MEAN, STD, "pad"), ALL)
    other = DatasetSource(dataset, template, Pixels(6, MEAN, STD, "crop"), ALL)
    both = Joined((one, other))
    assert len(both) == 2 * COUNT
    assert both.blank.keys() == one.blank.keys()
    for index in (0, 1, COUNT - 1, COUNT, COUNT + 1, 2 * COUNT - 1):
        wanted = (one if index < COUNT else other).read(index % COUNT)
        for ours, theirs in zip(both.read(index)[1], wanted[1], strict=True):
            np.testing.assert_array_equal(ours["pixels"], theirs["pixels"])
        np.testing.assert_array_equal(both.read(index)[0].tokens, wanted[0].tokens)


class Broken(NamedTuple):
    """A data set with a picture that went bad after it was prepared."""

    path: Path

    def read(self, index: int) -> tuple[Record, list[bytes]]:
        return conversation(index), [b"\xff\xd8\xff"] * (index % 3)


def test_a_picture_that_cannot_be_decoded_is_named_with_its_record(template: Template) -> None:
    source = DatasetSource(Broken(Path("data")), template, Pixels(6, MEAN, STD, "pad"), ALL)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"^data: record record-5: picture 5-0.png, 5-1.png: .*prepare"
    ) as caught:
        source.read(5)
    assert "\n" not in str(caught.value)
