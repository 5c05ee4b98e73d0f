"""Where parameters live on a mesh: real sizes in the abstract, tiny models with their logits."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from tests.pretrained import DECODERS, LLAVAS, Saved, assert_same, make_decoder, one_device, saver
from vlmscale.compressors import COMPRESSORS, Features, make_compressor
from vlmscale.compressors.features import abstract_features
from vlmscale.config import MeshConfig
from vlmscale.distributed import host_part
from vlmscale.errors import UserError
from vlmscale.layers import abstract_params
from vlmscale.models.decoder import Decoder, unstack
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.models.vision import VisionTower
from vlmscale.models.vlm import VLM, Inputs
from vlmscale.sharding import LARGE, RULES, batch_sharding, make_mesh, place, slice_count
from vlmscale.train.state import mesh_shape
from vlmscale.weights.directory import Description, abstract_decoder, abstract_tower, load_directory

MESHES = [(2, 2, 2), (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)]
ONE_AXIS = [(1, 8, 1), (8, 1, 1), (1, 1, 8)]


def box(*shape: int, axes: tuple[str | None, ...]) -> dict[str, Any]:
    """A tree of one parameter with these logical axes."""
    return {"some": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)}}


def spec(*shape: int, axes: tuple[str | None, ...], mesh: tuple[int, int, int]) -> PartitionSpec:
    return place(box(*shape, axes=axes), make_mesh(*mesh))["some"]["kernel"].sharding.spec


@functools.cache
def boxed(name: str, layout: str = "scan") -> Any:
    """Shapes and axes of a row of the size tables."""
    if name in SIZES:
        return abstract_decoder(SIZES[name], SIZES[name].vocab_size or 300, layout)
    return abstract_tower(TOWERS[name], (TOWERS[name].num_layers,))


def leaves(name: str, mesh: tuple[int, int, int], layout: str = "scan", dtype: Any = None) -> list[Any]:
    return jax.tree.leaves(place(boxed(name, layout), make_mesh(*mesh), dtype))


@pytest.mark.parametrize("name", [*SIZES, *TOWERS])
def test_every_large_parameter_of_every_size_is_split(name: str) -> None:
    for mesh in MESHES:
        for leaf in leaves(name, mesh):
            held = leaf.sharding.shard_shape(leaf.shape)
            assert leaf.size * 4 <= LARGE or held != leaf.shape, (mesh, leaf)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen1.5-0.5b"])
def test_the_loop_layout_is_split_too(name: str) -> None:
    for mesh in MESHES:
        for leaf in leaves(name, mesh, "loop", jnp.bfloat16):
            held = leaf.sharding.shard_shape(leaf.shape)
            assert leaf.size * 2 <= LARGE or held != leaf.shape, (mesh, leaf)


@pytest.mark.parametrize("name", ["vicuna-7b-v1.5", "qwen2.5-7b", "siglip-large-patch16-384"])
def test_matrices_are_split_over_both_axes(name: str) -> None:
    """On fsdp=2 and tensor=2 a device holds at most a quarter of 99 % of the numbers, and a bit."""
    parts = leaves(name, (2, 2, 2))
    whole = sum(leaf.size for leaf in parts)
    held = sum(leaf.size // _pieces(leaf) for leaf in parts)
    assert 0.25 * whole <= held <= 0.26 * whole


def _pieces(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    pieces = 1
    for length, part in zip(leaf.shape, shape, strict=True):
        pieces *= length // part
    return pieces


@pytest.mark.parametrize(
    "name", ["toy-14k", "qwen2.5-0.5b", "qwen3-0.6b", "scenes-48", "clip-vit-large-patch14"]
)
def test_all_axes_are_in_the_rules(name: str) -> None:
    for leaf in jax.tree.leaves(boxed(name), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert set(leaf.names) - {None} <= RULES.keys()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressors_are_split(name: str) -> None:
    """Onto vicuna-7b from a CLIP of 24 x 24 patches."""
    tower, count = TOWERS["clip-vit-large-patch14-336"], COMPRESSORS[name].counts(24)[-1]
    features = abstract_features(tower, COMPRESSORS[name].needs(tower, {}))
    size = SIZES["vicuna-7b-v1.5"]
    compressor = make_compressor(name, count, size.width, decoder_size=size, tower_size=tower)
    tree = abstract_params(compressor, features, jax.ShapeDtypeStruct((1, 1, size.width), jnp.float32))
    for mesh in MESHES:
        for leaf in jax.tree.leaves(place(tree, make_mesh(*mesh))):
            held = leaf.sharding.shard_shape(leaf.shape)
            assert leaf.size * 4 <= LARGE or held != leaf.shape, (mesh, leaf)


def test_rules_and_what_does_not_divide() -> None:
    assert spec(512, 64, axes=("mlp", "embed"), mesh=(2, 2, 2)) == PartitionSpec("tensor", "fsdp")
    assert spec(511, 64, axes=("mlp", "embed"), mesh=(2, 2, 2)) == PartitionSpec(None, "fsdp")
    assert spec(8, 64, 32, axes=("layers", "heads", "embed"), mesh=(2, 2, 2)) == PartitionSpec(
        None, "tensor", "fsdp"
    )
    assert spec(64, 64, axes=("mlp", "heads"), mesh=(2, 2, 2)) == PartitionSpec("tensor", None)
    assert spec(31, 33, axes=("mlp", "embed"), mesh=(2, 2, 2)) == PartitionSpec(None, None)


def test_a_large_parameter_takes_whatever_axis_is_free() -> None:
    """The position table of a CLIP at 336 pixels; without fsdp it would lie whole on eight devices."""
    assert spec(577, 1024, axes=("position", "embed"), mesh=(1, 8, 1)) == PartitionSpec(None, "fsdp")
    assert spec(577, 1024, axes=("position", "embed"), mesh=(1, 1, 8)) == PartitionSpec(None, "tensor")
    assert spec(100, 1024, axes=("position", "embed"), mesh=(1, 1, 8)) == PartitionSpec(None, "fsdp")
    assert spec(80, 8192, axes=("layers", "norm"), mesh=(1, 8, 1)) == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((1024, 1024), (None, None)),
        ((1025, 1025), ("mlp", "embed")),
        ((1024, 1025), ("layers", "norm")),
        ((1024, 1025), (None, "embed")),
    ],
    ids=["no axes", "indivisible", "layers", "half named"],
)
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_a_large_whole_parameter_is_refused(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: tuple[int, int, int]
) -> None:
    with pytest.raises(UserError) as caught:
        spec(*shape, axes=axes, mesh=mesh)
    said = str(caught.value)
    assert "\n" not in said
    assert "some/kernel" in said
    assert "4.0 MiB" in said
    assert f"fsdp={mesh[1]}" in said


def test_a_parameter_that_is_no_box_has_no_axes() -> None:
    plain = {"table": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    with pytest.raises(UserError, match="parameter table"):
        place(plain, make_mesh(1, 8, 1))
    small = {"table": jax.ShapeDtypeStruct((512, 512), jnp.float32)}  # just 1 MiB: not above it
    assert place(small, make_mesh(1, 8, 1))["table"].sharding.is_fully_replicated


def test_data_alone_holds_everything_everywhere() -> None:
    assert spec(1024, 1024, axes=(None, None), mesh=(8, 1, 1)) == PartitionSpec(None, None)
    assert all(leaf.sharding.is_fully_replicated for leaf in leaves("qwen1.5-0.5b", (8, 1, 1)))


def test_the_size_counts_in_the_dtype_asked_for() -> None:
    tree = box(512, 1000, axes=(None, None))
    with pytest.raises(UserError, match=r"2\.0 MiB"):
        place(tree, make_mesh(1, 8, 1))
    assert place(tree, make_mesh(1, 8, 1), jnp.bfloat16)["some"]["kernel"].dtype == jnp.bfloat16


class Chip:
    """What the order of a mesh asks of a device."""

    def __init__(self, number: int, process: int, slice_index: int, platform: str = "tpu") -> None:
        self.id, self.process_index, self.slice_index, self.platform = number, process, slice_index, platform


def pod(slices: int, hosts: int, chips: int, platform: str = "tpu") -> list[Any]:
    """In no order, the numbers of hosts by slice in turn: what may be relied on is the slice alone."""
    made = [
        Chip(1000 * (part + 1) + host * chips + chip, host * slices + part, part, platform)
        for part in range(slices)
        for host in range(hosts)
        for chip in range(chips)
    ]
    random.Random(0).shuffle(made)
    return made


@pytest.mark.parametrize("slices, hosts, shape", [(2, 2, (2, 4, 2)), (2, 2, (4, 2, 2)), (4, 1, (8, 2, 1))])
def test_slices_are_outermost_and_a_host_has_one_block_of_rows(
    slices: int, hosts: int, shape: tuple[int, int, int]
) -> None:
    mesh = make_mesh(*shape, devices=pod(slices, hosts, 4))
    assert mesh.shape == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    parts = mesh.devices.reshape(slices, -1)
    for number, part in enumerate(parts):
        assert {chip.slice_index for chip in part} == {number}
    found = [host_part(mesh, process) for process in range(slices * hosts)]
    assert sorted(found) == [(index, slices * hosts) for index in range(slices * hosts)]


@pytest.mark.parametrize("shape", [(1, 16, 1), (1, 8, 2), (1, 1, 16), (3, 8, 1)])
def test_no_axis_but_data_reaches_into_another_slice(shape: tuple[int, int, int]) -> None:
    slices = 2 if shape[0] == 1 else 6
    with pytest.raises(UserError) as caught:
        make_mesh(*shape, devices=pod(slices, 2, 4) if slices == 2 else pod(slices, 1, 4))
    data, fsdp, tensor = shape
    assert str(caught.value) == (
        f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}: there are {slices} slices, and fsdp and "
        f"tensor may not reach from one into another; mesh.data must be a multiple of {slices}"
    )


def test_hosts_of_gpus_are_no_slices() -> None:
    """Which is what jax calls them; fsdp goes over their network."""
    assert make_mesh(1, 8, 2, pod(2, 1, 8, "gpu")).shape == {"data": 1, "fsdp": 8, "tensor": 2}
    assert slice_count(pod(2, 1, 8, "gpu")) == slice_count(jax.devices()) == 1
    assert slice_count(pod(3, 1, 1)) == 3


def test_the_mesh_that_is_chosen_keeps_the_state_inside_a_slice() -> None:
    """16 devices of 10 bytes: 50 bytes need more than eight of them, which one slice of two has not."""
    none, tensor = MeshConfig(), MeshConfig(tensor=2)
    assert mesh_shape(none, 16, 20, 10, slices=2) == (0, 4, 1)
    assert mesh_shape(none, 16, 50, 10) == (0, 16, 1)
    assert mesh_shape(none, 16, 50, 10, slices=2) == (0, 8, 1)
    assert mesh_shape(tensor, 16, 50, 10, slices=2) == (0, 4, 2)
    assert mesh_shape(none, 16, 0, 0, slices=2) == (0, 1, 1)


def test_an_unknown_axis_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match=r"some/kernel: logical axis hats is not in sharding\.RULES"):
        spec(8, 8, axes=("hats", "embed"), mesh=(2, 2, 2))


def test_a_mesh_that_leaves_large_parameters_whole(tmp_path: Path) -> None:
    """A table of 1021 x 1031, primes, is above 1 MiB and divides by nothing."""
    config = {"hidden_size": 1031 * 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2}
    model = make_decoder("qwen3-grouped-tied", **config, vocab_size=1021, num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"parameter embedding \(1021, 2062\) is 8\.0 MiB") as caught:
        load_directory(tmp_path, make_mesh(1, 8, 1))
    assert "\n" not in str(caught.value)
    load_directory(tmp_path, make_mesh(2, 2, 2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Each tiny model once."""
    return saver(tmp_path_factory)


