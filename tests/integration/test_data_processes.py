"""Batches on a mesh of several real processes: each makes its own rows, and together they are one batch."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import random
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.data.prepared_files import make_dataset, toy_template
from tests.integration.processes import at_work, free_port, told
from tests.integration.tiny import wait_for
from vlmscale.data.lengths import Limits, measure
from vlmscale.data.packing import Shape, one_per_row, plan
from vlmscale.data.pipeline import Batch, Layout, batches
from vlmscale.data.plans import PlanOf
from vlmscale.data.sources import DatasetSource, Pixels, Source

pytestmark = pytest.mark.slow

SECONDS = 90  # for all processes together
COUNT, V, SIDE, STEPS = 50, 3, 6, 5
DEVICES = 4  # of a process
PROCESSES = (2, 4)
PACKING = ("unpacked", "packed")
BATCH = 32  # two rows a device at 16 devices at most: a block of two for each
HALF = (0.5, 0.5, 0.5)

# One of the processes. Of every array of every step it tells which rows each of its devices holds, and their
# hash; of the last step also what the processes gather. It tells it in a file, for gloo and jax talk on both
# outputs.
CHILD = """
import hashlib, json, os, pickle, sys, traceback
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[6]))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
coordinator, number, count, asked, out = sys.argv[1:6]
jax.distributed.initialize(
    coordinator, int(count), int(number), initialization_timeout=60, cluster_detection_method="deactivate"
)
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from vlmscale.data.pipeline import batches
from vlmscale.sharding import batch_sharding, check_batch, make_mesh, put_batch
from vlmscale.train.feed import Feed

def fail(*error):  # at once: jax's own exit would first wait minutes for the other processes
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)

def digest(values):
    values = np.ascontiguousarray(values)
    return [list(values.shape), str(values.dtype), hashlib.sha256(values).hexdigest()]

sys.excepthook = fail
assert (jax.process_index(), jax.process_count()) == (int(number), int(count))
mesh = make_mesh()
mine = {"process": jax.process_index(), "processes": jax.process_count()}
found = {}
for name, (setup, size, start, steps) in pickle.loads(Path(asked).read_bytes()).items():
    check_batch(size, mesh, setup[1].shape.rows)
    workers = (int(number) + (name == "packed")) % 2  # neighbours differ, and each has both once
    stream = batches(*setup, size, start, workers=workers, **mine)
    shards, seen = [], []
    with Feed(stream, lambda batch: put_batch(batch, mesh, jax.process_count())) as feed:
        for step in range(steps):
            batch = next(feed)
            for key, value in batch.items():
                assert value.sharding == batch_sharding(mesh), key
                for shard in value.addressable_shards:
                    rows, *rest = [cut.indices(length) for cut, length in zip(shard.index, value.shape)]
                    assert rest == [(0, length, 1) for length in value.shape[1:]], key
                    shards.append([step, key, value.shape[0], rows[0], digest(shard.data)])
    gathered = process_allgather(batch, tiled=True)
    found[name] = {
        "workers": workers,
        "shards": shards,
        "gathered": {key: digest(value) for key, value in gathered.items()},
    }
