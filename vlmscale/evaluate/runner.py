"""Evaluate a trained run: answers first, by item id, then scores, then one row a task and count.

What was answered before under the same conditions is not asked again, so a run that was killed goes on where
it was, and scoring can be repeated without a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlmscale.compressors import COMPRESSORS
from vlmscale.config import reducer_label
from vlmscale.distributed import agree, barrier, leader
from vlmscale.errors import UserError
from vlmscale.evaluate.answers import Journal
from vlmscale.evaluate.asking import Failures, Pass, Progress, answer_all
from vlmscale.evaluate.items import Task, file_tasks, key_of, prompt_of, record_tasks, text_tokens, words
from vlmscale.evaluate.loaded import LoadedRun
from vlmscale.evaluate.rows import Costs, heldout_loss, make_row, prompt_id
from vlmscale.evaluate.tasks import Scored, score
from vlmscale.records import ResultRow, make_directory, read_json, read_rows, write_lines
from vlmscale.validation import check_evaluable

NOT_ASKED, FAILURES = "not_asked.jsonl", "failures.jsonl"
_SHOWN = 3  # failures that are told one by one


class Asked(NamedTuple):
    """What of a run is to be evaluated; what is left out is as its config says.

    Attributes:
      tasks: names, or groups of `tasks.GROUPS`; () for those of the config, or all of the run's data.
      data: directory of task files; None for the run's own data.
      visual_tokens: counts, of a compressor that gives many.
      blind: ask every question once more without its pictures.
      llava: write answers in LLaVA's format too.
    """

    tasks: Sequence[str] = ()
    data: Path | None = None
    visual_tokens: Sequence[int] = ()
    blind: bool = False
    llava: bool = False


def evaluate(
    run: LoadedRun,
    asked: Asked = Asked(),
    progress: Progress = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[ResultRow]:
    """Answer and score tasks; writes answers/, result.jsonl, failures.jsonl and not_asked.jsonl.

    With several processes every one calls it; the leader alone writes.

    Args:
      run: a trained run.
      asked: what of it.
      progress: called with (answers, answers in all).
      tell: called with what the user has to know: items that failed, by name.

    Returns:
      The new rows. Others that result.jsonl holds, of other tasks or counts, stay there.

    Raises:
      UserError: a task that the data does not have, a task file that cannot be used, or a count that the
        compressor does not give.
    """
    check_evaluable(run.cell, "--visual-tokens", asked.visual_tokens)
    config, own = run.cell.evaluate, run.cell.compressor.visual_tokens
    counts = tuple(asked.visual_tokens or config.visual_tokens or (own,))
    tasks = tasks_of(run, asked, tell)
    make_directory(run.path / "answers")
    passes = {(task.name, count): _pass(run, task, count) for task in tasks for count in counts}
    if own:
        for task in tasks:  # what was asked blind before is told again
            blind = _pass(run, task, 0)
            if asked.blind or config.blind or agree(int(bool(blind.journal.said))):
                passes[task.name, 0] = blind
    elif asked.blind:
        tell("the run was trained without pictures: its scores are blind")
    barrier("journals are read")
    failures = answer_all(run, list(passes.values()), run.prepared.eval_split, progress)
    _tell_failures(run.path, failures, tell)
    heldout = {count: heldout_loss(run, count) for count in counts}  # computed by all processes together
    rows = _file(run, asked, tasks, passes, heldout, failures) if leader() else []
    barrier("rows are filed")  # the leader must not be left alone meanwhile
    return rows


def _file(
    run: LoadedRun,
    asked: Asked,
    tasks: Sequence[Task],
    passes: dict[tuple[str, int], Pass],
    heldout: dict[int, float | None],
    failures: Failures,
) -> list[ResultRow]:
    """Score what was said and write what is to be written; the new rows."""
    _file_failures(run.path, passes, failures)
    scored = {key: _score(one) for key, one in passes.items()}
    if asked.llava:
        for one in passes.values():
            order = [item.id for item in one.task.items]
            one.journal.write_llava(one.journal.path.with_suffix(".llava.jsonl"), order, run.path.name)
    rows = _rows(run, tasks, heldout, passes, scored)
    _file_rows(run, rows)
    return rows


def tasks_of(run: LoadedRun, asked: Asked, tell: Callable[[str], None]) -> list[Task]:
    """The tasks that are to be evaluated; questions of the run's own data that are too long are left out.

    Raises:
      UserError: as `evaluate`.
    """
    config = run.cell.evaluate
    names = list(asked.tasks) or words(config.tasks)
    data = asked.data or (Path(config.data) if config.data and not asked.tasks else None)
    if data is not None:
        return file_tasks(names, data)
    split, most = run.prepared.eval_split, run.cell.data.max_text_tokens
    known = record_tasks(run.prepared.datasets[split], split, config.history, config.max_new_tokens)
    for name in names:
        if name not in known:
            raise UserError(
                f"task {name}: the data of {run.path} has {', '.join(known)}; "
                "--data DIR names a directory of task files"
            )
    template, long, tasks = run.prepared.template, [], []
    for task in known.values():
        fits = {item.id: text_tokens(prompt_of(item, template)) <= most for item in task.items}
        long += [item.id for item in task.items if not fits[item.id]]
        if short := tuple(item for item in task.items if fits[item.id]):
            tasks.append(replace(task, items=short))
    if not tasks:
        raise UserError(f"{run.path}: every prompt has more than data.max_text_tokens text tokens")
    if leader():
        write_lines(run.path / NOT_ASKED, [json.dumps({"id": name}) for name in long])
    if long:
        what = f"{len(long)} question{'s' * (len(long) > 1)}"
        tell(f"{what} longer than data.max_text_tokens, not asked: {NOT_ASKED}")
    return [task for task in tasks if not names or task.name in names]


def many_counts(run: LoadedRun) -> bool:
    """Whether the run's compressor gives many counts."""
    return COMPRESSORS[run.cell.compressor.name].nested is not None


