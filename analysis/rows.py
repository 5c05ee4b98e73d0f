"""Files into checked rows: sweeps, runs, `.jsonl`, `.csv` and the paper's published numbers.

Owns reading and the check of each single value; what is wrong in a file is one line that names the file, the
line and what to do. It does not average, group or judge rows: see `analysis.data` and `analysis.quality`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from analysis.units import count
from analysis.values import (
    LEAST,
    MOST,
    MOST_TOKENS,
    DataError,
    comparable,
    cut,
    shown,
    to_name,
    to_number,
    to_seed,
    to_tokens,
)

PAPER_DATA = Path(__file__).parent / "paper_data"
# Name -> (task group, file); the group of a wide table is the method of each line.
BUILT_IN = {
    "paper-reasoning": ("reasoning", "reasoning.csv"),
    "paper-ocr": ("ocr", "ocr.csv"),
    "paper-table1": ("", "table1.csv"),
}
# Two rows of one (LLM, V, task) that differ in one of these are two set-ups: never averaged together.
# The first TRAINED say what was trained, the others how it was asked.
SETUP = (
    "compressor",
    "vision_tower",
    "image_size",
    "data_mix",
    "data_samples",
    "lr",
    "reducer",
    "split",
    "prompt_id",
    "scorer",
    "metric",
)
TRAINED = 6
_REDUCER = SETUP.index("reducer")  # with one, the loss that training logged is another model's
_UNFINISHED = ("pending", "running", "preempted", "failed")
_PROVENANCE = ("vlmscale_version", "git_commit", "device")
_GIVE = "give a sweep directory, a run directory, a .jsonl, a .csv or a built-in name"
_NAN = math.nan


class Row(NamedTuple):
    """One checked score: a (cell, task). `where` is 'file:line'; a number that the file lacks is NaN."""

    where: str
    llm_name: str
    named: bool  # False: the file gives no name of the LLM, and it is called by its size
    n: float
    v: float
    task: str
    group: str
    seed: int
    score: float
    setup: tuple[Any, ...]  # in the order of SETUP; None where the file lacks it
    n_items: float = _NAN
    chance: float = _NAN
    blind_score: float = _NAN
    n_nonembed: float = _NAN
    text_tokens: float = _NAN
    gen_tokens: float = _NAN
    tower_flops: float = _NAN
    compressor_flops: float = _NAN
    query_flops: float = _NAN
    infer_flops: float = _NAN
    latency_ms: float = _NAN
    heldout_loss: float = _NAN
    compressor_params: float = _NAN


_MOST_FLOPS, _MOST_N = 1e36, 1e18  # beyond, a number is a slip of the pen and would overflow a cost


class _Number(NamedTuple):
    """A number that a row may have: its names in JSON and CSV (None: not read there) and its bounds."""

    key: str
    column: str | None
    low: float = 0.0
    high: float = MOST


# In the order of Row's last fields. The CSV column of n_nonembed is in billions, as llm_params_b is.
_OPTIONAL = (
    _Number("n_items", "n_items", 1.0),
    _Number("chance", "chance", 0.0, 1.0),
    _Number("blind_score", "blind_score", 0.0, 1.0),
    _Number("n_nonembed", "n_nonembed_b", LEAST),
    _Number("text_tokens_mean", "text_tokens", 0.0, MOST_TOKENS),
    _Number("gen_tokens_mean", "gen_tokens", 0.0, MOST_TOKENS),
    _Number("tower_flops", "tower_flops", 0.0, _MOST_FLOPS),
    _Number("compressor_flops", None, 0.0, _MOST_FLOPS),
    _Number("query_pass_flops", None, 0.0, _MOST_FLOPS),
    _Number("infer_flops", "infer_flops", 0.0, _MOST_FLOPS),
    _Number("latency_ms", "latency_ms", LEAST, 1e15),
    _Number("heldout_loss", None, LEAST, 1e9),
    _Number("compressor_params", None, 0.0, _MOST_N),
)
_REQUIRED = ("llm_params_b", "visual_tokens", "score")
_NAMES = ("task", "task_group", "llm_name", "compressor")
_COLUMNS = {*_REQUIRED, *_NAMES, "seed", *(number.column for number in _OPTIONAL if number.column)}
_MOST_BILLIONS = 1e5


@dataclass
class Reading:
    """What one source holds: its rows, the hash of every file used, and remarks on what was not read."""

    rows: list[Row] = field(default_factory=list)
    unfinished: int = 0
    hashes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    provenance: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


class _File(NamedTuple):
    """A file's text with the name it has in messages."""

    label: str
    text: str
    sha256: str


