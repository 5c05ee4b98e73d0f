"""Search for how many visual tokens each layer of a trained model needs (arXiv 2412.00556).

Reconstruction from the abstract; what is assumed is said in `vlmscale.reducers.schedule`. Schedules are tried
on calibration items with one compiled program, in the masked form, so that a trial costs what answering the
items costs. Where the authors tune the sigmoid by Bayesian optimisation, this takes DIRECT (of
`scipy.optimize`), which draws nothing at random: two numbers are searched, the third is given by the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import scipy.optimize

from vlmscale.config import ReducerConfig, trains_reducer
from vlmscale.cost.flops import layer_flops
from vlmscale.errors import UserError
from vlmscale.evaluate.asking import Calibration
from vlmscale.evaluate.items import Task, file_tasks, prompt_of, record_tasks, text_tokens
from vlmscale.evaluate.loaded import LoadedRun
from vlmscale.evaluate.tasks import score as score_answers
from vlmscale.models.sizes import SIZES, DecoderSize
from vlmscale.reducers.schedule import sigmoid_schedule

Counts = tuple[int, ...]  # visual tokens in each layer
Score = Callable[[Counts], float]
SPLIT = "validation"
_LEAST_SHARE = 1e-3
_STEEPEST = 4.0  # of the sigmoid: from 98% to 2% within two layers


class Found(NamedTuple):
    """A schedule, its score on the calibration items, and its share of the plain prefill's FLOPs."""

    counts: Counts
    score: float
    flops_share: float


@dataclass(frozen=True)
class Prefill:
    """What a schedule costs: the layers' FLOPs on a prompt of `text` tokens and the visual ones."""

    size: DecoderSize
    text: float
    tokens: int

    def share(self, counts: Counts) -> float:
        """FLOPs of a schedule over those of the plain model."""
        plain = self.size.num_layers * layer_flops(self.size, self.text + self.tokens, 0)
        return sum(layer_flops(self.size, self.text + count, 0) for count in counts) / plain


def greedy(
    score: Score, num_layers: int, tokens: int, tolerance: float, tell: Callable[[str], None]
) -> Counts:
    """G-Search: layer by layer from the first, the fewest tokens with which the score stays.

    Layer 0 has all. Each layer's count is found by bisection between 1 and the count of the layer before, the
    layers behind having the same; that is right where fewer tokens never score better.

    Args:
      score: of a schedule.
      num_layers: L.
      tokens: visual tokens of the plain model.
      tolerance: by which the score may be lower than the plain model's.
      tell: called with a line for each layer.
    """
    counts = [tokens] * num_layers
    target = score(tuple(counts)) - tolerance
    for layer in range(1, num_layers):
        low, high = 0, counts[layer]  # too few, and enough
        while high - low > 1:
            middle = (low + high) // 2
            if score((*counts[:layer], *[middle] * (num_layers - layer))) >= target:
                high = middle
            else:
                low = middle
        counts[layer:] = [high] * (num_layers - layer)
        tell(f"layer {layer}: {high} of {tokens} visual tokens")
        if high == 1:
            break
    return tuple(counts)


def under_budget(score: Score, prefill: Prefill, budget: float, trials: int) -> Counts:
    """P-Sigmoid: of the sigmoid schedules whose FLOPs are the budget, the one of the best score.

    Steepness and middle are searched, the least share follows from the budget.

    Args:
      score: of a schedule.
      prefill: what schedules cost.
      budget: share of the plain prefill's FLOPs.
      trials: schedules to try.

    Raises:
      UserError: no schedule is as cheap, since layer 0 and one token in each other layer cost more.
    """
    num_layers = prefill.size.num_layers
    cheapest = prefill.share((prefill.tokens, *[1] * (num_layers - 1)))
    if not cheapest <= budget <= 1:
        raise UserError(
            f"--budget {budget:g}: a share of the plain prefill's FLOPs, {cheapest:.3f} to 1 here"
        )
    tried: dict[Counts, float] = {}

    def loss(point: np.ndarray) -> float:
        counts = _within(prefill, budget, float(np.exp(point[0])), float(point[1]))
        if counts not in tried:
            tried[counts] = score(counts)
        return -tried[counts]

    bounds = [(np.log(0.1), np.log(_STEEPEST)), (0.0, float(num_layers))]
    scipy.optimize.direct(loss, bounds, maxfun=trials, locally_biased=False)
    # Of equal scores the cheapest.
    return max(tried, key=lambda counts: (tried[counts], -prefill.share(counts)))


