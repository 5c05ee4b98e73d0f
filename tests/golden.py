"""Golden tensors: does a compressor compute what its authors' PyTorch module computes?

    python -m tests.golden PATH...

Each `.npz` holds a module's torch parameters (`param.NAME`), inputs, `output` and `meta`. One line a file:
`NAME max_abs_err=...`; the exit status is 1 where an error exceeds 2e-5 or the name is of no known kind.
The kind is the file name up to its first underscore, and the module is the shipped one, out of its table.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from vlmscale.compressors import Features, make_compressor
from vlmscale.compressors.positions import sincos_positions

TOLERANCE = 2e-5
Arrays = Mapping[str, np.ndarray]


class GoldenError(Exception):
    """A file that cannot be compared; its text is one line."""


def dense(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    """A torch Linear as a Linen Dense: the kernel is the transposed weight."""
    out = {"kernel": arrays[f"param.{name}.weight"].T}
    if f"param.{name}.bias" in arrays:
        out["bias"] = arrays[f"param.{name}.bias"]
    return out


def norm(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    """A torch LayerNorm as a Linen LayerNorm."""
    return {"scale": arrays[f"param.{name}.weight"], "bias": arrays[f"param.{name}.bias"]}


def attention(arrays: Arrays, name: str) -> dict[str, dict[str, np.ndarray]]:
    """A torch MultiheadAttention, whose q, k and v are packed, as four Dense layers."""
    weights = np.split(arrays[f"param.{name}.in_proj_weight"], 3)
    biases = np.split(arrays[f"param.{name}.in_proj_bias"], 3)
    packed = zip("qkv", weights, biases, strict=True)
    parts = {letter: {"kernel": weight.T, "bias": bias} for letter, weight, bias in packed}
    return parts | {"o": dense(arrays, f"{name}.out_proj")}


def tokenpacker(arrays: Arrays) -> jax.Array:
    """What our TokenPacker makes of the file's inputs."""
    side, scale, _, num_heads, _ = (int(number) for number in arrays["meta"])
    params: dict[str, Any] = {
        "q": dense(arrays, "q_proj_1"),
        "q_norm": norm(arrays, "ln_q_1"),
        "attention": attention(arrays, "clip_attn"),
        "up": dense(arrays, "mlp.0"),
        "down": dense(arrays, "mlp.2"),
    }
    for letter in "kv":
        params[f"{letter}_up"] = dense(arrays, f"{letter}_proj_1.0")
        params[f"{letter}_down"] = dense(arrays, f"{letter}_proj_1.2")
        params[f"{letter}_norm"] = norm(arrays, f"ln_{letter}_1")
    llm_width = params["down"]["kernel"].shape[1]
    module = make_compressor("tokenpacker", (side // scale) ** 2, llm_width, num_heads=num_heads)
    features = Features(jnp.asarray(arrays["features"]), jnp.asarray(arrays["features_multi"]))
    run = jax.jit(lambda params, features: module.apply({"params": params}, features, None))
    tokens, _ = run(params, features)
    return tokens


def quecc(arrays: Arrays) -> jax.Array:
    """What our QueCC makes of the file's inputs, in front of the projector."""
    side, stride, width, _, num_heads = (int(number) for number in arrays["meta"])
    kernel = arrays["param.q_downsample.weight"]  # [C, 1, k, k]
    params: dict[str, Any] = {
        "text": dense(arrays, "text_projection.0"),
        "text_norm": norm(arrays, "text_projection.1"),
        "downsample": {"kernel": kernel[:, 0].transpose(1, 2, 0), "bias": arrays["param.q_downsample.bias"]},
        "attention": attention(arrays, "clip_attn"),
    }
    for letter in "qkv":
        params[f"{letter}_up"] = dense(arrays, f"{letter}_proj.0")
        params[f"{letter}_down"] = dense(arrays, f"{letter}_proj.2")
        params[f"{letter}_norm"] = norm(arrays, f"{letter}_proj.3")
    module = make_compressor("quecc", (side // stride) ** 2, width, num_heads=num_heads)
    features = Features(jnp.asarray(arrays["features"]), jnp.asarray(arrays["features_multi"]))
    run = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method="compress"))
    tokens, _ = run(params, features, jnp.asarray(arrays["text"]))
    return tokens


def prumerge(arrays: Arrays) -> jax.Array:
    """What our PruMerge or PruMerge+ makes of the file's inputs, before the projector."""
    _, patches, _, adaptive, plus, ratio = (float(number) for number in arrays["meta"])
    name, count = "prumerge_plus" if plus else "prumerge", "adaptive" if adaptive else "fixed"
    step = int(1 / ratio) if plus and not adaptive else 0
    spaced = len(range(step // 2, int(patches) - 1, step)) if step else 0
    visual_tokens = 1 + (int(patches) if adaptive else int(patches * ratio) + spaced)
    module = make_compressor(name, visual_tokens, 1, {"count": count}, step=step)
    features = Features(
        jnp.asarray(arrays["features"][:, 1:]),
        keys=jnp.asarray(arrays["keys"]),
        class_query=jnp.asarray(arrays["queries"][:, 0]),
    )
    tokens, valid = jax.jit(lambda features: module.apply({}, features, None, method="compress"))(features)
    return tokens[:, valid[0]]


def mqt(arrays: Arrays) -> jax.Array:
    """What our MQT makes of the file's inputs; its positions are computed, and must be the file's."""
    side, llm_width, _, num_heads, kept = (int(number) for number in arrays["meta"])
    table = arrays["param.pos_embed"]
    # As many bits as the released tables have, whose last one may be rounded either way.
    if np.max(np.abs(sincos_positions(side, table.shape[1]) - table)) > np.finfo(np.float16).eps:
        raise ValueError("param.pos_embed holds other positions")
    params: dict[str, Any] = {
        "queries": arrays["param.query"],
        "attention": attention(arrays, "attn"),
        "proj": {"kernel": arrays["param.proj"]},
    }
    for letter in "qkv":
        params[f"{letter}_norm"] = norm(arrays, f"ln_{letter}")
    module = make_compressor("mqt", kept, llm_width, largest=side**2, num_heads=num_heads)
    run = jax.jit(lambda params, features: module.apply({"params": params}, features, None))
    tokens, _ = run(params, Features(jnp.asarray(arrays["features"])))
    return tokens


KINDS: dict[str, Callable[[Arrays], jax.Array]] = {
    "quecc": quecc,
    "tokenpacker": tokenpacker,
    "mqt": mqt,
    "prumerge": prumerge,
}


def compare(path: Path) -> float:
    """Largest absolute difference between our output and the file's.

    Raises:
      GoldenError: of no known kind, unreadable, or our output has another shape.
    """
    kind = path.stem.split("_")[0]
    if kind not in KINDS:
        raise GoldenError(f"of no known kind (known: {', '.join(KINDS)})")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise GoldenError(f"cannot be read ({error})") from error
    try:
        with jax.default_matmul_precision("highest"):
            ours = np.asarray(KINDS[kind](arrays), np.float64)
        wanted = arrays["output"].astype(np.float64)
    except (KeyError, TypeError, ValueError, FlaxError) as error:
        said = str(error).partition("\n")[0]
        raise GoldenError(f"does not fit its kind ({type(error).__name__}: {said})") from error
    if ours.shape != wanted.shape:
        raise GoldenError(f"our output is {list(ours.shape)}, the file's {list(wanted.shape)}")
    return float(np.max(np.abs(ours - wanted)))


def main(paths: Sequence[str]) -> int:
    """Compare every file; returns the exit status."""
    if not paths:
        print("usage: python -m tests.golden PATH...", file=sys.stderr)
        return 2
    failed = False
    for path in map(Path, paths):
        try:
            error = compare(path)
        except GoldenError as reason:
            print(f"{path.name}: {reason}", file=sys.stderr)
            failed = True
            continue
        print(f"{path.stem} max_abs_err={error:.3g}")
        failed |= not error <= TOLERANCE  # a NaN fails too
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
