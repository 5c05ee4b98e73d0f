"""Weak scaling on paper: bytes that a training step sends, read off programs compiled for 8 to 256 devices.

    python benchmarks/scaling.py --target h100                     # all sizes, fsdp; jax[cuda13], but no GPU
    python benchmarks/scaling.py --target v5e --sizes qwen1.5-7b   # jax[tpu], but no TPU
    python benchmarks/scaling.py --target cpu --devices 8          # fake devices; nothing else is needed
    python benchmarks/scaling.py --target h100 --mesh data tensor=8 fsdp=8 --devices 8 64 --top 12

Nothing is run and no array is made: the step of `vlmscale.train` is compiled for devices that this machine
does not have, and the collectives of the program are counted, one inside a loop as often as the loop turns.
The table has, of each kind, the MB (1e6 bytes) that a device sends a step; what the parameters alone let
expect, and the ratio; the GiB of state and of temporaries that the compiler plans; milliseconds of computing
and of sending from published rates; and the weak-scaling efficiency that follows if sending hides behind
nothing, and behind all computation. docs/scaling.md says how to read it.

A row is packed: --length positions with one image, all supervised. --mesh takes axes such as `fsdp`, `data`,
`tensor=8` or `data=4,fsdp`; one without a number, or else fsdp, or else data, takes the devices left.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlmscale.config import Cell, DataConfig, LLMConfig
from vlmscale.cost import flops
from vlmscale.cost.peak import peak_flops
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.sharding import AXES, make_mesh, replicated
from vlmscale.train.recipe import make_objective, make_optimizer, trained_parts, training_model
from vlmscale.train.state import Places, abstract_state, lay_out
from vlmscale.train.step import Knobs, make_train_step

QWEN = ("qwen1.5-0.5b", "qwen1.5-1.8b", "qwen1.5-4b", "qwen1.5-7b", "qwen1.5-14b")
TOWER = "clip-vit-large-patch14-336"
DEVICES = (8, 16, 32, 64, 128, 256)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
UTILIZATION = 0.5  # of peak FLOP/s while a device computes
HOST = 8  # GPUs
_WIDTHS = {"pred": 1, "bf16": 2, "token": 0} | {
    f"{kind}{bits}": -(-bits // 8) for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LINE = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(?:, (.*))?$")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=(\{.*?\}|\S+)")


class Instruction(NamedTuple):
    """A line of HLO: what it makes, of what, and how."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str  # the text between its parentheses


class Collective(NamedTuple):
    """A collective of a program, as one device sees it."""

    kind: str
    axes: str  # mesh axes that it runs over, joined by "+"
    dtype: str
    sent: float  # bytes that a device sends each time
    times: int  # a step
    members: int  # of a group
    hosts: int  # of `HOST` devices that a group spans
    source: str  # what of the model it belongs to


Computations = dict[str, dict[str, Instruction]]


def parse(text: str) -> Computations:
    """Computations of an HLO module, the first that runs as "ENTRY", and the result of each as "ROOT"."""
    computations, inside = Computations(), dict[str, Instruction]()
    for line in text.splitlines():
        if (head := _HEAD.match(line)) is not None:
            inside = computations.setdefault("ENTRY" if head[1] else head[2], {})
        elif (found := _LINE.match(line)) is not None:
            root, name, shape, opcode, arguments, attributes = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            inside[name] = Instruction(name, shape, opcode, operands, attributes or "", arguments)
            inside |= {"ROOT": inside[name]} if root else {}
    return computations


def collectives(text: str, mesh: dict[str, int], dynamic: int = 1) -> list[Collective]:
    """The collectives of a compiled program, each once with how often it runs.

    Args:
      text: `compiled.as_text()`, of a program whose device numbers are places in the flattened mesh.
      mesh: its axes with their lengths, the outermost first.
      dynamic: how often loops turn whose length is only known when they run.

    Raises:
      ValueError: a collective, its groups or a loop that this does not understand.
    """
    computations, found = parse(text), list[Collective]()

    def walk(name: str, times: int) -> None:
        inside = computations[name]
        lines = [one for label, one in inside.items() if label != "ROOT"]
        # A TPU's asynchronous collective stands in each fusion that it hides behind, and starts in one.
        started = {one.operands for one in lines if '"AsyncCollectiveStart"' in one.attributes}
        for one in lines:
            kind = re.fullmatch(rf"({'|'.join(KINDS)})(-start)?", one.opcode)
            if kind is not None:
                if (one.name,) in started or "chain_id=" not in one.attributes:
                    # A reduce-scatter of a TPU is a fusion of an all-reduce and a slice.
                    scatters = name.startswith("all-reduce-scatter")
                    found.append(
                        _collective("reduce-scatter" if scatters else kind[1], one, inside, mesh, times)
                    )
            elif one.opcode in ("collective-broadcast", "ragged-all-to-all"):
                raise ValueError(f"{one.name}: a {one.opcode} is not counted here")
            elif not one.opcode.endswith(("-done", "-update")):
                turns = _turns(one, inside, computations, dynamic) if one.opcode == "while" else 1
                for called in _CALLED.findall(one.attributes):
                    for inner in re.findall(r"%([\w.\-]+)", called):
                        walk(inner, times * turns)

    walk("ENTRY", 1)
    return found


