"""Models out to Hugging Face directories and back: same tensors, same numbers, same answers."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from PIL import Image

from tests.integration.tiny import train
from tests.pretrained import (
    DECODERS,
    LLAVAS,
    TOWERS,
    load_decoder,
    make_decoder,
    make_llava,
    save_decoder,
    save_llava,
    save_tower,
)
from vlmscale.cli import main
from vlmscale.compressors import COMPRESSORS
from vlmscale.config import CompressorConfig
from vlmscale.convert import convert_directory, export_run
from vlmscale.data.images import decode_image
from vlmscale.evaluate.generation import prompt_batch
from vlmscale.evaluate.runner import LoadedRun, abstract_params, answer_one, load_run
from vlmscale.models.sizes import TOWERS as TOWER_SIZES
from vlmscale.sharding import make_mesh
from vlmscale.train.prepared import encode_images, load_tower, pixels_of
from vlmscale.train.step import build_model, model_inputs
from vlmscale.weights import export, hf_config, tables, tree
from vlmscale.weights.checkpoint import open_checkpoint
from vlmscale.weights.directory import load_directory

Llava = transformers.LlavaForConditionalGeneration
Runs = Callable[[str], Path]
ASKED, QUESTION = "What is this?", "How many are red?"  # in README.md; one that has an answer
PROMPT = "USER: <image>\nwhat is this thing? ASSISTANT:"
RUNS = {  # compressor, tokens, how pictures are prepared
    "pool": ("pool", 4, "resize"),
    "mlp": ("mlp", 64, "pad"),
    "blind": ("pool", 0, "resize"),
}


def opened(model_class: Any, directory: Path) -> Any:
    """What transformers makes of a directory, with nothing missing and nothing left over."""
    model, info = model_class.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def ours(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Description and parameters of a directory, all blocks of its tower among them."""
    mesh = make_mesh(devices=jax.devices()[:1])
    described, params, _ = load_directory(directory, mesh, whole_tower=True)
    return described, params


