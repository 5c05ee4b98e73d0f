"""What to deploy for a budget, from an analysis.json: the best LLMs and token counts of a menu, and what the
others cost.

What a candidate costs is the caller's to say; what it errs is the chosen law's, with percentiles of its
resamples, or, where no law is identified, what was measured. The loss against the best is taken resample by
resample, since errors of two candidates go up and down together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.bootstrap import percentile_interval
from analysis.laws import LAWS, Frame, Law
from analysis.units import cost as in_unit
from analysis.units import count, level, percent, points, significant, tokens
from analysis.values import DataError, read_json, shown

_Z = 1.96
_SAME = 1 + 1e-9
Interval = tuple[float, float]


class Candidate(NamedTuple):
    """An LLM of n parameters on v visual tokens, what an answer costs, and its least time where known."""

    llm_name: str
    n: float
    v: float
    cost: float
    least_ms: float | None = None


@dataclass(frozen=True)
class Choice:
    """A candidate with its error.

    interval: 95%. share: of the budget. extrapolated: n or v lies outside what was measured. measured: the
    error that was measured there, or None. within_sd, overlapping: how many other candidates of the budget
    have an error within one residual sd of this one (None without a law), and how many an interval that
    overlaps this one's.
    """

    llm_name: str
    n: float
    v: float
    cost: float
    least_ms: float | None
    error: float
    interval: Interval | None
    share: float
    extrapolated: bool
    measured: float | None
    within_sd: int | None
    overlapping: int | None


@dataclass(frozen=True)
class Alternative:
    """The price of insisting on one LLM, or on one token count.

    best: its best choice within the budget, None where it has none. loss, loss_interval: in error, against
    the first pick. times_budget: what the cheapest of its candidates that errs no more than the first pick
    costs, in budgets. Where the menu has none, needed_n is the size of an LLM that would do at that token
    count by the law, and times_budget is for it; None where no LLM up to a million times as large does, or
    for an LLM.
    """

    what: str
    best: Choice | None
    loss: float | None
    loss_interval: Interval | None
    times_budget: float | None
    needed_n: float | None


@dataclass(frozen=True)
class Advice:
    """For one task group.

    law: by name, None where measured cells alone are compared; `reason` then says why. residual_sd: scatter
    of the cells about the law. candidates, affordable: how many there are, and how many the budget buys.
    cheapest: cost of the cheapest. picks: best first, empty where the budget buys none. inside: where the
    first pick is extrapolated, the best that is not, or None.
    """

    group: str
    target: str
    law: str | None
    reason: str
    residual_sd: float | None
    candidates: int
    affordable: int
    cheapest: float | None
    picks: tuple[Choice, ...]
    inside: Choice | None
    other_llms: tuple[Alternative, ...]
    other_tokens: tuple[Alternative, ...]


class Predictor(NamedTuple):
    """A law as analysis.json keeps it: theta [k] and resamples of it [R, k], centred on `frame`."""

    law: Law
    frame: Frame
    theta: np.ndarray
    draws: np.ndarray

    def __call__(self, n: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(errors [c], of each resample [R, c]) at n and v [c]."""
        at = self.frame.coordinates(n, v)
        return self.law.predict(self.theta, *at), self.law.predict(self.draws, *at)


def read_record(path: Path) -> dict[str, Any]:
    """An analysis.json.

    Raises:
      DataError: one line, for a file that is absent, no JSON, of another kind or of an older version.
    """
    record = read_json(path)
    if not _is_record(record):
        raise DataError(f"{path}: no analysis.json; vlmscale analyze DATA --out DIR writes one")
    for group in groups_of(record):
        if "prediction" not in group:
            raise DataError(
                f"{path}: {group['group']}: prediction is missing, as in files of older versions; run "
                "vlmscale analyze again"
            )
    return record


def _is_record(record: Any) -> bool:
    """Whether it has the parts of an analysis that advice reads."""
    kinds = {"group": str, "laws": dict, "data": dict, "cost": dict}
    top = {"more_groups": list, "methods": list}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), top[key]) for key in top):
        return False
    for group in (record, *record["more_groups"]):
        if not isinstance(group, dict) or not all(isinstance(group.get(key), kinds[key]) for key in kinds):
            return False
        cells = group["data"].get("cells")
        if not isinstance(cells, list) or not all(
            isinstance(x, dict) and {"n", "v"} <= x.keys() for x in cells
        ):
            return False
    return True