def _collective(
    kind: str, one: Instruction, inside: dict[str, Instruction], mesh: dict[str, int], times: int
) -> Collective:
    source = (re.search(r'op_name="([^"]*)"', one.attributes) or ["", one.name])[1]
    arrays = _ARRAY.findall(" ".join(inside[operand].shape for operand in one.operands))
    largest = max(arrays, key=_nbytes)
    groups = _groups(one, math.prod(mesh.values()))
    n = groups.shape[1]
    share = {"all-reduce": 2 / n, "all-gather": 1.0}.get(kind, 1 / n) * (n - 1)
    sent = sum(map(_nbytes, arrays)) * (1 if kind == "collective-permute" else share)
    # The mesh axes along which the members of a group differ.
    places = np.unravel_index(groups, tuple(mesh.values()))
    axes = "+".join(name for name, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any())
    return Collective(kind, axes, largest[0], sent, times, n, len(set(groups[0] // HOST)), source)


def _nbytes(array: tuple[str, str]) -> int:
    return _WIDTHS[array[0]] * math.prod(int(length) for length in array[1].split(",") if length)


def _groups(one: Instruction, devices: int) -> np.ndarray:
    """Who takes part with whom: [groups, members] numbers of devices; of a permutation its pairs."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.attributes)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", one.attributes)
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\S+?)(?:, |$)", one.attributes)
    axes = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", one.attributes)
    if pairs is not None:
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    if listed is not None:
        rows = [row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(rows or [range(devices)], int)
    if iota is not None:
        return _iota(iota[1])
    if axes is None:
        raise ValueError(f"{one.name}: cannot read its groups: {one.attributes[:200]}")
    # Of an axis a group may span a part alone: 'name':(product of the lengths before)length.
    spans = {at: (before, part) for at, before, part in re.findall(r"'(.*?)'(?::\((\d+)\)(\d+))?", axes[3])}
    shape, spanned = list[int](), list[int]()
    for name, length in re.findall(r"'(.*?)'=(\d+)", axes[1]):
        before, part = (int(word or 0) for word in spans.get(name, ("1", "1")))
        cut = [before, part, int(length) // (before * part)] if before else [1, int(length), 1]
        spanned.append(len(shape) + 1)
        shape += cut
    order = np.arange(math.prod(shape))
    if axes[2]:
        counted = axes[2].startswith("[")
        order = _iota(f"[{order.size}]<={axes[2]}") if counted else np.array(axes[2].split(","), int)
    rest = [axis for axis in range(len(shape)) if axis not in spanned]
    return order.reshape(shape).transpose(rest + spanned).reshape(-1, math.prod(shape[at] for at in spanned))


def _iota(text: str) -> np.ndarray:
    """The array that `[shape]<=[lengths]T(order)` stands for."""
    shape, _, rest = text.partition("<=")
    lengths, _, order = rest.partition("T")
    numbers = [[int(word) for word in re.findall(r"\d+", part)] for part in (shape, lengths, order)]
    grid = np.arange(math.prod(numbers[1])).reshape(numbers[1])
    return (grid.transpose(numbers[2]) if order else grid).reshape(numbers[0])


def _turns(
    loop: Instruction, inside: dict[str, Instruction], computations: Computations, dynamic: int
) -> int:
    """How often a loop turns; a TPU's compiler does not write it down, so read it off the counter."""
    if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)) is not None:
        return int(known[1])
    names = dict(re.findall(r"(condition|body)=%([\w.\-]+)", loop.attributes))
    condition, body = computations[names["condition"]], computations[names["body"]]
    test = condition["ROOT"]
    if all(condition[operand].opcode == "get-tuple-element" for operand in test.operands):
        return dynamic
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        raise ValueError(f"{loop.name}: cannot tell how often it turns, its condition is {test}")
    counter, limit = (condition[operand] for operand in test.operands)
    last = _constant(condition, limit.name)
    at = int(counter.attributes.removeprefix("index=").split(",")[0])
    first = _constant(inside, inside[loop.operands[0]].operands[at])
    add = body[body["ROOT"].operands[at]]
    steps = [value for operand in add.operands if (value := _constant(body, operand)) is not None]
    if first is None or last is None or add.opcode != "add" or len(steps) != 1:
        raise ValueError(f"{loop.name}: cannot tell how often it turns, from {first} by {add} to {last}")
    return -(-(last - first) // steps[0])


def _constant(inside: dict[str, Instruction], name: str) -> int | None:
    one = inside[name]
    while one.opcode in ("copy", "bitcast", "convert"):
        one = inside[one.operands[0]]
    return int(one.arguments) if one.opcode == "constant" else None


class Target(NamedTuple):
    """Devices to compile for, what is published of them, and what XLA moves there of a parameter."""

    kind: str  # as jax names the device, for its peak FLOP/s; "" for a CPU
    attention: str = "xla"
    bandwidth: float = math.inf  # bytes/s that a device sends
    network: float = math.inf  # bytes/s of each device's own link to other hosts
    gathers: int = 2  # bytes of a parameter that is gathered
    reduces: int = 2  # of a gradient that is summed over devices
    scatters: bool = True  # whether the sum is made where the parameter lies


TARGETS = {
    # XLA computes products of bfloat16 in float32 on a CPU and moves what they read, and it has no pass there
    # that makes a reduce-scatter of an all-reduce.
    "cpu": Target("", gathers=4, reduces=4, scatters=False),
    # cloud.google.com/tpu/docs/v5e: 1,600 Gbit/s over 4 links of a chip; a ring uses 2 of them.
    "v5e": Target("TPU v5 lite", "splash", 100e9),
    # H100 datasheet: NVLink 900 GB/s, both directions together. DGX H100 datasheet: 8 x 400 Gbit/s outside.
    "h100": Target("NVIDIA H100 80GB HBM3", "xla", 450e9, 50e9),
}
V5E = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # slices that can be had
# What XLA wants to know of a GPU that is not there; the numbers are those of an H100 SXM.
H100 = """gpu_device_info {
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000
  device_memory_size: 84929347584 l2_cache_size: 52428800 cuda_compute_capability { major: 9 }
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
} platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3" """


def mesh_shape(text: str, devices: int) -> dict[str, int]:
    """The mesh that a word of --mesh stands for.

    Raises:
      SystemExit: an unknown axis, or devices that it does not split.
    """
    given = dict(word.partition("=")[::2] for word in text.split(","))
    free = [name for name, length in given.items() if not length]
    free = free or [name for name in ("fsdp", "data") if name not in given][:1]
    shape = {name: int(given.get(name) or 1) for name in AXES}
    if given.keys() - set(AXES) or len(free) != 1 or devices % math.prod(shape.values()):
        raise SystemExit(f"--mesh {text}: does not split {devices} devices; write axes such as data=4,fsdp")
    return shape | {free[0]: devices // math.prod(shape.values())}


def make_devices(target: str, count: int) -> Any:
    """Devices of a target; all but a CPU's can be compiled for and nothing else."""
    if target == "cpu":
        jax.config.update("jax_num_cpu_devices", count)
        return jax.devices("cpu")
    module, package = {"v5e": ("libtpu", "jax[tpu]"), "h100": ("jax_plugins", "jax-cuda13-plugin")}[target]
    if importlib.util.find_spec(module) is None:
        raise SystemExit(f"--target {target}: compiling for it needs {package} of jax's own version")
    if target == "v5e":
        return topologies.get_topology_desc(f"v5e:{V5E[count]}", "tpu").devices
    shape = f"1x{-(-count // 8)}x{min(count, 8)}"  # slices, hosts of one, devices of one
    return topologies.get_topology_desc(target, "cuda", target_config=H100, topology=shape).devices


def make_cell(args: argparse.Namespace, size: str, rows: int) -> Cell:
    """The config that is compiled."""
    cell = Cell(llm=LLMConfig(size), data=DataConfig(row_length=args.length))
    cell.tower.name, cell.compressor.visual_tokens, train = TOWER, args.visual_tokens, cell.train
    train.batch_size, train.llm_rate, train.clip_norm = rows, float(args.stage == 2), 0.0
    train.dtype, train.accumulate = args.dtype, args.accumulate
    train.attention = TARGETS[args.target].attention
    return cell


def lower_step(cell: Cell, mesh: Mesh) -> tuple[Any, Places]:
    """The training step of a cell, lowered in the abstract, and where its parameters live."""
    train, size, tower = cell.train, SIZES[cell.llm.name], TOWERS[cell.tower.name]
    model = training_model(cell, size.vocab_size or 512)
    # Shapes depend on no backend of attention, and a TPU's refuses to run where there is none.
    places = lay_out(cell, model.clone(attention="xla"), mesh, None)
    optimizer = make_optimizer(train)
    state = abstract_state(optimizer, places.trained, mesh)
    lead = (train.accumulate,) * (train.accumulate > 1)
    by_row = NamedSharding(mesh, PartitionSpec(*(None for _ in lead), ("data", "fsdp")))

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        whole = (*lead, train.batch_size // train.accumulate, *shape)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=by_row)

    names = ("tokens", "image_slots", "positions", "segment_ids", "target_positions", "target_ids")
    batch = {name: array(jnp.int32, cell.data.row_length) for name in names}
    batch["target_mask"] = array(jnp.bool_, cell.data.row_length)
    if cell.compressor.visual_tokens:
        batch["selected"] = array(jnp.dtype(train.dtype), tower.num_patches, tower.width)
    everywhere = replicated(mesh)
    numbers: Any = [jax.ShapeDtypeStruct((), x, sharding=everywhere) for x in (jnp.float32, jnp.uint32)]
    step = make_train_step(make_objective(cell, model), optimizer, trained_parts(cell), train.accumulate)
    where = (jax.tree.map(lambda leaf: leaf.sharding, state), everywhere)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=where)
        return jitted.lower(state, places.frozen, batch, Knobs(*numbers)), places


def expected(places: Places, mesh: dict[str, int], cell: Cell, target: Target) -> dict[str, float]:
    """Bytes that a device sends a step as the places of the parameters let expect, by what for.

    Layers split over fsdp are gathered forward and, recomputed, backward, head and compressor once and the
    embedding not at all. Gradients are summed once, the head's and the norms' in float32; those of a table
    that is both twice. Embeddings that were looked up travel to the rows that want them, and their gradients
    back. Over tensor each layer is summed twice forward, once recomputed and twice backward.
    """
    size, train, ring = SIZES[cell.llm.name], cell.train, {axis: (n - 1) / n for axis, n in mesh.items()}
    moved = 4 if train.dtype == "float32" else target.gathers
    head = "embedding" if size.tied_embeddings else "head"
    found = {"parameters": 0.0, "gradients": 0.0}
    for trains, tree in ((True, places.trained), (False, places.frozen)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name, over = path[-1].key, {axis for axis in leaf.sharding.spec if axis is not None}
            held = train.accumulate * leaf.size / math.prod(mesh[axis] for axis in over - {"fsdp"})
            whole, table = held * ring["fsdp"] * ("fsdp" in over), name in (head, "embedding")
            uses = 2 if path[1].key == "layers" else int(name != "embedding" or name == head)
            found["parameters"] += moved * uses * whole
            if trains:
                width = 4 if table or name == "scale" or train.dtype == "float32" else target.reduces
                found["gradients"] += width * whole * (uses > 0) * (1 if target.scatters or table else 2)
                rows = mesh["data"] if "fsdp" in over else mesh["data"] * mesh["fsdp"]
                sums = 2 if name == "embedding" == head else 1
                found["gradients"] += (
                    sums * width * 2 * held / mesh["fsdp"] ** ("fsdp" in over) * (1 - 1 / rows)
                )
    states = train.batch_size / (mesh["data"] * mesh["fsdp"]) * cell.data.row_length * size.width * moved
    found["embeddings"] = states * ring["fsdp"] * (2 if train.llm_rate else 1)
    found["layers"] = states * ring["tensor"] * 2 * 5 * size.num_layers
    return found


def compute_seconds(cell: Cell, devices: int, target: Target) -> float:
    """What a device computes in a step, recomputation included, at `UTILIZATION` of its peak."""
    size, train, length = SIZES[cell.llm.name], cell.train, cell.data.row_length
    passes = 3 if train.llm_rate else 2
    total = (passes + 1) * flops.decoder_flops(size, length, 0)  # each layer is computed again
    total += passes * flops.head_flops(size, size.vocab_size, length)
    peak = peak_flops(target.kind, "bfloat16") or math.nan
    return train.batch_size / devices * total / (UTILIZATION * peak)


def rate(one: Collective, target: Target) -> float:
    """Bytes/s that a device sends: between hosts over as many links as the group has members on each."""
    return (
        target.bandwidth
        if one.hosts == 1
        else min(target.bandwidth, target.network * one.members / one.hosts)
    )


def measure(args: argparse.Namespace, size: str, axes: str, count: int) -> dict[str, Any]:
    """Compile one program and count: a row of the table."""

    target, shape = TARGETS[args.target], mesh_shape(axes, count)
    cell = make_cell(args, size, args.batch_per_device * shape["data"] * shape["fsdp"])
    row = {"target": args.target, "size": size, "mesh": axes, "devices": count, "top": []}
    lowered, places = lower_step(cell, make_mesh(**shape, devices=make_devices(args.target, count)))
    start = time.perf_counter()
    try:
        # Of a CPU's program the machine code is of no interest.
        compiled = lowered.compile({"xla_backend_optimization_level": 0} if args.target == "cpu" else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"refused": str(error).splitlines()[0]}
    row["compile_s"] = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if args.hlo:
        Path(args.hlo).write_text(text)
    chunks = -(-args.batch_per_device // args.accumulate * args.length // cell.train.loss_chunk)
    found = sorted(collectives(text, shape, chunks), key=lambda one: -one.sent * one.times)
    totals: dict[tuple[str, str, str], float] = defaultdict(float)
    for one in found:
        totals[one.kind, one.axes, one.dtype] += one.sent * one.times
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return row | {
        "sent": {kind: sum(n for key, n in totals.items() if key[0] == kind) for kind in KINDS},
        "by_axes": [[*key, n] for key, n in totals.items()],
        "total": sum(totals.values()),
        "expected": expected(places, shape, cell, target),
        "state_bytes": kept,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compute_s": compute_seconds(cell, count, target),
        "transfer_s": sum(one.sent * one.times / rate(one, target) for one in found),
        "top": [one._asdict() for one in found[: args.top]],
    }


def alone(argv: list[str], size: str, axes: str, count: int) -> dict[str, Any]:
    """`measure` in a program of its own: a process has one set of fake devices, and one libtpu."""
    # The first two keep libtpu from asking a metadata server, the third from refusing a second process.
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    words = ["--here", "--sizes", size, "--mesh", axes, "--devices", str(count)]
    command = [sys.executable, __file__, *argv, *words]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{size} on {axes} of {count}: {done.stderr.strip()[-2000:]}")
    return dict(json.loads(done.stdout))


COLUMNS = "gather scatter reduce to-all permute total expected ratio state temp compute send none all compile"


def table(row: dict[str, Any]) -> Iterator[str]:
    """A row as lines of text."""
    head = f"{row['size']:13} {row['mesh']:9} {row['devices']:4}"
    if "refused" in row:
        yield f"{head}  {row['refused'][:150]}"
        return
    wanted, work, send = sum(row["expected"].values()) or math.nan, row["compute_s"], row["transfer_s"]
    numbers = [*(row["sent"][kind] / 1e6 for kind in KINDS), row["total"] / 1e6, wanted / 1e6]
    numbers += [row["total"] / wanted, row["state_bytes"] / 2**30, row["temporary_bytes"] / 2**30]
    numbers += [1e3 * work, 1e3 * send, work / (work + send), work / max(work, send)]
    yield head + "".join(f"{x:9.2f}" if x < 10 else f"{x:9.1f}" for x in [*numbers, row["compile_s"]])
    for one in row["top"]:
        name = f"{one['kind']} {one['dtype']} over {one['axes']}"
        yield f"    {one['sent'] * one['times'] / 1e6:9.1f} MB, {one['times']} x {name}: {one['source']}"


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, default="cpu")
    parser.add_argument("--sizes", nargs="+", default=QWEN)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--mesh", nargs="+", default=["fsdp"])
    parser.add_argument("--batch-per-device", type=int, default=4, help="rows, of what data and fsdp split")
    parser.add_argument("--length", type=int, default=2048, help="positions of a row")
    parser.add_argument("--visual-tokens", type=int, default=144, help="of the image; 0 for a blind model")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="in 1 the LLM is frozen")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="of computation; masters are float32")
    parser.add_argument("--top", type=int, default=0, help="show so many of the largest collectives")
    parser.add_argument("--hlo", default="", help="write the last compiled program to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args, args.sizes[0], args.mesh[0], args.devices[0])))
        return 0
    if not args.json:
        print(f"{'size':13} {'mesh':9} {'n':>4}" + "".join(f"{name:>9}" for name in COLUMNS.split()))
    rows = []
    for size, axes, count in itertools.product(args.sizes, args.mesh, args.devices):
        rows.append(alone(sys.argv[1:], size, axes, count))
        if not args.json:
            print("\n".join(table(rows[-1])), flush=True)
    if args.json:
        print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
