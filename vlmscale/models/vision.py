"""Vision transformers of SigLIP, SigLIP 2 (fixed resolution) and CLIP: hidden states and projections.

SigLIP is arXiv 2303.15343, SigLIP 2 arXiv 2502.14786 (at a fixed resolution the same network), CLIP arXiv
2103.00020. Everything is computed as transformers' `SiglipVisionModel` and `CLIPVisionModel` compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmscale.attention import attend, attention_weights
from vlmscale.layers import LayerNorm, dense, named
from vlmscale.models.sizes import TowerSize

STYLES = ("siglip", "clip")

_CUBIC = -0.75  # torch's parameter of the cubic kernel; jax.image.resize has -0.5


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU, elementwise: x times sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),  # SigLIP; `gelu_pytorch_tanh` in its config
    "gelu": partial(jax.nn.gelu, approximate=False),  # some CLIP checkpoints that OpenAI did not train
    "quick_gelu": quick_gelu,  # OpenAI's CLIP
}


class Projections(NamedTuple):
    """What attention makes of its input: with bias, unscaled, all heads side by side along the channel."""

    queries: jax.Array
    keys: jax.Array


class TowerOutputs(NamedTuple):
    """What was asked of a tower; T counts CLIP's class token, which is the first.

    `hidden` maps a layer to [B, T, C]: 0 is the input of the first block (CLIP: behind `pre_norm`), i the
    output of block i - 1. None of them has the final norm, the last one neither. `projections` maps a block
    to its queries and keys, [B, T, C] each, of which `head_weights` makes the rows of attention that are
    wanted.
    """

    hidden: dict[int, jax.Array]
    projections: dict[int, Projections]


def head_weights(queries: jax.Array, keys: jax.Array, num_heads: int) -> jax.Array:
    """Attention by head, of any rows of projected queries [B, T, C] to all keys [B, S, C].

    Returns:
      [B, H, T, S] float32, after the softmax: query by key.
    """
    return attention_weights(_split_heads(queries, num_heads), _split_heads(keys, num_heads))


def _split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], num_heads, x.shape[-1] // num_heads)


def patches(hidden: jax.Array, size: TowerSize) -> jax.Array:
    """Drop the class token, where the tower has one: [B, T, C] to [B, P, C], in raster order."""
    return hidden[:, size.class_tokens :]


def bicubic_weights(source: int, target: int) -> np.ndarray:
    """One axis of torch's bicubic resize as a matrix: float32 [target, source], rows sum to 1.

    As `interpolate(mode="bicubic", align_corners=False)` without antialias, in float32 as there. Taps that
    fall outside the axis read its end.
    """
    scale = np.float32(source) / np.float32(target)
    place = scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    first = np.floor(place)
    offsets = np.arange(-1, 3)
    distance = np.abs((place - first)[:, None] - offsets.astype(np.float32))
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    taps = np.clip(first.astype(int)[:, None] + offsets, 0, source - 1)
    weights = np.zeros((target, source), np.float32)
    np.add.at(weights, (np.arange(target)[:, None], taps), np.where(distance <= 1, near, far))
    return weights


def resize_positions(table: jax.Array, rows: int, columns: int) -> jax.Array:
    """Position embeddings of a square grid for another one: float32 [G * G, C] to [rows * columns, C].

    What transformers' `interpolate_pos_encoding=True` does; the same grid is handed back untouched.
    """
    grid, width = round(table.shape[0] ** 0.5), table.shape[1]
    if (rows, columns) == (grid, grid):
        return table
    # Full precision: by default an accelerator multiplies float32 with fewer bits, which torch does not here.
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    across = product("wh,ghc->gwc", bicubic_weights(grid, columns), table.reshape(grid, grid, width))
    return product("rg,gwc->rwc", bicubic_weights(grid, rows), across).reshape(rows * columns, width)


class Attention(nn.Module):
    """Multi-head attention with biases, as in ViT."""

    num_heads: int
    dtype: jnp.dtype
    backend: str = "xla"

    @nn.compact
    def __call__(
        self, queries: jax.Array, keys: jax.Array, mix: bool = True
    ) -> tuple[jax.Array | None, Projections]:
        """Attend from [B, T, C] to [B, S, C].

        Args:
          queries: [B, T, C].
          keys: [B, S, C], the values too.
          mix: whether the mixed values are wanted; without them `v` and `o` are not declared.

        Returns:
          [B, T, C] or None, and the projected queries [B, T, C] and keys [B, S, C].
        """
        width = queries.shape[-1]

        def project(x: jax.Array, name: str) -> jax.Array:
            y: jax.Array = dense(width, name, self.dtype, ("embed", "heads"))(x)
            return y

        made = Projections(project(queries, "q"), project(keys, "k"))
        if not mix:
            return None, made
        q, k, v = (_split_heads(x, self.num_heads) for x in (*made, project(keys, "v")))
        mixed = attend(q, k, v, backend=self.backend).reshape(queries.shape)
        return dense(width, "o", self.dtype, ("heads", "embed"))(mixed), made


class MLP(nn.Module):
    """Two dense layers with an activation between.

    `activation` is a name from `ACTIVATIONS`.
    """

    mlp_width: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., C].

        Raises:
          ValueError: an activation that is not in the table.
        """
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}")
        h = ACTIVATIONS[self.activation](dense(self.mlp_width, "up", self.dtype, ("embed", "mlp"))(x))
        return dense(x.shape[-1], "down", self.dtype, ("mlp", "embed"))(h)


