"""How long an answer takes, by a small model that is fitted to measurements (`vlmscale bench latency`).

Prefill and a decoded token are sums of terms that are never negative: a constant, the weights that are read,
the products with them, and attention's share (of the prefill its products, of a decoded token the cache that
is read). The terms follow from an LLM's shape, or from N alone with the proportions of a usual decoder.
Batches of B answers are timed as a whole: what one waits is what all wait. Pure numpy and scipy; reads files
alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from analysis.units import count, percent, significant
from analysis.values import LEAST, DataError, read_json, shown, to_number

ASPECT = 128.0  # width over depth of a usual decoder; with n = 12 L d^2 it gives both from n
KIND, FORM = "vlmscale latency", 1
PREFILL_TERMS = ("constant_ms", "ms_per_gparam_read", "ms_per_tflop", "ms_per_attention_tflop")
DECODE_TERMS = ("constant_ms", "ms_per_gparam_read", "ms_per_tflop", "ms_per_cache_gb")
LEAST_CELLS = 4
_HUGE = 1e15
LEFT_OUT_LLMS = 3
_ITEM = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


class Shape(NamedTuple):
    """What of an LLM its time depends on; numbers, or arrays of several LLMs.

    params: all parameters. linear: those of the layers' matrices, which every token passes. head: those of
    the head's matrix. attention: width of all queries of a layer, summed over layers. kv_bytes: what the
    cache keeps of a token.
    """

    params: Any
    linear: Any
    head: Any
    attention: Any
    kv_bytes: Any


class Part(NamedTuple):
    """Coefficients of one part, in the order of its terms, and the relative errors of the fit."""

    coefficients: tuple[float, ...]
    median_error: float
    worst_error: float


class Model(NamedTuple):
    """Both parts, fitted to one kind of shapes."""

    prefill: Part
    decode: Part


@dataclass(frozen=True)
class Images:
    """Measured milliseconds a batch of images: of the tower, and of the compressor by V (median over LLMs).

    batches: [b], ascending. tower: [b]. counts: [c], ascending. compressor: [b][c]. query_pass: the
    compressor first runs the LLM over the text.
    """

    batches: tuple[float, ...]
    tower: tuple[float, ...]
    counts: tuple[float, ...]
    compressor: tuple[tuple[float, ...], ...]
    query_pass: bool

    def milliseconds(self, v: np.ndarray, batch: float) -> np.ndarray:
        """Of both at v and `batch`: interpolated, in ln V; beyond the largest batch in proportion to it."""
        log_v = np.log(np.maximum(v, 1.0))
        by_batch = [
            tower + np.interp(log_v, np.log(self.counts), of_counts)
            for tower, of_counts in zip(self.tower, self.compressor, strict=True)
        ]
        beyond = max(1.0, batch / self.batches[-1])
        place = float(np.interp(batch, self.batches, np.arange(len(self.batches))))
        low = min(int(place), len(by_batch) - 1)
        high = min(low + 1, len(by_batch) - 1)
        return np.asarray(beyond * (by_batch[low] + (place - low) * (by_batch[high] - by_batch[low])))


def usual(n: Any, itemsize: float) -> Shape:
    """The shape of a decoder of n parameters, usual proportions and no embeddings; `itemsize` in bytes."""
    n = np.asarray(n, dtype=np.float64)
    width = (n * ASPECT / 12) ** (1 / 3)
    return Shape(n, n, 0.0 * n, width**2 / ASPECT, 2 * itemsize * width**2 / ASPECT)


def prefill_terms(shape: Shape, length: Any, batch: Any) -> np.ndarray:
    """[..., 4] of a batch of prompts of `length` tokens, in the units of `PREFILL_TERMS`."""
    products = 2 * batch * (shape.linear * length + shape.head)
    attention = 4 * shape.attention * batch * length * (length + 1) / 2
    return _stack(1.0, (shape.linear + shape.head) / 1e9, products / 1e12, attention / 1e12)


def decode_terms(shape: Shape, context: Any, batch: Any) -> np.ndarray:
    """[..., 4] of one more token a row behind `context` cache slots, in the units of `DECODE_TERMS`."""
    read = shape.linear + shape.head
    return _stack(1.0, read / 1e9, 2 * batch * read / 1e12, shape.kv_bytes * context * batch / 1e9)


def _stack(*terms: Any) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*(np.asarray(term, dtype=np.float64) for term in terms)), axis=-1)


def answer_ms(
    model: Model, shape: Shape, prompt: Any, generated: float, batch: float, query: float = 0.0
) -> np.ndarray:
    """Milliseconds of the LLM for a batch of answers.

    The first token comes with the prefill, the last is not fed back.

    Args:
      model: fitted.
      shape: of the LLM, or of several.
      prompt: tokens of text and of the image.
      generated: tokens of an answer.
      batch: answers at once.
      query: tokens that the LLM reads beforehand for a compressor, 0 for none.
    """
    total = prefill_terms(shape, prompt, batch) @ np.array(model.prefill.coefficients)
    if query:
        total = total + prefill_terms(shape, query, batch) @ np.array(model.prefill.coefficients)
    steps = max(generated - 1, 0.0)
    terms = decode_terms(shape, prompt + generated, batch)
    return np.asarray(total + steps * (terms @ np.array(model.decode.coefficients)))


@dataclass(frozen=True)
class FittedLatency:
    """A cost: milliseconds until a batch of answers is done, by a model of a latency file.

    source, device, dtype: of the file. itemsize: bytes of a weight. sizes: parameters of the smallest and the
    largest LLM that was timed. images: None where no tower was timed.
    text_tokens: Q of the prompt. gen_tokens: decoded tokens. batch: answers at once.
    """

    source: str
    device: str
    dtype: str
    itemsize: float
    sizes: tuple[float, float]
    model: Model
    images: Images | None = None
    text_tokens: float = math.nan
    gen_tokens: float = 0.0
    batch: float = 1.0
    unit: str = field(default="ms", init=False)
    plain: bool = field(default=False, init=False)

    def of(self, shape: Shape, v: np.ndarray | float) -> np.ndarray:
        """Milliseconds of an LLM of this shape on v visual tokens; broadcasts."""
        v = np.asarray(v, dtype=np.float64)
        query = self.text_tokens if self.images and self.images.query_pass else 0.0
        prompt = self.text_tokens + v
        llm = answer_ms(self.model, shape, prompt, self.gen_tokens, self.batch, query)
        return llm + self.images.milliseconds(v, self.batch) if self.images else llm

    def __call__(self, n: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """Milliseconds at n (a parameter count, usual proportions) and v visual tokens; broadcasts."""
        return self.of(usual(n, self.itemsize), v)

    def size_for(self, budget: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """The n that takes `budget` milliseconds at v; 0 where no LLM is that fast."""
        v = np.asarray(v, dtype=np.float64)
        nothing, huge = usual(0.0, self.itemsize), usual(_HUGE, self.itemsize)
        fixed = self.of(nothing, v)
        # The time is fixed + b n + c n^(2/3): of the weights, and of what grows as width times depth does.
        # Both are taken at a size at which what is fixed does not drown them.
        b = (self.of(nothing._replace(linear=_HUGE), v) - fixed) / _HUGE
        c = self.of(nothing._replace(attention=huge.attention, kv_bytes=huge.kv_bytes), v) - fixed
        c = c / _HUGE ** (2 / 3)
        left = np.maximum(np.asarray(budget) - fixed, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.fmin(np.cbrt(left / b), np.sqrt(left / c))
        root = np.where(left > 0, root, 0.0)
        for _ in range(30):  # Newton for the cube root of n, from above: the left side is convex
            slope = np.maximum((3 * b * root + 2 * c) * root, 1e-300)
            root = np.maximum(root - (b * root**3 + c * root**2 - left) / slope, 0.0)
        return np.asarray(root**3)

    def describe(self) -> str:
        """What it is, for a caption."""
        text = f"latency on {self.device} ({self.dtype}) by the model of {self.source}, which was fitted to "
        text += f"LLMs of {count(self.sizes[0])} to {count(self.sizes[1])} parameters"
        text += f", Q = {significant(self.text_tokens)}"
        if self.gen_tokens:
            text += f", {self.gen_tokens:g} decoded tokens"
        text += f", batches of {self.batch:g}" if self.batch != 1 else ""
        text += ", tower and compressor included" if self.images else ", without the vision tower"
        errors = f"prefill {percent(self.model.prefill.worst_error, 0)}"
        if self.gen_tokens > 1:
            errors += f" and decoding {percent(self.model.decode.worst_error, 0)}"
        return f"{text} (largest error of the fit: {errors})"


def _solve(terms: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Coefficients [k] >= 0 of least squares of the relative errors, terms [cells, k]."""
    rows = terms / ms[:, None]
    scale = np.where(rows.max(axis=0) > 0, rows.max(axis=0), 1.0)
    found, _ = nnls(rows / scale, np.ones_like(ms))
    return np.asarray(found / scale)


