"""Searching for schedules: the greedy search and the sigmoid under a budget, on scores that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmscale.cost.flops import layer_flops
from vlmscale.errors import UserError
from vlmscale.evaluate.scheduling import Counts, Prefill, greedy, under_budget
from vlmscale.models.sizes import DecoderSize
from vlmscale.reducers.schedule import Schedule, sigmoid_schedule

SIZE = DecoderSize(width=32, num_layers=8, num_heads=4, num_kv_heads=2, mlp_width=64)


@given(st.lists(st.integers(1, 20), min_size=7, max_size=7), st.integers(20, 40))
def test_the_greedy_search_finds_what_each_layer_needs(needed: list[int], tokens: int) -> None:
    """A model that answers right as long as each layer has what it needs."""
    tried: list[Counts] = []

    def score(counts: Counts) -> float:
        tried.append(counts)
        return float(all(there >= least for there, least in zip(counts[1:], needed, strict=True)))

    found = greedy(score, 8, tokens, 0.0, lambda line: None)
    least = np.maximum.accumulate(needed[::-1])[::-1]  # what a layer needs, the later ones need in it
    assert found == (tokens, *least)
    assert len(tried) <= 1 + 7 * 6


def test_the_greedy_search_spends_its_tolerance_and_tells_each_layer() -> None:
    said: list[str] = []
    found = greedy(lambda counts: counts[-1] / 16, 4, 16, 0.25, said.append)
    assert found == (16, 12, 12, 12)
    assert said == [f"layer {layer}: 12 of 16 visual tokens" for layer in (1, 2, 3)]
    said.clear()
    assert greedy(lambda counts: 1.0, 4, 16, 0.0, said.append) == (16, 1, 1, 1)
    assert len(said) == 1  # fewer cannot be


def test_a_sigmoid_falls_from_all_to_its_least() -> None:
    shares = sigmoid_schedule(32, 1.0, 16.0, 0.1)
    assert shares[0] == 1.0
    assert shares[16] == pytest.approx(0.55)
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)
    assert list(shares) == sorted(shares, reverse=True)
    assert sigmoid_schedule(4, 50.0, -100.0, 0.25) == (1.0, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_a_schedule_keeps_to_its_budget_and_is_the_best_of_those_tried(budget: float) -> None:
    prefill, tried = Prefill(SIZE, 20.0, 100), {}

    def score(counts: Counts) -> float:  # layer 3 matters most
        tried[counts] = counts[3] + 0.1 * sum(counts) / 8
        return tried[counts]

    found = under_budget(score, prefill, budget, 30)
    assert tried[found] == max(tried.values())
    assert all(prefill.share(counts) <= budget for counts in tried)
    assert prefill.share(found) > budget - 0.1
    assert len(tried) > 5
    plain = 8 * layer_flops(SIZE, 120, 0)
    assert prefill.share(found) == pytest.approx(sum(layer_flops(SIZE, 20 + n, 0) for n in found) / plain)


def test_a_budget_that_no_schedule_keeps_is_refused() -> None:
    with pytest.raises(UserError, match=r"--budget 0.1: a share of the plain .*, 0\.\d+ to 1 here"):
        under_budget(lambda counts: 0.0, Prefill(SIZE, 20.0, 100), 0.1, 5)


def test_a_schedule_cuts_where_its_shares_fall() -> None:
    schedule = Schedule((1, 1, 0.5, 0.5, 0.2), 8)
    assert schedule.layers == (2, 4)
    assert [schedule.most(cut, 10) for cut in (0, 1)] == [5, 2]
    assert Schedule((1,), 8).layers == ()
    assert Schedule((), 4).layers == (1, 2, 3)
