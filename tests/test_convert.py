"""Models out to Hugging Face directories and back: same tensors, same numbers, same answers."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.pretrained import (
    DECODERS,
    LLAVAS,
    TOWERS,
    load_decoder,
    load_whole,
    make_decoder,
    make_llava,
    opened,
    rewrite,
    same,
    save_decoder,
    save_llava,
    save_photo,
    save_tower,
    tensors_of,
)
from vlmscale.cli import main
from vlmscale.convert import convert_directory
from vlmscale.errors import UserError
from vlmscale.weights import export, hf_config, tables, tree
from vlmscale.weights.checkpoint import open_checkpoint

Llava = transformers.LlavaForConditionalGeneration
Directories = Callable[[str], Path]
PROMPT = "USER: <image>\nwhat is this thing? ASSISTANT:"


def llava_logits(model: Any, tokens: int) -> torch.Tensor:
    """Of a prompt with a random picture that takes so many tokens."""
    rng = torch.Generator().manual_seed(1)
    side = model.config.vision_config.image_size
    pixels = torch.randn((1, 3, side, side), generator=rng).to(model.dtype)
    ids = torch.tensor([[5, *[model.config.image_token_id] * tokens, 9, 17, 30]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is not square."""
    return save_photo(tmp_path_factory.mktemp("photo") / "PHOTO.jpg")


