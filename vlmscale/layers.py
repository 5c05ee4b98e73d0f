"""Layers that say on which logical axes their parameters lie, and how parameters are made from modules.

Axis names stand beside shapes here and nowhere else; `vlmscale.sharding` maps them to the mesh. Inside
`init` a parameter is a box that holds its names; everything else sees plain arrays.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Axes = tuple[str | None, ...]


def init_params(module: nn.Module, key: jax.Array, *inputs: Any, **options: Any) -> dict[str, Any]:
    """Fresh parameters of a module as plain arrays; `inputs` give shapes only."""
    return nn.meta.unbox(module.init(key, *inputs, **options)["params"])


def abstract_params(module: nn.Module, *inputs: Any, **options: Any) -> dict[str, Any]:
    """Shapes, dtypes and logical axes of a module's parameters, nothing computed.

    Returns:
      A tree of `nn.LogicallyPartitioned` boxes around `jax.ShapeDtypeStruct`; `nn.meta.unbox` opens them.
    """

    def make(key: jax.Array, *arrays: Any) -> dict[str, Any]:
        return module.init(key, *arrays, **options)["params"]

    return jax.eval_shape(make, jax.random.key(0), *inputs)


def named(init: Any, axes: Axes) -> Any:
    """An initialiser whose parameter lies on these logical axes."""
    return nn.with_logical_partitioning(init, axes)


def dense(
    features: int,
    name: str,
    dtype: jnp.dtype,
    axes: Axes,
    *,
    use_bias: bool = True,
    kernel_init: Any = nn.linear.default_kernel_init,
) -> nn.Dense:
    """A Dense layer; `axes` are those of its kernel, (in, out)."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=named(kernel_init, axes),
        bias_init=named(nn.initializers.zeros, axes[1:]),
        name=name,
    )


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, computed in float32; the result has the dtype `dtype`."""

    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., C]."""
        scale = self.param("scale", named(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, ("norm",)), (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        scale = self.param("scale", named(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


class Linear(nn.Module):
    """x @ W.T (+ b) with the weight as [out, in], the way checkpoints store it.

    A token decoded on a CPU is a matrix-vector product, which is a third faster in this layout, and reading
    or writing a checkpoint is a plain copy.
    """

    features: int
    dtype: jnp.dtype
    axes: Axes  # of the weight: (out, in)
    use_bias: bool = False
    weight_init: Any = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out]."""

        def init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
            return self.weight_init(key, shape[::-1], dtype).T  # fan-in is read off the first axis

        shape = (self.features, x.shape[-1])
        weight = self.param("weight", named(init, self.axes), shape, jnp.float32).astype(self.dtype)
        y = jax.lax.dot_general(x.astype(self.dtype), weight, (((x.ndim - 1,), (1,)), ((), ())))
        if self.use_bias:
            bias = self.param(
                "bias", named(nn.initializers.zeros, self.axes[:1]), (self.features,), jnp.float32
            )
            y = y + bias.astype(self.dtype)
        return y
