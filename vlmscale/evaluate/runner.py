"""Evaluate a trained run: answers first, by item id, then scores, then one row a task."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmscale import __version__
from vlmscale.compressors import COMPRESSORS, label, parse_options
from vlmscale.compressors.features import tower_features
from vlmscale.config import Cell, DataConfig
from vlmscale.cost import flops
from vlmscale.cost.image import Sample, image_flops, sample_flops
from vlmscale.data.conversation import IMAGE_MARK
from vlmscale.data.images import ImageError, decode_image
from vlmscale.data.records import PLACEHOLDER
from vlmscale.data.sources import PictureReader
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import (
    GREEDY,
    Answer,
    Sampling,
    answer_length,
    check_prompt,
    make_generate,
    prompt_batch,
    prompt_inputs,
)
from vlmscale.evaluate.items import Item, by_length, first_question, make_items, text_tokens
from vlmscale.evaluate.scoring import SCORERS
from vlmscale.models.decoder import unstack
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.models.vlm import VLM
from vlmscale.records import ResultRow, git_commit, now, read_json, read_rows, write_lines
from vlmscale.sharding import make_mesh
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.frozen import load_tower, needs_of
from vlmscale.train.heldout import heldout_rows, mean_loss
from vlmscale.train.prepared import Prepared, pixels_of
from vlmscale.train.recipe import stages
from vlmscale.train.run import CHECKPOINTS, load_prepared
from vlmscale.train.state import first_params, lay_out
from vlmscale.train.step import build_model, plain_loss_sum, with_tower_outputs
from vlmscale.train.together import read_together
from vlmscale.validation import check_evaluable
from vlmscale.weights import tree

SCORER = "exact_match"
_QUERIES = 1024  # questions that are embedded together
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to answer.

    Attributes:
      params: of decoder, in its "loop" layout, and compressor.
      tower: of the tower where the run computes with it, trained or not; else None.
    """

    path: Path
    cell: Cell
    sweep: str
    cell_id: str
    cohort_id: str
    prepared: Prepared
    params: dict[str, Any]
    tower: dict[str, Any] | None
    _pictures: dict[str, list[PictureReader | None]] = field(default_factory=dict, repr=False)

    def pictures(self, split: str) -> list[PictureReader | None]:
        """How the pictures of each data set of a split are read; None of a blind model."""
        if split not in self._pictures:
            self._pictures[split] = self.prepared.pictures(split, [self.cell])
        return self._pictures[split]


def load_run(path: Path) -> LoadedRun:
    """Open a trained run directory.

    Raises:
      UserError: not a run, not trained to the end, or its data is gone.
    """
    spec = read_json(path / "spec.json")
    if not (path / "done.json").exists():
        raise UserError(f"{path}: training is not finished (no done.json); run `vlmscale train` again")
    cell, prepared = load_prepared(path)
    model, tower = build_model(cell, prepared.vocab_rows(cell)), prepared.tower(cell)
    places = lay_out(cell, model, make_mesh(), tower, jnp.float32)
    checkpoints = Checkpoints(path / CHECKPOINTS, read_only=True)
    found = checkpoints.restore_latest({"params": places.trained})
    checkpoints.close()
    if found is None:
        raise UserError(f"{path / CHECKPOINTS}: no checkpoint to read; train the run again")
    frozen, _ = first_params(cell, model, places, tower, places.frozen)
    params = {**frozen, **found[1]["params"]}
    params["decoder"] = unstack(params["decoder"])
    used = params.pop("tower", None)
    ids = spec["cell_id"], spec.get("cohort_id", spec["cell_id"])
    return LoadedRun(path, cell, spec["sweep"], *ids, prepared, params, used)


class Said(NamedTuple):
    """What the model said to one item."""

    text: str
    tokens: int  # generated, the end token included
    visual_tokens: int  # of the item's pictures together; 0 without one


