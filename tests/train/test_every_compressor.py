"""One cell of the demo with every method: trained, stopped, resumed, evaluated, recorded, exported."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlmscale
from tests.integration.tiny import DATA, SCENES, lines, read, steps
from vlmscale.compressors import COMPRESSORS, label, parse_options
from vlmscale.config import Cell
from vlmscale.convert import export_run
from vlmscale.cost.image import image_flops
from vlmscale.evaluate.loaded import answer_one, load_run
from vlmscale.evaluate.runner import Asked, evaluate
from vlmscale.loading import load_cell
from vlmscale.models.sizes import TOWERS
from vlmscale.train.cohort import Member
from vlmscale.train.loop import PreemptedError, train
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.run import open_run
from vlmscale.validation import evaluable_counts

STEPS = 4
# Also trained without a stop: what draws, has several losses, reads the question or runs the tower.
COMPARED = ("mqt", "m3", "quecc", "llava_mini", "vistog")
TOWER = TOWERS["scenes-48"]


def nothing(*_: object) -> None:
    return None


def cells() -> Iterator[Cell]:
    """Every method at about 4 tokens, and with each other value of its options but the scores."""
    for name, method in COMPRESSORS.items():
        variants = [""] + [
            f"{option}={value}"
            for option, values in method.options.items()
            for value in values[1:]
            if option != "score"
        ]
        for options in variants:
            cell = load_cell(SCENES, [*DATA, *steps(STEPS), "--config.evaluate.max_new_tokens=2"])
            counts = method.counts(TOWER.grid)
            wanted = counts[-1] if method.adaptive(parse_options(name, options)) else 4
            cell.compressor.visual_tokens = min(counts, key=lambda count: abs(count - wanted))
            cell.compressor.name, cell.compressor.options = name, options
            if method.nested is not None:
                cell.evaluate.visual_tokens = (1, 4)
            yield cell


CELLS = {label(c.compressor.name, parse_options(c.compressor.name, c.compressor.options)): c for c in cells()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """One directory for all of them, with whatever any of them reads of the tower."""
    return prepare(list(CELLS.values()), tmp_path_factory.mktemp("prepared") / "data", nothing)


def check_rows(cell: Cell, name: str, rows: list[dict[str, Any]]) -> None:
    """What the records say of the compressor."""
    compressor, method = cell.compressor, COMPRESSORS[cell.compressor.name]
    asked = cell.evaluate.visual_tokens or (compressor.visual_tokens,)
    tasks = {row["task"] for row in rows}
    assert len(rows) == len(tasks) * len(asked)
    assert {row["compressor"] for row in rows} == {name}
    given = {row["visual_tokens"] for row in rows}
    if method.adaptive(parse_options(compressor.name, compressor.options)):
        assert all(1 <= count < compressor.visual_tokens for count in given)
        assert any(count != int(count) for count in given)
    else:
        assert given == set(asked)
    for row in rows:
        image = image_flops(cell, round(row["visual_tokens"]), round(row["text_tokens_mean"]), 1.0)
        assert row["compressor_params"] > 0
        assert row["compressor_flops"] == image.compressor > 0
        assert row["tower_flops"] == image.tower
        assert (row["query_pass_flops"] > 0) == (method.text == "query")
        before_llm = row["tower_flops"] + row["compressor_flops"] + row["query_pass_flops"]
        assert row["infer_flops"] > before_llm > 0
        assert row["tokens_per_layer"] == pytest.approx(row["text_tokens_mean"] + row["visual_tokens"])


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_of_every_method(name: str, data: Prepared, tmp_path: Path) -> None:
    cell, broken = CELLS[name], tmp_path / "broken"
    open_run(cell, broken, data.path, "")

    def stop_at_2(step: int, *_: object) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    cell.train.heldout_every = 2  # has no part in the result, and calls stop_at_2
    with pytest.raises(PreemptedError, match="step 2"):
        train([Member(cell, broken)], broken, data, stop_at_2)
    train([Member(cell, broken)], broken, data, nothing)
    assert read(broken / "done.json")["resumed_from"] == [2]
    if cell.compressor.name in COMPARED:
        straight = tmp_path / "straight"
        open_run(cell, straight, data.path, "")
        train([Member(cell, straight)], straight, data, nothing)
        assert read(broken / "done.json")["params_sha256"] == read(straight / "done.json")["params_sha256"]
    loaded = load_run(broken)
    evaluate(loaded)
    rows = lines(broken / "result.jsonl")
    check_rows(cell, name, rows)
    assert len(list((broken / "answers").iterdir())) == len(rows)
    # Evaluated again, some rows take the place of themselves.
    evaluate(loaded, Asked([rows[0]["task"]]))
    assert lines(broken / "result.jsonl")[-1] == rows[-1]
    assert [row["task"] for row in lines(broken / "result.jsonl")] == [row["task"] for row in rows]
    if COMPRESSORS[cell.compressor.name].nested is not None:
        # At the count that it was not asked for before; the others' rows stay.
        new = evaluate(loaded, Asked([rows[0]["task"]], visual_tokens=[evaluable_counts(cell)[1]]))
        assert len(new) == 1
        known = {(row["task"], row["visual_tokens"]) for row in [*rows, *map(vars, new)]}
        after = lines(broken / "result.jsonl")
        assert {(row["task"], row["visual_tokens"]) for row in after} == known
        assert len(after) == len(known)
        assert len({row["heldout_loss"] for row in after}) == len({row["visual_tokens"] for row in after})
    picture = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(picture)
    for count in {evaluable_counts(cell)[0], evaluable_counts(cell)[-1]}:
        assert answer_one(loaded, picture, "How many circles?", visual_tokens=count).token_ids
    written = export_run(loaded, tmp_path / "out", None)
    card = next(path for path in written if path.name == "README.md").read_text()
    assert f"compressor `{name}`" in card
    if (tmp_path / "out" / "compressor.safetensors").exists():
        module = re.search(r"vlmscale/compressors/\w+\.py", card)
        assert module is not None
        assert Path(vlmscale.__file__).parents[1].joinpath(module.group()).is_file()
