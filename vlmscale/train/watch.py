"""What is seen of a run in training: means on the device, rates, memory, TensorBoard, a profile, parameters.

`metrics.jsonl` itself is `vlmscale.records.Metrics`. Nothing here changes what is trained.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics, parameter_overview

from vlmscale.cost.peak import peak_flops
from vlmscale.records import make_directory, write_lines

_GIB = 1024.0**3
_EVENTS = "events.out.tfevents"  # TensorBoard knows its files by "tfevents"


class Meter:
    """The clock of a program: time of a step, and how much of it was spent waiting for input."""

    def __init__(self) -> None:
        self.skip()

    def step(self, input_wait_s: float) -> None:
        """Count a step that was dispatched, and the seconds it waited for its batch."""
        self._steps += 1
        self._waited += input_wait_s

    def read(self) -> dict[str, float]:
        """Seconds a step, means since the last `read` or `skip`; empty if there was no step.

        To be called when values of the last step have reached the host: dispatch runs ahead of the devices.
        """
        steps, waited, seconds = self._steps, self._waited, time.perf_counter() - self._started
        self.skip()
        return {"step_s": seconds / steps, "input_wait_s": waited / steps} if steps else {}

    def skip(self) -> None:
        """Leave out what passed since the last `read`: a pause between steps, or compilation in the first."""
        self._steps, self._waited, self._started = 0, 0.0, time.perf_counter()


class Work(NamedTuple):
    """What one step computes, over all processes."""

    positions: int  # of the rows, padding included
    text_and_visual: float  # of them that hold a text or visual token, the mean of steps
    flops: float  # of the model, analytic


def rates(work: Work, step_s: float, device_count: int, device_kind: str, dtype: str) -> dict[str, float]:
    """How fast a step of `step_s` seconds is.

    Args:
      work: of the step.
      step_s: its wall time.
      device_count: devices of all processes.
      device_kind: as jax names them.
      dtype: of the matrix products.

    Returns:
      "tokens_per_s": text and visual tokens; "padding": share of positions that hold neither; "flops_per_s";
      "peak_share": of the peak of all devices, absent where `peak_flops` does not know it.
    """
    found = {
        "tokens_per_s": float(work.text_and_visual / step_s),
        "padding": float(1 - work.text_and_visual / work.positions),
        "flops_per_s": float(work.flops / step_s),
    }
    peak = peak_flops(device_kind, dtype)
    return found if peak is None else found | {"peak_share": found["flops_per_s"] / (device_count * peak)}


def memory() -> dict[str, float]:
    """GiB in use.

    Returns:
      "memory_gib": the most that one local device has had in use, or the host's where devices do not tell;
      "host_gib": the resident set of this process.
    """
    host = _resident_bytes() / _GIB
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"memory_gib": max(peaks) / _GIB if peaks else host, "host_gib": host}


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the largest so far, on macOS in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()


def live_line(loss: float, values: Mapping[str, float]) -> str:
    """A line for the terminal, of what `Meter.read` and `rates` found so far."""
    parts = [f"loss {loss:.3f}"]
    if "tokens_per_s" in values:
        parts.append(f"{_short(values['tokens_per_s'])} tokens/s")
    if "step_s" in values:
        seconds = values["step_s"]
        parts.append(f"{seconds:.1f} s a step" if seconds >= 1 else f"{seconds * 1e3:.0f} ms a step")
        parts.append(f"input {values['input_wait_s'] / seconds:.0%}")
    if "peak_share" in values:
        parts.append(f"{values['peak_share']:.0%} of peak")
    return ", ".join(parts)


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


@flax.struct.dataclass
class _Steps(metrics.Metric):
    """How many steps had finite values and how many had not, and the first of these; int32."""

    good: jax.Array
    failures: jax.Array
    first: jax.Array  # 0 while there is none

    def merge(self, other: _Steps) -> _Steps:
        first = jnp.where(self.failures > 0, self.first, other.first)
        return _Steps(self.good + other.good, self.failures + other.failures, first)

    def compute(self) -> dict[str, jax.Array]:
        return {"failures": self.failures, "first_failure": self.first}


_Totals = tuple[dict[str, metrics.Average], _Steps]


def _totals(step: jax.Array, values: Mapping[str, jax.Array]) -> _Totals:
    """One step as totals to be merged; one that failed counts in no mean."""
    finite = jnp.stack([jnp.isfinite(value) for value in values.values()]).all(0)

    def average(name: str, value: jax.Array) -> metrics.Average:
        counts = values["target_tokens"] if name == "loss" else jnp.ones_like(value)
        count = jnp.where(finite, counts, 0).astype(jnp.float32)
        return metrics.Average(jnp.where(finite, value * count, 0), count)

    good, failed = finite.astype(jnp.int32), (~finite).astype(jnp.int32)
    steps = _Steps(good, failed, failed * step)
    return {name: average(name, value) for name, value in values.items()}, steps


@jax.jit
def _add(totals: _Totals | None, step: jax.Array, values: Mapping[str, jax.Array]) -> _Totals:
    new = _totals(step, values)
    if totals is None:
        return new
    averages = {name: average.merge(new[0][name]) for name, average in totals[0].items()}
    return averages, totals[1].merge(new[1])


@jax.jit
def _compute(totals: _Totals) -> dict[str, jax.Array]:
    averages, steps = totals

    def mean(average: metrics.Average) -> jax.Array:
        # Not Average.compute: steps without a supervised token have loss 0 together, as each of them has.
        return jnp.where(steps.good > 0, average.total / jnp.maximum(average.count, 1), jnp.nan)

    return {name: mean(average) for name, average in averages.items()} | steps.compute()


class Means:
    """Means of a cell's values over the steps between two logged lines, summed on the device.

    The loss is weighted by the supervised tokens of its step, all else counts once a step. Nothing here waits
    for a device.
    """

    def __init__(self) -> None:
        self._now: _Totals | None = None

    def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Count a step.

        Args:
          step: its number, from 1.
          values: what the training step returned, with "loss" and "target_tokens"; all of one shape, [] or
            [cells] where several cells are trained as one batched program.
        """
        self._now = _add(self._now, step, dict(values))

    def take(self) -> dict[str, jax.Array]:
        """The means since the last call, float32, and what failed, int32; on the device, to be fetched later.

        A step in which any value is not finite is in no mean: "failures" says how many were left out, and
        "first_failure" the number of the first, 0 where there is none. Where all failed, the means are NaN.
        """
        assert self._now is not None, "no step since the last line"
        values, self._now = _compute(self._now), None
        return values


