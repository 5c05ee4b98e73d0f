"""The bytes that programs send: read off real ones whose collectives are known, and off the training step."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from benchmarks import scaling
from vlmscale.sharding import make_mesh

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ALL = ("data", "fsdp", "tensor")


def sent(function: Callable[..., Any], *shapes: tuple[int, ...], dynamic: int = 1) -> list[tuple[Any, ...]]:
    """Kind, axes, bytes each time and times of the collectives of a program under shard_map."""
    mesh = make_mesh(**MESH)
    split = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(ALL), check_vma=False
    )
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(split).lower(*arrays).compile().as_text()
    found = scaling.collectives(text, MESH, dynamic)
    return sorted((one.kind, one.axes, one.sent, one.times) for one in found)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: jax.lax.psum(x, "fsdp"), ("all-reduce", "fsdp", 2 * 4096 / 2)),
        (lambda x: jax.lax.psum(x, ALL), ("all-reduce", "data+fsdp+tensor", 2 * 4096 * 7 / 8)),
        (lambda x: jax.lax.psum(x, ("data", "tensor")), ("all-reduce", "data+tensor", 2 * 4096 * 3 / 4)),
        (lambda x: jax.lax.all_gather(x, ("data", "fsdp")), ("all-gather", "data+fsdp", 3 * 4096)),
        (lambda x: jax.lax.all_gather(x.astype(jnp.int8), "tensor"), ("all-gather", "tensor", 1024)),
        (
            lambda x: jax.lax.psum_scatter(x, ("fsdp", "tensor")),
            ("reduce-scatter", "fsdp+tensor", 4096 * 3 / 4),
        ),
        (
            lambda x: jax.lax.all_to_all(x, ("fsdp", "tensor"), 0, 0),
            ("all-to-all", "fsdp+tensor", 4096 * 3 / 4),
        ),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), ("collective-permute", "data", 4096)),
    ],
)
def test_what_a_collective_sends(function: Callable[..., Any], expected: tuple[Any, ...]) -> None:
    kind, axes, nbytes = expected
    assert sent(function, (4, 256)) == [(kind, axes, pytest.approx(nbytes), 1)]


def test_loops_count_as_often_as_they_turn() -> None:
    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(jax.lax.psum(x, "fsdp")), None

    def outer(x: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        x, _ = jax.lax.scan(inner, x + row, None, length=3)
        whole = jax.lax.all_gather(jnp.cos(x), ("data", "fsdp"), tiled=True)
        return jax.lax.psum_scatter(whole, ("data", "fsdp"), tiled=True), None

    def program(x: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.scan(outer, x, rows)[0]

    assert sent(program, (8, 256), (5, 8, 256)) == [
        ("all-gather", "data+fsdp", 3 * 8192, 5),
        ("all-reduce", "fsdp", 8192, 15),
        ("reduce-scatter", "data+fsdp", 3 * 8192, 5),
    ]


def test_a_loop_of_unknown_length() -> None:
    def program(x: jax.Array) -> jax.Array:
        turns = jnp.sum(x > 0).astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda _, x: jnp.sin(jax.lax.psum(x, "fsdp")), x)

    assert sent(program, (8, 256), dynamic=7) == [("all-reduce", "fsdp", 8192, 7)]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_in_all_spellings(text: str, groups: list[list[int]]) -> None:
    line = scaling.Instruction(
        "x", "f32[8]", "all-reduce", (), f"channel_id=1, replica_groups={text}, y=1", ""
    )
    assert sorted(sorted(row) for row in scaling._groups(line, 8).tolist()) == groups


# As libtpu 0.0.42 writes them: a loop without its trip count, whose counter goes from 0 by 2 up to 8; a
# gather that starts in one fusion and goes on in two; a reduce-scatter; a collective with several operands.
TPU = """HloModule jit_step

