"""Attention and rotary positions: the one place that multiplies queries with keys.

`attend` runs on one of four backends, and says so when one cannot do what is asked: it never takes another
one in silence.

  xla               any device, dtype, mask and length; keeps all T*S scores of a layer for the gradient
  cudnn             NVIDIA GPU; fused, so without the scores; a mask or segments cost B*T*S again
  splash            TPU; fused Pallas kernel, causal and segments at no cost in memory, no other mask
  splash-interpret  the same kernel interpreted on any device: slow, to test it where there is no TPU
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    segment_ids: Array | None = None,
    bias: Array | None = None,
    backend: str = "xla",
) -> Array:
    """Scaled dot-product attention with grouped keys; softmax in float32.

    What `mask`, `causal` and `segment_ids` allow is what all of those given allow. Under `jax.set_mesh` the
    fused backends run on each device alone: the batch split over the axes `data` and `fsdp`, the heads over
    `tensor`, of which any may be missing.

    Args:
      q: [B, T, H, D] queries.
      k: [B, S, K, D] keys, H a multiple of K (grouped-query attention).
      v: [B, S, K, D] values.
      mask: [B, T, S] bool, True where query t may see key s. A row without any True gives the mean of all
        values with "xla", never a NaN; with "cudnn" what it gives is not defined. Not for splash.
      causal: query t sees the keys s <= t alone; T must equal S.
      segment_ids: [B, T] int, 0 for padding: a query sees the keys of its own id alone, those in the padding
        each other, so no row is without a key. T must equal S.
      bias: [B, S] float32, added to the scores of each key. For xla alone.
      backend: a name from the table above.

    Returns:
      [B, T, H, D] in the dtype of `v`.

    Raises:
      ValueError: one line on what the backend cannot do, be it the platform, dtype, head width, lengths, mask
        or a batch or heads that do not divide over the mesh, and what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    _check_lengths(q, k, causal, segment_ids)
    chosen = BACKENDS[backend]
    if not chosen.fused:
        return chosen.run(q, k, v, mask, segment_ids, bias, causal=causal)
    if bias is not None:
        raise ValueError(f"attention backend {backend!r} adds nothing to scores: use 'xla'")
    _check_fused(backend, q, k, v, mask)
    run = partial(chosen.run, causal=causal)
    axes = _mesh_axes()
    if not axes:
        return run(q, k, v, mask, segment_ids)
    batch = tuple(name for name in BATCH_AXES if name in axes) or None
    by_head = PartitionSpec(batch, None, HEAD_AXIS if HEAD_AXIS in axes else None)
    # A TPU kernel cannot be split by the compiler, and every axis must be manual around it, used or not. The
    # kernels do not say how their results vary over the mesh, hence no check of it.
    return jax.shard_map(
        run,
        in_specs=(by_head, by_head, by_head, PartitionSpec(batch), PartitionSpec(batch)),
        out_specs=by_head,
        axis_names=set(axes),
        check_vma=False,
    )(q, k, v, mask, segment_ids)


def attention_weights(q: Array, k: Array, mask: Array | None = None, bias: Array | None = None) -> Array:
    """The probabilities with which `attend` (backend "xla") mixes the values.

    Args:
      q: [B, T, H, D] queries.
      k: [B, S, K, D] keys, H a multiple of K (grouped-query attention).
      mask: [B, T, S] bool, True where query t may see key s; None for full attention. A row without
        any True is uniform, never a NaN.
      bias: [B, S] float32, added to the scores of each key.

    Returns:
      [B, H, T, S] float32; each row sums to 1.
    """
    batch, length, num_heads, _ = q.shape
    return _grouped_weights(q, k, mask, bias).reshape(batch, num_heads, length, k.shape[1])


def _xla(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    segment_ids: Array | None,
    bias: Array | None,
    *,
    causal: bool,
) -> Array:
    batch, length, num_heads, head_dim = q.shape
    weights = _grouped_weights(q, k, _joint_mask(mask, segment_ids, causal, length), bias)
    mixed = jnp.einsum("bkts,bksd->bktd", weights.astype(v.dtype), v.swapaxes(1, 2))
    return mixed.reshape(batch, num_heads, length, head_dim).swapaxes(1, 2)