class EncoderBlock(nn.Module):
    """One pre-norm encoder layer."""

    size: TowerSize
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(
        self, x: jax.Array, run: bool = True, context: jax.Array | None = None
    ) -> tuple[jax.Array | None, Projections]:
        """Run the block, or only as much of it as its queries and keys need.

        Args:
          x: [B, T, C].
          run: whether the block's output is wanted; without it only `attention_norm` and the projections
            to queries and keys are declared.
          context: [B, S, C] more tokens that x attends to, in front of itself, and that stay as they are.

        Returns:
          [B, T, C] or None, and the projected queries [B, T, C] and keys [B, S + T, C].
        """
        size = self.size
        seen = x if context is None else jnp.concatenate([context, x], axis=1)
        h = LayerNorm(size.norm_eps, self.dtype, name="attention_norm")(seen)
        attention = Attention(size.num_heads, self.dtype, self.attention, name="attention")
        mixed, made = attention(h[:, -x.shape[1] :], h, run)
        if mixed is None:
            return None, made
        x = x + mixed
        h = LayerNorm(size.norm_eps, self.dtype, name="mlp_norm")(x)
        return x + MLP(size.mlp_width, size.activation, self.dtype, name="mlp")(h), made


class VisionTower(nn.Module):
    """A ViT that returns the hidden states, queries and keys asked for.

    Blocks that none of them needs are neither run nor declared. The residual stream is in `dtype`; norms,
    softmax and the resizing of positions are float32. `attention` is the backend that mixes values.
    """

    size: TowerSize
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, images: jax.Array, layers: tuple[int, ...], projection_layers: tuple[int, ...] = ()
    ) -> TowerOutputs:
        """Hidden states by layer, and queries and keys by block.

        Args:
          images: [B, H, W, 3] normalised pixels. For another resolution than the size's own, also one that
            is not square, position embeddings are interpolated. Pixels at the right and lower edge that do
            not fill a patch are cut off.
          layers: which hidden states, 0 to num_layers.
          projection_layers: the queries and keys of which blocks, 0 to num_layers - 1. Of a block behind
            the last layer asked for, no more is run or declared than they need.

        Returns:
          The outputs asked for, and no others.

        Raises:
          ValueError: images smaller than a patch, no such layer or block, or an unknown style or activation.
        """
        size = self.size
        if size.style not in STYLES:
            raise ValueError(f"unknown style {size.style!r}; there are {', '.join(STYLES)}")
        for what, asked, end in (
            ("layer", layers, size.num_layers),
            ("projections of block", projection_layers, size.num_layers - 1),
        ):
            for index in asked:
                if not 0 <= index <= end:
                    raise ValueError(f"no {what} {index}: the tower has 0 to {end}")
        x = self._embed(images)
        # The projections of block i need its input, which is hidden state i.
        deepest = max((*layers, *projection_layers), default=0)
        hidden, projections = {0: x}, {}
        # Of a tower that trains the backward pass computes each block again: scores of patches are large.
        remat = nn.remat(EncoderBlock)
        for index in range(deepest):
            x, projections[index] = self._block(index, remat)(x)
            hidden[index + 1] = x
        if deepest in projection_layers:
            _, projections[deepest] = self._block(deepest)(x, run=False)
        return TowerOutputs({i: hidden[i] for i in layers}, {i: projections[i] for i in projection_layers})

    def _block(self, index: int, kind: type[EncoderBlock] = EncoderBlock) -> EncoderBlock:
        return kind(self.size, self.dtype, self.attention, name=f"block_{index}")

    def _embed(self, images: jax.Array) -> jax.Array:
        """The input of the first block: [B, H, W, 3] to [B, T, C]."""
        size = self.size
        batch, patch, clip = images.shape[0], size.patch_size, size.style == "clip"
        rows, columns = images.shape[1] // patch, images.shape[2] // patch
        if not rows * columns:
            raise ValueError(f"images of {images.shape[1:3]} pixels hold no patch of {patch} x {patch}")
        pixels = images[:, : rows * patch, : columns * patch]
        pixels = pixels.reshape(batch, rows, patch, columns, patch, 3).swapaxes(2, 3)
        pixels = pixels.reshape(batch, rows * columns, patch * patch * 3)
        embed = dense(size.width, "patch_embedding", self.dtype, ("patch", "embed"), use_bias=not clip)
        x = embed(pixels)
        init = nn.initializers.normal(size.width**-0.5)
        shape = (size.class_tokens + size.num_patches, size.width)
        table = self.param("position_embedding", named(init, ("position", "embed")), shape, jnp.float32)
        position = resize_positions(table[size.class_tokens :], rows, columns)
        if not clip:
            return x + position.astype(self.dtype)
        token = self.param("class_embedding", named(init, ("embed",)), (size.width,), jnp.float32)
        first = jnp.broadcast_to(token.astype(self.dtype), (batch, 1, size.width))
        position = jnp.concatenate([table[:1], position])  # the class token's is of no place: as it is
        x = jnp.concatenate([first, x], axis=1) + position.astype(self.dtype)
        return LayerNorm(size.norm_eps, self.dtype, name="pre_norm")(x)