%body (p: (u32[], bf16[4,128])) -> (u32[], bf16[4,128]) {
  %p = (u32[], bf16[4,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.0 = u32[]{:T(128)} get-tuple-element(%p), index=0
  %gte.1 = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %add = u32[]{:T(128)} add(%gte.0, %two)
  %cp = (bf16[4,128]{1,0}, bf16[4,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%gte.1), PAIRS
  %done = bf16[4,128]{1,0} collective-permute-done(%cp)
  ROOT %tuple = (u32[], bf16[4,128]) tuple(%add, %done)
}

%condition (p: (u32[], bf16[4,128])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %p = (u32[], bf16[4,128]{1,0}) parameter(0)
  %gte = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %compare = pred[]{:T(512)} compare(%gte, %eight), direction=LT
}

%start (p.0: bf16[1024,128]) -> (bf16[1024,128], bf16[1024,1024]) {
  %p.0 = bf16[1024,128]{1,0} parameter(0)
  %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%p.0), CHAIN
  ROOT %call = (bf16[1024,128]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p.0: bf16[1024,128]) -> bf16[1024,1024] {
  %p.0 = bf16[1024,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1024,1024]{1,0} all-gather(%p.0), CHAIN
}

%all-reduce-scatter (p: f32[64,128]) -> f32[8,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %all-reduce.1 = f32[64,128]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  ROOT %slice = f32[8,128]{1,0} slice(%all-reduce.1), slice={[0:8], [0:128]}
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[4,128], y: bf16[1024,128], z: f32[64,128]) -> f32[8,128] {
  %x = bf16[4,128]{1,0} parameter(0)
  %y = bf16[1024,128]{1,0} parameter(1)
  %z = f32[64,128]{1,0} parameter(2)
  %zero = u32[]{:T(128)} constant(0)
  %copy = u32[]{:T(128)} copy(%zero)
  %tuple.1 = (u32[], bf16[4,128]) tuple(%copy, %x)
  %while = (u32[], bf16[4,128]) while(%tuple.1), condition=%condition, body=%body
  %fusion.1 = (bf16[1024,128], bf16[1024,1024]) fusion(%y), kind=kCustom, calls=%start
  %fusion.2 = bf16[1024,1024] fusion(%y), kind=kOutput, calls=%goes_on
  %fusion.3 = bf16[1024,1024] fusion(%y), kind=kCustom, calls=%goes_on
  %ar = (f32[64,128]{1,0}, bf16[4,128]) all-reduce(%z, /*index=1*/%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %fusion.4 = f32[8,128]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter
}
"""
TPU = TPU.replace("PAIRS", "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}")
TPU = TPU.replace(
    "CHAIN", "replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={1}, frontend_attributes={chain_id=\"5\"}"
)


def test_a_program_of_a_tpu() -> None:
    found = scaling.collectives(TPU, {"data": 2, "fsdp": 4, "tensor": 1})
    assert sorted((one.kind, one.axes, one.dtype, one.sent, one.times) for one in found) == [
        ("all-gather", "data+fsdp", "bf16", 7 * 2**18, 1),
        ("all-reduce", "fsdp", "f32", 2 * (2**15 + 2**10) * 3 / 4, 1),
        ("collective-permute", "data+fsdp", "bf16", 2**10, 4),
        ("reduce-scatter", "data+fsdp", "f32", 2**15 * 7 / 8, 1),
    ]


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("constant(8)", "parameter(1)", "cannot tell how often it turns"),
        ("direction=LT", "direction=NE", "cannot tell how often it turns"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=some", "cannot read its groups"),
        ("all-reduce(%z,", "collective-broadcast(%z,", "is not counted"),
    ],
)
def test_what_is_not_understood_is_refused(old: str, new: str, complaint: str) -> None:
    assert old in TPU
    with pytest.raises(ValueError, match=complaint):
        scaling.collectives(TPU.replace(old, new), {"data": 8})


@pytest.mark.parametrize(
    "text, shape",
    [
        ("fsdp", (1, 8, 1)),
        ("data", (8, 1, 1)),
        ("tensor=4", (1, 2, 4)),
        ("fsdp=4", (2, 4, 1)),
        ("data=2,tensor=2", (2, 2, 2)),
        ("data,fsdp=2,tensor=2", (2, 2, 2)),
    ],
)
def test_meshes(text: str, shape: tuple[int, ...]) -> None:
    assert tuple(scaling.mesh_shape(text, 8).values()) == shape


@pytest.mark.parametrize("text", ["fsdp=3", "data,fsdp", "model=2", "data=2,fsdp=2,tensor=2"])
def test_a_mesh_that_is_none(text: str) -> None:
    with pytest.raises(SystemExit, match="does not split 8 devices"):
        scaling.mesh_shape(text, 8)


@pytest.mark.parametrize("target, package", [("v5e", "jax[tpu]"), ("h100", "jax-cuda13-plugin")])
def test_a_compiler_that_is_missing_is_named(target: str, package: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"--target {target}: .* {re.escape(package)} "):
        scaling.make_devices(target, 8)


def row_of(monkeypatch: Any, capsys: Any, *words: str) -> dict[str, Any]:
    """A row of the benchmark, of the fake devices that the tests have."""
    monkeypatch.setattr(scaling, "make_devices", lambda target, count: jax.devices()[:count])
    small = ["--sizes", "toy-135k", "--devices", "8", "--visual-tokens", "16", "--length", "64"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--here", "--dtype", "float32", *small, *words])
    assert scaling.main() == 0
    row: dict[str, Any] = json.loads(capsys.readouterr().out)
    return row


@pytest.mark.parametrize("mesh", ["fsdp", "data"])
def test_a_training_step_sends_what_its_parameters_let_expect(
    mesh: str, monkeypatch: Any, capsys: Any
) -> None:
    row = row_of(monkeypatch, capsys, "--mesh", mesh)
    assert row["total"] == pytest.approx(sum(row["expected"].values()), rel=0.02)
    assert row["total"] == pytest.approx(sum(row["sent"].values()))
    (line,) = scaling.table(row)
    assert f"{row['total'] / 1e6:.2f}" in line.split()


def test_of_a_frozen_decoder_no_gradient_is_sent(monkeypatch: Any, capsys: Any) -> None:
    row = row_of(monkeypatch, capsys, "--mesh", "fsdp", "--stage", "1", "--top", "99")
    assert row["total"] == pytest.approx(sum(row["expected"].values()), rel=0.02)
    sums = [one for one in row["top"] if one["kind"] in ("all-reduce", "reduce-scatter")]
    assert sums
    compressor = 1024 * 64 + 64 + 64 * 64 + 64  # from a tower 1024 wide to an LLM of 64
    assert sum(one["sent"] * one["times"] for one in sums) == pytest.approx(7 / 4 * 4 * compressor, rel=0.01)
