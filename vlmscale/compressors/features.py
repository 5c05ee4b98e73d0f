"""What a compressor is given: the tower's outputs, computed only where a method asks for them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlmscale.layers import abstract_params
from vlmscale.models.sizes import TowerSize
from vlmscale.models.vision import AttentionPool, VisionTower, head_weights, patches


class Features(NamedTuple):
    """Tower outputs of N images: P patches in raster order, T tokens (a class token first, if there is one).

    `selected` is always there; a method names the others that it reads in its row of the table
    (`Method.needs`), and finds None in those that it did not ask for. Block numbers count from 0; S is the
    selected layer, that is the output of block S - 1.

    Attributes:
      selected: [N, P, C] the selected layer.
      levels: [N, P, L * C] several layers side by side along the channel.
      keys: [N, T, C] raw key projections (with bias, unscaled, all heads side by side) of block S, which
        reads the selected layer; of block S - 1 where S is the tower's last layer.
      class_query: [N, C] the class token's raw query projection of the same block (CLIP only).
      class_attention: [N, P] float32, attention from the class token to each patch in block S - 1, mean over
        heads; does not sum to 1, for the class token also attends to itself (CLIP only).
      mean_attention: [N, P] float32, attention that each patch receives in block S - 1, mean over heads and
        over all T queries.
      probe_attention: [N, P] float32, attention of SigLIP's pooling probe to each patch, mean over heads.
      stack: [N, S, T, C] the inputs of blocks 0 to S - 1.
      tower: frozen parameters of blocks 0 to S - 1 ("block_0", ...), for methods that run inside the tower.
    """

    selected: jax.Array
    levels: jax.Array | None = None
    keys: jax.Array | None = None
    class_query: jax.Array | None = None
    class_attention: jax.Array | None = None
    mean_attention: jax.Array | None = None
    probe_attention: jax.Array | None = None
    stack: jax.Array | None = None
    tower: dict[str, Any] | None = None

    @property
    def side(self) -> int:
        """Patches along one side of the square grid."""
        return round(self.selected.shape[1] ** 0.5)


class FusionText(NamedTuple):
    """The text around the images: B rows of T slots, each row with I images.

    Image n of the features is image n % I of row n // I. A row may hold several samples, its segments.

    Attributes:
      embeddings: [B, T, D] the LLM's token embeddings.
      readable: [B, T] bool, what pre-fusion reads and rewrites: not image slots, nor padding, nor in training
        the answers.
      segment_ids: [B, T] int32, 0 for padding.
      image_segments: [B, I] int32, the segment that an image belongs to; 0 where there is no image.
    """

    embeddings: jax.Array
    readable: jax.Array
    segment_ids: jax.Array
    image_segments: jax.Array


def tower_features(
    size: TowerSize,
    params: dict[str, Any],
    pixels: jax.Array,
    needs: frozenset[str],
    dtype: Any = jnp.float32,
    attention: str = "xla",
    *,
    every_token: bool = False,
) -> dict[str, jax.Array]:
    """What the frozen tower makes of images, as far as a method reads it; jit it with all but arrays static.

    Args:
      size: of the tower.
      params: its parameters, of which those must be there that `blocks_read` counts; for `probe_attention`
        also those of `AttentionPool.probe_attention`, under "head".
      pixels: [N, S, S, 3], normalised.
      needs: names of `Features`; "tower", which no image changes, adds nothing.
      dtype: of the computation; the three maps of attention are float32.
      attention: the backend that mixes values, see `vlmscale.attention`.
      every_token: whether `selected` keeps the tokens in front of the patches, as some LLaVAs do.

    Returns:
      "selected" and each of `needs`, with the shapes that `Features` lists.

    Raises:
      ValueError: a class token's output of a tower without one, or the probe of a tower that has one instead.
    """
    _check_style(size, needs)
    layer, last = size.select_layer, size.num_layers
    reader = min(layer, last - 1)  # the block whose keys are given
    hidden, projections = {layer}, set()
    if "levels" in needs:
        hidden.update(size.levels)
    if "stack" in needs:
        hidden.update(range(layer))
    if "probe_attention" in needs:
        hidden.add(last)
    if needs & {"keys", "class_query"}:
        projections.add(reader)
    if needs & {"class_attention", "mean_attention"}:
        projections.add(layer - 1)
    tower = VisionTower(size, dtype, attention)
    made = tower.apply({"params": params}, pixels, tuple(sorted(hidden)), tuple(sorted(projections)))
    out = {"selected": made.hidden[layer] if every_token else patches(made.hidden[layer], size)}
    if "levels" in needs:
        levels = [patches(made.hidden[level], size) for level in size.levels]
        out["levels"] = jnp.concatenate(levels, axis=-1)
    if "stack" in needs:
        out["stack"] = jnp.stack([made.hidden[index] for index in range(layer)], axis=1)
    if "keys" in needs:
        out["keys"] = made.projections[reader].keys
    if "class_query" in needs:
        out["class_query"] = made.projections[reader].queries[:, 0]
    if needs & {"class_attention", "mean_attention"}:
        queries, keys = made.projections[layer - 1]
        if "class_attention" in needs:  # one row, for all of them are as many as the patches
            weights = head_weights(queries[:, :1], keys, size.num_heads)
            out["class_attention"] = weights.mean((1, 2))[:, size.class_tokens :]
        if "mean_attention" in needs:
            weights = head_weights(queries, keys, size.num_heads)
            out["mean_attention"] = weights.mean((1, 2))[:, size.class_tokens :]
    if "probe_attention" in needs:
        pool = AttentionPool(size, dtype)
        variables = {"params": params["head"]}
        out["probe_attention"] = pool.apply(variables, made.hidden[last], method="probe_attention")
    return out


def blocks_read(size: TowerSize, needs: frozenset[str]) -> int:
    """How many blocks of a tower, from the first, `tower_features` reads.

    One of which it reads the queries and keys alone counts.
    """
    read = size.select_layer
    if "levels" in needs:
        read = max(read, *size.levels)
    if needs & {"keys", "class_query"}:
        read = max(read, min(size.select_layer + 1, size.num_layers))
    return size.num_layers if "probe_attention" in needs else read


def _check_style(size: TowerSize, needs: frozenset[str]) -> None:
    unfit = needs & ({"probe_attention"} if size.class_tokens else {"class_query", "class_attention"})
    if unfit:
        raise ValueError(f"{', '.join(sorted(unfit))}: a tower of style {size.style} has none")


@lru_cache(maxsize=64)
def abstract_features(size: TowerSize, needs: frozenset[str]) -> Features:
    """Shapes and dtypes of what a method with these needs is given for one image."""
    params = abstract_tower_params(size)
    arrays = jax.eval_shape(
        lambda params, pixels: tower_features(size, params, pixels, needs), params, _pixels(size)
    )
    return Features(**arrays | ({"tower": params} if "tower" in needs else {}))


@lru_cache(maxsize=64)
def abstract_tower_params(size: TowerSize) -> dict[str, Any]:
    """Shapes of a whole tower's parameters, its pooling head ("head") among them."""
    params = abstract_params(VisionTower(size), _pixels(size), layers=(size.num_layers,))
    last = jax.ShapeDtypeStruct((1, size.num_patches, size.width), "float32")
    unboxed: dict[str, Any] = nn.meta.unbox(params | {"head": abstract_params(AttentionPool(size), last)})
    return unboxed


def _pixels(size: TowerSize) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size.image_size, size.image_size, 3), "float32")
