"""A trained run, opened: parameters on the devices, tokenizer and pictures; and one answer at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmscale.compressors import COMPRESSORS
from vlmscale.compressors.features import tower_features
from vlmscale.config import Cell, MeshConfig, identity, image_slots, reducer_label, trains_reducer
from vlmscale.data.images import ImageError, decode_image
from vlmscale.data.records import PLACEHOLDER
from vlmscale.data.sources import PictureReader, Pixels
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import (
    GREEDY,
    Answer,
    Generate,
    Sampling,
    answer_length,
    check_prompt,
    make_generate,
    prompt_batch,
    prompt_inputs,
)
from vlmscale.evaluate.guided import Guided
from vlmscale.loading import override
from vlmscale.models.decoder import unstack
from vlmscale.models.hiding import Passes
from vlmscale.models.sizes import TOWERS
from vlmscale.models.vlm import VLM
from vlmscale.records import read_json
from vlmscale.sharding import replicated, to_host
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.frozen import load_tower, needs_of
from vlmscale.train.prepared import TOWER, Prepared, pixels_of
from vlmscale.train.run import load_prepared
from vlmscale.train.state import choose_mesh, first_params, lay_out, loading_bytes
from vlmscale.train.step import build_model, with_tower_outputs
from vlmscale.validation import check_evaluable

_QUERIES = 1024  # questions that are embedded together


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to answer.

    Attributes:
      params: of decoder, in its "loop" layout, and compressor.
      tower: of the tower where the run computes with it, trained or not; else None.
      mesh: what they lie on.
      dtype: of the computation, and of the parameters.
      guide: the run of a smaller model that stands in front of it, if its reducer has one.
    """

    path: Path
    cell: Cell
    sweep: str
    cell_id: str
    cohort_id: str
    prepared: Prepared
    params: dict[str, Any]
    tower: dict[str, Any] | None
    mesh: Mesh
    dtype: Any
    guide: LoadedRun | None = None
    _tower: dict[str, Any] = field(default_factory=dict, repr=False)
    _pictures: dict[str, list[PictureReader | None]] = field(default_factory=dict, repr=False)

    def pictures(self, split: str) -> list[PictureReader | None]:
        """How the pictures of each data set of a split are read; None of a blind model."""
        if split not in self._pictures:
            self._pictures[split] = self.prepared.pictures(split, [self.cell])
        return self._pictures[split]

    @property
    def pixels(self) -> Pixels:
        """How pictures are read that come from files of their own."""
        size = TOWERS[self.cell.tower.name]
        return Pixels(size.image_size, size.mean, size.std, self.cell.data.image_mode)

    def model(self, visual_tokens: int) -> VLM:
        """The model behind the tower with so many tokens a picture; 0 for a blind one."""
        rows = self.prepared.vocab_rows(self.cell)
        return build_model(self.cell, rows, "loop", visual_tokens).clone(dtype=self.dtype)

    def guided(self, visual_tokens: int, generate: Generate, max_new_tokens: int) -> Guided:
        """The run's model, by `generate`, behind its guide."""
        assert self.guide is not None
        return Guided(
            self.guide.model(visual_tokens),
            self.guide.params,
            generate,
            max_new_tokens,
            self.prepared.template.stop_ids,
            self.cell.reducer.exit_above,
            self.mesh,
        )

    def any_tower(self) -> dict[str, Any]:
        """The tower's parameters on the devices, also where training read stored outputs."""
        if self.tower is not None:
            return self.tower
        if not self._tower:
            read = load_tower(self.prepared.path / TOWER, self.cell.tower.name, needs_of(self.cell))
            self._tower.update(jax.device_put(read, replicated(self.mesh)))
        return self._tower


