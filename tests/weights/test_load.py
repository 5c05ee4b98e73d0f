"""Checkpoints onto meshes: the same logits everywhere, every bit of every tensor, every mistake named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from tests.pretrained import (
    LLAVAS,
    Arrays,
    Saved,
    assert_same,
    by_path,
    one_device,
    refused,
    rewrite,
    saver,
    tensors_of,
)
from vlmscale.compressors import COMPRESSORS, Features
from vlmscale.errors import UserError
from vlmscale.layers import abstract_params, init_params
from vlmscale.models.vision import VisionTower
from vlmscale.sharding import make_mesh, place
from vlmscale.weights import tables
from vlmscale.weights.checkpoint import INDEX, WEIGHTS, open_checkpoint, write_checkpoint
from vlmscale.weights.directory import abstract_decoder, abstract_tower, load_directory
from vlmscale.weights.load import Source, load_params


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Each tiny model once."""
    return saver(tmp_path_factory)


def test_parameters_are_the_tensors_of_the_file(saved: Saved) -> None:
    """Written out by hand, not through the tables: a Linear, a patch convolution and a projector."""
    directory, _ = saved("clip-llama")
    stored = safetensors.torch.load_file(directory / WEIGHTS)
    _, params, report = load_directory(directory, make_mesh(2, 2, 2))
    for name, ours in (
        (
            "language_model.model.layers.2.mlp.down_proj.weight",
            params["decoder"]["layers_2"]["down"]["weight"],
        ),
        ("language_model.lm_head.weight", params["decoder"]["head"]),
        ("multi_modal_projector.linear_1.weight", params["compressor"]["up"]["kernel"].T),
    ):
        np.testing.assert_array_equal(np.asarray(ours), stored[name].numpy(), err_msg=name)
    convolution = next(v for k, v in stored.items() if k.endswith("patch_embedding.weight"))
    kernel = np.asarray(params["tower"]["patch_embedding"]["kernel"]).reshape(14, 14, 3, 32)
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), convolution.numpy())
    assert len(report.loaded) == len(by_path(params))
    assert report.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert not report.initialised
    # Two of three blocks are run; the third and the norm behind it stay in the file.
    assert len(report.not_needed) == 16 + 2
    assert len(report.loaded) + len(report.not_needed) == len(stored)
    assert "not needed 18" in str(report)


# Other spellings of the same tensors.


