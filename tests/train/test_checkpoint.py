"""A checkpoint of other parameters is one line, not Orbax's list of them all."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vlmscale.errors import UserError
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.step import TrainState


def test_parameters_of_another_version_are_one_line(tmp_path: Path) -> None:
    def state(name: str) -> TrainState:
        return TrainState(jnp.int32(1), {"q": {name: jnp.ones(3)}}, {"mu": {name: jnp.zeros(3)}})

    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    old, new = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state(name))
        for name in ("kernel", "weight")
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state("kernel"))
    checkpoints.wait()
    assert (checkpoints.restore(1, old).params["q"]["kernel"] == 1).all()
    for read in (lambda: checkpoints.restore(1, new), lambda: checkpoints.restore_params(new.params)):
        with pytest.raises(UserError, match="holds other parameters than this version") as caught:
            read()
        assert "\n" not in str(caught.value)
    checkpoints.close()