def source_name(source: Path | str, full: bool) -> str:
    """What a source is called: a built-in's name, a file's name or, if `full`, path, or 'DIRECTORY/cells'."""
    if str(source) in BUILT_IN:
        return str(source)
    path, files = _files(source)
    if files[0].parent != path:
        return f"{path if full else path.resolve().name}/cells"
    return str(files[0]) if full else files[0].name


def read(source: Path | str, name: str) -> Reading:
    """Read one source; its files are called by `name` in messages.

    Raises DataError for a place that is absent, unreadable or empty, or wrong in any row.
    """
    reading = Reading()
    if str(source) in BUILT_IN:
        group, file = BUILT_IN[str(source)]
        published = _open(PAPER_DATA / file, file)
        reading.hashes.append(published.sha256)
        if group:
            _csv(published, group, reading)
        else:
            _wide_table(published, reading)
        return reading
    path, files = _files(source)
    for place in files:
        # Cells are told apart by their directories.
        opened = _open(place, name if place.parent == path else f"{name}/{place.parent.name}/{place.name}")
        reading.hashes.append(opened.sha256)
        if place.suffix == ".csv":
            _csv(opened, place.stem, reading)
        else:
            _jsonl(opened, place, reading)
    if not reading.rows:
        unfinished = f" ({reading.unfinished} unfinished)" if reading.unfinished else ""
        raise DataError(f"{name}: no finished row{unfinished}; wait for a run to end or name another place")
    return reading


