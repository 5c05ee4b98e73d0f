"""Evaluate a trained run: answers first, by item id, then scores, then one row a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlmscale import __version__
from vlmscale.compressors import COMPRESSORS
from vlmscale.config import Cell
from vlmscale.cost import flops
from vlmscale.data.images import ImageError, decode_image
from vlmscale.data.records import Record, Turn
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import (
    GREEDY,
    Answer,
    Sampling,
    answer_length,
    check_prompt,
    make_generate,
    prompt_batch,
)
from vlmscale.evaluate.scoring import SCORERS
from vlmscale.models.decoder import unstack
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.records import ResultRow, git_commit, now, read_json, read_rows, write_lines
from vlmscale.sharding import make_mesh, replicated
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.loop import load_prepared, with_sharding
from vlmscale.train.prepared import Prepared, encode_images, load_tower, pixels_of
from vlmscale.train.step import build_model, init_params
from vlmscale.weights import tree

SCORER = "exact_match"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One question to answer."""

    id: str
    image: int  # index of the picture, -1 for none
    question: str
    truth: str
    history: tuple[Turn, ...]
    task: str
    task_group: str
    chance: float


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to answer: `params` are in the decoder's "loop" layout."""

    path: Path
    cell: Cell
    sweep: str
    cell_id: str
    prepared: Prepared
    params: dict[str, Any]


def load_run(path: Path) -> LoadedRun:
    """Open a trained run directory.

    Raises:
      UserError: not a run, not trained to the end, or its data is gone.
    """
    spec = read_json(path / "spec.json")
    if not (path / "done.json").exists():
        raise UserError(f"{path}: training is not finished (no done.json); run `vlmscale train` again")
    cell, prepared = load_prepared(path)
    abstract = abstract_params(cell, prepared.manifest["vocab_size"])
    checkpoints = Checkpoints(path)
    params = checkpoints.restore_params(with_sharding(abstract, replicated(make_mesh())))
    checkpoints.close()
    params["decoder"] = unstack(params["decoder"])
    return LoadedRun(path, cell, spec["sweep"], spec["cell_id"], prepared, params)


def abstract_params(cell: Cell, vocab_size: int) -> Any:
    """Shapes of a cell's parameters, without making them."""
    model = build_model(cell, vocab_size)
    tower, slots = TOWERS[cell.tower.name], cell.compressor.visual_tokens
    ids = jax.ShapeDtypeStruct((1, slots + 8), np.int32)
    batch: dict[str, Any] = dict.fromkeys(("tokens", "positions", "segment_ids", "target_positions"), ids)
    batch["image_slots"] = jax.ShapeDtypeStruct(ids.shape, bool)
    if slots:
        batch["selected"] = jax.ShapeDtypeStruct((1, tower.num_patches, tower.width), np.float32)
        channels = tower.width * len(tower.levels)
        batch["levels"] = jax.ShapeDtypeStruct((1, tower.num_patches, channels), np.float32)
    return jax.eval_shape(lambda b: init_params(model, b, 0), batch)


def make_items(records: list[Record], image_of: np.ndarray, history: str) -> list[Item]:
    """One item a turn; with history "gold" behind the true conversation so far, else on its own."""
    items = []
    for record, image in zip(records, image_of, strict=True):
        for number, turn in enumerate(record.turns):
            before = record.turns[:number] if history == "gold" else ()
            name = record.id if len(record.turns) == 1 else f"{record.id}#{number}"
            task, group = record.task or "records", record.task_group or "records"
            items.append(
                Item(name, int(image), turn.question, turn.answer, before, task, group, record.chance)
            )
    return items


