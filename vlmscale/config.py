"""The typed configuration of one cell: its fields, and the stable id that tells its results apart.

`loading.py` reads it from files, `validation.py` refuses what cannot run.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmscale.compressors import parse_options
from vlmscale.content import content_sha256, earlier_cell, manifest_sha256, tokenizer_sha256
from vlmscale.errors import UserError
from vlmscale.options import label
from vlmscale.reducers import REDUCERS, ReducerSpec, read_options

# A field with this metadata does not change any number of the result, so it is no part of the cell id.
_BYSTANDER = {"changes_result": False}
# A field with this metadata names a file; its content, not its path, goes into the cell id.
_CONTENT = {"content": True}
# The same of a field that may also name a directory in Hugging Face layout.
_CONTENT_OR_DIRECTORY = _CONTENT | {"directory": True}
# A field that came later counts only where it says something, so that ids of older cells stay.
_LATER = {"later": True}
LEAST_WEIGHT = 0.001  # how often an epoch shows a data set of a mixture
TEMPLATES = ("toy", "plain", "v1", "chatml", "llama3")  # of conversations, vlmscale/data/templates.py


@dataclass
class TowerConfig:
    """The vision tower, frozen unless `train.tower_rate` is above 0."""

    name: str = "scenes-48"
    # "shipped" is the demo's tower of the package; anything else is a safetensors file such as
    # `vlmscale tower` writes, or a directory in Hugging Face layout: a CLIP or SigLIP, or a LLaVA with one.
    checkpoint: str = field(default="shipped", metadata=_CONTENT_OR_DIRECTORY)


@dataclass
class CompressorConfig:
    """What stands between tower and LLM. `visual_tokens` = 0 is the blind model."""

    name: str = "pool"
    # Tokens of an image; of a method whose count depends on the image the most it may give, of one that is
    # trained for many counts the largest.
    visual_tokens: int = 16
    # Choices of the method's own, such as "placement=after"; several are separated by commas.
    options: str = ""


@dataclass
class LLMConfig:
    """The decoder, by its name in the size table."""

    name: str = "toy-135k"
    # Directory in Hugging Face layout with the weights that training starts from; "" starts from random ones.
    checkpoint: str = field(default="", metadata=_CONTENT_OR_DIRECTORY | _LATER)


@dataclass
class DataConfig:
    """What is trained and evaluated on."""

    # "scenes" draws the built-in data set; "llava" reads prepared data sets, or records and images.
    source: str = "scenes"
    # Directories of `vlmscale data prepare`, separated by commas; "DIR=0.5" shows half of one in an epoch.
    prepared: str = field(default="", metadata={"mixture": True} | _LATER)
    # A JSON file, prepared into the run's own directory: for small data.
    records: str = field(default="", metadata=_CONTENT)
    images: str = field(default="", metadata=_BYSTANDER)
    # Directory with a tokenizer.json; "" trains one on the run's own text.
    tokenizer: str = field(default="", metadata={"content": True, "tokenizer": True} | _LATER)
    # How conversations become text: see vlmscale/data/templates.py.
    template: str = field(default="toy", metadata=_LATER)
    # "inline": a picture stands where its placeholder does; "llava": ids and labels of LLaVA's own code.
    tokenization: str = field(default="inline", metadata=_LATER)
    # How a photograph becomes a square: "resize", "pad" or "crop".
    image_mode: str = "resize"
    # Sizes of the drawn splits, in images (source "scenes" only).
    train_images: int = 20_000
    validation_images: int = 200
    test_images: int = 400
    seed: int = 0
    vocab_size: int = 512
    # Text tokens of a conversation at most; what lies behind is cut off.
    max_text_tokens: int = 256
    # Positions in a row of a batch, visual tokens included; 0: as the longest conversation needs.
    row_length: int = field(default=0, metadata=_LATER)
    # "none": a conversation a row; "pack": as many as fit; "modality_length": a conversation a row, in the
    # order of LLaVA, whose batches have pictures or none, and similar lengths.
    packing: str = field(default="none", metadata=_LATER)
    # Rows that share their image slots when packed; train.batch_size must be a multiple.
    pack_rows: int = field(default=1, metadata=_LATER)
    # The frozen tower's outputs: "stored" once for all cells and epochs, or "computed" in the step.
    features: str = field(default="stored", metadata=_LATER)
    feature_dtype: str = field(default="float32", metadata=_LATER)
    # Processes that read and decode; 0: a thread of the training process.
    workers: int = field(default=0, metadata=_BYSTANDER)


@dataclass
class MeshConfig:
    """How devices share the work; changes a result by rounding alone. 0 is chosen by what fits."""

    data: int = field(default=0, metadata=_BYSTANDER)  # along the batch
    fsdp: int = field(default=0, metadata=_BYSTANDER)  # along batch and parameters
    tensor: int = field(default=0, metadata=_BYSTANDER)  # along heads, MLPs and vocabulary


@dataclass
class TrainConfig:
    """The recipe: AdamW, linear warm-up, cosine decay; which parts train, and how it runs."""

    steps: int = 2500
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    # Of the gradient's global norm; 0: no clipping.
    clip_norm: float = 1.0
    seed: int = 0
    # Of the order of the data; -1: `seed`. Cells that share it can train in one cohort.
    order_seed: int = field(default=-1, metadata=_LATER)
    # A run directory whose parameters this one starts from, as LLaVA's second stage does from its first.
    init_from: str = field(default="", metadata={"run": True} | _LATER)
    # What the learning rate is multiplied with in each part; 0 freezes it, and it costs no optimiser state.
    compressor_rate: float = field(default=1.0, metadata=_LATER)
    llm_rate: float = field(default=1.0, metadata=_LATER)
    tower_rate: float = field(default=0.0, metadata=_LATER)
    reducer_rate: float = field(default=1.0, metadata=_LATER)
    # Where the cosine ends, as a share of the peak.
    final_rate: float = field(default=0.02, metadata=_LATER)
    beta2: float = field(default=0.98, metadata=_LATER)
    # 0: the mean over all supervised tokens of a batch. n: the mean over groups of n rows of the mean in
    # each, as LLaVA has it with n rows a device.
    loss_rows: int = field(default=0, metadata=_LATER)
    # Of computation; parameters that train are float32. "auto": bfloat16, on a CPU float32.
    dtype: str = field(default="auto", metadata=_LATER)
    # A loss that is no finite number: "stop", or "skip" that step and count it.
    nonfinite: str = field(default="stop", metadata=_LATER)
    # Parts that a batch is computed in, one after the other, to save memory.
    accumulate: int = field(default=1, metadata=_BYSTANDER)
    # What the backward pass computes again: "block", "dots" or "none" (vlmscale/models/decoder.py).
    remat: str = field(default="block", metadata=_BYSTANDER)
    # Backend of attention (vlmscale/attention.py).
    attention: str = field(default="xla", metadata=_BYSTANDER)
    # Positions of a device whose logits exist at once.
    loss_chunk: int = field(default=256, metadata=_BYSTANDER)
    # Cells of a cohort that differ in seed and learning rate alone as one batched program: "auto" measures
    # both at the first launch; "always", "never".
    batch_cells: str = field(default="auto", metadata=_BYSTANDER)
    log_every: int = field(default=1, metadata=_BYSTANDER)
    heldout_every: int = field(default=500, metadata=_BYSTANDER)
    checkpoint_every: int = field(default=100, metadata=_BYSTANDER)
    keep: int = field(default=2, metadata=_BYSTANDER)  # checkpoints
    # First and last step that the profiler watches, such as (100, 105).
    profile: tuple[int, ...] = field(default=(), metadata=_BYSTANDER)


@dataclass
class EvaluateConfig:
    """Greedy answers to every question of the evaluated split."""

    max_new_tokens: int = 8
    batch_size: int = field(default=400, metadata=_BYSTANDER)
    # "none": each question alone; "gold": behind the conversation so far with its true answers.
    history: str = "none"
    # Token counts to evaluate at, for methods whose one model gives many; () for the compressor's own. Says
    # which rows there are, but changes none.
    visual_tokens: tuple[int, ...] = field(default=(), metadata=_BYSTANDER)
    # Benchmarks or groups of them, "reasoning,textvqa", that are asked in place of the questions of the data,
    # from the task files in directory `data`; and whether every question is asked without its picture too.
    tasks: str = field(default="", metadata=_BYSTANDER)
    data: str = field(default="", metadata=_BYSTANDER)
    blind: bool = field(default=False, metadata=_BYSTANDER)


@dataclass
class ReducerConfig:
    """What drops visual tokens inside the LLM; "none" is the plain model.

    Most methods are asked of a trained run. Those with parameters of their own are trained with it.
    """

    name: str = field(default="none", metadata=_LATER)
    # So many layers see all visual tokens; from the next one on the share `keep` of them is there. Of a
    # method that trains its shares, `keep` is their mean over all layers.
    layer: int = field(default=2, metadata=_LATER)
    keep: float = field(default=0.5, metadata=_LATER)
    # Of a method with a share for every layer, in their place; the last share holds for all further layers.
    schedule: tuple[float, ...] = field(default=(), metadata=_LATER)
    # The run of a smaller LLM, trained on the same data, that says which visual tokens stay; and from what
    # certainty of its own on its answer stands, as the mean of two probabilities. 1: never.
    guide: str = field(default="", metadata={"run": True} | _LATER)
    exit_above: float = field(default=1.0, metadata=_LATER)
    # Choices of the method's own, such as "score=received"; several are separated by commas.
    options: str = field(default="", metadata=_LATER)


@dataclass
class Cell:
    """Everything that one trained and evaluated model is made from."""

    tower: TowerConfig = field(default_factory=TowerConfig)
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    reducer: ReducerConfig = field(default_factory=ReducerConfig)


@dataclass
class Sweep:
    """A named list of cells that share tower, data and tokenizer."""

    name: str
    cells: list[Cell]


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, metadata) of every field below a config dataclass, in order."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Directories and weights of `data.prepared`: "A,B=0.5" is A once and half of B an epoch.

    Raises:
      UserError: an empty name, a data set twice, or a weight that is no number of `LEAST_WEIGHT` or more.
    """
    parts = []
    for word in text.split(",") if text else []:
        path, _, weight = word.strip().rpartition("=") if "=" in word else (word.strip(), "", "1")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not path or not LEAST_WEIGHT <= number < math.inf:
            what = f"write DIR, or DIR=WEIGHT with a WEIGHT of {LEAST_WEIGHT} or more"
            raise UserError(f"data.prepared: {word.strip()!r}: {what}")
        parts.append((path, number))
    places = [Path(path).resolve() for path, _ in parts]
    for (path, _), place in zip(parts, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"data.prepared: {path} is named twice; write {path}=2 to show it twice an epoch")
    return parts