class AttentionPool(nn.Module):
    """SigLIP's pooling head: one learned probe attends to all patches, then a residual MLP."""

    size: TowerSize
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Name the parts; only those that a method uses are declared."""
        size = self.size
        self.final_norm = LayerNorm(size.norm_eps, self.dtype)
        init = named(nn.initializers.xavier_uniform(), (None, None, "embed"))
        self.probe = self.param("probe", init, (1, 1, size.width), jnp.float32)
        self.attention = Attention(size.num_heads, self.dtype)
        self.mlp_norm = LayerNorm(size.norm_eps, self.dtype)
        self.mlp = MLP(size.mlp_width, size.activation, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Last hidden state [B, P, C] to the image embedding [B, C]; applies the final norm first."""
        pooled, _ = self._attend(x, mix=True)
        assert pooled is not None
        return (pooled + self.mlp(self.mlp_norm(pooled)))[:, 0]

    def probe_attention(self, x: jax.Array) -> jax.Array:
        """Last hidden state [B, P, C] to what the probe gives each patch, mean over heads: [B, P] float32.

        Needs `final_norm`, `probe` and the attention's `q` and `k` alone.
        """
        _, made = self._attend(x, mix=False)
        return head_weights(*made, self.size.num_heads).mean(1)[:, 0]

    def _attend(self, x: jax.Array, mix: bool) -> tuple[jax.Array | None, Projections]:
        x = self.final_norm(x)
        probe = jnp.broadcast_to(self.probe.astype(self.dtype), (x.shape[0], 1, self.size.width))
        attended: tuple[jax.Array | None, Projections] = self.attention(probe, x, mix)
        return attended
