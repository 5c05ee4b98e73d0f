"""The size tables: every row's parameters against the module itself and against transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from flax import linen as nn

from vlmscale.compressors.features import abstract_tower_params
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize
from vlmscale.weights import tree
from vlmscale.weights.directory import abstract_decoder, abstract_tower
from vlmscale.weights.hf_config import decoder_config, decoder_size, tower_config, tower_size

REAL = {name: size for name, size in SIZES.items() if not name.startswith("toy")}
SMALL = DecoderSize(width=24, num_layers=3, num_heads=6, num_kv_heads=2, mlp_width=40)
# Exact totals published with the checkpoints (their safetensors metadata, a tied head counted once).
PUBLISHED = {
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "vicuna-7b-v1.5": 6_738_415_616,
    "vicuna-13b-v1.5": 13_015_864_320,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
# The same of whole vision models, of transformers' CLIPVisionModel and SiglipVisionModel.
PUBLISHED_TOWERS = {
    "clip-vit-large-patch14-336": 303_507_456,
    "clip-vit-large-patch14": 303_179_776,
    "siglip-so400m-patch14-384": 428_225_600,
    "siglip2-so400m-patch14-384": 428_225_600,
}
# What the cards of Qwen2.5 and Qwen3 call "non-embedding", in billions.
NON_EMBEDDING = {
    "qwen2.5-0.5b": 0.36,
    "qwen2.5-1.5b": 1.31,
    "qwen2.5-3b": 2.77,
    "qwen2.5-7b": 6.53,
    "qwen2.5-14b": 13.1,
    "qwen3-0.6b": 0.44,
    "qwen3-1.7b": 1.4,
    "qwen3-4b": 3.6,
    "qwen3-14b": 13.2,
}


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_those_of_the_module(name: str) -> None:
    size, vocab = SIZES[name], SIZES[name].vocab_size or 512
    params = nn.meta.unbox(abstract_decoder(size, vocab, "scan"))
    without = {key: value for key, value in params.items() if key not in ("embedding", "head")}
    assert size.num_nonembedding_params == tree.count(without)
    assert size.num_params(vocab) == tree.count(params)


@pytest.mark.parametrize("name", REAL)
def test_counts_are_those_of_transformers(name: str) -> None:
    size = REAL[name]
    config = decoder_config(size, size.vocab_size)
    with torch.device("meta"):
        kind = getattr(transformers, config["architectures"][0].replace("ForCausalLM", "Config"))
        model = getattr(transformers, config["architectures"][0])(kind(**config))
    assert size.num_params() == sum(parameter.numel() for parameter in model.parameters())


def test_counts_are_those_published() -> None:
    assert {name: SIZES[name].num_params() for name in PUBLISHED} == PUBLISHED
    for name, billions in NON_EMBEDDING.items():
        assert SIZES[name].num_nonembedding_params / 1e9 == pytest.approx(billions, rel=0.02), name


@pytest.mark.parametrize("size", REAL.values(), ids=REAL)
def test_decoder_rows_survive_config_json(size: DecoderSize, tmp_path: Path) -> None:
    assert decoder_size(decoder_config(size, size.vocab_size), tmp_path) == size


@pytest.mark.parametrize("name", [name for name in TOWERS if name != "scenes-48"])
def test_tower_rows_survive_config_json_and_count_as_transformers(name: str, tmp_path: Path) -> None:
    size = TOWERS[name]
    config = tower_config(size, size.num_layers)
    assert tower_size(config, tmp_path) == size
    with torch.device("meta"):
        kind = getattr(transformers, config["architectures"][0].replace("Model", "Config"))
        model = getattr(transformers, config["architectures"][0])(kind(**config))
    theirs = sum(p.numel() for n, p in model.named_parameters() if "post_layernorm" not in n)
    assert size.num_params(size.num_layers) == theirs


@pytest.mark.parametrize("size", TOWERS.values(), ids=TOWERS)
def test_tower_counts_are_those_of_the_module(size: TowerSize) -> None:
    for layer in (0, size.select_layer, size.num_layers):
        assert size.num_params(layer) == tree.count(nn.meta.unbox(abstract_tower(size, (layer,))))
    assert size.num_params() == size.num_params(size.select_layer)


@pytest.mark.parametrize("name", PUBLISHED_TOWERS)
def test_tower_counts_are_those_published(name: str) -> None:
    size = TOWERS[name]
    pooling = tree.count(
        abstract_tower_params(size)["head"]
    )  # with the final norm, which is all that CLIP has
    behind = 2 * size.width if size.class_tokens else pooling
    assert size.num_params(size.num_layers) + behind == PUBLISHED_TOWERS[name]


@pytest.mark.parametrize("size", TOWERS.values(), ids=TOWERS)
def test_tower_rows_are_consistent(size: TowerSize) -> None:
    assert size.width % size.num_heads == 0
    assert all(0 <= layer <= size.num_layers for layer in (size.select_layer, *size.levels))


def test_grids_are_those_of_the_papers() -> None:
    grids = {name: size.num_patches for name, size in TOWERS.items()}
    assert grids["clip-vit-large-patch14-336"] == grids["siglip2-so400m-patch16-384"] == 576
    assert grids["siglip-so400m-patch14-384"] == 729  # 384 pixels hold 27 patches of 14 and a rest
    assert TOWERS["clip-vit-large-patch14-336"].levels == (12, 16, 22, 23)


def test_toy_sizes_grow_and_are_named_by_what_they_hold() -> None:
    toys = {name: size.num_params(512) for name, size in SIZES.items() if name.startswith("toy")}
    assert list(toys.values()) == sorted(toys.values())
    for name, total in toys.items():
        assert total == pytest.approx(float(name.removeprefix("toy-").removesuffix("k")) * 1e3, rel=0.1), name


def test_grouped_keys_count_their_own_width() -> None:
    plain = dataclasses.replace(SMALL, num_kv_heads=SMALL.num_heads)
    saved = 2 * SMALL.width * (SMALL.width - 2 * SMALL.head_dim) * SMALL.num_layers
    assert plain.num_nonembedding_params - SMALL.num_nonembedding_params == saved
