"""Packed rows train on what single rows train on, with the same loss and gradient, and a run says how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.integration.tiny import SCENES, picture, read
from vlmscale.cli import main
from vlmscale.config import Cell
from vlmscale.data.images import preprocess
from vlmscale.data.pipeline import batches, in_order
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.errors import UserError
from vlmscale.loading import load_cell
from vlmscale.models.sizes import TOWERS
from vlmscale.sharding import check_batch, make_mesh, put_batch
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.step import build_model, init_params, loss_sum, model_inputs, normalise

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


@pytest.fixture(scope="module", autouse=True)
def programs_are_compiled_quickly() -> Iterator[None]:
    """They run for less time than it takes to make them fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    samples = prepared.samples("train", cell)
    if cell.data.packing == "none":
        stream = in_order(samples.source, samples.one_per_row(), 4)
        return list(stream), 1
    layout, schedule = samples.training()
    rows = len(schedule(0).row_offsets) - 1
    with batches(samples.source, layout, schedule, 4) as stream:
        out = [next(stream) for _ in range(-(-rows // 4))]
    out[-1]["target_mask"][(rows - 1) % 4 + 1 :] = False
    return out, layout.shape.rows


@pytest.mark.parametrize("name", METHODS)
def test_an_epoch_has_the_same_loss_and_gradient_packed_and_not(
    name: str, directory: Path, prepared: Prepared, random_params: Callable[..., Any]
) -> None:
    alone, packed = cell_of(directory, name), cell_of(directory, name, *PACK)
    found = {}
    params = None
    for cell in (alone, packed):
        parts, rows = epoch(prepared, cell)
        model = build_model(cell, prepared.tokenizer.get_vocab_size()).clone(block_rows=rows)
        if params is None:
            params = random_params(model, model_inputs(parts[0]), parts[0]["target_positions"])["params"]
        run = jax.jit(jax.value_and_grad(partial(loss_sum, model), has_aux=True))
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
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(equal), strict=True))
    norm = np.sqrt(sum(float(np.sum(mine**2)) for mine, _ in pairs))
    apart = np.sqrt(sum(float(np.sum((mine - theirs) ** 2)) for mine, theirs in pairs))
    assert norm > 1
    assert apart <= 1e-6 * norm
    for mine, theirs in pairs:  # and no single leaf hides in the sum
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=5e-6 * max(np.abs(mine).max(), 1))


def test_pictures_that_are_computed_in_the_step_are_those_that_were_stored(
    directory: Path, prepared: Prepared, tmp_path: Path, random_params: Callable[..., Any]
) -> None:
    stored = cell_of(directory, "pool")
    computed = cell_of(directory, "pool", "features=computed")
    other = prepare([computed], tmp_path / "data", lambda *_: None)
    assert not (tmp_path / "data" / "features").exists()
    values, params = [], None
    for cell, data in ((stored, prepared), (computed, other)):
        parts, _ = epoch(data, cell)
        model = build_model(cell, data.tokenizer.get_vocab_size())
        if params is None:
            params = random_params(model, model_inputs(parts[0]), parts[0]["target_positions"])["params"]
        run, tower = jax.jit(partial(loss_sum, model)), data.tower(cell)
        whole = params if tower is None else params | {"tower": tower}
        values.append([float(run(whole, batch)[0]) for batch in parts])
    assert "pixels" in parts[0]
    assert parts[0]["pixels"].dtype == np.uint8
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)


def test_normalised_pixels_are_those_that_the_tower_was_given_on_the_host() -> None:
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
        # Empty rows fill LLaVA's last batch of 16.
        assert (said["rows"], said["rows_a_block"]) == (COUNT if packing == "none" else 48, 1)
    metrics = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    assert len(metrics) == 3
    assert all('"input_wait_s"' in line for line in metrics[1:])


def test_rows_that_are_too_short_leave_conversations_out_and_say_so(
    directory: Path, prepared: Prepared
) -> None:
    samples = prepared.samples("train", cell_of(directory, "pool", "row_length=12", "packing=pack"))
    layout, schedule = samples.training()
    said = samples.describe(layout, schedule)
    assert 0 < said["left_out"] < COUNT
    assert said["conversations"] + said["left_out"] == COUNT
    with pytest.raises(UserError, match=r"data\.row_length=5: no conversation has a word of an answer"):
        prepared.samples("train", cell_of(directory, "pool", "row_length=5")).training()
    shown = np.sort(schedule(3).samples)
    np.testing.assert_array_equal(shown, np.flatnonzero(samples.lengths.supervised > 0))


