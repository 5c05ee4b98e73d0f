"""The training loop of a cohort: open, restore or begin, step, log, save, finish. A run is a cohort of one.

Order inside the loop: step -> (held-out loss) -> metrics to disk -> save. Metrics reach the disk before the
checkpoint of the same step, so a resume never misses a line and repeats none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlmscale.distributed import agree, host_part, leader
from vlmscale.errors import PreemptedError
from vlmscale.records import Status, make_directory, read_json, write_json
from vlmscale.sharding import check_batch
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.cohort import Group, Groups, Member, faster_together
from vlmscale.train.feed import Feed
from vlmscale.train.heldout import Heldout
from vlmscale.train.journal import Journal, tell_layout
from vlmscale.train.preemption import Preemption
from vlmscale.train.prepared import Prepared
from vlmscale.train.state import choose_mesh
from vlmscale.train.together import Encode, Reading, make_encode, make_put, read_together
from vlmscale.train.watch import Means, Meter, Window
from vlmscale.weights import tree

_FLUSH_EVERY = 25  # logged steps whose values are fetched from the devices together, at most
_FLUSH_S = 2.0  # or once so many seconds have passed
Progress = Callable[[int, int, str], None]


@dataclass
class Running:
    """The pieces of a cohort that the loop needs."""

    members: Sequence[Member]
    groups: Groups
    reading: Reading
    encode: Encode
    heldout: Heldout | None
    journal: Journal
    checkpoints: Checkpoints
    preemption: Preemption
    window: Window
    progress: Progress
    meter: Meter = field(default_factory=Meter)
    means: list[Means] = field(default_factory=list)

    def take(self) -> list[dict[str, jax.Array] | None]:
        """Means of every living group since the last call; of others None."""
        pairs = zip(self.groups.groups, self.means, strict=True)
        return [means.take() if group.alive else None for group, means in pairs]

    @property
    def alive(self) -> list[Group]:
        """Groups with a cell that still trains."""
        return [group for group in self.groups.groups if group.alive]


def train(
    members: Sequence[Member],
    folder: Path,
    prepared: Prepared,
    progress: Progress,
    tell: Callable[[str], None] = lambda line: None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Train the opened cells of a cohort to their last step, resuming from its last good checkpoint.

    Cells whose numbers stop being finite are left behind, marked as failed in status.json, and the others go
    on.

    Args:
      members: cells that read the same samples in the same order, with their run directories.
      folder: of the cohort, where checkpoints lie; of a cohort of one its run directory.
      prepared: their data.
      progress: called with (step, steps, text).
      tell: called with what is to be known before the first step.
      before: called on the first process, in a thread, before a checkpoint counts: what it continues is to
        be safe by then.

    Raises:
      PreemptedError: something asked to stop; the state is saved.
      FloatingPointError: no cell has finite numbers any more; the message names step and records.
      UserError: a config that does not fit data, devices or what is on disk.
    """
    left = [member for member in members if not (member.run / "done.json").exists()]
    if not left or (len(left) < len(members) and all(Status(m.run).read().get("failed_at") for m in left)):
        return
    mesh = choose_mesh([member.cell for member in members], prepared)
    journal = Journal(members, mesh.size, tell)
    journal.begin(jax.devices()[0].device_kind)
    try:
        with jax.set_mesh(mesh):
            _train(members, folder, prepared, mesh, journal, progress, tell, before)
    except PreemptedError:
        journal.status(state="preempted")
        raise
    finally:
        journal.took()