def answer_items(run: LoadedRun, items: list[Item], split: str, progress: Progress) -> list[tuple[str, int]]:
    """Greedy answers in the order of `items`: (text, generated tokens with the end token)."""
    cell, template = run.cell, run.prepared.template
    features = run.prepared.features(split, cell)
    prompts = [template.prompt(item.question, item.history) for item in items]
    model = build_model(cell, run.prepared.tokenizer.get_vocab_size(), "loop")
    generate = make_generate(model, cell.evaluate.max_new_tokens, (template.end,))
    size = min(cell.evaluate.batch_size, len(items))
    length = max(map(len, prompts)) + cell.compressor.visual_tokens
    answers: list[tuple[str, int]] = []
    for start in range(0, len(items), size):
        rows = list(range(start, min(start + size, len(items))))
        rows += [rows[0]] * (size - len(rows))
        batch: dict[str, Any] = prompt_batch(
            [prompts[i] for i in rows],
            [items[i].image >= 0 for i in rows],
            template,
            cell.compressor.visual_tokens,
            length,
        )
        for name, store in features.items():
            batch[name] = store[[max(items[i].image, 0) for i in rows]]
        ids = np.asarray(generate(run.params, batch)).tolist()
        for row in ids[: min(size, len(items) - start)]:
            answers.append((template.decode(row), answer_length(row, (template.end,))))
        progress(min(start + size, len(items)), len(items))
    return answers


def evaluate(run: LoadedRun, tasks: list[str] | None, progress: Progress) -> list[ResultRow]:
    """Answer and score every item; writes answers/<task>.jsonl and result.jsonl.

    Args:
      run: a trained run.
      tasks: names to evaluate; None for all.
      progress: called with (items answered, items in all).

    Raises:
      UserError: a task that the data does not have.
    """
    split = run.prepared.eval_split
    items = make_items(*run.prepared.records(split), run.cell.evaluate.history)
    known = sorted({item.task for item in items})
    for task in tasks or []:
        if task not in known:
            raise UserError(f"task {task}: the data of {run.path} has {', '.join(known)}")
    chosen = [item for item in items if tasks is None or item.task in tasks]
    answers = answer_items(run, chosen, split, progress)
    by_task: dict[str, list[tuple[Item, str, int]]] = {}
    for item, (answer, used) in zip(chosen, answers, strict=True):
        by_task.setdefault(item.task, []).append((item, answer, used))
    rows, sample_flops = [], _training_flops(run)
    (run.path / "answers").mkdir(exist_ok=True)
    for task, answered in sorted(by_task.items()):
        lines = [
            json.dumps({"id": item.id, "question": item.question, "answer": answer, "truth": item.truth})
            for item, answer, _ in answered
        ]
        write_lines(run.path / "answers" / f"{task}.jsonl", lines)
        rows.append(_row(run, split, answered, sample_flops))
    results = run.path / "result.jsonl"
    others = [row for row in read_rows(results) if row["task"] not in by_task] if results.exists() else []
    every = sorted(others + [asdict(row) for row in rows], key=lambda row: row["task"])
    write_lines(results, [json.dumps(row) for row in every])
    return rows


