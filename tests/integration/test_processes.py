"""A checkpoint on a mesh of two real processes: who reads what, what arrives, and what the model answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.processes import at_work, free_port, told
from tests.integration.tiny import picture, wait_for
from tests.pretrained import one_device, save_decoder, save_llava, tensors_of
from vlmscale.evaluate.pretrained import answer, open_pretrained
from vlmscale.weights import tables

pytestmark = pytest.mark.slow

SECONDS = 180  # for both processes together
NEW = 8
TABLES = {"llama-grouped-tied": tables.DECODER, "clip-llama": tables.llava("clip")}
# One prompt is on every device; these four the fsdp axis below splits over the processes.
TEXTS = ["what is this thing", "so?", "a longer one, so yes", "ASSISTANT: what"]
PICTURE = "USER: <image>\nwhat is this thing? ASSISTANT:"

# One process of the two. It counts what it reads, and writes one JSON object to a file, for gloo and jax talk
# on both outputs.
CHILD = """
import hashlib, json, os, sys, traceback
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
coordinator, number, out, new, asked = sys.argv[1:]
jax.distributed.initialize(
    coordinator, 2, int(number), initialization_timeout=60, cluster_detection_method="deactivate"
)
import numpy as np
from flax.traverse_util import flatten_dict
from vlmscale.evaluate.pretrained import answer, open_pretrained
from vlmscale.sharding import make_mesh
from vlmscale.weights.checkpoint import Checkpoint
from vlmscale.weights.directory import load_directory

def fail(*error):  # at once: jax's own exit would first wait minutes for the other process
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)

sys.excepthook = fail
plain, count = Checkpoint.read, 0

def counting(self, *arguments):
    global count
    part = plain(self, *arguments)
    count += part.nbytes
    return part

Checkpoint.read = counting
mesh = make_mesh(1, 4, 2)
found = {}
for name, (directory, prompts, photos) in json.loads(asked).items():
    count = 0
    _, params, report = load_directory(Path(directory), mesh)
    read, shards = count, []
    for path, leaf in flatten_dict(params, sep="/").items():
        for shard in leaf.addressable_shards:
            bounds = [cut.indices(length)[:2] for cut, length in zip(shard.index, leaf.shape)]
            value = np.ascontiguousarray(shard.data)
            shards.append([path, bounds, str(value.dtype), hashlib.sha256(value).hexdigest()])
    model = open_pretrained(Path(directory), mesh=mesh)
    try:
        rows = answer(model, prompts, [photo and Path(photo) for photo in photos], int(new))
        said = [row.token_ids for row in rows]
    except RuntimeError as error:  # for one test alone; both processes get it, so that neither waits
        said = repr(error)
    found[name] = {"read": read, "shards": shards, "not_needed": report.not_needed, "said": said}
Path(out).write_text(json.dumps({"devices": jax.device_count(), "found": found}))
jax.distributed.shutdown()
"""

Asked = dict[str, tuple[str, list[str], list[str | None]]]  # directory, prompts and pictures by name
Found = list[dict[str, Any]]  # of each process, by name


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Directories of the tiny models, and batches of prompts and pictures for them."""
    folder = tmp_path_factory.mktemp("asked")
    photo = folder / "photo.png"
    photo.write_bytes(picture())
    save_decoder("llama-grouped-tied", folder / "llama-grouped-tied")
    save_llava("clip-llama", folder / "clip-llama")
    return {
        "llama-grouped-tied": (str(folder / "llama-grouped-tied"), TEXTS, [None] * len(TEXTS)),
        "clip-llama": (str(folder / "clip-llama"), [PICTURE], [str(photo)]),
    }


@pytest.fixture(scope="module")
def found(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the two processes say, which load and answer as one."""
    folder = tmp_path_factory.mktemp("processes")
    outs = [folder / f"{number}.json" for number in range(2)]
    where = f"127.0.0.1:{free_port()}"
    words = [[where, str(number), str(out), str(NEW), json.dumps(asked)] for number, out in enumerate(outs)]
    with at_work(CHILD, words, folder) as children:

        def over() -> bool:
            """All have ended, or one has failed: the other would wait for it in vain."""
            codes = [child.poll() for child, _ in children]
            return None not in codes or any(codes)

        in_time = wait_for(over, SECONDS)
        story = told(children)
    assert in_time, f"not done after {SECONDS} s\n{story}"
    assert [child.returncode for child, _ in children] == [0, 0], story
    said = [json.loads(out.read_text()) for out in outs]
    assert [one["devices"] for one in said] == [8, 8], story
    return [one["found"] for one in said]


def of_the_file(name: str, directory: Path, paths: set[str], not_needed: list[str]) -> dict[str, np.ndarray]:
    """Whole parameters as numpy reads them from the file; every tensor is one, or is not needed."""
    table, tensors = TABLES[name], tensors_of(directory)
    canonical = {table.canonical(spelt): spelt for spelt in tensors}
    made, used = {}, set()
    for path in paths:
        row, layer = table.row_of(path)
        spelt = canonical[row.theirs.replace("{i}", str(layer))]
        whole = tensors[spelt]
        if row.form == "transpose":
            whole = whole.T
        elif row.form == "patches":  # [C, 3, p, p] to rows of (row, column, channel)
            whole = whole.transpose(2, 3, 1, 0).reshape(-1, whole.shape[0])
        made[path] = whole
        used.add(spelt)
    assert used.isdisjoint(not_needed)
    assert used | set(not_needed) == tensors.keys()
    return made


@pytest.mark.parametrize("name", TABLES)
def test_each_process_holds_and_reads_its_part_of_the_file(name: str, asked: Asked, found: Found) -> None:
    """Every shard on every device has the bits of the file, and no byte is read for another process."""
    of_each = [one[name] for one in found]
    paths = {path for one in of_each for path, *_ in one["shards"]}
    whole = of_the_file(name, Path(asked[name][0]), paths, of_each[0]["not_needed"])
    total = sum(value.nbytes for value in whole.values())
    there = {path: np.zeros(value.shape, bool) for path, value in whole.items()}
    for one in of_each:
        own: dict[tuple, int] = {}  # bytes of distinct shards: devices that hold the same share one reading
        for path, bounds, dtype, digest in one["shards"]:
            index = tuple(slice(*pair) for pair in bounds)
            part = np.ascontiguousarray(whole[path][index])
            assert dtype == str(part.dtype) == "float32", path
            assert hashlib.sha256(part).hexdigest() == digest, (path, bounds)
            there[path][index] = True
            own[path, *map(tuple, bounds)] = part.nbytes
        assert 0 < one["read"] <= sum(own.values()) < 0.6 * total, (one["read"], sum(own.values()), total)
    assert all(mask.all() for mask in there.values()), "a part is on neither process"


@pytest.mark.parametrize(
    "name",
    ["llama-grouped-tied", "clip-llama"],
)
def test_both_processes_answer_as_one_device_does(name: str, asked: Asked, found: Found) -> None:
    directory, prompts, photos = asked[name]
    alone = open_pretrained(Path(directory), mesh=one_device())
    rows = answer(alone, prompts, [photo and Path(photo) for photo in photos], NEW)
    wanted = [row.token_ids for row in rows]
    assert [one[name]["said"] for one in found] == [wanted, wanted]