def reducer_of(cell: Cell) -> ReducerSpec | None:
    """What drops visual tokens inside a cell's LLM; None for nothing.

    Raises:
      UserError: a name or an option is unknown.
    """
    own = cell.reducer
    if own.name == "none":
        return None
    options = read_options(own.name, own.options)
    return ReducerSpec(own.name, own.layer, own.keep, own.schedule, options)


def image_slots(cell: Cell, visual_tokens: int | None = None) -> int:
    """Places that an image takes in a row: its visual tokens, and what a reducer puts behind them.

    Args:
      cell: the config.
      visual_tokens: of an image, 0 for none; None for the config's.
    """
    tokens = cell.compressor.visual_tokens if visual_tokens is None else visual_tokens
    spec = reducer_of(cell)
    return tokens + (spec.appended if spec is not None and tokens else 0)


def trains_reducer(cell: Cell) -> bool:
    """Whether a cell's reducer has parameters of its own."""
    return cell.reducer.name in REDUCERS and REDUCERS[cell.reducer.name].trained


def reducer_label(cell: Cell) -> str | None:
    """What records call what drops visual tokens inside a cell's LLM; None for nothing.

    Raises:
      UserError: a name or an option is unknown, or the guide is no run.
    """
    spec, own = reducer_of(cell), cell.reducer
    if spec is None:
        return None
    guide = {"guide": earlier_cell("reducer.guide", Path(own.guide))} if own.guide else {}
    leaves_early = {"exit_above": f"{own.exit_above:g}"} if own.exit_above < 1 else {}
    return label(spec.label, guide | leaves_early)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Cell:
    """The inverse of `to_dict`."""
    kinds = {item.name: type(getattr(Cell(), item.name)) for item in dataclasses.fields(Cell)}
    cell = Cell(**{name: kinds[name](**part) for name, part in values.items()})
    cell.evaluate.visual_tokens = tuple(cell.evaluate.visual_tokens)  # JSON has lists alone
    cell.train.profile = tuple(cell.train.profile)
    cell.reducer.schedule = tuple(cell.reducer.schedule)
    return cell