def same(ones: Any, others: Any) -> None:
    """Equal state dicts: names, types, bits."""
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name


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
    """A noisy gradient that is not square."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, 131)[None, :, None] + np.linspace(0, 55, 60)[:, None, None]
    pixels = np.clip(slope + rng.normal(0, 25, (60, 131, 3)), 0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "PHOTO.jpg"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def llavas(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Directories of the tiny LLaVAs, each made once."""

    @functools.cache
    def of(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        save_llava(name, directory)
        return directory

    return of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trained runs, each made once; long enough that answers are words."""

    @functools.cache
    def of(name: str) -> Path:
        compressor, tokens, mode = RUNS[name]
        out = tmp_path_factory.mktemp(f"run-{name}") / "run"
        words = [f"compressor.name={compressor}", f"compressor.visual_tokens={tokens}"]
        words += [f"data.image_mode={mode}", "train.learning_rate=0.01"]
        assert train(out, *(f"--config.{word}" for word in words), count=60) == 0
        return out

    return of


@pytest.fixture(scope="module")
def exported(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[LoadedRun, Path]]:
    """Each run with its export, made by the command."""

    @functools.cache
    def of(name: str) -> tuple[LoadedRun, Path]:
        out = tmp_path_factory.mktemp(f"export-{name}") / "model"
        assert main(["convert", "--run", str(runs(name)), "--out", str(out)]) == 0
        return load_run(runs(name)), out

    return of


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
    described, params = ours(tmp_path / "in")
    config = hf_config.tower_config(described.tower, export.num_blocks(params))
    export.write_directory(tmp_path / "out", config, export.tower_tensors(params, described.tower.style), {})
    back = opened(getattr(transformers, f"{name}VisionModel"), tmp_path / "out")
    pixels = torch.randn((2, 3, 60, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = [m(pixels, output_hidden_states=True).hidden_states for m in (model, back)]
    assert len(states[0]) == len(states[1]) == 4
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    assert tree.sha256(ours(tmp_path / "out")[1]) == tree.sha256(params)


@pytest.mark.parametrize("name", LLAVAS)
def test_a_llava_comes_back_the_same_and_answers_the_same(
    name: str, llavas: Runs, tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = llavas(name), tmp_path / "out"
    described, params = ours(source)
    config = export.llava_export_config(described.llava, export.num_blocks(params["tower"]))
    beside = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
    tensors = export.llava_tensors(params, described.tower.style)
    export.write_directory(out, config, tensors, {file: source / file for file in beside})
    one, other = make_llava(name), opened(Llava, out)
    tokens = described.llava.visual_tokens
    assert torch.equal(llava_logits(one, tokens), llava_logits(other, tokens))
    assert ours(out)[0].llava == described.llava
    assert tree.sha256(ours(out)[1]) == tree.sha256(params)

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
def test_a_whole_llava_is_copied_or_cast(name: str, dtype: str | None, llavas: Runs, tmp_path: Path) -> None:
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
    tokens = ours(source)[0].llava.visual_tokens
    assert torch.equal(llava_logits(wanted, tokens), llava_logits(model, tokens))
    tied = model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()
    assert tied == LLAVAS[name][-1] == (not any("lm_head" in key for key in open_checkpoint(out).tensors))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", LLAVAS)
def test_a_llava_comes_apart(name: str, dtype: str | None, llavas: Runs, tmp_path: Path) -> None:
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


def test_names_of_older_files_are_understood(llavas: Runs, tmp_path: Path) -> None:
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


def test_bad_use_is_one_line(
    llavas: Runs, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_decoder("llama-plain-untied", tmp_path / "llm")
    save_tower("CLIP", tmp_path / "tower")
    save_tower("CLIP", tmp_path / "both", text=True)
    llava, file, new = str(llavas("clip-llama")), tmp_path / "file", str(tmp_path / "new")
    file.write_text("x")
    run = str(runs("blind"))
    cases = [
        (["--model", llava, "--out", llava], "has model.safetensors already"),
        (["--run", run, "--out", llava], "has model.safetensors already"),
        (["--model", llava, "--out", str(file)], f"{file}: is a file"),
        (["--run", run, "--out", str(file)], f"{file}: is a file"),
        (["--model", llava, "--out", str(file / "below")], str(file / "below")),
        (["--model", str(tmp_path / "llm"), "--out", new, "--part", "llm"], "is a decoder alone"),
        (["--model", str(tmp_path / "tower"), "--out", new, "--part", "tower"], "is a tower alone"),
        (["--model", str(tmp_path / "both"), "--out", new, "--part", "llm"], "has no LLM"),
        (["--run", run, "--out", new, "--part", "tower"], "--part tower: goes with --model"),
        (["--model", str(tmp_path / "absent"), "--out", new], "no such directory"),
    ]
    before = sorted(path for path in tmp_path.rglob("*"))
    for words, said in cases:
        capsys.readouterr()
        assert main(["convert", *words]) == 2, words
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlmscale")]
        assert len(err) == 1
        assert said in err[0]
    assert sorted(path for path in tmp_path.rglob("*")) == before


# Runs out.


def our_logits(run: LoadedRun, image: Path) -> np.ndarray:
    """Of each token behind the picture of a prompt, by the model that evaluation builds."""
    template, slots = run.prepared.template, run.cell.compressor.visual_tokens
    ids = template.prompt(QUESTION)
    size = TOWER_SIZES[run.cell.tower.name]
    pixels = pixels_of(decode_image(image, target=size.image_size), run.cell)[None]
    batch: dict[str, Any] = prompt_batch([ids], [True], template, slots, len(ids) + slots)
    batch["positions"] = np.arange(len(ids) + slots)[None]
    batch["segment_ids"] = batch["valid"].astype(np.int32)
    batch["target_positions"] = batch["positions"][:, 1 + slots :]
    tower = load_tower(run.prepared.path / "tower.safetensors", run.cell.tower.name)
    levels = COMPRESSORS[run.cell.compressor.name].needs_levels
    batch |= encode_images(run.cell.tower.name, tower, jax.numpy.asarray(pixels), levels)
    model = build_model(run.cell, run.prepared.tokenizer.get_vocab_size(), "loop")
    return np.asarray(model.apply({"params": run.params}, *model_inputs(batch)))


def snippets(directory: Path, language: str) -> list[str]:
    """The code blocks of a README.md."""
    text = (directory / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def follow(directory: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the README.md's Python where it says, and return its names."""
    monkeypatch.chdir(directory)
    if not (directory / "PHOTO.jpg").exists():
        shutil.copyfile(image, directory / "PHOTO.jpg")
    [code] = snippets(directory, "python")
    assert ASKED in code or not (directory / "config.json").exists()
    code = code.replace(ASKED, QUESTION)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("name", ["pool", "mlp"])
def test_a_run_is_a_llava_with_the_same_numbers(
    name: str,
    exported: Callable[[str], tuple[LoadedRun, Path]],
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = exported(name)
    opened(Llava, out)
    slots = run.cell.compressor.visual_tokens
    capsys.readouterr()
    names = follow(out, photo, monkeypatch)
    wanted = answer_one(run, photo, QUESTION) + "\n"
    assert capsys.readouterr().out == wanted
    assert wanted.strip(), "an empty answer would show little"
    [command] = snippets(out, "bash")
    assert main(shlex.split(command.replace(ASKED, QUESTION))[1:]) == 0
    assert capsys.readouterr().out == wanted

    inputs = names["processor"](
        images=Image.open(photo), text=f"<|user|><|image|>{QUESTION}<|assistant|>", return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    template = run.prepared.template
    assert ids == [template.user, *[template.image] * slots, *template.prompt(QUESTION)[1:]]
    with torch.no_grad():
        theirs = names["model"](**inputs).logits[0, 1 + slots :].numpy()
    np.testing.assert_allclose(theirs, our_logits(run, photo)[0], atol=1e-4, rtol=0)
    text = (out / "README.md").read_text()
    assert f"compressor `{name}`" in text
    assert f"takes {slots} tokens" in text


@pytest.mark.parametrize("name", ["pool", "mlp"])
def test_a_run_comes_back_the_same_and_says_the_same(
    name: str,
    exported: Callable[[str], tuple[LoadedRun, Path]],
    photo: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = exported(name)
    described, params = ours(out)
    assert described.llava.compressor == name
    assert described.llava.visual_tokens == run.cell.compressor.visual_tokens
    for part in ("decoder", "compressor"):
        assert tree.sha256(params[part]) == tree.sha256(run.params[part])
    shipped = load_tower(run.prepared.path / "tower.safetensors", run.cell.tower.name)
    assert tree.sha256(params["tower"]) == tree.sha256(shipped)

    longest = str(run.cell.evaluate.max_new_tokens)
    words = ["--image", str(photo), "--max-new-tokens", longest, "--prompt"]
    capsys.readouterr()
    assert main(["generate", "--run", str(run.path), *words, QUESTION]) == 0
    wanted = capsys.readouterr().out
    assert main(["generate", "--model", str(out), *words, f"<|user|><|image|>{QUESTION}<|assistant|>"]) == 0
    assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("mode", ["resize", "pad", "crop"])
def test_pictures_are_prepared_as_in_the_run(
    mode: str, exported: Callable[[str], tuple[LoadedRun, Path]], photo: Path, tmp_path: Path
) -> None:
    run, _ = exported("pool")
    changed = dataclasses.replace(run.cell.data, image_mode=mode)
    run = dataclasses.replace(run, cell=dataclasses.replace(run.cell, data=changed))
    export_run(run, tmp_path / "out", None)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    theirs = processor(Image.open(photo), return_tensors="np")["pixel_values"][0]
    wanted = pixels_of(decode_image(photo, target=48), run.cell)
    np.testing.assert_allclose(theirs.transpose(1, 2, 0), wanted, atol=1e-6)


def test_a_run_with_another_compressor_is_its_parts(
    exported: Callable[[str], tuple[LoadedRun, Path]],
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A run whose compressor was exchanged for one with random numbers, which saves a training."""
    run, _ = exported("pool")
    cell = dataclasses.replace(run.cell, compressor=CompressorConfig("tokenpacker", 4))
    rng = np.random.default_rng(0)
    shapes = abstract_params(cell, run.prepared.tokenizer.get_vocab_size())["compressor"]
    drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), nn.meta.unbox(shapes))
    run = dataclasses.replace(run, cell=cell, params=run.params | {"compressor": drawn})
    out = tmp_path / "out"
    export_run(run, out, None)
    names = follow(out, photo, monkeypatch)
    opened(transformers.AutoModelForCausalLM, out / "llm")
    opened(transformers.SiglipVisionModel, out / "tower")
    assert tree.sha256(tree.load(out / "compressor.safetensors")) == tree.sha256(run.params["compressor"])
    assert tree.sha256(ours(out / "llm")[1]) == tree.sha256(run.params["decoder"])
    assert names["compressor"].keys() == tree.flatten(run.params["compressor"]).keys()
    text = (out / "README.md").read_text()
    assert "compressor `tokenpacker`" in text
    assert "4 times" in text

    processor = transformers.AutoImageProcessor.from_pretrained(out / "tower", backend="pil")
    pixels = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = names["tower"](pixels, output_hidden_states=True).hidden_states
    weights = load_tower(run.prepared.path / "tower.safetensors", run.cell.tower.name)
    wanted = encode_images(
        run.cell.tower.name, weights, jax.numpy.asarray(pixels.numpy().transpose(0, 2, 3, 1)), True
    )
    assert "reads number 4 of its `hidden_states`, and numbers 1, 2, 3, 4 side by" in text
    np.testing.assert_allclose(hidden[4].numpy(), wanted["selected"], atol=1e-4)
    levels = torch.cat([hidden[i] for i in (1, 2, 3, 4)], -1).numpy()
    np.testing.assert_allclose(levels, wanted["levels"], atol=1e-4)

    export_run(run, tmp_path / "half", "bfloat16")
    half = tree.load(tmp_path / "half" / "compressor.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}
    assert opened(transformers.AutoModelForCausalLM, tmp_path / "half" / "llm").dtype == torch.bfloat16


def test_a_blind_run_is_a_language_model(
    exported: Callable[[str], tuple[LoadedRun, Path]],
    monkeypatch: pytest.MonkeyPatch,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = exported("blind")
    opened(transformers.AutoModelForCausalLM, out)
    assert tree.sha256(ours(out)[1]) == tree.sha256(run.params["decoder"])
    wanted = answer_one(run, None, QUESTION) + "\n"
    capsys.readouterr()
    follow(out, photo, monkeypatch)
    assert capsys.readouterr().out == wanted
    [command] = snippets(out, "bash")
    assert main(shlex.split(command.replace(ASKED, QUESTION))[1:]) == 0
    assert capsys.readouterr().out == wanted
    assert not [path.name for path in out.iterdir() if "processor" in path.name]


def test_a_run_as_bfloat16(exported: Callable[[str], tuple[LoadedRun, Path]], tmp_path: Path) -> None:
    run, out = exported("mlp")
    export_run(run, tmp_path / "half", "bfloat16")
    half = opened(Llava, tmp_path / "half")
    same(opened(Llava, out).to(torch.bfloat16).state_dict(), half.state_dict())
    assert half.dtype == torch.bfloat16
