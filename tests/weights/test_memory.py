"""What loading a checkpoint of 2 GiB onto eight devices takes, beside the parameters themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from vlmscale.models.sizes import DecoderSize
from vlmscale.weights.checkpoint import write_checkpoint
from vlmscale.weights.hf_config import decoder_config

MIB = 2**20
SIZE = DecoderSize(
    width=2048, num_layers=11, num_heads=16, num_kv_heads=8, mlp_width=5632, vocab_size=16384, context=512
)

# A process of its own, for its memory is the result. It reports one JSON object.
PROBE = """
import json, sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from pathlib import Path
from vlmscale.sharding import LARGE, make_mesh
from vlmscale.weights.directory import load_directory

def anonymous():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024

mesh = make_mesh(2, 2, 2)
jax.block_until_ready(jax.device_put(jnp.zeros(8), jax.devices()[7]))
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
started = time.time()
_, params, report = load_directory(Path(sys.argv[1]), mesh, jnp.float32, sys.argv[2])
jax.block_until_ready(params)
seconds = time.time() - started
done = True
watcher.join()
leaves = jax.tree.leaves(params)
shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
whole = [leaf.shape for leaf in leaves if leaf.nbytes > LARGE and leaf.sharding.is_fully_replicated]
quarter = [leaf.shape for leaf in leaves
           if leaf.ndim > 1 and leaf.nbytes > LARGE and leaf.addressable_shards[0].data.size * 4 != leaf.size]
print(json.dumps({
    "peak": max(peak, anonymous()) - before, "after": anonymous() - before, "seconds": seconds,
    "params": sum(leaf.nbytes for leaf in leaves), "shards": sum(shard.data.nbytes for shard in shards),
    "devices": len({shard.device for shard in shards}), "whole": whole, "quarter": quarter,
}))
"""


def tensors(dtype: type) -> Iterator[tuple[str, np.ndarray]]:
    """Those of SIZE, one at a time: each row of a tensor repeats one row of random numbers."""
    size, rng = SIZE, np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(rng.standard_normal(shape[-1], np.float32), shape), dtype)

    yield "model.embed_tokens.weight", draw(size.vocab_size, size.width)
    yield "model.norm.weight", draw(size.width)
    kv_width = size.num_kv_heads * size.head_dim
    for layer in range(size.num_layers):
        start = f"model.layers.{layer}."
        yield f"{start}input_layernorm.weight", draw(size.width)
        yield f"{start}post_attention_layernorm.weight", draw(size.width)
        for name, width in (("q", size.width), ("k", kv_width), ("v", kv_width), ("o", size.width)):
            yield f"{start}self_attn.{name}_proj.weight", draw(width, size.width)
        for name in ("gate", "up"):
            yield f"{start}mlp.{name}_proj.weight", draw(size.mlp_width, size.width)
        yield f"{start}mlp.down_proj.weight", draw(size.width, size.mlp_width)


@pytest.fixture(scope="module", params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(directory).free < 4 * 2**30:
        pytest.skip("needs 4 GiB of free disk for the checkpoint")
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * 2**30:
        pytest.skip("needs 8 GiB of memory")
    (directory / "config.json").write_text(json.dumps(decoder_config(SIZE, SIZE.vocab_size)))
    # Tensors fill shards in order, so that four files need a limit of a little more than a quarter.
    limit = 560 * MIB * np.dtype(request.param).itemsize // 4
    files = write_checkpoint(directory, tensors(request.param), limit)
    assert len(files) == 5, "four files and the index"
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["scan", "loop"])
def test_loading_takes_little_beside_the_parameters(layout: str, checkpoint: Path) -> None:
    """At most 1.15 times the bytes of the process's shards (the data axis doubles them) and 300 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(checkpoint), layout],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({key: f"{found[key] / MIB:.0f} MiB" for key in ("peak", "after", "params", "shards")})  # with -s
    assert found["params"] >= 2**31
    assert found["shards"] >= 1.9 * found["params"], "the data axis holds everything twice"
    assert found["devices"] == 8
    assert found["whole"] == []
    assert found["quarter"] == [], "fsdp and tensor both split every matrix"
    assert found["peak"] >= found["params"], "the measure itself is wrong"
    assert found["peak"] <= 1.15 * found["shards"] + 300 * MIB