def _train(
    members: Sequence[Member],
    folder: Path,
    prepared: Prepared,
    mesh: Mesh,
    journal: Journal,
    progress: Progress,
    tell: Callable[[str], None],
    before: Callable[[], None],
) -> None:
    cells = [member.cell for member in members]
    train, data, part = cells[0].train, cells[0].data, host_part(mesh)
    reading = read_together(prepared, "train", cells, training=True)
    rows = reading.layout.shape.rows
    check_batch(train.batch_size, mesh, rows, train.accumulate)
    tell_layout(members, reading, tell)
    checkpoints = Checkpoints.of(folder, train.keep, tell, before=before)
    put = make_put(mesh, part, train.accumulate)
    groups = _make_groups(members, folder, prepared, mesh, reading, put, tell)
    step = _restore_or_begin(groups, checkpoints, journal, tell)
    encode = make_encode(cells, groups.shared_tower, train.accumulate)
    journal.open(step, groups.groups, reading, prepared)
    with ExitStack() as stack:
        stack.enter_context(closing(checkpoints))
        stack.enter_context(closing(journal))
        preemption = stack.enter_context(Preemption())
        window = stack.enter_context(closing(Window(folder, train.profile)))
        stream = reading.training(train.batch_size, step, data.workers, part)
        feed = stack.enter_context(Feed(stream, put))
        heldout = Heldout.of(groups, prepared, mesh, part)
        running = Running(
            members, groups, reading, encode, heldout, journal, checkpoints, preemption, window, progress
        )
        _loop(running, step, feed)
        # What came during the last step: who called would go on to evaluate, and be killed at that.
        reason = preemption.requested(train.steps + 1)
    _finish(groups, folder, journal)
    if reason:
        raise PreemptedError(f"stopped by {reason} after the last step; saved, run again to go on")


def _make_groups(
    members: Sequence[Member],
    folder: Path,
    prepared: Prepared,
    mesh: Mesh,
    reading: Reading,
    put: Callable[[dict[str, np.ndarray]], dict[str, Any]],
    tell: Callable[[str], None],
) -> Groups:
    """Lay the groups out; how cells of one shape run is decided once and kept in cohort.json."""
    train, rows = members[0].cell.train, reading.layout.shape.rows
    path = folder / "cohort.json"
    known = read_json(path)["batched"] if path.exists() else {}
    decided: dict[str, Any] = {}

    def batched(indices: Sequence[int]) -> bool:
        if train.batch_cells != "auto":
            return train.batch_cells == "always"
        name = ",".join(str(index) for index in indices)
        if name not in known:
            trial = Groups(members, prepared, mesh, rows, lambda _: False)

            def make(part: Sequence[int]) -> Group:
                group = trial.lay_out(part, [members[index] for index in part])
                trial.begin(group, lambda line: None)
                return group

            with reading.training(train.batch_size, 0, 0, host_part(mesh)) as stream:
                host = next(stream)

            @cache
            def batch() -> dict[str, Any]:  # when the tower is there
                return make_encode(reading.cells, trial.shared_tower, train.accumulate)(put(host))

            seconds = faster_together(make, indices, lambda index: reading.of_cell(batch(), index))
            tell(
                f"{len(indices)} cells of one shape: a step takes {seconds['batched']:.3f} s batched and "
                f"{seconds['apart']:.3f} s apart"
            )
            known[name] = bool(agree(int(seconds["batched"] < seconds["apart"])))
            decided[name] = seconds
        return bool(known[name])

    groups = Groups(members, prepared, mesh, rows, batched)
    if decided and leader():
        make_directory(folder)
        write_json(path, {"batched": known, "seconds": decided})
    return groups


def _restore_or_begin(
    groups: Groups, checkpoints: Checkpoints, journal: Journal, tell: Callable[[str], None]
) -> int:
    """Set the state of every group; the step that training goes on from."""
    several = len(groups.groups) > 1
    if checkpoints.latest() is not None:
        for group in groups.groups:
            group.failed = {at: step for at, m in enumerate(group.members) if (step := journal.failed_at(m))}
        living = [group for group in groups.groups if group.alive]
        wanted = {name: shape for group in living for name, shape in _items(group, group.abstract, several)}
        found = checkpoints.restore_latest(wanted)
        if found is not None:
            step, items = found
            for group in living:
                group.state = _state(group, items, several)
                groups.set_frozen(group, tell)
            journal.resumed(step)
            return step
    for group in groups.groups:
        group.failed = {}
        groups.begin(group, tell)
    journal.resumed(0)
    return 0


def _prefix(group: Group, several: bool) -> str:
    """What a group's items are named with; of a cohort of one nothing, so that it is a plain run."""
    return f"{group.members[0].run.name}." if several or len(group.members) > 1 else ""


def _items(group: Group, state: Any, several: bool) -> list[tuple[str, Any]]:
    """What a checkpoint holds of a group."""
    prefix = _prefix(group, several)
    return [
        (f"{prefix}params", state.params),
        (f"{prefix}opt_state", state.opt_state),
        (f"{prefix}counters", {"step": state.step, "skipped": state.skipped}),
    ]


