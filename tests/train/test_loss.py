"""The chunked loss against the naive one: values, gradients, memory, what is skipped, devices, vmap."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from vlmscale.sharding import make_mesh
from vlmscale.train import loss as loss_module
from vlmscale.train.loss import DEFAULT_CHUNK, chunked_cross_entropy

Arrays = tuple[Any, Any, Any, Any]  # hidden, table, target ids, weights
ROWS = ("data", "fsdp")
LARGE_VOCAB, MANY_POSITIONS, WIDTH = 151_936, 4_096, 1_024


def naive(hidden: Any, table: Any, ids: Any, weights: Any) -> jax.Array:
    head = table.astype(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, ids))


def exact(hidden: Any, table: Any, ids: Any, weights: Any) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """The loss with its gradients by hidden states and table, in float64."""
    hidden, table, weights = (np.asarray(x, np.float64) for x in (hidden, table, weights))
    logits = hidden @ table.T
    logits -= logits.max(-1, keepdims=True)
    mass, hit = np.exp(logits).sum(-1), np.eye(len(table))[ids]
    losses = np.log(mass) - (logits * hit).sum(-1)
    d_logits = (np.exp(logits) / mass[..., None] - hit) * weights[..., None]
    return (losses * weights).sum(), (d_logits @ table, np.einsum("bkv,bkd->vd", d_logits, hidden))


def draw(rows: int, targets: int, width: int, vocab: int, seed: int = 0) -> Arrays:
    """Random inputs; a third of the positions are not supervised, the other weights are no ones."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((rows, targets, width)).astype(np.float32)
    table = (rng.standard_normal((vocab, width)) * 2 * width**-0.5).astype(np.float32)
    ids = rng.integers(0, vocab, (rows, targets)).astype(np.int32)
    weights = rng.uniform(0.1, 2, (rows, targets)) * (rng.random((rows, targets)) < 0.67)
    return hidden, table, ids, weights.astype(np.float32)


