"""Answers to many items: sorted by length, in batches over all devices, pictures encoded once a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmscale.config import image_slots
from vlmscale.data.conversation import IMAGE_MARK
from vlmscale.data.images import ImageError
from vlmscale.data.sources import Picture
from vlmscale.distributed import host_part, leader
from vlmscale.errors import UserError
from vlmscale.evaluate.answers import Journal, Said
from vlmscale.evaluate.generation import answer_length, make_generate, prompt_batch
from vlmscale.evaluate.guided import GUIDE_QUERY, Guided, Reply
from vlmscale.evaluate.items import Item, Task, first_question, prompt_of, text_tokens
from vlmscale.evaluate.loaded import LoadedRun, embed_queries, visual_counts
from vlmscale.evaluate.rooms import Fitting, TwoPass
from vlmscale.models.sizes import SIZES
from vlmscale.reducers import is_adaptive
from vlmscale.sharding import put_batch, replicated, to_host
from vlmscale.train.step import with_tower_outputs

_LENGTHS = 8  # static lengths of a group of items at most
_BATCHES = 16  # that a static length should be worth
_READERS = 8  # threads that read pictures
Progress = Callable[[int, int], None]


class Pass(NamedTuple):
    """A task at one count of visual tokens; 0 is without its pictures."""

    task: Task
    visual_tokens: int
    journal: Journal


@dataclass(frozen=True)
class _Wanted:
    """One item and the passes in which it is still to be answered."""

    item: Item
    passes: tuple[Pass, ...]
    length: int  # text tokens of its prompt


class _Group(NamedTuple):
    """What items must share to be in one batch."""

    max_new_tokens: int
    images: int
    files: bool  # pictures of their own, not of the prepared data
    counts: tuple[int, ...]


Failures = dict[tuple[str, int, str], str]  # why, by task, count and item id


def answer_all(run: LoadedRun, passes: Sequence[Pass], split: str, progress: Progress) -> Failures:
    """Answer every item of the passes that their journals lack.

    Greedy. Each batch holds items of about one length and one number of pictures, its rows split over the
    devices; in float32 an answer does not depend on what else is in its batch. Pictures are read ahead, go
    through the tower once, and are compressed to each count that is asked for.

    Args:
      run: loaded; with several processes each calls this alike, and the leader writes. Its journals say what
        is still to be asked.
      passes: what is asked for.
      split: of the run's data, that items of the prepared data belong to.
      progress: called with (answers, answers in all).

    Returns:
      Why an item was not answered: its picture cannot be read, or it is too long.
    """
    failures: Failures = {}
    groups = _groups(run, passes, failures)
    total = sum(len(one.passes) for wanted in groups.values() for one in wanted)
    done = 0
    with jax.set_mesh(run.mesh), ThreadPoolExecutor(_READERS) as pool:
        for group, wanted in sorted(groups.items()):
            asker = _Asker(run, group, split, wanted)
            batches = list(asker.batches())
            ahead = pool.submit(asker.read, batches[0][0], pool.map) if group.images else None
            for number, (rows, length) in enumerate(batches):
                pictures, failed = ahead.result() if ahead else ([], {})
                following = batches[number + 1 :]
                ahead = (
                    pool.submit(asker.read, following[0][0], pool.map) if group.images and following else None
                )
                failed = _everywhere(failed, len(rows))
                for row, reason in failed.items():
                    one = wanted[rows[row]]
                    failures |= {(p.task.name, p.visual_tokens, one.item.id): reason for p in one.passes}
                asker.answer(rows, length, pictures, failed)
                done += sum(len(wanted[place].passes) for place in rows)
                progress(done, total)
    return failures


def _missing(passes: Sequence[Pass]) -> dict[tuple[str, str], tuple[Item, list[Pass]]]:
    """Each item that the leader's journals lack in some passes, and these."""
    every = [(one, item) for one in passes for item in one.task.items]
    there = np.array([item.id in one.journal.said for one, item in every], np.uint8)
    if jax.process_count() > 1:  # a shared disk may show others an older file
        there = np.asarray(multihost_utils.broadcast_one_to_all(there))
    found: dict[tuple[str, str], tuple[Item, list[Pass]]] = {}
    for (one, item), known in zip(every, there, strict=True):
        if not known:
            found.setdefault((one.task.name, item.id), (item, []))[1].append(one)
    return found


