"""An analysis as plain JSON values, all digits kept; a figure that does not exist is null."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy

from analysis.bootstrap import percentile_interval
from analysis.compare import Comparison
from analysis.data import Dataset
from analysis.optimum import Optimum
from analysis.remarks import remarks
from analysis.study import Analysis, LawStudy, Study
from analysis.validate import akaike_weights

_CELL = (
    *("n", "n_nonembed", "v", "error", "n_items", "sampling_sd", "chance", "text_tokens", "gen_tokens"),
    *("infer_flops", "tower_flops", "compressor_flops", "query_flops", "latency_ms", "seeds"),
)
_DRAWS = 400  # resamples of the chosen law that are kept: a percentile of 2.5% is then that of ten of them
_DIGITS = 7


def analysis_record(analysis: Analysis) -> dict[str, Any]:
    """The object of `--json`: the first group at the top, further groups of the same form in
    `more_groups`.
    """
    first, *more = analysis.studies
    options = first.options
    told = {id(study) for study in analysis.told}
    records = [study_record(study, warn=id(study) in told) for study in (first, *more)]
    record = records[0]
    record["data"] = {**dataset_record(analysis.dataset), **record["data"]}
    record["warnings"] = [*analysis.dataset.warnings, *record["warnings"]]
    return {
        **record,
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "loss": options.loss,
        "versions": versions(),
        "methods": [_comparison(item) for item in analysis.comparisons],
        "more_groups": records[1:],
    }


def _comparison(item: Comparison) -> dict[str, Any]:
    return {
        "llm_name": item.llm_name,
        "n": item.n,
        "tasks": list(item.tasks),
        "blind_error": plain(item.blind),
        "points": plain(item.points),
    }


def to_json(result: dict[str, Any]) -> str:
    """The text of analysis.json, and of `--json`."""
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def versions() -> dict[str, str]:
    """Versions, and a hash of this package's code, which together fix every digit of the result."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "analysis_code_sha256": code.hexdigest(),
    }


def dataset_record(dataset: Dataset) -> dict[str, Any]:
    """Where the numbers came from: file names, hash of the bytes, counts, and the versions the rows name."""
    return {
        "source": dataset.source,
        "sha256": dataset.sha256,
        "rows": dataset.rows,
        "unfinished_rows": dataset.unfinished,
        "vlmscale_versions": list(dataset.versions),
        "git_commits": list(dataset.commits),
        "devices": list(dataset.devices),
    }


def study_record(study: Study, warn: bool = True) -> dict[str, Any]:
    """Cells, laws, verdicts, optimum, intervals, evidence, design and (if `warn`) warnings of one group."""
    table, best = study.table, study.best
    weights = akaike_weights([law.fit for law in study.laws.values()])
    return {
        "group": table.group,
        "data": _data(study),
        "laws": {
            name: _law(law, float(weight))
            for (name, law), weight in zip(study.laws.items(), weights, strict=True)
        },
        "refused_laws": dict(study.refused),
        "no_fit": study.no_fit,
        "best_law": best.fit.law.name if best else None,
        "prediction": _prediction(best) if best else None,
        "optimum": {"identified": study.identified, **_optimum(study.optimum)} if study.optimum else None,
        "averaged": plain(study.averaged),
        "cost": {
            **plain(study.cost),
            "text_tokens_measured": study.q_measured,
            "budget": plain(study.budget),
        },
        "uncertainty": plain(study.methods),
        "best_tokens": [{"text_tokens": choice.q, **_optimum(choice.best)} for choice in study.tokens],
        "multipliers": [{"visual_tokens": v, "times_budget": plain(x)} for v, x in study.multiplier],
        "deploy": [
            {
                "budget": item.budget,
                "measured": plain(item.measured),
                "law": plain(item.law),
                "free": _optimum(item.free) if item.free else None,
            }
            for item in study.deployments
        ],
        "evidence": _evidence(study),
        "tasks": plain(study.pooled),
        "design": _design(study),
        "warnings": list(remarks(study)) if warn else [],
    }


def plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and numpy values as JSON values; what is not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _data(study: Study) -> dict[str, Any]:
    table = study.table
    columns = {key: [x if math.isfinite(x) else None for x in getattr(table, key).tolist()] for key in _CELL}
    cells = [
        {"llm_name": name, **{key: column[i] for key, column in columns.items()}}
        for i, name in enumerate(table.llm_name)
    ]
    return {
        "origin": study.origin,
        "target": table.target,
        "tasks": list(table.tasks),
        "cells": cells,
        "blind_error": plain(table.blind),
        "dropped": list(table.dropped),
        "copied_cells": [[cells[i] for i in pair] for pair in study.copies],
    }


