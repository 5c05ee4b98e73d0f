"""Rows of a sweep into one small table a task group: averages over tasks and seeds.

Owns pooling and averaging. It does not read values (`analysis.rows`), judge them (`analysis.quality`) or fit.
A cell with no image (visual_tokens = 0) is kept apart as a reference: no law sees it.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import quality
from analysis.rows import BUILT_IN, SETUP, TRAINED, Row, read, source_name
from analysis.values import DataError

__all__ = ["BUILT_IN", "PAPER_TEXT_TOKENS", "DataError", "Dataset", "Table", "load"]

PAPER_TEXT_TOKENS = 50.0
HELD_OUT = "held-out loss"
_COMPRESSOR, _REDUCER = SETUP.index("compressor"), SETUP.index("reducer")
# Figures of a row that a cell averages; what a row lacks is NaN, and so is then the cell's mean.
_MEANS = (
    "chance",
    "n_nonembed",
    "text_tokens",
    "gen_tokens",
    "tower_flops",
    "compressor_flops",
    "query_flops",
    "infer_flops",
    "latency_ms",
    "compressor_params",
)


@dataclass(frozen=True)
class Table:
    """The measured cells of one task group, ordered by (n, v); all arrays are float64 [cells], v >= 1.

    n: parameters (a count). error: 1 - plain mean of the task scores, averaged over seeds; where `target` is
    "loss" it is the held-out loss itself. n_items: items of all tasks and seeds. sampling_sd: binomial noise
    of `error`. seeds: how many. The others are means over the cell's rows. What the data lacks is NaN.
    `blind`: per LLM name the error without an image (in no array). `dropped`: cells left out, or single seeds
    of a cell that stays, each with its reason. `by_task`: the same a task, where the group has several.
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
    n_nonembed: np.ndarray
    gen_tokens: np.ndarray
    tower_flops: np.ndarray
    compressor_flops: np.ndarray
    query_flops: np.ndarray
    latency_ms: np.ndarray
    compressor_params: np.ndarray
    blind: dict[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    target: str = "error"
    by_task: tuple[Table, ...] = ()

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
        """The same table without cell `index`, which leaves the tables of its tasks too."""
        name, n, v = self.llm_name[index], self.n[index], self.v[index]

        def lacking(table: Table) -> Table:
            same_name = np.array([other == name for other in table.llm_name], dtype=bool)
            keep = ~(same_name & (table.n == n) & (table.v == v))
            columns = {
                key: value[keep] for key, value in vars(table).items() if isinstance(value, np.ndarray)
            }
            names = tuple(other for other, kept in zip(table.llm_name, keep, strict=True) if kept)
            return replace(table, llm_name=names, **columns)

        return replace(lacking(self), by_task=tuple(lacking(table) for table in self.by_task))


@dataclass(frozen=True)
class Dataset:
    """What the sources hold: a table a task group, the hash of the bytes, where the rows came from.

    `rows`: those used, each once. `warnings`: what a reader should know about the data, one line each.
    `methods`: where rows name several compressors, a table of each, called by its name, over all tasks that
    every one of them has; its `by_task` holds the same by task group. Empty for one compressor.
    """

    source: str
    sha256: str
    rows: int
    unfinished: int
    tables: tuple[Table, ...]
    versions: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    methods: tuple[Table, ...] = ()

    @property
    def comparable(self) -> bool:
        """Whether two cells with an image are there to be compared."""
        return max((t.n.size for t in self.tables), default=0) > 1 or sum(t.n.size for t in self.methods) > 1


def load(source: Path | str, *more: Path | str) -> Dataset:
    """Read and pool sources: each a sweep or run directory, a `.jsonl`, a `.csv` or a name of BUILT_IN.

    Raises DataError, one line, for a place that is absent or empty and for rows that are wrong or contradict
    each other. The hash of several files is that of their sorted hashes.
    """
    sources = (source, *more)
    names = [source_name(place, full=False) for place in sources]
    if len(set(names)) < len(names):
        names = [source_name(place, full=True) for place in sources]
    readings = [read(place, name) for place, name in zip(sources, names, strict=True)]
    for reading in readings:
        quality.check_scores(reading.rows)
    everything = [row for reading in readings for row in reading.rows]
    quality.check_names(everything)
    rows, repeats = quality.drop_repeats(everything)
    whole = ", ".join(names)
    tables = _tables(rows, whole)
    methods, unshared = _method_tables(rows, whole)
    hashes = sorted(item for reading in readings for item in reading.hashes)
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def provenance(key: str) -> tuple[str, ...]:
        return tuple(sorted({value for reading in readings for value in reading.provenance[key]}))

    remarks = [remark for reading in readings for remark in reading.remarks]
    return Dataset(
        source=whole,
        sha256=digest,
        rows=len(rows),
        unfinished=sum(reading.unfinished for reading in readings),
        tables=tables,
        versions=provenance("vlmscale_version"),
        commits=provenance("git_commit"),
        devices=provenance("device"),
        warnings=(*remarks, *repeats, *unshared, *quality.check(rows, tables, methods)),
        methods=methods,
    )


_ORDER = {"reasoning": 0, "ocr": 1}


def _tables(rows: list[Row], source: str) -> tuple[Table, ...]:
    """A table a task group and set-up, then those of the held-out loss."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    tables = []
    # The paper's two groups first, so that each stands beside its published counterpart.
    for group, members in sorted(groups.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))):
        for name, own in _by_setup(group, members):
            table = _table(name, own, source)
            if len(table.tasks) > 1:
                tasks: dict[str, list[Row]] = {task: [] for task in table.tasks}
                for row in own:
                    tasks[row.task].append(row)
                table = replace(table, by_task=tuple(_table(*item, source) for item in tasks.items()))
            tables.append(table)
    return (*tables, *_loss_tables(rows, source))


def _by_setup(group: str, rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """(name, rows) a set-up: rows of one (LLM, V >= 1, task) that differ in a field are never averaged.

    Two compressors or reducers are two set-ups also where they have no V in common: no law describes both.
    """
    first: dict[tuple[str, float, str], tuple[Any, ...]] = {}
    split: set[int] = {_COMPRESSOR} if len(_compressors(rows)) > 1 else set()
    if len({row.setup[_REDUCER] or "none" for row in rows if row.v > 0}) > 1:  # a CSV file names none
        split |= {_REDUCER}
    for row in rows:
        if row.v > 0:
            other = first.setdefault((row.llm_name, row.v, row.task), row.setup)
            if other != row.setup:
                split |= {i for i, (a, b) in enumerate(zip(row.setup, other, strict=True)) if a != b}
    if not split:
        return [(group, rows)]
    kinds: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.v > 0:
            kinds[tuple(row.setup[i] for i in sorted(split))].append(row)
    blind = [row for row in rows if row.v == 0]
    # A blind model has nothing to compress; where blind rows differ in the rest, each goes with its own kind.
    told = [
        i
        for i in split
        if SETUP[i] not in ("compressor", "reducer") and len({row.setup[i] for row in blind}) > 1
    ]
    result = []
    for kind, own in kinds.items():
        reference = [row for row in blind if all(row.setup[i] == own[0].setup[i] for i in told)]
        label = ", ".join("none" if value is None else str(value) for value in kind)
        result.append((f"{group} ({label})", own + reference))
    return result


def _compressors(rows: list[Row]) -> list[Any]:
    """The compressors that rows with an image name, in order of appearance."""
    return [name for name in dict.fromkeys(row.setup[_COMPRESSOR] for row in rows if row.v > 0) if name]


def _method_tables(rows: list[Row], source: str) -> tuple[tuple[Table, ...], list[str]]:
    """(a table a compressor and set-up over the tasks that all have, remarks); see `Dataset.methods`."""
    names = dict.fromkeys(row.setup[_COMPRESSOR] for row in rows if row.v > 0)
    if len(_compressors(rows)) < 2:
        return (), []
    # One task name in two groups would be two scores of one task.
    groups: dict[tuple[Any, str], set[str]] = defaultdict(set)
    for row in rows:
        groups[row.setup[_COMPRESSOR], row.task].add(row.group)
    if any(len(own) > 1 for own in groups.values()):
        rows = [row._replace(task=f"{row.group}: {row.task}") for row in rows]
    asked = {
        name: {row.task for row in rows if row.v > 0 and row.setup[_COMPRESSOR] == name} for name in names
    }
    shared = set.intersection(*asked.values())
    lacking = len(set.union(*asked.values())) - len(shared)
    remarks = []
    if lacking:
        what = f"over the {len(shared)} tasks that all have" if shared else "not at all"
        remarks.append(f"methods are compared {what}: {lacking} more are missing for some method")
    tables = []
    for name in names if shared else ():
        own = [r for r in rows if r.task in shared and (r.v == 0 or r.setup[_COMPRESSOR] == name)]
        for label, members in _by_setup("not named" if name is None else str(name), own):
            by_group: dict[str, list[Row]] = defaultdict(list)
            for row in members:
                by_group[row.group].append(row)
            parts = tuple(_table(*item, source) for item in by_group.items())
            tables.append(replace(_table(label, members, source), by_task=parts))
    return tuple(tables), remarks


def _loss_tables(rows: list[Row], source: str) -> list[Table]:
    """Tables of the held-out loss: how a cell was trained sets them apart, not what it was asked later."""
    asked = (None,) * (len(SETUP) - TRAINED)
    known = [
        row._replace(task=HELD_OUT, setup=row.setup[:TRAINED] + asked)
        for row in rows
        if row.v > 0 and not math.isnan(row.heldout_loss)
    ]
    if not known:
        return []
    quality.check_losses(known)
    tables = [_table(name, own, source, target="loss") for name, own in _by_setup(HELD_OUT, known)]
    return [table for table in tables if table.n.size >= 2]


def _codes(values: Iterable[Hashable]) -> np.ndarray:
    """A number a value: equal values have the same, in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values], dtype=np.intp)


