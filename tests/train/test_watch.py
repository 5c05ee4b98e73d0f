"""Watching a run: means on the device, rates, memory, event files read back, profiles, parameters."""

from __future__ import annotations

import gzip
import json
import math
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from vlmscale.errors import UserError
from vlmscale.records import make_directory
from vlmscale.sharding import make_mesh
from vlmscale.train import watch
from vlmscale.train.watch import Board, Means, Meter, Window, Work, live_line, memory, rates, write_overview

WORK = Work(positions=4096, text_and_visual=3072.0, flops=8e12)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its only element, in place of the real one."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])
    return now


def test_meter_gives_means_since_the_last_read(clock: list[float]) -> None:
    meter = Meter()
    for wait in (0.25, 0.75):
        clock[0] += 2.0
        meter.step(wait)
    clock[0] += 1.0  # the devices finish
    assert meter.read() == {"step_s": 2.5, "input_wait_s": 0.5}
    clock[0] += 3.0
    meter.step(0.0)
    assert meter.read() == {"step_s": 3.0, "input_wait_s": 0.0}
    assert meter.read() == {}


def test_meter_leaves_a_pause_out(clock: list[float]) -> None:
    meter = Meter()
    clock[0] += 60.0
    meter.step(9.0)  # compiled
    meter.skip()
    clock[0] += 2.0
    meter.step(0.5)
    assert meter.read() == {"step_s": 2.0, "input_wait_s": 0.5}


def test_rates_of_known_devices() -> None:
    found = rates(WORK, 0.5, 8, "NVIDIA A100-SXM4-80GB", "bfloat16")
    assert found == pytest.approx(
        {"tokens_per_s": 6144, "padding": 0.25, "flops_per_s": 16e12, "peak_share": 16 / (8 * 312)}
    )


@pytest.mark.parametrize("kind, dtype", [("cpu", "float32"), ("TPU v4", "float32"), ("NVIDIA X", "bfloat16")])
def test_unknown_peak_gives_no_share(kind: str, dtype: str) -> None:
    assert rates(WORK, 0.5, 1, kind, dtype).keys() == {"tokens_per_s", "padding", "flops_per_s"}


def test_everything_is_plain_numbers() -> None:
    work = Work(np.int64(4096), np.float32(3072), np.int64(8e12))  # type: ignore[arg-type]
    meter = Meter()
    meter.step(0.001)
    values = meter.read() | memory() | rates(work, 0.5, 8, "NVIDIA H200", "bfloat16")
    assert {type(value) for value in values.values()} == {float}
    assert json.loads(json.dumps(values)) == values


class Device:
    def __init__(self, stats: dict[str, int] | None) -> None:
        self.stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def test_memory_is_the_largest_of_local_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [Device({"peak_bytes_in_use": n << 30, "bytes_in_use": 1}) for n in (3, 5, 4)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory()["memory_gib"] == 5.0
    assert 0.05 < memory()["host_gib"] < 64


@pytest.mark.parametrize("stats", [None, {"bytes_in_use": 7}])
def test_memory_is_the_hosts_where_devices_do_not_tell(
    stats: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(stats)])
    before = memory()
    assert before["memory_gib"] == before["host_gib"]
    held = np.ones(1 << 24)  # an eighth of a GiB
    assert memory()["host_gib"] - before["host_gib"] == pytest.approx(held.nbytes / 2**30, abs=0.05)


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(watch.Path, "read_text", absent)
    assert memory()["host_gib"] > 0


@pytest.mark.parametrize(
    "values, line",
    [
        (
            {"tokens_per_s": 12345.6, "step_s": 0.045, "input_wait_s": 0.0009, "peak_share": 0.312},
            "loss 1.234, 12.3k tokens/s, 45 ms a step, input 2%, 31% of peak",
        ),
        (
            {"tokens_per_s": 2.5e6, "step_s": 1.26, "input_wait_s": 0.63},
            "loss 1.234, 2.5M tokens/s, 1.3 s a step, input 50%",
        ),
        ({"tokens_per_s": 950.0}, "loss 1.234, 950 tokens/s"),
        ({}, "loss 1.234"),
    ],
)
def test_live_line(values: dict[str, float], line: str) -> None:
    assert live_line(1.2341, values) == line


def step_values(loss: float, norm: float, tokens: int) -> dict[str, jax.Array]:
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm), "target_tokens": jnp.int32(tokens)}


def fetched(means: Means) -> dict[str, Any]:
    return jax.device_get(means.take())


