"""torch's `nn.MultiheadAttention`, which most published compressors are built around."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import attend, split_rows
from vlmscale.layers import dense

# torch's trunc_normal_(std=0.02) cuts at -2 and 2, a hundred deviations away: a plain normal.
small_normal = nn.initializers.normal(0.02)
# torch's default for Linear: uniform with bound 1 / sqrt(fan_in).
torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# torch draws the packed [3E, E] projection of q, k and v by Xavier's rule, so its fan is 4E, not 2E.
_packed_xavier = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")


class MultiheadAttention(nn.Module):
    """Attention with one biased projection for each of q, k, v (all of the input's width) and the output."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    output_init: Any = torch_linear

    @nn.compact
    def __call__(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Attend from [N, Q, C] to [N, K, C].

        Args:
          queries: [N, Q, C].
          keys: [N, K, C].
          values: [N, K, C].
          mask: [N, Q, K] bool, True where a query may see a key; None for all.

        Returns:
          [N, Q, C].

        Raises:
          ValueError: the width does not divide into the heads.
        """
        width = queries.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {width}")

        def heads(x: jax.Array, name: str) -> jax.Array:
            y = dense(width, name, self.dtype, ("embed", "heads"), kernel_init=_packed_xavier)(x)
            return y.reshape(*x.shape[:2], self.num_heads, width // self.num_heads)

        mixed = attend(heads(queries, "q"), heads(keys, "k"), heads(values, "v"), mask)
        out = dense(width, "o", self.dtype, ("heads", "embed"), kernel_init=self.output_init)
        return split_rows(out(mixed.reshape(queries.shape)))
