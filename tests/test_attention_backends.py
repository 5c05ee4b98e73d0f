"""Every backend of `attend` against the plain one, and the line that refuses what a backend cannot do."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from vlmscale import attention
from vlmscale.attention import BACKENDS, attend, attention_weights, splash_block


def draw(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def packed(batch: int, length: int) -> np.ndarray:
    """Rows of segments 1, 2 and then padding, with bounds that differ from row to row and miss any block."""
    place, row = np.arange(length), np.arange(batch)[:, None]
    return np.where(place < length // 3 + row, 1, np.where(place < length - 9 - row, 2, 0)).astype(np.int32)


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh((data, fsdp, tensor), names, (AxisType.Auto,) * 3, devices=devices)


def test_causal_and_segments_are_the_masks_they_stand_for() -> None:
    q, k, v = draw(2, 24, 4, 2, 8)
    ids = packed(2, 24)
    inside = ids[:, :, None] == ids[:, None, :]
    triangle = np.broadcast_to(np.tril(np.ones((24, 24), bool)), inside.shape)
    both = inside & triangle
    some = np.random.default_rng(1).random(inside.shape) < 0.5
    for given, mask in [
        ({"causal": True}, triangle),
        ({"segment_ids": ids}, inside),
        ({"causal": True, "segment_ids": ids}, both),
        ({"causal": True, "segment_ids": ids, "mask": some}, both & some),
    ]:
        np.testing.assert_array_equal(attend(q, k, v, **given), attend(q, k, v, mask))
    assert np.abs(attend(q, k, v, triangle) - attend(q, k, v, inside)).max() > 0.1


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_weights_are_what_attend_mixes_with(heads: int, kv_heads: int) -> None:
    q, k, v = draw(2, 5, heads, kv_heads, 8)
    mask = np.random.default_rng(1).random((2, 5, 5)) < 0.5
    mask[0, 1] = False
    for visible in (None, mask):
        weights = attention_weights(q, k, visible)
        assert weights.shape == (2, heads, 5, 5)
        assert weights.dtype == jnp.float32
        mixed = np.einsum("bhts,bshd->bthd", weights, np.repeat(v, heads // kv_heads, axis=2))
        np.testing.assert_allclose(mixed, attend(q, k, v, visible), atol=1e-6)
    seen = np.broadcast_to(mask[:, None], weights.shape)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not np.asarray(weights)[~seen & seen.any(-1, keepdims=True)].any()
    np.testing.assert_allclose(weights[0, :, 1], 1 / 5, atol=1e-6)


# Not every combination, for the time: each length, width, head count, pattern and id meets the others.
@pytest.mark.parametrize(
    "length, heads, kv_heads, head_dim, causal, segments",
    [
        (128, 2, 2, 64, True, False),
        (200, 4, 2, 128, False, False),
        (200, 4, 1, 72, True, True),
        (128, 2, 1, 72, False, True),
        (200, 2, 2, 64, False, True),
        (800, 2, 1, 128, True, False),
    ],
)
def test_splash_equals_xla(
    length: int, heads: int, kv_heads: int, head_dim: int, causal: bool, segments: bool
) -> None:
    q, k, v = draw(2, length, heads, kv_heads, head_dim)
    given: dict[str, Any] = {"causal": causal, "segment_ids": packed(2, length) if segments else None}
    plain = attend(q, k, v, **given)
    splash = attend(q, k, v, **given, backend="splash-interpret")
    assert splash.shape == plain.shape
    np.testing.assert_allclose(splash, plain, atol=1e-5)


@pytest.mark.parametrize("causal, segments", [(True, True), (False, False)])
def test_gradient_of_splash_equals_that_of_xla(causal: bool, segments: bool) -> None:
    inputs = draw(2, 200, 4, 2, 72)
    ids = packed(2, 200) if segments else None
    toward = np.random.default_rng(2).standard_normal(inputs[0].shape).astype(np.float32)

    def gradient(backend: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return (attend(q, k, v, causal=causal, segment_ids=ids, backend=backend) * toward).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

    for splash, plain in zip(gradient("splash-interpret"), gradient("xla"), strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(splash, plain, atol=3e-5)


def test_splash_in_bfloat16_returns_bfloat16() -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(1, 128, 2, 1, 72))
    splash = attend(q, k, v, causal=True, backend="splash-interpret")
    assert splash.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True)
    np.testing.assert_allclose(splash.astype(jnp.float32), exact, atol=2e-2)


@pytest.mark.parametrize("backend", ["xla", "splash-interpret"])
def test_segments_cannot_see_each_other(backend: str) -> None:
    q, k, v = draw(1, 140, 2, 1, 64)
    ids = np.repeat(np.array([[3, 9, 0]], np.int32), [60, 70, 10], axis=1)
    before = np.asarray(attend(q, k, v, segment_ids=ids, backend=backend))
    for x in (k, v):
        x[:, ids[0] == 9] += 5
    after = np.asarray(attend(q, k, v, segment_ids=ids, backend=backend))
    np.testing.assert_array_equal(after[:, ids[0] != 9], before[:, ids[0] != 9])
    assert np.abs(after - before)[:, ids[0] == 9].min() > 1


def test_blocks_of_splash() -> None:
    lengths = (1, 128, 576, 768, 769, 1024, 1100, 1408, 2048, 4097)
    assert [splash_block(length) for length in lengths] == [128, 128, 640, 768, 512, 512, 384, 512, 512, 384]


@pytest.mark.parametrize("segments", [True, False])
def test_splash_on_a_mesh_equals_xla(segments: bool) -> None:
    q, k, v = draw(8, 200, 4, 2, 64)
    ids = packed(8, 200) if segments else None
    plain = attend(q, k, v, causal=segments, segment_ids=ids)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        inputs = [jax.device_put(x, jax.P(("data", "fsdp"), None, "tensor")) for x in (q, k, v)]
        splash = jax.jit(
            lambda q, k, v: attend(q, k, v, causal=segments, segment_ids=ids, backend="splash-interpret")
        )(*inputs)
    assert splash.addressable_shards[0].data.shape == (2, 200, 2, 64)
    np.testing.assert_allclose(splash, plain, atol=1e-5)


def test_splash_on_a_mesh_without_some_axes_and_inside_a_shard_map() -> None:
    q, k, v = draw(4, 128, 2, 2, 64)
    plain = attend(q, k, v, causal=True)

    def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, causal=True, backend="splash-interpret")

    with jax.set_mesh(
        jax.make_mesh((2, 2), ("data", "other"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    ):
        np.testing.assert_allclose(jax.jit(splash)(q, k, v), plain, atol=1e-5)
        rows = jax.P("data")
        inside = jax.shard_map(splash, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
        np.testing.assert_allclose(jax.jit(inside)(q, k, v), plain, atol=1e-5)


def refusal(*shape: int, slots: int | None = None, dtype: Any = jnp.float32, **given: Any) -> str:
    """The line that `attend` refuses these [B, T, H, K, D] with; found by shapes alone, so nothing runs."""
    batch, length, heads, kv_heads, head_dim = shape
    q = jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, slots or length, kv_heads, head_dim), dtype)
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(lambda q, k, v: attend(q, k, v, **given), q, k, k)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PLAIN = (2, 8, 4, 2, 64)
IDS = np.ones((2, 8), np.int32)
MASK = np.ones((2, 8, 8), bool)


@pytest.mark.parametrize(
    "shape, given, line",
    [
        (PLAIN, {"backend": "flash"}, "'flash' is unknown: use one of xla, cudnn, splash, splash-interpret"),
        ((2, 8, 4, 3, 64), {}, "4 heads are no multiple of the 3 kv heads"),
        (PLAIN, {"causal": True, "slots": 9}, "causal needs as many queries as keys, not 8 and 9: use mask"),
        (PLAIN, {"segment_ids": IDS, "slots": 9}, "segment_ids needs as many queries as keys, not 8 and 9"),
        (PLAIN, {"segment_ids": IDS[:, :5]}, "segment_ids is (2, 5), not (2, 8)"),
        (PLAIN, {"backend": "cudnn"}, "'cudnn' needs a GPU, not cpu: use 'xla'"),
        (PLAIN, {"backend": "splash"}, "'splash' needs a TPU, not cpu: use 'xla'"),
        (PLAIN, {"backend": "splash-interpret", "mask": MASK}, "takes no mask: use causal and segment_ids"),
        (
            PLAIN,
            {"backend": "splash-interpret", "slots": 9},
            "as many queries as keys, not 8 and 9: use 'xla'",
        ),
        ((2, 8, 4, 2, 12), {"backend": "splash-interpret"}, "a multiple of 8, not 12: use 'xla'"),
        (PLAIN, {"backend": "splash-interpret", "dtype": jnp.float16}, "bfloat16 or float32, not float16"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    shape: tuple[int, ...], given: dict[str, Any], line: str
) -> None:
    assert line in refusal(*shape, **given)


@pytest.mark.parametrize(
    "shape, dtype, line",
    [
        (PLAIN, jnp.float32, "needs bfloat16 or float16, not float32: cast q, k and v, or use 'xla'"),
        ((2, 8, 4, 2, 60), jnp.bfloat16, "a multiple of 8 up to 128, not 60: use 'xla'"),
        ((2, 8, 4, 2, 136), jnp.bfloat16, "a multiple of 8 up to 128, not 136: use 'xla'"),
    ],
)
def test_what_cudnn_cannot_do_on_a_gpu_is_refused(
    shape: tuple[int, ...], dtype: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_platform", lambda: "gpu")
    assert line in refusal(*shape, dtype=dtype, backend="cudnn")


@pytest.mark.parametrize(
    "kind, name", [("TPU v5 lite", "tpu"), ("TPU7x", "tpu"), ("NVIDIA H200", "gpu"), ("cpu", "cpu")]
)
def test_the_platform_is_that_of_the_mesh(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(device_kind=kind))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert attention._platform() == name


def test_mixed_dtypes_are_refused_by_fused_backends() -> None:
    q, k, v = draw(1, 128, 2, 2, 64)
    line = "needs q, k and v of one dtype, not float32, float32 and bfloat16: cast them"
    with pytest.raises(ValueError, match=re.escape(line)):
        attend(q, k, jnp.asarray(v, jnp.bfloat16), backend="splash-interpret")


@pytest.mark.parametrize(
    "shape, line",
    [
        ((6, 8, 4, 2, 64), "a batch of 6 does not divide over data*fsdp=4: use a multiple"),
        ((4, 8, 3, 1, 64), "3 heads do not divide over tensor=2: use a smaller tensor axis"),
        ((4, 8, 4, 1, 64), "1 kv heads do not divide over tensor=2: use a smaller tensor axis"),
    ],
)
def test_what_does_not_divide_over_the_mesh_is_refused(shape: tuple[int, ...], line: str) -> None:
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert line in refusal(*shape, backend="splash-interpret")
        assert "needs a TPU, not cpu" in refusal(*shape, backend="splash")


@pytest.mark.parametrize(
    "length, causal, segments", [(7, True, True), (7, True, False), (7, False, False), (8, False, False)]
)
def test_cudnn_is_given_what_it_needs(
    length: int, causal: bool, segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call of the kernel, answered by jax's plain implementation where there is no GPU."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(2, length, 4, 2, 64))
    given: dict[str, Any] = {"causal": causal, "segment_ids": packed(2, length) if segments else None}
    plain = jax.nn.dot_product_attention
    calls = []

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str, **rest: Any) -> jax.Array:
        calls.append((implementation, q.shape[1], k.shape[1], rest))
        return plain(q, k, v, implementation="xla", **rest)

    monkeypatch.setattr(attention, "_platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    fused = attend(q, k, v, **given, backend="cudnn")
    assert fused.shape == q.shape
    np.testing.assert_allclose(
        fused.astype(jnp.float32), attend(q, k, v, **given).astype(jnp.float32), atol=2e-2
    )
    [(implementation, queries, keys, rest)] = calls
    assert (implementation, queries, keys) == ("cudnn", 8, 8)  # jax has no gradient for odd lengths
    assert rest["is_causal"] == (causal and not segments)
    if segments:
        assert rest["mask"].shape == (2, 1, 8, 8)
        assert rest["mask"].any(-1).all()
    else:
        assert rest["mask"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("causal, segments", [(True, False), (True, True), (False, True), (False, False)])
def test_cudnn_equals_xla(head_dim: int, causal: bool, segments: bool) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU: run this on one with JAX_PLATFORMS=cuda")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(2, 201, 4, 2, head_dim))
    ids = jnp.asarray(packed(2, 201)) if segments else None

    def mixed(backend: str, dtype: Any) -> Any:
        def loss(*inputs: jax.Array) -> Any:
            out = attend(*inputs, causal=causal, segment_ids=ids, backend=backend)
            return (out.astype(jnp.float32) ** 2).sum(), out

        inputs = (x.astype(dtype) for x in (q, k, v))
        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    for fused, exact in zip(mixed("cudnn", jnp.bfloat16), mixed("xla", jnp.float32), strict=True):
        np.testing.assert_allclose(fused, exact, atol=2e-2 * np.abs(exact).max())


def test_every_backend_is_in_the_table_of_the_module() -> None:
    assert re.findall(r"^  (\S+)  ", attention.__doc__ or "", re.M) == list(BACKENDS)
