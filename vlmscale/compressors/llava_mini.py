"""LLaVA-Mini (arXiv 2501.03895): one token an image, and text that has seen all patches before the LLM."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features, FusionText
from vlmscale.compressors.mlp import Projector
from vlmscale.compressors.multihead import MultiheadAttention
from vlmscale.compressors.positions import grid_side, resize_grid, sincos_positions
from vlmscale.layers import LayerNorm, named
from vlmscale.models.decoder import Block, Rows
from vlmscale.models.sizes import DecoderSize

_NORM_EPS = 1e-5  # torch's default, unlike that of the other query-based methods


class LLaVAMini(nn.Module):
    """Query compressor, shared projector, modality pre-fusion.

    Follows the released code. Learned queries compress the patches at the tower's width; one `mlp2x_gelu`
    brings both to the LLM's width (the paper projects before it compresses). Then `fusion_layers` layers of
    the LLM's kind, with weights of their own, run over [patches, compressed tokens, text] in causal order,
    and what comes out is what the LLM reads: text that has seen the patches, and the compressed tokens.
    Those too have gone through pre-fusion, where they see all patches once more; the paper takes the text
    alone from there. The text stands behind the image, so no visual token depends on it.

    Text without an image is fused in the released code together with an all-zero image; here it sees none.
    Without a `decoder_size` there is no pre-fusion: the tokens are those of compressor and projector.
    """

    visual_tokens: int
    llm_width: int
    fusion_layers: int = 4
    num_heads: int = 8
    decoder_size: DecoderSize | None = None
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Declare the parts."""
        self.compressor = QueryCompressor(self.visual_tokens, self.num_heads, self.dtype)
        self.projector = Projector(self.visual_tokens, self.llm_width, self.dtype)
        if self.decoder_size is not None:
            sizes = [self.decoder_size] * self.fusion_layers
            self.fusion = [Block(size, self.dtype, self.attention) for size in sizes]

    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in the order of the queries, the same as with any text, and validity [N, V]."""
        del text_query
        if self.decoder_size is None:
            tokens = self._project(features)[1]
            return tokens, jnp.ones(tokens.shape[:2], bool)
        images, none = features.selected.shape[0], jnp.zeros((features.selected.shape[0], 0), jnp.int32)
        embeddings = jnp.zeros((images, 0, self.llm_width), self.dtype)
        text = FusionText(embeddings, none.astype(bool), none, jnp.ones((images, 1), jnp.int32))
        return self.fuse(features, text)[:2]

    def fuse(self, features: Features, text: FusionText) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Visual tokens and fused text.

        A row's layers see all its images' patches, all its compressed tokens, its text, in this order; each
        sees what comes before it in its own segment, and rotary positions count from 0 in each. The text is
        read without a gradient to its embeddings, as in the released code, which therefore does not train
        them.

        Args:
          features: of N = B * I images; those that a row does not have may hold anything.
          text: the rows.

        Returns:
          Tokens [N, V, D], their validity [N, V] (False for an image that is not there), and the text's
          embeddings [B, T, D]: fused where it is readable, elsewhere as given, also without a gradient.

        Raises:
          ValueError: there is no `decoder_size`.
        """
        if self.decoder_size is None:
            raise ValueError("LLaVA-Mini's pre-fusion needs the LLM's size: give decoder_size")
        patches, compressed = self._project(features)
        rows, images = text.image_segments.shape
        raw = jax.lax.stop_gradient(text.embeddings)
        text_segments = jnp.where(text.readable, text.segment_ids, 0)
        parts, segments = [], []
        for visual in (patches, compressed):
            parts.append(visual.reshape(rows, images * visual.shape[1], self.llm_width))
            segments.append(jnp.repeat(text.image_segments, visual.shape[1], axis=1))
        x = jnp.concatenate([*parts, raw.astype(self.dtype)], axis=1)
        segment_ids = jnp.concatenate([*segments, text_segments], axis=1)
        positions = _fusion_positions(segment_ids)
        for layer in self.fusion:
            x, _ = layer.prefill(x, Rows(positions, segment_ids))
        before, behind = parts[0].shape[1], parts[0].shape[1] + parts[1].shape[1]
        tokens = x[:, before:behind].reshape(compressed.shape)
        fused = jnp.where((text_segments > 0)[:, :, None], x[:, behind:].astype(raw.dtype), raw)
        valid = jnp.broadcast_to(text.image_segments.reshape(-1, 1) > 0, tokens.shape[:2])
        return tokens, valid, fused

    def _project(self, features: Features) -> tuple[jax.Array, jax.Array]:
        """Patches [N, P, D] and compressed tokens [N, V, D] behind the one projector."""
        x = features.selected.astype(self.dtype)
        both = jnp.concatenate([x, self.compressor(x)], axis=1)
        tokens, _ = self.projector(Features(both), None)
        return tokens[:, : x.shape[1]], tokens[:, x.shape[1] :]


class QueryCompressor(nn.Module):
    """One cross-attention from learned queries to the patches, at the tower's width, and nothing around it.

    Queries and keys get fixed sin-cos positions, the keys those of the g x g queries resized to the patches'
    grid. A single query's are one vector, so that with one token all keys get the same: it is blind to place.
    """

    visual_tokens: int
    num_heads: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, C] to [N, V, C].

        Raises:
          ValueError: V is no square, or the heads do not divide C or 4 does not.
        """
        width = x.shape[-1]
        table = sincos_positions(grid_side(self.visual_tokens), width)
        init = named(nn.initializers.normal(0.02), (None, "embed"))
        queries = self.param("queries", init, (self.visual_tokens, width), jnp.float32)
        queries = LayerNorm(_NORM_EPS, self.dtype, name="q_norm")(queries) + table.astype(self.dtype)
        values = LayerNorm(_NORM_EPS, self.dtype, name="kv_norm")(x)
        keys = values + resize_grid(table, grid_side(x.shape[1])).astype(self.dtype)
        queries = jnp.broadcast_to(queries, (x.shape[0], *queries.shape))
        return MultiheadAttention(self.num_heads, self.dtype, name="attention")(queries, keys, values)


def _fusion_positions(segment_ids: jax.Array) -> jax.Array:
    """Rotary positions [B, L]: the rank in the own segment; 1 in segment 0, which nothing reads."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    rank = jnp.sum(jnp.tril(same, -1), axis=2, dtype=jnp.int32)
    return jnp.where(segment_ids > 0, rank, 1)
