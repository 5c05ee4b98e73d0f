"""The typed configuration of one cell: fields, loading with overrides, validation, stable ids.

A config file is Python with `get_config(arg: str) -> Cell`. It is loaded through ml_collections, so
`--config FILE[:ARG] --config.train.steps=10` works from any command.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_flags

from vlmscale.compressors import COMPRESSORS, check_count, parse_options, spoken
from vlmscale.content import content_sha256, manifest_sha256, tokenizer_sha256
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES, TOWERS

# A field with this metadata does not change any number of the result, so it is no part of the cell id.
_BYSTANDER = {"changes_result": False}
# A field with this metadata names a file; its content, not its path, goes into the cell id.
_CONTENT = {"content": True}
# The same of a field that may also name a directory in Hugging Face layout.
_CONTENT_OR_DIRECTORY = _CONTENT | {"directory": True}
# A field that came later counts only where it says something, so that ids of older cells stay.
_LATER = {"later": True}
SHIPPED_TOWERS = ("scenes-48",)
T = TypeVar("T")
LEAST_WEIGHT = 0.001  # how often an epoch shows a data set of a mixture
TEMPLATES = ("toy", "plain", "v1", "chatml", "llama3")  # of conversations, vlmscale/data/templates.py


@dataclass
class TowerConfig:
    """The frozen vision tower."""

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
class TrainConfig:
    """The recipe: AdamW, linear warm-up, cosine decay to 2 percent."""

    steps: int = 2500
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    seed: int = 0
    log_every: int = field(default=1, metadata=_BYSTANDER)
    heldout_every: int = field(default=500, metadata=_BYSTANDER)
    checkpoint_every: int = field(default=100, metadata=_BYSTANDER)


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


@dataclass
class Cell:
    """Everything that one trained and evaluated model is made from."""

    tower: TowerConfig = field(default_factory=TowerConfig)
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass
class Sweep:
    """A named list of cells that share tower, data and tokenizer."""

    name: str
    cells: list[Cell]


def load_cell(spec: str, overrides: Sequence[str]) -> Cell:
    """Read `FILE[:ARG]` and apply overrides such as `--config.train.steps=10`.

    Args:
      spec: path of a config file, looked up in the working directory and then among the shipped ones.
      overrides: command-line words, each `--config.KEY=VALUE`.

    Returns:
      A validated cell.

    Raises:
      UserError: file missing or faulty, unknown key (the nearest is named), wrong type, bad combination.
    """
    path, separator, argument = spec.partition(":")
    for word in overrides:
        _check_override(word)
    values = flags.FlagValues()
    argv = ["vlmscale", f"--config={find_config(path)}{separator}{argument}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    # ml_collections loads every config file under this one module name: without this a file that lacks
    # get_config would silently get that of the file before.
    sys.modules.pop("config_config", None)
    try:
        values(argv)
        cell = values["config"].value
    except flags.IllegalFlagValueError as error:
        lines = str(error).strip().splitlines()  # from get_config: a whole traceback, the reason last
        where = "wrong type or value" if len(lines) == 1 else path
        raise UserError(f"{where}: {lines[-1].strip()}") from error
    except UserError:
        raise
    except Exception as error:  # a config file is a program of the user's: it may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(cell, Cell):
        raise UserError(f"{path}: get_config must return a vlmscale.config.Cell, not {type(cell).__name__}")
    validate(cell)
    return cell


def find_config(path: str) -> Path:
    """The file itself, or the shipped one of the same name under `configs/`."""
    given = Path(path)
    if given.is_file():
        return given
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    for root in config_roots():
        if (root / relative).is_file():
            return root / relative
    raise UserError(f"config {path}: no such file, and none of that name ships with vlmscale")


def config_roots() -> Iterator[Path]:
    """Where shipped configs lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    yield from (root for root in (package / "configs", package.parent / "configs") if root.is_dir())


