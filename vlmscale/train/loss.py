"""Cross-entropy over a large vocabulary without its logits: chunk by chunk, the gradients made on the way.

For 151,936 words and 4,096 positions the logits are 2.5 GB, and their gradient as much again. Here a chunk
of positions at a time goes through the head, and its gradients are made at once (as Liger Kernel does, arXiv
2410.10989): three products in all, where computing logits anew in the backward pass takes four. The backward
pass only scales them.

On a mesh every device does this with its own rows of the batch and its own part of the vocabulary. What
travels is, once each, the table over `fsdp` in the compute dtype and the table's gradient, and for each
position three numbers and the gradient of its hidden state over `tensor`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from vlmscale.attention import BATCH_AXES
from vlmscale.sharding import RULES

DEFAULT_CHUNK = 256


def chunked_cross_entropy(
    hidden: Array,
    table: Array,
    target_ids: Array,
    weights: Array,
    *,
    chunk: int = DEFAULT_CHUNK,
    train_table: bool = True,
) -> Array:
    """Sum over positions of weights * cross_entropy(hidden @ table.T, target_ids).

    Only positions of a weight other than 0 are computed, in whole chunks: each device moves its own to the
    front, and all stop behind the last chunk that holds one anywhere. What `hidden` and `target_ids` have
    elsewhere, a NaN even, reaches neither loss nor gradients.

    Under `jax.set_mesh` rows are split over the axes `data` and `fsdp` and the table as in
    `vlmscale.sharding.RULES`; axes may be missing, and what an axis does not divide stays whole.

    Under `jax.vmap` each member has a chunk of its own in memory; where the weights are shared, no member
    computes a chunk without a supervised position. `jax.checkpoint` saves no memory here, and computes
    everything twice.

    Args:
      hidden: [B, K, D] float32 or bfloat16, final hidden states at the target positions.
      table: [V, D], the head; cast to the dtype of `hidden` for the products.
      target_ids: [B, K] int32, each below V where it is supervised.
      weights: [B, K] float32, 0 where nothing is supervised. Data, without a gradient: theirs is 0.
      chunk: positions of one device whose logits exist at once. Each chunk reads and writes the whole
        gradient of the table, so many small ones are slow where memory is, next to products.
      train_table: whether the table has a gradient; if not it is 0 and costs nothing.

    Returns:
      Float32 scalar, exactly 0 without a supervised position. Products accumulate in float32, logits,
      softmax, loss and, over chunks, the gradient of the table are float32.

    Raises:
      ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunked_cross_entropy: chunk={chunk} must be at least 1")
    return _loss(hidden, table, target_ids, weights, chunk, train_table)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(hidden: Array, table: Array, ids: Array, weights: Array, chunk: int, train_table: bool) -> Array:
    """The loss alone, where nobody asks for a gradient."""
    return _on_mesh(hidden, table, ids, weights, _Work(chunk, False, False))[0]


Gradients = tuple[Array | None, Array | None]  # of the hidden states and of the table


def _forward(
    hidden: Array, table: Array, ids: Array, weights: Array, chunk: int, train_table: bool
) -> tuple[Array, Gradients]:
    total, d_hidden, d_table = _on_mesh(hidden, table, ids, weights, _Work(chunk, True, train_table))
    return total, (d_hidden, d_table)


def _backward(
    chunk: int, train_table: bool, gradients: Gradients, cotangent: Array
) -> tuple[Array | None, Array | None, None, None]:
    d_hidden, d_table = (None if x is None else (x * cotangent).astype(x.dtype) for x in gradients)
    return d_hidden, d_table, None, None


_loss.defvjp(_forward, _backward)


class _Work(NamedTuple):
    """What is to be computed, and the mesh axes over which things are split; none without a mesh."""

    chunk: int
    to_hidden: bool  # whether the hidden states get a gradient
    to_table: bool
    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()  # one at most
    embed: tuple[str, ...] = ()  # one at most


Totals = tuple[Array, Array | None, Array | None]  # the loss and the two gradients, None if not wanted


