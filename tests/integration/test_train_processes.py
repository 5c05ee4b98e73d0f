"""Training by several real processes: as by one, whatever becomes of some of them on the way."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.compressors.cases import Case
from tests.integration.processes import Child, at_work, free_port, told
from tests.integration.tiny import DATA, SCENES, lines, read, saved_steps, steps, train, wait_for
from tests.train.sharded_cases import CLOSE, make_setup, run_alone

pytestmark = pytest.mark.slow

SECONDS = 180  # for all processes of one attempt together
STEPS, DEVICES = 20, 8  # of all processes together

# The command line in one of the processes. Beside it stand files in which a process tells that it is in the
# loop, and what it has trained; behind each step it rests, so that a signal comes somewhere in the middle.
COMMAND = """
import faulthandler, os, sys, time
from functools import partial
from pathlib import Path
faulthandler.dump_traceback_later(170)  # where it stands, if it hangs
devices, number, folder, programs, rest, *words = sys.argv[1:]
os.environ |= {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", int(devices))
jax.distributed.initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=20)  # not 100
from vlmscale.cli import main
from vlmscale.train.preemption import Preemption
from vlmscale.weights import tree

requested, sha256 = Preemption.requested, tree.sha256

def rested(self, step):
    time.sleep(float(rest))
    if step == 3:
        (Path(folder) / f"{number}.ready").write_text("")
    return requested(self, step)

def told(params):
    for leaf in jax.tree.leaves(params):
        first = {}
        for shard in getattr(leaf, "addressable_shards", ()):
            values = np.asarray(shard.data)
            assert np.array_equal(first.setdefault(str(shard.index), values), values), "copies differ"
    digest = sha256(params)
    (Path(folder) / f"{number}.sha256").write_text(digest)
    return digest

Preemption.requested, tree.sha256 = rested, told
sys.exit(main(words))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs that attempts with as many processes share."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that has all devices."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert train(run, count=STEPS) == 0
    return run


class Attempt:
    """How some processes ended that trained a run together."""

    def __init__(self, folder: Path, children: list[Child], seconds: list[float]) -> None:
        self.codes = [child.returncode for child, _ in children]
        self.story = told(children)
        self.said = [log.read_text(errors="replace") for _, log in children]
        self.digests = [path.read_text() for path in sorted(folder.glob("*.sha256"))]
        self.seconds = seconds


