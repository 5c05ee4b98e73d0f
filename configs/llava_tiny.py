"""A tiny model on LLaVA-format records with real photographs.

    vlmscale train --config configs/llava_tiny.py --config.data.records=FILE.json \
        --config.data.images=DIR --out RUN

Trains in about a minute on two CPU cores; it is large enough to learn a dozen conversations by heart,
which shows that records, images, training and generation fit together, and no more than that.
"""

from vlmscale.config import Cell, CompressorConfig, DataConfig, EvaluateConfig, LLMConfig, TrainConfig


def get_config(arg: str = "") -> Cell:
    """The cell; `arg` names the LLM (default toy-135k)."""
    return Cell(
        compressor=CompressorConfig(visual_tokens=64),
        llm=LLMConfig(name=arg or "toy-135k"),
        data=DataConfig(source="llava", max_text_tokens=512),
        train=TrainConfig(
            steps=400, batch_size=16, learning_rate=3e-3, checkpoint_every=100, heldout_every=100
        ),
        evaluate=EvaluateConfig(max_new_tokens=64, batch_size=64, history="gold"),
    )
