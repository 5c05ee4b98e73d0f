"""The two published sets and their fits, made once for the tests that share them."""

from __future__ import annotations

from functools import cache

from analysis.bootstrap import Replicates, resample
from analysis.data import Table, load
from analysis.fit import Fit, fit
from analysis.laws import LAWS
from analysis.profile import bend_interval, ratio_interval
from analysis.verdict import Verdict, judge

REASONING, OCR = "paper-reasoning", "paper-ocr"
BOTH = (REASONING, OCR)
BUDGET = 2 * 7e9 * 66  # a 7B LLM on 16 visual and 50 text tokens
EVERYWHERE = (1.0, 576.0)


@cache
def table(name: str) -> Table:
    return load(name).tables[0]


@cache
def fitted_law(name: str, law: str) -> Fit:
    return fit(LAWS[law], table(name))


@cache
def replicates(name: str, law: str) -> Replicates:
    return resample(fitted_law(name, law), 10_000)


def verdict(name: str, law: str) -> Verdict:
    found = fitted_law(name, law)
    bend = bend_interval(found) if law == "regular" else None
    return judge(found, replicates(name, law), ratio_interval(found), bend)


def values(found: Fit, *names: str) -> list[float]:
    return [found.params[name] for name in names]