def _groups(run: LoadedRun, passes: Sequence[Pass], failures: Failures) -> dict[_Group, list[_Wanted]]:
    """What is to be answered, by what shares a batch, in order of length."""
    template, context = run.prepared.template, SIZES[run.cell.llm.name].context
    groups: dict[_Group, list[_Wanted]] = {}
    for (task, name), (item, asked) in _missing(passes).items():
        for blind in (False, True):
            part = [one for one in asked if (one.visual_tokens == 0) == blind]
            if not part:
                continue
            shown = item
            if blind:  # a model trained blind reads what pictures leave behind in a text, as in training
                shown = item.blind() if run.cell.compressor.visual_tokens else item.unseen()
            prompt = prompt_of(shown, template)
            new, fits = part[0].task.max_new_tokens, []
            for one in part:
                taken = text_tokens(prompt) + prompt.count(IMAGE_MARK) * image_slots(
                    run.cell, one.visual_tokens
                )
                if taken + new <= context:
                    fits.append(one)
                    continue
                failures[task, one.visual_tokens, name] = (
                    f"its prompt of {taken} tokens and {new} new ones exceed the LLM's {context}"
                )
            if fits:
                counts = tuple(one.visual_tokens for one in fits)
                group = _Group(new, shown.images, bool(shown.files), counts)
                groups.setdefault(group, []).append(_Wanted(shown, tuple(fits), text_tokens(prompt)))
    for wanted in groups.values():
        wanted.sort(key=lambda one: (one.length, one.passes[0].task.name, one.item.id))
    return groups


def _everywhere(failed: dict[int, str], rows: int) -> dict[int, str]:
    """The failures that any process met while it read its rows of a batch."""
    if jax.process_count() == 1:
        return failed
    mine = np.array([row in failed for row in range(rows)])
    anyones = np.asarray(multihost_utils.process_allgather(mine)).any(0)
    other = "its picture could not be read by another process, whose output says why"
    return {int(row): failed.get(int(row), other) for row in np.flatnonzero(anyones)}