# The same logits on any mesh.

TOKENS = np.random.default_rng(0).integers(3, 320, (8, 7))


def decoder_logits(described: Description, params: Any, mesh: jax.sharding.Mesh, layout: str) -> np.ndarray:
    """[8, 7] tokens, split over the mesh, to logits."""
    assert described.decoder is not None
    decoder = Decoder(described.decoder, described.decoder.vocab_size, layout=layout)

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        embeddings = decoder.apply({"params": params}, tokens, method="embed")
        hidden = decoder.apply({"params": params}, embeddings, positions, jnp.ones_like(tokens))
        return decoder.apply({"params": params}, hidden, method="logits")

    return np.asarray(run(params, jax.device_put(jnp.asarray(TOKENS), batch_sharding(mesh))))


@pytest.fixture(scope="module")
def alone(saved: Saved) -> Any:
    """Logits of a decoder on one device, in the layout of `vlmscale generate`."""

    @functools.cache
    def of(name: str) -> np.ndarray:
        described, params, _ = load_directory(saved(name)[0], one_device())
        return decoder_logits(described, params, one_device(), "loop")

    return of


def check_decoder(name: str, layout: str, shape: tuple[int, int, int], saved: Saved, alone: Any) -> Any:
    directory, model = saved(name)
    mesh = make_mesh(*shape)
    described, params, _ = load_directory(directory, mesh, layout=layout)
    ours = decoder_logits(described, params, mesh, layout)
    np.testing.assert_allclose(ours, alone(name), atol=1e-5, rtol=0)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(theirs).max() > 1, "logits near nothing would show little"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    return params