def _grouped_weights(q: Array, k: Array, mask: Array | None, bias: Array | None) -> Array:
    """Softmax of the scaled scores: [B, K, H/K*T, S] float32, the heads of a group one after another."""
    batch, length, _, head_dim = q.shape
    num_kv_heads, slots = k.shape[2], k.shape[1]
    # Heads that share a key become rows of one plain batched product: no key is repeated, and on CPU
    # this layout is about a third faster, gradient included, than a five-index contraction. Batch and heads
    # stay two axes: merged, they could not stay split over two axes of a mesh, and XLA would gather all keys.
    q = (
        q.reshape(batch, length, num_kv_heads, -1, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, num_kv_heads, -1, head_dim)
    )
    k = k.swapaxes(1, 2)
    scores = jnp.einsum("bktd,bksd->bkts", q, k, preferred_element_type=jnp.float32) * (head_dim**-0.5)
    if bias is not None:
        scores += bias[:, None, None]
    if mask is not None:
        grouped = scores.reshape(batch, num_kv_heads, -1, length, slots)
        scores = jnp.where(mask[:, None, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    return jax.nn.softmax(scores, axis=-1)


def _joint_mask(mask: Array | None, segment_ids: Array | None, causal: bool, length: int) -> Array | None:
    """All restrictions as one [B or 1, T, S] bool; None where there are none."""
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = same if mask is None else mask & same
    if causal:
        earlier = jnp.tril(jnp.ones((1, length, length), bool))
        mask = earlier if mask is None else mask & earlier
    return mask


def _cudnn(
    q: Array, k: Array, v: Array, mask: Array | None, segment_ids: Array | None, *, causal: bool
) -> Array:
    batch, length, slots = q.shape[0], q.shape[1], k.shape[1]
    flag = causal and mask is None and segment_ids is None  # the flag alone skips half of the work
    joint = None if flag else _joint_mask(mask, segment_ids, causal, length)
    used = None
    if joint is not None:
        # It wants the mask in full, not one that broadcasts. An added key is hidden, an added query sees all:
        # a row without keys could be a NaN in a gradient.
        joint = jnp.broadcast_to(joint, (batch, length, slots))[:, None]
        joint = _pad_to(_pad_to(joint, 2, axis=3), 2, axis=2, value=True)
    elif slots % 2 and not flag:
        used = jnp.full((batch,), slots, jnp.int32)  # hides the added key without a mask
    # jax has no gradient of it for odd lengths.
    q, k, v = (_pad_to(x, 2, axis=1) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        q, k, v, mask=joint, is_causal=flag, key_value_seq_lengths=used, implementation="cudnn"
    )
    return mixed[:, :length]


def _splash(
    q: Array, k: Array, v: Array, mask: Array | None, ids: Array | None, *, causal: bool, interpret: bool
) -> Array:
    # Imported here because it is experimental in jax, and no other backend should depend on it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del mask  # refused before
    batch, length, num_heads, head_dim = q.shape
    block = splash_block(length)
    # The kernel does not scale. In float32, because head_dim**-0.5 rounded to bfloat16 would be an error
    # that all scores share.
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    q, k, v = (_pad_to(x, block, axis=1).swapaxes(1, 2) for x in (q, k, v))
    padded = q.shape[2]
    # A causal mask hides the added keys, which come last; else they are a segment of their own, with an id
    # that no caller has. They see themselves: a row without keys would divide by 0.
    if ids is None and padded > length and not causal:
        ids = jnp.zeros((batch, length), jnp.int32)
    if ids is not None:
        ids = _pad_to(ids.astype(jnp.int32), block, axis=1, value=jnp.iinfo(jnp.int32).min)
    pattern = (masks.CausalMask if causal else masks.FullMask)((padded, padded))
    # Built where it is used, not cached: its tables become constants of the trace that they are made in.
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([pattern] * num_heads),
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_row(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        return attention(q, k, v, None if ids is None else kernel.SegmentIds(ids, ids))

    return jax.vmap(one_row)(q, k, v, ids).swapaxes(1, 2)[:, :length]


def splash_block(length: int) -> int:
    """Positions per block of the splash kernel, a multiple of 128; a length is padded to whole blocks.

    Blocks of 128 are slow, so a short length is one block and a long one gets the block from 256 up that
    pads it least, the largest if several do. A block of 1024 is too large for the fast memory of a TPU v4.
    """
    if length <= 768:
        return -(-length // 128) * 128
    return min((512, 384, 256), key=lambda block: -(-length // block) * block)


def _pad_to(x: Array, multiple: int, *, axis: int, value: int = 0) -> Array:
    """Lengthen one axis at its end to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, missing if at == axis else 0) for at in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


class Backend(NamedTuple):
    """One way to run attention, and what it can take."""

    run: Callable[..., Array]
    fused: bool = True  # one kernel per device, under shard_map where there is a mesh
    platform: str | None = None  # None for any
    dtypes: tuple[str, ...] = ()  # () for any
    max_head_dim: float = math.inf
    free_mask: bool = True  # takes any mask, and T other than S


BACKENDS = {
    "xla": Backend(_xla, fused=False),
    "cudnn": Backend(_cudnn, platform="gpu", dtypes=("bfloat16", "float16"), max_head_dim=128),
    "splash": Backend(
        partial(_splash, interpret=False), platform="tpu", dtypes=("bfloat16", "float32"), free_mask=False
    ),
    "splash-interpret": Backend(
        partial(_splash, interpret=True), dtypes=("bfloat16", "float32"), free_mask=False
    ),
}
BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"


def _check_lengths(q: Array, k: Array, causal: bool, segment_ids: Array | None) -> None:
    (batch, length, num_heads, _), (slots, num_kv_heads) = q.shape, k.shape[1:3]
    if num_heads % num_kv_heads:
        raise ValueError(f"attention: {num_heads} heads are no multiple of the {num_kv_heads} kv heads")
    if (causal or segment_ids is not None) and length != slots:
        which = "causal" if causal else "segment_ids"
        raise ValueError(
            f"attention: {which} needs as many queries as keys, not {length} and {slots}: use mask"
        )
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"attention: segment_ids is {segment_ids.shape}, not {(batch, length)}, as q has it")


def _check_fused(name: str, q: Array, k: Array, v: Array, mask: Array | None) -> None:
    """Refuse what the backend would fail at with a message of its own, or on another device alone."""
    (batch, length, num_heads, head_dim), (slots, num_kv_heads) = q.shape, k.shape[1:3]
    chosen, platform, axes = BACKENDS[name], _platform(), _mesh_axes()
    at = f"attention backend {name!r}"
    if chosen.platform not in (None, platform):
        kind = {"gpu": "a GPU", "tpu": "a TPU"}[str(chosen.platform)]
        raise ValueError(
            f"{at} needs {kind}, not {platform}: use 'xla', or compile under jax.set_mesh of {kind}'s mesh"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{at} needs q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}: cast them"
        )
    if q.dtype.name not in chosen.dtypes:
        raise ValueError(
            f"{at} needs {' or '.join(chosen.dtypes)}, not {q.dtype}: cast q, k and v, or use 'xla'"
        )
    if head_dim % 8 or head_dim > chosen.max_head_dim:
        limit = "" if chosen.max_head_dim == math.inf else f" up to {chosen.max_head_dim}"
        raise ValueError(f"{at} needs a head_dim that is a multiple of 8{limit}, not {head_dim}: use 'xla'")
    if not chosen.free_mask and mask is not None:
        raise ValueError(f"{at} takes no mask: use causal and segment_ids, or 'xla'")
    if not chosen.free_mask and length != slots:
        raise ValueError(f"{at} needs as many queries as keys, not {length} and {slots}: use 'xla'")
    shards = math.prod(axes.get(axis, 1) for axis in BATCH_AXES)
    if batch % shards:
        raise ValueError(f"{at}: a batch of {batch} does not divide over data*fsdp={shards}: use a multiple")
    tensor = axes.get(HEAD_AXIS, 1)
    for count, which in ((num_heads, "heads"), (num_kv_heads, "kv heads")):
        if count % tensor:
            raise ValueError(
                f"{at}: {count} {which} do not divide over tensor={tensor}: use a smaller tensor axis"
            )


def _mesh_axes() -> dict[str, int]:
    """Axes of the mesh in force that are still to be split over, with their sizes; {} without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def _platform() -> str:
    """`cpu`, `gpu` or `tpu`: that of the mesh in force, which may be one that only is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    # By its kind ("TPU v5 lite", "NVIDIA H200", "cpu"): jax 0.10.0 does not keep the platform.
    kind = device.device_kind.lower()
    return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"


def split_rows(x: Array) -> Array:
    """Keep the rows of [B, ...] split over `data` and `fsdp`, and nothing else split, under `jax.set_mesh`.

    Without this the compiler may choose to split activations as the parameters are, with the whole batch on
    every device; or, worse, XLA (jax 0.10 on CPU) has moved rows to the wrong device between two products
    whose weights were split over `fsdp` too. A batch that does not divide is left to the compiler.
    """
    axes = _mesh_axes()
    over = tuple(name for name in BATCH_AXES if name in axes)
    if not over or x.shape[0] % math.prod(axes[name] for name in over):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(over, *(None,) * (x.ndim - 1)))


def split_lookup(x: Array) -> Array:
    """Keep [B, T, D], looked up in a table that is split over `fsdp` by D, split by D until it is moved.

    Rows are split over `data` and `fsdp` next (`split_rows`). On a mesh with both, XLA (jax 0.10) finds no
    way from one to the other but the whole batch on every device, and adds up the table's gradient whole.
    """
    axes = _mesh_axes()
    rows, width = axes.get("data", 1), axes.get("fsdp", 1)
    if not {"data", "fsdp"} & axes.keys() or x.shape[0] % rows or x.shape[-1] % width:
        return x
    where = ("data" if "data" in axes else None, *(None,) * (x.ndim - 2), "fsdp" if "fsdp" in axes else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*where))


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding, rotate-half convention (pairs i, i + D/2), angles in float32.

    Args:
      x: [B, T, H, D] queries or keys.
      positions: [B, T] int32.
      theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
