"""What a program takes of a device's memory, by arithmetic on shapes: no compiler, no devices.

Arguments are exact. Temporaries are the largest of the phases of a program, each the sum of what lives in it,
as read off programs that the TPU compiler scheduled; docs/paper-grid.md has what the two say of one grid.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from vlmscale.compressors.features import blocks_read
from vlmscale.config import Cell, CompressorConfig, TowerConfig, TrainConfig
from vlmscale.cost.image import CompressorCall, compressor_call
from vlmscale.cost.residuals import layer_residual_bytes
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize
from vlmscale.plan.abstract import abstract_batch, abstract_pixels, abstract_prompts, vocab_rows
from vlmscale.plan.compiled import Compiled, Request
from vlmscale.plan.programs import answering, step_tower, tower_pictures, tower_places
from vlmscale.plan.slices import find_slice
from vlmscale.sharding import AXES
from vlmscale.train.frozen import needs_of
from vlmscale.train.recipe import compute_dtype, make_optimizer, training_model
from vlmscale.train.state import Places, abstract_state, lay_out
from vlmscale.train.step import build_model

_FLOAT32 = 4
_CODE = {"train": 30, "tower": 4.0, "generate": 2.8}  # MiB of a program; of the latter two of each block
_GATHERED = 3  # layers whose weights are whole at a time, where fsdp splits them
# libtpu 0.0.42, for v5e and not for v6e: the weights of all layers are gathered before the loop over tokens,
# as far as there is memory, and about half of a tower's before its first block.
_GATHERS_EARLY, _TOWER_SHARE = ("v5e",), 0.55
_TILE = 128  # numbers that a TPU pads the last axis of an array to


def abstract_mesh(mesh: tuple[int, int, int]) -> Any:
    """A mesh of no devices, which shapes can be laid out on."""
    return AbstractMesh(mesh, AXES, axis_types=(AxisType.Auto,) * 3)


def device_bytes(tree: Any) -> int:
    """Bytes that one device has of abstract arrays with places."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def tower_bytes(cell: Cell, mesh: tuple[int, int, int]) -> int:
    """Of the parameters of a frozen tower."""
    compressor = cell.compressor
    return _tower_bytes(
        cell.tower.name, compressor.name, compressor.visual_tokens, compressor.options, cell.train.dtype, mesh
    )


@lru_cache(maxsize=256)
def _tower_bytes(
    tower: str, compressor: str, visual_tokens: int, options: str, dtype: str, mesh: tuple[int, int, int]
) -> int:
    cell = Cell(TowerConfig(tower), CompressorConfig(compressor, visual_tokens, options))
    cell.train.dtype = dtype
    return device_bytes(tower_places(cell, abstract_mesh(mesh)))


def training_places(cell: Cell, mesh: tuple[int, int, int]) -> Places:
    """Where the parameters of a training step live."""
    return lay_out(cell, training_model(cell, vocab_rows(cell)), abstract_mesh(mesh), step_tower(cell))


def predict(request: Request) -> Compiled:
    """Bytes of a program on one device of its slice.

    Raises:
      UserError: the mesh cannot hold the cell.
    """
    make = {"train": predict_training, "tower": _tower, "generate": _generate}[request.program]
    arguments, temporary, code_mib = make(request.cell, request.mesh, request.length)
    generation = find_slice(request.topology).generation
    limit, code = round(generation.hbm), round(code_mib * 2**20)
    whole = (request.mesh[0], 1, request.mesh[2])
    if generation.libtpu in _GATHERS_EARLY and request.mesh[1] > 1 and request.program != "train":
        if request.program == "tower":
            temporary += round(_TOWER_SHARE * tower_bytes(request.cell, whole))
        else:
            gathered = device_bytes(answering(request.cell, abstract_mesh(whole)))
            temporary = max(temporary, min(temporary + gathered, limit - arguments - code))
    needed = arguments + temporary + code
    return Compiled(arguments, 0, temporary, code, needed, limit, seconds=0.0, by="arithmetic")


