"""The training loop of one cell: open the run, restore or initialise, step, log, save, finish.

Order inside the loop: step -> metrics -> (held-out loss) -> metrics to disk -> save. Metrics reach the
disk before the checkpoint of the same step, so a resume never misses a line and repeats none.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from vlmscale.config import Cell, cell_id, from_dict, leaves, to_dict
from vlmscale.data.pipeline import Batch, batches, fill, in_order
from vlmscale.errors import UserError
from vlmscale.models.vlm import VLM
from vlmscale.records import Metrics, Status, environment, make_directory, read_json, write_json
from vlmscale.sharding import check_batch, make_mesh, put_batch, replicated
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.feed import Feed
from vlmscale.train.prepared import Prepared, load_manifest
from vlmscale.train.step import (
    TrainState,
    build_model,
    init_state,
    loss_sum,
    make_optimizer,
    make_train_step,
)
from vlmscale.weights import tree

_FLUSH_EVERY = 25  # steps whose metrics are fetched from the device together
HELDOUT_BATCH = 200
_FEW = 0.5  # a share of image slots that is worth a word
Progress = Callable[[int, int, float], None]
Put = Callable[[Batch], dict[str, Any]]  # a host batch onto the devices, with what every batch shares


class PreemptedError(Exception):
    """Training stopped on a signal after saving: the process exits with 42 and is to be run again."""


@dataclass
class Signals:
    """Whether SIGTERM or SIGINT has asked for a stop."""

    received: int = 0


@contextmanager
def stop_on_signal() -> Iterator[Signals]:
    """Turn SIGTERM and SIGINT into a flag for as long as the loop runs."""
    signals = Signals()

    def remember(number: int, _: Any) -> None:
        signals.received = number

    previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def open_run(cell: Cell, run: Path, data: Path, sweep: str) -> None:
    """Make the run directory, or check that it belongs to this cell.

    Args:
      cell: the config.
      run: its directory.
      data: the prepared data, named in spec.json relative to the run.
      sweep: name of the sweep, "" for a single run.

    A directory of another config is taken over only while nothing was trained in it; fields that change no
    result follow the newest config.

    Raises:
      UserError: another config was trained there, or it cannot be written.
    """
    make_directory(run)
    spec, own = run / "spec.json", cell_id(cell)
    trained = (run / "done.json").exists() or Checkpoints.any_in(run)
    if spec.exists() and trained and (known := read_json(spec))["cell_id"] != own:
        raise UserError(
            f"{run}: holds cell {known['cell_id']}, this config is cell {own}"
            f"{_differences(known['config'], cell)}; choose another --out"
        )
    where = os.path.relpath(data.resolve(), run.resolve())
    write_json(spec, {"cell_id": own, "sweep": sweep, "data": where, "config": to_dict(cell)})


def _differences(known: dict[str, Any], wanted: Cell) -> str:
    """The first keys that matter in which two configs differ, for a message."""
    theirs = {name: value for name, value, _ in leaves(from_dict(known))}
    counting = [row for row in leaves(wanted) if row[2].get("changes_result", True)]
    found = [
        f"{name} is {theirs[name]} there and {value} here"
        for name, value, _ in counting
        if theirs[name] != value
    ]
    if not found:
        files = [name for name, value, about in counting if value and (about.keys() & {"content", "mixture"})]
        return f" (what a file holds has changed: {', '.join(files)})"
    return f" ({', '.join(found[:3])})"


@contextmanager
def exclusive(run: Path, wait: bool) -> Iterator[None]:
    """Hold a run's lock until the block or the process ends, however it ends.

    Args:
      run: the run directory.
      wait: wait for whoever holds it, instead of refusing.

    Raises:
      UserError: another process works on the run and `wait` is False.
    """
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{run}: another process is working on this run") from error
        yield


def load_prepared(run: Path) -> tuple[Cell, Prepared]:
    """The config of an opened run and its prepared data.

    Raises:
      UserError: not a run directory, or its data is gone.
    """
    spec = read_json(run / "spec.json")
    data = run / spec["data"]
    return from_dict(spec["config"]), Prepared(data, load_manifest(data))


@dataclass
class Run:
    """The pieces of a running cell that the loop needs."""

    cell: Cell
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    heldout: Callable[[Any], float] | None
    metrics: Metrics
    checkpoints: Checkpoints
    signals: Signals
    progress: Progress


def train(
    cell: Cell,
    run: Path,
    prepared: Prepared,
    progress: Progress,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Train one opened cell to its last step, resuming from its last good checkpoint.

    `tell` is called with what is to be known of the data before the first step.

    Raises:
      PreemptedError: a signal asked to stop; the state is saved.
      FloatingPointError: the loss is not finite; the message names the step.
    """
    if (run / "done.json").exists():
        return
    mesh = make_mesh()
    started = time.monotonic()
    checkpoints, status = Checkpoints(run), Status(run)
    step, before = checkpoints.latest() or 0, status.read()
    resumed = before["resumed_from"] + ([step] if before["attempts"] else [])
    write_json(run / "env.json", environment(jax.devices()[0].device_kind))
    status.update(state="running", attempts=before["attempts"] + 1, resumed_from=resumed, last_error=None)
    samples = prepared.samples("train", cell)
    layout, schedule = samples.training()
    check_batch(cell.train.batch_size, mesh, layout.shape.rows)
    layout_of_rows = samples.describe(layout, schedule)
    write_json(run / "data.json", layout_of_rows)
    if layout_of_rows["image_slots_used"] < _FEW and cell.compressor.visual_tokens:
        share = layout_of_rows["image_slots_used"]
        tell(
            f"only {share:.0%} of the image slots are used; with data.packing=pack and data.row_length rows "
            "share them"
        )
    if layout_of_rows["cut"]:
        tell(
            f"{layout_of_rows['cut']} conversations are cut at data.row_length={cell.data.row_length}; "
            f"{layout_of_rows['left_out']} of them have no word of an answer within it and are left out"
        )
    model = build_model(cell, prepared.tokenizer.get_vocab_size())
    optimizer = make_optimizer(cell.train)
    constants = jax.device_put(prepared.constants(cell), replicated(mesh))

    def put(batch: Batch) -> dict[str, Any]:
        return put_batch(batch, mesh) | constants

    mine = {"process": jax.process_index(), "processes": jax.process_count()}
    size, workers = cell.train.batch_size, cell.data.workers
    stream = batches(samples.source, layout, schedule, size, step, workers=workers, **mine)
    local = cell.train.batch_size // jax.process_count()
    nothing: list[list[list[int]]] = [[[]] * layout.shape.rows] * (local // layout.shape.rows)
    example = put(fill(samples.source, layout, nothing))  # for its shapes
    packed = model.clone(block_rows=layout.shape.rows)
    state = _first_state(cell, packed, optimizer, example, mesh, checkpoints, step)
    train_step = jax.jit(make_train_step(packed, optimizer, cell.train.seed), donate_argnums=0)
    heldout = _make_heldout(cell, prepared, model, mesh, put)
    metrics = Metrics(run / "metrics.jsonl", step)
    try:
        with closing(checkpoints), closing(metrics), stop_on_signal() as signals, Feed(stream, put) as feed:
            pieces = Run(cell, train_step, heldout, metrics, checkpoints, signals, progress)
            state = _loop(pieces, state, step, feed)
    except PreemptedError:
        status.update(state="preempted")
        raise
    finally:
        status.update(wall_s=before.get("wall_s", 0.0) + time.monotonic() - started)
    done = {
        "steps": cell.train.steps,
        "wall_s": status.read()["wall_s"],
        "resumed_from": resumed,
        "params_sha256": tree.sha256(state.params),
    }
    write_json(run / "done.json", done)


def _first_state(
    cell: Cell,
    model: VLM,
    optimizer: optax.GradientTransformation,
    batch: dict[str, jax.Array],
    mesh: Mesh,
    checkpoints: Checkpoints,
    step: int,
) -> TrainState:
    """Restore step `step`, or initialise when it is 0, straight onto the mesh; `batch` gives shapes."""
    everywhere = replicated(mesh)
    if not step:
        init = jax.jit(lambda b: init_state(model, optimizer, b, cell.train.seed), out_shardings=everywhere)
        return init(batch)
    shapes = jax.eval_shape(lambda b: init_state(model, optimizer, b, cell.train.seed), batch)
    return checkpoints.restore(step, with_sharding(shapes, everywhere))


def with_sharding(shapes: Any, sharding: jax.sharding.Sharding) -> Any:
    """The same tree of ShapeDtypeStructs, placed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _loop(run: Run, state: TrainState, step: int, feed: Feed[dict[str, Any]]) -> TrainState:
    config = run.cell.train
    waiting: list[tuple[int, dict[str, Any]]] = []
    input_waits: list[float] = []  # seconds, of the steps since the last that was logged
    while step < config.steps:
        batch = next(feed)
        input_waits.append(feed.wait_s)
        state, values = run.train_step(state, batch)
        step += 1
        last = step == config.steps
        with_heldout = step % config.heldout_every == 0 or last
        if step % config.log_every == 0 or with_heldout:
            waiting.append((step, values | {"input_wait_s": sum(input_waits) / len(input_waits)}))
            input_waits.clear()
        due = step % config.checkpoint_every == 0 or last
        if due or with_heldout or len(waiting) >= _FLUSH_EVERY:
            loss = _write_metrics(run, waiting, state, step, with_heldout)
            run.progress(step, config.steps, loss)
        stopping = run.signals.received != 0  # read once: one that comes later stops the next step
        if stopping:
            _write_metrics(run, waiting, state, step, with_heldout)
        if due or stopping:
            _check_finite(step, float(values["loss"]))  # also where this step is not logged
            run.checkpoints.save(step, state)
        if stopping and not last:
            run.checkpoints.wait()
            name = signal.Signals(run.signals.received).name
            raise PreemptedError(f"stopped by {name} at step {step}; saved, run again to go on")
    return state


def _write_metrics(
    run: Run,
    waiting: list[tuple[int, dict[str, Any]]],
    state: TrainState,
    step: int,
    with_heldout: bool,
) -> float:
    """Bring waiting metrics to disk; refuse a loss that is not finite. Returns the last loss."""
    loss = math.nan
    for number, values in waiting:
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        loss = numbers["loss"]
        _check_finite(number, loss)
        if run.heldout is not None and number == step and with_heldout:
            numbers["heldout_loss"] = run.heldout(state.params)
        run.metrics.write(number, **numbers)
    waiting.clear()
    run.metrics.flush()
    return loss


def _check_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}; lower train.learning_rate")


def _make_heldout(
    cell: Cell, prepared: Prepared, model: VLM, mesh: Mesh, put: Put
) -> Callable[[Any], float] | None:
    """Mean loss per supervised token on the validation split; None where there is no such split."""
    if "validation" not in prepared.manifest["records"]:
        return None
    samples = prepared.samples("validation", cell)
    layout = samples.one_per_row()
    size = -(-HELDOUT_BATCH // mesh.size) * mesh.size
    sums = jax.jit(lambda params, batch: loss_sum(model, params, batch))

    def heldout(params: Any) -> float:
        part = {"process": jax.process_index(), "processes": jax.process_count()}
        return mean_loss(
            lambda batch: sums(params, put(batch)),
            in_order(samples.source, layout, size, samples=samples.usable, **part),
        )

    return heldout


def mean_loss(sums: Callable[[Batch], tuple[jax.Array, jax.Array]], stream: Iterable[Batch]) -> float:
    """Loss per supervised token over all batches; `sums` gives the summed loss of one and its tokens."""
    parts = [jax.device_get(sums(batch)) for batch in stream]
    return float(sum(total for total, _ in parts) / max(sum(count for _, count in parts), 1))
