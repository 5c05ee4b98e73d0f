"""What of a cell cannot run, told before anything runs: one line that names the key and what works."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from vlmscale.attention import BACKENDS
from vlmscale.compressors import COMPRESSORS, check_count, parse_options, spoken
from vlmscale.config import (
    TEMPLATES,
    Cell,
    DataConfig,
    ReducerConfig,
    TowerConfig,
    TrainConfig,
    leaves,
    parse_mixture,
    reducer_of,
    trains_reducer,
)
from vlmscale.errors import UserError
from vlmscale.models.decoder import REMAT
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.reducers import REDUCERS, ReducerSpec, check_reducer

SHIPPED_TOWERS = ("scenes-48",)


def validate(cell: Cell) -> None:
    """Refuse what cannot run.

    Raises:
      UserError: one line naming the key and what works.
    """
    _one_of("tower.name", cell.tower.name, TOWERS)
    _one_of("llm.name", cell.llm.name, SIZES)
    _one_of("compressor.name", cell.compressor.name, COMPRESSORS)
    _one_of("data.source", cell.data.source, ("scenes", "llava"))
    _one_of("data.image_mode", cell.data.image_mode, ("resize", "pad", "crop"))
    _one_of("data.template", cell.data.template, TEMPLATES)
    _one_of("data.tokenization", cell.data.tokenization, ("inline", "llava"))
    _one_of("data.packing", cell.data.packing, ("none", "pack", "modality_length"))
    _one_of("data.features", cell.data.features, ("stored", "computed"))
    _one_of("data.feature_dtype", cell.data.feature_dtype, ("float32", "bfloat16"))
    _one_of("evaluate.history", cell.evaluate.history, ("none", "gold"))
    _check_weights(cell.tower)
    _check_compressor(cell)
    _check_reducer(cell)
    _check_data(cell)
    positive = (
        "data.train_images data.validation_images data.test_images data.max_text_tokens train.steps "
        "train.batch_size train.learning_rate train.log_every train.heldout_every train.checkpoint_every "
        "train.accumulate train.loss_chunk train.keep evaluate.max_new_tokens evaluate.batch_size"
    )
    values = {name: value for name, value, _ in leaves(cell)}
    for name in positive.split():
        if not 0 < values[name] < math.inf:
            raise UserError(f"{name}={values[name]}: must be above 0 and finite")
    _check_train(cell)
    if cell.data.vocab_size < 300:
        raise UserError(
            f"data.vocab_size={cell.data.vocab_size}: at least 300 (256 bytes and special tokens)"
        )


def _check_data(cell: Cell) -> None:
    data = cell.data
    if data.source == "llava" and not data.records and not data.prepared:
        raise UserError(
            "data.source=llava needs --config.data.prepared=DIR, or --config.data.records=FILE.json (and "
            "--config.data.images=DIR)"
        )
    if data.source == "scenes" and (data.records or data.images or data.prepared):
        raise UserError(
            "data.records, data.images and data.prepared are read only with --config.data.source=llava"
        )
    if data.prepared and (data.records or data.images):
        raise UserError("data.prepared holds records and images: leave data.records and data.images away")
    parse_mixture(data.prepared)
    if data.template == "toy" and (data.tokenizer or data.tokenization == "llava"):
        raise UserError("data.template=toy is for tokenizers trained here: set data.template=v1 or another")
    if data.template != "toy" and not data.tokenizer:
        raise UserError(
            f"data.template={data.template}: needs --config.data.tokenizer=DIR, one of its language model"
        )
    if data.tokenizer and data.vocab_size != DataConfig().vocab_size:
        raise UserError(f"data.vocab_size={data.vocab_size}: is that of data.tokenizer; leave it away")
    if data.features == "computed" and data.feature_dtype != "float32":
        raise UserError(
            f"data.feature_dtype={data.feature_dtype}: is of stored outputs; data.features=computed"
        )
    if data.packing == "pack" and not data.row_length:
        raise UserError("data.packing=pack needs --config.data.row_length, such as 2048")
    if data.pack_rows != 1 and data.packing != "pack":
        raise UserError(f"data.pack_rows={data.pack_rows}: goes with data.packing=pack")
    if data.pack_rows < 1 or cell.train.batch_size % data.pack_rows:
        raise UserError(
            f"data.pack_rows={data.pack_rows}: must divide train.batch_size={cell.train.batch_size}"
        )
    for name in ("row_length", "workers"):
        if getattr(data, name) < 0:
            raise UserError(f"data.{name}={getattr(data, name)}: must not be negative")


def _check_train(cell: Cell) -> None:
    train, values = cell.train, {name: value for name, value, _ in leaves(cell)}
    _one_of("train.dtype", train.dtype, ("auto", "float32", "bfloat16"))
    _one_of("train.nonfinite", train.nonfinite, ("stop", "skip"))
    _one_of("train.batch_cells", train.batch_cells, ("auto", "always", "never"))
    _one_of("train.remat", train.remat, REMAT)
    _one_of("train.attention", train.attention, BACKENDS)
    not_negative = (
        "data.seed train.seed train.warmup_steps train.weight_decay train.clip_norm train.loss_rows "
        "train.compressor_rate train.llm_rate train.tower_rate train.reducer_rate mesh.data mesh.fsdp "
        "mesh.tensor"
    )
    for name in not_negative.split():
        if not 0 <= values[name] < math.inf:
            raise UserError(f"{name}={values[name]}: must not be negative, and finite")
    if train.seed >= 2**32:
        raise UserError(f"train.seed={train.seed}: must be below 2**32")
    if train.order_seed < -1:
        raise UserError(f"train.order_seed={train.order_seed}: a seed, or -1 for train.seed")
    if train.warmup_steps >= train.steps:
        raise UserError(f"train.warmup_steps={train.warmup_steps}: must be below train.steps={train.steps}")
    for name in ("train.final_rate", "train.beta2"):
        if not 0 <= values[name] <= 1 - (name == "train.beta2") * 1e-9:
            raise UserError(f"{name}={values[name]}: must be a share from 0 to 1")
    blocks = train.batch_size // cell.data.pack_rows
    if blocks % train.accumulate:
        raise UserError(
            f"train.accumulate={train.accumulate}: must divide the {blocks} blocks of rows of a batch "
            f"(train.batch_size={train.batch_size}, data.pack_rows={cell.data.pack_rows})"
        )
    if train.loss_rows and (train.batch_size // train.accumulate) % train.loss_rows:
        raise UserError(
            f"train.loss_rows={train.loss_rows}: must divide train.batch_size={train.batch_size} over "
            f"train.accumulate={train.accumulate}"
        )
    if train.profile and (len(train.profile) != 2 or not 1 <= train.profile[0] <= train.profile[1]):
        raise UserError(f"train.profile={train.profile}: first and last step, such as (100,105)")
    _check_parts(cell)


def _check_parts(cell: Cell) -> None:
    """What trains, and what it starts from."""
    train, sees = cell.train, cell.compressor.visual_tokens > 0
    others = train.compressor_rate or train.tower_rate or trains_reducer(cell)
    if not train.llm_rate and not (sees and others):
        raise UserError(
            "nothing trains: train.llm_rate is 0"
            + (
                ", and so are the rates of compressor and tower"
                if sees
                else " and a blind model has nothing else"
            )
        )
    if train.tower_rate and not sees:
        raise UserError(f"train.tower_rate={train.tower_rate}: a blind model has no tower")
    if train.tower_rate and cell.data.features != "computed":
        raise UserError(
            f"train.tower_rate={train.tower_rate}: a tower that trains runs in every step; set "
            "--config.data.features=computed"
        )
    if cell.llm.checkpoint and not cell.data.tokenizer:
        raise UserError(
            f"llm.checkpoint={cell.llm.checkpoint}: its embeddings are of its own tokens; set "
            f"--config.data.tokenizer={cell.llm.checkpoint} and --config.data.template"
        )


def _check_compressor(cell: Cell) -> None:
    compressor, tower = cell.compressor, TOWERS[cell.tower.name]
    options = parse_options(compressor.name, compressor.options)
    if compressor.visual_tokens:
        check_count(compressor.name, compressor.visual_tokens, tower.grid)
        COMPRESSORS[compressor.name].needs(tower, options)  # refuses what this tower cannot give
    check_evaluable(cell, "evaluate.visual_tokens", cell.evaluate.visual_tokens)
    if bool(cell.evaluate.tasks) != bool(cell.evaluate.data):
        raise UserError(
            f"evaluate.tasks={cell.evaluate.tasks!r} and evaluate.data={cell.evaluate.data!r} go together: "
            "names of benchmarks, and the directory of their task files"
        )


def _check_reducer(cell: Cell) -> None:
    spec = reducer_of(cell)
    reads = () if spec is None else REDUCERS[spec.name].reads
    for name, value, _ in leaves(cell.reducer):
        if name not in ("name", "options", *reads) and value != getattr(ReducerConfig(), name):
            owners = [other for other, method in REDUCERS.items() if name in method.reads]
            raise UserError(
                f"reducer.{name}={value}: reducer.name={cell.reducer.name} does not read it; it belongs to "
                f"{', '.join(owners)}"
            )
    if spec is not None and REDUCERS[spec.name].trained:
        _check_trained_reducer(cell, spec)
    if spec is not None:
        for count in cell.evaluate.visual_tokens or (cell.compressor.visual_tokens,):
            check_reducer(spec, SIZES[cell.llm.name].num_layers, count)
        if spec.patches is not None and cell.compressor.name != "mlp":
            raise UserError(
                f"reducer.options: patches=similar drops patches, which {cell.compressor.name} does not pass "
                "on one by one as mlp does; take patches=all"
            )
    if not trains_reducer(cell) and cell.train.reducer_rate != TrainConfig().reducer_rate:
        raise UserError(
            f"train.reducer_rate={cell.train.reducer_rate}: reducer.name={cell.reducer.name} does not train"
        )
    if spec is None and cell.reducer.options:
        raise UserError(f"reducer.options={cell.reducer.options}: goes with reducer.name")
    if "guide" in reads and not cell.reducer.guide:
        raise UserError(
            f"reducer.name={cell.reducer.name}: needs --config.reducer.guide=RUN of a smaller LLM"
        )
    if not 0 < cell.reducer.exit_above <= 1:
        raise UserError(f"reducer.exit_above={cell.reducer.exit_above}: a certainty above 0, or 1 for never")


def _check_trained_reducer(cell: Cell, spec: ReducerSpec) -> None:
    """What a method with parameters of its own cannot go with."""
    name, compressor = spec.name, cell.compressor.name
    if COMPRESSORS[compressor].nested is not None:
        raise UserError(
            f"reducer.name={name}: trains at one number of visual tokens, not at many as {compressor} does"
        )
    if not cell.train.reducer_rate:
        raise UserError(f"train.reducer_rate=0: reducer.name={name} trains with its model; give it a rate")
    if pays_for_a_batch(cell) and cell.train.accumulate > 1:
        raise UserError(
            f"train.accumulate={cell.train.accumulate}: reducer.name={name} pays for the mean share of a "
            "whole batch; take 1"
        )
    takes = attention_backends(cell)
    if cell.train.attention in BACKENDS and cell.train.attention not in takes:
        raise UserError(
            f"train.attention={cell.train.attention}: reducer.name={name} has a mask of its own; take "
            f"{' or '.join(takes)}"
        )


def pays_for_a_batch(cell: Cell) -> bool:
    """Whether the objective is no sum over rows, so that a batch cannot be computed in parts."""
    return cell.reducer.name in REDUCERS and REDUCERS[cell.reducer.name].soft is not None


def best_attention(cell: Cell, platform: str) -> str:
    """The fastest backend that a cell can train with on a "cpu", "gpu" or "tpu"."""
    fused = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
    return fused if fused in attention_backends(cell) else "xla"


def attention_backends(cell: Cell) -> list[str]:
    """Backends of attention that a cell can train with, where the device has them."""
    spec = reducer_of(cell)
    if spec is None or not REDUCERS[spec.name].trained:
        return list(BACKENDS)
    if spec.appended:
        return [name for name, backend in BACKENDS.items() if backend.free_mask]
    return [name for name, backend in BACKENDS.items() if not backend.fused]


def check_evaluable(cell: Cell, option: str, asked: Sequence[int]) -> None:
    """Refuse token counts that the trained model of a cell cannot be asked for.

    Raises:
      UserError: naming the option and what works.
    """
    known = evaluable_counts(cell)
    for count in asked:
        if type(count) is not int or count not in known:
            raise UserError(f"{option}: {count!r}: {_gives(cell, known)}")
    if len(set(asked)) < len(asked):
        raise UserError(f"{option}={asked}: names a count twice")


def _gives(cell: Cell, known: list[int]) -> str:
    name, many = (
        cell.compressor.name,
        [row for row, method in COMPRESSORS.items() if method.nested is not None],
    )
    if not known[-1]:
        return "a blind model has no visual tokens"
    if len(known) > 1 or name in many:
        return f"this {name} gives {spoken(known)}"
    most = "at most " if COMPRESSORS[name].adaptive(parse_options(name, cell.compressor.options)) else ""
    return f"one {name} model gives one count, here {most}{known[0]}; many are given by {', '.join(many)}"


def evaluable_counts(cell: Cell) -> list[int]:
    """Token counts that the trained model of a cell can be asked for; of an adaptive method its maximum."""
    largest, method = cell.compressor.visual_tokens, COMPRESSORS[cell.compressor.name]
    if method.nested is None or not largest:
        return [largest]
    if method.trains_all:
        return sorted(method.nested(largest))
    return list(range(1, largest + 1))  # its first tokens stand by themselves


def _check_weights(tower: TowerConfig) -> None:
    advice = "name a Hugging Face directory or a safetensors file with --config.tower.checkpoint=PATH"
    if not tower.checkpoint:
        raise UserError(f"tower.checkpoint is empty; {advice}")
    if tower.checkpoint == "shipped" and tower.name not in SHIPPED_TOWERS:
        raise UserError(
            f"tower.name={tower.name}: the package ships only the weights of {', '.join(SHIPPED_TOWERS)}; "
            f"{advice}"
        )


def _one_of(key: str, value: str, known: Any) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1, cutoff=0.0)[0]
        raise UserError(f"{key}={value}: unknown; the nearest is {near} (known: {', '.join(known)})")