def _check_override(word: str) -> None:
    key, equals, _ = word.partition("=")
    if not key.startswith("--config.") or not equals:
        raise UserError(f"{word}: an override reads --config.KEY=VALUE")
    key = key.removeprefix("--config.")
    known = [name for name, _, _ in leaves(Cell())]
    if key not in known:
        near = [name for name in known if name.endswith(f".{key}")]  # only its part is missing
        near += difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise UserError(f"unknown config key {key}; the nearest is {near[0]}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, metadata) of every field below a config dataclass, in order."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


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
    _check_data(cell)
    positive = (
        "data.train_images data.validation_images data.test_images data.max_text_tokens train.steps "
        "train.batch_size train.learning_rate train.clip_norm train.log_every train.heldout_every "
        "train.checkpoint_every evaluate.max_new_tokens evaluate.batch_size"
    )
    values = {name: value for name, value, _ in leaves(cell)}
    for name in positive.split():
        if not 0 < values[name] < math.inf:
            raise UserError(f"{name}={values[name]}: must be above 0 and finite")
    for name in ("data.seed", "train.seed"):
        if values[name] < 0:
            raise UserError(f"{name}={values[name]}: must not be negative")
    if not 0 <= cell.train.warmup_steps < cell.train.steps:
        raise UserError(
            f"train.warmup_steps={cell.train.warmup_steps}: must be below train.steps={cell.train.steps}"
        )
    if not 0 <= cell.train.weight_decay < math.inf:
        raise UserError(f"train.weight_decay={cell.train.weight_decay}: must not be negative")
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


def _check_compressor(cell: Cell) -> None:
    compressor, tower = cell.compressor, TOWERS[cell.tower.name]
    options = parse_options(compressor.name, compressor.options)
    if compressor.visual_tokens:
        check_count(compressor.name, compressor.visual_tokens, tower.grid)
        COMPRESSORS[compressor.name].needs(tower, options)  # refuses what this tower cannot give
    check_evaluable(cell, "evaluate.visual_tokens", cell.evaluate.visual_tokens)


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


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Cell:
    """The inverse of `to_dict`."""
    kinds = {item.name: type(getattr(Cell(), item.name)) for item in dataclasses.fields(Cell)}
    cell = Cell(**{name: kinds[name](**part) for name, part in values.items()})
    cell.evaluate.visual_tokens = tuple(cell.evaluate.visual_tokens)  # JSON has lists alone
    return cell


def cell_id(cell: Cell) -> str:
    """Hash of everything that changes the result and nothing else: 12 hex digits.

    Files and directories count by content, so that a moved or copied one leaves the id alone.

    Raises:
      UserError: a named file or directory cannot be read.
    """
    parts = identity(cell)
    # A field that came later counts only where it says something, so that ids of older cells stay.
    options = parse_options(cell.compressor.name, parts.pop("compressor.options"))
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
    if metadata.get("mixture"):
        return [[manifest_sha256(name, Path(path)), weight] for path, weight in parse_mixture(value)]
    if metadata.get("tokenizer"):
        return tokenizer_sha256(name, Path(value))
    if metadata.get("content"):
        return content_sha256(name, Path(value), metadata.get("directory", False))
    return value


def load_data(spec: str) -> DataConfig:
    """The data of a file with `get_data(arg)`, such as `configs/data/llava_instruct.py:DIR`.

    Args:
      spec: FILE[:ARG], the file looked up as those of `load_cell` are.

    Raises:
      UserError: the file is missing or faulty.
    """
    path, _, argument = spec.partition(":")
    return _run_file(path, "a data definition", "get_data(arg)", argument, DataConfig)


def load_sweep(path: str, overrides: Sequence[str]) -> Sweep:
    """Read a sweep file: Python with `get_sweep(overrides) -> Sweep`.

    Raises:
      UserError: file missing or faulty, no cells, or the same cell twice.
    """
    sweep = _run_file(path, "a sweep file", "get_sweep(overrides)", overrides, Sweep)
    for cell in sweep.cells:
        validate(cell)
    ids = [cell_id(cell) for cell in sweep.cells]
    if not ids or len(set(ids)) < len(ids):
        raise UserError(f"{path}: has {len(ids)} cells, {len(set(ids))} of them distinct")
    return sweep


def _run_file(path: str, what: str, signature: str, argument: Any, kind: type[T]) -> T:
    """What the function of a config file returns: it is a program of the user's, and may raise anything."""
    found, name = find_config(path), signature.partition("(")[0]
    try:
        scope = runpy.run_path(str(found))
        if name not in scope:
            raise UserError(f"{path}: {what} defines {signature}")
        made = scope[name](argument)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(made, kind):
        raise UserError(
            f"{path}: {name} must return a vlmscale.config.{kind.__name__}, not {type(made).__name__}"
        )
    return made