def test_means_are_weighted_by_tokens() -> None:
    rng = np.random.default_rng(0)
    losses, norms, tokens = rng.uniform(1, 9, 50), rng.uniform(0, 2, 50), rng.integers(1, 5000, 50)
    means = Means()
    for number, row in enumerate(zip(losses, norms, tokens, strict=True), 1):
        means.add(number, step_values(*row))
    found = fetched(means)
    assert found["loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-6)
    assert abs(found["loss"] - losses.mean()) > 1e-3  # the weights matter here
    assert found["grad_norm"] == pytest.approx(norms.mean(), rel=1e-6)
    assert found["target_tokens"] == pytest.approx(tokens.mean(), rel=1e-6)
    assert (found["failures"], found["first_failure"]) == (0, 0)


def test_each_line_starts_anew() -> None:
    means = Means()
    for loss in (2.0, 3.0):
        means.add(1, step_values(loss, 1.0, 17))
        assert fetched(means)["loss"] == loss


def test_failed_steps_are_in_no_mean() -> None:
    means = Means()
    rows = [(3.0, 1.0, 10), (math.nan, 1.0, 1000), (2.0, math.inf, 1000), (6.0, 2.0, 20)]
    for number, row in enumerate(rows, 41):
        means.add(number, step_values(*row))
    found = fetched(means)
    assert (found["loss"], found["grad_norm"], found["target_tokens"]) == (5.0, 1.5, 15.0)
    assert (found["failures"], found["first_failure"]) == (2, 42)
    means.add(45, step_values(math.nan, 1.0, 10))
    found = fetched(means)
    assert math.isnan(found["loss"])
    assert (found["failures"], found["first_failure"]) == (1, 45)


def test_steps_without_supervised_tokens() -> None:
    means = Means()
    means.add(1, step_values(0.0, 0.0, 0))
    assert fetched(means)["loss"] == 0.0
    means.add(2, step_values(0.0, 0.0, 0))
    means.add(3, step_values(4.0, 1.0, 8))
    assert fetched(means)["loss"] == 4.0


def test_means_of_cells_trained_as_one() -> None:
    means = Means()
    for number, losses in ((1, [1.0, 4.0]), (2, [3.0, math.nan])):
        tokens = jnp.full(2, 5 * number)
        means.add(number, {"loss": jnp.array(losses), "target_tokens": tokens})
    found = fetched(means)
    np.testing.assert_allclose(found["loss"], [(5 + 30) / 15, 4.0], rtol=1e-6)
    assert found["first_failure"].tolist() == [0, 2]


def test_means_wait_for_nothing() -> None:
    """Values that do not exist yet will do: to look at one would raise."""

    def two_steps(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        means = Means()
        means.add(1, values)
        means.add(2, values)
        return means.take()

    assert jax.eval_shape(two_steps, step_values(1.0, 1.0, 1))["loss"].dtype == jnp.float32


def events(path: Path) -> Iterator[Event]:
    """Whole records of an event file, their checksums compared; a torn last one ends it."""
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        assert struct.unpack_from("<I", data, at + 8) == (masked_crc32c(data[at : at + 8]),)
        body = data[at + 12 : at + 12 + size]
        if at + 16 + size > len(data):
            return
        assert struct.unpack_from("<I", data, at + 12 + size) == (masked_crc32c(body),)
        yield Event.FromString(body)
        at += 16 + size


def files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").iterdir())


def shown(run: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard shows: it drops all behind the step of a START."""
    points: list[tuple[int, str, float]] = []
    for path in files(run):
        assert "tfevents" in path.name
        read = list(events(path))
        assert read[0].file_version == "brain.Event:2"
        for event in read:
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return points


def write_losses(board: Board, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        board.write(step, {"loss": step + offset})


def test_curves_can_be_read_back(tmp_path: Path) -> None:
    with closing(Board(tmp_path, 0)) as board:
        board.write(1, {"loss": 2.5, "grad_norm": np.float64(0.25)})  # type: ignore[dict-item]
        board.write(2, {"loss": 1.5, "heldout_loss": math.inf})
        board.flush()
        assert len(shown(tmp_path)) == 4
        board.write(3, {"loss": 0.5})
    assert shown(tmp_path) == [
        (1, "loss", 2.5),
        (1, "grad_norm", 0.25),
        (2, "loss", 1.5),
        (2, "heldout_loss", math.inf),
        (3, "loss", 0.5),
    ]
    assert all(
        abs(event.wall_time - files(tmp_path)[0].stat().st_mtime) < 60 for event in events(files(tmp_path)[0])
    )


def test_a_resume_shows_no_step_twice(tmp_path: Path) -> None:
    for resumed_from, steps, offset in ((0, range(1, 8), 0.0), (5, range(6, 9), 0.5), (0, range(1, 3), 0.25)):
        with closing(Board(tmp_path, resumed_from)) as board:
            write_losses(board, steps, offset)
        if resumed_from == 5:
            assert [step for step, _, _ in shown(tmp_path)] == list(range(1, 9))
            assert [value for _, _, value in shown(tmp_path)] == [1, 2, 3, 4, 5, 6.5, 7.5, 8.5]
    assert shown(tmp_path) == [(1, "loss", 1.25), (2, "loss", 2.25)]  # before its first checkpoint


def test_launches_within_a_second_keep_their_order(tmp_path: Path) -> None:
    make_directory(tmp_path / "tensorboard")
    foreign = tmp_path / "tensorboard/events.out.tfevents.1700000000.host"
    foreign.touch()
    for launch in range(12):
        with closing(Board(tmp_path, launch)) as board:
            write_losses(board, range(launch + 1, launch + 4))
    foreign.unlink()
    assert [step for step, _, _ in shown(tmp_path)] == list(range(1, 15))


KILLED = """
import os, signal, sys
from pathlib import Path
from vlmscale.train.watch import Board
board = Board(Path(sys.argv[1]), 0)
for step in range(1, 21):
    board.write(step, {"loss": float(step)})
board.flush()
print(sorted({"tensorflow", "torch"} & sys.modules.keys()), flush=True)
board.write(21, {"loss": 21.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    """And neither TensorFlow nor torch is imported, which is installed here."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "[]\n"
    assert [step for step, _, _ in shown(tmp_path)] == list(range(1, 21))
    with files(tmp_path)[0].open("r+b") as file:
        file.truncate(file.seek(0, 2) - 3)
    assert [step for step, _, _ in shown(tmp_path)] == list(range(1, 20))
    with closing(Board(tmp_path, 15)) as board:
        write_losses(board, range(16, 23))
    assert [step for step, _, _ in shown(tmp_path)] == list(range(1, 23))


def test_torch_can_still_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    Board(tmp_path, 0).close()
    assert "torch" not in sys.modules


def test_board_closes_on_a_full_disk(tmp_path: Path, mount: Any) -> None:
    small = mount("64k")
    board = Board(small, 0)
    with pytest.raises(OSError, match="No space left"):
        write_losses(board, range(10_000))
    with pytest.raises(OSError, match="No space left"):
        board.close()
    with pytest.raises(ValueError, match="closed"):
        board.write(1, {"loss": 1.0})


def test_board_without_a_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="tensorboard"):
        Board(tmp_path, 0)


def run_steps(window: Window, steps: range) -> None:
    double = jax.jit(lambda x: x @ x)
    values = jnp.ones((32, 32))
    for number in steps:
        with window.step(number):
            values = double(values)
        window.after(number, values)


def traced_steps(run: Path) -> list[int]:
    """Numbers of the steps in the traces of a run."""
    found: set[int] = set()
    for path in run.glob("profile/plugins/profile/*/*.trace.json.gz"):
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            if event.get("name") == "train":
                found.add(int(event["args"]["step_num"]))
    return sorted(found)


@pytest.fixture
def no_trace_is_left_open() -> Iterator[None]:
    yield
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()


profiled = pytest.mark.usefixtures("no_trace_is_left_open")


@profiled
def test_profile_of_a_window(tmp_path: Path) -> None:
    with closing(Window(tmp_path, (2, 3))) as window:
        run_steps(window, range(1, 6))
        assert traced_steps(tmp_path) == [2, 3]
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))


@profiled
@pytest.mark.parametrize(
    "steps, ran, traced",
    [
        ((3, 9), range(1, 5), [3, 4]),  # the run ends inside it
        ((1, 4), range(3, 7), [3, 4]),  # it was resumed inside it
        ((2, 2), range(1, 4), [2]),
    ],
)
def test_a_window_that_is_cut(tmp_path: Path, steps: tuple[int, int], ran: range, traced: list[int]) -> None:
    with closing(Window(tmp_path, steps)) as window:
        run_steps(window, ran)
    assert traced_steps(tmp_path) == traced


@profiled
@pytest.mark.parametrize("steps, ran", [((10, 12), range(1, 5)), ((1, 2), range(3, 5)), ((), range(1, 3))])
def test_a_window_that_is_not_reached(tmp_path: Path, steps: tuple[int, ...], ran: range) -> None:
    with closing(Window(tmp_path, steps)) as window:
        run_steps(window, ran)
    assert not (tmp_path / "profile").exists()


@profiled
def test_a_step_that_fails_in_the_window(tmp_path: Path) -> None:
    def fails() -> None:
        with closing(Window(tmp_path, (1, 5))) as window, window.step(1):
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fails()
    assert traced_steps(tmp_path) == [1]


@profiled
def test_one_process_alone_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with closing(Window(tmp_path, (1, 2))) as window:
        run_steps(window, range(1, 4))
    assert not (tmp_path / "profile").exists()


def test_a_trace_ends_when_its_last_step_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: order.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: order.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda values: order.append("ready"))
    run_steps(Window(tmp_path, (2, 3)), range(1, 6))
    assert order == ["start", "ready", "stop"]


def test_overview_of_parameters(tmp_path: Path) -> None:
    mesh = make_mesh(data=2, fsdp=4)
    split, whole = NamedSharding(mesh, jax.P("fsdp", None)), NamedSharding(mesh, jax.P())
    params = {
        "decoder": {"embedding": jax.device_put(jnp.ones((1000, 48)), split)},
        "compressor": {"scale": jax.ShapeDtypeStruct((), jnp.bfloat16, sharding=whole)},
    }
    path = tmp_path / "parameters.txt"
    write_overview(path, params)
    text = path.read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert cells[0] == ["Name", "Shape", "Dtype", "Size", "Sharding"]
    assert cells[1] == ["compressor/scale", "()", "bfloat16", "1", "()"]
    assert cells[2] == ["decoder/embedding", "(1000, 48)", "float32", "48,000", "('fsdp', None)"]
    assert "48,001" in text.splitlines()[-1]
