"""Statistics against counts done by hand, and what the table and the figure make of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmscale.data.assemble import PICTURES
from vlmscale.data.dataset import open_dataset
from vlmscale.data.lengths import Lengths
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.data.stats import FIGURES, plot, spread, summarise, table, token_statistics
from vlmscale.errors import UserError


def png(width: int, height: int, shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


WIDE, SQUARE = png(40, 10), png(30, 30)
QUESTION = Turn("<image>\nwhat is this", "a red line")
RECORDS = [
    (Record("a", ("wide.png",), (QUESTION,), task="look"), [WIDE]),
    (Record("b", (), (Turn("say yes", "yes"), Turn("and no", "no"), Turn("good", "bye"))), []),
    (Record("c", ("again.png",), (QUESTION,), task="look"), [WIDE]),
    (Record("d", ("1.png", "2.png"), (Turn("<image> or <image> ?", "both"),), task="choose"), [WIDE, SQUARE]),
]
COLUMNS = {
    "text": [9, 20, 9, 7],
    "images": [1, 0, 1, 2],
    "supervised": [4, 8, 4, 0],
    "query": [3, 2, 3, 1],
    "whole": [9, 50, 9, 12],
}
LENGTHS = Lengths(**{name: np.array(values, np.int32) for name, values in COLUMNS.items()})


def stand_in(path: Path, tasks: dict[str, int], pictures: int = 0, **manifest: Any) -> Any:
    """A data set of one-word records, as far as statistics look at it; `path` holds its list of files."""
    n = sum(tasks.values())
    shown = np.arange(pictures, dtype=np.int32)
    index = SimpleNamespace(
        image_offsets=np.minimum(np.arange(n + 1), pictures),
        picture=shown,
        picture_width=np.full(pictures, 640, np.int32),
        picture_height=np.full(pictures, 480, np.int32),
        picture_bytes=np.full(pictures, 100_000, np.int64),
        words=np.ones(n, np.int32),
        turns=np.ones(n, np.int16),
        task=np.repeat(np.arange(len(tasks), dtype=np.int16), list(tasks.values())),
    )
    counted = {"formats": {}, "modes": {}, "quarantined": {}, "duplicate_ids": 0}
    fixed = {"tasks": list(tasks), "bytes": {"train": 10**10}}
    return SimpleNamespace(path=path, split="train", index=index, manifest=fixed | counted | manifest)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a list of 14 picture files and nothing else."""
    path = tmp_path_factory.mktemp("$dollar$")
    names = ["top.png", *[f"coco/train/{i}.jpg" for i in range(3)], *[f"{i:03}/x.jpg" for i in range(10)]]
    np.savez(path / PICTURES, names=np.frombuffer(json.dumps(names).encode(), np.uint8))
    return path


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("stats") / "set"
    write_dataset(out, {"train": RECORDS})
    return summarise(open_dataset(out, "train"), LENGTHS, "v1")


def test_counts_are_those_of_the_records(stats: dict[str, Any]) -> None:
    assert (stats["records"], stats["pictures"], stats["images_shown"]) == (4, 2, 4)
    assert stats["modality"] == {"text alone": 1, "one image": 2, "several images": 1}
    assert stats["tasks"] == {"look": 2, "": 1, "choose": 1}
    assert stats["formats"] == {"PNG": 2}
    assert stats["modes"] == {"RGB": 2}
    assert (stats["quarantined"], stats["duplicate_ids"]) == ({}, 0)
    assert stats["disk"] > len(WIDE) * 3 + len(SQUARE)


def test_spreads_are_those_of_the_records(stats: dict[str, Any]) -> None:
    assert [stats["turns"][key] for key in ("least", "most", "total")] == [1, 3, 6]
    assert [stats["images"][key] for key in ("least", "most", "total")] == [0, 2, 4]
    assert [stats["width"][key] for key in ("least", "median", "most")] == [30, 35, 40]
    assert [stats["aspect"][key] for key in ("least", "most")] == [1.0, 4.0]
    assert stats["megapixels"]["total"] == pytest.approx((400 + 900) / 1e6)
    assert stats["bytes"]["total"] == len(WIDE) + len(SQUARE)


def test_tokens_are_those_of_the_lengths(stats: dict[str, Any]) -> None:
    assert stats["tokens"] == token_statistics(LENGTHS, "v1")
    assert stats["tokens"]["text"]["total"] == 45
    assert stats["tokens"]["supervised"]["median"] == 4
    assert (stats["tokens"]["unsupervised"], stats["tokens"]["cut"]) == (1, 2)


def test_lengths_of_another_set_are_refused(listed: Path) -> None:
    with pytest.raises(UserError, match="5 records in train, and token lengths of 4: measure them again"):
        summarise(stand_in(listed, {"": 5}), LENGTHS, "v1")