def _relative(terms: np.ndarray, ms: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    return np.abs(terms @ coefficients / ms - 1)


def _fit_part(names: Sequence[str], terms: np.ndarray, ms: np.ndarray, llms: np.ndarray) -> dict[str, Any]:
    """Coefficients by name, errors, and, of three LLMs or more, the errors on each of a fit without it."""
    found = _solve(terms, ms)
    error = _relative(terms, ms, found)
    part: dict[str, Any] = {
        "coefficients": dict(zip(names, found.tolist(), strict=True)),
        "median_error": float(np.median(error)),
        "worst_error": float(error.max()),
        "left_out_median_error": None,
        "left_out_worst_error": None,
    }
    if len(set(llms)) >= LEFT_OUT_LLMS:
        left = [
            _relative(terms[own], ms[own], _solve(terms[~own], ms[~own]))
            for own in (llms == name for name in sorted(set(llms)))
        ]
        part["left_out_median_error"] = float(np.median(np.concatenate(left)))
        part["left_out_worst_error"] = float(np.concatenate(left).max())
    return part


def fit_models(
    llms: Mapping[str, Mapping[str, float]], cells: Sequence[Mapping[str, Any]], dtype: str
) -> dict[str, Any]:
    """The `models` of a latency file.

    "shape" is fitted to the LLMs' own shapes, for those that are known by name; "size" to N alone, for the N
    in between.

    Args:
      llms: fields of `Shape` by name.
      cells: with llm_name, visual_tokens, text_tokens, batch, gen_tokens, prefill_ms and decode_ms.
      dtype: of the weights.

    Raises:
      DataError: fewer cells than a part has coefficients.
    """
    if len(cells) < LEAST_CELLS:
        raise DataError(f"{len(cells)} cells were timed; a fit needs {LEAST_CELLS}")
    names = np.array([cell["llm_name"] for cell in cells])
    length, batch, generated, prefill, decode = (
        np.array([cell[key] for cell in cells], dtype=np.float64)
        for key in ("visual_tokens", "batch", "gen_tokens", "prefill_ms", "decode_ms")
    )
    length = length + np.array([cell["text_tokens"] for cell in cells], dtype=np.float64)
    own = Shape(*(np.array([llms[name][key] for name in names]) for key in Shape._fields))
    models = {}
    for name, shape in (("shape", own), ("size", usual(own.params, _ITEM[dtype]))):
        models[name] = {
            "prefill": _fit_part(PREFILL_TERMS, prefill_terms(shape, length, batch), prefill, names),
            "decode": _fit_part(DECODE_TERMS, decode_terms(shape, length + generated, batch), decode, names),
        }
    return models


def read_latency(path: Path, by: str) -> FittedLatency:
    """The cost of a latency file, its tokens and batch still to be set.

    Args:
      path: what `vlmscale bench latency` wrote.
      by: "shape" for LLMs whose shape is known, "size" for any N.

    Raises:
      DataError: one line, for a file that is absent, no JSON, of another kind, or without coefficients.
    """
    where = str(path)
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise DataError(f'{where}: no latency file (kind is not "{KIND}"); vlmscale bench latency makes one')
    if found.get("version") != FORM:
        raise DataError(f"{where}: version {shown(found.get('version'))}, this reads {FORM}; measure again")
    dtype = found.get("dtype")
    if dtype not in _ITEM:
        raise DataError(f"{where}: dtype must be one of {', '.join(_ITEM)}, got {shown(dtype)}")
    if found.get("models") is None:
        reason = found.get("no_fit") or "models is missing"
        raise DataError(f"{where}: no coefficients ({reason}); measure more cells")
    own = _object(_object(found, "models", where), by, f"{where}: models")
    inside = f"{where}: models.{by}"
    model = Model(_part(own, "prefill", PREFILL_TERMS, inside), _part(own, "decode", DECODE_TERMS, inside))
    if not any(model.prefill.coefficients[1:]):
        raise DataError(f"{inside}: prefill does not grow with the LLM; measure larger LLMs or prompts")
    device = _object(found, "device", where).get("kind")
    if not isinstance(device, str) or not device.isprintable():
        raise DataError(f"{where}: device.kind must be a name, got {shown(device)}")
    return FittedLatency(
        path.name, device, dtype, _ITEM[dtype], _sizes(found, where), model, _images(found, where)
    )


def _sizes(found: Mapping[str, Any], where: str) -> tuple[float, float]:
    llms = _object(found, "llms", where)
    sizes = [_positive(_object(llms, name, f"{where}: llms"), "params", f"{where}: {name}") for name in llms]
    if not sizes:
        raise DataError(f"{where}: llms is empty; measure again")
    return min(sizes), max(sizes)


def _object(value: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise DataError(f"{where}: {key} is missing or no object")
    return found


def _part(model: dict[str, Any], key: str, names: Sequence[str], where: str) -> Part:
    part = _object(model, key, where)
    numbers = _object(part, "coefficients", f"{where}.{key}")
    where = f"{where}.{key}"
    coefficients = tuple(to_number(numbers.get(name), name, where) for name in names)
    errors = (to_number(part.get(name), name, where) for name in ("median_error", "worst_error"))
    return Part(coefficients, *errors)


def _images(found: Mapping[str, Any], where: str) -> Images | None:
    if found.get("images") is None:
        return None
    images = _object(found, "images", where)
    where = f"{where}: images"
    towers: dict[float, float] = {}
    compressors: dict[tuple[float, float], list[float]] = {}
    for row in _rows(images, "tower_ms", where):
        towers[_positive(row, "batch", where)] = _positive(row, "ms", where)
    for row in _rows(images, "compressor_ms", where):
        key = _positive(row, "batch", where), _positive(row, "visual_tokens", where)
        compressors.setdefault(key, []).append(_positive(row, "ms", where))
    batches = tuple(sorted(towers.keys() & {batch for batch, _ in compressors}))
    counts = tuple(sorted({v for _, v in compressors}))
    if not batches:
        raise DataError(f"{where}: no batch for which both tower and compressor were timed; measure again")
    lacking = [(b, v) for b in batches for v in counts if (b, v) not in compressors]
    if lacking:
        batch, v = lacking[0]
        raise DataError(f"{where}: compressor_ms lacks batch {batch:g} at {v:g} visual tokens; measure again")
    medians = tuple(tuple(float(np.median(compressors[b, v])) for v in counts) for b in batches)
    query_pass = images.get("query_pass") is True
    return Images(batches, tuple(towers[b] for b in batches), counts, medians, query_pass)


def _rows(images: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    rows = images.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{where}: {key} is missing or no list of objects")
    return rows


def _positive(row: Mapping[str, Any], key: str, where: str) -> float:
    return to_number(row.get(key), key, where, LEAST)