def _spell(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def spelt(name: str) -> str:
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        return name

    return spelt


SPELLINGS = {
    "transformers 4.51": _spell((r"^vision_tower\.", "vision_tower.vision_model.")),
    "transformers 4.52, in memory": _spell(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^model\.vision_tower\.", "model.vision_tower.vision_model."),
    ),
    "the same without vision_model": _spell(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
}


@pytest.mark.parametrize("name", LLAVAS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_the_same_model(name: str, spelling: str, saved: Saved, tmp_path: Path) -> None:
    directory, _ = saved(name)
    _, wanted, _ = load_directory(directory, one_device())
    stored = tensors_of(directory)
    canonical = {re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", key): key for key in stored}
    respelt = {SPELLINGS[spelling](key): stored[old] for key, old in canonical.items()}
    assert respelt.keys() != stored.keys()
    head = "model.language_model." if "model.language_model.embed_tokens.weight" in respelt else ""
    head = head or "language_model.model."
    respelt[f"{head}layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tower = next(key for key in respelt if key.endswith("position_embedding.weight"))
    respelt[tower.replace("position_embedding.weight", "position_ids")] = np.arange(17)[None]
    out = rewrite(directory, tmp_path / "respelt", respelt)
    _, params, report = load_directory(out, make_mesh(2, 2, 2))
    assert_same(params, wanted)
    assert {"inv_freq", "position_ids"} <= {key.rsplit(".", 1)[1] for key in report.not_needed}


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_towers_alone_and_with_a_text_half(kind: str, tmp_path: Path) -> None:
    """`CLIPModel` as the hub has it: `vision_model.` in front, a text model and projections beside."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text | {"vocab_size": 50}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path / "both")
    model.vision_model.save_pretrained(tmp_path / "tower")
    described, params, report = load_directory(tmp_path / "both", make_mesh(2, 2, 2))
    assert described.kind == "tower"
    assert any(name.startswith("text_model.") for name in report.not_needed)
    assert_same(params, load_directory(tmp_path / "tower", one_device())[1])
    _, params, report = load_directory(tmp_path / "tower", one_device(), whole_tower=True)
    assert not [name for name in report.not_needed if "layers.2" in name]
    images = np.random.default_rng(0).standard_normal((2, 28, 28, 3), np.float32)
    assert described.tower is not None
    ours = VisionTower(described.tower).apply({"params": params}, images, (3,)).hidden[3]
    with torch.no_grad():
        theirs = model.vision_model(
            torch.tensor(images.transpose(0, 3, 1, 2)), output_hidden_states=True
        ).hidden_states[3]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_floats_are_cast_once(dtype: Any, saved: Saved, tmp_path: Path) -> None:
    directory, _ = saved("qwen2-plain-tied")
    stored = {name: array.astype(dtype) for name, array in tensors_of(directory).items()}
    out = rewrite(directory, tmp_path / "cast", stored)
    for wanted in (jnp.float32, jnp.bfloat16):
        _, params, _ = load_directory(out, make_mesh(2, 2, 2), wanted, "scan")
        table = stored["model.layers.1.mlp.up_proj.weight"].astype(wanted)
        np.testing.assert_array_equal(np.asarray(params["layers"]["up"]["weight"][1]), table)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}


def test_layers_of_different_types_are_not_cut_to_the_first(saved: Saved, tmp_path: Path) -> None:
    directory, _ = saved("llama-plain-untied")
    stored = tensors_of(directory)
    first = "model.layers.0.mlp.up_proj.weight"
    stored[first] = stored[first].astype(ml_dtypes.bfloat16)
    out = rewrite(directory, tmp_path / "mixed", stored)
    up = load_directory(out, make_mesh(2, 2, 2), layout="scan")[1]["layers"]["up"]["weight"]
    np.testing.assert_array_equal(np.asarray(up[0]), stored[first].astype(np.float32))
    np.testing.assert_array_equal(np.asarray(up[1]), stored["model.layers.1.mlp.up_proj.weight"])


# Parts from several directories, and a part that is fresh.


def parts_of(saved: Saved, tmp_path: Path, prefix: str) -> tuple[Any, Any, Path, Path]:
    """Sizes and directories of an LLM and of a CLIP tower, whose names may start with `vision_model.`."""
    _, model = saved("clip-llama")
    llm, tower = saved("llama-plain-untied")[0], tmp_path / "tower"
    model.model.vision_tower.save_pretrained(tmp_path / "plain")
    stored = {
        prefix + name.removeprefix("vision_model."): array
        for name, array in tensors_of(tmp_path / "plain").items()
    }
    rewrite(tmp_path / "plain", tower, stored)
    described, _, _ = load_directory(llm, one_device())
    seen, _, _ = load_directory(tower, one_device())
    return described.decoder, seen.tower, llm, tower


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("layout", ["scan", "loop"])
def test_two_directories_and_a_fresh_compressor(
    prefix: str, layout: str, saved: Saved, tmp_path: Path
) -> None:
    size, tower, llm_directory, tower_directory = parts_of(saved, tmp_path, prefix)
    module = COMPRESSORS["mlp"].build(tower.num_patches, size.width)
    features = Features(jnp.zeros((1, tower.num_patches, tower.width)))
    boxed = {
        "decoder": abstract_decoder(size, size.vocab_size, layout),
        "tower": abstract_tower(tower, (tower.select_layer,)),
        "compressor": abstract_params(module, features, None),
    }
    mesh = make_mesh(2, 2, 2)
    places = place(boxed, mesh)
    key, calls = jax.random.key(5), []

    def expensive(shape: tuple[int, ...]) -> jax.Array:
        """Counts what is computed in fact; a value that no output needs is dropped by the compiler."""

        def count() -> np.ndarray:
            calls.append(shape)
            return np.zeros(shape, np.float32)

        return jax.pure_callback(count, jax.ShapeDtypeStruct(shape, jnp.float32))

    def initialise() -> dict[str, Any]:
        fresh = jax.tree.map(
            lambda leaf: expensive(leaf.shape), {name: places[name] for name in ("decoder", "tower")}
        )
        return fresh | {"compressor": init_params(module, key, features, None)}

    seen: list[tuple[int, int]] = []
    with open_checkpoint(llm_directory) as llm, open_checkpoint(tower_directory) as clip:
        sources = [
            Source(llm, tables.DECODER.under("decoder/", "")),
            Source(clip, tables.CLIP.under("tower/", "")),
        ]
        params, report = load_params(
            places, sources, initialise, lambda what, done, total: seen.append((done, total))
        )
        with pytest.raises(UserError, match="compressor/") as caught:
            load_params(places, sources)
        assert str(tower_directory) in str(caught.value)
        with pytest.raises(ValueError, match=r"parameter decoder/.*: two sources hold it"):
            load_params(places, [sources[0], sources[0]], initialise)
    assert calls == [], "what was read was initialised too"
    wanted = load_directory(llm_directory, one_device(), layout=layout)[1]
    assert_same(params["decoder"], wanted)
    assert_same(params["tower"], load_directory(tower_directory, one_device())[1])
    fresh = jax.jit(lambda: init_params(module, key, features, None))()
    assert_same(params["compressor"], fresh)
    assert report.initialised == [
        f"compressor/{name}/{leaf}" for name in ("down", "up") for leaf in ("bias", "kernel")
    ]
    assert len(report.loaded) == len(by_path(params)) - 4
    assert report.num_params == sum(leaf.size for leaf in jax.tree.leaves(params)) - sum(
        leaf.size for leaf in jax.tree.leaves(fresh)
    )
    assert "initialised 4 (compressor/down/bias" in str(report)
    # The third block, and the norm behind it.
    assert len(report.not_needed) == 18
    assert seen[-1] == (len(report.loaded), len(report.loaded))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {mesh}
    kernel = params["compressor"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


@pytest.mark.parametrize("shape", [(12, 12), (12,)], ids=["kernel", "bias"])
@pytest.mark.parametrize("which", ["packed_q", "packed_k"])
def test_a_part_of_packed_projections_is_read_from_its_third(which: str, shape: tuple[int, ...]) -> None:
    """torch stacks q, k and v; any shard of ours lies in the rows of one of them."""
    form, stored = tables.FORMS[which], np.random.default_rng(0).standard_normal((36, 12)[: len(shape)])
    third = np.split(stored, 3)["qkv".index(which[-1])]
    for index in ((slice(0, 12), slice(0, 12)), (slice(4, 8), slice(6, 12))):
        index = index[-len(shape) :]
        part = form.ours(stored[form.take(index, stored.shape)], index)
        np.testing.assert_array_equal(part, third.T[index])
    assert form.theirs(third.T).shape == stored.shape


def test_a_part_keeps_its_patterns_at_the_start_of_its_names() -> None:
    table = tables.CLIP.under("tower/", "")
    assert table.ignores("head.probe")
    assert not table.ignores("lm_head.weight")
    deep = tables.CLIP.under("tower/", "a.b.")
    assert deep.canonical("a.b.vision_model.pre_layrnorm.bias") == "a.b.pre_layrnorm.bias"
    assert deep.canonical("x.a.b.vision_model.y") == "x.a.b.vision_model.y"
    assert deep.ignores("a.b.head.probe")
    assert not deep.ignores("a.b.layer.head.probe")


# Heads that are tied, or said to be.


def tied(directory: Path, out: Path, head: np.ndarray | None, tie: bool) -> Path:
    """The decoder with this head, and config.json saying whether it is tied."""
    stored = {name: array for name, array in tensors_of(directory).items() if name != "lm_head.weight"}
    stored |= {} if head is None else {"lm_head.weight": head}
    return rewrite(directory, out, stored, tie_word_embeddings=tie)


def test_a_tied_head_that_is_stored_too_is_not_needed(saved: Saved, tmp_path: Path) -> None:
    directory, _ = saved("llama-grouped-tied")
    table = tensors_of(directory)["model.embed_tokens.weight"]
    described, params, report = load_directory(tied(directory, tmp_path / "x", table, True), one_device())
    assert described.decoder is not None
    assert described.decoder.tied_embeddings
    assert "head" not in params
    assert report.not_needed == ["lm_head.weight"]


def test_a_head_that_differs_is_taken_as_transformers_takes_it(saved: Saved, tmp_path: Path) -> None:
    """transformers 5 warns and does not tie, whatever config.json says."""
    directory, _ = saved("llama-grouped-tied")
    head = tensors_of(directory)["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    out = tied(directory, tmp_path / "x", head, True)
    described, params, report = load_directory(out, one_device())
    assert described.decoder is not None
    assert not described.decoder.tied_embeddings
    np.testing.assert_array_equal(np.asarray(params["head"]), head)
    assert report.not_needed == []
    theirs = transformers.LlamaForCausalLM.from_pretrained(out)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), head)
    assert not np.array_equal(theirs.model.embed_tokens.weight.detach().numpy(), head)


def test_an_untied_head_that_equals_the_embedding_is_a_head(saved: Saved, tmp_path: Path) -> None:
    directory, _ = saved("llama-grouped-tied")
    table = tensors_of(directory)["model.embed_tokens.weight"]
    described, params, _ = load_directory(tied(directory, tmp_path / "x", table, False), one_device())
    assert described.decoder is not None
    assert not described.decoder.tied_embeddings
    np.testing.assert_array_equal(np.asarray(params["head"]), table)


def test_a_llava_whose_head_differs(saved: Saved, tmp_path: Path) -> None:
    directory, _ = saved("siglip-qwen2")
    stored = tensors_of(directory)
    embedding = next(array for name, array in stored.items() if name.endswith("embed_tokens.weight"))
    for number, head in enumerate((embedding, embedding * 2)):
        out = rewrite(directory, tmp_path / str(number), stored | {"language_model.lm_head.weight": head})
        described, params, report = load_directory(out, one_device())
        assert described.llava is not None
        assert described.decoder == described.llava.decoder
        assert described.llava.decoder.tied_embeddings == (number == 0) == ("head" not in params["decoder"])
        assert ("language_model.lm_head.weight" in report.not_needed) == (number == 0)


# Mistakes, through the command: one line that names the tensor or the file.


UP = "model.layers.1.mlp.up_proj.weight"


def _without(stored: Arrays) -> None:
    del stored[UP]


def _extra(stored: Arrays) -> None:
    stored["model.layers.1.mlp.extra.weight"] = stored[UP]


def _deeper(stored: Arrays) -> None:
    stored[UP.replace("1", "3")] = stored[UP]


def _shape(stored: Arrays) -> None:
    stored[UP] = np.ascontiguousarray(stored[UP].T)


def _rank(stored: Arrays) -> None:
    stored[UP] = stored[UP].reshape(-1)


def _quantised(stored: Arrays) -> None:
    stored[UP] = (stored[UP] * 99).astype(np.int8)


def _flags(stored: Arrays) -> None:
    stored[UP] = stored[UP] > 0


def _bias(stored: Arrays) -> None:
    stored["model.layers.1.self_attn.q_proj.bias"] = stored["model.norm.weight"]


def _no_head(stored: Arrays) -> None:
    del stored["lm_head.weight"]


WRONG = {
    "missing": (_without, f"tensor {UP} is missing"),
    "extra": (_extra, "tensor model.layers.1.mlp.extra.weight is unknown"),
    "a layer too many": (_deeper, "tensor model.layers.3.mlp.up_proj.weight is unknown"),
    "shape": (_shape, f"tensor {UP} has shape [32, 40], config.json asks for [40, 32]"),
    "rank": (_rank, f"tensor {UP} has shape [1280]"),
    "int8": (_quantised, f"tensor {UP} is stored as int8"),
    "bool": (_flags, f"tensor {UP} is stored as bool"),
    "bias of a family without": (_bias, "tensor model.layers.1.self_attn.q_proj.bias is unknown"),
    "no head": (_no_head, "tensor lm_head.weight is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(case: str, saved: Saved, tmp_path: Path, capsys: Any) -> None:
    directory, _ = saved("llama-plain-untied")
    stored = tensors_of(directory)
    change, said = WRONG[case]
    change(stored)
    assert said in refused(rewrite(directory, tmp_path / "wrong", stored), capsys)


def test_wrong_tensors_of_a_llava_are_named(saved: Saved, tmp_path: Path, capsys: Any) -> None:
    directory, _ = saved("clip-llama")
    stored = tensors_of(directory)
    for number, (gone, extra, said) in enumerate(
        [
            (
                "multi_modal_projector.linear_2.bias",
                None,
                "tensor multi_modal_projector.linear_2.bias is missing",
            ),
            (
                None,
                "multi_modal_projector.linear_3.bias",
                "tensor multi_modal_projector.linear_3.bias is unknown",
            ),
            (None, "model.multi_modal_projector.linear_2.bias", "are the same parameter"),
            (
                None,
                "vision_tower.encoder.layers.0.gate",
                "tensor vision_tower.encoder.layers.0.gate is unknown",
            ),
            (None, "lm_head.weight", "lm_head.weight are the same parameter"),
        ]
    ):
        changed = {name: array for name, array in stored.items() if name != gone}
        if extra:
            changed[extra] = stored["multi_modal_projector.linear_2.bias"]
        assert said in refused(rewrite(directory, tmp_path / str(number), changed), capsys)


def test_a_type_that_is_not_read_is_named(saved: Saved, tmp_path: Path, capsys: Any) -> None:
    directory, _ = saved("llama-plain-untied")
    out = tmp_path / "fp8"
    shutil.copytree(directory, out)
    stored = safetensors.torch.load_file(out / WEIGHTS)
    stored[UP] = stored[UP].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(stored, out / WEIGHTS)
    assert f"tensor {UP} is stored as F8_E4M3" in refused(out, capsys)


def test_damaged_and_missing_files_are_named(saved: Saved, tmp_path: Path, capsys: Any) -> None:
    directory, _ = saved("llama-plain-untied")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(directory, tmp_path / name))

    out = copy("cut")
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-100])
    assert f"{out / WEIGHTS}: cannot be read" in refused(out, capsys)

    out = copy("empty")
    (out / WEIGHTS).write_bytes(b"")
    assert f"{out / WEIGHTS}: cannot be read" in refused(out, capsys)

    out = copy("absent")
    stored = tensors_of(directory)
    (out / WEIGHTS).unlink()
    files = write_checkpoint(out, stored.items(), 20_000)
    assert len(files) > 3
    load_directory(out, one_device())
    files[1].unlink()
    said = refused(out, capsys)
    assert INDEX in said
    assert files[1].name in said

    out = copy("pickle")
    (out / WEIGHTS).unlink()
    (out / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "only pickle files (pytorch_model.bin)" in refused(out, capsys)

    out = copy("nothing")
    (out / WEIGHTS).unlink()
    assert f"neither {WEIGHTS} nor {INDEX}" in refused(out, capsys)
    assert "no-such-directory" in refused(tmp_path / "no-such-directory", capsys)


def test_a_tower_alone_cannot_answer(saved: Saved, tmp_path: Path, capsys: Any) -> None:
    directory, model = saved("clip-llama")
    out = Path(shutil.copytree(directory, tmp_path / "x"))
    (out / WEIGHTS).unlink()
    model.model.vision_tower.save_pretrained(out)
    assert "holds a vision tower alone" in refused(out, capsys)
