"""One cohort, worked on under a claim: what launchers start here and engines start elsewhere.

Exit codes: 0 done, 2 never worth a retry, 42 saved and to be run again, anything else a fault.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from launch.claims import (
    LIFE_S,
    Claim,
    LostError,
    committed,
    describe,
    holder,
    take,
    wait_and_take,
)
from launch.outcome import cancel_asked, fail, held_back, settle_cancel, unfinished
from launch.place import SHARED, Place
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, PreemptedError, UserError, disk_fault
from vlmscale.records import Status

Commit = Callable[[Path], None]
_GO = -1  # instead of an exit code: there is work


def work(
    folder: Path,
    runs: Sequence[Path],
    run: Callable[[Commit], None],
    *,
    life_s: float = LIFE_S,
    wait: bool = False,
    lost: Callable[[], None] | None = None,
    place: Place = SHARED,
) -> int:
    """Claim a cohort and run it.

    Args:
      folder: of the cohort; of a cohort of one its run directory.
      runs: run directories of its cells.
      run: does the work. Called with a function that it calls with each run directory that is finished, which
        notes that for good; it raises LostError where another has taken the cohort over.
      life_s: seconds after which a claim that is not renewed has expired.
      wait: for a holder to expire, unless it shows life.
      lost: called in another thread as soon as another has the cohort; by default the process ends there.
      place: where the sweep lies that the directories are of.

    Returns:
      The exit code. That of a cohort which another holds is 42.
    """
    claim, code = begin(folder, runs, life_s, wait, place)
    if claim is None:
        return code
    return attempt(folder, runs, run, claim, life_s, lost or end, place)


def begin(
    folder: Path, runs: Sequence[Path], life_s: float, wait: bool, place: Place
) -> tuple[Claim | None, int]:
    """Claim a cohort where there is something to do, else None; and the exit code of that.

    Args:
      folder: as `work`; so `runs`, `life_s` and `wait`.
      place: where the sweep lies.
    """
    store, places = place.claims(folder), [folder, *runs]
    place.fetch(places)
    if not unfinished(runs):
        return None, 0
    claim = wait_and_take(store, life_s) if wait else take(store, life_s)
    if claim is None:
        who = holder(store, life_s)
        say(f"{folder.name}: {describe(who or {})} works on it; run again when that is over")
        return None, EXIT_AGAIN
    place.fetch(places)  # what its last holder wrote
    for name in committed(store):  # by one that was killed before it could say so
        for own in runs:
            if own.name == name and Status(own).read()["state"] != "done":
                Status(own).update(state="done", last_error=None)
    cancelled = settle_cancel(runs)
    place.send(places, claim)
    if not unfinished(runs):
        claim.release()
        return None, 0
    why = held_back(runs)
    if not why:
        return claim, _GO
    claim.release()
    how = "stopped as asked" if cancelled else "vlmscale sweep retry runs it again"
    say(f"{folder.name}: {why}; {how}")
    return None, EXIT_USER


def attempt(
    folder: Path,
    runs: Sequence[Path],
    run: Callable[[Commit], None],
    claim: Claim | None,
    life_s: float,
    lost: Callable[[], None],
    place: Place = SHARED,
) -> int:
    """Run a claimed cohort once and note what came of it; the exit code.

    Args:
      folder: as `work`; so `runs`, `run`, `life_s` and `lost`.
      claim: on it; None in processes that write nothing, beside the one that has it.
      place: where the sweep lies.
    """
    if claim is None:
        return _ended(folder, runs, lambda: run(lambda path: None), lambda *_: None)
    held, places = claim, [folder, *runs]
    stopping = threading.Event()

    def commit(path: Path) -> None:
        place.send(places, held)
        held.commit(path.name)
        Status(path).update(state="done", last_error=None)

    def look() -> None:
        place.look(runs)
        if cancel_asked(runs) and not stopping.is_set():
            stopping.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def preempted_or_failed(line: str, code: int) -> None:
        with contextlib.suppress(LostError):
            held.renew()  # what is written below is the holder's to write
            if code == EXIT_AGAIN:
                for path in unfinished(runs):
                    Status(path).update(state="preempted")
            else:
                fail(runs, line, code)

    with held.kept(life_s, lost, look), place.kept(places, held):
        code = _ended(folder, runs, lambda: run(commit), preempted_or_failed)
        try:
            held.renew()
            place.look(runs, now=True)
            if settle_cancel(runs):
                say(f"{folder.name}: stopped as asked; vlmscale sweep retry runs it again")
                code = EXIT_USER
            place.send(places, held)
            held.release()
        except LostError:
            pass
        except OSError as error:  # what was committed is settled by whoever comes next
            say(f"{folder.name}: {error}")
            code = code or 1
    return code


def run_cohort(
    folder: Path, runs: Sequence[Path], *, wait: bool, distributed: str = "", place: Place = SHARED
) -> int:
    """Train and evaluate a cohort; the exit code.

    Args:
      folder: as `work`; so `runs` and `wait`.
      distributed: as `vlmscale.distributed.start`. The first process claims and writes.
      place: where the sweep lies; each process has its own, of which `folder` and `runs` are.
    """
    from vlmscale.distributed import agree, leader, start
    from vlmscale.train.run import keep_programs

    keep_programs()
    try:
        start(distributed)
    except UserError as error:  # such as a port that is taken: worth another try on other machines
        say(f"{folder.name}: {error}")
        return 1
    claim, code = begin(folder, runs, LIFE_S, wait, place) if leader() else (None, 0)
    code = agree(code)
    if code != _GO:
        return code

    def run(commit: Commit) -> None:
        # Of several processes jax has the handler, through which they agree on when to stop.
        try:
            with contextlib.nullcontext() if distributed else _stoppable():
                _train(folder, runs, commit, place, claim)
        except PreemptedError as error:
            if agree(int(cancel_asked(runs))):  # by the same file all processes end alike
                raise _CancelledError(str(error)) from error
            raise

    return attempt(folder, runs, run, claim, LIFE_S, end, place)


def note_death(folder: Path, runs: Sequence[Path], line: str) -> None:
    """Note why a process ended that could not say so itself, which takes a try; unless others go on already.

    Args:
      folder: as `work`; so `runs`.
      line: the reason.
    """
    claim = wait_and_take(SHARED.claims(folder))
    if claim is not None:
        fail(unfinished(runs), line, 1)
        claim.release()


def say(line: str) -> None:
    """Tell the log."""
    print(line, file=sys.stderr, flush=True)


def _ended(
    folder: Path, runs: Sequence[Path], run: Callable[[], None], note: Callable[[str, int], None]
) -> int:
    """The exit code of a run, after noting why it ended."""
    try:
        run()
        return 0
    except LostError as error:
        say(f"{folder.name}: {error}; nothing more is written here")
        return EXIT_AGAIN
    except _CancelledError as error:
        say(str(error))
        return EXIT_USER
    except PreemptedError as error:
        line, code = str(error), EXIT_AGAIN
    except (UserError, FloatingPointError) as error:  # a floating point error would come again
        line, code = str(error), EXIT_USER
    except Exception as error:
        fault = disk_fault(error)
        if fault is not None:
            line, code = f"{fault.filename or folder}: {fault.strerror}", EXIT_USER
        else:
            traceback.print_exc()
            line, code = f"{type(error).__name__}: {error}".splitlines()[0], 1
    say(line)
    note(line, code)
    return code


def _train(folder: Path, runs: Sequence[Path], commit: Commit, place: Place, claim: Claim | None) -> None:
    from vlmscale.distributed import agree, leader
    from vlmscale.evaluate.loaded import load_run
    from vlmscale.evaluate.runner import evaluate
    from vlmscale.train.cohort import Member
    from vlmscale.train.loop import train
    from vlmscale.train.run import exclusive, load_prepared

    tell, places = say if leader() else lambda line: None, [folder, *runs]
    # What the leader fetched when it had the claim is what the others are to begin with.
    place.fetch([place.data(folder)] if leader() else [place.data(folder), *places])
    with contextlib.ExitStack() as stack:
        for path in dict.fromkeys(places) if leader() else ():
            # One that lost its claim, or whose launcher was killed, may still be at it.
            stack.enter_context(exclusive(path, wait=True))
        opened = [load_prepared(run) for run in runs]
        members = [Member(cell, run) for (cell, _), run in zip(opened, runs, strict=True)]
        train(
            members,
            folder,
            opened[0][1],
            lambda step, steps, text: None,
            tell,
            before=lambda: place.send(places, claim),
        )
        _share(place, places, claim)
        for run in runs:
            if agree(int(Status(run).read()["state"] != "done" and (run / "done.json").exists())):
                evaluate(load_run(run), tell=tell)
                commit(run)


def _share(place: Place, places: Sequence[Path], claim: Claim | None) -> None:
    """Show what the first process wrote to the others; on a shared disk they see it anyway."""
    from vlmscale.distributed import barrier, leader

    if place.shared:
        return
    if leader():
        place.send(places, claim)
    barrier("files are sent")
    if not leader():
        place.fetch(places)


class _CancelledError(PreemptedError):
    """Saved because somebody asked for it to be stopped: not to be run again."""


class _Stopped(BaseException):
    """SIGTERM came; not an Exception, which would count as a question that was not answered."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM stop what is not the training loop as well, which has a handler of its own."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise _Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stopped:
        raise PreemptedError("stopped by SIGTERM; run again to go on") from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def end() -> NoReturn:
    """End at once: what was claimed is another's now."""
    say("the claim of this process expired and was taken over: it ends, and the new holder goes on")
    os._exit(EXIT_AGAIN)