def together(
    count: int,
    run: Path,
    programs: Path,
    *overrides: str,
    rest: float = 0.0,
    ready: Callable[[list[Child]], None] | None = None,
) -> Attempt:
    """`vlmscale train` as so many processes; `ready` is called when all of them are in the loop.

    Its `seconds` say when each ended, from then on or from the start.
    """
    folder = run.parent / f"{run.name}-{time.monotonic_ns()}"
    folder.mkdir()
    where, command = f"127.0.0.1:{free_port()}", ["train", "--config", SCENES, "--out", str(run)]
    words = [
        [
            *(str(DEVICES // count), str(number), str(folder), str(programs), str(rest)),
            *(*command, *DATA, *steps(STEPS), *overrides, "--distributed", f"{where},{count},{number}"),
        ]
        for number in range(count)
    ]
    with at_work(COMMAND, words, folder) as children:
        began, ended = time.monotonic(), [math.inf] * count

        def over() -> bool:
            for number, (child, _) in enumerate(children):
                if child.poll() is not None:
                    ended[number] = min(ended[number], time.monotonic() - began)
            return math.inf not in ended

        if ready is not None:
            there = wait_for(lambda: over() or len(list(folder.glob("*.ready"))) == count, SECONDS)
            assert there, told(children)
            assert math.inf in ended, told(children)
            began, ended = time.monotonic(), [math.inf] * count
            ready(children)
        in_time = wait_for(over, SECONDS)
        assert in_time, f"not done after {SECONDS} s\n{told(children)}"
        return Attempt(folder, children, ended)


def check_same(run: Path, one: Path) -> None:
    """A run that is done, with the curve of one process: each step once."""
    mine, theirs = lines(run / "metrics.jsonl"), lines(one / "metrics.jsonl")
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "target_tokens", "learning_rate"):
        np.testing.assert_allclose(
            [x[name] for x in mine], [x[name] for x in theirs], rtol=CLOSE, err_msg=name
        )
    assert mine[-1]["heldout_loss"] == pytest.approx(theirs[-1]["heldout_loss"], rel=CLOSE)
    assert read(run / "status.json")["state"] == "trained"
    assert saved_steps(run)[-1] == read(run / "done.json")["steps"] == STEPS


def names(run: Path) -> list[str]:
    """What lies in a run directory, but for names that a clock or a number of processes has a part in."""
    parts = [path.relative_to(run) for path in run.rglob("*")]
    return sorted(str(p) for p in parts if p.parts[0] not in ("checkpoints", "tensorboard"))


@pytest.mark.parametrize("count, mesh", [(2, ()), (4, ("--config.mesh.fsdp=8",))], ids=["2-data", "4-fsdp"])
def test_processes_train_together_as_one_does(
    count: int, mesh: tuple[str, ...], one: Path, programs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    attempt = together(count, run, programs, *mesh)
    assert attempt.codes == [0] * count, attempt.story
    check_same(run, one)
    assert attempt.digests == [read(run / "done.json")["params_sha256"]] * count
    assert names(run) == names(one)
    assert len(list((run / "tensorboard").iterdir())) == len(list((one / "tensorboard").iterdir()))
    assert sum("trained: " in said for said in attempt.said) == 1, attempt.story


def test_a_signal_to_one_of_two_stops_both_and_four_or_one_go_on(
    one: Path, programs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    attempt = together(
        2, run, programs, rest=0.3, ready=lambda children: children[1][0].send_signal(signal.SIGTERM)
    )
    assert attempt.codes == [42, 42], attempt.story
    (step,) = saved_steps(run)
    assert 3 <= step < STEPS
    for said in attempt.said:
        assert f"stopped by SIGTERM at step {step}; saved" in said
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, step + 1))
    assert read(run / "status.json")["state"] == "preempted"
    alone = shutil.copytree(run, tmp_path / "alone")
    assert train(alone, count=STEPS) == 0
    attempt = together(4, run, programs)
    assert attempt.codes == [0] * 4, attempt.story
    for resumed in (alone, run):
        check_same(resumed, one)
        assert read(resumed / "done.json")["resumed_from"] == [step]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_end_and_a_rerun_goes_on(
    victim: int, one: Path, programs: Path, tmp_path: Path
) -> None:
    run, often = tmp_path / "run", "--config.train.checkpoint_every=2"

    def kill(children: list[Child]) -> None:
        assert wait_for(lambda: len(saved_steps(run)) > 0)
        children[victim][0].kill()

    attempt = together(2, run, programs, often, rest=0.3, ready=kill)
    assert attempt.codes[victim] == -signal.SIGKILL, attempt.story
    assert attempt.codes[1 - victim] not in (0, 2, 42), attempt.story
    print({"seconds until the other ended": attempt.seconds, "code": attempt.codes[1 - victim]})
    assert attempt.seconds[1 - victim] < 150  # a loaded machine, and jax notices within 100 s
    last = saved_steps(run)[-1]
    assert 2 <= last < STEPS
    attempt = together(2, run, programs, often)
    assert attempt.codes == [0, 0], attempt.story
    check_same(run, one)
    assert read(run / "done.json")["resumed_from"] == [last]


def test_a_mistake_ends_all_with_2_and_one_line(one: Path, programs: Path, tmp_path: Path) -> None:
    """Also one that the first process alone sees: that the directory holds another cell."""
    began = time.monotonic()
    attempt = together(2, tmp_path / "run", programs, "--config.train.batch_size=12")
    print({"seconds, all": time.monotonic() - began})
    assert attempt.codes == [2, 2], attempt.story
    for said in attempt.said:
        assert said.count("vlmscale train: train.batch_size=12: must be a multiple of the 8 devices") == 1
        assert "Traceback" not in said
    assert read(tmp_path / "run" / "status.json")["state"] == "failed"
    taken = shutil.copytree(one, tmp_path / "taken")
    attempt = together(2, taken, programs, "--config.train.seed=1")
    print({"seconds, one": attempt.seconds})
    assert attempt.codes[0] == 2, attempt.story
    assert attempt.codes[1] not in (0, 42), attempt.story
    assert f"vlmscale train: {taken}: holds cell" in attempt.said[0]
    assert max(attempt.seconds) < 150
    assert read(taken / "done.json") == read(one / "done.json")


# One of several processes that take steps of plain gradient descent on meshes across all of them, and compare
# with what one device found.
DESCEND = """
import json, os, pickle, sys, traceback
from pathlib import Path
where, count, number, asked, out = sys.argv[1:]
import jax
jax.config.update("jax_num_cpu_devices", 8 // int(count))
jax.config.update("jax_disable_most_optimizations", True)
from vlmscale.distributed import start

def fail(*error):  # at once: jax's own exit would first wait minutes for the others
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)

sys.excepthook = fail
start(f"{where},{count},{number}", 60)
from tests.compressors.cases import Case, build
from tests.train.sharded_cases import MESHES, SIZE, VOCAB, Setup, assert_same, recipe, run_on
from vlmscale.sharding import make_mesh
from vlmscale.weights import tree

found = {}
for name, (case, mesh, params, batches, wanted) in pickle.loads(Path(asked).read_bytes()).items():
    setup = Setup(build(Case(*case), SIZE, VOCAB), params, batches, recipe())
    ran = run_on(setup, make_mesh(*MESHES[mesh]))
    try:
        assert_same(ran, wanted)
    except AssertionError as error:
        raise AssertionError(f"{name} on {mesh}: {error}") from error
    found[name] = [mesh, ran.losses, tree.sha256(ran.params)]
Path(out).write_text(json.dumps(found))
jax.distributed.shutdown()
"""
# What crosses devices in four ways: nothing more, the question through the LLM, a drawn count, holes.
METHODS = (
    Case("pool", (), 4),
    Case("quecc", (), 4),
    Case("mqt", (), 4),
    Case("prumerge", (("count", "adaptive"),), 4),
)
ALONG = {
    2: {"pool": "fsdp", "quecc": "tensor", "mqt": "all", "prumerge-adaptive": "data"},
    4: {"pool": "tensor", "quecc": "all", "prumerge-adaptive": "fsdp"},
}


@pytest.mark.parametrize("count", ALONG)
def test_gradients_and_parameters_of_several_processes_are_those_of_one_device(
    count: int, random_params: Callable[..., Any], tmp_path: Path
) -> None:
    """The assertions stand in the processes, each of which compares whole arrays."""
    asked: dict[str, Any] = {}
    jax.config.update("jax_disable_most_optimizations", True)
    for case in METHODS:
        if mesh := ALONG[count].get(case.label):
            setup = make_setup(case, random_params)
            asked[case.label] = (tuple(case), mesh, setup.params, setup.batches, run_alone(setup))
    jax.config.update("jax_disable_most_optimizations", False)
    (tmp_path / "asked").write_bytes(pickle.dumps(asked))
    outs = [tmp_path / f"{number}.json" for number in range(count)]
    start = [f"127.0.0.1:{free_port()}", str(count)]
    words = [[*start, str(number), str(tmp_path / "asked"), str(out)] for number, out in enumerate(outs)]
    with at_work(DESCEND, words, tmp_path) as children:

        def over() -> bool:
            """All have ended, or one has failed: the others would wait for it in vain."""
            codes = [child.poll() for child, _ in children]
            return None not in codes or any(codes)

        in_time = wait_for(over, SECONDS)
        story = told(children)
    assert in_time, f"not done after {SECONDS} s\n{story}"
    assert [child.returncode for child, _ in children] == [0] * count, story
    first, *others = [json.loads(out.read_text()) for out in outs]
    assert list(first) == list(asked)
    assert others == [first] * (count - 1)