def groups_of(record: dict[str, Any], name: str | None = None) -> list[dict[str, Any]]:
    """The task groups of a record that have cells, or the one of this name.

    Raises:
      DataError: there is none of that name.
    """
    groups = [record, *record["more_groups"]]
    if name is None:
        return [group for group in groups if group["data"]["cells"]]
    found = [group for group in groups if group["group"] == name]
    if not found:
        raise DataError(f"--group {name}: unknown; there are {', '.join(group['group'] for group in groups)}")
    return found[:1]


def predictor(group: dict[str, Any]) -> Predictor | None:
    """The chosen law of a group, or None where none is identified.

    Raises:
      DataError: the record names a law, or holds numbers, that cannot be used.
    """
    kept, name = group["prediction"], group["best_law"]
    if kept is not None and (not isinstance(kept, dict) or name not in group["laws"]):
        raise DataError(f"{group['group']}: prediction is damaged; run vlmscale analyze again")
    if kept is None or not group["laws"][name]["ratio_identified"]:
        return None
    if kept.get("law") not in LAWS:
        raise DataError(
            f"{group['group']}: prediction.law {shown(kept.get('law'))} is unknown; analyze again"
        )
    law = LAWS[kept["law"]]
    try:
        frame = Frame(float(kept["centre_ln_n"]), float(kept["centre_ln_v"]))
        theta = np.array(kept["theta"], dtype=np.float64).reshape(law.size)
        draws = np.array(kept["draws"], dtype=np.float64).reshape(-1, law.size)
        if not (np.isfinite(theta).all() and np.isfinite(draws).all()):
            raise ValueError("not finite")
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{group['group']}: prediction is damaged; run vlmscale analyze again") from None
    return Predictor(law, frame, theta, draws)


class _Judged(NamedTuple):
    """Candidates with errors [c], their resamples [R, c] and intervals [c]."""

    candidates: list[Candidate]
    error: np.ndarray
    draws: np.ndarray
    intervals: list[Interval | None]

    def order(self, index: Iterable[int]) -> list[int]:
        """From the least error on; of equals the cheaper one first."""
        return sorted(index, key=lambda i: (self.error[i], self.candidates[i].cost))

    def loss(self, i: int, best: int) -> tuple[float, Interval | None]:
        """Error of i over that of the best, with its interval where there are resamples."""
        spread = self.draws[:, i] - self.draws[:, best]
        return float(self.error[i] - self.error[best]), percentile_interval(spread) if spread.size else None


def _judge(group: dict[str, Any], law: Predictor | None, candidates: Sequence[Candidate]) -> _Judged:
    measured = _measured(group)
    kept = [item for item in candidates if law is not None or (item.n, item.v) in measured]
    if law is not None:
        error, draws = law(np.array([item.n for item in kept]), np.array([item.v for item in kept]))
        spread = [percentile_interval(column) if column.size else None for column in draws.T]
        return _Judged(kept, error, draws, spread)
    cells = [measured[item.n, item.v] for item in kept]
    intervals: list[Interval | None] = []
    for cell in cells:
        noise = cell["sampling_sd"]
        intervals.append(noise and (cell["error"] - _Z * noise, cell["error"] + _Z * noise))
    error = np.array([cell["error"] for cell in cells], dtype=np.float64)
    return _Judged(kept, error, np.zeros((0, len(kept))), intervals)


def _measured(group: dict[str, Any]) -> dict[tuple[float, float], dict[str, Any]]:
    return {(cell["n"], cell["v"]): cell for cell in group["data"]["cells"]}