class Board:
    """TensorBoard event files of a cell under `tensorboard/`, one a launch.

    Files that a killed launch left are kept; a new one begins with the mark that makes TensorBoard drop what
    they hold behind the step that was resumed, so that it shows no step twice.
    """

    def __init__(self, run: Path, resume_step: int) -> None:
        """Open a new file.

        Args:
          run: the run directory.
          resume_step: the step of the checkpoint that training goes on from, 0 at the start.

        Raises:
          UserError: the directory cannot be written.
        """
        directory = run / "tensorboard"
        make_directory(directory)
        self._event, writer = _tensorboardx()
        # TensorBoard reads the files in the order of their names. Not tensorboardX's own, which two launches
        # within a second share.
        numbers = [path.suffix[1:] for path in directory.glob(f"{_EVENTS}.*")]
        launch = 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
        self._file = writer(str(directory / f"{_EVENTS}.{launch:05d}"))
        self._append(file_version="brain.Event:2")
        self._append(step=resume_step + 1, session_log={"status": self._event.SessionLog.START})
        self.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve; it is on disk after `flush`."""
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._append(step=step, summary={"value": scalars})

    def _append(self, **fields: Any) -> None:
        self._file.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        """Force all points to disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close; closed even when the disk is full."""
        try:
            self.flush()
        finally:
            self._file.close()


def _tensorboardx() -> tuple[Any, Any]:
    """The event protocol of tensorboardX and its writer of records, imported without torch.

    tensorboardX imports torch wherever it is installed, to take tensors. Here come none, and torch brings
    seconds, memory and CUDA libraries of its own.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import an ImportError
    try:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return event_pb2, RecordWriter


class Window:
    """The steps that the profiler watches; their trace goes under `profile/` of the run.

    One a program, and of several processes the first alone writes. A resume inside the window watches what is
    left of it.
    """

    def __init__(self, run: Path, steps: Sequence[int]) -> None:
        """Set up; nothing starts yet.

        Args:
          run: the run directory.
          steps: the first and the last step to watch, or nothing.
        """
        self._directory = run / "profile"
        # Processes of one machine would write the same file.
        self._first, self._last = steps if steps and jax.process_index() == 0 else (1, 0)
        self._open = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around all that belongs to a step, the wait for its batch included; marks it in the trace."""
        if self._first <= number <= self._last and not self._open:
            jax.profiler.start_trace(self._directory)
            self._open = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, values: Any) -> None:
        """Behind a step: end the trace if it was the last to watch, when its `values` are computed."""
        if self._open and number >= self._last:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """End a trace that the run's end, or its failure, has cut short."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


def write_overview(path: Path, params: Mapping[str, Any]) -> None:
    """Write a table of all parameters: name, shape, dtype, count and sharding, and their sum.

    Args:
      path: of the file.
      params: nested dict of arrays, or of their shapes.
    """
    table = parameter_overview.get_parameter_overview(dict(params), include_stats="sharding")
    write_lines(path, table.splitlines())
