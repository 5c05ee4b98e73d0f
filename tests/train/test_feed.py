"""Double buffering: order, one ahead, the reported wait, errors, and closing while something blocks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from vlmscale.data.pipeline import Batch
from vlmscale.errors import UserError
from vlmscale.train.feed import Feed

PATIENCE = 20.0  # seconds; nothing here takes one


def numbered(start: int = 0) -> Iterator[Batch]:
    return ({"tokens": np.array([number])} for number in itertools.count(start))


def value(batch: Batch) -> int:
    return int(batch["tokens"][0])


class Gate:
    """Host batches that come only when they are let through; knows whether it was closed."""

    def __init__(self) -> None:
        self.open, self.closed, self.number = threading.Semaphore(0), False, -1

    def __iter__(self) -> Gate:
        return self

    def __next__(self) -> Batch:
        assert self.open.acquire(timeout=PATIENCE)
        if self.closed:
            raise RuntimeError("the workers are gone")
        self.number += 1
        return {"tokens": np.array([self.number])}

    def close(self) -> None:
        self.closed = True
        self.open.release()


def wait_until(done: threading.Event) -> None:
    assert done.wait(PATIENCE)


def test_batches_come_in_order_as_they_were_put() -> None:
    with Feed(numbered(), lambda batch: value(batch) * 10) as feed:
        assert list(itertools.islice(feed, 50)) == [number * 10 for number in range(50)]


def test_one_batch_is_put_ahead_and_no_more() -> None:
    put: list[int] = []
    ahead = threading.Event()

    def remember(batch: Batch) -> int:
        put.append(value(batch))
        ahead.set()
        return value(batch)

    with Feed(numbered(), remember) as feed:
        for number in range(5):
            wait_until(ahead)
            ahead.clear()
            time.sleep(0.02)  # for one that would run further ahead
            assert put == list(range(number + 1))
            assert next(feed) == number


def test_the_wait_is_that_for_the_host() -> None:
    gate = Gate()
    with Feed(gate, value) as feed:
        threading.Timer(0.3, gate.open.release).start()
        assert next(feed) == 0
        assert 0.25 < feed.wait_s < PATIENCE
        first = feed.wait_s
        gate.open.release()
        while gate.number < 1:
            time.sleep(0.01)
        time.sleep(0.05)
        assert next(feed) == 1
        assert feed.wait_s < first / 2


def test_batches_that_end_end_the_feed() -> None:
    with Feed(itertools.islice(numbered(), 3), value) as feed:
        assert list(feed) == [0, 1, 2]
        with pytest.raises(StopIteration):
            next(feed)


@pytest.mark.parametrize("where", ["batches", "put"])
def test_an_error_comes_out_of_next_behind_the_batches_before_it(where: str) -> None:
    def failing(batch: Batch) -> int:
        if value(batch) == 2:
            raise UserError("record 2: damaged")
        return value(batch)

    stream = (batch for batch in numbered() if failing(batch) >= 0) if where == "batches" else numbered()
    with Feed(stream, failing if where == "put" else value) as feed:
        assert [next(feed), next(feed)] == [0, 1]
        for _ in range(2):
            with pytest.raises(UserError, match=r"^record 2: damaged$"):
                next(feed)


def test_closing_frees_a_thread_that_waits_for_room() -> None:
    before = threading.active_count()
    feed = Feed(numbered(), value)
    assert next(feed) == 0
    started = time.monotonic()
    feed.close()
    assert time.monotonic() - started < 2
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(feed)


def test_closing_frees_a_thread_that_waits_for_the_host_and_one_that_waits_for_it() -> None:
    gate = Gate()
    feed = Feed(gate, value)
    ended = threading.Event()

    def take() -> None:
        with pytest.raises(StopIteration):
            next(feed)
        ended.set()

    threading.Thread(target=take, daemon=True).start()
    started = time.monotonic()
    feed.close()
    wait_until(ended)
    assert time.monotonic() - started < 2
    assert gate.closed


def test_a_generator_that_is_running_does_not_hinder_closing() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[Batch]:
        yield {"tokens": np.array([0])}
        reached.set()
        assert go_on.wait(PATIENCE)

    feed = Feed(slow(), value)
    assert next(feed) == 0
    wait_until(reached)
    threading.Timer(0.1, go_on.set).start()
    feed.close()