def test_a_batch_of_blocks_must_divide_over_the_devices() -> None:
    mesh = make_mesh()
    check_batch(16, mesh, 2)
    with pytest.raises(UserError, match=r"multiple of the 8 devices times data\.pack_rows=4"):
        check_batch(16, mesh, 4)
    rows = put_batch({"tokens": np.arange(32).reshape(16, 2)}, mesh)["tokens"]
    assert rows.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(rows, np.arange(32).reshape(16, 2))


def test_rows_in_which_no_picture_fits_are_refused(directory: Path, prepared: Prepared) -> None:
    with pytest.raises(UserError, match=r"data\.row_length=4: no picture of 4 tokens fits"):
        prepared.samples("train", cell_of(directory, "pool", "row_length=4"))


def test_a_mixture_validates_on_what_has_the_split_and_refuses_a_weight_of_nothing(
    directory: Path, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "more", {"train": [record(number) for number in range(200, 206)]})
    cell = cell_of(directory, "pool")
    cell.data.prepared = f"{tmp_path / 'more'},{directory}=0.5"
    mixed = prepare([cell], tmp_path / "run", lambda *_: None)
    assert [len(part) for part in mixed.datasets["train"]] == [6, COUNT]
    assert [len(part) for part in mixed.datasets["validation"]] == [1]
    assert mixed.eval_split == "validation"
    _, schedule = mixed.samples("train", cell).training()
    shown = [schedule(epoch).samples for epoch in (0, 1)]
    assert [sorted(part[part < 6]) for part in shown] == [list(range(6))] * 2
    assert sorted(np.concatenate([part[part >= 6] for part in shown])) == list(range(6, 6 + COUNT))
    cell.data.prepared = f"{directory}=0.01"
    with pytest.raises(UserError, match=r"data\.prepared: .*=0\.01 shows none of its 37 records"):
        prepare([cell], tmp_path / "none", lambda *_: None)


def test_a_data_set_that_was_replaced_under_a_run_is_refused(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "set")
    made = prepare([cell_of(tmp_path / "set", "pool")], tmp_path / "run", lambda *_: None)
    assert len(made.datasets["train"][0]) == COUNT
    shutil.rmtree(tmp_path / "set")
    write_dataset(tmp_path / "set", {"train": [record(number) for number in range(5)]})
    with pytest.raises(UserError, match="set: holds other data than when"):
        _ = Prepared(made.path, made.manifest).datasets


def test_m3_pads_what_it_cannot_shorten(directory: Path, prepared: Prepared) -> None:
    """Rows of a given length may be full of text: shortened they would lose what is predicted last."""
    for words in (("row_length=40",), ("row_length=40", "packing=pack")):
        cell = cell_of(directory, "m3", *words)
        samples = prepared.samples("train", cell)
        layout, schedule = samples.training()
        model = build_model(cell, prepared.tokenizer.get_vocab_size())
        assert model.full_rows
        with batches(samples.source, layout, schedule, 8) as stream:
            parts = [next(stream) for _ in range(3)]
        params = init_params(model, parts[0], 0)
        run = jax.jit(lambda p, b, m=model: loss_sum(m, p, b)[0])
        assert np.isfinite([float(run(params, batch)) for batch in parts]).all()


def test_rows_are_shaped_by_what_is_trained_on(tmp_path: Path) -> None:
    """One record whose question never ends is set aside, and must not set the size of every batch."""
    endless = Record("endless", (), (Turn("why " * 500, "Because."),))
    write_dataset(tmp_path / "set", {"train": [(endless, []), *(record(number) for number in range(5))]})
    cell = cell_of(tmp_path / "set", "quecc")
    made = prepare([cell], tmp_path / "run", lambda *_: None)
    layout, schedule = made.samples("train", cell).training()
    assert layout.query_length < 30
    assert layout.shape.length < 150
    assert 0 not in schedule(0).samples
    old = {name: value for name, value in made.manifest.items() if name != "version"}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="made by an earlier version"):
        prepare([cell], tmp_path / "run", lambda *_: None)
