"""What a user may change of a sweep that was launched: cells are run again, or stopped. No jax.

Each is done under a claim on the cohort, so that whoever works on it is never in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from launch.claims import describe, holder, take
from launch.directory import Crew, SweepDirectory
from launch.outcome import CANCEL, CANCELLED, TRIES, forgive, settle_cancel, unfinished
from launch.place import SHARED
from vlmscale.records import Status, make_directory, read_json, write_json

Tell = Callable[[str], None]
FILES = ("status.json", CANCEL)  # of a cell: what is read and changed here
_STOPPED = ("failed", CANCELLED)


def retry(sweep: SweepDirectory, cells: Sequence[str], tell: Tell) -> list[str]:
    """Make failed and cancelled cells pending again, with no attempts behind them.

    Cells of a cohort are run together, so all of its failed and cancelled ones become pending. One that the
    others left behind is from then on a cohort of its own: their checkpoints do not hold it.

    Args:
      sweep: its directory.
      cells: ids; none for all.
      tell: called with what is left alone, and why.

    Returns:
      The cells that are pending now.

    Raises:
      UserError: a cell that the sweep does not have, or no cohorts yet.
    """
    wanted, changed, alone = set(sweep.chosen(cells)), [], []
    for crew in sweep.crews():
        every = [run for run in crew.runs if _state(run) in _STOPPED]
        stopped = [run for run in every if run.name in wanted]
        if cells:
            _tell_others([run for run in crew.runs if run.name in wanted and run not in stopped], tell)
        if not stopped:
            continue
        store = sweep.place.claims(crew.folder)
        claim = take(store)
        if claim is None:
            tell(f"{crew.id}: {describe(holder(store) or {})} works on it; left alone")
            continue
        sweep.place.refresh(crew.runs)
        behind = [run for run in crew.runs if Status(run).read().get("failed_at") is not None]
        apart = behind if len(behind) < len(crew.runs) or not set(behind) <= set(stopped) else []
        training = set(unfinished(crew.runs)) - set(behind)
        beside = [run for run in every if run not in stopped and run not in behind]
        if beside and not set(stopped) <= set(apart):
            tell(f"{', '.join(run.name for run in beside)}: in the same cohort, pending as well")
            stopped += beside
        for run in stopped:
            if run in apart and training:
                tell(f"{run.name}: was left behind by cells that are not done; retry it when they are")
            elif _state(run) in _STOPPED:  # still, now that nobody else may change it
                Status(run).update(
                    state="pending", attempts=0, last_error=None, failed_at=None, tries_left=TRIES
                )
                changed.append(run.name)
                alone += [run.name] if run in apart else []
        sweep.place.send(crew.runs, claim)
        claim.release()
    if alone:
        _part(sweep, alone)
    return changed


def cancel(sweep: SweepDirectory, cells: Sequence[str], tell: Tell) -> tuple[list[str], list[str]]:
    """Stop cells: those that wait are cancelled, and who works on others is asked to save and stop.

    Cells of a cohort are stopped together.

    Args:
      sweep: its directory.
      cells: ids; none for all.
      tell: called with what is stopped beside them, and who was asked.

    Returns:
      The cells that are cancelled, and those whose holder was asked.

    Raises:
      UserError: a cell that the sweep does not have, or no cohorts yet.
    """
    wanted, cancelled, asked = set(sweep.chosen(cells)), [], []
    for crew in sweep.crews():
        left = [run for run in unfinished(crew.runs) if _state(run) != CANCELLED]
        if cells:
            _tell_others([run for run in crew.runs if run.name in wanted and run not in left], tell)
        if not wanted & {run.name for run in left}:
            continue
        names = [run.name for run in left]
        if beside := [name for name in names if name not in wanted]:
            tell(f"{', '.join(beside)}: in the same cohort, stopped as well")
        for run in left:
            make_directory(run)
            (run / CANCEL).touch()
        sweep.place.send([run / CANCEL for run in left], None)
        store = sweep.place.claims(crew.folder)
        claim = take(store)
        if claim is None:
            tell(f"{crew.id}: {describe(holder(store) or {})} is asked to save and stop")
            asked += names
            continue
        sweep.place.refresh(crew.runs)
        if settle_cancel(crew.runs):
            cancelled += names
        sweep.place.send(crew.runs, claim)
        claim.release()
    return cancelled, asked


def forgive_failed(crews: Sequence[Crew]) -> None:
    """Give failed cells that nobody works on all their tries again: a new launch is a new chance."""
    for crew in crews:
        if any(_state(run) == "failed" for run in unfinished(crew.runs)):
            claim = take(SHARED.claims(crew.folder))
            if claim is not None:
                forgive(crew.runs)
                claim.release()


def _state(run: Path) -> str:
    return str(Status(run).read()["state"])


def _tell_others(runs: Sequence[Path], tell: Tell) -> None:
    for run in runs:
        tell(f"{run.name}: {_state(run)}, left alone")


def _part(sweep: SweepDirectory, alone: Sequence[str]) -> None:
    """Make each of these cells a cohort of its own in sweep.json."""
    path = sweep.out / "sweep.json"
    known = read_json(path)
    others = [[name for name in ids if name not in alone] for ids in known["cohorts"]]
    known["cohorts"] = [ids for ids in others if ids] + [[name] for name in alone]
    write_json(path, known)
    sweep.place.send([path], None)