def _within(prefill: Prefill, budget: float, steepness: float, middle: float) -> Counts:
    """The sigmoid schedule of the largest least share that the budget allows."""

    def counts(least: float) -> Counts:
        shares = sigmoid_schedule(prefill.size.num_layers, steepness, middle, least)
        return tuple(max(1, int(share * prefill.tokens + 0.5)) for share in shares)

    low, high = _LEAST_SHARE, 1.0
    if prefill.share(counts(low)) > budget:  # the curve comes down too late: earlier by what is missing
        early, late = -float(prefill.size.num_layers) - 10 / steepness, middle
        for _ in range(40):
            middle = (early + late) / 2
            early, late = (middle, late) if prefill.share(counts(low)) <= budget else (early, middle)
        middle = early
        return counts(low)
    for _ in range(40):
        least = (low + high) / 2
        low, high = (least, high) if prefill.share(counts(least)) <= budget else (low, least)
    return counts(low)


def with_schedule(run: LoadedRun) -> LoadedRun:
    """The run with a reducer whose schedule is an argument.

    Raises:
      UserError: it was trained without pictures.
    """
    if not run.cell.compressor.visual_tokens:
        raise UserError(f"{run.path}: a blind model has no visual tokens to schedule")
    if trains_reducer(run.cell):
        raise UserError(
            f"{run.path}: was trained with reducer.name={run.cell.reducer.name}; a reducer that trains "
            "stays with its run"
        )
    return replace(run, cell=replace(run.cell, reducer=ReducerConfig("g_search")), guide=None)


def calibration_tasks(run: LoadedRun, names: list[str], data: Path | None, most: int) -> list[Task]:
    """What schedules are tried on: at most so many items that show one picture, spread over the tasks.

    Items with several pictures would need counts of their own; the shares found hold for them too.

    Args:
      run: a trained run.
      names: of tasks; [] for all.
      data: directory of task files; None for the run's validation data, which is not what rows are made of.
      most: items in all.

    Raises:
      UserError: the data has no such task or none, or no item shows one picture.
    """
    config = run.cell.evaluate
    if data is not None:
        known = {task.name: task for task in file_tasks(names, data)}
    else:
        datasets = run.prepared.datasets.get(SPLIT)
        if not datasets:
            raise UserError(f"{run.path}: has no validation data; name other items with --tasks and --data")
        known = record_tasks(datasets, SPLIT, config.history, config.max_new_tokens)
    for name in names:
        if name not in known:
            raise UserError(f"task {name}: the validation data of {run.path} has {', '.join(known)}")
    template, longest = run.prepared.template, run.cell.data.max_text_tokens
    found = []
    for task in [known[name] for name in names or known]:
        one = [item for item in task.items if item.images == 1]
        if data is None:
            one = [item for item in one if text_tokens(prompt_of(item, template)) <= longest]
        found.append(replace(task, items=tuple(one)))
    total = sum(len(task.items) for task in found)
    if not total:
        raise UserError(f"{run.path}: no calibration item shows one picture")
    chosen, place = [], 0
    for task in found:
        # Every so many of all items, one task behind the other.
        last = place + len(task.items)
        wanted = [at for at in range(0, total, math.ceil(total / most)) if place <= at < last]
        chosen.append(replace(task, items=tuple(task.items[at - place] for at in wanted)))
        place = last
    return [task for task in chosen if task.items]


def search(
    run: LoadedRun,
    tasks: list[Task],
    *,
    tolerance: float | None,
    budget: float | None,
    trials: int,
    tell: Callable[[str], None],
) -> tuple[Found, Found]:
    """The plain model and the schedule found.

    Args:
      run: of `with_schedule`.
      tasks: of `calibration_tasks`; the score is the mean over all items.
      tolerance: for `greedy`; None for `under_budget`.
      budget: for `under_budget`.
      trials: for `under_budget`.
      tell: called with progress, a line.

    Raises:
      UserError: as `under_budget`, or a picture cannot be read.
    """
    template, size, tokens = (
        run.prepared.template,
        SIZES[run.cell.llm.name],
        run.cell.compressor.visual_tokens,
    )
    items = [item for task in tasks for item in task.items]
    prompts = [prompt_of(item, template) for item in items]
    prefill = Prefill(size, float(np.mean([text_tokens(prompt) for prompt in prompts])), tokens)
    with jax.set_mesh(run.mesh):
        score = partial(_score, tasks, Calibration(run, tasks, SPLIT))
        plain = (tokens,) * size.num_layers
        first = Found(plain, score(plain), 1.0)
        tell(f"plain model: {first.score:.4f} on {len(items)} items")
        if budget is not None:
            found = under_budget(score, prefill, budget, trials)
        else:
            assert tolerance is not None
            found = greedy(score, size.num_layers, tokens, tolerance, tell)
        return first, Found(found, score(found), prefill.share(found))


def _score(tasks: list[Task], calibration: Calibration, counts: Counts) -> float:
    """Mean mark of all items under a schedule."""
    said = calibration.answers(np.array(counts, np.int32))
    marks = [
        mark
        for task in tasks
        for mark in score_answers(task.name, task.rule, task.questions, said[task.name]).marks.values()
    ]
    return float(np.mean(marks))
