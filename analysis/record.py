"""A study as plain JSON values, all digits kept; a figure that does not exist is null."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from analysis.data import Dataset
from analysis.fit import Fit, Verdict
from analysis.study import Study


def dataset_record(dataset: Dataset) -> dict[str, Any]:
    """Where the numbers came from: file name, hash of its bytes, counts, and the versions its rows name."""
    return {
        "source": dataset.source,
        "sha256": dataset.sha256,
        "rows": dataset.rows,
        "unfinished_rows": dataset.unfinished,
        "vlmscale_versions": list(dataset.versions),
        "git_commits": list(dataset.commits),
        "devices": list(dataset.devices),
    }


def study_record(study: Study) -> dict[str, Any]:
    """Cells, fits, verdicts, V*(Q), picks and evidence of one task group."""
    table = study.table
    arrays = ("n", "v", "error", "n_items", "sampling_sd", "chance", "text_tokens", "infer_flops", "seeds")
    cells = [
        {"llm_name": name, **{key: _number(getattr(table, key)[i]) for key in arrays}}
        for i, name in enumerate(table.llm_name)
    ]
    return {
        "group": table.group,
        "data": study.origin,
        "source": table.source,
        "tasks": list(table.tasks),
        "q": study.q,
        "q_measured": study.q_measured,
        "cells": cells,
        "blind_error": dict(table.blind),
        "dropped": list(table.dropped),
        "no_fit": study.no_fit,
        "laws": [_fit(fit, study.verdicts[name]) for name, fit in study.fits.items()],
        "best_law": study.best.law.name if study.best else None,
        "aicc_margin": study.margin,
        "best_tokens": [asdict(choice) for choice in study.tokens],
        "deploy": [asdict(item) for item in study.deployments],
        "falling": {key: {**asdict(pairs), "share": pairs.share} for key, pairs in study.falling.items()},
        "better_than_blind": {"cells": study.blind[1], "better": study.blind[0]},
        "cells_at_chance": study.chance_cells,
        "copied_cells": [[cells[i] for i in pair] for pair in study.copies],
        "without_copies": _verdict(study.without_copies) if study.without_copies else None,
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "identified": verdict.identified,
        "reason": verdict.reason,
        "ratio": verdict.ratio,
        "ratio_interval": list(verdict.interval) if verdict.interval else None,
    }


def _fit(fit: Fit, verdict: Verdict) -> dict[str, Any]:
    usable = fit.converged and fit.replicates.shape[0] > 0
    return {
        "law": fit.law.name,
        "formula": fit.law.formula,
        "parameters": dict(zip(fit.law.parameters, fit.params.tolist(), strict=True)),
        "intervals": {
            name: list(fit.interval(i)) if usable else None for i, name in enumerate(fit.law.parameters)
        },
        "sse": fit.sse,
        "r2": fit.r2,
        "aicc": fit.aicc,
        "residual_sd": fit.sd,
        "freedom": fit.freedom,
        "converged": fit.converged,
        "resamples": fit.replicates.shape[0],
        "resamples_failed": fit.failed,
        "share_size_beats_tokens": fit.size_beats_tokens if usable else None,
        "verdict": _verdict(verdict),
    }