def predict_training(cell: Cell, mesh: tuple[int, int, int], length: int) -> tuple[int, int, float]:
    """Bytes of the arguments, temporaries and code of a training step."""
    where, (data, fsdp, tensor) = abstract_mesh(mesh), mesh
    places, train = training_places(cell, mesh), cell.train
    state = abstract_state(
        _optimizer(json.dumps(asdict(replace(train, init_from="")))), places.trained, where
    )
    model = training_model(cell, vocab_rows(cell))
    batch = abstract_batch(cell, model, where, length)
    arguments = device_bytes(state) + device_bytes(places.frozen) + device_bytes(batch)

    size, item = SIZES[cell.llm.name], jnp.dtype(model.dtype).itemsize
    rows = train.batch_size // train.accumulate // (data * fsdp)
    positions, trains = rows * length, "decoder" in places.trained
    # What cudnn keeps is taken to be what splash does.
    kernel = "xla" if train.attention == "xla" else "splash"
    layer = layer_residual_bytes(size, train.remat, kernel, rows, length, item, trained=trains)
    kept = size.num_layers * layer
    if model.visual_tokens:
        kept += rows * compressor_residuals(compressor_call(cell, model.visual_tokens, length)) * item
    if train.tower_rate:  # its blocks are computed again from their inputs
        tower = TOWERS[cell.tower.name]
        tokens = tower.num_patches + tower.class_tokens
        kept += rows * blocks_read(tower, needs_of(cell)) * tokens * tower.width * item
    # The layer that is computed again, forward and backward, and its weights where they are split over fsdp.
    work = positions * _layer_numbers(size, tensor) * item
    if kernel == "xla":
        work += 2 * _FLOAT32 * rows * size.num_heads * length**2 // tensor
    weights = size.num_nonembedding_params // size.num_layers // tensor
    work += _GATHERED * item * weights * (fsdp > 1)
    # The head, whole in the dtype of the products, and its gradient in float32; a chunk's logits.
    rows_here = vocab_rows(cell) // tensor
    table = rows_here * size.width
    head = table * item * (fsdp > 1 or trains) + _FLOAT32 * table * trains
    logits = _FLOAT32 * min(train.loss_chunk, positions) * rows_here
    if not trains:
        return arguments, kept + max(work, head + logits) + device_bytes(places.trained), _CODE["train"]
    # Casts of all layers' float32 parameters are made before the scan, and made again for the backward one.
    casts = device_bytes(places.trained["decoder"]["layers"]) // _FLOAT32 * item
    gradients = device_bytes(places.trained)
    own_table = _FLOAT32 * table // fsdp
    loss = kept + casts + head + logits
    # Of tied tables the gradients of both uses, until they are added.
    backward = kept + 2 * casts + work + gradients + own_table * size.tied_embeddings
    parts = gradients if train.accumulate > 1 else 0
    return arguments, max(loss, backward) + parts, _CODE["train"]


@lru_cache(maxsize=64)
def _optimizer(train: str) -> Any:
    """Of a recipe as text; one and the same for all meshes, so that jax traces it once."""
    return make_optimizer(TrainConfig(**json.loads(train)))


def _layer_numbers(size: DecoderSize, tensor: int) -> int:
    """Numbers a position of one layer, forward and backward: of width, of heads and of the MLP."""
    heads = (size.num_heads + 2 * size.num_kv_heads) * size.head_dim
    return 8 * size.width + (4 * heads + 6 * size.mlp_width) // tensor


@lru_cache(maxsize=256)
def compressor_residuals(call: CompressorCall) -> int:
    """Numbers that the gradient of a compressor's parameters keeps of one image, these not among them."""
    run, params, features, text = call.shapes()

    def backward(params: Any) -> Any:
        inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (features, text))
        return jax.vjp(lambda params: run(params, *inputs), params)[1]

    kept = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, params))]
    for leaf in jax.tree.leaves(params):
        if leaf.size in kept:
            kept.remove(leaf.size)
    return sum(kept)


def _tower(cell: Cell, mesh: tuple[int, int, int], length: int) -> tuple[int, int, float]:
    """Of a frozen tower over a batch's pictures."""
    where, devices = abstract_mesh(mesh), mesh[0] * mesh[1]
    count, parts = tower_pictures(cell, devices)
    pixels = abstract_pixels(cell, where, count, parts)
    model = training_model(cell, vocab_rows(cell))
    size, item = TOWERS[cell.tower.name], jnp.dtype(model.dtype).itemsize
    tokens = size.num_patches + size.class_tokens
    here = count // parts // devices
    streams = tokens * (2 * size.mlp_width + 8 * size.width) * item
    padded = size.image_size**2 * _TILE * _FLOAT32  # pixels, whose last axis is 3
    code = _CODE["tower"] * blocks_read(size, needs_of(cell))
    return tower_bytes(cell, mesh) + device_bytes(pixels), here * max(streams, padded), code


def _generate(cell: Cell, mesh: tuple[int, int, int], length: int) -> tuple[int, int, float]:
    """Of answers to a batch of prompts."""
    where, (data, fsdp, tensor) = abstract_mesh(mesh), mesh
    places, dtype = answering(cell, where), compute_dtype(cell.train)
    model = build_model(cell, vocab_rows(cell)).clone(dtype=dtype)
    batch = abstract_prompts(cell, model, where, length)
    arguments = device_bytes(places) + device_bytes(batch)
    size, item = SIZES[cell.llm.name], jnp.dtype(dtype).itemsize
    rows = batch["tokens"].shape[0] // (data * fsdp)
    slots = length + cell.evaluate.max_new_tokens
    cache = 2 * size.num_layers * rows * slots * size.num_kv_heads * size.head_dim * item // tensor
    scores = _FLOAT32 * rows * size.num_heads * length**2 // tensor
    table = vocab_rows(cell) * size.width * item // tensor * (fsdp > 1)
    # The cache as the prompts leave it and as the loop over tokens has it.
    return arguments, 2 * cache + scores + table, _CODE["generate"] * size.num_layers