def answer_items(
    run: LoadedRun, items: list[Item], split: str, visual_tokens: int, progress: Progress
) -> list[Said]:
    """Greedy answers in the order of `items`, with so many visual tokens a picture (at most, if adaptive)."""
    cell, template = run.cell, run.prepared.template
    prompts = [template.prompt(item.question, item.history) for item in items]
    model = build_model(cell, run.prepared.vocab_rows(cell), "loop", visual_tokens)
    generate = make_generate(model, cell.evaluate.max_new_tokens, template.stop_ids)
    queries = embed_queries(run, model, [first_question(item) for item in items])
    size = min(cell.evaluate.batch_size, len(items))
    slots = max(1, max(item.images for item in items))  # for pictures, of every row
    length = max(text_tokens(prompt) + prompt.count(IMAGE_MARK) * visual_tokens for prompt in prompts)
    answers: list[Said] = []
    for start in range(0, len(items), size):
        rows = list(range(start, min(start + size, len(items))))
        rows += [rows[0]] * (size - len(rows))
        batch: dict[str, Any] = prompt_batch([prompts[i] for i in rows], template, visual_tokens, length)
        batch |= _pictures(run, split, [items[i] for i in rows], slots)
        if queries is not None:
            batch["text_query"] = np.repeat(queries[rows], slots, axis=0)
        batch = _complete(model, batch, run.tower)
        ids = np.asarray(generate(run.params, batch)).tolist()
        shown = np.array([items[i].images for i in rows])[:, None] > np.arange(slots)
        counts = (shown * visual_counts(run, model, batch, shown.size).reshape(shown.shape)).sum(1).tolist()
        for row, count in list(zip(ids, counts, strict=True))[: min(size, len(items) - start)]:
            answers.append(Said(template.decode(row), answer_length(row, template.stop_ids), count))
        progress(min(start + size, len(items)), len(items))
    return answers


# What the tower makes of a batch's pixels, where its outputs were not stored.
_complete = jax.jit(with_tower_outputs, static_argnums=0)


def _pictures(run: LoadedRun, split: str, items: Sequence[Item], slots: int) -> dict[str, np.ndarray]:
    """The arrays of pictures, `slots` an item, zeros where it shows fewer; {} of a blind model."""
    readers, datasets = run.pictures(split), run.prepared.datasets[split]
    if readers[0] is None:
        return {}
    blank = readers[0].blank
    out = {name: np.zeros((len(items) * slots, *x.shape), x.dtype) for name, x in blank.items()}
    for row, item in enumerate(items):
        reader, dataset = readers[item.data_set], datasets[item.data_set]
        assert reader is not None
        files = dataset.images(item.record)[: item.images]
        for slot, picture in enumerate(reader.read(dataset, item.record, files)):
            for name in blank:
                out[name][row * slots + slot] = picture[name]
    return out


def embed_queries(run: LoadedRun, model: VLM, questions: list[str]) -> np.ndarray | None:
    """Embeddings [n, 1, D] of questions, each distinct one computed once; None where none is read."""
    if not model.visual_tokens or COMPRESSORS[model.compressor_name].text != "query":
        return None
    distinct = {question: place for place, question in enumerate(dict.fromkeys(questions))}
    most = run.cell.data.max_text_tokens  # as in training
    ids = [run.prepared.template.query(question)[:most] for question in distinct]
    tokens = np.full((len(ids), max(map(len, ids))), run.prepared.template.pad, np.int32)
    for row, query in enumerate(ids):
        tokens[row, : len(query)] = query
    lengths = np.array([len(query) for query in ids], np.int32)
    parts = [slice(start, start + _QUERIES) for start in range(0, len(ids), _QUERIES)]
    known = np.concatenate([_embed_query(model, run.params, tokens[part], lengths[part]) for part in parts])
    return known[[distinct[question] for question in questions]]


@functools.partial(jax.jit, static_argnums=0)
def _embed_query(model: VLM, params: dict[str, Any], tokens: jax.Array, length: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens, length, method="embed_query")


