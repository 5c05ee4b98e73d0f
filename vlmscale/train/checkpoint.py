"""Checkpoints with Orbax: async, atomic, and checked when they are read.

A step that Orbax has not finished has a name of its own, so a killed save leaves nothing that looks like a
step. Damage done later it does not see: any folder with a number counts as a step, a file that is gone or cut
raises one of five exceptions, and bytes flipped in an array's file come back as other values without a word
(measured with orbax-checkpoint 0.12.8). Hence the manifest in each step, which is renamed into place with it:

  files    bytes of every file, and the CRC-32 of small ones; checked at each opening, without reading arrays
  digests  one number for each array, computed where the array lies; checked against what was restored

It costs one pass over arrays on the device, and a look at each file. Nothing is read back after a save. A
folder may be an address of a bucket; what differs there is in `vlmscale.train.steps`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vlmscale.errors import UserError, disk_fault
from vlmscale.records import ADDRESS, CHECKPOINTS
from vlmscale.train.steps import steps_in

_TIMEOUT = 7200  # seconds for a save in the background; Orbax's 1200 are few for 100 GB on a shared disk
_ORBAX = f"{os.sep}orbax{os.sep}"  # in the paths of its source
_REFUSALS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")  # in what TensorStore and XLA raise
_Made = TypeVar("_Made")


class DamagedError(UserError):
    """A step that was saved, but cannot be restored as it was; `fault` says why."""

    def __init__(self, step: str, fault: str) -> None:
        super().__init__(f"{step} is damaged ({fault})")
        self.fault = fault


class Checkpoints:
    """A folder of Orbax checkpoints of named items; a step that is not whole, or damaged, does not count.

    All methods are called on every process of a run, in the same order; process 0 alone deletes and renames.
    The folder is the only truth: no list of steps is kept in memory that could fall behind it.

    Attributes:
      path: the folder, absolute, or the address.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int = 2,
        tell: Callable[[str], None] = lambda line: None,
        *,
        read_only: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Open a folder: remove what killed saves left there, and set damaged steps aside.

        Args:
          folder: RUN/checkpoints, or an address of a bucket; it is made by the first save.
          keep: good steps that stay; an older one is deleted once the next is on disk.
          tell: called on process 0 with one line for each damaged step.
          read_only: change nothing, as for evaluation; damaged steps are told and passed over.
          before: called on process 0, in a thread, when a step is written and before it counts.

        Raises:
          OSError: something is to be removed or set aside, and the disk refuses.
        """
        _quiet()
        self._steps = steps_in(folder)
        self.path = self._steps.path
        self._keep, self._tell, self._read_only = max(keep, 1), tell, read_only
        self._before = before
        self._passed_over: set[int] = set()
        self._saving: tuple[int, dict[str, jax.Array]] = (0, {})  # the step, and its digests by leaf
        self._pending: Future[None] | None = None
        self._writes: list[Any] = []  # futures of the newest save's items
        self._finisher = ThreadPoolExecutor(1, "checkpoints")
        self._checkpointer = self._make_checkpointer()
        self._handler = ocp.StandardCheckpointHandler()
        if not read_only:
            _from_first(self._steps.clear)
        self._sort_out()

    @classmethod
    def of(cls, run: Path, *rest: Any, **options: Any) -> Checkpoints:
        """Those of a run directory: in its folder, or at the address that its file names.

        Args:
          run: the directory.
          rest: as for a folder; so `options`.
        """
        address = run / ADDRESS
        place = address.read_text(encoding="utf-8").strip() if address.exists() else run / CHECKPOINTS
        return cls(place, *rest, **options)

    @staticmethod
    def any_in(folder: Path) -> bool:
        """Whether a folder holds a step, good or not; looks at names alone."""
        return any(path.name.isdigit() for path in folder.glob("*"))

    def latest(self) -> int | None:
        """The newest good step."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The good steps, ascending: committed, and with the files that were saved."""
        found = _from_first(self._steps.inspect)
        return [step for step, fault in found if fault is None and step not in self._passed_over]

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Start saving in the background; returns when arrays may change or be donated.

        Args:
          step: its number; any that is not there yet.
          items: trees of arrays by name; one without arrays (an empty optimiser state) takes no room.

        Raises:
          Exception: what made the save before this one, or the start of this one, fail. The step is not
            there then, what it left is removed, and the next save starts afresh.
          ValueError: the step is there already, or there is nothing to save.
        """
        if self._read_only:
            raise ValueError(f"{self.path}: is opened to be read only")
        self.wait()
        filled = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
        if not filled:
            raise ValueError(f"{self.path}: step {step} has no array to save")
        if not _from_first(lambda: self._may_write(step)):
            raise ValueError(f"{self.path}: step {step} is there already")
        # The digests are dispatched before the arrays may be donated, and fetched in the background.
        self._saving = step, digests(filled)
        saves = {name: ocp.args.StandardSave(tree) for name, tree in filled.items()}
        try:
            self._checkpointer.save(self.path / str(step), args=ocp.args.Composite(**saves))
        except Exception:
            self._start_afresh()
            raise
        self._pending = self._finisher.submit(self._finish)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Bring items of a step back, bit for bit, onto any mesh of any number of processes.

        Args:
          step: its number.
          abstract: trees of ShapeDtypeStructs with shardings by name; items that are not asked for are not
            read.

        Raises:
          DamagedError: it does not come back as it was saved.
          UserError: there is no such step, or it holds other parameters, shapes or dtypes.
        """
        self.wait()
        for leaf in jax.tree.leaves(abstract):
            leaf.sharding.shard_shape(leaf.shape)  # raises: what fails from here on fails for the files
        path = self.path / str(step)
        if not _from_first(lambda: self._steps.exists(step)):
            raise UserError(f"{self.path}: there is no step {step}; there are {self.steps()}")
        fault, restored = _from_first(lambda: self._steps.fault(step)), {}
        if fault is None:
            try:
                self._compare(path, abstract)
                restored = self._read(path, abstract)
            except Exception as error:
                if not _of_the_files(error):
                    raise
                fault = f"unreadable: {_root(error)}"
            fault = _agreed(fault)
        fault = fault or self._changed(step, restored)
        if fault is not None:
            raise DamagedError(f"{self.path}: step {step}", fault)
        return restored

    def restore_latest(self, abstract: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """The newest step that restores, and what `restore` makes of it; None where there is none.

        A step that turns out damaged on the way is set aside (passed over where read only) and told.

        Raises:
          UserError: a good step holds other parameters, shapes or dtypes.
        """
        self.wait()
        self._sort_out()
        while (step := self.latest()) is not None:
            try:
                return step, self.restore(step, abstract)
            except DamagedError as error:
                self._give_up(step, error.fault)
        return None

    def wait(self) -> None:
        """Block until a started save is on disk, and raise if it failed.

        Raises:
          Exception: what made it fail; `vlmscale.errors.disk_fault` knows a full or read-only disk.
        """
        if self._pending is None:
            return
        try:
            self._pending.result()
        except Exception:
            self._pending = None
            self._start_afresh()
            raise
        self._pending = None  # not where Ctrl-C ended the waiting: `close` waits again

    def close(self) -> None:
        """Wait, and release the threads, also when a save failed."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._checkpointer.close()
            self._handler.close()

    def _make_checkpointer(self) -> ocp.AsyncCheckpointer:
        # Folders are made before `save` returns: writers that wait for one that cannot be made wait for
        # minutes, and so does the end of the program.
        options = ocp.AsyncOptions(
            timeout_secs=_TIMEOUT,
            post_finalization_callback=self._seal,
            create_directories_asynchronously=False,
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options)
        )
        start = handler.async_save

        async def start_and_remember(*arguments: Any, **named: Any) -> Any:
            self._writes = await start(*arguments, **named) or []
            return self._writes

        handler.async_save = start_and_remember
        return ocp.AsyncCheckpointer(handler, async_options=options)

    def _may_write(self, step: int) -> bool:
        """On process 0: whether the step is new. A disk that takes nothing is told before all wait for it."""
        self._steps.probe()
        return not self._steps.exists(step)

    def _seal(self) -> None:
        """Write the manifest: called on process 0 when all files are there, before the step counts."""
        step, arrays = self._saving
        self._before()
        self._steps.seal(step, {name: int(value) for name, value in jax.device_get(arrays).items()})

    def _finish(self) -> None:
        """In a thread: wait for the commit, then delete the steps that are too many."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            good = [step for step, fault in self._steps.inspect() if fault is None]
            for step in good[: -self._keep]:
                self._steps.remove(step)

    def _start_afresh(self) -> None:
        """After a failed save: give its room back, and leave Orbax's memory of it behind."""
        for write in self._writes:  # the first that failed was told; others may still be writing
            with contextlib.suppress(Exception):
                write.result()
        with contextlib.suppress(Exception):  # the same failure again
            self._checkpointer.close()
        self._checkpointer = self._make_checkpointer()
        end, calm = time.monotonic() + 20, 0  # what is there after 20 s is left to the next opening
        while jax.process_index() == 0 and calm < 10 and time.monotonic() < end:
            # Writes that TensorStore has begun make their folders again, and nobody tells when they end.
            calm = 0 if self._steps.clear(ignore_errors=True) else calm + 1
            time.sleep(0.1)

    def _sort_out(self) -> None:
        for step, fault in _from_first(self._steps.inspect):
            if fault is not None and step not in self._passed_over:
                self._give_up(step, fault)

    def _give_up(self, step: int, fault: str) -> None:
        """Set a damaged step aside, or pass it over where read only, and tell it."""
        where = ""
        if self._read_only:
            self._passed_over.add(step)
        else:
            aside = f"damaged-{step}"
            _from_first(lambda: self._steps.set_aside(step, aside))
            where = f" and set aside as {aside}"
        newest, use = self.latest(), "the newest good one is" if self._read_only else "training goes on from"
        goes_on = f"{use} step {newest}" if newest is not None else "no good step is left"
        if jax.process_index() == 0:
            self._tell(f"{self.path}: step {step} is damaged ({fault}){where}; {goes_on}")

    def _changed(self, step: int, restored: dict[str, Any]) -> str | None:
        """Which restored array is not the one that was saved; None where all are, or no manifest says."""
        manifest = _from_first(lambda: self._steps.manifest(step))
        if manifest is None:
            return None
        for name, value in jax.device_get(digests(restored)).items():
            if manifest["digests"].get(name) != value:
                return f"{name} has other values than were saved"
        return None

    def _compare(self, path: Any, abstract: dict[str, Any]) -> None:
        """Raise a UserError unless a step holds exactly these leaves; Orbax itself would cast a dtype."""
        for item, tree in abstract.items():
            wanted, found = _leaves({item: tree}), {}
            if (path / item).is_dir():
                found = _leaves({item: self._handler.metadata(path / item).tree})
            for name in sorted(wanted.keys() | found.keys()):
                there, here = (_describe(leaves.get(name)) for leaves in (found, wanted))
                if there != here:
                    raise UserError(
                        f"{self.path}: its checkpoint holds other parameters than this version of vlmscale "
                        f"has ({name} is {there} there and {here} here); read it with the version that "
                        "wrote it, or train again into another directory"
                    )

    def _read(self, path: Any, abstract: dict[str, Any]) -> dict[str, Any]:
        read = self._handler.restore  # the checkpointer's waits for all processes, also where one has failed
        return {
            item: read(path / item, args=ocp.args.StandardRestore(tree)) if jax.tree.leaves(tree) else tree
            for item, tree in abstract.items()
        }


def digests(items: dict[str, Any]) -> dict[str, jax.Array]:
    """A uint32 scalar for each array, by its path; the same for the same bits however they are sharded."""
    found = {}
    for name, leaf in _leaves(items).items():
        found[name] = _digest(leaf)
        if jax.process_count() > 1:  # on CPUs two programs at a time could wait for each other's collectives
            found[name].block_until_ready()
    return found


@jax.jit
def _digest(values: jax.Array) -> jax.Array:
    """Sum of a mix of each element's bits and its place: one changed element always changes it."""
    bits = values  # of a bool as they are; others in words of their size, wider ones in several
    if values.dtype != bool:
        words = {1: jnp.uint8, 2: jnp.uint16}.get(values.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(values, words)
    bits = bits.astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):  # without a reshape, which would move shards
        step = np.uint32(stride % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    # Every line is a bijection of `bits`; the constants are odd, with bits well spread.
    mixed = bits ^ (place * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> 13)
    return jnp.sum(mixed, dtype=jnp.uint32)


def _leaves(items: dict[str, Any]) -> dict[str, Any]:
    """Leaves by path, such as opt_state/1/mu/kernel: the same for a NamedTuple and what Orbax makes of it."""
    found = jax.tree_util.tree_leaves_with_path(items)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def _describe(leaf: Any) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _root(error: BaseException) -> str:
    """The beginning of what is behind an error: Orbax's own text is pages of TensorStore's settings."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _of_the_files(error: BaseException) -> bool:
    """Whether reading failed for what the files hold: not for want of memory, rights or open files."""
    if isinstance(error, UserError) or disk_fault(error) is not None:
        return False
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MemoryError) or any(word in str(link) for word in _REFUSALS):
            return False
        link = link.__cause__ or link.__context__
    return True


def _quiet() -> None:
    """Keep Orbax from telling what is raised here as well: its pages would bury the one line about it."""
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_in_orbax)
    before = sys.unraisablehook
    if getattr(before, "func", None) is not _pass_on:
        sys.unraisablehook = functools.partial(_pass_on, before)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return _ORBAX not in record.pathname


def _not_in_orbax(record: logging.LogRecord) -> bool:
    """Not of a task of its that failed beside the one whose error is raised."""
    raised = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    return not any(_ORBAX in frame.f_code.co_filename for frame, _ in raised)


def _pass_on(hook: Callable[[Any], Any], trouble: Any) -> None:
    """Drop what becomes of other reads and writes once one has failed: nobody waits for them any more."""
    of_a_task = _ORBAX in getattr(getattr(trouble.object, "cr_code", None), "co_filename", "")
    no_loop = trouble.object is None and str(trouble.exc_value) == "Event loop is closed"
    if not of_a_task and not no_loop:
        hook(trouble)


def _from_first(make: Callable[[], _Made]) -> _Made:
    """What process 0 makes (JSON values), on every process; an error of its is raised on all of them."""
    if jax.process_count() == 1:
        return make()
    told: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            told = {"made": make()}
        except OSError as error:
            told = {"errno": error.errno or errno.EIO, "filename": error.filename}
        except Exception as error:
            told = {"error": repr(error)}
    text = np.frombuffer(json.dumps(told, default=str).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    told = json.loads(bytes(np.asarray(text, np.uint8)))
    if "errno" in told:
        raise OSError(told["errno"], os.strerror(told["errno"]), told["filename"])
    if "error" in told:
        raise RuntimeError(f"process 0: {told['error']}")
    return told["made"]


def _agreed(fault: str | None) -> str | None:
    """None where all processes are well; else what is wrong here or elsewhere."""
    if jax.process_count() == 1:
        return fault
    failed = multihost_utils.process_allgather(np.bool_(fault is not None))
    return fault or (f"process {failed.argmax()} cannot read it" if failed.any() else None)