class _Asker:
    """Answers the items of one group."""

    def __init__(
        self, run: LoadedRun, group: _Group, split: str, wanted: list[_Wanted], form: str = "compact"
    ) -> None:
        self.run, self.group, self.split, self.wanted = run, group, split, wanted
        template = run.prepared.template
        self.models = {count: run.model(count) for count in group.counts}
        if not group.images:  # there is nothing to drop, and no room for what would be dropped
            self.models = {count: model.clone(reducer=None) for count, model in self.models.items()}
        self.generates = {
            count: make_generate(model, group.max_new_tokens, template.stop_ids, form=form)
            for count, model in self.models.items()
        }
        self.special: dict[int, Guided | Fitting | TwoPass] = {}  # counts that take more than one program
        for count, model in self.models.items():
            if run.guide is not None and group.images and count:
                self.special[count] = run.guided(count, self.generates[count], group.max_new_tokens)
            elif model.reducer is not None and form == "compact" and is_adaptive(model.reducer):
                self.special[count] = Fitting(model, group.max_new_tokens, template.stop_ids, run.mesh)
            elif model.appended and form == "compact":
                self.special[count] = TwoPass(model, group.max_new_tokens, template.stop_ids, run.mesh)
        self.slots = max(1, group.images)
        seeing = max(group.counts) > 0
        self.tower = (run.any_tower() if group.files else run.tower) if seeing else None
        questions = [first_question(one.item) for one in wanted]
        model = self.models[max(group.counts)]
        self.queries = embed_queries(run, model, questions)
        self.guide_queries = None
        if self.special and run.guide is not None:
            self.guide_queries = embed_queries(run.guide, run.guide.model(max(group.counts)), questions)
        parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
        self.size = -(-min(run.cell.evaluate.batch_size, len(wanted)) // parts) * parts
        self.part, self.parts = host_part(run.mesh)

    def batches(self) -> Iterator[tuple[list[int], int]]:
        """(places in `wanted`, static text length) of each batch."""
        count = math.ceil(len(self.wanted) / self.size)
        each = math.ceil(count / min(_LENGTHS, math.ceil(count / _BATCHES)))
        for number in range(count):
            last = min((number // each + 1) * each * self.size, len(self.wanted)) - 1
            rows = range(number * self.size, min((number + 1) * self.size, len(self.wanted)))
            yield list(rows), self.wanted[last].length

    def mine(self, rows: list[int]) -> list[int]:
        """Which rows of a whole batch this process supplies; padding repeats the first."""
        each = self.size // self.parts
        own = range(self.part * each, (self.part + 1) * each)
        return [row if row < len(rows) else 0 for row in own]

    def read(self, rows: list[int], spread: Any) -> tuple[list[list[Picture]], dict[int, str]]:
        """The pictures of this process's rows, and which rows fail and why."""
        own = self.mine(rows)
        distinct = sorted(set(own))
        read = spread(self._picture, [self.wanted[rows[row]].item for row in distinct])
        found = dict(zip(distinct, read, strict=True))
        failed = {row: made for row, made in found.items() if isinstance(made, str)}
        return [[] if isinstance(found[row], str) else found[row] for row in own], failed

    def _picture(self, item: Item) -> list[Picture] | str:
        """An item's pictures as arrays, or why there are none."""
        try:
            if item.files:
                return self.run.pixels.decode(
                    [file if isinstance(file, bytes) else file.read_bytes() for file in item.files]
                )
            reader = self.run.pictures(self.split)[item.data_set]
            dataset = self.run.prepared.datasets[self.split][item.data_set]
            if reader is None:
                return []
            return reader.read(dataset, item.record, dataset.images(item.record)[: item.images])
        except OSError as error:
            return f"picture {error.filename}: {error.strerror}"
        except ValueError as error:  # of a name that no file can have
            return f"picture {item.files!r}: {error}"
        except ImageError as error:
            named = [str(file) for file in item.files if not isinstance(file, bytes)]
            return f"picture {', '.join(named) or item.id}: {error}"

    @property
    def blank(self) -> Picture:
        """Zeros in the shape of a picture; {} of a blind model."""
        if self.group.files:
            return self.run.pixels.blank
        reader = self.run.pictures(self.split)[0]
        return {} if reader is None else reader.blank

    def load(self, rows: list[int], length: int, pictures: list[list[Picture]]) -> dict[int, dict[str, Any]]:
        """One batch on the devices, as the model reads it at every count."""
        own = self.mine(rows)
        shared: dict[str, Any] = {}
        if max(self.group.counts) > 0:
            shared = self._put(self._shown(pictures, len(own)))
            for name, known in (("text_query", self.queries), (GUIDE_QUERY, self.guide_queries)):
                if known is not None:
                    queries = known[[rows[row] for row in own]]
                    shared |= self._put({name: np.repeat(queries, self.slots, axis=0)})
            shared = _complete(self.models[max(self.group.counts)], shared, self.tower)
        template = self.run.prepared.template
        prompts = [prompt_of(self.wanted[rows[row]].item, template) for row in own]
        batches = {}
        for count in self.models:
            slots = image_slots(self.run.cell, count)
            whole = length + self.group.images * slots
            batches[count] = self._put(prompt_batch(prompts, template, slots, whole))
            if count:
                batches[count] |= shared
        return batches

    def answer(
        self, rows: list[int], length: int, pictures: list[list[Picture]], failed: dict[int, str]
    ) -> None:
        """Answer one batch at every count and file what was said."""
        items = [self.wanted[place].item for place in rows]
        for number, (count, batch) in enumerate(self.load(rows, length, pictures).items()):
            said = self.say(count, batch, len(rows))
            filed: dict[str, tuple[Journal, list[tuple[Item, Said]]]] = {}
            for row, (place, answer) in enumerate(zip(rows, said, strict=True)):
                if row not in failed:
                    journal = self.wanted[place].passes[number].journal
                    filed.setdefault(str(journal.path), (journal, []))[1].append((items[row], answer))
            if leader():
                for journal, answers in filed.values():
                    journal.add(answers)

    def say(self, count: int, batch: dict[str, Any], rows: int) -> list[Said]:
        """What the model says to the rows of a batch."""
        template = self.run.prepared.template
        if count in self.special:
            reply = self.special[count](self.run.params, batch)
        else:
            ids = to_host(self.generates[count](self.run.params, batch), self.run.mesh)
            reply = Reply.of(ids)
        shown = np.broadcast_to(np.arange(self.slots) < self.group.images, (self.size, self.slots))
        given = visual_counts(self.run, self.models[count], batch, shown.size).reshape(shown.shape)
        counts = (shown * given).sum(1).tolist()
        ids, *rest = (part.tolist() for part in reply)
        return [
            Said(
                template.decode(row),
                answer_length(row, template.stop_ids),
                taken,
                guided,
                exited,
                tuple(kept),
            )
            for row, taken, guided, exited, kept in list(zip(ids, counts, *rest, strict=True))[:rows]
        ]

    def _shown(self, pictures: list[list[Picture]], rows: int) -> dict[str, np.ndarray]:
        """Pictures as arrays, `slots` a row; zeros where a row has none."""
        blank = self.blank
        out = {name: np.zeros((rows * self.slots, *x.shape), x.dtype) for name, x in blank.items()}
        for row, shown in enumerate(pictures):
            for slot, picture in enumerate(shown):
                for name in blank:
                    out[name][row * self.slots + slot] = picture[name]
        return out

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return put_batch(batch, self.run.mesh, self.parts)


class Calibration:
    """Items whose batches stay on the devices, to be answered many times by a reducer with an argument."""

    def __init__(self, run: LoadedRun, tasks: Sequence[Task], split: str) -> None:
        """Read and encode the pictures.

        Args:
          run: a trained run, with the reducer.
          tasks: whose items are answered, at the run's own count of visual tokens.
          split: of the run's data that they belong to.

        Raises:
          UserError: a picture cannot be read, or a prompt is too long.
        """
        self.run, self._count = run, run.cell.compressor.visual_tokens
        self._parts: list[tuple[_Asker, list[int], dict[str, Any]]] = []
        failures: Failures = {}
        nowhere = run.path / "calibration"  # never written
        passes = [Pass(task, self._count, Journal(nowhere, {})) for task in tasks]
        with ThreadPoolExecutor(_READERS) as pool:
            for group, wanted in sorted(_groups(run, passes, failures).items()):
                asker = _Asker(run, group, split, wanted, "masked")
                for rows, length in asker.batches():
                    pictures, failed = asker.read(rows, pool.map)
                    for row, reason in _everywhere(failed, len(rows)).items():
                        one = wanted[rows[row]]
                        failures[one.passes[0].task.name, self._count, one.item.id] = reason
                    self._parts.append((asker, rows, asker.load(rows, length, pictures)[self._count]))
        for (task, _, name), reason in failures.items():
            raise UserError(f"calibration, {task}: item {name}: {reason}")

    def answers(self, given: np.ndarray) -> dict[str, dict[str, str]]:
        """What the model says with an argument of its reducer: texts by item id, by task."""
        said: dict[str, dict[str, str]] = {}
        argument = jax.device_put(given, replicated(self.run.mesh))
        for asker, rows, batch in self._parts:
            answers = asker.say(self._count, batch | {"given": argument}, len(rows))
            for place, answer in zip(rows, answers, strict=True):
                one = asker.wanted[place]
                said.setdefault(one.passes[0].task.name, {})[one.item.id] = answer.text
        return said


# What the tower makes of a batch's pixels, where its outputs were not stored.
_complete = jax.jit(with_tower_outputs, static_argnums=0)
