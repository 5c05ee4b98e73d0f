"""What integration tests share: the smallest cells, and the command line inside and outside this process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmscale.cli import main

SCENES = "configs/scenes_tiny.py:toy-14k,4"
LLAVA = "configs/llava_tiny.py:toy-14k"
DATA = (
    "--config.data.train_images=64",
    "--config.data.validation_images=8",
    "--config.data.test_images=8",
)
# The same eight devices as in this process, set the same way, so that numbers may be compared bit for bit.
_CHILD = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from vlmscale.cli import main
sys.exit(main(sys.argv[1:]))
"""


def steps(count: int) -> tuple[str, ...]:
    """Overrides for a run of `count` steps."""
    return f"--config.train.steps={count}", "--config.train.warmup_steps=2"


def train(out: Path, *overrides: str, config: str = SCENES, count: int = 20) -> int:
    """`vlmscale train` in this process."""
    short = ("--config.evaluate.max_new_tokens=4",) if config == LLAVA else ()
    return main(["train", "--config", config, "--out", str(out), *DATA, *steps(count), *short, *overrides])


def child(words: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, with pipes for both outputs."""
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=(os.environ if env is None else env) | {"JAX_PLATFORMS": "cpu"},
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def saved_steps(run: Path) -> list[int]:
    """Steps with a whole checkpoint."""
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def talk(question: str, answer: str) -> list[dict[str, str]]:
    """A LLaVA conversation of one turn."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def picture(kind: str = "PNG", mode: str = "RGB", seed: int = 0, side: int = 40) -> bytes:
    """A file with a random picture."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (side, side) if channels == 1 else (side, side, channels)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    buffer = io.BytesIO()
    Image.frombytes(mode, (side, side), pixels.tobytes()).save(buffer, kind)
    return buffer.getvalue()


def write_llava(folder: Path, records: Any) -> tuple[str, str]:
    """Write `records` as JSON beside an images folder; returns both overrides."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    return f"--config.data.records={folder / 'records.json'}", f"--config.data.images={folder / 'images'}"