def _table(group: str, rows: list[Row], source: str, target: str = "error") -> Table:
    """The cells of rows of one set-up; a (cell, seed) without all tasks is left out."""
    tasks = tuple(sorted({row.task for row in rows}))
    run = _codes((row.llm_name, row.v, row.seed) for row in rows)
    pairs = np.unique(np.stack([run, _codes(row.task for row in rows)]), axis=1)
    whole = np.bincount(pairs[0])[run] == len(tasks)
    used = [row for row, kept in zip(rows, whole, strict=True) if kept]
    keys = [(row.n, row.v, row.llm_name) for row in used]
    cells = sorted(set(keys))
    place = {key: i for i, key in enumerate(cells)}
    cell = np.array([place[key] for key in keys], dtype=np.intp)
    _, first = np.unique(run[whole], return_index=True)  # a row of every (cell, seed)
    figures = _figures(used, cell, first, len(cells), target)
    n, v = np.array([key[:2] for key in cells], dtype=np.float64).reshape(-1, 2).T
    names = [name for _, _, name in cells]
    seen = v > 0
    blind = _blind(names, seen, figures["error"], figures.pop("blind"))
    return Table(
        group=group,
        source=source,
        tasks=tasks,
        llm_name=tuple(name for name, kept in zip(names, seen, strict=True) if kept),
        n=n[seen],
        v=v[seen],
        blind=blind,
        dropped=_left_out(rows, whole, tasks),
        target=target,
        by_task=(),
        **{name: values[seen] for name, values in figures.items()},
    )


