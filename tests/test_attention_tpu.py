"""The splash kernel compiles for a TPU, forward and backward, on a machine that has none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

# In a program of its own: libtpu holds a lock and its logs for the life of a process.
PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from vlmscale.attention import attend

devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
mesh = Mesh(np.array(devices).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
rows = ("data", "fsdp")


def compiled(head_dim, causal, segments, length):
    def loss(q, k, v, ids):
        out = attend(q, k, v, causal=causal, segment_ids=ids, backend="splash")
        return out.astype(jnp.float32).sum()

    by_head = NamedSharding(mesh, jax.P(rows, None, "tensor"))
    q, k = (
        jax.ShapeDtypeStruct((8, length, heads, head_dim), jnp.bfloat16, sharding=by_head) for heads in (8, 4)
    )
    ids = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=NamedSharding(mesh, jax.P(rows)))
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    with jax.set_mesh(mesh):
        return gradient.lower(q, k, k, ids if segments else None).compile().as_text()


for case in ((64, False, False, 576), (72, False, True, 768), (128, True, True, 1100)):
    print(compiled(*case).count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: install vlmscale[tpu]")
def test_splash_compiles_forward_and_backward_for_a_tpu() -> None:
    # The first two keep libtpu from asking a metadata server; the third lets other tests use it meanwhile.
    alone = {
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Three kernels: the values, the gradient of q, that of k and v.
    assert done.stdout.split() == ["3", "3", "3"]
