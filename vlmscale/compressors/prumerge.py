"""PruMerge and PruMerge+ (arXiv 2403.15388): patches that stand out, each merged with those like it."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.compressors.mlp import project
from vlmscale.compressors.selection import read, score_field

_EXACT = jax.lax.Precision.HIGHEST  # a TPU would multiply float32 as bfloat16, and select other patches


class PruMerge(nn.Module):
    """Follows the released code, in front of LLaVA's two-layer projector; nothing but that is trained.

    Patches are scored, and some are chosen. To each chosen patch x_i are added the a_j x_j of the 32 other
    patches, chosen ones too, whose keys are most like its own (a is the score, x the patch as it came;
    nothing is normalised). One extra token is the sum of a_j x_j over all that were not chosen, so n chosen
    patches give n + 1 tokens: by descending score, then the extra one.

    The released score is one softmax over the full width, with queries and keys of the block that reads the
    selected layer; the paper has the tower's own attention, head by head. The released code counts outliers
    over the whole batch; here each image has its own, which is the same for the batch of one that it runs
    with. Of equal scores or likenesses the lowest index wins.

    Attributes:
      count: "fixed", V - 1 chosen patches, which is what a comparison at equal V needs (and how the authors
        fine-tune); "adaptive", as their inference does it: those whose score exceeds the upper quartile by
        1.5 interquartile ranges, at most V - 1 (those of the highest score). Where none does, the extra token
        is alone.
      score: "class", the released one; "mean", attention received from all tokens; "probe", attention from
        SigLIP's pooling probe; "auto", "class" where the tower has a class token, else "mean".
      step: of PruMerge+ "fixed": between spaced patches; 0 for what gives half of the tokens. Released is the
        whole part of 1 over the share of patches that are kept.
    """

    visual_tokens: int
    llm_width: int
    count: str = "fixed"
    score: str = "auto"
    neighbours: int = 32
    step: int = 0
    dtype: jnp.dtype = jnp.float32

    plus: ClassVar[bool] = False

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D], those that count in front, and their validity [N, V]; the text is not used.

        Raises:
          ValueError: the keys, or what the score reads, are not there.
        """
        tokens, valid = self.compress(features, text_query)
        return jnp.where(valid[:, :, None], project(tokens, self.llm_width, self.dtype), 0), valid

    def compress(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The same in front of the projector: float32 [N, V, C], zero where not valid, and [N, V]."""
        del text_query
        patches = features.selected.astype(jnp.float32)
        keys = read(features, "keys", "PruMerge").astype(jnp.float32)
        scores = self._scores(features, keys)
        keys = keys[:, -patches.shape[1] :]
        keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        order, count = jax.vmap(self._choose)(scores)
        tokens = jax.vmap(self._merge)(patches, keys, scores, order, count)
        return tokens, jnp.arange(self.visual_tokens) <= count[:, None]

    def _scores(self, features: Features, keys: jax.Array) -> jax.Array:
        """The score of each patch: float32 [N, P]."""
        field = score_field(self.score, "class_query", features.class_query is not None)
        value = read(features, field, "PruMerge").astype(jnp.float32)
        if field != "class_query":
            return value
        logits = jnp.einsum("nc,ntc->nt", value, keys, precision=_EXACT) * keys.shape[-1] ** -0.5
        return nn.softmax(logits)[:, -features.selected.shape[1] :]

    def _choose(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Chosen patches of one image: [P] to indices [V - 1] in the tokens' order, and how many count."""
        (patches,), room = scores.shape, self.visual_tokens - 1
        index = jnp.arange(patches)
        if self.count == "fixed":
            if not self.plus:
                return jax.lax.top_k(scores, room)[1], jnp.asarray(room)
            spaced = self._spaced(patches)
            top = jax.lax.top_k(scores, room - len(spaced))[1]
            return jnp.concatenate([top, jnp.asarray(spaced, jnp.int32)]), jnp.asarray(room)
        lower, upper = jnp.percentile(scores, jnp.asarray([25.0, 75.0]))
        outliers = jnp.sum(scores > upper + 1.5 * (upper - lower))
        kept, spacing = (jnp.asarray(table)[outliers] for table in _as_released(patches))
        rank = jnp.argsort(jnp.argsort(-scores, stable=True))
        chosen = top = rank < kept
        if self.plus:
            chosen |= (index % spacing == 0) & (index < patches - 1) & (outliers > 0)
        # What does not fit is, of the spaced ones first, that of the lowest score.
        urgency = jnp.where(top, rank, jnp.where(chosen, patches + rank, 2 * patches + rank))
        chosen &= jnp.argsort(jnp.argsort(urgency)) < room
        place = jnp.where(top, rank, patches + index)
        order = jnp.argsort(jnp.where(chosen, place, 2 * patches + index))
        return order[:room], jnp.sum(chosen)

    def _spaced(self, patches: int) -> list[int]:
        """The patches at even steps of "fixed" PruMerge+."""
        if self.step:
            return list(range(self.step // 2, patches - 1, self.step))
        count = self.visual_tokens // 2  # half of V - 1, rounded up
        return [(2 * number + 1) * patches // (2 * count) for number in range(count)]

    def _merge(
        self, patches: jax.Array, keys: jax.Array, scores: jax.Array, order: jax.Array, count: jax.Array
    ) -> jax.Array:
        """Tokens of one image.

        A patch may be chosen twice, as one of the highest and as one of the spaced. The released code then
        sees two patches there, each a neighbour of the other, and loses as many of those that were not
        chosen, from the top left on: they are nobody's neighbour and not in the extra token. So does this.

        Args:
          patches: [P, C].
          keys: [P, C], normalised.
          scores: [P].
          order: [V - 1] chosen patches.
          count: how many of `order` count.

        Returns:
          [V, C].
        """
        slot = jnp.arange(self.visual_tokens)
        copies = jnp.zeros(len(patches), jnp.int32).at[order].add(slot[:-1] < count)
        left = copies == 0
        left &= jnp.cumsum(left) > jnp.sum(jnp.maximum(copies - 1, 0))
        extra = jnp.dot(jnp.where(left, scores, 0), patches, precision=_EXACT)

        others = jnp.where(left, 1, copies) - (order[:, None] == jnp.arange(len(patches)))
        likeness = jnp.where(others > 0, jnp.dot(keys[order], keys.T, precision=_EXACT), -jnp.inf)
        nearest = jax.lax.top_k(likeness, min(self.neighbours, len(patches)))[1]
        taken = jnp.take_along_axis(jnp.maximum(others, 0), nearest, axis=1)
        taken = jnp.clip(self.neighbours - (jnp.cumsum(taken, axis=1) - taken), 0, taken)
        weights = jnp.zeros_like(likeness)
        weights = jnp.put_along_axis(weights, nearest, taken * scores[nearest], axis=1, inplace=False)
        merged = patches[order] + jnp.dot(weights, patches, precision=_EXACT)

        tokens = jnp.concatenate([merged, jnp.zeros_like(patches[:1])])
        tokens = jnp.where((slot < count)[:, None], tokens, 0)
        return jnp.where((slot == count)[:, None], extra, tokens)


def _as_released(patches: int) -> tuple[list[int], list[int]]:
    """By the number of outliers, how many patches are kept and the step of the spaced ones.

    The released code goes through their share of the patches and back and cuts off what a float leaves of
    it: of 49 patches 8 outliers keep 7. A quarter of the patches at most are outliers, so no step is 0 there.
    """
    shares = [number / patches for number in range(patches + 1)]
    kept = [int(patches * share) for share in shares]
    return kept, [max(int(int(1 / share) / 3), 1) if share else 1 for share in shares]


class PruMergePlus(PruMerge):
    """PruMerge with patches at even steps beside those of the highest score.

    "fixed": V = n + m + 1, m = n or one more; the n highest, then m patches at even steps, each in the middle
    of its share of the raster, as the authors fine-tune (V = 145 of 576 patches: 4, 12, ..., 572). A patch in
    both halves is there twice (`_merge` says what follows from it).

    "adaptive": n outliers, then those of the patches 0, s, 2s, ... that are none, s = P / n / 3, in raster
    order; the last patch is never one of them, as released. The released code fails where there is no
    outlier; here the extra token is alone. Where they do not all fit, outliers come first, then the spaced
    ones of the highest score.
    """

    plus: ClassVar[bool] = True