def _law(law: LawStudy, weight: float) -> dict[str, Any]:
    fit, verdict, validation = law.fit, law.verdict, law.validation
    record = {
        "formula": fit.law.formula,
        "params": plain(fit.params),
        "sse": plain(fit.sse),
        "r2": fit.r2,
        "aicc": fit.aicc,
        "akaike_weight": weight,
        "ratio": plain(fit.ratio),
        "ratio_ci": [plain(law.profile.low), plain(law.profile.high)],
        "ratio_identified": verdict.identified,
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "flags": list(verdict.flags),
        "loo_rms": validation.loo_rms,
        "lono_rms": validation.lono_rms,
        "lovo_rms": validation.lovo_rms,
        "largest_n": plain(validation.largest),
        "slopes": list(fit.slopes),
        "residual_sd": plain(fit.sd),
        "freedom": fit.freedom,
        "converged": fit.converged,
        "gradient": plain(fit.gradient),
        "condition": plain(fit.condition),
        "visual_tokens": plain(law.v),
        "resamples": law.replicates.theta.shape[0],
        "resamples_failed": law.replicates.failed,
        "param_intervals": _param_intervals(law),
    }
    return {**record, "lam_ci": plain(law.bend)} if law.bend is not None else record


def _prediction(law: LawStudy) -> dict[str, Any]:
    """What predicts errors and their uncertainty anywhere: the law's centred coordinates, and resamples."""
    frame, draws = law.fit.cells.frame, law.replicates.theta[:_DRAWS]
    return {
        "law": law.fit.law.name,
        "centre_ln_n": frame.ln_n,
        "centre_ln_v": frame.ln_v,
        "theta": plain(law.fit.theta.tolist()),
        "draws": [[float(f"{x:.{_DIGITS}g}") for x in row] for row in draws if np.isfinite(row).all()],
    }


def _param_intervals(law: LawStudy) -> dict[str, Any]:
    """95% bootstrap percentiles of the printed parameters."""
    if law.replicates.theta.shape[0] == 0:
        return {}
    spread = law.fit.law.natural(law.replicates.theta, law.fit.cells.frame)
    return {name: plain(percentile_interval(np.asarray(values))) for name, values in spread.items()}


def _optimum(optimum: Optimum) -> dict[str, Any]:
    return {
        "visual_tokens": optimum.v,
        "ci": plain(optimum.v_interval),
        "corner": optimum.corner or None,
        "indifference": list(optimum.indifference),
        "n": plain(optimum.n),
        "n_ci": plain(optimum.n_interval),
        "share": plain(optimum.share),
        "error": plain(optimum.error),
        "error_ci": plain(optimum.band),
        "budget": plain(optimum.budget),
        "extrapolated": optimum.extrapolated,
    }


def _evidence(study: Study) -> dict[str, Any]:
    helped, compared = study.blind
    best = study.best
    return {
        "falling": {key: {"pairs": x.pairs, "falling": x.falling} for key, x in study.falling.items()},
        "iso_cost": {"pairs": study.iso_cost.pairs, "larger_llm_wins": study.iso_cost.falling},
        "better_than_blind": {"cells": compared, "better": helped},
        "cells_at_chance": study.chance_cells,
        "baselines_largest_n": plain(study.baselines),
        "interaction_tests": [{"law": law, "f": plain(f), "p": plain(p)} for law, f, p in study.interactions],
        "free_curvature_test": plain(study.curvature),
        "lack_of_fit": {"by_n": plain(study.mixed.row_f), "by_v": plain(study.mixed.column_f)}
        if study.mixed
        else None,
        "left_out_by_n": plain(best.validation.by_n) if best else {},
        "left_out_by_v": plain(best.validation.by_v) if best else {},
        "without_copies": plain(study.without_copies),
        "floor_ridge": plain(study.ridge),
    }


def _design(study: Study) -> dict[str, Any] | None:
    if study.design is None:
        return None
    record: dict[str, Any] = plain(study.design)
    for item, candidate in zip(record["candidates"], study.design.candidates, strict=True):
        item["gain_per_cost"] = plain(candidate.gain_per_cost)
    return record
