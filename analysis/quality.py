"""What is wrong or doubtful in rows and tables: errors for what cannot be used, one line for what can.

Owns every judgement of the data as data, before any law: contradictions raise DataError, doubts become lines
of `Dataset.warnings`. It changes nothing but that a row given twice is kept once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np

from analysis.rows import Row
from analysis.units import count, tokens
from analysis.values import DataError

if TYPE_CHECKING:  # data calls this module
    from analysis.data import Table

COPY_DECIMALS = 8
LINES = 5  # of one kind for one table
_FEW, _WEAK = 4, 8
_CONVENTION = "one LLM under two conventions of N (total, non-embedding, nominal)"
_NOMINAL = re.compile(r"(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")


def check_scores(rows: list[Row]) -> None:
    """Raise DataError unless all scores of one source are fractions."""
    wrong = [row for row in rows if not 0 <= row.score <= 1]
    if not wrong:
        return
    scores = [row.score for row in rows]
    percentages = (
        sum(score > 1 for score in scores) * 2 > len(scores) and 0 <= min(scores) <= max(scores) <= 100
    )
    hint = "; the scores look like percentages: divide them by 100" if percentages else ""
    raise DataError(f"{wrong[0].where}: score must be between 0 and 1, got {wrong[0].score:.12g}{hint}")


def check_names(rows: list[Row]) -> None:
    """Raise DataError where one LLM name has two sizes, for then 'the same LLM' means two things."""
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row.llm_name, row)
        if other.n != row.n:
            raise DataError(
                f"{row.where}: {row.llm_name} has n = {row.n:.12g}, but {other.n:.12g} at {other.where}; "
                "take one N convention (total, non-embedding or nominal parameters) for all rows"
            )


def check_losses(rows: list[Row]) -> None:
    """Raise DataError where rows of one cell and seed carry two held-out losses: two trainings."""
    first: dict[tuple, Row] = {}
    for row in rows:
        other = first.setdefault((row.llm_name, row.v, row.seed, row.setup), row)
        if abs(other.heldout_loss - row.heldout_loss) > 1e-6 * other.heldout_loss:
            raise DataError(
                f"{row.where}: heldout_loss is {row.heldout_loss:.12g}, but {other.heldout_loss:.12g} "
                f"for the same cell and seed at {other.where}; tell two trainings apart by `seed`"
            )


def drop_repeats(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """(rows, remarks): every (cell, seed, task) once; raises DataError where two of one differ in score."""
    first: dict[tuple, Row] = {}
    repeats = []
    for row in rows:
        other = first.setdefault((row.llm_name, row.v, row.seed, row.task, row.group, row.setup), row)
        if other is row:
            continue
        if other.score != row.score:
            raise DataError(
                f"{row.where}: the same cell, seed and task as {other.where}, but score {row.score:.12g} "
                f"against {other.score:.12g}; tell repeats apart by `seed` or remove one"
            )
        repeats.append((row, other))
    if not repeats:
        return rows, []
    row, other = repeats[0]
    given = "rows are given" if len(repeats) > 1 else "row is given"
    example = f"first: {row.where} as {other.where}"
    remark = f"{len(repeats)} {given} again with the same score and counted once ({example})"
    return list(first.values()), [remark]


def check(rows: list[Row], tables: Sequence[Table], methods: Sequence[Table] = ()) -> tuple[str, ...]:
    """What a reader should know before believing a law: one line each, in the order of the tables.

    Where `methods` (see `Dataset.methods`) are compared on one LLM size, no table carries a law, and what
    concerns laws is left out.
    """
    seen = [row for row in rows if row.v > 0]
    lines = []
    if len(seen) < len(rows):
        verb = "rows without an image are" if len(rows) - len(seen) > 1 else "row without an image is"
        lines.append(f"{len(rows) - len(seen)} {verb} the blind reference, which no law sees")
    lines += _near_sizes(seen) + _nominal_sizes(seen) + _tiny_scores(seen) + _rounded(seen)
    lawless = bool(methods) and len({row.n for row in seen}) == 1
    for table in methods if lawless else tables:
        lines += [] if lawless else _size(table) + _grid(table)
        lines += _copies(table) + _chance(table, "" if lawless else ": a law fits guessing there")
        lines += _capped([f"{table.group}: {reason}" for reason in table.dropped], table.group, "left out")
    return tuple(lines)


def copied_cells(table: Table) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of different cells whose errors agree in eight or more decimals: likely a copy.

    Only where item counts are unknown, and not for a fraction of a few items: those repeat honestly.
    """
    unknown = np.flatnonzero(~np.isfinite(table.n_items))
    scores = np.round(1 - table.error[unknown], 12)
    _, which, times = np.unique(scores, return_inverse=True, return_counts=True)
    seen: dict[int, int] = {}
    pairs = []
    for place in np.flatnonzero(times[which] > 1):
        code, i = int(which[place]), int(unknown[place])
        if code in seen:
            pairs.append((seen[code], i))
        elif _decimals(scores[place]) >= COPY_DECIMALS and not _of_few_items(scores[place]):
            seen[code] = i
    return pairs


