"""A Hugging Face directory as a whole: what its config.json describes, and its parameters on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmscale.compressors import COMPRESSORS, Features
from vlmscale.layers import abstract_params
from vlmscale.models.decoder import Decoder
from vlmscale.models.sizes import DecoderSize, TowerSize
from vlmscale.models.vision import AttentionPool, VisionTower
from vlmscale.sharding import place
from vlmscale.weights import hf_config, tables
from vlmscale.weights.checkpoint import Checkpoint, open_checkpoint
from vlmscale.weights.load import Report, Source, load_params

Progress = Callable[[str, int, int], None]

_ROWS = 4096  # of two tables that are compared, so that neither is held whole


@dataclass(frozen=True)
class Description:
    """What a directory holds.

    Attributes:
      kind: "llava", "decoder" or "tower".
      config: its config.json.
      decoder, tower: the sizes of its parts; None for a part that it does not have.
      llava: how the parts are joined; None unless the kind is "llava".
      table: explains its tensors.
      boxed: shapes and logical axes of our parameters: {"decoder", "tower", "compressor"} of a LLaVA, else
        those of the one part.
    """

    kind: str
    config: dict[str, Any]
    decoder: DecoderSize | None
    tower: TowerSize | None
    llava: hf_config.LlavaConfig | None
    table: tables.Table
    boxed: dict[str, Any]


def describe(checkpoint: Checkpoint, layout: str = "loop", *, whole_tower: bool = False) -> Description:
    """Read config.json and lay out the parameters that the model needs.

    Args:
      checkpoint: of the directory.
      layout: of the decoder.
      whole_tower: also the blocks behind the selected layer, which no output needs.

    Raises:
      UserError: no config.json, or one of a model that is not built here.
    """
    where = checkpoint.directory / "config.json"
    config = hf_config.read_config(checkpoint.directory)
    kind = hf_config.kind_of(config, where)
    if kind == "decoder":
        size = _own_head(hf_config.decoder_size(config, where), checkpoint, tables.DECODER)
        boxed = abstract_decoder(size, size.vocab_size, layout)
        return Description(kind, config, size, None, None, tables.DECODER, boxed)
    if kind == "tower":
        tower = hf_config.tower_size(config, where)
        layer = tower.num_layers if whole_tower else tower.select_layer
        table = tables.TOWERS[tower.style]
        return Description(kind, config, None, tower, None, table, abstract_tower(tower, (layer,)))
    llava = hf_config.llava_config(config, where)
    table = tables.llava(llava.tower.style)
    llava = replace(llava, decoder=_own_head(llava.decoder, checkpoint, table))
    layer = llava.tower.num_layers if whole_tower else llava.tower.select_layer
    boxed = {
        "decoder": abstract_decoder(llava.decoder, llava.decoder.vocab_size, layout),
        "tower": abstract_tower(llava.tower, (layer,)),
        "compressor": abstract_compressor(llava),
    }
    return Description(kind, config, llava.decoder, llava.tower, llava, table, boxed)


def _own_head(size: DecoderSize, checkpoint: Checkpoint, table: tables.Table) -> DecoderSize:
    """The size, untied if config.json ties the head but the file holds another one.

    So does transformers 5: it takes the config.json to be wrong. A head that is the embedding once more is
    not read again.
    """
    names = {}
    for name in checkpoint.tensors:
        row = table.claims(table.canonical(name))
        if row is not None and row.ours.removeprefix("decoder/") in ("embedding", "head"):
            names[row.ours.removeprefix("decoder/")] = name
    if not size.tied_embeddings or len(names) < 2:
        return size
    embedding, head = (checkpoint.tensors[names[what]] for what in ("embedding", "head"))
    if embedding.shape != head.shape or embedding.dtype != head.dtype or len(head.shape) != 2:
        return replace(size, tied_embeddings=False)
    for start in range(0, head.shape[0], _ROWS):
        rows = (slice(start, min(start + _ROWS, head.shape[0])),)
        if not np.array_equal(
            checkpoint.read(names["embedding"], rows), checkpoint.read(names["head"], rows)
        ):
            return replace(size, tied_embeddings=False)
    return size


def load_directory(
    directory: Path,
    mesh: Mesh,
    dtype: Any = jnp.float32,
    layout: str = "loop",
    progress: Progress = lambda what, done, total: None,
    *,
    whole_tower: bool = False,
) -> tuple[Description, dict[str, Any], Report]:
    """The parameters of a directory, sharded over a mesh.

    Args:
      directory: of config.json and safetensors.
      mesh: where they go.
      dtype: of the parameters.
      layout: of the decoder.
      progress: called with (what, done, total).
      whole_tower: also the blocks behind the selected layer.

    Raises:
      UserError: files or tensors that are missing, damaged, misshapen or unknown; a parameter that the mesh
        would leave whole on every device (see `vlmscale.sharding.place`).
    """
    with open_checkpoint(directory) as checkpoint:
        described = describe(checkpoint, layout, whole_tower=whole_tower)
        places = place(described.boxed, mesh, dtype)
        params, report = load_params(places, [Source(checkpoint, described.table)], progress=progress)
    return described, params, report


def abstract_decoder(size: DecoderSize, vocab_size: int, layout: str) -> dict[str, Any]:
    """Shapes and axes of a decoder's parameters."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    states = jax.ShapeDtypeStruct((1, 2, size.width), jnp.float32)
    return abstract_params(Decoder(size, vocab_size, layout=layout), states, ids, ids)


def abstract_tower(size: TowerSize, layers: tuple[int, ...], *, probe: bool = False) -> dict[str, Any]:
    """Shapes and axes of a tower's parameters, up to the last of these hidden states.

    With `probe` also, under "head", of what the attention of SigLIP's pooling probe reads.
    """
    return dict(_abstract_tower(size, layers, probe))


@lru_cache(maxsize=64)
def _abstract_tower(size: TowerSize, layers: tuple[int, ...], probe: bool) -> dict[str, Any]:
    pixels = jax.ShapeDtypeStruct((1, size.image_size, size.image_size, 3), jnp.float32)
    boxed = abstract_params(VisionTower(size), pixels, layers=layers)
    if probe:
        hidden = jax.ShapeDtypeStruct((1, size.num_patches, size.width), jnp.float32)
        boxed["head"] = abstract_params(AttentionPool(size), hidden, method="probe_attention")
    return boxed


def abstract_compressor(llava: hf_config.LlavaConfig) -> dict[str, Any]:
    """Shapes and axes of the projector's parameters."""
    tokens = llava.tower.num_patches + llava.tower.class_tokens - (0 if llava.keep_class_token else 1)
    features = jax.eval_shape(lambda: Features(jnp.zeros((1, tokens, llava.tower.width))))
    module = COMPRESSORS[llava.compressor].build(llava.visual_tokens, llava.decoder.width)
    return abstract_params(module, features, None)
