"""Lengths of conversations: against the conversations themselves, cut, in processes, on disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vlmscale
from tests.data.prepared_files import COUNT
from vlmscale.data import lengths as module
from vlmscale.data.conversation import IMAGE_MARK, Encoded, Template, expand
from vlmscale.data.dataset import Dataset
from vlmscale.data.lengths import (
    Lengths,
    Limits,
    concatenate,
    load_lengths,
    measure,
    save_lengths,
    shorten,
    target_positions,
)
from vlmscale.errors import UserError

ALL = 10_000  # text tokens; nothing is that long


def equal(one: Lengths, other: Lengths) -> None:
    for name, values in one._asdict().items():
        np.testing.assert_array_equal(values, getattr(other, name), err_msg=name)
        assert values.dtype == np.int32


def test_lengths_are_those_of_the_conversations(dataset: Dataset, template: Template) -> None:
    lengths = measure(dataset, template, ALL, workers=0)
    for index in range(COUNT):
        encoded = template.encode(dataset.record(index).turns)
        tokens, slots = expand(encoded.tokens, 7, template.image)
        assert lengths.sizes(7)[index] == len(tokens)
        assert lengths.images[index] == slots.max() == index % 3
        assert lengths.supervised[index] == encoded.supervised.sum()
        assert lengths.query[index] == len(encoded.query)
    np.testing.assert_array_equal(lengths.text, lengths.whole)


def test_what_is_cut_off_is_not_counted(dataset: Dataset, template: Template) -> None:
    whole, cut = measure(dataset, template, ALL, workers=0), measure(dataset, template, 12, workers=0)
    np.testing.assert_array_equal(cut.text, np.minimum(whole.text, 12))
    np.testing.assert_array_equal(cut.whole, whole.text)
    assert (cut.images <= whole.images).all()
    assert (cut.images < whole.images).any()
    for index in range(COUNT):
        kept = Limits(12).cut(template.encode(dataset.record(index).turns))
        assert cut.supervised[index] == kept.supervised.sum()


def test_processes_measure_the_same_and_report(
    dataset: Dataset, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    seen: list[tuple[str, int, int]] = []
    lengths = measure(dataset, template, 20, 2, lambda *now: seen.append(now))
    equal(lengths, measure(dataset, template, 20, 0))
    assert [total for _, _, total in seen] == [COUNT] * 6
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("token lengths", COUNT, COUNT)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("tokens, row", [(1, 30), (9, 40), (0, 25)])
def test_shortened_rows_are_those_that_are_cut(
    tokens: int, row: int, dataset: Dataset, template: Template
) -> None:
    limits = Limits(ALL, row, tokens)
    whole = measure(dataset, template, ALL, workers=0)
    lengths = shorten(whole, dataset, template, limits, workers=0)
    assert (whole.sizes(tokens) > row).any()
    for index in range(COUNT):
        kept = limits.cut(template.encode(dataset.record(index).turns))
        marks = (kept.tokens == IMAGE_MARK).sum()
        assert lengths.images[index] == marks
        assert lengths.text[index] + marks == len(kept.tokens)
        assert lengths.supervised[index] == kept.supervised.sum()
    assert lengths.sizes(tokens).max() <= row
    equal(shorten(lengths, dataset, template, limits, workers=0), lengths)
    equal(shorten(whole, dataset, template, Limits(ALL), workers=0), whole)


def test_targets_stand_where_their_tokens_do() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        tokens = np.arange(generator.integers(1, 12), dtype=np.int32) + 50
        tokens[generator.random(len(tokens)) < 0.3] = IMAGE_MARK
        supervised = (generator.random(len(tokens)) < 0.5) & (tokens != IMAGE_MARK)
        encoded = Encoded(tokens, supervised, np.zeros(1, np.int32))
        for visual_tokens in (0, 1, 4):
            placed, _ = expand(tokens, visual_tokens, 0)
            wanted = [at for at, token in enumerate(placed) if at and token in tokens[supervised]]
            assert target_positions(encoded, visual_tokens).tolist() == wanted


def test_several_data_sets_follow_each_other(dataset: Dataset, template: Template) -> None:
    lengths = measure(dataset, template, ALL, workers=0)
    both = concatenate([lengths, lengths])
    assert len(both.text) == 2 * COUNT
    equal(Lengths(*(column[COUNT:] for column in both)), lengths)


def test_saved_lengths_are_read_back_where_the_key_is_theirs(tmp_path: Path) -> None:
    path = tmp_path / "lengths.npz"
    lengths = Lengths(*(np.arange(5, dtype=np.int32) + column for column in range(5)))
    assert load_lengths(path, "a") is None
    save_lengths(path, lengths, "a")
    assert [file.name for file in tmp_path.iterdir()] == ["lengths.npz"]
    found = load_lengths(path, "a")
    assert found is not None
    equal(found, lengths)
    assert load_lengths(path, "b") is None
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"lengths\.npz: damaged .* remove it"):
        load_lengths(path, "a")
    np.savez(path, key=np.array("a"))
    with pytest.raises(UserError, match=r"lengths\.npz: damaged"):
        load_lengths(path, "a")


SCRIPT = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from vlmscale.data.workers import serve_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), serve_parent) as pool:
        pool.submit(int).result()
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        pool.submit(time.sleep, 60).result()
"""


def test_workers_end_with_a_parent_that_is_killed_and_not_by_its_signals(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    env = os.environ | {"PYTHONPATH": str(Path(vlmscale.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        time.sleep(0.3)
        os.kill(worker, 0)  # it is still there
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")
