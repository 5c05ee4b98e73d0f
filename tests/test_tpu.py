"""What compiles for a TPU on a machine that has none: the splash kernel, a sharded decoder, generation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a program of its own: libtpu holds a lock and its logs for the life of a process.
SPLASH = """
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


# A real size on its own shardings: a training step's gradient, and prefill with the decoding loop.
DECODER = """
import jax
import jax.numpy as jnp
import numpy as np
from dataclasses import replace
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from vlmscale.evaluate.generation import make_generate
from vlmscale.models.sizes import SIZES
from vlmscale.models.vlm import VLM, Inputs
from vlmscale.sharding import AXES, batch_sharding, place
from vlmscale.weights.directory import abstract_decoder

devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
mesh = Mesh(np.array(devices).reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
size = replace(SIZES["qwen1.5-0.5b"], num_layers=2)


def model(layout, attention):
    return VLM(size, size.vocab_size, "mlp", 0, jnp.bfloat16, layout, attention)


def params(layout):
    return {"decoder": place(abstract_decoder(size, size.vocab_size, layout), mesh, jnp.bfloat16)}


def rows(dtype, length=600):
    return jax.ShapeDtypeStruct((8, length), dtype, sharding=batch_sharding(mesh))


def loss(params, tokens, slots, places, ids, targets):
    vlm = model("scan", "splash")
    return vlm.apply({"params": params}, Inputs(tokens, slots, places, ids), targets).mean()


ids = rows(jnp.int32)
inputs = (params("scan"), ids, rows(bool), ids, ids, rows(jnp.int32, 8))
batch = {"tokens": ids, "image_slots": rows(bool), "valid": rows(bool)}
apart = params("loop")
with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss)).lower(*inputs).compile().as_text()
    print(text.count('custom_call_target="tpu_custom_call"'))
    made = make_generate(model("loop", "splash"), 16, (1,)).lower(apart, batch).compile()
    print(made.as_text().count('custom_call_target="tpu_custom_call"'))
"""


# A training step on two slices of eight chips: whether nothing but sums crosses from one into the other, for
# which libtpu has transfers of its own, and whether weights are gathered by the four chips along fsdp, whose
# numbers are those inside a slice. Then the same where fsdp is made to cross.
SLICES = r"""
import re

from jax.sharding import AxisType, Mesh

from vlmscale.loading import load_cell
from vlmscale.plan.abstract import topology_mesh
from vlmscale.plan.programs import lowered
from vlmscale.plan.slices import find_slice
from vlmscale.sharding import AXES

words = ("train.batch_size=32", "train.dtype=bfloat16", "data.features=computed")
cell = load_cell("configs/scenes_tiny.py:toy-14k,4", [f"--config.{word}" for word in words])
mesh = topology_mesh(find_slice("2xv5e-8"), 4, 4, 1)
torn = mesh.devices.reshape(2, 8).T.reshape(mesh.devices.shape)
for one in (mesh, Mesh(torn, AXES, axis_types=(AxisType.Auto,) * 3)):
    text = lowered("train", cell, one, 128).compile().as_text()
    gathered = re.findall(r"all-gather\(.*replica_groups=({{.*?}})", text)
    crosses = set(re.findall(r'megascale_transfer_type="(\w+)"', text))
    print(crosses == {"ALL_REDUCE"}, "{{0,1,2,3},{4,5,6,7}}" in gathered)
"""


@pytest.mark.aot
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    "program, told",
    [
        # Three kernels a case: the values, the gradient of q, that of k and v.
        pytest.param(SPLASH, ["3", "3", "3"], id="splash"),
        # Training: those and the values again, for the backward pass recomputes them. Generation: the prefill
        # of two layers; the decoding loop attends to its cache without the kernel.
        pytest.param(DECODER, ["4", "2"], id="decoder"),
        pytest.param(SLICES, ["True", "True", "False", "False"], id="slices"),
    ],
)
def test_compiles_for_a_tpu(program: str, told: list[str]) -> None:
    # The first two keep libtpu from asking a metadata server; the third lets other tests use it meanwhile.
    alone = {
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == told
