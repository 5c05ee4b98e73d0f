"""What generation does on a mesh, read off the compiled program: equal numbers alone would not show it."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vlmscale.evaluate.generation import make_generate
from vlmscale.models.sizes import DecoderSize
from vlmscale.models.vlm import VLM
from vlmscale.sharding import batch_sharding, make_mesh, place, replicated
from vlmscale.weights.directory import abstract_decoder

SIZE = DecoderSize(64, 2, 8, 8, 96, vocab_size=128)
ROWS, PROMPT, NEW = 8, 48, 16


def gathered(program: str) -> set[tuple[int, ...]]:
    """Shapes of all that the program gathers from other devices."""
    shapes = re.findall(r"= \w+\[([0-9,]+)\][^=]* all-gather\(", program)
    return {tuple(map(int, shape.split(","))) for shape in shapes}


def compiled(shape: tuple[int, int, int]) -> Any:
    mesh = make_mesh(*shape)
    params = {"decoder": place(abstract_decoder(SIZE, SIZE.vocab_size, "loop"), mesh)}
    where = batch_sharding(mesh) if shape[0] * shape[1] > 1 else replicated(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, PROMPT), dtype, sharding=where)
        for name, dtype in (("tokens", jnp.int32), ("image_slots", bool), ("valid", bool))
    }
    model = VLM(SIZE, SIZE.vocab_size, "mlp", 0, layout="loop")
    generate = make_generate(model, NEW, (1,))
    with jax.set_mesh(mesh):
        return generate.lower(params, batch).compile().as_text()


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 1, 4), (2, 2, 2)])
def test_keys_and_values_stay_where_their_heads_are(shape: tuple[int, int, int]) -> None:
    """No cache, and no prompt's keys, are gathered: they would be for every token and layer."""
    seen = gathered(compiled(shape))
    long = {sides for sides in seen if {PROMPT, PROMPT + NEW} & set(sides) and len(sides) >= 4}
    assert not long, long


def test_rows_stay_split_over_fsdp() -> None:
    """Weights are gathered for each layer, not the activations of the whole batch."""
    seen = gathered(compiled((1, 8, 1)))
    assert {(96, 64), (64, 64)} & {sides[-2:] for sides in seen}
    assert not {sides for sides in seen if sides[:2] == (ROWS, PROMPT) and sides[2:] > (1,)}  # but the ids