def load_run(
    path: Path,
    dtype: Any = None,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> LoadedRun:
    """Open a trained run directory.

    Args:
      path: of the run.
      dtype: of parameters and computation; None for float32 on a CPU and bfloat16 elsewhere.
      overrides: words `--config.KEY=VALUE` of the parts evaluate, mesh and reducer; the mesh that it was
        trained on is not that of its evaluation.
      mesh: what it shall lie on; None for what the config says or what fits.

    Raises:
      UserError: not a run, not trained to the end, its data is gone, an override cannot be, or the guide of
        its reducer was trained otherwise.
    """
    spec = read_json(path / "spec.json")
    if not (path / "done.json").exists():
        raise UserError(f"{path}: training is not finished (no done.json); run `vlmscale train` again")
    cell, prepared = load_prepared(path)
    model, tower = build_model(cell, prepared.vocab_rows(cell)), prepared.tower(cell)
    own, learned = reducer_label(cell) if trains_reducer(cell) else None, trains_reducer(cell)
    cell = override(replace(cell, mesh=MeshConfig()), overrides, ("evaluate", "mesh", "reducer"))
    if (learned or trains_reducer(cell)) and reducer_label(cell) != own:
        raise UserError(
            f"reducer {reducer_label(cell) or 'none'}: {path} was trained with {own or 'none'}; a reducer "
            "that trains stays with its run"
        )
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    mesh = mesh or choose_mesh([cell], prepared, functools.partial(loading_bytes, dtype=dtype))
    places = lay_out(cell, model, mesh, tower, dtype)
    checkpoints = Checkpoints.of(path, read_only=True)
    found = checkpoints.restore_latest({"params": places.trained})
    checkpoints.close()
    if found is None:
        raise UserError(f"{checkpoints.path}: no checkpoint to read; train the run again")
    frozen, _ = first_params(cell, model, places, tower, places.frozen)
    trained = jax.tree.map(lambda leaf: leaf.astype(dtype), found[1]["params"])
    params = {**frozen, **trained}
    params["decoder"] = unstack(params["decoder"])
    used = params.pop("tower", None)
    ids = spec["cell_id"], spec.get("cohort_id", spec["cell_id"])
    guide = _load_guide(cell, path, dtype, mesh)
    return LoadedRun(path, cell, spec["sweep"], *ids, prepared, params, used, mesh, dtype, guide)


def _load_guide(cell: Cell, path: Path, dtype: Any, mesh: Mesh) -> LoadedRun | None:
    """The small model in front of a run's, which must read the same prompts and see the same tokens."""
    if not cell.reducer.guide:
        return None
    guide = load_run(Path(cell.reducer.guide), dtype, mesh=mesh)
    for part in ("data", "tower", "compressor"):
        own, other = identity(getattr(cell, part)), identity(getattr(guide.cell, part))
        for key in own.keys() | other.keys():
            if own.get(key) != other.get(key):
                raise UserError(
                    f"reducer.guide={guide.path}: trained with another {part}.{key} than {path}; "
                    "a guide reads the same prompts and sees the same visual tokens"
                )
    if guide.cell.reducer.name != "none":
        raise UserError(
            f"reducer.guide={guide.path}: trained with reducer.name={guide.cell.reducer.name}; a guide is a "
            "plain model"
        )
    if cell.train.tower_rate or guide.cell.train.tower_rate:
        raise UserError(
            f"reducer.guide={guide.path}: it or {path} trained its tower; both must have the same"
        )
    return guide


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
    known = np.concatenate(
        [to_host(_embed_query(model, run.params, tokens[part], lengths[part]), run.mesh) for part in parts]
    )
    return known[[distinct[question] for question in questions]]


@functools.partial(jax.jit, static_argnums=0)
def _embed_query(model: VLM, params: dict[str, Any], tokens: jax.Array, length: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens, length, method="embed_query")


def visual_counts(run: LoadedRun, model: VLM, batch: dict[str, Any], pictures: int) -> np.ndarray:
    """How many tokens each picture of a batch gives, [pictures]."""
    options = dict(model.options)
    chooses = model.reducer is not None and model.reducer.patches is not None
    if model.visual_tokens and (chooses or COMPRESSORS[model.compressor_name].adaptive(options)):
        return to_host(_visual_counts(model, run.params, batch), run.mesh)
    return np.full(pictures, model.visual_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _visual_counts(model: VLM, params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    return model.apply({"params": params}, prompt_inputs(batch), method="visual_counts")


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
    count = visual_tokens or cell.compressor.visual_tokens
    slots = image_slots(cell, count)
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
        encode = jax.jit(tower_features, static_argnums=(0, 3))
        batch |= encode(tower, run.any_tower(), pixels, needs_of(cell))
    model = run.model(count)
    batch = with_tower_outputs(model, batch, run.tower)
    queries = embed_queries(run, model, [asked])
    if queries is not None:
        batch["text_query"] = queries
    longest = max_new_tokens or cell.evaluate.max_new_tokens
    rooms = Passes.of(batch["image_slots"], batch["valid"], count, model.appended) if model.appended else None
    generate = make_generate(model, longest, template.stop_ids, sampling, rooms=rooms)
    row = np.asarray(generate(run.params, batch, np.uint32(seed)))[0].tolist()
    return Answer(template.decode(row), row[: answer_length(row, template.stop_ids)])
