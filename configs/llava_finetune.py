r"""Stage 2 of LLaVA v1.5: compressor and LLM learn from 665,298 conversations; the tower is frozen.

    vlmscale train --config configs/llava_finetune.py:qwen1.5-0.5b,16,pool \
        --out runs/finetune-qwen1.5-0.5b-16-pool

The argument, the tower and the LLM's directory are those of configs/llava_pretrain.py, whose run is looked
for in runs/pretrain-LLM-VISUAL_TOKENS-COMPRESSOR, or where `--config.train.init_from=RUN` says; with an
empty RUN the compressor starts from random numbers. The data are those of configs/data/llava_instruct.py.

The recipe is that of LLaVA's scripts: AdamW (beta 0.9, 0.999; no weight decay, in effect no clipping) at
2e-5 for all that trains, 3% warm-up, cosine to 0, 2,048 positions, one epoch in batches of 128
conversations, pictures padded to a square, the LLM's chat template (v1 for Vicuna, chatml for Qwen). 2,000
records are held out, so an epoch is 5,183 steps and not 5,198. For another data set it is ceil(records /
128), by `--config.train.steps`, with 3% of it for `warmup_steps`.

A row is one conversation, in the order of LLaVA's `group_by_modality_length`: batches are LLaVA's, the same
for every number of visual tokens, and padded to 2,048 positions. docs/reproduce.md says how to pack rows
instead, which is 3 to 9 times cheaper, and what that changes. All tokens of a batch count the same in the
loss; LLaVA's mean over devices of each one's mean is nearly that, since its sampler deals each device as
many words.

Hardware: LLaVA took 10 hours for 7B on 8 A100. Not run on the originals: tests train this config on tiny
checkpoints of the same kinds, and hold its steps against transformers' LLaVA under torch's AdamW.
"""

import math
import runpy

from vlmscale.config import Cell
from vlmscale.loading import find_config, load_data

RECORDS, HELD_OUT, BATCH = 665_298, 2_000, 128
STEPS = math.ceil((RECORDS - HELD_OUT) / BATCH)


def get_config(arg: str = "") -> Cell:
    """Stage 1's cell with the second stage's data and recipe; `arg` as there."""
    first = runpy.run_path(str(find_config("configs/llava_pretrain.py")))
    cell: Cell = first["get_config"](arg)
    cell.data = load_data("configs/data/llava_instruct.py")
    cell.data.tokenizer, cell.data.template = cell.llm.name, first["chat_template"](cell.llm.name)
    cell.data.packing, cell.data.pack_rows = "modality_length", 1
    train, compressor = cell.train, cell.compressor
    train.init_from = f"runs/pretrain-{cell.llm.name}-{compressor.visual_tokens}-{compressor.name}"
    train.steps, train.batch_size, train.warmup_steps = STEPS, BATCH, math.ceil(0.03 * STEPS)
    train.learning_rate, train.llm_rate = 2e-5, 1.0
    return cell