@given(st.lists(st.integers(0, 10**9), min_size=1), st.lists(st.integers(1, 65_535), min_size=1))
def test_a_histogram_loses_nothing(listed: Path, words: list[int], sides: list[int]) -> None:
    data = stand_in(listed, {"": len(words)}, pictures=len(sides))
    data.index.image_offsets = np.array([0] * len(words) + [len(sides)])
    data.index.words = np.array(words, np.int32)
    data.index.picture_width, data.index.picture_height = np.array(sides), np.array(sides[::-1])
    histograms = summarise(data)["histograms"]
    assert all(len(x["edges"]) == len(x["counts"]) + 1 for x in histograms.values())
    assert all(np.all(np.diff(x["edges"]) > 0) for x in histograms.values())
    for key in ("words", "turns", "images"):
        assert sum(histograms[key]["counts"]) == len(words)
    for key in ("megapixels", "aspect"):
        assert sum(histograms[key]["counts"]) == len(sides)


def test_a_spread_of_nothing_is_none() -> None:
    assert spread(np.zeros(0, np.int32)) is None


def test_the_table_says_what_was_counted(stats: dict[str, Any]) -> None:
    text = table(stats)
    assert "4 records" in text
    assert "2 distinct pictures" in text
    assert "shown 4 times" in text
    for line in (
        "text tokens (v1) 7 7.3 9 11.2 18.3 20",
        "one image 2 50.0% #############",
        "no task named 1 25.0% ######",
        "text tokens in all: 45, 35.6% of them supervised",
        "records that are cut: 2; without a supervised token: 1",
    ):
        assert line in [" ".join(row.split()) for row in text.splitlines()], line
    assert "quarantined" not in text


def test_the_table_fits_a_terminal_however_long_names_and_numbers_are(listed: Path) -> None:
    tasks = {f"{i}-" + "long" * 15: 100_000 - i for i in range(12)} | {"": 77}
    data = stand_in(
        listed, tasks, pictures=900_000, quarantined={"unreadable image" * 4: 10**6}, duplicate_ids=10**9
    )
    text = table(summarise(data))
    assert max(map(len, text.splitlines())) <= 80
    assert "3 more" in text
    counts = [int(row.split()[-3].replace(",", "")) for row in _rows(text, "tasks") if "#" in row]
    assert sum(counts) == sum(tasks.values()) - 77


def test_files_are_counted_by_folder(listed: Path, stats: dict[str, Any]) -> None:
    found = summarise(stand_in(listed, {"": 5}))
    assert found["folders"] == {"coco": 3} | {f"{i:03}": 1 for i in range(10)} | {"": 1}
    rows = [" ".join(row.split()[:-1]) for row in _rows(table(found), "picture files named, all splits")]
    assert rows[0] == "coco 3 21.4%"
    assert rows[-2:] == ["2 more 2 14.3%", "in no folder 1 7.1%"]
    assert stats["folders"] == {}  # it was made of records in memory


def test_a_damaged_list_of_files_is_one_line(tmp_path: Path) -> None:
    (tmp_path / PICTURES).write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"pictures\.npz: cannot be read"):
        summarise(stand_in(tmp_path, {"": 5}))


def _rows(text: str, heading: str) -> list[str]:
    return text.split(f"\n{heading}\n")[1].split("\n\n")[0].splitlines()


def test_the_figure_is_drawn_from_the_json_alone(stats: dict[str, Any], tmp_path: Path) -> None:
    plot(stats, tmp_path / "one")
    written = plot(json.loads(json.dumps(stats)), tmp_path / "new" / "two")
    assert [path.name for path in written] == list(FIGURES)
    for name in FIGURES:
        first, second = (tmp_path / "one" / name).read_bytes(), (tmp_path / "new" / "two" / name).read_bytes()
        assert first == second
    with Image.open(written[0]) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[0] > 1000
    assert 0.02 < np.mean(pixels < 200) < 0.5  # neither empty nor filled


@pytest.mark.parametrize("tasks", [{"": 3}, {"$\\frac{$": 2, "": 1}])
def test_a_set_without_pictures_or_tasks_has_a_figure(
    tasks: dict[str, int], listed: Path, tmp_path: Path
) -> None:
    stats = summarise(stand_in(listed, tasks))
    assert stats["bytes"] is None
    assert "megapixels" not in table(stats)
    assert all(path.stat().st_size > 10_000 for path in plot(stats, tmp_path))


def test_a_figure_that_cannot_be_written_is_one_line(stats: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken: the figure cannot be written"):
        plot(stats, tmp_path / "taken")
