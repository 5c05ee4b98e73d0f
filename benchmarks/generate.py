"""Prefill and decode tokens/s beside transformers: same random weights, same prompts, same run.

    python benchmarks/generate.py                                        # CPU, float32, 0.5B and smaller
    python benchmarks/generate.py --sizes qwen1.5-0.5b,qwen1.5-1.8b --dtype bfloat16 --batches 1,16

Prefill is the time to the first token, decode the time of each further one. The ratio is ours over theirs;
above 1 is faster. `same` is how many of the greedy tokens agree (all of them in float32). The fractions are
of what this device was measured to do at most: of a large matrix product for prefill and, on a GPU, of a
large copy for decode, which has to read every weight for every token.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np
import peer
import torch

from vlmscale.cost.flops import decoder_flops, head_flops
from vlmscale.evaluate.generation import make_generate, pad_prompts
from vlmscale.models.vlm import VLM


def measure(name: str, batch: int, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """One row: a size at a batch."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    size = peer.decoder_row(name, options.layers)
    theirs, ours = peer.both_decoders(size, options.dtype, device)
    ids = peer.random_ids(size, batch, options.prompt)
    tokens = torch.tensor(ids, device=device)
    mask = torch.ones_like(tokens)
    model = VLM(
        size,
        size.vocab_size,
        "mlp",
        0,
        dtype=peer.DTYPES[options.dtype][0],
        layout="loop",
        attention=options.attention,
    )
    inputs = pad_prompts(ids.tolist(), -1, 0, options.prompt)
    inputs = jax.device_put(inputs)
    generate = {count: make_generate(model, count, ()) for count in (1, options.new + 1)}
    said: dict[str, np.ndarray] = {}

    def our(count: int) -> None:
        said["ours"] = np.asarray(generate[count]({"decoder": ours}, inputs))

    def their(count: int) -> None:
        with torch.no_grad():
            out = theirs.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
            )
        peer.torch_done(device)
        said["theirs"] = out[:, options.prompt :].cpu().numpy()

    runs = {
        f"{who.__name__} {count}": (lambda w=who, c=count: w(c)) for count in generate for who in (our, their)
    }
    seconds = peer.in_turn(runs, options.repeats)
    prefill = {who: seconds[f"{who} 1"] for who in ("our", "their")}
    decode = {
        who: (seconds[f"{who} {options.new + 1}"] - prefill[who]) / options.new for who in ("our", "their")
    }
    work = batch * (decoder_flops(size, options.prompt, 0) + head_flops(size, size.vocab_size, 1))
    read = peer.params_bytes(ours)
    if not size.tied_embeddings:
        read -= ours["embedding"].nbytes  # of the table only the rows of the tokens are read
    row = {
        "size": name,
        "batch": batch,
        "prefill tokens/s": batch * options.prompt / prefill["our"],
        "ratio": prefill["their"] / prefill["our"],
        "of matrix product": work / prefill["our"] / limits["flops"],
        "decode tokens/s": batch / decode["our"],
        "decode ratio": decode["their"] / decode["our"],
        "same": f"{(said['ours'] == said['theirs']).mean():.1%}",
    }
    if device == "cuda":  # on a CPU a copy waits for fresh pages, and is no ceiling
        row["of copy"] = read / decode["our"] / limits["bytes"]
    return row


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="smollm2-135m,qwen1.5-0.5b")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the size has")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens behind the first")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="of the prefill")
    parser.add_argument("--dtype", choices=peer.DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    limits = peer.ceilings(options.dtype)
    pairs = [(name, int(batch)) for name in options.sizes.split(",") for batch in options.batches.split(",")]
    peer.show((measure(name, batch, options, limits) for name, batch in pairs), options.json)


if __name__ == "__main__":
    main()
