"""Rows of result.jsonl: what one task at one count of visual tokens scored, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from vlmscale import __version__
from vlmscale.compressors import COMPRESSORS, label, parse_options
from vlmscale.config import Cell, DataConfig, reducer_label, reducer_of, trains_reducer
from vlmscale.cost.image import image_flops, sample_flops
from vlmscale.data.conversation import IMAGE_MARK
from vlmscale.evaluate.asking import Pass
from vlmscale.evaluate.items import Task, first_question, prompt_of, text_tokens
from vlmscale.evaluate.loaded import LoadedRun
from vlmscale.evaluate.spent import Prompts, spent
from vlmscale.evaluate.tasks import Scored
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.records import ResultRow, git_commit, now, read_json
from vlmscale.train.heldout import heldout_rows, mean_loss
from vlmscale.train.recipe import stages
from vlmscale.train.step import build_model, plain_loss_sum
from vlmscale.train.together import read_together
from vlmscale.weights import tree


class Costs(NamedTuple):
    """What the rows of all tasks at one count share."""

    visual_tokens: int  # asked for: of an adaptive method the most
    mean_tokens: float  # over the pictures of all tasks
    heldout_loss: float | None
    per_sample: float  # training FLOPs of an average sample

    @staticmethod
    def of(run: LoadedRun, passes: Sequence[Pass], visual_tokens: int, heldout: float | None) -> Costs:
        """Those of tasks that were answered at one count, with the held-out loss there."""
        cell = run.cell
        given, pictures = _pictures(passes)
        # Of an adaptive method the mean over pictures is its V, for tasks without pictures too.
        mean_tokens = given / pictures if pictures else float(visual_tokens)
        sample = run.prepared.samples("train", cell).average()
        spec = reducer_of(cell)
        chosen = spec is not None and spec.patches is not None  # training saw them all
        tokens = None if chosen else mean_tokens
        trained = sample_flops(cell, run.prepared.vocab_rows(cell), sample, tokens)
        return Costs(visual_tokens, mean_tokens, heldout, trained)


def _pictures(passes: Sequence[Pass]) -> tuple[int, int]:
    """Visual tokens of all answered items, and how many pictures these show."""
    given = pictures = 0
    for one in passes:
        for item in one.task.items:
            if (said := one.journal.said.get(item.id)) is not None:
                given, pictures = given + said.visual_tokens, pictures + item.images
    return given, pictures


def make_row(run: LoadedRun, one: Pass, scored: Scored, blind: Scored | None, costs: Costs) -> ResultRow:
    """The row of one pass.

    Args:
      run: that answered.
      one: the task and what was said.
      scored: its score.
      blind: the score of the same questions without their pictures, where they were asked so.
      costs: of the count.
    """
    cell, template, task = run.cell, run.prepared.template, one.task
    llm, tower = SIZES[cell.llm.name], TOWERS[cell.tower.name]
    prompts = [prompt_of(item, template) for item in task.items]
    text = float(np.mean([text_tokens(prompt) for prompt in prompts]))
    said = list(one.journal.said.values())
    generated = float(np.mean([answer.tokens for answer in said])) if said else 0.0
    # Questions without a picture cost no visual tokens.
    given, pictures = _pictures([one])
    mean_tokens = given / pictures if pictures else costs.mean_tokens
    per_item = sum(item.images for item in task.items) / len(task.items) if costs.visual_tokens else 0.0
    queries = float(np.mean([len(template.query(first_question(item))) for item in task.items]))
    image = image_flops(cell, round(mean_tokens), round(text), queries)
    reducer = reducer_label(cell) if costs.visual_tokens else None
    took = spent(run, one, image, Prompts(text, per_item, queries, text_ahead(prompts)))
    options = parse_options(cell.compressor.name, cell.compressor.options)
    chance = task.chance if task.chance is not None else scored.chance
    return ResultRow(
        run_id=f"{run.sweep or 'run'}-{run.cell_id}",
        cell_id=run.cell_id,
        cohort_id=run.cohort_id,
        sweep=run.sweep,
        seed=cell.train.seed,
        llm_name=cell.llm.name,
        n_total=tree.count(run.params["decoder"]),
        n_nonembed=llm.num_nonembedding_params,
        vision_tower=cell.tower.name,
        tower_flops=image.tower,
        compressor=label(cell.compressor.name, options) if costs.visual_tokens else "none",
        compressor_params=tree.count(run.params.get("compressor", {})),
        compressor_flops=image.compressor,
        query_pass_flops=image.query_pass,
        reducer=reducer,
        tokens_per_layer=sum(took.layers) / len(took.layers),
        kv_bytes=round(took.kv_bytes),
        visual_tokens=int(mean_tokens) if mean_tokens.is_integer() else mean_tokens,
        text_tokens_mean=text,
        gen_tokens_mean=generated,
        image_size=tower.image_size,
        data_mix=data_mix(cell.data),
        data_samples=samples_seen(run),
        stage_steps=[stage.train.steps for stage in stages(cell)],
        lr=cell.train.learning_rate,
        train_flops=round(costs.per_sample * samples_seen(run)),
        infer_flops=round(took.flops),
        latency_ms=None,
        device=read_json(run.path / "env.json")["device"],
        dtype=str(run.dtype),
        task=task.name,
        task_group=task.group,
        split=task.split,
        prompt_id=prompt_id(cell, task),
        scorer=scored.scorer,
        metric=scored.metric,
        score_raw=scored.summary.raw,
        score=scored.summary.score,
        stderr=scored.summary.stderr,
        n_items=scored.n_items,
        n_failed=scored.n_missing,
        details=scored.summary.details,
        chance=chance,
        blind_score=None if blind is None else blind.summary.score,
        heldout_loss=costs.heldout_loss,
        wall_s=read_json(run.path / "done.json")["wall_s"],
        vlmscale_version=__version__,
        git_commit=git_commit(),
        finished_at=now(),
        status="done",
    )


def text_ahead(prompts: Sequence[Sequence[int]]) -> float:
    """Mean tokens of text in front of the last image of prompts."""
    ahead = 0
    for prompt in prompts:
        places = [place for place, token in enumerate(prompt) if token == IMAGE_MARK]
        if places:
            ahead += places[-1] + 1 - len(places)
    return ahead / max(len(prompts), 1)


def data_mix(data: DataConfig) -> str:
    """Short name of what was trained on."""
    if data.prepared:
        return ",".join(word.strip().rstrip("/").rpartition("/")[2] for word in data.prepared.split(","))
    return "scenes" if data.source == "scenes" else Path(data.records).name


def prompt_id(cell: Cell, task: Task) -> str:
    """How questions are put: template, the way to tokenize where it matters, then history or benchmark."""
    template = {"toy": "toy-v1"}.get(cell.data.template, f"{cell.data.template}-{cell.data.tokenization}")
    return f"{template}/{task.asked_as}"


def heldout_loss(run: LoadedRun, visual_tokens: int) -> float | None:
    """Loss per supervised token on the validation split with so many visual tokens; None without a split.

    Training logs it at the end; of a nested compressor it logs what it trains, so there it is computed. None
    with a reducer that is asked of a plain run, since what training logged is without it.
    """
    cell, prepared = run.cell, run.prepared
    if reducer_of(cell) is not None and not trains_reducer(cell):
        return None
    if "validation" not in prepared.manifest["records"]:
        return None
    if COMPRESSORS[cell.compressor.name].nested is None or not visual_tokens:
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        logged = [line["heldout_loss"] for line in map(json.loads, lines) if "heldout_loss" in line]
        return logged[-1] if logged else None
    smaller = replace(cell, compressor=replace(cell.compressor, visual_tokens=visual_tokens))
    reading = read_together(prepared, "validation", [smaller], training=False)
    model = build_model(cell, prepared.vocab_rows(cell), "loop", visual_tokens)
    sums = jax.jit(lambda params, batch: plain_loss_sum(model, params, batch))
    params = run.params | ({} if run.tower is None else {"tower": run.tower})
    stream = reading.in_order(heldout_rows(reading, run.mesh), (0, 1))
    return mean_loss(lambda batch: sums(params, batch), stream)


def samples_seen(run: LoadedRun) -> int:
    """Conversations that training was shown; a packed row holds several."""
    rows = run.cell.train.steps * run.cell.train.batch_size
    layout = read_json(run.path / "data.json")
    return round(rows * layout["conversations"] / layout["rows"])