def _files(source: Path | str) -> tuple[Path, list[Path]]:
    """The directory that `source` is or lies in, and the files to read; raises DataError without any."""
    path = Path(source)
    try:
        if not path.is_dir():
            if not path.is_file():
                raise DataError(f"{path}: no such file; {_GIVE}")
            if path.suffix not in (".jsonl", ".csv"):
                raise DataError(f"{path}: unknown kind of file; expected .jsonl or .csv")
            return path.parent, [path]
        for name in ("results.jsonl", "result.jsonl"):
            if (path / name).is_file():
                return path, [path / name]
        cells = sorted(path.glob("cells/*/result.jsonl"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {_GIVE}") from error
    if not cells:
        raise DataError(f"{path}/results.jsonl: no such file, nor result.jsonl, nor any cell's; {_GIVE}")
    return path, cells


def _open(path: Path, label: str) -> _File:
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{label}: cannot be read ({reason}); check the file's permissions") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{label}:{line}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{label}:{line}: a NUL byte; the file is damaged or not text")
    return _File(label, text, hashlib.sha256(raw).hexdigest())


def _jsonl(file: _File, path: Path, reading: Reading) -> None:
    """Add the finished rows of a `.jsonl` file to `reading`."""
    first = len(reading.rows)
    setups: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    cells: list[Any] = []
    provenance: dict[str, set[str]] = {key: set() for key in _PROVENANCE}
    # Not splitlines(): JSON strings may hold the other characters that it splits at.
    for number, line in enumerate(file.text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file.label}:{number}"
        record = _record(line, where)
        if record.get("status") in _UNFINISHED:
            reading.unfinished += 1
            continue
        reading.rows.append(_jsonl_row(record, where, setups))
        cells.append(comparable(record.get("cell_id")))
        for key, seen in provenance.items():
            value = record.get(key)
            if value and isinstance(value, str):
                seen.add(value)
    for key, seen in provenance.items():
        reading.provenance[key] |= {cut(comparable(value)) for value in seen}
    reading.rows[first:] = own = _mean_counts(reading.rows[first:], cells)
    lacking = [math.isnan(row.heldout_loss) and row.setup[_REDUCER] in (None, "none") for row in own]
    if path.name == "result.jsonl" and any(lacking):
        loss, sha256 = _last_loss(path.with_name("metrics.jsonl"), file.label)
        if not math.isnan(loss):
            reading.hashes.append(sha256)
            reading.rows[first:] = [
                row._replace(heldout_loss=loss) if lacks else row
                for row, lacks in zip(own, lacking, strict=True)
            ]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); remove or mend the line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{where}: not JSON that can be read ({error}); remove or mend the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


def _jsonl_row(record: dict[str, Any], where: str, setups: dict[tuple[Any, ...], tuple[Any, ...]]) -> Row:
    """The row of a JSON object; `setups` remembers the few set-ups of a file's many rows."""
    get = record.get
    for key in ("llm_name", "n_total", "visual_tokens", "task", "task_group", "score"):
        if get(key) is None:
            raise DataError(f"{where}: {key} is missing")
    raw = tuple([get(key) for key in SETUP])
    try:
        setup = setups[raw]
    except (KeyError, TypeError):  # TypeError: a list, which is no key
        setup = tuple([comparable(value) for value in raw])
        setups[setup] = setup
    return Row(
        where,
        to_name(record["llm_name"], "llm_name", where),
        True,
        to_number(record["n_total"], "n_total", where, low=LEAST, high=_MOST_N),
        to_tokens(record["visual_tokens"], where),
        to_name(record["task"], "task", where),
        to_name(record["task_group"], "task_group", where),
        to_seed(get("seed"), where),
        to_number(record["score"], "score", where, low=-MOST),  # its range is the validator's
        setup,
        *[
            _NAN if (value := get(key)) is None else to_number(value, key, where, low, high)
            for key, _, low, high in _OPTIONAL
        ],
    )


def _mean_counts(rows: list[Row], cells: list[Any]) -> list[Row]:
    """The rows with one V a point of a cell, whatever the task.

    Where the count depends on the picture, V is a mean over the pictures of a task, and differs from task to
    task. The tasks of one cell then share the plain mean, as they share the mean of their scores. A cell may
    hold several points: the i-th count of each task belongs to the i-th of them.
    """
    if all(row.v.is_integer() for row in rows):
        return rows
    keys = [(cell, row.seed, row.llm_name, row.setup) for row, cell in zip(rows, cells, strict=True)]
    counts: dict[tuple[Any, ...], dict[tuple[str, str], set[float]]] = defaultdict(lambda: defaultdict(set))
    for row, key in zip(rows, keys, strict=True):
        if key[0] is not None:
            counts[key][row.group, row.task].add(row.v)
    mean: dict[tuple[Any, ...], float] = {}
    for key, by_task in counts.items():
        if len({len(own) for own in by_task.values()}) > 1:
            continue  # some task lacks a point, and nothing tells which
        ordered = {task: sorted(own) for task, own in by_task.items()}
        for same in zip(*ordered.values(), strict=True):
            shared = same[0] if len(set(same)) == 1 else math.fsum(same) / len(same)
            mean |= {(key, task, v): shared for task, v in zip(ordered, same, strict=True)}
    return [
        row._replace(v=mean.get((key, (row.group, row.task), row.v), row.v))
        for row, key in zip(rows, keys, strict=True)
    ]


def _last_loss(path: Path, beside: str) -> tuple[float, str]:
    """(loss, hash of the file): the last held-out loss of a run's metrics, NaN without one."""
    if not path.is_file():
        return _NAN, ""
    file = _open(path, f"{beside.removesuffix('result.jsonl')}metrics.jsonl")
    lines = file.text.split("\n")
    for number in range(len(lines), 0, -1):
        if '"heldout_loss"' not in lines[number - 1]:
            continue
        try:
            record = json.loads(lines[number - 1])
        except (ValueError, RecursionError):
            continue  # the line that a kill cut in two
        if isinstance(record, dict) and record.get("heldout_loss") is not None:
            where = f"{file.label}:{number}"
            return to_number(record["heldout_loss"], "heldout_loss", where, low=LEAST), file.sha256
    return _NAN, ""


def _lines(file: _File) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a CSV file's lines that are not blank; the header comes first."""
    reader = csv.reader(io.StringIO(file.text, newline=""), strict=True)
    try:
        for raw in reader:
            fields = [text.strip() for text in raw]
            if any(fields):
                yield reader.line_num, fields
    except csv.Error as error:
        raise DataError(f"{file.label}:{reader.line_num}: not CSV ({error}); mend the line") from error


def _header(file: _File, lines: Iterator[tuple[int, list[str]]], required: tuple[str, ...]) -> list[str]:
    """The column names in lower case."""
    number, fields = next(lines, (0, []))
    if not fields:
        raise DataError(f"{file.label}: empty file; expected a header with {', '.join(required)}")
    header = [name.lower() for name in fields]
    where = f"{file.label}:{number}"
    for name, times in Counter(header).items():
        if name and times > 1:
            raise DataError(f"{where}: column {cut(ascii(name))} is there {times} times; keep one")
    for name in required:
        if name not in header:
            hint = "; separate columns by commas" if len(header) == 1 and name in header[0] else ""
            raise DataError(f"{where}: column {name} is missing{hint}")
    return header


def _records(file: _File, required: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """('file:line', fields by column name) of a CSV file's rows; raises DataError without any."""
    lines = _lines(file)
    header = _header(file, lines, required)
    records = []
    for number, fields in lines:
        where = f"{file.label}:{number}"
        if len(fields) != len(header):
            raise DataError(f"{where}: {len(fields)} fields under a header of {len(header)} columns")
        records.append((where, dict(zip(header, fields, strict=True))))
    if not records:
        raise DataError(f"{file.label}: no row under the header")
    return records


def _csv(file: _File, group: str, reading: Reading) -> None:
    """Add a CSV file's rows to `reading`; `group` is the task group of rows that name none."""
    records = _records(file, _REQUIRED)
    sizes: dict[str, tuple[float, str]] = {}
    reading.rows += [_csv_row(record, where, group, sizes) for where, record in records]
    unknown = [cut(ascii(name)) for name in records[0][1] if name and name not in _COLUMNS]
    if unknown:
        kinds = "columns" if len(unknown) > 1 else "column"
        reading.remarks.append(f"{file.label}: {kinds} {_some(unknown)} not known and not read")


def _csv_row(record: dict[str, str], where: str, group: str, sizes: dict[str, tuple[float, str]]) -> Row:
    """The row of a CSV line; `sizes` remembers the few LLM sizes of a file's many rows."""
    for key in _REQUIRED:
        if not record[key]:
            raise DataError(f"{where}: {key} is empty; llm_params_b, visual_tokens and score must be given")
    get = record.get
    billions = record["llm_params_b"]
    if billions not in sizes:
        sizes[billions] = _billions(billions, "llm_params_b", where)
    n, size = sizes[billions]
    text = {key: to_name(record[key], key, where) for key in _NAMES if get(key)}
    numbers = [
        to_number(record[column], column, where, low, high) if column and get(column) else _NAN
        for _, column, low, high in _OPTIONAL
    ]
    if not math.isnan(numbers[3]):
        numbers[3] = _billions(record["n_nonembed_b"], "n_nonembed_b", where)[0]
    group = text.get("task_group", group)
    return Row(
        where,
        text.get("llm_name", size),
        "llm_name" in text,
        n,
        to_tokens(record["visual_tokens"], where),
        text.get("task", group),
        group,
        to_seed(get("seed"), where),
        to_number(record["score"], "score", where, low=-MOST),  # its range is the validator's
        (text.get("compressor"), *[None] * (len(SETUP) - 1)),
        *numbers,
    )


def _billions(value: str, key: str, where: str) -> tuple[float, str]:
    """(parameters, the name that says so): an LLM without a name is called by its size."""
    billions = to_number(value, key, where, low=LEAST)
    if billions > _MOST_BILLIONS:
        raise DataError(f"{where}: {key} is in billions; {shown(value)} looks like a count: divide by 1e9")
    n = round(billions * 1e9, 3)
    if n < 1:
        raise DataError(f"{where}: {key} is in billions; {shown(value)} is less than one parameter")
    # Two sizes must never share a name, so the short one serves only where it is exact.
    return n, count(n) if float(f"{n:.3g}") == n else f"{billions!r}B"


def _wide_table(file: _File, reading: Reading) -> None:
    """Table 1 of the paper, a line a (method, V), a column a benchmark: every method is a task group.

    A method keeps the benchmarks that it has at every V; without two token counts it says nothing about V.
    """
    methods: dict[str, dict[float, tuple[str, dict[str, float]]]] = defaultdict(dict)
    for where, record in _records(file, ("method", "visual_tokens")):
        # 'Matryoshka Query (MQT)' at one V is 'MQT' at the others.
        short = re.search(r"\((\w+)\)$", record["method"])
        scores = {
            name: to_number(value, name, where) / (2000 if name == "mme" else 100)  # MME counts points
            for name, value in record.items()
            if name not in ("method", "visual_tokens") and value
        }
        v = to_tokens(record["visual_tokens"], where)
        methods[short[1] if short else record["method"]][v] = where, scores
    for method, by_v in methods.items():
        if len(by_v) < 2:
            reading.remarks.append(f"{file.label}: {method} is left out: one token count only")
            continue
        given = Counter(name for _, scores in by_v.values() for name in scores)
        partial = sorted(name for name, times in given.items() if times < len(by_v))
        if partial:
            reading.remarks.append(f"{file.label}: {method}: {_some(partial)} left out: not given at every V")
        setup = (method, *[None] * (len(SETUP) - 1))
        reading.rows += [
            Row(where, "Vicuna-1.5-7B", True, 7e9, v, task, method, 0, score, setup)
            for v, (where, scores) in by_v.items()
            for task, score in scores.items()
            if task not in partial
        ]


def _some(names: list[str]) -> str:
    """Up to five names and a verb: 'a, b and 3 more are'."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} {'are' if len(names) > 1 else 'is'}"