def _decimals(value: float) -> int:
    """With how many decimals a number was written, at most 12."""
    return len(f"{value:.12f}".rstrip("0").partition(".")[2])


def _of_few_items(score: float) -> bool:
    """Whether `score` is k of m items for an m up to 2000, to all its decimals."""
    return abs(Fraction(score).limit_denominator(2000) - Fraction(score)) <= Fraction(
        1, 10 ** _decimals(score)
    )


def _capped(lines: list[str], group: str, what: str) -> list[str]:
    """At most `LINES` lines, then how many there are more."""
    more = len(lines) - LINES
    return lines if more <= 0 else [*lines[:LINES], f"{group}: and {more} more {what}"]


def _near_sizes(rows: list[Row]) -> list[str]:
    """Neighbouring sizes within 35% of each other that never share a token count."""
    counts: dict[float, set[float]] = defaultdict(set)
    for row in rows:
        counts[row.n].add(row.v)
    pairs = [(a, b) for a, b in pairwise(sorted(counts)) if b <= 1.35 * a and counts[a].isdisjoint(counts[b])]
    if not pairs:
        return []
    (a, b), more = pairs[0], f" ({len(pairs) - 1} more such pairs)" if len(pairs) > 1 else ""
    return [f"N = {count(a)} and {count(b)} share no visual token count{more}: check for {_CONVENTION}"]


def _nominal_sizes(rows: list[Row]) -> list[str]:
    """Some LLMs' N is the size in their name, that of others is not: nominal and counted sizes are mixed."""
    agree, differ = [], []
    for name, n in {row.llm_name: row.n for row in rows if row.named}.items():
        sizes = _NOMINAL.findall(name.lower())
        if not sizes:
            continue
        number, unit = sizes[-1]
        nominal = float(number) * (1e9 if unit == "b" else 1e6)
        if abs(n - nominal) <= 0.02 * nominal:
            agree.append(name)
        elif abs(n - nominal) > 0.05 * nominal:
            differ.append(f"{name} has N = {count(n)}")
    if not agree or not differ:
        return []
    return [f"N of {agree[0]} is the size in its name, but {differ[0]}: take one N convention for all LLMs"]


def _tiny_scores(rows: list[Row]) -> list[str]:
    """Task groups all of whose scores are below 1%."""
    highest: dict[str, float] = {}
    for row in rows:
        highest[row.group] = max(row.score, highest.get(row.group, 0.0))
    return [
        f"{group}: all scores with an image are below 0.01: percentages divided by 100 twice?"
        for group, score in highest.items()
        if 0 < score < 0.01
    ]