def visual_counts(run: LoadedRun, model: VLM, batch: dict[str, Any], pictures: int) -> np.ndarray:
    """How many tokens each picture of a batch gives, [pictures]."""
    options = dict(model.options)
    if model.visual_tokens and COMPRESSORS[model.compressor_name].adaptive(options):
        return np.asarray(_visual_counts(model, run.params, batch))
    return np.full(pictures, model.visual_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _visual_counts(model: VLM, params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    return model.apply({"params": params}, prompt_inputs(batch), method="visual_counts")


def evaluate(
    run: LoadedRun, tasks: list[str] | None, progress: Progress, visual_tokens: Sequence[int] = ()
) -> list[ResultRow]:
    """Answer and score every item; writes answers/<task>.jsonl and result.jsonl.

    Questions with more text than `data.max_text_tokens` are not asked; not_asked.jsonl names them.

    Args:
      run: a trained run.
      tasks: names to evaluate; None for all.
      progress: called with (items answered, items in all).
      visual_tokens: counts to evaluate at, of a compressor that gives many; () for those of the config.

    Returns:
      The new rows. Others that result.jsonl holds, of other tasks or counts, stay there.

    Raises:
      UserError: a task that the data does not have, or a count that the compressor does not give.
    """
    check_evaluable(run.cell, "--visual-tokens", visual_tokens)
    split = run.prepared.eval_split
    everything = make_items(run.prepared.datasets[split], run.cell.evaluate.history)
    items, long = by_length(everything, run.prepared.template, run.cell.data.max_text_tokens)
    if not items:
        raise UserError(f"{run.path}: every prompt has more than data.max_text_tokens text tokens")
    (run.path / "answers").mkdir(exist_ok=True)
    write_lines(run.path / "not_asked.jsonl", [json.dumps({"id": item.id}) for item in long])
    known = sorted({item.task for item in items})
    for task in tasks or []:
        if task not in known:
            raise UserError(f"task {task}: the data of {run.path} has {', '.join(known)}")
    chosen = [item for item in items if tasks is None or item.task in tasks]
    counts = visual_tokens or run.cell.evaluate.visual_tokens or (run.cell.compressor.visual_tokens,)
    rows: list[ResultRow] = []
    sample = run.prepared.samples("train", run.cell).average()
    for number, count in enumerate(counts):

        def tell(done: int, total: int, before: int = number) -> None:
            progress(before * total + done, len(counts) * total)

        said = answer_items(run, chosen, split, count, tell)
        rows += _rows(run, split, list(zip(chosen, said, strict=True)), count, sample)
    nested = COMPRESSORS[run.cell.compressor.name].nested is not None

    def key(row: dict[str, Any]) -> Any:
        return (row["task"], row["visual_tokens"]) if nested else row["task"]

    results, fresh = run.path / "result.jsonl", [asdict(row) for row in rows]
    taken = {key(row) for row in fresh}
    others = [row for row in read_rows(results) if key(row) not in taken] if results.exists() else []
    every = sorted(others + fresh, key=lambda row: (row["task"], row["visual_tokens"]))
    write_lines(results, [json.dumps(row) for row in every])
    return rows


def _rows(
    run: LoadedRun, split: str, answered: list[tuple[Item, Said]], visual_tokens: int, sample: Sample
) -> list[ResultRow]:
    """A row a task at one count; writes what was said."""
    cell = run.cell
    pictures = sum(item.images for item, _ in answered)
    # Of an adaptive method the mean over pictures is its V, for tasks without pictures too.
    given = sum(said.visual_tokens for _, said in answered)
    mean_tokens = given / pictures if pictures else float(visual_tokens)
    trained = sample_flops(cell, run.prepared.vocab_rows(cell), sample, mean_tokens)
    costs = Costs(visual_tokens, mean_tokens, heldout_loss(run, visual_tokens), trained)
    many = COMPRESSORS[cell.compressor.name].nested is not None and visual_tokens > 0
    by_task: dict[str, list[tuple[Item, Said]]] = {}
    for item, said in answered:
        by_task.setdefault(item.task, []).append((item, said))
    rows = []
    for task, answers in sorted(by_task.items()):
        lines = [
            json.dumps(
                {
                    "id": item.id,
                    "question": item.question.replace(PLACEHOLDER, "").strip(),
                    "answer": said.text,
                    "truth": item.truth,
                }
            )
            for item, said in answers
        ]
        name = f"{task}@{visual_tokens}" if many else task
        write_lines(run.path / "answers" / f"{name}.jsonl", lines)
        rows.append(_row(run, split, answers, costs))
    return rows


class Costs(NamedTuple):
    """What the rows of all tasks share."""

    visual_tokens: int  # asked for: of an adaptive method the most
    mean_tokens: float
    heldout_loss: float | None
    per_sample: float  # training FLOPs of an average sample


def _row(run: LoadedRun, split: str, answered: list[tuple[Item, Said]], costs: Costs) -> ResultRow:
    cell, template, visual_tokens = run.cell, run.prepared.template, costs.visual_tokens
    llm, tower = SIZES[cell.llm.name], TOWERS[cell.tower.name]
    vocab = run.prepared.vocab_rows(cell)
    scores = [SCORERS[SCORER](said.text, item.truth) for item, said in answered]
    prompts = [text_tokens(template.prompt(item.question, item.history)) for item, _ in answered]
    text, generated = float(np.mean(prompts)), float(np.mean([said.tokens for _, said in answered]))
    # Questions without a picture cost no visual tokens.
    pictures = sum(item.images for item, _ in answered)
    given = sum(said.visual_tokens for _, said in answered)
    mean_tokens = given / pictures if pictures else costs.mean_tokens
    per_item = pictures / len(answered)
    queries = [len(template.query(first_question(item))) for item, _ in answered]
    image = image_flops(cell, round(mean_tokens), round(text), float(np.mean(queries)))
    prompt = text + mean_tokens * per_item
    llm_flops = flops.inference_flops(llm, vocab, prompt, generated)
    cached = prompt + generated - 1  # the last token is not fed back
    done = read_json(run.path / "done.json")
    first = answered[0][0]
    options = parse_options(cell.compressor.name, cell.compressor.options)
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
        compressor=label(cell.compressor.name, options) if visual_tokens else "none",
        compressor_params=tree.count(run.params.get("compressor", {})),
        compressor_flops=image.compressor,
        query_pass_flops=image.query_pass,
        reducer=None,
        tokens_per_layer=prompt,
        kv_bytes=round(2 * 4 * llm.num_layers * llm.num_kv_heads * llm.head_dim * cached),
        visual_tokens=int(mean_tokens) if mean_tokens.is_integer() else mean_tokens,
        text_tokens_mean=text,
        gen_tokens_mean=generated,
        image_size=tower.image_size,
        data_mix=data_mix(cell.data),
        data_samples=samples_seen(run),
        stage_steps=[stage.train.steps for stage in stages(cell)],
        lr=cell.train.learning_rate,
        train_flops=round(costs.per_sample * samples_seen(run)),
        infer_flops=round(per_item * sum(image) + llm_flops),
        latency_ms=None,
        device=read_json(run.path / "env.json")["device"],
        task=first.task,
        task_group=first.task_group,
        split=split,
        prompt_id=prompt_id(cell),
        scorer=SCORER,
        metric="accuracy",
        score_raw=float(np.sum(scores)),
        score=float(np.mean(scores)),
        n_items=len(scores),
        chance=float(np.mean([item.chance for item, _ in answered])),
        blind_score=None,
        heldout_loss=costs.heldout_loss,
        wall_s=done["wall_s"],
        vlmscale_version=__version__,
        git_commit=git_commit(),
        finished_at=now(),
        status="done",
    )


def data_mix(data: DataConfig) -> str:
    """Short name of what was trained on."""
    if data.prepared:
        return ",".join(word.strip().rstrip("/").rpartition("/")[2] for word in data.prepared.split(","))
    return "scenes" if data.source == "scenes" else Path(data.records).name


def prompt_id(cell: Cell) -> str:
    """How questions are put: template, the way to tokenize where it matters, history."""
    template = {"toy": "toy-v1"}.get(cell.data.template, f"{cell.data.template}-{cell.data.tokenization}")
    return f"{template}/{cell.evaluate.history}"


def heldout_loss(run: LoadedRun, visual_tokens: int) -> float | None:
    """Loss per supervised token on the validation split with so many visual tokens; None without a split.

    Training logs it at the end; of a nested compressor it logs what it trains, so there it is computed.
    """
    cell, prepared = run.cell, run.prepared
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
    stream = reading.in_order(heldout_rows(reading, make_mesh()), (0, 1))
    return mean_loss(lambda batch: sums(params, batch), stream)


def samples_seen(run: LoadedRun) -> int:
    """Conversations that training was shown; a packed row holds several."""
    rows = run.cell.train.steps * run.cell.train.batch_size
    layout = read_json(run.path / "data.json")
    return round(rows * layout["conversations"] / layout["rows"])


def answer_one(
    run: LoadedRun,
    image: Path | None,
    prompt: str,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    visual_tokens: int | None = None,
) -> Answer:
    """Answer to one question about one picture; greedy and of the run's own length unless told otherwise.

    Raises:
      UserError: a prompt that is empty or no text, a picture that cannot be read, or a number of visual
        tokens that the run's compressor does not give.
    """
    check_prompt(prompt)
    cell, template = run.cell, run.prepared.template
    if visual_tokens is not None:
        check_evaluable(cell, "--visual-tokens", [visual_tokens])
    slots = visual_tokens or cell.compressor.visual_tokens
    asked = prompt.strip()
    if PLACEHOLDER in asked:
        raise UserError(f"--prompt: leave {PLACEHOLDER} away, the picture goes in front of the question")
    ids = template.prompt(f"{PLACEHOLDER}\n{asked}" if image is not None else asked)
    batch: dict[str, Any] = prompt_batch([ids], template, slots, len(ids) + slots)
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
        needs, weights = needs_of(cell), run.tower
        if weights is None:  # training read what was stored
            weights = load_tower(run.prepared.path / "tower.safetensors", cell.tower.name, needs)
        encode = jax.jit(tower_features, static_argnums=(0, 3))
        batch |= encode(tower, weights, pixels, needs)
    model = build_model(cell, run.prepared.vocab_rows(cell), "loop", slots)
    batch = with_tower_outputs(model, batch, run.tower)
    queries = embed_queries(run, model, [asked])
    if queries is not None:
        batch["text_query"] = queries
    longest = max_new_tokens or cell.evaluate.max_new_tokens
    generate = make_generate(model, longest, template.stop_ids, sampling)
    row = np.asarray(generate(run.params, batch, np.uint32(seed)))[0].tolist()
    return Answer(template.decode(row), row[: answer_length(row, template.stop_ids)])