@pytest.mark.parametrize("layout", ["scan", "loop"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_on_a_cube_of_devices(name: str, layout: str, saved: Saved, alone: Any) -> None:
    params = check_decoder(name, layout, (2, 2, 2), saved, alone)
    parts = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == (3 if layout == "scan" else 2)]
    assert len(parts) >= 7
    for leaf in parts:
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size
        assert len({shard.device for shard in leaf.addressable_shards}) == 8


@pytest.mark.parametrize("shape", ONE_AXIS)
@pytest.mark.parametrize(
    "name, layout",
    [("llama-grouped-tied", "scan"), ("qwen2-grouped-untied", "loop"), ("qwen3-grouped-untied", "loop")],
)
def test_decoders_on_one_axis(
    name: str, layout: str, shape: tuple[int, int, int], saved: Saved, alone: Any
) -> None:
    """Eight devices along tensor cut through heads: 2 or 1 heads of keys, 4 of queries."""
    params = check_decoder(name, layout, shape, saved, alone)
    block = params["layers"] if layout == "scan" else params["layers_0"]
    pieces = 1 if shape == (8, 1, 1) else 8
    assert block["k"]["weight"].addressable_shards[0].data.size * pieces == block["k"]["weight"].size


PIXELS = np.random.default_rng(1).standard_normal((8, 60, 60, 3), np.float32)


def llava_logits(
    described: Description, params: Any, mesh: jax.sharding.Mesh, layout: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the image slots in them, and logits at all positions."""
    llava = described.llava
    assert llava is not None
    count, layer = llava.visual_tokens, llava.tower.select_layer
    ids = np.concatenate([TOKENS[:, :2], np.full((8, count), llava.image_token_id), TOKENS[:, 2:]], axis=1)
    vlm = VLM(llava.decoder, llava.decoder.vocab_size, llava.compressor, count, layout=layout)

    @jax.jit
    def run(params: Any, tokens: jax.Array, pixels: jax.Array) -> jax.Array:
        hidden = VisionTower(llava.tower).apply({"params": params["tower"]}, pixels, (layer,)).hidden[layer]
        features = Features(hidden if llava.keep_class_token else hidden[:, 1:])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        slots = tokens == llava.image_token_id
        rest = {name: params[name] for name in ("decoder", "compressor")}
        inputs = Inputs(tokens, slots, positions, jnp.ones_like(tokens), features)
        return vlm.apply({"params": rest}, inputs, positions)

    split = functools.partial(jax.device_put, device=batch_sharding(mesh))
    return ids, np.asarray(run(params, split(jnp.asarray(ids)), split(jnp.asarray(PIXELS))))


@pytest.mark.parametrize("name", LLAVAS)
def test_llavas_on_any_mesh(name: str, saved: Saved) -> None:
    directory, model = saved(name)
    described, params, _ = load_directory(directory, one_device())
    ids, single = llava_logits(described, params, one_device(), "loop")
    with torch.no_grad():
        theirs = model(
            torch.tensor(ids), pixel_values=torch.tensor(PIXELS.transpose(0, 3, 1, 2)).contiguous()
        ).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(single, theirs, atol=1e-4, rtol=0)
    runs = [((2, 2, 2), "loop")]
    runs += {"siglip-qwen2": [((2, 2, 2), "scan")], "clip-llama": [(mesh, "loop") for mesh in ONE_AXIS]}.get(
        name, []
    )
    for shape, layout in runs:
        mesh = make_mesh(*shape)
        spread = load_directory(directory, mesh, layout=layout)[1]
        _, ours = llava_logits(described, spread, mesh, layout)
        np.testing.assert_allclose(ours, single, atol=1e-5, rtol=0, err_msg=f"{shape} {layout}")
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_layouts_and_meshes_hold_the_same_bits(saved: Saved) -> None:
    directory, _ = saved("siglip-qwen2")
    _, loop, _ = load_directory(directory, one_device())
    for shape in [(2, 2, 2), (1, 8, 1), (1, 1, 8)]:
        _, params, _ = load_directory(directory, make_mesh(*shape), layout="scan")
        assert_same(unstack(params["decoder"]), loop["decoder"])
        assert_same(params["tower"], loop["tower"])
        assert_same(params["compressor"], loop["compressor"])
