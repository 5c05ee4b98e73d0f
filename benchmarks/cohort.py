"""A cohort beside separate runs: seven numbers of visual tokens, one program against seven.

    python benchmarks/cohort.py                      # LLaVA's first stage: tower and LLM frozen
    python benchmarks/cohort.py --stage 2 --patches 576

All goes the way of `vlmscale train`: prepared data, the pipeline, the loop with its metrics and
checkpoints. Tower and LLM have the shapes of SigLIP-400M (729 patches) or CLIP ViT-L (576) and of a 0.5B
Qwen with everything but the numbers of tokens divided: widths by 8, layers by 3, so that the FLOPs of an
image and of an answer stand to each other as in the originals (both are printed). Text is cut at 60 tokens.
Each way is run in turn, several times.

`ratio` is the cohort's seconds over those of the seven runs together, of a step without compilation (median
of rounds) and of everything from start to end. `by FLOPs` is what the analytic count predicts, without and
with the forward pass that the backward pass repeats (remat).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vlmscale.config import Cell, cell_id
from vlmscale.cost import flops
from vlmscale.cost.image import sample_flops, tower_flops, tower_passes
from vlmscale.loading import load_cell
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize, tower_levels
from vlmscale.train.cohort import Member
from vlmscale.train.loop import train
from vlmscale.train.prepared import Prepared, prepare
from vlmscale.train.run import open_run
from vlmscale.weights import tree
from vlmscale.weights.directory import abstract_tower

VISUAL_TOKENS = (1, 4, 16, 36, 64, 144, 576)
REAL = {729: "siglip-so400m-patch14-384", 576: "clip-vit-large-patch14-336"}
LLM, TOWER, TEXT = "eighth-of-qwen1.5-0.5b", "eighth-of-tower", 60


def scaled_tower(patches: int) -> TowerSize:
    """The real one with an eighth of the width and a third of the layers, over as many patches."""
    real, side = TOWERS[REAL[patches]], round(patches**0.5)
    layers = real.num_layers // 3
    return TowerSize(
        4 * side,
        4,
        real.width // 8,
        layers,
        real.num_heads // 8,
        real.mlp_width // 8,
        layers - 1,
        tower_levels(layers),
        norm_eps=real.norm_eps,
    )


def scaled_llm() -> DecoderSize:
    """The 0.5B Qwen 1.5 likewise."""
    real = SIZES["qwen1.5-0.5b"]
    return DecoderSize(real.width // 8, real.num_layers // 3, 2, 2, real.mlp_width // 8, family="qwen2")


def cells(options: argparse.Namespace, weights: Path) -> list[Cell]:
    """One a number of visual tokens."""
    words = {
        "tower.name": TOWER,
        "tower.checkpoint": weights,
        "llm.name": LLM,
        "data.train_images": 64,
        "data.validation_images": 8,
        "data.test_images": 8,
        "data.max_text_tokens": TEXT,
        "data.features": "computed",
        "data.vocab_size": 4096,
        "train.steps": options.steps,
        "train.warmup_steps": 2,
        "train.batch_size": options.batch,
        "train.llm_rate": float(options.stage == 2),
        "train.remat": options.remat,
        "train.heldout_every": 10**6,
        "train.checkpoint_every": 10**6,
    }
    overrides = [f"--config.{key}={value}" for key, value in words.items()]
    spec = "configs/scenes_tiny.py:toy-14k,"
    return [load_cell(f"{spec}{count}", overrides) for count in VISUAL_TOKENS]


def predicted(made: Sequence[Cell], prepared: Prepared, repeated: bool) -> float:
    """FLOPs of the cohort over those of the separate runs."""
    average = prepared.samples("train", made[0]).average()
    vocab = prepared.vocab_rows(made[0])
    tower = average.with_image * tower_passes(made[0]) * tower_flops(TOWERS[TOWER])
    alone = [sample_flops(cell, vocab, average) for cell in made]
    if repeated:  # the layers' forward pass once more
        size = SIZES[LLM]
        alone = [
            value + flops.decoder_flops(size, average.text + average.with_image * count, 0)
            for value, count in zip(alone, VISUAL_TOKENS, strict=True)
        ]
    return (sum(alone) - (len(alone) - 1) * tower) / sum(alone)


def run(members: Sequence[Member], folder: Path, prepared: Prepared) -> tuple[float, float]:
    """Seconds of a step and of everything."""
    start = time.perf_counter()
    train(members, folder, prepared, lambda *_: None)
    whole = time.perf_counter() - start
    lines = [json.loads(line) for line in (members[0].run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["step_s"] for line in lines[1:]), whole


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Both ways in turn."""
    TOWERS[TOWER], SIZES[LLM] = scaled_tower(options.patches), scaled_llm()
    rng, shapes = (
        np.random.default_rng(0),
        nn.meta.unbox(abstract_tower(TOWERS[TOWER], (TOWERS[TOWER].num_layers,))),
    )
    params = jax.tree.map(lambda leaf: (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
    tree.save(root / "tower.safetensors", params, {"name": TOWER})
    made = cells(options, root / "tower.safetensors")
    prepared = prepare(made, root / "data", lambda *_: None)
    found: dict[str, list[float]] = {"cohort": [], "cohort_all": [], "apart": [], "apart_all": []}
    for number in range(options.rounds):
        for way in ("cohort", "apart"):
            members = [Member(cell, root / f"{way}-{number}" / cell_id(cell)) for cell in made]
            for cell, place in members:
                open_run(cell, place, prepared.path, "benchmark")
            parts = [members] if way == "cohort" else [[member] for member in members]
            times = [
                run(part, part[0].run if len(part) == 1 else root / f"{way}-{number}" / "all", prepared)
                for part in parts
            ]
            found[way].append(sum(step for step, _ in times))
            found[f"{way}_all"].append(sum(whole for _, whole in times))
    seconds = {name: statistics.median(values) for name, values in found.items()}
    real, llm = TOWERS[REAL[options.patches]], SIZES["qwen1.5-0.5b"]
    return {
        "patches": options.patches,
        "stage": options.stage,
        "ratio of a step": seconds["cohort"] / seconds["apart"],
        "ratio of everything": seconds["cohort_all"] / seconds["apart_all"],
        "by FLOPs": predicted(made, prepared, False),
        "by FLOPs with remat": predicted(made, prepared, True),
        "s a step, cohort": seconds["cohort"],
        "s a step, apart": seconds["apart"],
        "tower over LLM": tower_flops(TOWERS[TOWER]) / flops.decoder_flops(SIZES[LLM], TEXT, 0),
        "tower over LLM, originals": tower_flops(real) / flops.decoder_flops(llm, TEXT, 0),
        "same losses": same_losses(root, made),
    }


def same_losses(root: Path, made: Sequence[Cell]) -> float:
    """Largest relative difference between the loss curves of both ways."""
    worst = 0.0
    for cell in made:
        curves = [
            [
                json.loads(line)["loss"]
                for line in (root / f"{way}-0" / cell_id(cell) / "metrics.jsonl").read_text().splitlines()
            ]
            for way in ("cohort", "apart")
        ]
        worst = max(worst, float(np.max(np.abs(np.subtract(*curves)) / np.abs(curves[1]))))
    return worst


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patches", type=int, choices=sorted(REAL), default=729)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--remat", choices=("block", "dots", "none"), default="block")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    if options.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, **found}))
        return
    for name, value in found.items():
        print(f"{name:26} {value:.4g}" if isinstance(value, float) else f"{name:26} {value}")


if __name__ == "__main__":
    main()
