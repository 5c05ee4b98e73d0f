r"""Stage 1 of LLaVA v1.5: the compressor alone learns, from 558,128 captions; tower and LLM are frozen.

    vlmscale train --config configs/llava_pretrain.py:qwen1.5-0.5b,16,pool \
        --out runs/pretrain-qwen1.5-0.5b-16-pool

The argument is LLM,VISUAL_TOKENS,COMPRESSOR; without one it is LLaVA's own model, vicuna-7b-v1.5,576,mlp.
Stage 2 is configs/llava_finetune.py, and docs/reproduce.md goes from downloads to a law. What has to lie in
the working directory, or is named by the key:

    qwen1.5-0.5b/                  --config.llm.checkpoint, --config.data.tokenizer: the LLM, so named
    clip-vit-large-patch14-336/    --config.tower.checkpoint
    data/llava_pretrain/           --config.data.prepared: see configs/data/llava_pretrain.py

The recipe is that of LLaVA's scripts: AdamW (beta 0.9, 0.999; no weight decay) at 1e-3, 3% warm-up, cosine
to 0, at most 2,048 tokens, one epoch in batches of 256 conversations, pictures cropped, template `plain`.
The clipping at a norm of 1 that they name never reaches DeepSpeed, so there is none. 2,000 records are held
out, so an epoch is 2,173 steps and not 2,181. For another data set it is ceil(records / 256), by
`--config.train.steps`, with 3% of it for `warmup_steps`.

A row is one conversation, so that batches are LLaVA's and the same for every number of visual tokens; rows
are as long as the longest caption needs. docs/reproduce.md says how to pack rows instead, and what that
changes. All tokens of a batch count the same in the loss; `--config.train.loss_rows=32` makes it the mean
over groups of 32 rows of the mean in each, which is what LLaVA's is on 8 devices.

A method that reads the question (quecc) is given the LLM's chat template here too, as its authors did.

Hardware: LLaVA took 3.5 hours for 7B on 8 A100. Where a batch does not fit, `--config.train.accumulate=4`
computes it in four parts, which changes results by rounding alone. Not run on the originals: tests train
this config on tiny checkpoints of the same kinds.
"""

import math

from vlmscale.compressors import COMPRESSORS
from vlmscale.config import Cell, CompressorConfig, EvaluateConfig, LLMConfig, TowerConfig, TrainConfig
from vlmscale.errors import UserError
from vlmscale.loading import load_data

TOWER = "clip-vit-large-patch14-336"
RECORDS, HELD_OUT, BATCH = 558_128, 2_000, 256
STEPS = math.ceil((RECORDS - HELD_OUT) / BATCH)


def get_config(arg: str = "") -> Cell:
    """The cell; `arg` is LLM,VISUAL_TOKENS,COMPRESSOR (default vicuna-7b-v1.5,576,mlp)."""
    llm, visual_tokens, compressor = _parse(arg or "vicuna-7b-v1.5,576,mlp")
    data = load_data("configs/data/llava_pretrain.py")
    data.tokenizer = llm
    data.packing, data.pack_rows, data.row_length = "none", 1, 0
    if compressor in COMPRESSORS and COMPRESSORS[compressor].text == "query":
        data.template = chat_template(llm)
    return Cell(
        tower=TowerConfig(TOWER, checkpoint=TOWER),
        compressor=CompressorConfig(compressor, visual_tokens),
        llm=LLMConfig(llm, checkpoint=llm),
        data=data,
        train=TrainConfig(
            steps=STEPS,
            batch_size=BATCH,
            learning_rate=1e-3,
            warmup_steps=math.ceil(0.03 * STEPS),
            final_rate=0.0,
            weight_decay=0.0,
            beta2=0.999,
            clip_norm=0.0,
            llm_rate=0.0,
            checkpoint_every=500,
        ),
        evaluate=EvaluateConfig(max_new_tokens=64, batch_size=32, history="gold"),
    )


def chat_template(llm: str) -> str:
    """The template that an LLM of the size table was tuned with, as far as it was."""
    return "v1" if llm.startswith("vicuna") else "chatml"


def _parse(arg: str) -> tuple[str, int, str]:
    words = arg.split(",")
    if len(words) != 3 or not all(words) or not words[1].isdecimal():
        raise UserError(
            f"configs/llava_pretrain.py:{arg}: the argument is LLM,VISUAL_TOKENS,COMPRESSOR such as "
            "qwen1.5-0.5b,16,pool"
        )
    return words[0], int(words[1]), words[2]