def _figures(
    rows: list[Row], cell: np.ndarray, first: np.ndarray, cells: int, target: str
) -> dict[str, np.ndarray]:
    """A Table's arrays, and the error of `blind_score`, of every cell; `cell` says whose a row is."""
    columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True)) if rows else {}

    def column(name: str) -> np.ndarray:
        return np.array(columns.get(name, ()), dtype=np.float64)

    def total(values: np.ndarray, of: np.ndarray = cell) -> np.ndarray:
        return np.bincount(of, values, cells)

    size = np.bincount(cell, minlength=cells)
    seeds = np.bincount(cell[first], minlength=cells).astype(np.float64)
    score, items = column("score"), column("n_items")
    figures = {name: total(column(name)) / size for name in _MEANS}
    figures |= {
        "error": 1 - total(score) / size,
        "n_items": total(items),
        "sampling_sd": np.sqrt(total(score * (1 - score) / items)) / size,
        "seeds": seeds,
        "blind": 1 - total(column("blind_score")) / size,
    }
    if target == "loss":
        # The rows of one (cell, seed) carry the same loss, and scores, items and chance are of tasks.
        figures["error"] = total(column("heldout_loss")[first], cell[first]) / seeds
        figures |= {name: np.full(cells, np.nan) for name in ("n_items", "sampling_sd", "chance", "blind")}
    return figures


def _blind(names: list[str], seen: np.ndarray, error: np.ndarray, quoted: np.ndarray) -> dict[str, float]:
    """Error without an image by LLM: of its V = 0 cell, else the mean of what its other cells quote."""
    blind = {names[i]: float(error[i]) for i in np.flatnonzero(~seen)}
    fallback: dict[str, list[float]] = defaultdict(list)
    for i in np.flatnonzero(seen & np.isfinite(quoted)):
        fallback[names[i]].append(float(quoted[i]))
    return {name: float(np.mean(values)) for name, values in fallback.items()} | blind


def _left_out(rows: list[Row], whole: np.ndarray, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Why cells, and seeds of cells that stay, are not in a table."""
    had: dict[tuple[float, float, str], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for i in np.flatnonzero(~whole):
        row = rows[i]
        had[row.n, row.v, row.llm_name][row.seed].add(row.task)
    kept = {(rows[i].v, rows[i].llm_name) for i in np.flatnonzero(whole)} if had else set()
    lines = []
    for (_, v, name), seeds in sorted(had.items()):
        if (v, name) in kept:
            for seed, own in sorted(seeds.items()):
                missing = ", ".join(sorted(set(tasks) - own))
                lines.append(f"{name}, V = {v:g}: seed {seed} left out (missing {missing})")
        else:
            missing = ", ".join(sorted(set(tasks).difference(*seeds.values()))) or "some"
            lines.append(f"{name}, V = {v:g}: no seed has all tasks (missing {missing})")
    return tuple(lines)