def _rounded(rows: list[Row]) -> list[str]:
    """Scores of at most three decimals among scores of six and more, which item counts do not explain."""
    by_task: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.n_items != row.n_items:  # NaN: with item counts known, 3 of 4 is honestly 0.75
            by_task[row.group, row.task].append(row)
    lines = []
    for (group, task), own in by_task.items():
        decimals = [_decimals(row.score) for row in own]
        long = [row.score for row, places in zip(own, decimals, strict=True) if places >= 6]
        short = [row for row, places in zip(own, decimals, strict=True) if places <= 3]
        # A sample tells whether the long ones are fractions of few items, among which short ones are honest.
        sample = long[:200]
        honest = sum(_of_few_items(score) for score in sample) * 2 > len(sample) if short else True
        if honest or len(long) * 2 <= len(own):
            continue
        name = group if task == group else f"{group}, {task}"
        scores = "scores are" if len(short) > 1 else "score is"
        lines.append(
            f"{name}: {len(short)} {scores} rounded to 3 decimals or fewer, most have 6 or more "
            f"(first: {short[0].where}, {short[0].score:.12g})"
        )
    return lines


def _size(table: Table) -> list[str]:
    """Too few cells, sizes or token counts for a law."""
    lines, cells = [], table.n.size
    if cells < _FEW:
        lines.append(f"{table.group}: {_cells(cells)} with an image, too few for a law (at least {_FEW})")
    elif cells < _WEAK:
        lines.append(f"{table.group}: {_cells(cells)} with an image: intervals are weak below {_WEAK}")
    if table.sizes.size == 1:
        lines.append(f"{table.group}: one LLM size only ({count(table.n[0])}): nothing tells what size does")
    if table.token_counts.size == 1:
        lines.append(
            f"{table.group}: one visual token count only ({tokens(table.v[0])}): nothing tells what V does"
        )
    return lines


def _cells(number: int) -> str:
    return f"{number} cell{'' if number == 1 else 's'}"


def _grid(table: Table) -> list[str]:
    """How many cells of the full grid of sizes and token counts are missing, and the first of them."""
    sizes, counts = table.sizes, table.token_counts
    there = set(zip(table.n.tolist(), table.v.tolist(), strict=True))
    missing = sizes.size * counts.size - len(there)
    if not missing:
        return []
    examples = []
    for n, v in product(sizes.tolist(), counts.tolist()):
        if (n, v) not in there:
            examples.append(f"N = {count(n)}, V = {tokens(v)}")
            if len(examples) == 3:
                break
    more = "; ..." if missing > len(examples) else ""
    return [
        f"{table.group}: incomplete grid, {missing} of {sizes.size} x {counts.size} cells missing "
        f"({'; '.join(examples)}{more})"
    ]


def _copies(table: Table) -> list[str]:
    """The copied cells of a table, then those of single tasks that the average conceals."""
    lines = []
    known = set()
    for part in (table, *table.by_task):
        name = table.group if part is table else f"{table.group}, {part.group}"
        for earlier, later in copied_cells(part):
            names = [f"({part.llm_name[i]}, V = {tokens(part.v[i])})" for i in (later, earlier)]
            if tuple(names) in known:
                continue
            known.add(tuple(names))
            value = part.error[later] if part.target == "loss" else 1 - part.error[later]
            what = "loss" if part.target == "loss" else "score"
            lines.append(
                f"{name}: {names[0]} has the {what} of {names[1]} to all decimals, {value:.12g}: a copy?"
            )
    return _capped(lines, table.group, "copied cells")


def _chance(table: Table, then: str) -> list[str]:
    """Cells that guess: within two sampling sd of chance, or at chance where the noise is not known."""
    near = 1 - table.error <= table.chance + 2 * np.nan_to_num(table.sampling_sd)
    if not near.any():
        return []
    i = int(np.argmax(near))
    return [
        f"{table.group}: {near.sum()} of {_cells(near.size)} no better than chance within two sampling sd "
        f"(first: {table.llm_name[i]}, V = {tokens(table.v[i])}){then}"
    ]
