"""Forward passes beside transformers: towers in images/s, decoders in tokens/s, same weights, same run.

    python benchmarks/forward.py                                              # CPU, float32
    python benchmarks/forward.py --decoders qwen1.5-0.5b,qwen1.5-1.8b --dtype bfloat16 --batch 8 --length 2048

A tower gives its last hidden state, a decoder the hidden states of all positions and the logits of the last.
The ratio is ours over theirs; above 1 is faster. `error` is the largest difference over the largest value.
`of matrix product` is the fraction of what a large matrix product was measured to reach on this device.
On a GPU `--attention cudnn` uses the fused kernel (transformers has its own: SDPA).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peer
import torch

from vlmscale.cost.flops import decoder_flops, head_flops
from vlmscale.cost.image import tower_flops
from vlmscale.models.decoder import Decoder
from vlmscale.models.vision import VisionTower


def tower(name: str, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """One tower."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    size = peer.tower_row(name)
    theirs, ours = peer.both_towers(size, options.dtype, device)
    jax_dtype, torch_dtype = peer.DTYPES[options.dtype]
    shape = (options.images, size.image_size, size.image_size, 3)
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layer = size.num_layers
    module = VisionTower(size, jax_dtype, options.attention)
    run = jax.jit(lambda p, x: module.apply({"params": p}, x, (layer,)).hidden[layer])
    x, y = jax.device_put(pixels), torch.tensor(pixels).permute(0, 3, 1, 2).to(device, torch_dtype)
    out: dict[str, Any] = {}

    def our() -> None:
        out["ours"] = jax.block_until_ready(run(ours, x))

    def their() -> None:
        with torch.no_grad():
            out["theirs"] = theirs(y, output_hidden_states=True).hidden_states[-1]
        peer.torch_done(device)

    seconds = peer.in_turn({"our": our, "their": their}, options.repeats)
    work = options.images * tower_flops(replace(size, select_layer=layer))
    return {
        "model": name,
        "images/s": options.images / seconds["our"],
        "ratio": seconds["their"] / seconds["our"],
        "of matrix product": work / seconds["our"] / limits["flops"],
        "error": error(out),
    }


def decoder(name: str, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """One decoder."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    size = peer.decoder_row(name, options.layers)
    theirs, ours = peer.both_decoders(size, options.dtype, device)
    module = Decoder(
        size, size.vocab_size, peer.DTYPES[options.dtype][0], layout="loop", attention=options.attention
    )
    ids = peer.random_ids(size, options.batch, options.length)

    @jax.jit
    def run(params: dict[str, Any], ids: jax.Array) -> jax.Array:
        embeddings = module.apply({"params": params}, ids, method="embed")
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = module.apply({"params": params}, embeddings, places, None)
        return module.apply({"params": params}, hidden[:, -1], method="logits")

    x, y = jax.device_put(ids), torch.tensor(ids, device=device)
    out: dict[str, Any] = {}

    def our() -> None:
        out["ours"] = jax.block_until_ready(run(ours, x))

    def their() -> None:
        with torch.no_grad():
            out["theirs"] = theirs(y, logits_to_keep=1, use_cache=False).logits[:, 0]
        peer.torch_done(device)

    seconds = peer.in_turn({"our": our, "their": their}, options.repeats)
    work = options.batch * (decoder_flops(size, options.length, 0) + head_flops(size, size.vocab_size, 1))
    return {
        "model": name,
        "tokens/s": options.batch * options.length / seconds["our"],
        "ratio": seconds["their"] / seconds["our"],
        "of matrix product": work / seconds["our"] / limits["flops"],
        "error": error(out),
    }


def error(out: dict[str, Any]) -> float:
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(out["ours"], np.float32), out["theirs"].float().cpu().numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--towers", default="siglip-base-patch16-224,clip-vit-large-patch14-336")
    parser.add_argument("--decoders", default="smollm2-135m,qwen1.5-0.5b")
    parser.add_argument("--images", type=int, default=4, help="in a batch")
    parser.add_argument("--batch", type=int, default=1, help="rows of tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=None, help="fewer decoder layers than the size has")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--dtype", choices=peer.DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    limits = peer.ceilings(options.dtype)

    def rows() -> Iterator[dict[str, Any]]:
        for name in filter(None, options.towers.split(",")):
            yield tower(name, options, limits)
        for name in filter(None, options.decoders.split(",")):
            yield decoder(name, options, limits)

    peer.show(rows(), options.json)


if __name__ == "__main__":
    main()
