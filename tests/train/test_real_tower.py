"""Towers from Hugging Face directories: transformers' numbers, told apart by content, refused when wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from tests.integration.tiny import DATA, SCENES, lines, picture, read, steps, train
from tests.pretrained import COMMON, randomise, save_decoder
from vlmscale.cli import main
from vlmscale.compressors.features import tower_features
from vlmscale.config import Cell, cell_id
from vlmscale.data import scenes
from vlmscale.data.processor import ImageProcessor, processor_config
from vlmscale.data.sources import Stored
from vlmscale.errors import UserError
from vlmscale.loading import load_cell, load_sweep
from vlmscale.models.sizes import TOWERS, TowerSize
from vlmscale.train.features import batch_size
from vlmscale.train.frozen import load_tower, tower_path
from vlmscale.train.prepared import Prepared, pixels_of, prepare
from vlmscale.weights import export, hf_config, tree
from vlmscale.weights.directory import abstract_tower

# Neither reads its last block, and of SigLIP the levels go deeper than the selected layer. The norms' eps is
# no default, so that a forgotten one shows.
ROWS = {
    "tiny-clip": TowerSize(
        *(24, 6, 32, 4, 4, 48, 3, (1, 2, 3)),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        norm_eps=1e-3,
        style="clip",
        activation="quick_gelu",
    ),
    "tiny-siglip": TowerSize(24, 6, 32, 4, 4, 48, 2, (1, 2, 3), norm_eps=1e-3),
}
SCORE = "--config.compressor.options=score=probe"
LEVELS, PROBE = frozenset({"levels"}), frozenset({"probe_attention"})
CLASSES = {"tiny-clip": "CLIP", "tiny-siglip": "Siglip"}
# Keys of a config.json and values that neither row has.
CHANGES = {
    "image_size": 30,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in ROWS.items():
        monkeypatch.setitem(TOWERS, name, size)


def vision_options(name: str) -> dict[str, Any]:
    size = ROWS[name]
    return {
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "layer_norm_eps": size.norm_eps,
    }


def make_bare(name: str) -> torch.nn.Module:
    config = getattr(transformers, f"{CLASSES[name]}VisionConfig")(**vision_options(name))
    return randomise(getattr(transformers, f"{CLASSES[name]}VisionModel")(config))


def make_whole(name: str) -> torch.nn.Module:
    """With a text half."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = getattr(transformers, f"{CLASSES[name]}Config")(
        vision_config=vision_options(name), text_config=text | {"vocab_size": 9}
    )
    return randomise(getattr(transformers, f"{CLASSES[name]}Model")(config))


def make_llava(name: str) -> torch.nn.Module:
    vision = getattr(transformers, f"{CLASSES[name]}VisionConfig")(**vision_options(name))
    text = transformers.LlamaConfig(**COMMON)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=2)
    return randomise(transformers.LlavaForConditionalGeneration(config))


