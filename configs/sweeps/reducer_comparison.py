"""The demo's models, other compressors, and models trained with a reducer: what docs/reducers.md compares.

    vlmscale sweep run configs/sweeps/reducer_comparison.py --out runs/reducers
    python benchmarks/reducer_comparison.py runs/reducers --out runs/reducers/comparison

The second command asks the plain models with every reducer that needs no training, and draws the figures.
"""

from collections.abc import Sequence

from vlmscale.compressors import COMPRESSORS
from vlmscale.config import Sweep
from vlmscale.loading import load_cell

LLMS = ("toy-14k", "toy-40k", "toy-135k", "toy-375k")
VISUAL_TOKENS = (1, 4, 16, 64)
COMPRESSED_LLM, COMPRESSED = "toy-135k", 16  # of the other compressors
TRAINED = (
    ("voco", "tokens=1", 0.5),
    ("voco", "tokens=4", 0.5),
    ("voco", "tokens=16", 0.5),
    ("atp", "", 0.6),
)


def get_sweep(overrides: Sequence[str] = ()) -> Sweep:
    """All cells; overrides such as --config.train.steps=10 apply to each."""
    cells = [load_cell(f"configs/scenes_tiny.py:{llm},{v}", overrides) for llm in LLMS for v in VISUAL_TOKENS]
    for name, method in COMPRESSORS.items():
        if name != "pool":
            count = 64 if name == "mlp" else COMPRESSED  # mlp gives every patch
            cell = load_cell(f"configs/scenes_tiny.py:{COMPRESSED_LLM},{count}", overrides)
            cell.compressor.name = name
            if method.nested is not None:
                cell.evaluate.visual_tokens = (count,)
            cells.append(cell)
    for llm in LLMS[1:]:
        for name, options, keep in TRAINED:
            cell = load_cell(f"configs/scenes_tiny.py:{llm},64", overrides)
            cell.reducer.name, cell.reducer.options, cell.reducer.keep = name, options, keep
            cells.append(cell)
    return Sweep("reducer_comparison", cells)
