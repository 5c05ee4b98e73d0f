"""SigLIP-type vision transformer: patches in, hidden states of chosen layers out."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.attention import attend


@dataclass(frozen=True)
class TowerSize:
    """One row of the tower table.

    `select_layer` is the hidden state that compressors read and `levels` are those that multi-level
    compressors concatenate: 0 is the patch embedding, i the output of block i - 1.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    select_layer: int
    levels: tuple[int, ...]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in all."""
        return self.grid**2


TOWERS: dict[str, TowerSize] = {
    # The demo's tower; its weights ship with the package (`vlmscale tower` reproduces them).
    "scenes-48": TowerSize(48, 6, 64, 4, 2, 192, select_layer=4, levels=(1, 2, 3, 4)),
}


class SelfAttention(nn.Module):
    """Multi-head attention with biases, as in ViT."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """[B, T, C] queries over [B, S, C] keys (and values) to [B, T, C]."""
        width = queries.shape[-1]

        def project(x: jax.Array, name: str) -> jax.Array:
            y = nn.Dense(width, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], self.num_heads, width // self.num_heads)

        q, k, v = project(queries, "q"), project(keys, "k"), project(keys, "v")
        return nn.Dense(width, dtype=self.dtype, name="o")(attend(q, k, v, None).reshape(queries.shape))


class MLP(nn.Module):
    """Two dense layers with SigLIP's tanh GELU between."""

    mlp_width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., C]."""
        h = nn.gelu(nn.Dense(self.mlp_width, dtype=self.dtype, name="up")(x), approximate=True)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(h)


class EncoderBlock(nn.Module):
    """One pre-norm encoder layer."""

    size: TowerSize
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, C] to [B, P, C]."""
        eps = self.size.norm_eps
        h = nn.LayerNorm(eps, name="attention_norm")(x).astype(self.dtype)
        x = x + SelfAttention(self.size.num_heads, self.dtype, name="attention")(h, h)
        h = nn.LayerNorm(eps, name="mlp_norm")(x).astype(self.dtype)
        return x + MLP(self.size.mlp_width, self.dtype, name="mlp")(h)


class VisionTower(nn.Module):
    """A ViT that returns the hidden states asked for; blocks behind the last of them are not run."""

    size: TowerSize
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, layers: tuple[int, ...]) -> dict[int, jax.Array]:
        """Hidden states by layer number.

        Args:
          images: [B, S, S, 3] normalised pixels.
          layers: which hidden states; 0 is the patch embedding. None of them has the final norm.

        Returns:
          {layer: [B, P, C]}.
        """
        size = self.size
        batch, grid, patch = images.shape[0], size.grid, size.patch_size
        patches = images.reshape(batch, grid, patch, grid, patch, 3).swapaxes(2, 3)
        patches = patches.reshape(batch, size.num_patches, patch * patch * 3)
        x = nn.Dense(size.width, dtype=self.dtype, name="patch_embedding")(patches)
        position = self.param(
            "position_embedding",
            nn.initializers.normal(size.width**-0.5),
            (size.num_patches, size.width),
            jnp.float32,
        )
        x = x + position.astype(self.dtype)
        hidden = {0: x}
        for index in range(max(layers)):
            x = EncoderBlock(size, self.dtype, name=f"block_{index}")(x)
            hidden[index + 1] = x
        return {layer: hidden[layer] for layer in layers}


class AttentionPool(nn.Module):
    """SigLIP's pooling head: one learned probe attends to all patches, then a residual MLP."""

    size: TowerSize
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Last hidden state [B, P, C] to the image embedding [B, C]; applies the final norm first."""
        size = self.size
        x = nn.LayerNorm(size.norm_eps, name="final_norm")(x).astype(self.dtype)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, size.width), jnp.float32)
        queries = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, size.width))
        pooled = SelfAttention(size.num_heads, self.dtype, name="attention")(queries, x)
        h = nn.LayerNorm(size.norm_eps, name="mlp_norm")(pooled).astype(self.dtype)
        return (pooled + MLP(size.mlp_width, self.dtype, name="mlp")(h))[:, 0]
