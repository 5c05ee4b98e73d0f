"""Synthetic rows for the tests of `analysis`; nothing here reads a file outside the repository."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIZES = (("nano", 4_200), ("micro", 21_000), ("mini", 104_000), ("small", 520_000))
COUNTS = (0, 1, 4, 16, 36, 64)
TASKS = {"count": ("reasoning", 0.30, 0.07), "relate": ("reasoning", 0.25, 0.06), "read": ("ocr", 0.12, 0.45)}


def make_row(name: str, n: int, v: int, task: str, group: str, score: float, **more: Any) -> dict[str, Any]:
    row = {
        "cell_id": f"{name}-{v}",
        "seed": 0,
        "llm_name": name,
        "n_total": n,
        "compressor": "quecc" if v else "none",
        "reducer": "none",
        "vision_tower": "tiny",
        "visual_tokens": v,
        "text_tokens_mean": 12.0,
        "image_size": 64,
        "infer_flops": 2.0 * n * (v + 12) + 1e6,
        "device": "cpu",
        "task": task,
        "task_group": group,
        "metric": "accuracy",
        "score": score,
        "n_items": 400,
        "chance": 0.2,
        "blind_score": None,
        "vlmscale_version": "0.1.0",
        "git_commit": "abc1234",
        "status": "done",
    }
    return {**row, **more}


def make_rows(seed: int = 0, noise: float = 0.01) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for name, n in SIZES:
        for v in COUNTS:
            for task, (group, by_size, by_tokens) in TASKS.items():
                logit = -1.0 + by_size * math.log(n / 2e4) + (by_tokens * math.log(v / 4) if v else -3.0)
                score = 1 / (1 + math.exp(-logit)) + rng.normal(0, noise)
                rows.append(make_row(name, n, v, task, group, float(np.clip(score, 0, 1))))
    return rows


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return make_rows()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def save(rows: list[dict[str, Any]]) -> Path:
        sweep = tmp_path / "sweep"
        sweep.mkdir(exist_ok=True)
        (sweep / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return sweep

    return save


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    return make_row
