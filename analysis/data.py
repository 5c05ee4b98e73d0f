"""Rows of a sweep into one small table a task group: what is measured, checked line by line.

Owns reading (`results.jsonl`, CSV, the paper's published numbers), validation and averaging over tasks and
seeds. It does not fit. A cell with no image (visual_tokens = 0) is kept apart as a reference: no law sees it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.units import count

PAPER_DATA = Path(__file__).parent / "paper_data"
BUILT_IN = {"paper-reasoning": ("reasoning", "reasoning.csv"), "paper-ocr": ("ocr", "ocr.csv")}
PAPER_TEXT_TOKENS = 50.0
_UNFINISHED = ("pending", "running", "preempted", "failed")
# Two rows of one (LLM, V, task) that differ in one of these are two set-ups: never averaged together.
_SETUP = (
    "compressor",
    "reducer",
    "vision_tower",
    "image_size",
    "data_mix",
    "data_samples",
    "lr",
    "split",
    "prompt_id",
    "scorer",
    "metric",
)
_COLUMNS = ("n", "v", "error", "n_items", "sampling_sd", "chance", "text_tokens", "infer_flops", "seeds")


class DataError(Exception):
    """The data cannot be used: one line that names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Row:
    """One checked score: a (cell, task). `where` is 'file:line'; a number that the file lacks is None."""

    where: str
    llm_name: str
    n: float
    v: float
    task: str
    group: str
    seed: int
    score: float
    n_items: float | None
    chance: float | None
    blind_score: float | None
    text_tokens: float | None
    infer_flops: float | None
    setup: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The measured cells of one task group, ordered by (n, v); all arrays are float64 [cells], v >= 1.

    n: parameters (a count). error: 1 - plain mean of the task scores, averaged over seeds. n_items: items of
    all tasks and seeds. sampling_sd: binomial noise of `error`. Where the data lacks a figure it is NaN.
    `blind`: per LLM name the error without an image (in no array). `dropped`: cells left out, each with its
    reason.
    """

    group: str
    source: str
    tasks: tuple[str, ...]
    llm_name: tuple[str, ...]
    n: np.ndarray
    v: np.ndarray
    error: np.ndarray
    n_items: np.ndarray
    sampling_sd: np.ndarray
    chance: np.ndarray
    text_tokens: np.ndarray
    infer_flops: np.ndarray
    seeds: np.ndarray
    blind: dict[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def sizes(self) -> np.ndarray:
        """Distinct parameter counts, ascending."""
        return np.unique(self.n)

    @property
    def token_counts(self) -> np.ndarray:
        """Distinct visual token counts (>= 1), ascending."""
        return np.unique(self.v)

    def mean_text_tokens(self) -> tuple[float, bool]:
        """(Q, measured): mean text tokens of the cells, or the paper's 50 and False if not recorded."""
        known = self.text_tokens[np.isfinite(self.text_tokens)]
        return (float(known.mean()), True) if known.size else (PAPER_TEXT_TOKENS, False)

    def without(self, index: int) -> Table:
        """The same table without cell `index`."""
        keep = np.arange(self.n.size) != index
        arrays = {name: value[keep] for name, value in self.__dict__.items() if isinstance(value, np.ndarray)}
        names = tuple(name for name, kept in zip(self.llm_name, keep, strict=True) if kept)
        return Table(**{**self.__dict__, **arrays, "llm_name": names})


@dataclass(frozen=True)
class Dataset:
    """What one source holds: a table a task group, the hash of the bytes, where the rows came from."""

    source: str
    sha256: str
    rows: int
    unfinished: int
    tables: tuple[Table, ...]
    versions: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


def load(source: Path | str) -> Dataset:
    """Read `source`: a sweep directory, a `.jsonl` or `.csv` file, 'paper-reasoning' or 'paper-ocr'.

    Raises DataError, one line, for a file that is absent, empty or wrong in any row.
    """
    if str(source) in BUILT_IN:
        group, name = BUILT_IN[str(source)]
        return _load_csv(PAPER_DATA / name, group, str(source))
    path = Path(source)
    if path.is_dir():
        path = path / "results.jsonl"
        if not path.is_file():
            raise DataError(f"{path}: no such file; collect the sweep's rows first")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a sweep directory, a .jsonl, a .csv or a built-in name")
    if path.suffix == ".jsonl":
        return _load_jsonl(path)
    if path.suffix == ".csv":
        return _load_csv(path, path.stem, path.name)
    raise DataError(f"{path}: unknown kind of file; expected .jsonl or .csv")


