"""Who may ask training to stop: signals to one process, to one of two, and a metadata server."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import at_work, free_port, told
from tests.integration.tiny import wait_for
from vlmscale.train.preemption import Preemption

SECONDS = 60  # for the processes of one test together; few are needed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}


@pytest.fixture(autouse=True)
def on_no_google_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "notices"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = handlers()
    with Preemption() as preemption:
        assert preemption.requested(1) is None
        os.kill(os.getpid(), number)
        assert preemption.requested(2) == number.name
        assert preemption.requested(2) == preemption.requested(9) == number.name
        assert watching() == []
    assert handlers() == before
    with Preemption() as preemption:
        assert preemption.requested(3) is None, "what an earlier loop was told is over"


def test_the_first_reason_is_told() -> None:
    with Preemption() as preemption:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert preemption.requested(1) == "SIGUSR1"


def test_a_second_interrupt_is_an_interrupt_and_the_handlers_come_back() -> None:
    before = handlers()

    def loop() -> None:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert preemption.requested(1) == "SIGTERM"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert handlers() == before


@contextmanager
def metadata(answers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """A metadata server, as HOST:PORT, and the keys it is asked for. What it does not know is a 404."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            head, _, key = self.path.rpartition("/")
            known = head == "/computeMetadata/v1/instance" and self.headers["Metadata-Flavor"] == "Google"
            asked.append(key if known else self.path)
            if not known or key not in answers:
                self.send_error(404)
                return
            body = answers[key].encode()
            self.send_response(200)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ends(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


@pytest.mark.parametrize(
    "answers, wanted",
    [
        ({"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}, "maintenance notice"),
        ({"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE\n"}, "maintenance notice"),
        ({"preempted": "TRUE"}, "preemption notice"),
    ],
)
@pytest.mark.parametrize("rest", [QUIET, {}], ids=["quiet", "404"])
def test_a_notice_that_comes_while_training_asks_for_a_stop(
    answers: dict[str, str], wanted: str, rest: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through a proxy's settings, which are not for this server, and where it knows one of the keys."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    said = QUIET if rest else {next(iter(answers)): QUIET[next(iter(answers))]}
    said = dict(said)
    with metadata(said) as (host, asked):
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with Preemption(poll_s=0.02) as preemption:
            (thread,) = watching()
            assert thread.daemon
            assert wait_for(lambda: len(asked) > 12, 10), asked
            assert preemption.requested(1) is None
            said |= answers
            assert wait_for(lambda: preemption.requested(2) is not None, 10)
            assert preemption.requested(3) == wanted
            assert ends(thread)
    assert set(asked) == set(QUIET)


def test_without_a_notice_the_thread_ends_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    with metadata(QUIET) as (host, asked):
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with Preemption() as preemption:
            (thread,) = watching()
            assert wait_for(lambda: len(asked) == len(QUIET), 10)
            assert preemption.requested(1) is None
        assert ends(thread)
        assert len(asked) == len(QUIET), "looked again within five seconds"


def closed() -> tuple[str, Callable[[], None]]:
    return f"127.0.0.1:{free_port()}", lambda: None


def of_another_kind() -> tuple[str, Callable[[], None]]:
    """A server that does not speak HTTP."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            with peer:
                peer.recv(1000)
                peer.sendall(b"220 mail \xff\xfe ready\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}", lambda: server.shutdown(socket.SHUT_RDWR)


def no_name() -> tuple[str, Callable[[], None]]:
    return "no name at all:x", lambda: None


@pytest.mark.parametrize("make", [closed, of_another_kind, no_name])
def test_without_a_server_the_thread_ends_and_training_goes_on(
    make: Callable[[], tuple[str, Callable[[], None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, close = make()
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    with Preemption(poll_s=0.02) as preemption:
        for thread in watching():
            assert ends(thread)
        assert preemption.requested(1) is None
    close()


def test_asking_costs_nothing() -> None:
    with Preemption() as preemption:
        began = time.perf_counter()
        for step in range(10_000):
            preemption.requested(step)
        assert (time.perf_counter() - began) / 10_000 < 100e-6


# One of two processes. It trains at its own speed, and tells at which step it stops and why.
CHILD = """
import json, os, signal, sys, threading, time, traceback
from pathlib import Path
import jax

def fail(*error):  # at once: jax's own exit would wait minutes for the other process
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)

sys.excepthook = fail
jax.config.update("jax_num_cpu_devices", 2)
where, number, folder, how, host = sys.argv[1:]
if host:
    os.environ["GCE_METADATA_HOST"] = host
from vlmscale.distributed import agree, barrier, start
from vlmscale.sharding import make_mesh
from vlmscale.train.preemption import Preemption

start(f"{where},2,{number}", 20)
mesh, first, found = make_mesh(), 1, {}
barrier("both are here")

def term():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2.5)  # until all have been told

if how == "before a resumed loop":
    first = 501
    if number == "1":
        term()
if how == "between two loops":
    with jax.set_mesh(mesh), Preemption() as preemption:
        assert [preemption.requested(step) for step in range(1, 101)] == [None] * 100
    if number == "1":
        term()
barrier("loop")
before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)
with jax.set_mesh(mesh), Preemption(poll_s=0.1) as preemption:
    if how == "cost":
        began = time.perf_counter()
        assert [preemption.requested(step) for step in range(1, 10_001)] == [None] * 10_000
        found["seconds"] = (time.perf_counter() - began) / 10_000
        first = 10_001
    (Path(folder) / f"{number}.ready").write_text("")
    for step in range(first, first + 10_000):
        time.sleep(0.002 * (1 + 4 * int(number)))
        reason = preemption.requested(step)
        if reason:
            break
    found |= {"step": step, "reason": reason, "again": preemption.requested(step)}
found["restored"] = before == (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT))
found["threads"] = [thread.name for thread in threading.enumerate()]
(Path(folder) / f"{number}.json").write_text(json.dumps(found))
jax.distributed.shutdown()
"""


def both(
    folder: Path, how: str = "", host: str = "", ready: Callable[[Any], None] = lambda children: None
) -> list[dict[str, Any]]:
    """What the two tell; `ready` is called when both are in the loop, and the second sees a notice."""
    where = f"127.0.0.1:{free_port()}"
    words = [[where, str(number), str(folder), how, host * number] for number in range(2)]
    began = time.monotonic()
    with at_work(CHILD, words, folder) as children:

        def over() -> bool:
            return any(child.poll() for child, _ in children) or all(
                child.poll() is not None for child, _ in children
            )

        def in_loop() -> bool:
            return over() or all((folder / f"{number}.ready").exists() for number in range(2))

        in_time = wait_for(in_loop, SECONDS)
        if in_time and not over():
            time.sleep(0.3)
            ready(children)
        in_time = wait_for(over, SECONDS - (time.monotonic() - began))
        story = told(children)
        assert in_time, f"not done after {SECONDS} s\n{story}"
        assert [child.returncode for child, _ in children] == [0, 0], story
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def same_stop(found: list[dict[str, Any]], reason: str) -> int:
    """The step at which both stopped for one reason, leaving all as it was."""
    first, second = found
    assert first["step"] == second["step"]
    for one in found:
        assert one["reason"] == one["again"] == reason
        assert one["restored"]
        assert "notices" not in one["threads"]
    return first["step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, which",
    [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGINT, 0)],
)
def test_a_signal_to_one_process_stops_both_at_one_step(
    number: signal.Signals, which: int, tmp_path: Path
) -> None:
    found = both(tmp_path, ready=lambda children: children[which][0].send_signal(number))
    assert same_stop(found, number.name) > 20


@pytest.mark.slow
def test_signals_to_both_stop_them_once(tmp_path: Path) -> None:
    def send(children: Any) -> None:
        children[0][0].send_signal(signal.SIGUSR1)
        children[1][0].send_signal(signal.SIGTERM)

    same_stop(both(tmp_path, ready=send), "SIGUSR1")


@pytest.mark.slow
def test_a_notice_to_one_machine_stops_both_at_one_step(tmp_path: Path) -> None:
    said = dict(QUIET)
    with metadata(said) as (host, asked):
        found = both(tmp_path, host=host, ready=lambda _: said.update(preempted="TRUE"))
    same_stop(found, "preemption notice")
    assert asked


@pytest.mark.slow
@pytest.mark.parametrize("how, step", [("before a resumed loop", 501), ("between two loops", 1)])
def test_a_signal_outside_the_loop_stops_both_at_its_first_step(how: str, step: int, tmp_path: Path) -> None:
    """jax's service with the steps themselves would never answer: it counts from where it was asked last."""
    assert same_stop(both(tmp_path, how), "SIGTERM") == step


@pytest.mark.slow
def test_asking_costs_nothing_with_two_processes(tmp_path: Path) -> None:
    found = both(tmp_path, "cost", ready=lambda children: children[0][0].send_signal(signal.SIGTERM))
    same_stop(found, "SIGTERM")
    assert max(one["seconds"] for one in found) < 100e-6
    print({"seconds per call": [one["seconds"] for one in found]})