def _row(run: LoadedRun, split: str, answered: list[tuple[Item, str, int]], sample_flops: float) -> ResultRow:
    cell, template = run.cell, run.prepared.template
    llm, tower = SIZES[cell.llm.name], TOWERS[cell.tower.name]
    vocab, visual_tokens = run.prepared.tokenizer.get_vocab_size(), cell.compressor.visual_tokens
    scores = [SCORERS[SCORER](answer, item.truth) for item, answer, _ in answered]
    text = float(np.mean([len(template.prompt(item.question, item.history)) for item, _, _ in answered]))
    generated = float(np.mean([used for _, _, used in answered]))
    compressor = flops.compressor_flops(cell.compressor.name, visual_tokens, tower, llm.width)
    tower_flops = flops.tower_flops(tower) if visual_tokens else 0
    # Questions without an image cost neither tower nor visual tokens.
    with_image = float(np.mean([item.image >= 0 for item, _, _ in answered]))
    prompt = text + visual_tokens * with_image
    llm_flops = flops.inference_flops(llm, vocab, prompt, generated)
    cached = prompt + generated - 1  # the last token is not fed back
    done = read_json(run.path / "done.json")
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    heldout = [line["heldout_loss"] for line in metrics if "heldout_loss" in line]
    first = answered[0][0]
    return ResultRow(
        run_id=f"{run.sweep or 'run'}-{run.cell_id}",
        cell_id=run.cell_id,
        cohort_id=run.cell_id,
        sweep=run.sweep,
        seed=cell.train.seed,
        llm_name=cell.llm.name,
        n_total=tree.count(run.params["decoder"]),
        n_nonembed=llm.num_nonembedding_params,
        vision_tower=cell.tower.name,
        tower_flops=tower_flops,
        compressor=cell.compressor.name if visual_tokens else "none",
        compressor_params=tree.count(run.params.get("compressor", {})),
        compressor_flops=compressor,
        query_pass_flops=0,
        reducer=None,
        tokens_per_layer=prompt,
        kv_bytes=round(2 * 4 * llm.num_layers * llm.num_kv_heads * llm.head_dim * cached),
        visual_tokens=visual_tokens,
        text_tokens_mean=text,
        gen_tokens_mean=generated,
        image_size=tower.image_size,
        data_mix="scenes" if cell.data.source == "scenes" else Path(cell.data.records).name,
        data_samples=cell.train.steps * cell.train.batch_size,
        stage_steps=[cell.train.steps],
        lr=cell.train.learning_rate,
        train_flops=round(sample_flops * cell.train.steps * cell.train.batch_size),
        infer_flops=round(with_image * (tower_flops + compressor) + llm_flops),
        latency_ms=None,
        device=read_json(run.path / "env.json")["device"],
        task=first.task,
        task_group=first.task_group,
        split=split,
        prompt_id=f"toy-v1/{cell.evaluate.history}",
        scorer=SCORER,
        metric="accuracy",
        score_raw=float(np.sum(scores)),
        score=float(np.mean(scores)),
        n_items=len(scores),
        chance=float(np.mean([item.chance for item, _, _ in answered])),
        blind_score=None,
        heldout_loss=heldout[-1] if heldout else None,
        wall_s=done["wall_s"],
        vlmscale_version=__version__,
        git_commit=git_commit(),
        finished_at=now(),
        status="done",
    )


def _training_flops(run: LoadedRun) -> float:
    """FLOPs of an average training sample (padding is not counted as work)."""
    cell, llm = run.cell, SIZES[run.cell.llm.name]
    rows = run.prepared.rows("train", cell).rows
    tokens = float(np.mean([len(row.tokens) for row in rows]))
    with_image = float(np.mean([row.image_slots.any() for row in rows]))
    targets = float(np.mean([len(row.target_ids) for row in rows]))
    tower, vocab = TOWERS[cell.tower.name], run.prepared.tokenizer.get_vocab_size()
    compressor = flops.compressor_flops(cell.compressor.name, cell.compressor.visual_tokens, tower, llm.width)
    return flops.training_flops(llm, vocab, tokens, targets, with_image * compressor)


def answer_one(
    run: LoadedRun,
    image: Path | None,
    prompt: str,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Answer:
    """Answer to one question about one picture; greedy and of the run's own length unless told otherwise.

    Raises:
      UserError: a prompt that is empty or no text, or a picture that cannot be read.
    """
    check_prompt(prompt)
    cell, template = run.cell, run.prepared.template
    ids = template.prompt(prompt.strip())
    slots = cell.compressor.visual_tokens
    batch: dict[str, Any] = prompt_batch([ids], [image is not None], template, slots, len(ids) + slots)
    tower = TOWERS[cell.tower.name]
    pixels = np.zeros((1, tower.image_size, tower.image_size, 3), np.float32)
    if image is not None:
        try:
            pixels[0] = pixels_of(decode_image(image, target=tower.image_size), cell)
        except (ImageError, OSError) as error:
            raise UserError(f"{image}: {error}") from error
        if not slots:
            raise UserError(f"{run.path}: was trained without pictures; leave --image away")
    if slots:
        levels = COMPRESSORS[cell.compressor.name].needs_levels
        weights = load_tower(run.prepared.path / "tower.safetensors", cell.tower.name, levels)
        batch |= jax.jit(encode_images, static_argnums=(0, 3))(cell.tower.name, weights, pixels, levels)
    model = build_model(cell, run.prepared.tokenizer.get_vocab_size(), "loop")
    longest = max_new_tokens or cell.evaluate.max_new_tokens
    generate = make_generate(model, longest, (template.end,), sampling)
    row = np.asarray(generate(run.params, batch, np.uint32(seed)))[0].tolist()
    return Answer(template.decode(row), row[: answer_length(row, (template.end,))])