def _read(path: Path) -> tuple[str, str]:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig"), hashlib.sha256(raw).hexdigest()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 text (byte {error.start})") from error


def _load_jsonl(path: Path) -> Dataset:
    text, digest = _read(path)
    rows: list[Row] = []
    unfinished = 0
    seen: dict[str, set[str]] = defaultdict(set)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
        if record.get("status") in _UNFINISHED:
            unfinished += 1
            continue
        rows.append(_jsonl_row(record, where))
        for key in ("vlmscale_version", "git_commit", "device"):
            if record.get(key):
                seen[key].add(str(record[key]))
    if not rows:
        raise DataError(
            f"{path.name}: no finished row" + (f" ({unfinished} unfinished)" if unfinished else "")
        )
    return Dataset(
        source=path.name,
        sha256=digest,
        rows=len(rows),
        unfinished=unfinished,
        tables=_tables(rows, path.name),
        versions=tuple(sorted(seen["vlmscale_version"])),
        commits=tuple(sorted(seen["git_commit"])),
        devices=tuple(sorted(seen["device"])),
    )


def _jsonl_row(record: dict[str, Any], where: str) -> Row:
    for key in ("llm_name", "n_total", "visual_tokens", "task", "task_group", "score"):
        if record.get(key) is None:
            raise DataError(f"{where}: {key} is missing")
    for key in ("llm_name", "task", "task_group"):
        if not isinstance(record[key], str) or not record[key]:
            raise DataError(f"{where}: {key} must be a name, got {record[key]!r}")
    return Row(
        where=where,
        llm_name=record["llm_name"],
        n=_number(record["n_total"], "n_total", where),
        v=_token_count(record["visual_tokens"], where),
        task=record["task"],
        group=record["task_group"],
        seed=int(_optional(record, "seed", where, low=0) or 0),
        score=_number(record["score"], "score", where, low=0, high=1),
        n_items=_optional(record, "n_items", where, low=1),
        chance=_optional(record, "chance", where, low=0, high=1),
        blind_score=_optional(record, "blind_score", where, low=0, high=1),
        text_tokens=_optional(record, "text_tokens_mean", where, low=0),
        infer_flops=_optional(record, "infer_flops", where, low=0),
        setup=tuple(json.dumps(record.get(key), sort_keys=True) for key in _SETUP),
    )


def _load_csv(path: Path, group: str, source: str) -> Dataset:
    text, digest = _read(path)
    reader = csv.DictReader(text.splitlines())
    for key in ("llm_params_b", "visual_tokens", "score"):
        if key not in (reader.fieldnames or ()):
            raise DataError(f"{path.name}:1: column {key} is missing")
    rows = []
    for record in reader:
        where = f"{path.name}:{reader.line_num}"
        if any(record[key] in (None, "") for key in ("llm_params_b", "visual_tokens", "score")):
            raise DataError(f"{where}: llm_params_b, visual_tokens and score must all be given")
        billions = _number(record["llm_params_b"], "llm_params_b", where)
        rows.append(
            Row(
                where=where,
                llm_name=count(billions * 1e9),
                n=round(billions * 1e9, 3),
                v=_token_count(record["visual_tokens"], where),
                task=record.get("task") or group,
                group=group,
                seed=int(_optional(record, "seed", where, low=0) or 0),
                score=_number(record["score"], "score", where, low=0, high=1),
                n_items=_optional(record, "n_items", where, low=1),
                chance=_optional(record, "chance", where, low=0, high=1),
                blind_score=None,
                text_tokens=None,
                infer_flops=None,
                setup=(),
            )
        )
    if not rows:
        raise DataError(f"{path.name}: no row under the header")
    return Dataset(source=source, sha256=digest, rows=len(rows), unfinished=0, tables=_tables(rows, source))


