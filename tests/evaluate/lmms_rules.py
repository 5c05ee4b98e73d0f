"""lmms-eval's files, each loaded by its path, and random answers to compare its rules with ours by."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

COUNT = 1000
_WORDS = """
    cat dog Cat DOG fox the a an The two ten none eleven 2 10 3.5 1,000 12% 0.12 dont don't couldn'tve it's
    yes no Yes No NO not is answer option A B C D E (A) (B) A. B. (C). D, :B B: red blue red-blue
    ice/cream stop. stop, a.m. $5 so = could be
"""
WORDS = (*_WORDS.split(), "x\ty")
ENDS = ("", "", "", ".", "!", ",", "?", ":", ")", "'", "%", "-", " .", "...")


def load(name: str, *needs: str) -> ModuleType:
    """The file `name` of lmms-eval's package, or the test is skipped."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("lmms-eval is not installed")
    for need in needs:
        pytest.importorskip(need, reason=f"lmms-eval's {name} needs {need}")
    root = Path(next(iter(found.submodule_search_locations)))
    key = "lmms_" + re.sub(r"\W", "_", name)
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, root / name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # The package's own start reads every task and wants torch and accelerate; files need its path alone.
        bare = ModuleType("lmms_eval.tasks")
        bare.__path__ = [str(root / "tasks")]
        before = sys.modules.get(bare.__name__)
        sys.modules[bare.__name__] = before or bare
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            pytest.skip(f"lmms-eval's {name} cannot be imported: {error}")
        finally:
            if before is None:
                for part in [part for part in sys.modules if (part + ".").startswith(f"{bare.__name__}.")]:
                    del sys.modules[part]
        sys.modules[key] = module
    return sys.modules[key]


def texts(count: int = COUNT, words: Sequence[str] = WORDS, longest: int = 4, seed: int = 0) -> list[str]:
    """Random answers, without white space around them: lmms-eval strips before it scores."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        joint = draw.choice((" ", " ", " ", "", "  ", ", ", "-", "\n"))
        words_drawn = draw.choices(words, k=draw.randint(0 if draw.random() < 0.05 else 1, longest))
        found.append((joint.join(words_drawn) + draw.choice(ENDS)).strip())
    return found


def hits(marks: Sequence[float]) -> None:
    """A comparison says little where every mark is the same: some must be right and some wrong."""
    assert 0.02 * len(marks) < sum(mark > 0 for mark in marks) < 0.98 * len(marks)
