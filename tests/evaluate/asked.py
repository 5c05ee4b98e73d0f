"""A run's answers to items that a test picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlmscale.data.dataset import Dataset
from vlmscale.evaluate.answers import Journal, Said
from vlmscale.evaluate.asking import Pass, answer_all
from vlmscale.evaluate.items import Item, Task, make_items
from vlmscale.evaluate.loaded import LoadedRun


def items_of(datasets: Sequence[Dataset], history: str) -> list[Item]:
    """The items of prepared data, without what tells their task."""
    return [item for _, _, _, item in make_items(datasets, history)]


def answers(
    run: LoadedRun,
    items: Sequence[Item],
    split: str,
    visual_tokens: int,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Said]:
    """What the run says to items, in their order; `folder` is new."""
    folder.mkdir()
    longest = run.cell.evaluate.max_new_tokens
    task = Task("task", "group", split, "exact_match/1", tuple(items), longest, "none")
    journal = Journal(folder / "task.jsonl", {item.id: "key" for item in items})
    assert not answer_all(run, [Pass(task, visual_tokens, journal)], split, progress)
    return [journal.said[item.id] for item in items]
