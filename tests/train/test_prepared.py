"""Prepared data: made once, whole or not at all, the tower's own numbers, and kept apart by content."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.integration.tiny import DATA, SCENES, read, steps
from vlmscale.compressors.features import tower_features
from vlmscale.config import Cell
from vlmscale.data import scenes
from vlmscale.data.pipeline import in_order
from vlmscale.data.sources import Stored
from vlmscale.errors import UserError
from vlmscale.loading import load_cell
from vlmscale.models.sizes import TOWERS
from vlmscale.train.frozen import load_tower, needs_of, tower_path
from vlmscale.train.prepared import Prepared, pixels_of, prepare
from vlmscale.weights import tree


def nothing(*_: object) -> None:
    return None


def tiny(*overrides: str) -> Cell:
    return load_cell(SCENES, [*DATA, *steps(4), "--config.data.train_images=300", *overrides])


# What each of these reads beside the selected layer, of a tower in SigLIP's style.
READ: dict[str, set[str]] = {
    "pool": set(),
    "tokenpacker": {"levels"},
    "fastervlm": {"mean_attention"},
    "prumerge": {"mean_attention", "keys"},
    "vistog": {"stack", "tower"},
}


def cell_of(name: str, *overrides: str) -> Cell:
    return tiny(f"--config.compressor.name={name}", *overrides)


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return [cell_of(name) for name in READ]


@pytest.fixture(scope="module")
def prepared(cells: list[Cell], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(cells, tmp_path_factory.mktemp("prepared") / "data", nothing)


def test_features_are_the_towers_over_several_batches(prepared: Prepared) -> None:
    """300 pictures are more than one batch of 256."""
    chosen = [0, 1, 255, 256, 299]
    stored: dict[str, np.ndarray] = {}
    for name, fields in READ.items():
        [reader] = prepared.pictures("train", [cell_of(name)])
        assert isinstance(reader, Stored)
        assert set(reader.names) == {"selected"} | fields - {"tower"}
        assert len(reader.store) == 300
        made = reader.store.gather(chosen)
        stored |= {field: made[field] for field in reader.names}
    drawn, _ = scenes.build("train", 300, 0)
    params = load_tower(tower_path(tiny()), "scenes-48")
    pixels = np.stack([pixels_of(scenes.draw(drawn[i]), tiny()) for i in chosen])
    needs = frozenset({"levels", "mean_attention", "keys", "stack"})
    wanted = tower_features(TOWERS["scenes-48"], params, pixels, needs)
    assert wanted.keys() == stored.keys()
    for name, values in wanted.items():
        assert stored[name].dtype == np.float32
        np.testing.assert_allclose(stored[name], values, rtol=1e-5, atol=1e-5)
    assert prepared.pictures("train", [tiny("--config.compressor.visual_tokens=0")]) == [None]


def test_a_method_says_what_it_reads() -> None:
    for name, fields in READ.items():
        assert needs_of(cell_of(name)) == fields
        assert needs_of(cell_of(name, "--config.compressor.visual_tokens=0")) == frozenset()
    assert needs_of(cell_of("fastervlm", "--config.compressor.options=score=probe")) == {"probe_attention"}


def test_the_towers_blocks_come_from_the_directorys_own_copy(prepared: Prepared) -> None:
    made = prepared.tower(cell_of("vistog"))
    assert made is not None
    wanted = load_tower(tower_path(tiny()), "scenes-48")
    blocks = [{f"block_{index}": tower[f"block_{index}"] for index in range(4)} for tower in (made, wanted)]
    assert tree.sha256(blocks[0]) == tree.sha256(blocks[1])
    assert all(prepared.tower(cell_of(name)) is None for name in READ if name != "vistog")
    assert prepared.tower(cell_of("vistog", "--config.compressor.visual_tokens=0")) is None


def test_a_tower_without_a_pooling_head_says_what_to_do(tmp_path: Path) -> None:
    """As the one that ships."""
    cell = cell_of("fastervlm", "--config.compressor.options=score=probe")
    with pytest.raises(UserError, match=r"has no pooling head.*score=mean") as error:
        prepare([cell], tmp_path / "data", nothing)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_rows_show_the_picture_that_their_record_names(prepared: Prepared) -> None:
    samples = prepared.samples("test", tiny())
    [dataset], [reader] = prepared.datasets["test"], prepared.pictures("test", [tiny()])
    assert isinstance(reader, Stored)
    batch = next(in_order(samples.source, samples.one_per_row(), 20))
    for row in range(20):
        record = dataset.record(row)
        number = int(record.images[0].removeprefix("test/").removesuffix(".png"))
        assert dataset.index.picture[row] == number
        np.testing.assert_array_equal(batch["selected"][row], reader.store[number]["selected"])
        targets = batch["target_ids"][row][batch["target_mask"][row]]
        assert prepared.template.decode(targets.tolist()) == record.turns[0].answer
        assert batch["image_slots"][row].sum() == 4
        places = batch["target_positions"][row][batch["target_mask"][row]]
        assert batch["tokens"][row][places + 1].tolist() == targets.tolist()


def test_it_is_made_once_and_other_data_is_refused(prepared: Prepared, cells: list[Cell]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in prepared.path.iterdir()}
    again = prepare(cells[::-1], prepared.path, lambda *_: pytest.fail("made twice"))
    assert again.manifest == prepared.manifest
    assert {path.name: path.stat().st_mtime_ns for path in prepared.path.iterdir()} == before
    for other in ("--config.data.seed=1", "--config.data.test_images=7", "--config.data.vocab_size=400"):
        changed = [dataclasses.replace(cell, data=tiny(other).data) for cell in cells]
        with pytest.raises(UserError, match="choose another --out"):
            prepare(changed, prepared.path, nothing)
    with pytest.raises(UserError, match="choose another --out"):
        prepare(cells[:2], prepared.path, nothing)  # that needs less of the tower
    with pytest.raises(UserError, match="must share"):
        prepare([tiny(), tiny("--config.data.seed=1")], prepared.path, nothing)


def test_a_directory_without_a_manifest_is_made_again(
    prepared: Prepared, cells: list[Cell], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "tokenizer.json").write_text("{")
    made = prepare(cells, out, nothing)
    assert made.manifest == prepared.manifest == read(out / "manifest.json")
    files = [path.relative_to(prepared.path) for path in prepared.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert (out / path).read_bytes() == (prepared.path / path).read_bytes(), path
