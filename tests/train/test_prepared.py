"""Prepared data: made once, whole or not at all, the tower's own numbers, and kept apart by content."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.integration.tiny import DATA, SCENES, lines, read, steps
from vlmscale.config import Cell, load_cell
from vlmscale.data import scenes
from vlmscale.errors import UserError
from vlmscale.train.prepared import Prepared, encode_images, load_tower, pixels_of, prepare, tower_path


def nothing(*_: object) -> None:
    return None


def tiny(*overrides: str) -> Cell:
    return load_cell(SCENES, [*DATA, *steps(4), "--config.data.train_images=300", *overrides])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    packer = tiny("--config.compressor.name=tokenpacker")
    return prepare([tiny(), packer], tmp_path_factory.mktemp("prepared") / "data", nothing)


def test_features_are_the_towers_over_several_batches(prepared: Prepared) -> None:
    """300 pictures are more than one batch of 256."""
    cell = tiny("--config.compressor.name=tokenpacker")
    stored = prepared.features("train", cell)
    drawn, _ = scenes.build("train", 300, 0)
    params = load_tower(tower_path(cell), "scenes-48")
    chosen = [0, 1, 255, 256, 299]
    pixels = np.stack([pixels_of(scenes.draw(drawn[i]), cell) for i in chosen])
    for name, values in encode_images("scenes-48", params, pixels, True).items():
        assert stored[name].shape == (300, *values.shape[1:])
        assert stored[name].dtype == np.float32
        np.testing.assert_allclose(stored[name][chosen], values, rtol=1e-5, atol=1e-5)
    assert set(prepared.features("train", tiny())) == {"selected"}
    assert prepared.features("train", tiny("--config.compressor.visual_tokens=0")) == {}


def test_rows_show_the_picture_that_their_record_names(prepared: Prepared) -> None:
    rows = prepared.rows("test", tiny())
    records = lines(prepared.path / "test.records.jsonl")
    assert [int(record["id"].split("/")[1].split("-")[0]) for record in records] == rows.images.tolist()
    template = prepared.template
    for row, record in zip(rows.rows[:20], records, strict=False):
        answer = record["turns"][0][1]
        assert template.decode(row.target_ids.tolist()) == answer
        assert row.image_slots.sum() == 4
        assert row.tokens[row.target_positions + 1].tolist() == row.target_ids.tolist()


def test_it_is_made_once_and_other_data_is_refused(prepared: Prepared) -> None:
    packer = tiny("--config.compressor.name=tokenpacker")
    before = {path.name: path.stat().st_mtime_ns for path in prepared.path.iterdir()}
    again = prepare([packer], prepared.path, lambda *_: pytest.fail("made twice"))
    assert again.manifest == prepared.manifest
    assert {path.name: path.stat().st_mtime_ns for path in prepared.path.iterdir()} == before
    for other in ("--config.data.seed=1", "--config.data.test_images=7", "--config.data.vocab_size=400"):
        changed = dataclasses.replace(packer, data=tiny(other).data)
        with pytest.raises(UserError, match="choose another --out"):
            prepare([changed], prepared.path, nothing)
    with pytest.raises(UserError, match="must share"):
        prepare([tiny(), tiny("--config.data.seed=1")], prepared.path, nothing)


def test_a_directory_without_a_manifest_is_made_again(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "train.selected.npy").write_bytes(b"half")
    (out / "tokenizer.json").write_text("{")
    made = prepare([tiny(), tiny("--config.compressor.name=tokenpacker")], out, nothing)
    assert made.manifest == prepared.manifest == read(out / "manifest.json")
    for path in prepared.path.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
