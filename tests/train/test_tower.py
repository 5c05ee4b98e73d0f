"""The demo's vision tower: its recipe runs, twice the same, and the shipped file is what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from vlmscale.cli import main
from vlmscale.compressors.features import tower_features
from vlmscale.config import Cell
from vlmscale.data import scenes
from vlmscale.errors import UserError
from vlmscale.models.sizes import TOWERS
from vlmscale.train import tower as recipe
from vlmscale.train.frozen import load_tower, tower_path
from vlmscale.train.prepared import pixels_of
from vlmscale.weights import tree


def test_the_shipped_tower_is_small_and_sees() -> None:
    path = tower_path(Cell())
    assert path.name == "scenes-48.safetensors"
    assert path.stat().st_size < 2_000_000
    params = load_tower(path, "scenes-48")
    size = TOWERS["scenes-48"]
    drawn, _ = scenes.build("test", 16, 0)
    pixels = np.stack([pixels_of(scenes.draw(scene), Cell()) for scene in drawn])
    out = tower_features(size, params, pixels, frozenset({"levels"}))
    assert out["selected"].shape == (16, size.num_patches, size.width)
    assert out["levels"].shape == (16, size.num_patches, size.width * len(size.levels))
    for values in out.values():
        assert np.isfinite(values).all()
    flat = np.asarray(out["selected"]).reshape(16, -1)
    apart = np.linalg.norm(flat[:, None] - flat[None], axis=-1)[~np.eye(16, dtype=bool)]
    assert apart.min() > 1, "different pictures look the same to it"


@pytest.mark.slow
def test_two_runs_write_the_same_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = recipe.Recipe
    monkeypatch.setattr(
        recipe, "Recipe", lambda **options: whole(**options, pictures=200, batch_size=16)
    )  # 30,000 pictures take longer to draw than four steps to train
    digests = []
    for name in ("first", "second"):
        path = tmp_path / name / "tower.safetensors"
        assert main(["tower", "--out", str(path), "--steps", "4"]) == 0
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    told = capsys.readouterr()
    assert told.out.count("wrote ") == 2
    assert "caption" in told.err
    assert digests[0] == digests[1]
    params = load_tower(tmp_path / "first" / "tower.safetensors", "scenes-48")
    shipped = load_tower(tower_path(Cell()), "scenes-48")
    assert tree.sha256(params) != tree.sha256(shipped)
    tree.check_shapes(Path("x"), params, shipped)


def test_a_file_that_is_another_tower_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    params = tree.flatten(load_tower(tower_path(Cell()), "scenes-48"))
    name = "patch_embedding/kernel"
    for changed, message in (
        ({k: v for k, v in params.items() if k != name}, f"{name} is missing"),
        (params | {"more": np.zeros(3, np.float32)}, "more is unknown"),
        (params | {name: np.zeros((3, 3), np.float32)}, f"{name} has shape"),
    ):
        tree.save(path, changed, {})
        with pytest.raises(UserError, match=message):
            load_tower(path, "scenes-48")


def test_files_do_not_depend_on_the_order_of_parameters(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    values = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    tree.save(first, values, {"name": "x"})
    tree.save(second, dict(reversed(values.items())), {"name": "x"})
    assert first.read_bytes() == second.read_bytes()
    header = first.read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"name": "x"}
