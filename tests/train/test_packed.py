"""Packed rows train on what single rows train on, with the same loss and gradient, and a run says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.integration.tiny import SCENES, picture, read
from vlmscale.cli import main
from vlmscale.config import Cell, load_cell
from vlmscale.data.pipeline import batches, in_order
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.sharding import check_batch, make_mesh, put_batch
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.step import build_model, init_params, loss_sum, normalise

COUNT, LENGTH = 37, 160
METHODS = ("pool", "quecc", "llava_mini")  # that read no text, the question, and all of it


def record(number: int) -> tuple[Record, list[bytes]]:
    """Text alone, one picture, or several, in any turn; answers of many lengths."""
    rng = np.random.default_rng(number)
    turns, names = [], []
    for turn in range(int(rng.integers(1, 4))):
        shown = int(rng.integers(0, 3)) if number % 5 else 0
        names += [f"{number}-{turn}-{place}.png" for place in range(shown)]
        words = " ".join(f"w{word}" for word in rng.integers(0, 30, int(rng.integers(1, 9))))
        turns.append(Turn("<image>\n" * shown + f"Question {number} {turn}?", words))
    pictures = [picture(seed=100 * number + place, side=48) for place in range(len(names))]
    return Record(f"r{number}", tuple(names), tuple(turns)), pictures


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "data"
    write_dataset(out, {"train": [record(number) for number in range(COUNT)], "validation": [record(99)]})
    return out


def cell_of(directory: Path, name: str, *more: str) -> Cell:
    words = ["source=llava", f"prepared={directory}", "max_text_tokens=90", *more]
    overrides = [f"--config.data.{word}" for word in words]
    return load_cell(SCENES, [*overrides, f"--config.compressor.name={name}", "--config.train.batch_size=4"])


PACK = (f"row_length={LENGTH}", "packing=pack", "pack_rows=2")


@pytest.fixture(scope="module")
def prepared(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    cells = [cell_of(directory, name) for name in METHODS]
    return prepare(cells, tmp_path_factory.mktemp("run") / "data", lambda *_: None)


def epoch(prepared: Prepared, cell: Cell) -> tuple[list[dict[str, Any]], int]:
    """The batches of one epoch, rows behind it without targets; rows of a block."""
    samples, constants = prepared.samples("train", cell), prepared.constants(cell)
    if cell.data.packing == "none":
        stream = in_order(samples.source, samples.one_per_row(), 4)
        return [batch | constants for batch in stream], 1
    layout, schedule = samples.training()
    rows = len(schedule(0).row_offsets) - 1
    with batches(samples.source, layout, schedule, 4) as stream:
        out = [next(stream) | constants for _ in range(-(-rows // 4))]
    out[-1]["target_mask"][(rows - 1) % 4 + 1 :] = False
    return out, layout.shape.rows


@pytest.mark.parametrize("name", METHODS)
def test_an_epoch_has_the_same_loss_and_gradient_packed_and_not(
    name: str, directory: Path, prepared: Prepared
) -> None:
    alone, packed = cell_of(directory, name), cell_of(directory, name, *PACK)
    found = {}
    params = None
    for cell in (alone, packed):
        parts, rows = epoch(prepared, cell)
        model = build_model(cell, prepared.tokenizer.get_vocab_size()).clone(block_rows=rows)
        if params is None:
            params = init_params(model, parts[0], 0)
        run = jax.jit(jax.value_and_grad(lambda p, b, m=model: loss_sum(m, p, b), has_aux=True))
        total, count, grads = 0.0, 0, jax.tree.map(lambda x: np.zeros(x.shape), params)
        for batch in parts:
            (value, supervised), grad = run(params, batch)
            total, count = total + float(value), count + int(supervised)
            grads = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), grads, grad)
        found[cell.data.packing] = total, count, grads, len(parts)
    (loss, targets, gradient, steps), (also, same, equal, fewer) = found["none"], found["pack"]
    assert targets == same > 100
    assert fewer < steps / 2
    assert also == pytest.approx(loss, rel=1e-6)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(equal), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-6 * max(np.abs(mine).max(), 1))
    assert sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient)) > 1


def test_pictures_that_are_computed_in_the_step_are_those_that_were_stored(
    directory: Path, prepared: Prepared, tmp_path: Path
) -> None:
    stored = cell_of(directory, "pool")
    computed = cell_of(directory, "pool", "features=computed")
    other = prepare([computed], tmp_path / "data", lambda *_: None)
    assert not (tmp_path / "data" / "features").exists()
    values = []
    for cell, data in ((stored, prepared), (computed, other)):
        parts, _ = epoch(data, cell)
        model = build_model(cell, data.tokenizer.get_vocab_size())
        params = init_params(model, parts[0], 0)
        values.append([float(jax.jit(lambda p, b, m=model: loss_sum(m, p, b)[0])(params, b)) for b in parts])
    assert "pixels" in parts[0]
    assert parts[0]["pixels"].dtype == np.uint8
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)


def test_normalised_pixels_are_those_that_the_tower_was_given_on_the_host() -> None:
    from vlmscale.data.images import preprocess
    from vlmscale.models.sizes import TOWERS

    for size in (TOWERS["scenes-48"], TOWERS["clip-vit-large-patch14-336"]):
        levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
        wanted = preprocess(levels, 16, size.mean, size.std, "resize")
        np.testing.assert_array_equal(jax.jit(normalise, static_argnums=1)(jnp.asarray(levels), size), wanted)


@pytest.mark.parametrize("packing", ["none", "pack", "modality_length"])
def test_every_way_of_packing_trains_and_says_how_rows_are_used(
    packing: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"row_length={LENGTH}", f"packing={packing}", "workers=1" if packing == "pack" else "workers=0"]
    words += ["pack_rows=2"] if packing == "pack" else []
    words += ["source=llava", f"prepared={directory}", "max_text_tokens=90"]
    overrides = [f"--config.data.{word}" for word in words]
    short = ["--config.train.steps=3", "--config.train.warmup_steps=1", "--config.train.batch_size=16"]
    run = tmp_path / "run"
    assert main(["train", "--config", SCENES, "--out", str(run), *overrides, *short]) == 0, (
        capsys.readouterr()
    )
    said = read(run / "data.json")
    assert said["conversations"] == COUNT
    assert said["left_out"] == 0
    if packing == "pack":
        assert (said["rows_a_block"], said["row_length"]) == (2, LENGTH)
        assert said["rows"] < COUNT / 2
        assert said["positions_used"] > 0.7
    else:
        assert (said["rows"], said["rows_a_block"]) == (COUNT, 1)
    metrics = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    assert len(metrics) == 3
    assert all('"input_wait_s"' in line for line in metrics)


def test_rows_that_are_too_short_leave_conversations_out_and_say_so(
    directory: Path, prepared: Prepared
) -> None:
    samples = prepared.samples("train", cell_of(directory, "pool", "row_length=12", "packing=pack"))
    layout, schedule = samples.training()
    said = samples.describe(layout, schedule)
    assert 0 < said["left_out"] < COUNT
    assert said["conversations"] + said["left_out"] == COUNT
    shown = np.sort(schedule(3).samples)
    np.testing.assert_array_equal(shown, np.flatnonzero(samples.lengths.supervised > 0))


def test_a_batch_of_blocks_must_divide_over_the_devices() -> None:
    from vlmscale.errors import UserError

    mesh = make_mesh()
    check_batch(16, mesh, 2)
    with pytest.raises(UserError, match=r"multiple of the 8 devices times data\.pack_rows=4"):
        check_batch(16, mesh, 4)
    rows = put_batch({"tokens": np.arange(32).reshape(16, 2)}, mesh)["tokens"]
    assert rows.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(rows, np.arange(32).reshape(16, 2))
