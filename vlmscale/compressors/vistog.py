"""VisToG (arXiv 2411.17773): semantic tokens that run through the tower beside the image and gather patches.

No code was released and the paper leaves details open, so this is a reconstruction, not a port: what the
authors state is the learnable tokens behind the patch embedding, the isolated attention and a grouping layer
before the projector. The grouping is that of GroupViT (arXiv 2202.11094), on which it is modelled.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.compressors.features import Features
from vlmscale.compressors.mlp import project
from vlmscale.layers import LayerNorm, dense, named
from vlmscale.models.sizes import TowerSize
from vlmscale.models.vision import EncoderBlock

_NORM_EPS = 1e-5  # torch's default, which GroupViT leaves
_MLP_RATIO = 4  # GroupViT's


class VisToG(nn.Module):
    """V semantic tokens, refined by the frozen tower, each then the mean of the patches that choose it.

    The tokens start at the input of the first block (behind CLIP's first norm) and get no position, for they
    have no place in the picture. Isolated attention: they see all image tokens and each other, image tokens
    never see them; the patches are therefore exactly those of the plain tower, and only the tokens' own
    stream is computed here. It takes the tower's parameters and states as constants; gradients run through
    its blocks to the tokens.

    Grouping: patches and tokens are normalised, every patch goes to the one token that scores highest (a
    straight-through argmax; GroupViT adds Gumbel noise in training, which is left out because training is
    deterministic here), and each token adds the mean of its patches, then an MLP. A token without patches
    adds nothing. With one token there is no choice, so its `group_q` and `group_k` learn nothing.
    """

    visual_tokens: int
    llm_width: int
    tower_size: TowerSize | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, text_query: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, V, D] in the order of the learnable ones and their validity [N, V]; no text is used.

        Raises:
          ValueError: without `tower_size`, `stack` or `tower`.
        """
        del text_query
        if self.tower_size is None or features.stack is None or features.tower is None:
            raise ValueError("VisToG runs in the tower: it needs its size, `stack` and `tower`")
        constants = (features.selected, features.stack, features.tower)
        selected, stack, tower = jax.lax.stop_gradient(constants)
        images, _, width = selected.shape
        init = named(nn.initializers.normal(width**-0.5), (None, "embed"))
        start = self.param("semantic_tokens", init, (self.visual_tokens, width), jnp.float32)
        tokens = jnp.broadcast_to(start.astype(self.dtype), (images, *start.shape))
        tokens = through_tower(tokens, stack, tower, self.tower_size)
        tokens = LayerNorm(_NORM_EPS, self.dtype, name="token_norm")(tokens)
        patches = LayerNorm(_NORM_EPS, self.dtype, name="patch_norm")(selected)
        tokens = tokens + self._gather(tokens, patches)
        tokens = tokens + self._mlp(LayerNorm(_NORM_EPS, self.dtype, name="mlp_norm")(tokens))
        return project(tokens, self.llm_width, self.dtype), jnp.ones(tokens.shape[:2], bool)

    def _gather(self, tokens: jax.Array, patches: jax.Array) -> jax.Array:
        """The mean of the patches that choose each token, through two projections: [N, V, C]."""
        width = tokens.shape[-1]
        # Nothing that all tokens have in common changes a choice among them, so a bias here could not learn.
        q = dense(width, "group_q", self.dtype, ("embed", "heads"), use_bias=False)(tokens)
        k, v = (dense(width, f"group_{name}", self.dtype, ("embed", "heads"))(patches) for name in "kv")
        scores = jnp.einsum("ngc,npc->ngp", q, k, preferred_element_type=jnp.float32)
        soft = jax.nn.softmax(scores * width**-0.5, axis=1)
        hard = jax.nn.one_hot(jnp.argmax(scores, axis=1), self.visual_tokens, axis=1)
        assigned = soft + jax.lax.stop_gradient(hard - soft)
        # An empty group divides by 1: by a small number, its gradient would drown all others.
        count = jnp.where(hard.any(2), assigned.sum(2), 1.0)
        sums = jnp.einsum("ngp,npc->ngc", assigned, v.astype(jnp.float32))
        means = (sums / count[:, :, None]).astype(self.dtype)
        return dense(width, "group_o", self.dtype, ("heads", "embed"))(means)

    def _mlp(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        up = dense(_MLP_RATIO * width, "mlp_up", self.dtype, ("embed", "mlp"))
        down = dense(width, "mlp_down", self.dtype, ("mlp", "embed"))
        return down(nn.gelu(up(x), approximate=False))


def through_tower(tokens: jax.Array, stack: jax.Array, tower: dict[str, Any], size: TowerSize) -> jax.Array:
    """Further tokens behind a tower's selected block, with isolated attention.

    Args:
      tokens: [N, V, C] at the input of the first block; computation is in their dtype.
      stack: [N, S, T, C] the image's tokens at the input of each block.
      tower: parameters of those blocks.
      size: of the tower.

    Returns:
      [N, V, C].
    """
    block = EncoderBlock(size, tokens.dtype, "xla", parent=None)
    for index in range(stack.shape[1]):
        variables = {"params": tower[f"block_{index}"]}
        tokens, _ = block.apply(variables, tokens, context=stack[:, index].astype(tokens.dtype))
    return tokens