def _number(
    value: object, key: str, where: str, low: float | None = None, high: float | None = None
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise DataError(f"{where}: {key} must be a number, got {value!r}")
    try:
        number = float(value)
    except ValueError:
        raise DataError(f"{where}: {key} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: {key} must be finite, got {value!r}")
    if low is None and number <= 0:
        raise DataError(f"{where}: {key} must be positive, got {value!r}")
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"between {low:g} and {high:g}" if high is not None else f"at least {low:g}"
        raise DataError(f"{where}: {key} must be {bounds}, got {value!r}")
    return number


def _optional(
    record: dict[str, Any], key: str, where: str, low: float, high: float | None = None
) -> float | None:
    value = record.get(key)
    return None if value is None or value == "" else _number(value, key, where, low=low, high=high)


def _token_count(value: object, where: str) -> float:
    number = _number(value, "visual_tokens", where, low=0)
    if 0 < number < 1:
        raise DataError(f"{where}: visual_tokens must be 0 (no image) or at least 1, got {value!r}")
    return number


_ORDER = {"reasoning": 0, "ocr": 1}


def _tables(rows: list[Row], source: str) -> tuple[Table, ...]:
    _check_names(rows)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    tables = []
    # The paper's two groups first, so that each stands beside its published counterpart.
    for group, members in sorted(groups.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))):
        split = _split_fields(members)
        kinds: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in members:
            if row.v > 0 or not split:
                kinds[tuple(row.setup[i] for i in split)].append(row)
        blind_rows = [row for row in members if row.v == 0] if split else []
        for kind, own in kinds.items():
            label = ", ".join(str(json.loads(text)) for text in kind)
            tables.append(_table(f"{group} ({label})" if label else group, own + blind_rows, source))
    return tuple(tables)


def _check_names(rows: list[Row]) -> None:
    """One LLM name has one size, else 'the same LLM' means two things; raises DataError."""
    sizes: dict[str, Row] = {}
    for row in rows:
        first = sizes.setdefault(row.llm_name, row)
        if first.n != row.n:
            raise DataError(
                f"{row.where}: {row.llm_name} has n = {row.n:g}, but {first.n:g} at {first.where}"
            )


def _split_fields(rows: list[Row]) -> list[int]:
    """Indices into a row's `setup` that differ between rows of one (LLM, V >= 1, task)."""
    first: dict[tuple[str, float, str], Row] = {}
    differing: set[int] = set()
    for row in rows:
        if row.v > 0:
            other = first.setdefault((row.llm_name, row.v, row.task), row)
            differing |= {i for i, (a, b) in enumerate(zip(row.setup, other.setup, strict=True)) if a != b}
    return sorted(differing)


def _table(group: str, rows: list[Row], source: str) -> Table:
    tasks = tuple(sorted({row.task for row in rows}))
    cells: dict[tuple[float, float, str], dict[int, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_task = cells[row.n, row.v, row.llm_name][row.seed]
        if row.task in by_task:
            earlier = by_task[row.task].where
            if row.v > 0 or by_task[row.task].setup == row.setup:
                raise DataError(f"{row.where}: the same cell, seed and task as {earlier}")
        by_task[row.task] = row
    kept, names, dropped = [], [], []
    blind: dict[str, float] = {}
    fallback: dict[str, list[float]] = defaultdict(list)
    for (n, v, name), seeds in sorted(cells.items()):
        whole = [by_task for by_task in seeds.values() if len(by_task) == len(tasks)]
        if not whole:
            missing = sorted(set(tasks) - set().union(*seeds.values()))
            dropped.append(
                f"{name}, V = {v:g}: no seed has all tasks (missing {', '.join(missing) or 'some'})"
            )
            continue
        if v == 0:
            blind[name] = float(np.mean([1 - row.score for by_task in whole for row in by_task.values()]))
            continue
        known = [row.blind_score for by_task in whole for row in by_task.values()]
        if None not in known:
            fallback[name].append(1 - float(np.mean([value for value in known if value is not None])))
        names.append(name)
        kept.append(_cell(n, v, whole))
    columns = np.array(kept, dtype=np.float64).reshape(len(kept), len(_COLUMNS)).T
    for name, values in fallback.items():
        blind.setdefault(name, float(np.mean(values)))
    arrays = dict(zip(_COLUMNS, columns, strict=True))
    return Table(group, source, tasks, tuple(names), blind=blind, dropped=tuple(dropped), **arrays)


def _cell(n: float, v: float, seeds: list[dict[str, Row]]) -> tuple[float, ...]:
    """One cell's figures in the order of `_COLUMNS`; NaN where a row lacks the figure."""
    rows = [row for by_task in seeds for row in by_task.values()]

    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else math.nan

    error = float(np.mean([1 - np.mean([row.score for row in by_task.values()]) for by_task in seeds]))
    items = [row.n_items for row in rows]
    if None in items:
        total, sampling = math.nan, math.nan
    else:
        total = float(sum(count for count in items if count is not None))
        variance = sum(row.score * (1 - row.score) / row.n_items for row in rows if row.n_items)
        sampling = math.sqrt(variance) / len(rows)
    chance = mean([row.chance for row in rows])
    text = mean([row.text_tokens for row in rows])
    return (
        n,
        v,
        error,
        total,
        sampling,
        chance,
        text,
        mean([row.infer_flops for row in rows]),
        float(len(seeds)),
    )
