"""The demo: four LLM sizes x four visual-token counts and a blind row, on the built-in scenes.

    vlmscale demo

About 10 minutes on two CPU cores.
"""

from collections.abc import Sequence

from vlmscale.config import Sweep
from vlmscale.loading import load_cell

LLMS = ("toy-14k", "toy-40k", "toy-135k", "toy-375k")
VISUAL_TOKENS = (0, 1, 4, 16, 64)


def get_sweep(overrides: Sequence[str] = ()) -> Sweep:
    """Every LLM with every token count; overrides such as --config.train.steps=10 apply to all cells."""
    specs = [f"configs/scenes_tiny.py:{llm},{count}" for llm in LLMS for count in VISUAL_TOKENS]
    return Sweep("demo", [load_cell(spec, overrides) for spec in specs])
