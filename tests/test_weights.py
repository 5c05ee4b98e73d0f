"""Parameter files, shape checks and hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmscale.config import Cell
from vlmscale.errors import UserError
from vlmscale.models.sizes import TOWERS
from vlmscale.train.frozen import load_tower, tower_path
from vlmscale.weights import tree


def params(**changes: Any) -> dict[str, Any]:
    kernel = jnp.arange(6, dtype=jnp.float32).reshape(2, 3).T  # not contiguous on the host
    layers = {"q": {"kernel": kernel, "bias": jnp.zeros(2, jnp.bfloat16)}} | changes
    return {"layers": layers, "embedding": jnp.ones((4, 2))}


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    tree.save(tmp_path / "a.safetensors", params(), {"name": "x"})
    back = tree.load(tmp_path / "a.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(params())
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(params()), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert tree.sha256(back) == tree.sha256(params())


def test_bytes_depend_on_the_arguments_alone(tmp_path: Path) -> None:
    backwards = {name: params()[name] for name in reversed(params())}
    for number, values in enumerate((params(), params(), backwards)):
        tree.save(tmp_path / f"{number}", values, {"name": "x"})
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(3)}) == 1


def test_unreadable_files_are_a_users_error(tmp_path: Path) -> None:
    good = tmp_path / "good"
    tree.save(good, params(), {})
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-5])
    (tmp_path / "text").write_text("no safetensors")
    for name in ("absent", "cut", "text"):
        with pytest.raises(UserError, match=name):
            tree.load(tmp_path / name)


@pytest.mark.parametrize(
    "changed, said",
    [
        (params(k={"kernel": jnp.zeros(1)}), "layers/k/kernel is unknown"),
        (params(q={"kernel": jnp.zeros((3, 2))}), "layers/q/bias is missing"),
        (params(q={"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}), r"shape \(2, 3\).*wants \(3, 2\)"),
    ],
)
def test_check_shapes_names_what_does_not_fit(changed: Any, said: str) -> None:
    abstract = jax.eval_shape(params)
    tree.check_shapes(Path("file"), params(), abstract)
    with pytest.raises(UserError, match=said):
        tree.check_shapes(Path("file"), changed, abstract)


def test_hash_sees_path_dtype_shape_and_bytes() -> None:
    kernel = jnp.arange(6, dtype=jnp.float32)
    variants = [
        {"a": {"b": kernel}},
        {"a": {"c": kernel}},
        {"a": {"b": kernel.reshape(2, 3)}},
        {"a": {"b": kernel.view(jnp.int32)}},
        {"a": {"b": kernel.at[3].add(1e-6)}},
        {"a": {"b": kernel, "c": kernel[:0]}},
    ]
    assert len({tree.sha256(variant) for variant in variants}) == len(variants)
    same = {"b": kernel, "a": kernel + 1}
    assert tree.sha256(same) == tree.sha256(dict(sorted(same.items())))


def test_count_works_on_shapes() -> None:
    assert tree.count(params()) == tree.count(jax.eval_shape(params)) == 6 + 2 + 8


def test_shipped_towers_fit_their_sizes(tmp_path: Path) -> None:
    cell = Cell()
    loaded = load_tower(tower_path(cell), cell.tower.name)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded))
    assert sum(name.startswith("block_") for name in loaded) == TOWERS[cell.tower.name].num_layers
    del loaded["block_1"]["mlp"]["up"]["bias"]
    tree.save(tmp_path / "tower", loaded, {})
    with pytest.raises(UserError, match="block_1/mlp/up/bias is missing"):
        load_tower(tmp_path / "tower", cell.tower.name)