def _state(group: Group, items: dict[str, Any], several: bool) -> Any:
    prefix = _prefix(group, several)
    counters = items[f"{prefix}counters"]
    return group.abstract._replace(
        step=counters["step"],
        params=items[f"{prefix}params"],
        opt_state=items[f"{prefix}opt_state"],
        skipped=counters["skipped"],
    )


def _loop(run: Running, step: int, feed: Feed[dict[str, Any]]) -> None:
    config, alone, first = run.members[0].cell.train, jax.process_count() == 1, step + 1
    run.means = [Means() for _ in run.groups.groups]
    waiting: list[tuple[int, list[Any]]] = []
    flushed = time.monotonic()
    while step < config.steps:
        step += 1
        with run.window.step(step):
            batch = run.encode(next(feed))
            run.meter.step(feed.wait_s)
            for group, means in zip(run.groups.groups, run.means, strict=True):
                if group.alive:
                    own = run.reading.of_cell(batch, group.indices[0])
                    group.state, values = group.step(group.state, group.frozen, own, group.knobs)
                    means.add(step, values)
        run.window.after(step, [group.state for group in run.alive])
        if step == first:  # most of it was compilation
            jax.block_until_ready([group.state for group in run.alive])
            run.meter.skip()
            flushed = time.monotonic()
        last = step == config.steps
        with_heldout = run.heldout is not None and (step % config.heldout_every == 0 or last)
        due = step % config.checkpoint_every == 0 or last
        logged = step % config.log_every == 0 or with_heldout or due
        if logged:
            waiting.append((step, run.take()))
        late = alone and time.monotonic() - flushed > _FLUSH_S
        if due or with_heldout or len(waiting) >= _FLUSH_EVERY or (late and waiting):
            _flush(run, waiting, with_heldout)
            flushed = time.monotonic()
        reason = run.preemption.requested(step)  # asked once: what comes later stops the next step
        if reason and not logged:
            waiting.append((step, run.take()))
        if reason and waiting:
            _flush(run, waiting, False)
        if due or reason:
            several = len(run.groups.groups) > 1
            items = {name: x for group in run.alive for name, x in _items(group, group.state, several)}
            run.checkpoints.save(step, items)
        if reason and not last:
            run.checkpoints.wait()
            raise PreemptedError(f"stopped by {reason} at step {step}; saved, run again to go on")
    run.checkpoints.wait()


def _flush(run: Running, waiting: list[tuple[int, list[Any]]], with_heldout: bool) -> None:
    """Bring waiting values to disk, of the last step with the held-out loss; leave failed cells behind."""
    config, groups = run.members[0].cell.train, run.groups.groups
    fetched = jax.device_get([values for _, values in waiting])
    clock = run.meter.read()
    text = ""
    for (step, _), values in zip(waiting, fetched, strict=True):
        losses: dict[int, float] = {}
        if with_heldout and step == waiting[-1][0] and run.heldout is not None:
            losses = run.heldout([group for group in groups if group.alive])
        for group, own in zip(groups, values, strict=True):
            if own is not None:
                run.journal.write(step, group, own, clock, losses)
        text = run.journal.live_line(groups, values, clock)
    last = waiting[-1][0]
    waiting.clear()
    run.journal.flush()
    if with_heldout:
        run.meter.skip()
    run.progress(last, config.steps, text)
    if not run.alive:
        raise FloatingPointError(run.journal.failure)


def _finish(groups: Groups, folder: Path, journal: Journal) -> None:
    """Write what remains of each cell: its parameters where its own directory lacks them, and done.json."""
    for group in groups.groups:
        for place, (index, member) in enumerate(zip(group.indices, group.members, strict=True)):
            if place in group.failed or (member.run / "done.json").exists():
                continue
            params = group.params(place)
            if member.run != folder:
                own = Checkpoints.of(member.run)
                if own.latest() is None:
                    own.save(member.cell.train.steps, {"params": params})
                own.close()
            assert group.state is not None
            skipped = group.of_cell(jax.device_get(group.state.skipped), place)
            journal.done(index, tree.sha256(params), int(skipped))
