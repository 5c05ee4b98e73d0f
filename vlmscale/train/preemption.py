"""Who asks training to stop: a signal, another process, or the machine that will be taken away.

One process keeps a flag. Several have to stop at the same step, or those that go on wait for the others for
ever; jax's preemption service agrees on one. It is told by SIGTERM alone, through a handler in C++ that
`jax.distributed.initialize` installs and Python does not know of: whoever sets a handler of Python's for
SIGTERM after that takes it away for good. Once a second it looks whether one came; then it asks all processes
for the number that they last called it with, and the answer is yes at the highest of these plus one, and at
no other. So numbers must grow by one from call to call, over all loops of a process, from 1. Steps would miss
it: they begin anew with each cell, and high after a resume.
"""

from __future__ import annotations

import http.client
import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, ClassVar
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather, reached_preemption_sync_point

from vlmscale.errors import UserError

_MAINTENANCE, _PREEMPTED = "maintenance notice", "preemption notice"
_REASONS = ("SIGTERM", "SIGINT", "SIGUSR1", _PREEMPTED, _MAINTENANCE)  # of several the last is told
# What the metadata server of Google's machines says under each key when the machine will be stopped.
_NOTICES = {
    "maintenance-event": (("MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"), _MAINTENANCE),
    "preempted": (("TRUE",), _PREEMPTED),
}
_TRIES = 3  # in a row that find no server
_ANSWER_S = 2.0


class Preemption:
    """Whether training is to stop. Use it in a `with` around the loop, on the main thread of every process.

    Within the block SIGTERM, SIGINT and SIGUSR1 (Slurm's --signal=USR1@120) ask for a stop; a second SIGINT
    raises KeyboardInterrupt. So does, on Google's machines, the notice that this one will be stopped: where
    GCE_METADATA_HOST names the metadata server or the backend is TPU, a thread looks for it.
    """

    _last: ClassVar[int] = 0  # number that jax's service was last called with, by any loop

    def __init__(self, poll_s: float = 5.0) -> None:
        """Prepare.

        Args:
          poll_s: seconds between two looks for a notice.
        """
        self._poll_s = poll_s
        self._own: str | None = None  # what this process was asked by
        self._agreed: str | None = None
        self._interrupted = False
        self._before: int | None = None  # what is added to a step for jax's service
        self._over = threading.Event()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        """Begin to listen.

        Raises:
          UserError: there are several processes, and jax's preemption service does not run.
        """
        self._joined = jax.distributed.is_initialized() and bool(
            jax.config.values["jax_enable_preemption_service"]
        )
        if jax.process_count() > 1 and not self._joined:
            raise UserError(
                "several processes cannot agree on when to stop; start them with --distributed, and leave "
                "JAX_ENABLE_PREEMPTION_SERVICE on"
            )
        own = () if self._joined else (signal.SIGTERM,)
        for number in (signal.SIGINT, signal.SIGUSR1, *own):
            self._handlers[number] = signal.signal(number, self._on_signal)
        host = os.environ.get("GCE_METADATA_HOST")
        if host is None and jax.default_backend() == "tpu":
            host = "metadata.google.internal"
        if host:
            threading.Thread(target=self._watch, args=(host,), name="notices", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> str | None:
        """Why training has to stop after this step, such as "SIGTERM"; None if it is to go on.

        Of several processes every one asks once a step, and all get the same answer at the same step. An
        answer stays. It takes a few microseconds at most.
        """
        if not self._joined:
            return self._own
        if self._agreed is None:
            if self._before is None:
                self._before = Preemption._last + 1 - step
            Preemption._last = self._before + step
            if reached_preemption_sync_point(Preemption._last):
                # A SIGTERM is not known here: it went to jax.
                own = _REASONS.index(self._own or "SIGTERM")
                self._agreed = _REASONS[int(process_allgather(np.int32(own)).max())]
        return self._agreed

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self._own = self._own or reason
        if self._joined:
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self, host: str) -> None:
        """Look for a notice until there is one, the block is over, or nobody answers."""
        opener = build_opener(ProxyHandler({}))  # the server is the machine's own: no proxy reaches it
        failures = 0
        while failures < _TRIES:
            failures += 1
            for key, (values, reason) in _NOTICES.items():
                with suppress(OSError, http.client.HTTPException, ValueError):
                    value = _read(opener, host, key)
                    failures = 0
                    if value in values and not self._over.is_set():
                        self._ask(reason)
                        return
            if self._over.wait(self._poll_s):
                return


def _read(opener: OpenerDirector, host: str, key: str) -> str:
    request = Request(
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    with opener.open(request, timeout=_ANSWER_S) as answer:
        return answer.read(100).decode().strip()