def advise(
    group: dict[str, Any],
    candidates: Sequence[Candidate],
    budget: float,
    top: int,
    price: Callable[[float, float], float],
) -> Advice:
    """The best `top` candidates that `budget` buys, and the price of the others.

    Args:
      group: of a record (`groups_of`).
      candidates: the menu; n as in the group's cells where it was measured.
      budget: in the unit of the candidates' costs.
      top: picks.
      price: cost of an LLM of n parameters, off the menu, on v visual tokens.
    """
    law = predictor(group)
    judged = _judge(group, law, candidates)
    menu = judged.candidates
    affordable = [
        i for i, item in enumerate(menu) if item.cost <= budget * _SAME and math.isfinite(judged.error[i])
    ]
    order = judged.order(affordable)
    sd = group["laws"][law.law.name]["residual_sd"] if law is not None else None
    choices = {i: _choice(group, judged, i, affordable, budget, sd) for i in order}
    llms: list[Alternative] = []
    counts: list[Alternative] = []
    if order:
        best = menu[order[0]]
        names, values = (dict.fromkeys(getattr(item, key) for item in menu) for key in ("llm_name", "v"))
        for name in [name for name in names if name != best.llm_name]:
            own = [i for i, item in enumerate(menu) if item.llm_name == name]
            llms.append(_alternative(name, judged, choices, own, budget, order[0]))
        for v in sorted(v for v in values if v != best.v):
            own = [i for i, item in enumerate(menu) if item.v == v]
            found = _alternative(tokens(v), judged, choices, own, budget, order[0])
            if found.times_budget is None and law is not None:
                n = _needed_size(law, v, float(judged.error[order[0]]), best.n)
                found = replace(found, needed_n=n, times_budget=None if n is None else price(n, v) / budget)
            counts.append(found)
    inside = next((choices[i] for i in order if not choices[i].extrapolated), None)
    return Advice(
        group["group"],
        group["data"]["target"],
        law.law.name if law is not None else None,
        "" if law is not None else _why(group),
        sd,
        len(menu),
        len(affordable),
        min((item.cost for item in menu), default=None),
        tuple(choices[i] for i in order[:top]),
        inside if order and choices[order[0]].extrapolated else None,
        tuple(llms),
        tuple(counts),
    )


def _needed_size(law: Predictor, v: float, error: float, n: float) -> float | None:
    """The least size, from n on and by bisection, that errs no more than `error` at v; None beyond 1e6 n."""

    def enough(factor: float) -> bool:
        return bool(law(np.array([n * math.exp(factor)]), np.array([v]))[0][0] <= error)

    low, high = 0.0, math.log(1e6)
    if not enough(high):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return n * math.exp(high)


def _why(group: dict[str, Any]) -> str:
    if group["best_law"] is None:
        return str(group["no_fit"] or "none of the asked laws can be fitted")
    return str(group["laws"][group["best_law"]]["reason"])


def _choice(
    group: dict[str, Any], judged: _Judged, i: int, affordable: list[int], budget: float, sd: float | None
) -> Choice:
    item, own, cells = judged.candidates[i], judged.intervals[i], group["data"]["cells"]
    outside = not all(
        min(cell[key] for cell in cells) / _SAME <= value <= max(cell[key] for cell in cells) * _SAME
        for key, value in (("n", item.n), ("v", item.v))
    )
    cell = _measured(group).get((item.n, item.v))
    others = [j for j in affordable if j != i]
    near = None if sd is None else sum(abs(judged.error[j] - judged.error[i]) <= sd for j in others)
    overlapping = None
    if own is not None:
        spans = [judged.intervals[j] for j in others]
        overlapping = sum(x is not None and x[0] <= own[1] and own[0] <= x[1] for x in spans)
    return Choice(
        *item,
        float(judged.error[i]),
        own,
        item.cost / budget,
        outside,
        None if cell is None else cell["error"],
        None if near is None else int(near),
        overlapping,
    )


def _alternative(
    what: str, judged: _Judged, choices: dict[int, Choice], own: list[int], budget: float, best: int
) -> Alternative:
    """Of the candidates `own`, against the candidate `best`."""
    within = judged.order(i for i in own if i in choices)
    enough = [judged.candidates[i].cost for i in own if judged.error[i] <= judged.error[best] * _SAME]
    times = min(enough) / budget if enough else None
    if not within:
        return Alternative(what, None, None, None, times, None)
    return Alternative(what, choices[within[0]], *judged.loss(within[0], best), times, None)


class Measured(NamedTuple):
    """One method at one of its measured points."""

    llm_name: str
    method: str
    v: float
    cost: float
    error: float
    interval: Interval | None


