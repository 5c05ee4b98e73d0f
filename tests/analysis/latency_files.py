"""A latency file with chosen coefficients, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from analysis.latency import FORM, KIND, Shape, decode_terms, fit_models, prefill_terms, usual

PREFILL = (2.0, 0.5, 3.0, 5.0)
DECODE = (0.5, 1.5, 4.0, 2.5)


def llm(params: float, itemsize: float = 2.0) -> dict[str, float]:
    """The fields of a shape of usual proportions."""
    return {key: float(x) for key, x in usual(params, itemsize)._asdict().items()}


def times(shape: Shape, v: float, q: float, batch: float, generated: float) -> dict[str, float]:
    """Milliseconds by `PREFILL` and `DECODE`."""
    return {
        "prefill_ms": float(prefill_terms(shape, v + q, batch) @ np.array(PREFILL)),
        "decode_ms": float(decode_terms(shape, v + q + generated, batch) @ np.array(DECODE)),
    }


def made_cells(llms: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Cells of these LLMs whose times follow the model exactly."""
    return [
        {
            **{"llm_name": name, "visual_tokens": v, "text_tokens": q, "batch": b, "gen_tokens": 8},
            **times(Shape(**fields), v, q, b, 8),
        }
        for name, fields in llms.items()
        for v in (1, 16, 144)
        for q in (20, 50)
        for b in (1, 8)
    ]


def made_file(images: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A latency file of three LLMs of usual proportions."""
    llms = {f"llm-{size:g}": llm(size) for size in (5e8, 2e9, 7e9)}
    cells = made_cells(llms)
    return {
        **{"kind": KIND, "version": FORM, "device": {"kind": "NVIDIA H200", "platform": "gpu"}},
        **{"dtype": "bfloat16", "attention": "xla", "llms": llms, "cells": cells, "images": images},
        **{"models": fit_models(llms, cells, "bfloat16"), "no_fit": None, **more},
    }


def write_file(path: Path, value: Any) -> Path:
    """As JSON; text as it stands."""
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path