MAKERS: dict[str, Callable[[str], torch.nn.Module]] = {
    "bare": make_bare,
    "whole": make_whole,
    "llava": make_llava,
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory with a bare tower by its name; tests that change something work on a copy."""
    root = tmp_path_factory.mktemp("towers")
    for name in ROWS:
        make_bare(name).save_pretrained(root / name)
    return {name: root / name for name in ROWS}


def copy(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to))


def tower_words(name: str, path: Path) -> tuple[str, str]:
    return f"--config.tower.name={name}", f"--config.tower.checkpoint={path}"


def tiny(name: str, path: Path, *overrides: str) -> Cell:
    return load_cell(SCENES, [*DATA, *steps(3), *tower_words(name, path), *overrides])


def nothing(*_: object) -> None:
    return None


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read(path) | changes), encoding="utf-8")


def drop_tensors(directory: Path, part: str) -> None:
    """Write the weights anew without those whose names have `part` in them."""
    file = directory / "model.safetensors"
    kept = {k: v for k, v in safetensors.numpy.load_file(file).items() if part not in k}
    safetensors.numpy.save_file(kept, file, metadata={"format": "pt"})


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def stored_features(prepared: Prepared, cell: Cell) -> dict[str, np.ndarray]:
    """The tower outputs of all test pictures, in the order in which they were drawn."""
    [reader] = prepared.pictures("test", [cell])
    assert isinstance(reader, Stored)
    return reader.store.gather(range(len(reader.store)))


@pytest.mark.parametrize("name", ROWS)
def test_features_are_transformers_hidden_states(name: str, towers: dict[str, Path], tmp_path: Path) -> None:
    size, path = ROWS[name], towers[name]
    packer = tiny(name, path, "--config.compressor.name=tokenpacker")
    prepared = prepare([tiny(name, path), packer], tmp_path / "data", nothing)
    drawn, _ = scenes.build("test", 8, 0)
    pixels = np.stack([pixels_of(scenes.draw(scene), packer) for scene in drawn])
    with torch.no_grad():
        wanted = make_bare(name)(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    states = [state.numpy()[:, size.class_tokens :] for state in wanted.hidden_states]
    stored = stored_features(prepared, packer)
    assert stored["selected"].shape == (8, 16, 32)
    np.testing.assert_allclose(stored["selected"], states[size.select_layer], rtol=1e-5, atol=1e-5)
    levels = np.concatenate([states[level] for level in size.levels], axis=-1)
    np.testing.assert_allclose(stored["levels"], levels, rtol=1e-5, atol=1e-5)
    # The copy holds three of four blocks and is all that is needed from then on.
    ours = load_tower(prepared.path / "tower.safetensors", name, LEVELS)
    assert sorted(part for part in ours if part.startswith("block_")) == ["block_0", "block_1", "block_2"]
    assert prepared.manifest["tower_sha256"] == tree.sha256(ours)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["whole", "llava"])
def test_the_tower_of_a_larger_model_is_taken(name: str, kind: str, tmp_path: Path) -> None:
    model = MAKERS[kind](name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # in shards
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    vision = model.vision_model if kind == "whole" else model.model.vision_tower
    vision.config.save_pretrained(tmp_path / "bare")
    state = {name: value.contiguous() for name, value in vision.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    ours, bare = load_tower(tmp_path, name, LEVELS), load_tower(tmp_path / "bare", name, LEVELS)
    assert tree.sha256(ours) == tree.sha256(bare)


def test_a_llavas_language_model_may_be_of_any_family(tmp_path: Path) -> None:
    make_llava("tiny-clip").save_pretrained(tmp_path)
    wanted = tree.sha256(load_tower(tmp_path, "tiny-clip"))
    edit(tmp_path / "config.json", text_config={"model_type": "mamba"}, vision_feature_layer=[1, 2])
    assert tree.sha256(load_tower(tmp_path, "tiny-clip")) == wanted


def test_the_demos_tower_comes_back_from_its_export(tmp_path: Path) -> None:
    name, size = "scenes-48", TOWERS["scenes-48"]
    shipped = load_tower(tower_path(Cell()), name)
    tensors = export.tower_tensors(shipped, size.style)
    export.write_directory(tmp_path, hf_config.tower_config(size, size.num_layers), tensors, {})
    assert tree.sha256(load_tower(tmp_path, name, LEVELS)) == tree.sha256(shipped)


def test_an_export_without_the_last_blocks_is_the_same_tower(towers: dict[str, Path], tmp_path: Path) -> None:
    """Its config.json says so, as `vlmscale convert --run` writes it."""
    path = copy(towers["tiny-siglip"], tmp_path / "tower")
    wanted = tree.sha256(load_tower(path, "tiny-siglip", LEVELS))
    drop_tensors(path, "layers.3.")
    edit(path / "config.json", num_hidden_layers=3)
    assert tree.sha256(load_tower(path, "tiny-siglip", LEVELS)) == wanted
    drop_tensors(path, "layers.2.")
    edit(path / "config.json", num_hidden_layers=2)
    load_tower(path, "tiny-siglip")
    assert "num_hidden_layers is 2" in refusal(lambda: load_tower(path, "tiny-siglip", LEVELS))


def test_only_blocks_that_are_needed_must_be_there(towers: dict[str, Path], tmp_path: Path) -> None:
    """A directory without its last block, then without the one that only the levels read."""
    path = copy(towers["tiny-siglip"], tmp_path / "tower")
    drop_tensors(path, "layers.3.")
    assert "block_2" in load_tower(path, "tiny-siglip", LEVELS)
    drop_tensors(path, "layers.2.")
    params = load_tower(path, "tiny-siglip")
    assert {part for part in params if part.startswith("block_")} == {"block_0", "block_1"}
    assert "encoder.layers.2" in refusal(lambda: load_tower(path, "tiny-siglip", LEVELS))
    # The same of a safetensors file of ours.
    file = tmp_path / "tower.safetensors"
    tree.save(file, params, {})
    assert tree.sha256(load_tower(file, "tiny-siglip")) == tree.sha256(params)
    assert "block_2/" in refusal(lambda: load_tower(file, "tiny-siglip", LEVELS))
    tree.save(file, {part: values for part, values in params.items() if part != "block_0"}, {})
    assert "block_0/" in refusal(lambda: load_tower(file, "tiny-siglip"))


def test_a_block_of_which_only_the_keys_are_read_must_be_there(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    """They belong to the block behind the selected layer; the one behind that is not read."""
    path, keys = copy(towers["tiny-siglip"], tmp_path / "tower"), frozenset({"keys"})
    drop_tensors(path, "layers.3.")
    params = load_tower(path, "tiny-siglip", keys)
    assert sorted(part for part in params if part.startswith("block_")) == ["block_0", "block_1", "block_2"]
    drop_tensors(path, "layers.2.")
    load_tower(path, "tiny-siglip", frozenset({"mean_attention", "stack", "tower"}))
    assert "encoder.layers.2" in refusal(lambda: load_tower(path, "tiny-siglip", keys))


@pytest.mark.parametrize("kind", MAKERS)
def test_the_probes_attention_is_that_of_transformers_head(kind: str, tmp_path: Path) -> None:
    """The head is read when it is asked for; our copy has as much of it as that takes, and gives the same."""
    name, size, directory = "tiny-siglip", ROWS["tiny-siglip"], tmp_path / "tower"
    model = MAKERS[kind](name)
    model.save_pretrained(directory)
    bare = {"bare": lambda: model, "whole": lambda: model.vision_model}.get(
        kind, lambda: model.model.vision_tower
    )()
    cell = tiny(name, directory, "--config.compressor.name=fastervlm", SCORE)
    prepared = prepare([cell], tmp_path / "data", nothing)
    drawn, _ = scenes.build("test", 8, 0)
    pixels = np.stack([pixels_of(scenes.draw(scene), cell) for scene in drawn])
    with torch.no_grad():
        hidden = bare(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states[-1]
        hidden = bare.post_layernorm(hidden)
        probe = bare.head.probe.repeat(8, 1, 1)
        wanted = bare.head.attention(probe, hidden, hidden, need_weights=True)[1][:, 0]
    stored = stored_features(prepared, cell)["probe_attention"]
    assert stored.shape == (8, size.num_patches)
    np.testing.assert_allclose(stored, wanted, rtol=1e-5, atol=1e-6)
    assert "head" not in load_tower(directory, name)
    ours = prepared.path / "tower.safetensors"
    assert "head" not in load_tower(ours, name), "an export of this run would have a tensor too many"
    copied = load_tower(ours, name, PROBE)
    assert {path for path in tree.flatten(copied) if path.startswith("head/")} == {
        *("head/probe", "head/final_norm/scale", "head/final_norm/bias"),
        *(f"head/attention/{letter}/{part}" for letter in "qk" for part in ("kernel", "bias")),
    }
    assert tree.sha256(load_tower(directory, name, PROBE)) == tree.sha256(copied)
    pooled = copied | {"head": copied["head"] | {"mlp_norm": {"scale": np.ones(32, np.float32)}}}
    tree.save(tmp_path / "pooled.safetensors", pooled, {})
    assert tree.sha256(load_tower(tmp_path / "pooled.safetensors", name, PROBE)) == tree.sha256(copied)


def test_a_directory_without_a_pooling_head_says_what_to_do(towers: dict[str, Path], tmp_path: Path) -> None:
    path = copy(towers["tiny-siglip"], tmp_path / "tower")
    drop_tensors(path, "head.attention.in_proj_weight")
    said = refusal(lambda: load_tower(path, "tiny-siglip", PROBE))
    assert "head.attention.in_proj_weight is missing" in said
    drop_tensors(path, "head.")
    load_tower(path, "tiny-siglip")
    said = refusal(lambda: load_tower(path, "tiny-siglip", PROBE))
    assert said.startswith(f"{path}: has no pooling head")
    assert said.endswith("set compressor.options=score=mean")


def test_a_file_with_the_same_parameters_gives_the_same_features(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    from_directory = prepare([tiny("tiny-clip", towers["tiny-clip"])], tmp_path / "first", nothing)
    file = from_directory.path / "tower.safetensors"
    from_file = prepare([tiny("tiny-clip", file)], tmp_path / "second", nothing)
    files = [
        path.relative_to(from_directory.path) for path in from_directory.path.rglob("*") if path.is_file()
    ]
    assert any("features" in path.parts for path in files)
    for path in files:
        if path != Path("manifest.json"):  # it holds the key, and these are other files
            assert (from_file.path / path).read_bytes() == (from_directory.path / path).read_bytes(), path
    whole = safetensors.numpy.load_file(file) | {"more": np.zeros(2, np.float32)}
    safetensors.numpy.save_file(whole, file)
    assert "more is unknown" in refusal(lambda: load_tower(file, "tiny-clip"))


def test_a_cell_trains_and_answers_and_needs_the_source_no_more(
    towers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = copy(towers["tiny-clip"], tmp_path / "source"), tmp_path / "run"
    words = (*tower_words("tiny-clip", source), "--config.compressor.name=tokenpacker")
    assert train(run, *words, count=3) == 0
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines(run / "metrics.jsonl"))
    first = read(run / "spec.json")["cell_id"]
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    source.rename(moved)
    words = (*tower_words("tiny-clip", moved), "--config.compressor.name=tokenpacker")
    assert train(run, *words, count=3) == 0, "the moved tower is another one"
    assert read(run / "spec.json")["cell_id"] == first
    shutil.rmtree(moved)
    assert main(["evaluate", "--run", str(run)]) == 0
    assert {row["vision_tower"] for row in lines(run / "result.jsonl")} == {"tiny-clip"}
    (tmp_path / "photo.png").write_bytes(picture())
    asked = ["generate", "--run", str(run), "--image", str(tmp_path / "photo.png"), "--prompt", "what is it?"]
    assert main(asked) == 0
    capsys.readouterr()


def test_a_directory_counts_by_its_content(towers: dict[str, Path], tmp_path: Path) -> None:
    path = copy(towers["tiny-clip"], tmp_path / "first")
    first = cell_id(tiny("tiny-clip", path))
    other = copy(path, tmp_path / "second")
    (other / "README.md").write_text("not a number of the result")
    assert cell_id(tiny("tiny-clip", other)) == first
    edit(other / "config.json", layer_norm_eps=1e-5)
    assert cell_id(tiny("tiny-clip", other)) != first
    other = copy(path, tmp_path / "third")
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors["embeddings.class_embedding"] = tensors["embeddings.class_embedding"] + 1
    safetensors.numpy.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert cell_id(tiny("tiny-clip", other)) != first
    out = tmp_path / "data"
    prepare([tiny("tiny-clip", path)], out, nothing)
    shutil.rmtree(path)
    path = copy(towers["tiny-clip"], tmp_path / "again")
    prepare([tiny("tiny-clip", path)], out, lambda *_: pytest.fail("made twice"))
    assert "choose another --out" in refusal(lambda: prepare([tiny("tiny-clip", other)], out, nothing))


def test_files_are_hashed_once_for_all_cells(
    towers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy(towers["tiny-clip"], tmp_path / "tower")
    for file in path.iterdir():
        os.utime(file, (1e9, 1e9))  # a file that was just written is not trusted to stay as it is
    hashed: list[str] = []
    digest = hashlib.file_digest

    def count(file: Any, kind: str) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", count)
    sweep = tmp_path / "sweep.py"
    sweep.write_text(
        "from vlmscale.config import Sweep\nfrom vlmscale.loading import load_cell\n"
        "def get_sweep(overrides=()):\n"
        "    return Sweep('x', [load_cell(f'configs/scenes_tiny.py:toy-14k,{v}', overrides) "
        "for v in (0, 1, 4, 16)])\n"
    )
    cells = load_sweep(str(sweep), list(tower_words("tiny-clip", path))).cells
    before = cell_id(cells[0])
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    edit(path / "config.json", layer_norm_eps=1e-5)
    os.utime(path / "config.json", (1e9, 1e9))
    assert cell_id(cells[0]) != before


@pytest.mark.parametrize("key", CHANGES)
def test_a_config_of_another_architecture_is_refused(
    key: str, towers: dict[str, Path], tmp_path: Path
) -> None:
    path = copy(towers["tiny-clip"], tmp_path / "tower")
    edit(path / "config.json", **{key: CHANGES[key]})
    said = refusal(lambda: prepare([tiny("tiny-clip", path)], tmp_path / "data", nothing))
    assert str(path / "config.json") in said
    assert f"{key} is {CHANGES[key]}, but tower.name=tiny-clip has" in said
    assert not (tmp_path / "data").exists()


def test_the_row_that_fits_is_named(towers: dict[str, Path]) -> None:
    said = refusal(lambda: load_tower(towers["tiny-siglip"], "tiny-clip"))
    assert "model_type is siglip" in said
    assert said.endswith("it fits tower.name=tiny-siglip")


def test_directories_without_a_tower_are_refused(towers: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tower"

    def said() -> str:
        return refusal(lambda: prepare([tiny("tiny-clip", path)], tmp_path / "data", nothing))

    assert "No such file" in said()
    copy(towers["tiny-clip"], path)
    (path / "config.json").unlink()
    assert f"tower.checkpoint={path}: has no config.json" in said()
    (path / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type 'bert' is not one that is built here" in said()
    shutil.rmtree(path)
    save_decoder("llama-plain-untied", path)
    assert "language model alone" in said()
    shutil.rmtree(path)
    copy(towers["tiny-clip"], path)
    (path / "model.safetensors").unlink()
    assert "model.safetensors" in said()
    shutil.rmtree(path)
    copy(towers["tiny-clip"], path)
    drop_tensors(path, "layers.1.mlp.fc1.bias")
    assert "layers.1.mlp.fc1.bias is missing" in said()
    path = path / "model.safetensors"
    assert said().endswith(f"name {path.parent}")


def test_shipped_weights_are_those_of_one_tower() -> None:
    for name in ("tiny-clip", "siglip-so400m-patch14-384"):
        said = refusal(partial(load_cell, SCENES, [f"--config.tower.name={name}"]))
        assert "ships only the weights of scenes-48; name a Hugging Face directory" in said
    assert "is empty" in refusal(partial(load_cell, SCENES, ["--config.tower.checkpoint="]))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_an_image_processor_must_agree_with_the_row(
    file: str, towers: dict[str, Path], tmp_path: Path
) -> None:
    path, size = copy(towers["tiny-clip"], tmp_path / "tower"), ROWS["tiny-clip"]

    def write(**changes: Any) -> None:
        entry = processor_config(ImageProcessor.of(24, size.mean, size.std, "crop")) | changes
        nested = file == "processor_config.json"
        (path / file).write_text(json.dumps({"image_processor": entry} if nested else entry))

    write()
    load_tower(path, "tiny-clip")  # that it crops and the config resizes is the config's choice
    for key, value, shown in (
        ("image_mean", [0.4, 0.5, 0.5], "image_mean (0.4, 0.5, 0.5)"),
        ("image_std", [0.5, 0.5, 0.5], "image_std (0.5, 0.5, 0.5)"),
        ("crop_size", {"height": 30, "width": 30}, "size (30, 30)"),
        ("do_normalize", False, "do_normalize False"),
        ("do_rescale", False, "rescale_factor 1.0"),
    ):
        write(**{key: value})
        said = refusal(lambda: load_tower(path, "tiny-clip"))
        assert f"has {shown}, but tower.name=tiny-clip has" in said
    (path / file).write_text('{"processor_class": "CLIPProcessor"}')
    if file == "processor_config.json":
        load_tower(path, "tiny-clip")  # says nothing about pictures
    else:
        assert "image_processor_type" in refusal(lambda: load_tower(path, "tiny-clip"))


@pytest.mark.parametrize(
    "needs", [LEVELS, PROBE | {"levels", "keys", "mean_attention", "stack"}], ids=["levels", "everything"]
)
def test_batches_are_bounded_by_the_towers_activations(needs: frozenset[str]) -> None:
    assert batch_size(TOWERS["scenes-48"], frozenset()) == batch_size(TOWERS["scenes-48"], LEVELS) == 256
    name = "siglip-so400m-patch14-384"
    together = batch_size(TOWERS[name], needs)
    assert together > 1
    size = TOWERS[name]
    params = nn.meta.unbox(abstract_tower(size, (size.num_layers,), probe=True))
    pixels = jax.ShapeDtypeStruct((together, size.image_size, size.image_size, 3), jnp.float32)
    program = jax.jit(partial(tower_features, size, needs=needs)).lower(params, pixels).compile()
    used = program.memory_analysis()
    assert 2**27 < used.temp_size_in_bytes + used.output_size_in_bytes < 2**30