def measured_methods(
    record: dict[str, Any], price: Callable[[str, dict[str, Any]], float | None], budget: float, top: int
) -> tuple[Measured, ...]:
    """The best points of the methods that were compared, within the budget.

    Args:
      record: an analysis.json.
      price: the cost of an answer of the LLM of this name at a point of the record; None where it has none.
      budget: in its unit.
      top: how many.
    """
    found = []
    for comparison in record["methods"]:
        for point in comparison["points"]:
            cost = price(comparison["llm_name"], point)
            if cost is not None and cost <= budget * _SAME:
                span = point["interval"]
                head = comparison["llm_name"], point["method"], point["v"], cost, point["error"]
                found.append(Measured(*head, None if span is None else (span[0], span[1])))
    return tuple(sorted(found, key=lambda item: (item.error, item.cost))[:top])


def show(advice: Advice, budget: float, unit: str, asked: str) -> str:
    """The advice for people; `asked` says what the answer is."""
    target = advice.target
    basis = f"law {advice.law}, residual sd {points(advice.residual_sd or 0.0, target)}"
    if advice.law is None:
        basis = f"no law is identified ({advice.reason}): measured cells alone are compared"
    lines = [f"{advice.group}: {in_unit(budget, unit)} {asked}; {basis}"]
    if not advice.picks:
        dear = "" if advice.cheapest is None else f"; the cheapest costs {in_unit(advice.cheapest, unit)}"
        return "\n".join([*lines, f"  the budget buys none of {advice.candidates} candidates{dear}"])
    lines.append(
        f"     {'LLM':18} {'N':>6} {'V':>5} {'error':>7}  {'95% interval':16} {'measured':>8} {'cost':>12} "
        f"{'budget':>6}  others within 1 sd, overlapping"
    )
    lines += [f"  {place:2} {_row(pick, unit, target)}" for place, pick in enumerate(advice.picks, 1)]
    if advice.inside is not None and advice.inside not in advice.picks:
        lines.append(f"     {_row(advice.inside, unit, target)}  (the best within what was measured)")
    lines.append(f"  of {advice.affordable} candidates within the budget ({advice.candidates} in all)")
    for title, alternatives in (("another LLM", advice.other_llms), ("another V", advice.other_tokens)):
        if alternatives:
            lines.append(
                f"  the price of {title}: error lost, and how many budgets the error of the first would take"
            )
            lines += [f"     {_priced(item, target)}" for item in alternatives]
    return "\n".join(lines)


def _row(pick: Choice, unit: str, target: str) -> str:
    measured = "" if pick.measured is None else level(pick.measured, target)
    ties = ", ".join("-" if x is None else str(x) for x in (pick.within_sd, pick.overlapping))
    error, price = level(pick.error, target), in_unit(pick.cost, unit)
    head = f"{pick.llm_name:18} {count(pick.n):>6} {tokens(pick.v):>5} {error:>7}"
    return (
        f"{head}  {_span(pick.interval, target):16} {measured:>8} {price:>12} {pick.share:6.0%}  {ties}"
        + ("" if pick.least_ms is None else f"  {significant(pick.least_ms)} ms at least")
        + ("  (extrapolated)" if pick.extrapolated else "")
    )


def _span(interval: Interval | None, target: str) -> str:
    if interval is None:
        return "-"
    low, high = (level(x, target) for x in interval)
    return f"[{low}, {high}]"


def _priced(item: Alternative, target: str) -> str:
    times = "none does" if item.times_budget is None else f"x{significant(item.times_budget)}"
    if item.needed_n is not None:
        times += f" by {count(item.needed_n)}, off the menu"
    if item.best is None or item.loss is None:
        return f"{item.what:16} {'not within the budget':34} {times}"
    loss = f"+{points(item.loss, target)}"
    if item.loss_interval is not None:
        low, high = (points(x, target) for x in item.loss_interval)
        loss += f" [{low}, {high}]"
    best = f"{item.best.llm_name} at V = {tokens(item.best.v)}"
    return f"{item.what:16} {loss:34} {times:28} ({best}{', extrapolated' if item.best.extrapolated else ''})"


def show_methods(found: Sequence[Measured], unit: str) -> str:
    """The measured methods for people."""
    lines = ["methods as measured, within the budget, mean over the tasks that all have:"]
    for item in found:
        lines.append(
            f"     {item.llm_name:18} {item.method:24} V = {tokens(item.v):5} {percent(item.error):>6} "
            f"{_span(item.interval, 'error'):16} {in_unit(item.cost, unit):>12}"
        )
    return "\n".join(lines if found else [*lines, "     none"])
