"""Several real processes at once, for tests of programs that run as many: started, watched and cleaned up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Child = tuple[subprocess.Popen[bytes], Path]  # with the file of its outputs


@contextmanager
def at_work(program: str, words: list[list[str]], folder: Path) -> Iterator[list[Child]]:
    """The program once for each list of words; no process outlives the block, nor do their workers."""
    children: list[Child] = []
    try:
        for number, own in enumerate(words):
            log = folder / f"{number}.log"
            with log.open("wb") as outputs:  # no pipe, which a child could fill while nobody reads
                child = subprocess.Popen(
                    [sys.executable, "-c", program, *own],
                    stdout=outputs,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    cwd=ROOT,
                )
            children.append((child, log))
        yield children
    finally:
        for child, _ in children:
            child.kill()  # nothing happens to one that has ended
            child.wait()


def free_port() -> int:
    """Of the loopback, for a coordinator."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def told(children: list[Child]) -> str:
    """How the processes ended, and the end of what they printed, without gloo's greetings."""
    parts = []
    for number, (child, log) in enumerate(children):
        kept = [line for line in log.read_text(errors="replace").splitlines() if "[Gloo]" not in line]
        code = child.returncode
        ended = "was still at work" if code is None else f"ended with {code}"
        parts.append("\n".join([f"process {number} {ended}:", *kept[-40:]]))
    return "\n\n".join(parts)
