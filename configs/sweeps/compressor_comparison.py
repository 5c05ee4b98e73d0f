"""Every compressor at 1, 4 and 16 visual tokens, with one LLM size on the demo's tower and scenes.

    vlmscale sweep run configs/sweeps/compressor_comparison.py --out runs/compressors

docs/compressors.md holds its table and figure, and says what they show. Methods whose counts are others take
the nearest; those that train many counts in one model are trained once, up to 16, and evaluated at all three.
"""

from collections.abc import Iterator, Sequence

from vlmscale.compressors import COMPRESSORS, parse_options
from vlmscale.config import Sweep
from vlmscale.loading import load_cell
from vlmscale.models.sizes import TOWERS

LLM = "toy-135k"
VISUAL_TOKENS = (1, 4, 16)
# Methods as they are, and those of their options that make another method of them.
METHODS = (
    *((name, "") for name in COMPRESSORS),
    ("pool", "placement=after"),
    ("resampler", "kind=perceiver"),
    ("mqt", "keys=image"),
    ("prumerge", "count=adaptive"),
    ("prumerge_plus", "count=adaptive"),
)


def get_sweep(overrides: Sequence[str] = ()) -> Sweep:
    """All cells and a blind one; overrides such as --config.train.steps=10 apply to all cells."""
    cells = [load_cell(f"configs/scenes_tiny.py:{LLM},0", overrides)]
    for name, options in METHODS:
        for visual_tokens, evaluated in _counts(name, options, TOWERS[cells[0].tower.name].grid):
            cell = load_cell(f"configs/scenes_tiny.py:{LLM},16", overrides)
            cell.compressor.name, cell.compressor.options = name, options
            cell.compressor.visual_tokens, cell.evaluate.visual_tokens = visual_tokens, evaluated
            cells.append(cell)
    return Sweep("compressor_comparison", cells)


def _counts(name: str, options: str, grid: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The counts that a method is trained for, each with those that it is evaluated at, () for its own."""
    method = COMPRESSORS[name]
    if method.nested is not None:
        yield max(VISUAL_TOKENS), VISUAL_TOKENS
    elif method.adaptive(parse_options(name, options)):
        yield max(method.counts(grid)), ()  # as many as the picture asks for
    else:
        known = method.counts(grid)
        yield from (
            (count, ())
            for count in dict.fromkeys(min(known, key=lambda k: (abs(k - v), k)) for v in VISUAL_TOKENS)
        )
