r"""The grid of arXiv 2411.03312: Qwen1.5 of 0.5B to 14B with 1 to 576 visual tokens, in LLaVA's two stages.

    vlmscale sweep run configs/sweeps/paper_grid.py --out runs/grid1
    vlmscale sweep run configs/sweeps/paper_grid.py --config.train.init_from=runs/grid1 --out runs/grid2

The first is stage 1 (configs/llava_pretrain.py). The second, which names the directory of the first, is
stage 2 (configs/llava_finetune.py): each cell goes on from the cell of the same LLM, compressor, count and
seed.

`paper_grid.py:both` is the cells of both stages together: to plan them (docs/paper-grid.md), since stage 2
can only run behind stage 1.

Three keys choose a part of the grid. `--config.llm.name=qwen1.5-0.5b` is a row of it, and two names with a
comma between them are two rows; so `--config.compressor.visual_tokens=1,16` are two columns, and
`--config.compressor.name=pool` is another method. A fourth, --config.tower.name=siglip2-so400m-patch16-384,
takes another tower than the paper's CLIP, looked for in a directory of that name. Every other override
applies to all cells. The paper has no 14B; it is here because no smaller grid tells how its law bends.

TokenPacker, with which the paper compressed, is the compressor at all counts, since a law is fitted to one
method: at 576 each of its windows is one patch. Whether the paper's 576 are LLaVA's plain projector is not
known here. Cells share one tokenizer, that of the first LLM: the sizes of Qwen1.5 have the same.

What has to lie in the working directory, what it costs, and on what machine: docs/reproduce.md. Not run on
the originals: both stages were run on tiny stand-ins.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from vlmscale.config import Cell, Sweep, from_dict
from vlmscale.errors import UserError
from vlmscale.loading import load_cell
from vlmscale.records import read_json

CHOSEN = {
    "llm.name": "qwen1.5-0.5b,qwen1.5-1.8b,qwen1.5-4b,qwen1.5-7b,qwen1.5-14b",
    "compressor.visual_tokens": "1,4,16,36,64,144,576",
    "compressor.name": "tokenpacker",
    "train.init_from": "",
    "tower.name": "clip-vit-large-patch14-336",
}


def get_sweep(overrides: Sequence[str] = (), arg: str = "") -> Sweep:
    """All cells of stage 1, or with `--config.train.init_from=DIR` of stage 2 behind that sweep.

    With `arg` "both" those of both stages, stage 2 behind runs that are yet to be.
    """
    if arg not in ("", "both"):
        raise UserError(f"configs/sweeps/paper_grid.py:{arg}: the argument is both, or none")
    chosen, rest = dict(CHOSEN), []
    for word in overrides:
        key, equals, value = word.removeprefix("--config.").partition("=")
        if key in chosen and equals:
            chosen[key] = value
        else:
            rest.append(word)
    llms, counts, method, earlier, tower = chosen.values()
    stages = ["pretrain", "finetune"] if arg else ["finetune" if earlier else "pretrain"]
    same = {"data.tokenizer": llms.split(",")[0], "tower.name": tower, "tower.checkpoint": tower}
    cells = [
        load_cell(
            f"configs/llava_{stage}.py:{llm},{count},{method}",
            [*(f"--config.{key}={value}" for key, value in same.items()), *rest],
        )
        for stage, llm, count in product(stages, llms.split(","), counts.split(","))
    ]
    if arg:
        return Sweep("paper_grid", cells)
    if earlier:
        runs = dict(_runs(Path(earlier)))
        for cell in cells:
            if _kind(cell) not in runs:
                raise UserError(f"train.init_from={earlier}: has no cell of {_kind(cell)}")
            cell.train.init_from = runs[_kind(cell)]
    return Sweep(f"paper_grid_{stages[0]}", cells)


def _runs(sweep: Path) -> Iterator[tuple[str, str]]:
    """The cells of a sweep's directory, each with its run."""
    for name in read_json(sweep / "sweep.json")["cells"]:
        run = sweep / "cells" / name
        if (run / "spec.json").exists():
            yield _kind(from_dict(read_json(run / "spec.json")["config"])), str(run)


def _kind(cell: Cell) -> str:
    """What a cell and the one it goes on from have in common."""
    compressor = cell.compressor
    method = f"{compressor.name} {compressor.options}".strip()
    return f"{cell.llm.name}, {method}, {compressor.visual_tokens} visual tokens, seed {cell.train.seed}"