@partial(jax.jit, static_argnums=4)
def _on_mesh(hidden: Array, table: Array, ids: Array, weights: Array, work: _Work) -> Totals:
    """Split the work over the mesh in force, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for name in mesh.axis_names if name not in mesh.manual_axes]
    # Not over an axis of one device: a collective there is a copy at best.
    axes = {name: mesh.shape[name] for name in names if mesh.shape[name] > 1}
    if not axes:
        return _on_device(hidden, table, ids, weights, work)
    rows = tuple(name for name in BATCH_AXES if name in axes)
    if hidden.shape[0] % math.prod(axes[name] for name in rows):
        rows = ()
    vocab, embed = (
        tuple(name for name in axes if name == RULES[logical] and length % axes[name] == 0)
        for logical, length in zip(("vocab", "embed"), table.shape, strict=True)
    )
    work = work._replace(rows=rows, vocab=vocab, embed=embed)
    by_row, of_table = PartitionSpec(rows), PartitionSpec(vocab, embed)
    # By hand, because the compiler would add up the table's gradient over the devices in every chunk. The
    # check of what varies over the mesh cannot know that the loop is equally long on all devices.
    return jax.shard_map(
        partial(_on_device, work=work),
        in_specs=(by_row, of_table, by_row, by_row),
        out_specs=(PartitionSpec(), by_row, of_table if rows else PartitionSpec(vocab)),
        axis_names=set(names),
        check_vma=False,
    )(hidden, table, ids, weights)


def _on_device(hidden: Array, table: Array, ids: Array, weights: Array, work: _Work) -> Totals:
    """One device's rows [B, K, ...] and its part of the table; the sums are those of the whole mesh."""
    flat, ids, weights = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1), weights.reshape(-1)
    chunk = min(work.chunk, weights.size)
    order = jnp.argsort(weights == 0, stable=True)
    spare = (0, -weights.size % chunk)  # to whole chunks, with weight 0
    places, ordered = jnp.pad(order, spare), jnp.pad(weights[order], spare)
    # As many on every device: they wait for one another in any case, and collectives stand in the loop.
    chunks = lax.pmax(-(-jnp.sum(weights != 0) // chunk), work.rows)
    head, axes = _whole_width(table.astype(hidden.dtype), work)

    def add_chunk(number: Array, sums: Totals) -> Totals:
        total, d_hidden, d_head = sums
        at = lax.dynamic_slice_in_dim(places, number * chunk, chunk)
        weight = lax.dynamic_slice_in_dim(ordered, number * chunk, chunk)
        # Not left to the weight, because 0 times NaN is NaN.
        x = jnp.where((weight != 0)[:, None], flat[at], 0)
        logits = jnp.einsum(f"cd,{axes}->cv", x, head, preferred_element_type=jnp.float32)
        losses, d_logits = _losses(logits, ids[at], work.vocab)
        total += jnp.sum(losses * weight)
        d_logits = (d_logits * weight[:, None]).astype(head.dtype)
        if d_hidden is not None:
            made = jnp.einsum(f"cv,{axes}->cd", d_logits, head, preferred_element_type=jnp.float32)
            made = lax.psum(made, work.vocab).astype(d_hidden.dtype)
            d_hidden = lax.dynamic_update_slice_in_dim(d_hidden, made, number * chunk, 0)
        if d_head is not None:
            d_head = _add_product(d_head, *((d_logits, x) if axes == "vd" else (x, d_logits)))
        return total, d_hidden, d_head

    d_hidden = jnp.zeros((places.size, flat.shape[1]), flat.dtype) if work.to_hidden else None
    d_head = jnp.zeros(head.shape, jnp.float32) if work.to_table else None
    total, d_hidden, d_head = lax.fori_loop(0, chunks, add_chunk, (jnp.float32(0), d_hidden, d_head))
    if d_hidden is not None:
        d_hidden = d_hidden[jnp.argsort(order)].reshape(hidden.shape)
    d_table = None if d_head is None else _own_part(d_head, work).astype(table.dtype)
    return lax.psum(total, work.rows), d_hidden, d_table


def _whole_width(table: Array, work: _Work) -> tuple[Array, str]:
    """The table with all of D on this device, and the order of its axes: "vd", or "dv" if D was split.

    Parts along the first axis are joined without another copy of the whole.
    """
    if not work.embed:
        return table, "vd"
    return lax.all_gather(table.T, work.embed, tiled=True), "dv"


def _own_part(d_head: Array, work: _Work) -> Array:
    """The sum of all devices' gradients of the head as the [V, D] that this device has of the table."""
    if not work.embed:
        return lax.psum(d_head, work.rows)
    if not work.rows:  # every device has done the same
        return d_head.T
    part = lax.psum_scatter(d_head, work.embed, tiled=True)
    return lax.psum(part, tuple(name for name in work.rows if name not in work.embed)).T


def _losses(logits: Array, target: Array, vocab: tuple[str, ...]) -> tuple[Array, Array]:
    """Cross-entropies [C] of logits [C, V], and their gradients [C, V].

    The logits may be one device's part, which `vocab` says; the losses are those of the whole vocabulary.
    """
    first = lax.axis_index(vocab) * logits.shape[1] if vocab else 0
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == (target - first)[:, None]
    logits -= lax.pmax(jnp.max(logits, axis=1), vocab)[:, None]
    mass, said = lax.psum(
        (jnp.sum(jnp.exp(logits), axis=1), jnp.sum(jnp.where(hit, logits, 0), axis=1)), vocab
    )
    return jnp.log(mass) - said, jnp.exp(logits) / mass[:, None] - hit


def _add_product(total: Array, left: Array, right: Array) -> Array:
    """`total` [M, N] + left.T @ right of [C, M] and [C, N], a block of M at a time.

    A block's product is at most half as large as the larger of left and right. A whole product would be
    another `total` wherever XLA does not add inside of it, as on a CPU.
    """
    length, (chunk, width) = total.shape[0], right.shape
    block = -(-length // -(-2 * min(length, width) // chunk))

    def add(total: Array, start: Array | int, size: int) -> Array:
        part = lax.dynamic_slice_in_dim(left, start, size, 1)
        old = lax.dynamic_slice_in_dim(total, start, size, 0)
        new = old + jnp.einsum("cm,cn->mn", part, right, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(total, new, start, 0)

    whole, rest = divmod(length, block)
    total = lax.fori_loop(0, whole, lambda number, total: add(total, number * block, block), total)
    return add(total, whole * block, rest) if rest else total
