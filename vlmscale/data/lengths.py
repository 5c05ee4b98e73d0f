"""How long the conversations of a data set are, in tokens: measured once, before they are laid out in rows.

A pure function of the data set, the template and where a text is cut, so it is saved under a key of those.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlmscale.data.conversation import IMAGE_MARK, Encoded, Template, truncate
from vlmscale.data.dataset import Dataset
from vlmscale.data.workers import cores, quiet_tracker, serve_parent
from vlmscale.errors import UserError

Progress = Callable[[str, int, int], None]
_CHUNK = 2048  # conversations that a process measures at a time
_ALONE = 20_000  # up to so many, about ten seconds, no process is started unless it is asked for


class Lengths(NamedTuple):
    """Of n conversations, as they stand in a row.

    Attributes:
      text: [n] int32, tokens without image marks, what is cut off not counted.
      images: [n] int32, images shown in them.
      supervised: [n] int32, tokens to be predicted; with 0 there is nothing to learn.
      query: [n] int32, tokens of the first question.
      whole: [n] int32, tokens without image marks before anything was cut off.
    """

    text: np.ndarray
    images: np.ndarray
    supervised: np.ndarray
    query: np.ndarray
    whole: np.ndarray

    def sizes(self, visual_tokens: int) -> np.ndarray:
        """Positions that each takes in a row, [n] int64."""
        return self.text.astype(np.int64) + self.images.astype(np.int64) * visual_tokens


@dataclass(frozen=True)
class Limits:
    """Where a conversation is cut.

    Attributes:
      text: tokens without image marks, at most.
      row: positions with `visual_tokens` an image, at most; 0 for no limit.
      visual_tokens: positions that an image takes.
    """

    text: int
    row: int = 0
    visual_tokens: int = 0

    def cut(self, encoded: Encoded) -> Encoded:
        """The conversation without its tail behind either limit; an image is never cut in two.

        Its question by itself has at most as many tokens as its text.
        """
        encoded = truncate(encoded, 0, self.text)._replace(query=encoded.query[: self.text])
        return truncate(encoded, self.visual_tokens, self.row) if self.row else encoded


def target_positions(encoded: Encoded, visual_tokens: int) -> np.ndarray:
    """Where the supervised tokens stand once every image takes `visual_tokens` positions, [k] int64.

    A first token is left out: nothing stands before it that could predict it.
    """
    behind = np.cumsum(encoded.tokens == IMAGE_MARK) * (visual_tokens - 1)
    places = np.flatnonzero(encoded.supervised)
    places = places + behind[places]
    return places[places > 0]


def measure(
    dataset: Dataset,
    template: Template,
    max_text_tokens: int,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Lengths:
    """Lengths of all conversations, each cut behind `max_text_tokens`.

    Args:
      dataset: a prepared data set.
      template: makes tokens of turns.
      max_text_tokens: text tokens of a conversation at most.
      workers: processes; None for as many as there are cores if it is worth it, 0 for none but this one.
      progress: called with ("token lengths", done, total).

    Raises:
      UserError: the data set is damaged.
    """
    everything = np.arange(len(dataset))
    return _measure(dataset, template, Limits(max_text_tokens), everything, workers, progress)


def shorten(
    lengths: Lengths,
    dataset: Dataset,
    template: Template,
    limits: Limits,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Lengths:
    """The same where rows end at `limits.row`: conversations that are longer are cut and measured again.

    Args:
      lengths: what `measure` gave with a `max_text_tokens` of `limits.text`.
      dataset, template, workers, progress: as for `measure`.
      limits: of the rows.

    Raises:
      UserError: the data set is damaged.
    """
    over = np.flatnonzero(lengths.sizes(limits.visual_tokens) > limits.row) if limits.row else np.arange(0)
    if not len(over):
        return lengths
    again = _measure(dataset, template, limits, over, workers, progress)
    columns = [column.copy() for column in lengths]
    for column, changed in zip(columns, again, strict=True):
        column[over] = changed
    return Lengths(*columns)


def lengths_of(
    dataset: Dataset,
    template: Template,
    max_text_tokens: int,
    home: Path,
    progress: Progress | None = None,
) -> Lengths:
    """What `measure` gives, from a file where it was measured before; else it is written to `home`.

    Args:
      dataset, template, max_text_tokens, progress: as for `measure`.
      home: the file for it; that beside the data set (`lengths_file`) is looked at too.

    Raises:
      UserError: the data set or a file is damaged, or `home` cannot be written.
    """
    told = (dataset.manifest["sha256"], dataset.split, template.name, template.mode, max_text_tokens)
    key = hashlib.sha256(repr((*told, template.tokenizer.to_str())).encode()).hexdigest()
    for path in (home, lengths_file(dataset)):
        known = load_lengths(path, key)
        if known is not None:
            return known
    lengths = measure(dataset, template, max_text_tokens, progress=progress)
    try:
        save_lengths(home, lengths, key)
    except OSError as error:
        raise UserError(f"{home}: cannot be written ({error.strerror or error})") from error
    return lengths


def lengths_file(dataset: Dataset) -> Path:
    """Where the lengths of a data set lie that were measured when it was prepared."""
    return dataset.path / f"lengths-{dataset.split}.npz"


def concatenate(parts: Sequence[Lengths]) -> Lengths:
    """Lengths of several data sets, one behind the other."""
    return Lengths(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def save_lengths(path: Path, lengths: Lengths, key: str) -> None:
    """Write them by atomic rename, with the key of what they were measured on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, key=np.array(key), **lengths._asdict())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_lengths(path: Path, key: str) -> Lengths | None:
    """What `save_lengths` wrote; None where there is nothing, or nothing of this key.

    Raises:
      UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            return Lengths(*(arrays[name] for name in Lengths._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); remove it, it will be written again") from error


def _measure(
    dataset: Dataset,
    template: Template,
    limits: Limits,
    samples: np.ndarray,
    workers: int | None,
    progress: Progress | None,
) -> Lengths:
    """Lengths of some conversations, in their order, in chunks that processes share."""
    chunks = [samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    if workers is None:
        workers = cores() if len(samples) > _ALONE else 0
    workers = min(workers, len(chunks))
    out = Lengths(*(np.empty(len(samples), np.int32) for _ in Lengths._fields))
    done = 0
    results = _in_turn if workers < 2 else _in_processes
    for number, part in results(dataset, template, limits, chunks, workers):
        start = number * _CHUNK
        for column, values in zip(out, part, strict=True):
            column[start : start + len(values)] = values
        done += len(chunks[number])
        if progress is not None:
            progress("token lengths", done, len(samples))
    return out


def _in_turn(
    dataset: Dataset, template: Template, limits: Limits, chunks: list[np.ndarray], _: int
) -> Iterable[tuple[int, Lengths]]:
    for number, chunk in enumerate(chunks):
        yield number, _chunk(dataset, template, limits, chunk)


def _in_processes(
    dataset: Dataset, template: Template, limits: Limits, chunks: list[np.ndarray], workers: int
) -> Iterable[tuple[int, Lengths]]:
    quiet_tracker()
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs jax may hang
    start = (dataset, template, limits)
    with ProcessPoolExecutor(workers, context, _start_worker, start) as pool:
        futures = {pool.submit(_work, chunk): number for number, chunk in enumerate(chunks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_given: tuple[Dataset, Template, Limits]  # of a worker process, sent once


def _start_worker(*given: object) -> None:
    global _given
    serve_parent()
    _given = given  # type: ignore[assignment]


def _work(chunk: np.ndarray) -> Lengths:
    return _chunk(*_given, chunk)


def _chunk(dataset: Dataset, template: Template, limits: Limits, samples: np.ndarray) -> Lengths:
    out = Lengths(*(np.empty(len(samples), np.int32) for _ in Lengths._fields))
    for row, index in enumerate(samples):
        turns = dataset.record(int(index)).turns
        whole = template.encode(turns)
        kept = limits.cut(whole)
        marks = int(np.count_nonzero(kept.tokens == IMAGE_MARK))
        out.text[row] = len(kept.tokens) - marks
        out.images[row] = marks
        # One position an image: where it takes none, a token behind it may be the first of all.
        out.supervised[row] = len(target_positions(kept, 1))
        out.query[row] = len(kept.query)
        out.whole[row] = np.count_nonzero(whole.tokens != IMAGE_MARK)
    return out