def both(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The jitted loss with its gradients by hidden states and table."""
    return jax.jit(jax.value_and_grad(function, (0, 1)))


def close(found: Any, wanted: Any, relative: float = 1e-6) -> None:
    """Each leaf within `relative` of its largest entry."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= relative * np.abs(other).max()


@pytest.mark.parametrize(
    "rows, targets, width, vocab, chunk",
    [
        (3, 7, 16, 101, 4),  # neither positions nor vocabulary divide
        (2, 16, 32, 64, 8),  # both do
        (1, 5, 8, 23, 64),  # one chunk, longer than all positions
        (4, 6, 24, 997, 1),
    ],
)
def test_loss_and_gradients_are_those_of_the_naive_loss(
    rows: int, targets: int, width: int, vocab: int, chunk: int
) -> None:
    arrays = draw(rows, targets, width, vocab, seed=chunk)
    found = both(partial(chunked_cross_entropy, chunk=chunk))(*arrays)
    close(found, both(naive)(*arrays))
    assert found[0].dtype == jnp.float32
    alone = jax.jit(partial(chunked_cross_entropy, chunk=chunk))(*arrays)
    close(alone, found[0])


@pytest.fixture(scope="module")
def small() -> tuple[Arrays, Callable[..., Any]]:
    return draw(2, 9, 8, 37), both(partial(chunked_cross_entropy, chunk=4))


@given(mask=st.lists(st.booleans(), min_size=18, max_size=18))
def test_any_mask(small: Any, mask: list[bool]) -> None:
    (hidden, table, ids, _), chunked = small
    weights = np.array(mask, np.float32).reshape(2, 9)
    holes = np.where(weights[..., None] == 0, np.float32("nan"), hidden)
    found = chunked(holes, table, np.where(weights == 0, -100, ids), weights)
    close(found, exact(hidden, table, ids, weights))
    assert (np.asarray(found[1][0])[weights == 0] == 0).all()


def test_without_a_target_all_is_exactly_0(small: Any) -> None:
    (hidden, table, ids, weights), chunked = small
    total, gradients = chunked(np.full_like(hidden, np.nan), table, ids, np.zeros_like(weights))
    assert total == 0
    assert all((leaf == 0).all() for leaf in gradients)


def test_the_cotangent_scales_and_weights_have_no_gradient(small: Any) -> None:
    arrays, chunked = small
    total, gradients = chunked(*arrays)

    def mean(hidden: Any, table: Any, ids: Any, weights: Any) -> jax.Array:
        return jnp.log(chunked_cross_entropy(hidden, table, ids, weights, chunk=4))

    *scaled, of_weights = jax.jit(jax.grad(mean, (0, 1, 3)))(*arrays)
    close(scaled, [leaf / total for leaf in gradients])
    assert (of_weights == 0).all()


def test_large_logits_do_not_overflow() -> None:
    hidden, table, ids, weights = draw(1, 8, 16, 50)
    arrays = (hidden * 1e3, table, ids, weights)
    found = both(partial(chunked_cross_entropy, chunk=4))(*arrays)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    close(found, exact(*arrays))


def test_bfloat16_is_as_near_to_float32_as_the_naive_loss() -> None:
    hidden, table, ids, weights = draw(2, 64, 64, 500)
    short = jnp.asarray(hidden, jnp.bfloat16)
    wanted = both(naive)(short, table, ids, weights)
    for head in (table, jnp.asarray(table, jnp.bfloat16)):
        found = both(partial(chunked_cross_entropy, chunk=16))(short, head, ids, weights)
        assert [leaf.dtype for leaf in found[1]] == [jnp.bfloat16, head.dtype]
        close(found[0], wanted[0], 1e-6)
        close(found, wanted, 1e-2)
        close(found, exact(short, table, ids, weights), 1e-2)


def test_the_gradient_of_the_table_adds_up_in_float32() -> None:
    hidden, table, ids, _ = draw(1, 1, 8, 16)
    gradient = jax.jit(jax.grad(partial(chunked_cross_entropy, chunk=1), 1))
    once = (jnp.asarray(hidden, jnp.bfloat16), table, ids, np.ones((1, 1), np.float32))
    often = [jnp.repeat(x, 1024, 1) if x is not table else table for x in once]
    close(gradient(*often), 1024 * gradient(*once), 1e-4)  # a sum in bfloat16 would end at 256 of them


def test_a_frozen_head_has_a_zero_gradient() -> None:
    arrays = draw(2, 9, 8, 37)
    frozen = partial(chunked_cross_entropy, chunk=4, train_table=False)
    total, (hidden, table) = both(frozen)(*arrays)
    wanted = exact(*arrays)
    close((total, hidden), (wanted[0], wanted[1][0]))
    assert (table == 0).all()


def test_a_chunk_is_at_least_one_position() -> None:
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        chunked_cross_entropy(*draw(1, 2, 4, 5), chunk=0)


def test_three_products_train_and_one_evaluates() -> None:
    arrays = draw(2, 16, 32, 64)

    def count(function: Callable[..., Any]) -> int:
        return len(re.findall(r"\bdot_general\[", str(jax.make_jaxpr(function)(*arrays))))

    chunked = partial(chunked_cross_entropy, chunk=8)
    frozen = partial(chunked, train_table=False)
    assert count(chunked) == 1
    assert count(jax.value_and_grad(chunked, (0, 1))) == 3
    assert count(jax.value_and_grad(frozen)) == 2


@pytest.fixture
def chunks_done(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a chunk was computed since it was asked last, by each device; all members of a vmap are one.

    Only in programs of shapes that no other test has.
    """
    done: list[int] = []
    losses = loss_module._losses

    def counted(*arguments: Any) -> Any:
        jax.debug.callback(lambda: done.append(1))
        return losses(*arguments)

    def ask() -> int:
        jax.effects_barrier()
        count = len(done)
        done.clear()
        return count

    monkeypatch.setattr(loss_module, "_losses", counted)
    return ask


def test_chunks_without_a_target_are_skipped(chunks_done: Callable[[], int]) -> None:
    hidden, table, ids, _ = draw(3, 10, 8, 41)
    chunked = both(partial(chunked_cross_entropy, chunk=8))
    for supervised, chunks in ((0, 0), (1, 1), (8, 1), (9, 2), (24, 3), (30, 4)):
        weights = np.zeros(30, np.float32)
        weights[np.random.default_rng(supervised).permutation(30)[:supervised]] = 1.5
        arrays = (hidden, table, ids, weights.reshape(3, 10))
        found = chunked(*arrays)
        assert chunks_done() == chunks
        close(found, exact(*arrays))


def test_members_of_a_vmap_skip_the_same_chunks(chunks_done: Callable[[], int]) -> None:
    hidden, table, ids, weights = draw(3, 10, 8, 43)
    weights = np.where(np.arange(10) < 3, weights, 0)
    many = (np.stack([hidden, hidden / 2]), np.stack([table, table[::-1]]))
    function = jax.vmap(jax.value_and_grad(partial(chunked_cross_entropy, chunk=3)), (0, 0, None, None))
    jax.jit(function)(*many, ids, weights)
    assert chunks_done() == 3 == -(-np.count_nonzero(weights) // 3)


@pytest.mark.parametrize("mapped", [(0, 0, None, None), (None, 0, None, None), (0, 0, 0, 0)])
def test_vmap_gives_what_each_member_gives(mapped: tuple[int | None, ...]) -> None:
    drawn = [draw(2, 7, 8, 37, seed) for seed in range(3)]
    members = [
        tuple(own if axis == 0 else first for own, first, axis in zip(member, drawn[0], mapped, strict=True))
        for member in drawn
    ]
    arrays = [
        np.stack(each) if axis == 0 else each[0]
        for each, axis in zip(zip(*members, strict=True), mapped, strict=True)
    ]
    chunked = partial(chunked_cross_entropy, chunk=4)
    each = jax.tree.map(lambda *leaves: np.stack(leaves), *(exact(*member) for member in members))
    close(jax.jit(jax.vmap(jax.value_and_grad(chunked, (0, 1)), mapped))(*arrays), each)


def test_what_members_of_a_vmap_share_has_the_sum_of_their_gradients() -> None:
    hidden, table, ids, weights = draw(2, 7, 8, 37)
    tables = np.stack([table, table[::-1], table / 2])

    def total(hidden: Any, tables: Any) -> jax.Array:
        member = partial(chunked_cross_entropy, chunk=4)
        return jnp.sum(jax.vmap(member, (None, 0, None, None))(hidden, tables, ids, weights))

    each = [exact(hidden, table, ids, weights) for table in tables]
    gradients = (sum(one[1][0] for one in each), np.stack([one[1][1] for one in each]))
    close(both(total)(hidden, tables), (sum(one[0] for one in each), gradients))


def test_under_checkpoint_and_in_a_scan_that_accumulates() -> None:
    parts = [draw(2, 7, 8, 37, seed) for seed in range(3)]
    table = parts[0][1]
    chunked = partial(chunked_cross_entropy, chunk=4)
    close(both(jax.checkpoint(chunked))(*parts[0]), exact(*parts[0]))
    stacked = tuple(np.stack([part[at] for part in parts]) for at in (0, 2, 3))

    def add(sums: Any, part: Any) -> tuple[Any, jax.Array]:
        hidden, ids, weights = part
        total, (of_hidden, of_table) = jax.value_and_grad(chunked, (0, 1))(hidden, table, ids, weights)
        return (sums[0] + total, sums[1] + of_table), of_hidden

    start = (jnp.float32(0), jnp.zeros_like(table))
    (total, of_table), of_hidden = jax.jit(lambda parts: jax.lax.scan(add, start, parts))(stacked)
    each = [exact(hidden, table, ids, weights) for hidden, _, ids, weights in parts]
    close(total, sum(one[0] for one in each))
    close(of_table, sum(one[1][1] for one in each))
    close(of_hidden, np.stack([one[1][0] for one in each]))


def put(arrays: Arrays, mesh: jax.sharding.Mesh) -> list[jax.Array]:
    """On the mesh as in training: rows over data and fsdp, the table over tensor and fsdp."""
    rows, table = PartitionSpec(ROWS), PartitionSpec("tensor", "fsdp")
    specs = (rows, table, rows, rows)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_give_what_one_gives(shape: tuple[int, int, int]) -> None:
    arrays = draw(8, 9, 16, 80)
    arrays[3][:2] = 0  # devices without a target
    function = partial(chunked_cross_entropy, chunk=4)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        spread = put(arrays, mesh)
        compiled = both(function).lower(*spread).compile()
        together = compiled(*spread)
    close(together, exact(*arrays))
    for gradient, leaf in zip(together[1], spread, strict=False):
        assert gradient.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    _, fsdp, tensor = shape
    # Nothing of the batch and no logits are gathered: the table alone is, over fsdp.
    gathered = re.findall(r"= (\S+?)\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    assert gathered == ([("f32", f"16,{80 // tensor}")] if fsdp > 1 else [])


@pytest.mark.parametrize("rows, width, vocab", [(3, 16, 80), (8, 15, 79)])
def test_what_a_mesh_does_not_divide_stays_whole(rows: int, width: int, vocab: int) -> None:
    arrays = draw(rows, 9, width, vocab)
    wanted = exact(*arrays)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        close(both(partial(chunked_cross_entropy, chunk=4))(*arrays), wanted)


def test_vmap_and_bfloat16_on_a_mesh() -> None:
    each = [draw(8, 9, 16, 80, seed) for seed in range(2)]
    ids, weights = each[0][2:]
    hidden = jnp.stack([member[0] for member in each]).astype(jnp.bfloat16)
    table = np.stack([member[1] for member in each])
    axes = (0, 0, None, None)
    alone = jax.jit(jax.vmap(jax.value_and_grad(naive, (0, 1)), axes))(hidden, table, ids, weights)
    function = jax.jit(jax.vmap(jax.value_and_grad(partial(chunked_cross_entropy, chunk=4), (0, 1)), axes))
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        hidden = jax.device_put(hidden, NamedSharding(mesh, PartitionSpec(None, ROWS)))
        table = jax.device_put(table, NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp")))
        close(function(hidden, table, ids, weights), alone, 1e-2)


def test_devices_do_equally_many_chunks(chunks_done: Callable[[], int]) -> None:
    hidden, table, ids, weights = draw(8, 12, 8, 40)
    weights = np.where(np.arange(12) < np.arange(8)[:, None], 1, 0).astype(np.float32)  # 0 to 7 in a row
    mesh = make_mesh(4, 1, 2)
    with jax.set_mesh(mesh):
        found = both(partial(chunked_cross_entropy, chunk=4))(*put((hidden, table, ids, weights), mesh))
    assert chunks_done() == 8 * 4  # of 13 positions on the last two devices, not of all 24
    close(found, exact(hidden, table, ids, weights))


def temporary(function: Callable[..., jax.Array], arguments: tuple[int, ...], dtype: Any) -> int:
    """Bytes that a compiled loss takes with its gradients, beside its inputs and outputs."""
    shape, batch = jax.ShapeDtypeStruct, (2, MANY_POSITIONS // 2)
    inputs = (
        shape((*batch, WIDTH), dtype),
        shape((LARGE_VOCAB, WIDTH), jnp.float32),
        shape(batch, jnp.int32),
        shape(batch, jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(function, arguments)).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_memory_with_a_large_vocabulary(dtype: Any, trained: bool) -> None:
    arguments = (0, 1) if trained else (0,)
    found = temporary(partial(chunked_cross_entropy, train_table=trained), arguments, dtype)
    assert found <= temporary(naive, arguments, dtype) / 8
    logits = DEFAULT_CHUNK * LARGE_VOCAB * 4
    cast = 0 if dtype == jnp.float32 else LARGE_VOCAB * WIDTH * 2
    # Two chunks of logits, one gradient of the hidden states, and no second gradient of the table.
    assert found <= 1.05 * (2 * logits + MANY_POSITIONS * WIDTH * dtype.dtype.itemsize + cast)
