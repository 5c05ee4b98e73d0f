"""The decoder LLM: Llama, Qwen1.5/2.5, Qwen3, to train (scanned layers) and to generate (KV cache)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.attention import attend, attention_weights, rotate, split_lookup, split_rows
from vlmscale.layers import Axes, Linear, RMSNorm, named
from vlmscale.models.cuts import Heads, Prefix, Reduction, Soft, Soften
from vlmscale.models.ranking import received
from vlmscale.models.sizes import DecoderSize

LAYOUTS = ("scan", "loop")
# What the backward pass recomputes. "block": everything in a layer, which on CPU is also the fastest, since
# the scan would copy each kept intermediate into a stacked array. "dots": all but the matrix products.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


class KVCache(NamedTuple):
    """Keys and values of all layers, and which slots hold a token that may be seen.

    Layers between two cuts have one length S; behind a cut it is smaller by what no row of the batch kept.
    """

    k: tuple[jax.Array, ...]  # a layer each: [B, K, S, D], the order in which attention reads them
    v: tuple[jax.Array, ...]
    seen: tuple[jax.Array, ...]  # [B, S] bool, of the layers in front of the first cut, behind it, and so on
    # [B, S] float32, attention that each slot's token received so far from watched ones: mean over heads,
    # summed over layers. None where nobody watches.
    received: jax.Array | None = None
    kept: tuple[jax.Array, ...] = ()  # [B] int32, visual tokens of each prompt behind each cut

    @property
    def slots(self) -> int:
        """S of prompts that nothing was dropped from."""
        return self.seen[0].shape[1]


class Rows(NamedTuple):
    """What every layer reads of a batch beside its hidden states.

    Attributes:
      positions: [B, T] int32, counted inside each segment.
      segment_ids: [B, T] int32, 0 where there is padding; None for rows of one segment and none.
      mask: [B, T, T] bool, which query may see which key, beside order and segments; None for all.
      soft: of a reducer that trains; None without one.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    mask: jax.Array | None = None
    soft: Soft | None = None


