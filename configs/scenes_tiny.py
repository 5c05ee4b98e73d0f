"""One cell of the demo: the built-in scenes, one LLM, one number of visual tokens.

vlmscale train --config configs/scenes_tiny.py:toy-135k,16 --out RUN
vlmscale evaluate --run RUN
"""

from vlmscale.config import Cell, CompressorConfig, LLMConfig, TrainConfig
from vlmscale.errors import UserError
from vlmscale.models.sizes import SIZES


def get_config(arg: str = "") -> Cell:
    """The cell; `arg` is LLM,VISUAL_TOKENS (default toy-135k,16)."""
    llm, _, visual_tokens = (arg or "toy-135k,16").partition(",")
    if not visual_tokens.isdecimal():
        raise UserError(
            f"configs/scenes_tiny.py:{arg}: its argument is LLM,VISUAL_TOKENS such as toy-135k,16"
        )
    # Adam's best step falls as one over the width; measured at widths 16 to 96.
    learning_rate = 0.096 / SIZES[llm].width if llm in SIZES else 1e-3
    return Cell(
        compressor=CompressorConfig(name="pool", visual_tokens=int(visual_tokens)),
        llm=LLMConfig(name=llm),
        train=TrainConfig(learning_rate=learning_rate),
    )
