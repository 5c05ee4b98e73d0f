"""One cell of the demo: the built-in scenes, one LLM, one number of visual tokens.

    vlmscale train --config configs/scenes_tiny.py:toy-110k,16 --out RUN
    vlmscale evaluate --run RUN
"""

from vlmscale.config import Cell, CompressorConfig, LLMConfig, TrainConfig

# Smaller models want larger steps.
LEARNING_RATE = {"toy-6k": 1e-2, "toy-30k": 6e-3, "toy-110k": 3e-3, "toy-350k": 2e-3}


def get_config(arg: str = "") -> Cell:
    """The cell; `arg` is LLM,VISUAL_TOKENS (default toy-110k,16)."""
    llm, visual_tokens = (arg or "toy-110k,16").split(",")
    return Cell(
        compressor=CompressorConfig(name="pool", visual_tokens=int(visual_tokens)),
        llm=LLMConfig(name=llm),
        train=TrainConfig(steps=1000, learning_rate=LEARNING_RATE.get(llm, 3e-3)),
    )