class Block(nn.Module):
    """One pre-norm decoder layer. `soften` is the reducer's, where it trains."""

    size: DecoderSize
    dtype: jnp.dtype
    attention: str = "xla"
    soften: Soften | None = None

    def setup(self) -> None:
        """Declare the parameters."""
        size = self.size
        kv_width, bias = size.num_kv_heads * size.head_dim, size.family == "qwen2"
        # Keeps the variance of the residual stream at 1 for any depth.
        residual = nn.initializers.variance_scaling(0.5 / size.num_layers, "fan_in", "normal")

        def linear(features: int, axes: Axes, use_bias: bool = False, **options: Any) -> Linear:
            return Linear(features, self.dtype, axes, use_bias, **options)

        self.attention_norm = RMSNorm(size.norm_eps)
        self.q = linear(size.num_heads * size.head_dim, ("heads", "embed"), bias)
        self.k = linear(kv_width, ("kv_heads", "embed"), bias)
        self.v = linear(kv_width, ("kv_heads", "embed"), bias)
        self.o = linear(size.width, ("embed", "heads"), weight_init=residual)
        if size.family == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(size.norm_eps), RMSNorm(size.norm_eps)
        self.mlp_norm = RMSNorm(size.norm_eps)
        self.gate = linear(size.mlp_width, ("mlp", "embed"))
        self.up = linear(size.mlp_width, ("mlp", "embed"))
        self.down = linear(size.width, ("embed", "mlp"), weight_init=residual)

    def __call__(
        self, carry: tuple[jax.Array, jax.Array | None], rows: Rows, cut: jax.Array | int
    ) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array | None]:
        """One more layer, as the scan has it.

        Args:
          carry: hidden states [B, T, D], and of a reducer that trains the logarithm [B, T] of how much of
            each token is left.
          rows: the batch.
          cut: number of the reducer's cut behind the layer; -1 for none.

        Returns:
          The same behind the layer, and once more how much is left.
        """
        x, left = carry
        x, (q, k, _) = self.prefill(x, rows, left)
        if rows.soft is not None and left is not None:
            assert self.soften is not None
            soften, soft, before = self.soften, rows.soft, left
            left = jax.lax.cond(cut >= 0, lambda: soften(cut, Heads(q, k), soft, before), lambda: before)
        return (x, left), left

    def prefill(
        self, x: jax.Array, rows: Rows, bias: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """x [B, T, D] behind one more layer; causal inside each segment.

        Returns:
          [B, T, D], and the rotated queries [B, T, H, D] and keys, and the values, [B, T, K, D].
        """
        q, k, v = self._heads(x, rows.positions)
        mixed = attend(
            q, k, v, rows.mask, causal=True, segment_ids=rows.segment_ids, bias=bias, backend=self.attention
        )
        return self._finish(x, mixed), (q, k, v)

    def extend(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        mask: jax.Array,
        slot: jax.Array,
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """Keys and values of x [B, T, D] are written at `slot`; all slots are attended under `mask`.

        Returns:
          [B, T, D], the queries [B, T, H, D], and the longer cache.
        """
        q, *new = self._heads(x, positions)
        k, v = (
            jax.lax.dynamic_update_slice(old, heads.swapaxes(1, 2).astype(old.dtype), (0, 0, slot, 0))
            for old, heads in zip(cache, new, strict=True)
        )
        mixed = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        return self._finish(x, mixed), q, (k, v)

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, H, D] and keys, and values, [B, T, K, D]."""
        size = self.size
        h = self.attention_norm(x)
        q, k, v = (layer(h).reshape(*x.shape[:2], -1, size.head_dim) for layer in (self.q, self.k, self.v))
        if size.family == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, positions, size.rope_theta), rotate(k, positions, size.rope_theta), v

    def _finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = split_rows(x + self.o(mixed.reshape(*x.shape[:2], -1)))
        h = self.mlp_norm(x)
        return split_rows(x + self.down(nn.silu(self.gate(h)) * self.up(h)))


class Decoder(nn.Module):
    """Embeddings, layers, final norm, head.

    Positions and segments are explicit, so that packed rows, padded rows and cached decoding are one
    code path. Two layouts of the same parameters: "scan" stacks those of all layers under `layers` and
    compiles one layer, for training; "loop" has `layers_0`, `layers_1`, ..., which generation needs: a
    scan would copy every weight out of its stack for every token. `unstack` leads from one to the other.
    `attention` is the backend of training and prefill; a cache is always attended to with "xla". `cuts` are
    the layers in front of which a reducer drops visual tokens (`vlmscale.models.cuts`), `soften` is what one
    does there in training instead.
    """

    size: DecoderSize
    vocab_size: int
    dtype: jnp.dtype = jnp.float32
    layout: str = "scan"
    attention: str = "xla"
    remat: str = "block"
    cuts: tuple[int, ...] = ()
    soften: Soften | None = None

    def setup(self) -> None:
        """Declare the parameters."""
        if self.remat not in REMAT:
            raise ValueError(f"decoder remat {self.remat}: one of {', '.join(REMAT)}")
        table = (self.vocab_size, self.size.width)
        init = named(nn.initializers.normal(self.size.width**-0.5), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, table, jnp.float32)
        if not self.size.tied_embeddings:
            self.head = self.param("head", init, table, jnp.float32)
        if self.layout == "scan":
            scan = nn.scan(
                nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat]),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=self.size.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = scan(self.size, self.dtype, self.attention, self.soften)
        elif self.layout == "loop":
            self.layers = [
                Block(self.size, self.dtype, self.attention, self.soften) for _ in range(self.size.num_layers)
            ]
        else:
            raise ValueError(f"decoder layout {self.layout}: one of {', '.join(LAYOUTS)}")
        self.final_norm = RMSNorm(self.size.norm_eps)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] to embeddings [B, T, D]."""
        return split_rows(split_lookup(self.embedding[tokens].astype(self.dtype)))

    def __call__(
        self, embeddings: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Final hidden states, after the last norm.

        Args:
          embeddings: [B, T, D].
          positions: [B, T] int32, counted inside each segment.
          segment_ids: [B, T] int32, 0 where there is padding; None for rows of one segment and none.

        Returns:
          [B, T, D].
        """
        return self.run(embeddings, Rows(positions, segment_ids))[0]

    def run(self, embeddings: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array | None]:
        """As `__call__`, with all that layers may read.

        Args:
          embeddings: [B, T, D].
          rows: the batch.

        Returns:
          [B, T, D], and of a reducer that trains the logarithm [cuts, B, T] of how much of each token is left
          behind each cut.
        """
        behind = [
            self.cuts.index(layer) if layer in self.cuts else -1
            for layer in range(1, self.size.num_layers + 1)
        ]
        whole = None if rows.soft is None else jnp.zeros(embeddings.shape[:2], jnp.float32)
        carry: tuple[jax.Array, jax.Array | None] = (embeddings, whole)
        if self.layout == "scan":
            (x, _), every = self.layers(carry, rows, jnp.array(behind))
        else:
            each = []
            for layer, cut in zip(self.layers, behind, strict=True):
                carry, left = layer(carry, rows, cut)
                each.append(left)
            x, every = carry[0], None if whole is None else jnp.stack(each)
        left = None if every is None else every[np.array(self.cuts) - 1]
        return self.final_norm(x), left

    def hidden_states(
        self, embeddings: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
    ) -> list[jax.Array]:
        """As `__call__`, but all states, in the "loop" layout: entry i < L is the input of layer i.

        The last entry is behind the final norm, as in transformers' `hidden_states`.
        """
        states = [embeddings]
        for layer in self.layers:
            states.append(layer.prefill(states[-1], Rows(positions, segment_ids))[0])
        return [*states[:-1], self.final_norm(states[-1])]

    def prefill(
        self,
        embeddings: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        slots: int,
        holes: bool = False,
        reduction: Reduction | None = None,
        watched: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Run whole prompts and keep their keys and values. Needs the "loop" layout.

        Args:
          embeddings: [B, T, D] of right-padded prompts.
          positions: [B, T] int32.
          valid: [B, T] bool; False marks padding, which no other token sees.
          slots: length of the cache, at least T; the prompt takes the first T.
          holes: whether there may be padding inside the prompts, too.
          reduction: what goes at the `cuts`; None for nothing.
          watched: [B, T] bool, tokens whose attention is added up in the cache's `received`; not with cuts.
          mask: [B, T, T] bool, as in `Rows`; not with cuts.

        Returns:
          Hidden states [B, T', D] after the final norm, and the cache. T' is what the cuts leave of T.
        """
        free = slots - valid.shape[1]
        visual = jnp.zeros_like(valid) if reduction is None else reduction.visual & valid
        rank = jnp.zeros_like(positions) if reduction is None else reduction.rank
        tokens = Prefix(embeddings, positions, valid, visual, jnp.sum(visual, axis=1), rank)
        seen: list[jax.Array] = [valid]
        kept: list[jax.Array] = []
        keys: list[jax.Array] = []
        values: list[jax.Array] = []
        heads: Heads | None = None
        total = jnp.zeros(valid.shape, jnp.float32)
        for index, layer in enumerate(self.layers):
            if index in self.cuts:
                if reduction is not None:
                    tokens, count = reduction.cut(self.cuts.index(index), tokens, heads)
                    kept.append(count)
                    holes = reduction.form == "masked"
                seen.append(tokens.valid)
            # Padding behind the prompt is hidden by causal order alone.
            segment_ids = tokens.valid.astype(jnp.int32) if holes else None
            x, (q, k, v) = layer.prefill(tokens.x, Rows(tokens.positions, segment_ids, mask))
            tokens, heads = tokens._replace(x=x), Heads(q, k)
            if watched is not None:
                total = received(tokens.valid, heads, watched, itself=True) + total
            for stored, of_layer in ((keys, k), (values, v)):
                stored.append(jnp.pad(of_layer.swapaxes(1, 2), ((0, 0), (0, 0), (0, free), (0, 0))))
        wide = [jnp.pad(part, ((0, 0), (0, free))) for part in (*seen, total)]
        sums = None if watched is None else wide[-1]
        cache = KVCache(tuple(keys), tuple(values), tuple(wide[:-1]), sums, tuple(kept))
        return self.final_norm(tokens.x), cache

    def extend(
        self, embeddings: jax.Array, positions: jax.Array, valid: jax.Array, cache: KVCache, slot: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Run T new tokens behind what the cache holds, usually one. Needs the "loop" layout.

        Args:
          embeddings: [B, T, D] of the new tokens.
          positions: [B, T] int32.
          valid: [B, T] bool; False marks padding, which no later token sees.
          cache: what came before.
          slot: first cache slot to write, the same for all rows, counted as if nothing had been dropped. What
            is not `valid` is not watched either.

        Returns:
          Hidden states [B, T, D] after the final norm, and the longer cache.
        """
        new = jnp.arange(embeddings.shape[1])
        seen, places = [], []
        for part in cache.seen:
            first = slot - (cache.slots - part.shape[1])
            now = jax.lax.dynamic_update_slice(part, valid, (0, first))
            causal = jnp.arange(part.shape[1]) <= first + new[:, None]
            seen.append(now)
            places.append((now[:, None, :] & causal, first))
        x, layers, total = embeddings, [], cache.received
        for index, (layer, *old) in enumerate(zip(self.layers, cache.k, cache.v, strict=True)):
            mask, first = places[sum(cut <= index for cut in self.cuts)]
            x, q, stored = layer.extend(x, (old[0], old[1]), positions, mask, first)
            layers.append(stored)
            if total is not None:
                weights = jnp.mean(attention_weights(q, stored[0].swapaxes(1, 2), mask), axis=1)
                total = total + jnp.einsum("bts,bt->bs", weights, valid)
        k, v = zip(*layers, strict=True)
        return self.final_norm(x), KVCache(k, v, tuple(seen), total, cache.kept)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to float32 logits [..., vocab]."""
        table = self.embedding if self.size.tied_embeddings else self.head
        return jnp.einsum(
            "...d,vd->...v", hidden, table.astype(self.dtype), preferred_element_type=jnp.float32
        )


def head_table(size: DecoderSize, params: dict[str, Any]) -> jax.Array:
    """What makes logits of hidden states, [vocab, D]: the head, or the embedding that it is tied to."""
    table: jax.Array = params["embedding" if size.tied_embeddings else "head"]
    return table


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Decoder parameters of the "scan" layout in the "loop" layout."""
    stacked = params["layers"]
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers)}


def stack(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack`."""
    names = sorted((name for name in params if name.startswith("layers_")), key=lambda name: int(name[7:]))
    rest = {name: value for name, value in params.items() if name not in names}
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return rest | {"layers": layers}