def cell_id(cell: Cell) -> str:
    """Hash of everything that changes the result and nothing else: 12 hex digits.

    Files and directories count by content, so that a moved or copied one leaves the id alone; an earlier run
    counts by the id of its cell, so that a second stage can be queued behind a first that is not done.

    Raises:
      UserError: a named file or directory cannot be read.
    """
    parts = identity(cell)
    # A field that came later counts only where it says something, so that ids of older cells stay.
    options = parse_options(cell.compressor.name, parts.pop("compressor.options"))
    own = cell.reducer
    if own.name in REDUCERS and parts.pop("reducer.options", None) and read_options(own.name, own.options):
        parts["reducer.options"] = dict(read_options(own.name, own.options))
    if not cell.compressor.visual_tokens:
        del parts["compressor.name"]  # a blind model has no compressor
    elif options:
        parts["compressor.options"] = options
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def identity(config: Any) -> dict[str, Any]:
    """Every field that changes a result, by dotted name; a file or directory stands for its content.

    Raises:
      UserError: a named file or directory cannot be read.
    """
    default = {name: value for name, value, _ in leaves(type(config)())}
    return {
        name: _content(name, value, metadata)
        for name, value, metadata in leaves(config)
        if metadata.get("changes_result", True) and not (metadata.get("later") and value == default[name])
    }


def _content(name: str, value: Any, metadata: Any) -> Any:
    """What of a field's value counts."""
    if value in ("", "shipped"):
        return value
    if metadata.get("run"):
        return earlier_cell(name, Path(value))
    if metadata.get("mixture"):
        return [[manifest_sha256(name, Path(path)), weight] for path, weight in parse_mixture(value)]
    if metadata.get("tokenizer"):
        return tokenizer_sha256(name, Path(value))
    if metadata.get("content"):
        return content_sha256(name, Path(value), metadata.get("directory", False))
    return value