Path(out).write_text(json.dumps({"devices": jax.device_count(), "found": found}))
jax.distributed.shutdown()
"""

Found = list[dict[str, Any]]  # of each process, by packing


class Setup(NamedTuple):
    """All that batches are made of, without numbers of processes."""

    source: Source
    layout: Layout
    plan_of: PlanOf


class Asked(NamedTuple):
    """What to make: steps `start`, ..., `start` + `steps` - 1 of batches of `size` rows."""

    setup: Setup
    size: int
    start: int
    steps: int


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    """Unpacked rows, and blocks of two packed ones, each from a step somewhere in the first epochs on."""
    dataset = make_dataset(tmp_path_factory.mktemp("prepared") / "data", COUNT)
    template, limits = toy_template(), 1000
    ids: dict[str, Any] = {"pad_id": template.pad, "image_id": template.image, "queries": True}
    lengths = measure(dataset, template, limits, workers=0)
    source = DatasetSource(dataset, template, Pixels(SIDE, HALF, HALF, "pad"), Limits(limits))
    single = Layout.one_per_row(lengths, V, **ids)
    shape = Shape(2, 2 * single.shape.length, 5)
    packed = partial(plan, lengths.sizes(V), lengths.images, shape, 5)
    setups = {
        "unpacked": Setup(source, single, partial(one_per_row, COUNT, 5)),
        "packed": Setup(source, Layout.packed(shape, lengths, V, **ids), packed),
    }
    draw = random.Random(3)
    return {name: Asked(setup, BATCH, draw.randrange(1, 12), STEPS) for name, setup in setups.items()}


@pytest.fixture(scope="module", params=PROCESSES)
def found(
    request: pytest.FixtureRequest, asked: dict[str, Asked], tmp_path_factory: pytest.TempPathFactory
) -> Found:
    """What that many processes say of the batches that they made together."""
    folder, count = tmp_path_factory.mktemp("processes"), request.param
    plain = {name: (tuple(one.setup), *one[1:]) for name, one in asked.items()}
    (folder / "asked").write_bytes(pickle.dumps(plain))
    outs = [folder / f"{number}.json" for number in range(count)]
    where = f"127.0.0.1:{free_port()}"
    words = [
        [where, str(number), str(count), str(folder / "asked"), str(out), str(DEVICES)]
        for number, out in enumerate(outs)
    ]
    with at_work(CHILD, words, folder) as children:

        def over() -> bool:
            """All have ended, or one has failed: the others would wait for it in vain."""
            codes = [child.poll() for child, _ in children]
            return None not in codes or any(codes)

        in_time = wait_for(over, SECONDS)
        story = told(children)
    assert in_time, f"not done after {SECONDS} s\n{story}"
    assert [child.returncode for child, _ in children] == [0] * count, story
    said = [json.loads(out.read_text()) for out in outs]
    assert [one["devices"] for one in said] == [count * DEVICES] * count, story
    return [one["found"] for one in said]


@pytest.fixture(scope="module")
def alone(asked: dict[str, Asked]) -> dict[str, list[Batch]]:
    """The batches that one process makes."""
    out = {}
    for name, (setup, size, start, steps) in asked.items():
        with batches(*setup, size, start) as stream:
            out[name] = list(itertools.islice(stream, steps))
    return out


def digest(values: np.ndarray) -> list[Any]:
    """Shape, type and bits, as a process tells them."""
    values = np.ascontiguousarray(values)
    return [list(values.shape), str(values.dtype), hashlib.sha256(values).hexdigest()]


@pytest.mark.parametrize("name", PACKING)
def test_the_rows_on_all_devices_are_the_batch_of_one_process(
    name: str, found: Found, asked: dict[str, Asked], alone: dict[str, list[Batch]]
) -> None:
    assert {one[name]["workers"] for one in found} == {0, 1}
    devices, block = len(found) * DEVICES, asked[name].setup.layout.shape
    assert block.rows == PACKING.index(name) + 1
    wanted = [
        [step, key, len(values), start, digest(values[start : start + len(values) // devices])]
        for step, batch in enumerate(alone[name])
        for key, values in batch.items()
        for start in range(0, len(values), len(values) // devices)
    ]
    assert sorted(shard for one in found for shard in one[name]["shards"]) == sorted(wanted)
    # Each process holds what lies together, in the order of the processes: what it made itself.
    for number, one in enumerate(found):
        for _, _, rows, start, _ in one[name]["shards"]:
            assert number * rows <= start * len(found) < (number + 1) * rows


@pytest.mark.parametrize("name", PACKING)
def test_what_the_processes_gather_is_the_batch_of_one(
    name: str, found: Found, alone: dict[str, list[Batch]]
) -> None:
    wanted = {key: digest(values) for key, values in alone[name][-1].items()}
    assert [one[name]["gathered"] for one in found] == [wanted] * len(found)


@pytest.mark.parametrize("name", PACKING)
def test_steps_and_devices_differ(name: str, asked: dict[str, Asked], alone: dict[str, list[Batch]]) -> None:
    """So that what stands in another place, or belongs to another step, would be seen above."""
    devices = max(PROCESSES) * DEVICES
    rows = [tuple(map(bytes, part)) for batch in alone[name] for part in np.split(batch["tokens"], devices)]
    assert len(set(rows)) > len(rows) * 0.9
    first = asked[name].setup.plan_of(0).blocks
    begin = asked[name].start * BATCH // asked[name].setup.layout.shape.rows
    assert begin > 0
    assert begin % first, "not at the seam of two epochs"