def _pass(run: LoadedRun, task: Task, count: int) -> Pass:
    """A task at one count, with what was answered before."""
    own = run.cell.compressor.visual_tokens
    told: tuple[Any, ...] = (
        run.cell_id,
        read_json(run.path / "done.json")["params_sha256"],
        prompt_id(run.cell, task),
        count,
        str(run.dtype),
    )
    plain = count == own and not many_counts(run)
    name = task.name if plain else f"{task.name}@{count}"
    if count and (reducer := reducer_label(run.cell)) is not None:
        told = (*told, reducer)
        if run.guide is not None:
            told = (*told, read_json(run.guide.path / "done.json")["params_sha256"])
        name += f"~{run.cell.reducer.name}-{hashlib.sha256(reducer.encode()).hexdigest()[:8]}"
    keys = {item.id: key_of(item, task, told) for item in task.items}
    return Pass(task, count, Journal(run.path / "answers" / f"{name}.jsonl", keys))


def _score(one: Pass) -> Scored:
    """Score a pass and file what each answer scored."""
    answers = {name: said.text for name, said in one.journal.said.items()}
    scored = score(one.task.name, one.task.rule, one.task.questions, answers)
    one.journal.finish({item.id: item.question.answers for item in one.task.items}, scored.marks)
    return scored


def _rows(
    run: LoadedRun,
    tasks: Sequence[Task],
    heldout: dict[int, float | None],
    passes: dict[tuple[str, int], Pass],
    scored: dict[tuple[str, int], Scored],
) -> list[ResultRow]:
    """A row a task and count."""
    rows = []
    for count, loss in heldout.items():
        costs = Costs.of(run, [passes[task.name, count] for task in tasks], count, loss)
        for task in sorted(tasks, key=lambda task: task.name):
            blind = scored.get((task.name, 0))
            rows.append(make_row(run, passes[task.name, count], scored[task.name, count], blind, costs))
    return rows


def _file_rows(run: LoadedRun, rows: Sequence[ResultRow]) -> None:
    """Put rows into result.jsonl in place of those of the same task and reducer (and count, of many)."""
    nested = many_counts(run)

    def key(row: dict[str, Any]) -> Any:
        return row["task"], row["reducer"], row["visual_tokens"] if nested else None

    results, fresh = run.path / "result.jsonl", [asdict(row) for row in rows]
    taken = {key(row) for row in fresh}
    others = [row for row in read_rows(results) if key(row) not in taken] if results.exists() else []
    every = sorted(others + fresh, key=lambda row: (row["task"], row["visual_tokens"], row["reducer"] or ""))
    write_lines(results, [json.dumps(row) for row in every])


def _tell_failures(path: Path, failures: Failures, tell: Callable[[str], None]) -> None:
    """Tell the first items that were not answered."""
    found = {(task, name): why for (task, _, name), why in failures.items()}
    for (task, name), why in list(found.items())[:_SHOWN]:
        tell(f"{task}: item {name}: {why}")
    if len(found) > _SHOWN:
        tell(f"and {len(found) - _SHOWN} more items were not answered: {path / FAILURES}")


def _file_failures(path: Path, passes: Collection[tuple[str, int]], failures: Failures) -> None:
    """Write which items were not answered and why; those of other passes stay."""
    file = path / FAILURES
    lines = read_rows(file) if file.exists() else []
    lines = [line for line in lines if (line.get("task"), line.get("visual_tokens")) not in passes]
    lines += [
        {"task": task, "visual_tokens": count, "id": name, "reason": why}
        for (task, count, name), why in failures.items()
    ]
    write_lines(file, [json.dumps(line) for line in lines])
