"""Double buffering: the next batch is on the devices while they compute on this one."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from vlmscale.data.pipeline import Batch

T = TypeVar("T")
_JOIN_S = 5.0  # a thread that is inside a library's call is left to end by itself


class _Item(NamedTuple):
    """What the thread hands over: a batch on the devices, or why there is none."""

    batch: Any
    error: BaseException | None


class Feed(Generic[T]):
    """Iterates over batches on the devices, one ahead of whoever takes them.

    A thread takes host batches and puts them; its exceptions, the end of the batches among them, come out of
    `next`. Use it in a `with`, or close it: that also closes the host's batches, and so ends their workers.

    Attributes:
      wait_s: seconds that the last `next` waited for its batch; 0 where it was there already, about.
    """

    def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], T]) -> None:
        """Start.

        Args:
          batches: of the host.
          put: brings one onto the devices. It is called in the thread, where no context of the caller's
            (`jax.set_mesh`) is in force.
        """
        self.wait_s = 0.0
        self._batches, self._put = batches, put
        self._ready: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)  # batches that may still be put before one is taken
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Feed[T]:
        return self

    def __next__(self) -> T:
        """The next batch on the devices.

        Raises:
          StopIteration: there are no more, or the feed was closed.
          Exception: whatever the batches or `put` raised, now and at every later call.
        """
        if self._failed is not None:
            raise self._failed
        started = time.perf_counter()
        item = self._ready.get()
        self.wait_s = time.perf_counter() - started
        if item.error is not None:
            self._failed = item.error
            raise item.error
        self._room.release()
        return item.batch

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and the workers behind it, also where they wait for something."""
        self._stop.set()
        self._room.release()
        self._failed = self._failed or StopIteration()
        self._ready.put(_Item(None, self._failed))  # for one who waits in another thread
        close = getattr(self._batches, "close", None)
        if close is not None:
            with contextlib.suppress(ValueError):  # a generator that the thread is in ends with it
                close()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            while True:
                batch = next(self._batches)
                self._room.acquire()
                if self._stop.is_set():
                    return
                self._ready.put(_Item(self._put(batch), None))
                del batch
        except BaseException as error:  # handed over, not swallowed
            self._ready.put(_Item(None, error))
