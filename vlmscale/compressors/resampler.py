"""Resamplers: learned queries that read all patches. Two networks go by that name, hence `kind`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import attend, split_rows
from vlmscale.compressors.features import Features
from vlmscale.compressors.multihead import MultiheadAttention, small_normal, torch_linear
from vlmscale.compressors.positions import grid_side, resize_grid, sincos_positions
from vlmscale.layers import LayerNorm, dense, named

_QWEN_EPS, _PERCEIVER_EPS = 1e-6, 1e-5  # the published code's each; the second is torch's default
_QWEN_HEAD = 128  # width of a head of Qwen-VL's
_PERCEIVER_HEADS = 8


class Resampler(nn.Module):
    """Learned queries that attend to the patches; what they read are the tokens.

    "qwen" is Qwen-VL's (arXiv 2308.12966): one cross-attention at the LLM's width, without self-attention,
    feed-forward layer or residual. Queries and keys get fixed sin-cos positions, those of the keys resized
    from the g x g grid of the queries to that of the patches; values have none. Its heads are 128 wide:
    `num_heads` is the largest divisor of D that is at most D / 128, and 1 below that.

    "perceiver" is Flamingo's (arXiv 2204.14198), in the form of its open reimplementations: six layers, each
    with attention from the latents to patches and latents together and a feed-forward layer, 8 heads of 64,
    nothing with a bias but the norms. It has no positions in the image: it takes the tower's word for them,
    and its time embedding would be one constant for a single image. Flamingo's latents are as wide as the
    tower and the LLM reads them through cross-attention; here they are tokens, so they have the LLM's width,
    and one linear layer, `media`, brings the patches there first. That makes it large: 860M parameters for an
    LLM 4096 wide, ten times those of "qwen".
    """

    visual_tokens: int
    llm_width: int
    kind: str = "qwen"
    num_heads: int = 0  # 0 for the published rule
    head_dim: int = 64  # of "perceiver" alone
    depth: int = 6  # of "perceiver" alone
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in the order of the queries and their validity [N, V]; the text is not used.

        Raises:
          ValueError: an unknown kind; with "qwen" a V that is no square or a D that is no multiple of 4.
        """
        del text_query
        kinds = {"qwen": self._qwen, "perceiver": self._perceiver}
        if self.kind not in kinds:
            raise ValueError(f"unknown resampler {self.kind!r}: use {' or '.join(kinds)}")
        tokens = kinds[self.kind](features.selected.astype(self.dtype))
        return tokens, jnp.ones(tokens.shape[:2], bool)

    def _queries(self, name: str, init: nn.initializers.Initializer) -> jax.Array:
        shape = (self.visual_tokens, self.llm_width)
        return self.param(name, named(init, (None, "embed")), shape, jnp.float32)

    def _qwen(self, x: jax.Array) -> jax.Array:
        width, side = self.llm_width, grid_side(x.shape[1])
        table = sincos_positions(grid_side(self.visual_tokens), width)
        if x.shape[-1] != width:
            axes = ("embed", "mlp")
            x = dense(width, "kv_proj", self.dtype, axes, use_bias=False, kernel_init=small_normal)(x)
        x = self._norm("kv_norm")(x)
        queries = self._norm("q_norm")(self._queries("queries", small_normal)) + table.astype(self.dtype)
        queries = jnp.broadcast_to(queries, (x.shape[0], *queries.shape))
        heads = self.num_heads or qwen_heads(width)
        attention = MultiheadAttention(heads, self.dtype, small_normal, name="attention")
        out = attention(queries, x + resize_grid(table, side).astype(self.dtype), x)
        init, axes = nn.initializers.normal(width**-0.5), ("mlp", "embed")
        project = dense(width, "proj", self.dtype, axes, use_bias=False, kernel_init=init)
        return project(self._norm("post_norm")(out))

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(_QWEN_EPS, self.dtype, name=name)

    def _perceiver(self, x: jax.Array) -> jax.Array:
        media = dense(self.llm_width, "media", self.dtype, ("embed", "mlp"))(x)
        latents = self._queries("latents", nn.initializers.normal(1.0)).astype(self.dtype)
        media, latents = (
            split_rows(media),
            split_rows(jnp.broadcast_to(latents, (x.shape[0], *latents.shape))),
        )
        heads = self.num_heads or _PERCEIVER_HEADS
        for index in range(self.depth):
            latents = PerceiverLayer(heads, self.head_dim, self.dtype, name=f"layer_{index}")(media, latents)
        return LayerNorm(_PERCEIVER_EPS, self.dtype, name="final_norm")(latents)


class PerceiverLayer(nn.Module):
    """Attention from the latents to media and latents together, then a feed-forward layer; both residual."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, media: jax.Array, latents: jax.Array) -> jax.Array:
        """Media [N, P, D] and latents [N, V, D] to latents [N, V, D]."""
        width, inner = latents.shape[-1], self.num_heads * self.head_dim
        normed = split_rows(self._norm("latent_norm")(latents))
        seen = split_rows(jnp.concatenate([self._norm("media_norm")(media), normed], axis=1))

        def heads(x: jax.Array, name: str) -> jax.Array:
            y = self._dense(inner, name, ("embed", "heads"))(x)
            return y.reshape(*x.shape[:2], self.num_heads, self.head_dim)

        mixed = attend(heads(normed, "q"), heads(seen, "k"), heads(seen, "v"))
        mixed = split_rows(mixed.reshape(*latents.shape[:2], inner))
        latents = split_rows(latents + self._dense(width, "o", ("heads", "embed"))(mixed))
        h = self._dense(4 * width, "up", ("embed", "mlp"))(self._norm("mlp_norm")(latents))
        h = split_rows(self._dense(width, "down", ("mlp", "embed"))(nn.gelu(h, approximate=False)))
        return split_rows(latents + h)

    def _dense(self, features: int, name: str, axes: tuple[str, str]) -> nn.Dense:
        return dense(features, name, self.dtype, axes, use_bias=False, kernel_init=torch_linear)

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(_PERCEIVER_EPS, self.dtype, name=name)


def qwen_heads(width: int) -> int:
    """Heads of Qwen-VL's resampler: the largest divisor of the width that is at most width / 128, or 1."""
    return next(heads for heads in range(max(width // _QWEN_HEAD, 1), 0, -1) if width % heads == 0)