@pytest.fixture(scope="module")
def llavas(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Directories of the tiny LLaVAs, each made once."""

    @functools.cache
    def of(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        save_llava(name, directory)
        return directory

    return of


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    """A decoder's directory."""
    save_decoder("llama-plain-untied", tmp_path / "llm")
    return tmp_path / "llm"


# Parameters in, parameters out.


@pytest.mark.parametrize("layout", ["scan", "loop"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_comes_back_the_same(name: str, layout: str, tmp_path: Path) -> None:
    model = make_decoder(name)
    model.save_pretrained(tmp_path / "in")
    size, params, _ = load_decoder(tmp_path / "in", layout)
    config = hf_config.decoder_config(size, size.vocab_size)
    export.write_directory(tmp_path / "out", config, export.decoder_tensors(params), {})
    back = opened(transformers.AutoModelForCausalLM, tmp_path / "out")
    same(model.state_dict(), back.state_dict())
    ids = torch.arange(12)[None] * 5
    with torch.no_grad():
        assert torch.equal(model(ids).logits, back(ids).logits)
    assert load_decoder(tmp_path / "out", layout)[0] == size
    assert tree.sha256(load_decoder(tmp_path / "out", layout)[1]) == tree.sha256(params)


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_comes_back_the_same(name: str, tmp_path: Path) -> None:
    model = save_tower(name, tmp_path / "in")
    described, params = load_whole(tmp_path / "in")
    config = hf_config.tower_config(described.tower, export.num_blocks(params))
    export.write_directory(tmp_path / "out", config, export.tower_tensors(params, described.tower.style), {})
    back = opened(getattr(transformers, f"{name}VisionModel"), tmp_path / "out")
    pixels = torch.randn((2, 3, 60, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = [m(pixels, output_hidden_states=True).hidden_states for m in (model, back)]
    assert len(states[0]) == len(states[1]) == 4
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    assert tree.sha256(load_whole(tmp_path / "out")[1]) == tree.sha256(params)


@pytest.mark.parametrize("name", LLAVAS)
def test_a_llava_comes_back_the_same_and_answers_the_same(
    name: str, llavas: Directories, tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = llavas(name), tmp_path / "out"
    described, params = load_whole(source)
    config = export.llava_export_config(described.llava, export.num_blocks(params["tower"]))
    beside = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
    tensors = export.llava_tensors(params, described.tower.style)
    export.write_directory(out, config, tensors, {file: source / file for file in beside})
    one, other = make_llava(name), opened(Llava, out)
    tokens = described.llava.visual_tokens
    assert torch.equal(llava_logits(one, tokens), llava_logits(other, tokens))
    assert load_whole(out)[0].llava == described.llava
    assert tree.sha256(load_whole(out)[1]) == tree.sha256(params)

    processor = transformers.AutoProcessor.from_pretrained(out, backend="pil")
    inputs = processor(images=Image.open(photo), text=PROMPT, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    said = [
        m.generate(**inputs, do_sample=False, max_new_tokens=12)[0, length:].tolist() for m in (one, other)
    ]
    words = ["--model", str(out), "--image", str(photo), "--prompt", PROMPT, "--max-new-tokens", "12"]
    capsys.readouterr()
    assert main(["generate", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == said[0] == said[1]


def test_one_tensor_is_on_the_host_at_a_time() -> None:
    """Layers that are stacked leave one by one, and what was handed out is not kept."""
    layers, side = 16, 256
    stacked = {"layers": {"up": {"weight": jax.numpy.ones((layers, side, side))}}}
    jax.block_until_ready(stacked)
    tracemalloc.start()
    names = [name for name, array in export.tensors_of(stacked, tables.DECODER) if array.nbytes]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers)]
    assert peak < 4 * side * side * 4


def test_an_unknown_parameter_is_not_left_out_in_silence() -> None:
    with pytest.raises(ValueError, match="parameter layers/extra"):
        list(export.decoder_tensors({"layers": {"extra": np.ones(2)}}))


# Directories in, directories out.


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", LLAVAS)
def test_a_whole_llava_is_copied_or_cast(
    name: str, dtype: str | None, llavas: Directories, tmp_path: Path
) -> None:
    source, out = llavas(name), tmp_path / "out"
    (source / "secret.py").write_text("x")
    (source / "pytorch_model.bin").write_text("x")
    words = ["--dtype", dtype] if dtype else []
    assert main(["convert", "--model", str(source), "--out", str(out), *words]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} - {
        "secret.py",
        "pytorch_model.bin",
    }
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "generation_config.json",
    ):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    wanted, model = Llava.from_pretrained(source, dtype=dtype or "float32").eval(), opened(Llava, out)
    if dtype:
        config = json.loads((out / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            assert part["dtype"] == part["torch_dtype"] == "bfloat16"
    else:
        assert (out / "config.json").read_text() == (source / "config.json").read_text()
    same(wanted.state_dict(), model.state_dict())
    assert model.dtype == wanted.dtype == (torch.bfloat16 if dtype else torch.float32)
    tokens = load_whole(source)[0].llava.visual_tokens
    assert torch.equal(llava_logits(wanted, tokens), llava_logits(model, tokens))
    tied = model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()
    assert tied == LLAVAS[name][-1] == (not any("lm_head" in key for key in open_checkpoint(out).tensors))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", LLAVAS)
def test_a_llava_comes_apart(name: str, dtype: str | None, llavas: Directories, tmp_path: Path) -> None:
    whole = Llava.from_pretrained(llavas(name), dtype=dtype or "float32").eval()
    for part in ("llm", "tower"):
        convert_directory(llavas(name), tmp_path / part, part, dtype)
        config = json.loads((tmp_path / part / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == (dtype or "float32")

    llm = opened(transformers.AutoModelForCausalLM, tmp_path / "llm")
    same(whole.model.language_model.state_dict(), llm.model.state_dict())
    assert torch.equal(whole.lm_head.weight, llm.lm_head.weight)
    assert llm.config.tie_word_embeddings == LLAVAS[name][-1]
    assert llm.config.eos_token_id == llm.generation_config.eos_token_id == 1
    ids = torch.tensor([[5, 9, 17, 30]])
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, llm(ids).logits)
    files = {path.name for path in (tmp_path / "llm").iterdir()}
    assert files >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert not files & {"processor_config.json", "preprocessor_config.json"}

    style = LLAVAS[name][0]
    tower = opened(getattr(transformers, f"{style}VisionModel"), tmp_path / "tower")
    same(whole.model.vision_tower.state_dict(), tower.state_dict())  # with the norm and the pooling head
    assert {path.name for path in (tmp_path / "tower").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    pictures = [
        transformers.AutoImageProcessor.from_pretrained(directory, backend="pil").to_dict()
        for directory in (llavas(name), tmp_path / "tower")
    ]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", TOWERS)
def test_a_model_with_a_text_half_is_copied_whole_or_gives_its_tower(name: str, tmp_path: Path) -> None:
    model = save_tower(name, tmp_path / "in", text=True)
    convert_directory(tmp_path / "in", tmp_path / "all", "all", None)
    same(model.state_dict(), opened(getattr(transformers, f"{name}Model"), tmp_path / "all").state_dict())
    report, _ = convert_directory(tmp_path / "in", tmp_path / "tower", "tower", None)
    assert any(tensor.startswith("text_model.") for tensor in report.not_needed)
    tower = opened(getattr(transformers, f"{name}VisionModel"), tmp_path / "tower")
    same(model.vision_model.state_dict(), tower.state_dict())


def test_a_bare_decoder_and_tower_are_copied_from_shards(tmp_path: Path) -> None:
    decoder, _ = save_decoder("qwen3-grouped-tied", tmp_path / "one")
    decoder.save_pretrained(tmp_path / "decoder", max_shard_size="20KB")
    tower = save_tower("CLIP", tmp_path / "two")
    tower.save_pretrained(tmp_path / "tower", max_shard_size="20KB")
    for model, name in ((decoder, "decoder"), (tower, "tower")):
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 2
        convert_directory(tmp_path / name, tmp_path / f"{name}-out", "all", None)
        assert not list((tmp_path / f"{name}-out").glob("model-*"))
        same(model.state_dict(), opened(type(model), tmp_path / f"{name}-out").state_dict())


def test_names_of_older_files_are_understood(llavas: Directories, tmp_path: Path) -> None:
    """`vision_model.` in front of a LLaVA's tower, a stored buffer, and a head although it is tied."""
    new, old = llavas("siglip-qwen2"), tmp_path / "old"
    with open_checkpoint(new) as checkpoint:
        arrays = {
            name.replace("vision_tower.", "vision_tower.vision_model."): checkpoint.read(name)
            for name in checkpoint.tensors
        }
    arrays["vision_tower.vision_model.embeddings.position_ids"] = np.arange(16)[None]
    arrays["language_model.lm_head.weight"] = arrays["language_model.model.embed_tokens.weight"]
    old.mkdir()
    shutil.copyfile(new / "config.json", old / "config.json")
    tree.save(old / "model.safetensors", arrays, {"format": "pt"})
    for part in ("llm", "tower"):
        convert_directory(old, tmp_path / part, part, None)
    whole = opened(Llava, new)
    tower = opened(transformers.SiglipVisionModel, tmp_path / "tower")
    same(whole.model.vision_tower.state_dict(), tower.state_dict())
    tensors = open_checkpoint(tmp_path / "tower").tensors
    assert all(key.startswith("vision_model.") for key in tensors), "transformers 4 knows no other names"
    assert not any("position_ids" in key for key in tensors)
    llm = opened(transformers.AutoModelForCausalLM, tmp_path / "llm")
    same(whole.model.language_model.state_dict(), llm.model.state_dict())
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "llm").tensors


def test_a_part_that_stands_alone_is_written_whole(tmp_path: Path) -> None:
    save_decoder("llama-plain-untied", tmp_path / "llm")
    save_tower("CLIP", tmp_path / "tower")
    for part in ("llm", "tower"):
        convert_directory(tmp_path / part, tmp_path / "out" / part, part, None)
        for path in (tmp_path / part).iterdir():
            assert (tmp_path / "out" / part / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UserError, match="is a decoder alone"):
        convert_directory(tmp_path / "llm", tmp_path / "new", "tower", None)


def test_what_is_not_copied_is_named(llm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copied = ("spiece.model", "additional_chat_templates/rag.jinja", "README.md")
    left = ("video_preprocessor_config.json", "modeling.py", "pytorch_model.bin", "original/params.json")
    for name in (*copied, *left, ".gitattributes", ".cache/x"):
        (llm / name).parent.mkdir(exist_ok=True)
        (llm / name).write_text(name)
    report, written = convert_directory(llm, out, "all", None)
    assert report.not_copied == [
        "modeling.py",
        "original/",
        "pytorch_model.bin",
        "video_preprocessor_config.json",
    ]
    for name in copied:
        assert out / name in written
        assert (out / name).read_text() == name
    assert sorted(written) == sorted(path for path in out.rglob("*") if path.is_file())
    assert convert_directory(out, tmp_path / "again", "all", None)[0].not_copied == []


def test_shards_count_as_copied_and_a_part_names_nothing(llavas: Directories, tmp_path: Path) -> None:
    model, _ = save_decoder("llama-plain-untied", tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert convert_directory(tmp_path / "shards", tmp_path / "out", "all", None)[0].not_copied == []
    (llavas("clip-llama") / "notes.txt").write_text("x")
    assert convert_directory(llavas("clip-llama"), tmp_path / "tower", "tower", None)[0].not_copied == []


@pytest.mark.parametrize(
    "name, said",
    [
        ("README.md", "has README.md already; remove it or"),
        ("LICENSE", "has LICENSE already; remove it or"),
        ("config.json", "has config.json already; remove it or"),
        ("additional_chat_templates/rag.jinja", "has additional_chat_templates/rag.jinja already"),
        ("model.safetensors.index.json", "has model.safetensors.index.json already"),
        ("pytorch_model.bin", "has pytorch_model.bin already"),
        ("model.fp16.safetensors", "has model.fp16.safetensors already"),
        ("spec.json", "is a run (it has spec.json)"),
    ],
)
def test_files_of_others_are_never_touched(name: str, said: str, llm: Path, tmp_path: Path) -> None:
    for beside in ("README.md", "LICENSE", "additional_chat_templates/rag.jinja"):
        (llm / beside).parent.mkdir(exist_ok=True)
        (llm / beside).write_text("of the model")
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        convert_directory(llm, tmp_path / "out", "all", None)
    assert f"{tmp_path / 'out'}: {said}" in str(caught.value)
    assert "name another directory" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert mine.read_text() == "mine"


def test_a_directory_with_other_files_is_taken(llm: Path, tmp_path: Path) -> None:
    notes = tmp_path / "out" / "README.md"  # the model has none
    notes.parent.mkdir()
    notes.write_text("mine")
    convert_directory(llm, tmp_path / "out", "all", None)
    assert notes.read_text() == "mine"


def test_a_killed_export_says_what_to_remove(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dead:
        dead.setattr(os, "fsync", killed)
        dead.setattr(Path, "unlink", lambda *_, **__: None)  # the dead clean nothing up
        dead.setattr(Path, "rmdir", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            convert_directory(llm, out, "all", None)
    left = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert left == {path.name for path in llm.iterdir()} - {"model.safetensors"}
    with pytest.raises(UserError, match="the rest of an export that was killed; remove ") as caught:
        convert_directory(llm, out, "all", None)
    named = str(caught.value).split("; remove ")[1].removesuffix(", or name another directory").split(", ")
    assert set(named) == left
    for name in named:
        (out / name).unlink()
    assert list(out.glob(".model-*.tmp")), "of the weights, and no hindrance"
    convert_directory(llm, out, "all", None)
    assert {path.name for path in out.iterdir()} == {path.name for path in llm.iterdir()}


@pytest.mark.filterwarnings("error")
def test_numbers_too_large_for_float16_are_refused(
    llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tensors_of(llm)
    tensors["model.norm.weight"][3:5] = 1e6, np.inf  # an infinity that was there stays one
    large, out = rewrite(llm, tmp_path / "large", tensors), tmp_path / "out"
    said = "tensor model.norm.weight does not fit float16 (largest 1e+06); take bfloat16"
    words = ["convert", "--model", str(large), "--out", str(out), "--dtype"]
    assert main([*words, "float16"]) == 2
    assert capsys.readouterr().err == f"vlmscale convert: {said}\n"
    assert not out.exists()
    assert main([*words, "bfloat16"]) == 0
    assert tensors_of(out)["model.norm.weight"].astype(np.float32)[4] == np.inf

    tensors["model.norm.weight"][3] = 65504  # the largest that fits
    mine = tmp_path / "mine"
    (mine / "notes").mkdir(parents=True)
    convert_directory(rewrite(llm, tmp_path / "fits", tensors), tmp_path / "half", "all", "float16")
    assert tensors_of(tmp_path / "half")["model.norm.weight"][3:5].tolist() == [65504, np.inf]
    with pytest.raises(UserError, match="does not fit"):
        convert_directory(large, mine, "all", "float16")
    assert [path.name for path in mine.iterdir()] == ["notes"]

    tensors["model.norm.weight"] = np.full(32, 3.4e38, np.float32)
    with pytest.raises(UserError, match=r"fit bfloat16 \(largest 3\.4e\+38\); keep the type"):
        convert_directory(rewrite(llm, tmp_path / "huge", tensors), tmp_path / "no", "all", "bfloat16")


def test_bad_use_is_one_line(
    llavas: Directories, llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tower("CLIP", tmp_path / "tower")
    save_tower("CLIP", tmp_path / "both", text=True)
    llava, file, new = str(llavas("clip-llama")), tmp_path / "file", str(tmp_path / "new")
    file.write_text("x")
    gone = tmp_path / "link"
    gone.symlink_to("nowhere")
    cases = [
        (["--model", llava, "--out", llava], "model.safetensors"),
        (["--model", llava, "--out", str(file)], f"{file}: is a file"),
        (["--model", llava, "--out", str(file / "below")], f"{file}: is a file"),
        (["--model", llava, "--out", str(gone)], f"{gone}: is a link to nothing (nowhere); remove it or"),
        (["--model", llava, "--out", str(gone / "below")], f"{gone}: is a link to nothing"),
        (["--model", str(llm), "--out", new, "--part", "tower"], "is a decoder alone"),
        (["--model", str(tmp_path / "tower"), "--out", new, "--part", "llm"], "is a tower alone"),
        (["--model", str(tmp_path / "both"), "--out", new, "--part", "llm"], "has no LLM"),
        (["--model", str(tmp_path / "absent"), "--out", new], "no such directory"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, said in cases:
        capsys.readouterr()
        assert main(["convert", *words]) == 2, words
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlmscale")]
        assert len(err) == 1
        assert said in err[0]
    assert sorted(tmp_path.rglob("*")) == before
