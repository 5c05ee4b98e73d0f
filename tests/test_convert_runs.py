"""Trained runs out to Hugging Face directories: transformers gives the run's numbers and answers."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import shutil
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
from tests.pretrained import load_whole, opened, same, save_photo
from vlmscale import model_card
from vlmscale.cli import main
from vlmscale.compressors.features import tower_features
from vlmscale.config import CompressorConfig
from vlmscale.convert import export_run
from vlmscale.data.conversation import expand
from vlmscale.data.images import decode_image
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import prompt_batch
from vlmscale.evaluate.loaded import LoadedRun, answer_one, load_run
from vlmscale.models.sizes import TOWERS
from vlmscale.train.frozen import load_tower
from vlmscale.train.prepared import pixels_of
from vlmscale.train.state import boxed_params
from vlmscale.train.step import build_model, model_inputs
from vlmscale.weights import tree

Llava = transformers.LlavaForConditionalGeneration
Runs = Callable[[str], Path]
ASKED, QUESTION = "What is this?", "How many are red?"  # in README.md; one that has an answer
RUNS = {  # compressor, tokens, how pictures are prepared
    "pool": ("pool", 4, "resize"),
    "mlp": ("mlp", 64, "pad"),
    "blind": ("pool", 0, "resize"),
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is not square."""
    return save_photo(tmp_path_factory.mktemp("photo") / "PHOTO.jpg")


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


def our_logits(run: LoadedRun, image: Path) -> np.ndarray:
    """Of each token behind the picture of a prompt, by the model that evaluation builds."""
    template, slots = run.prepared.template, run.cell.compressor.visual_tokens
    ids = template.prompt(f"<image>\n{QUESTION}")
    length, size = len(ids) - 1 + slots, TOWERS[run.cell.tower.name]
    pixels = pixels_of(decode_image(image, target=size.image_size), run.cell)[None]
    batch: dict[str, Any] = prompt_batch([ids], template, slots, length)
    batch["positions"] = np.arange(length)[None]
    batch["segment_ids"] = batch["valid"].astype(np.int32)
    batch["target_positions"] = batch["positions"][:, 1 + slots :]
    tower = load_tower(run.prepared.path / "tower.safetensors", run.cell.tower.name)
    batch |= tower_features(size, tower, jax.numpy.asarray(pixels), frozenset())
    model = build_model(run.cell, run.prepared.tokenizer.get_vocab_size(), "loop")
    return np.asarray(model.apply({"params": run.params}, model_inputs(batch), batch["target_positions"]))


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
    wanted = answer_one(run, photo, QUESTION).text + "\n"
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
    wanted_ids, _ = expand(np.array(template.prompt(f"<image>\n{QUESTION}")), slots, template.image)
    assert ids == wanted_ids.tolist()
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
    described, params = load_whole(out)
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


@pytest.fixture(scope="module")
def parts(exported: Callable[[str], tuple[LoadedRun, Path]]) -> LoadedRun:
    """A run whose compressor was exchanged for one with random numbers, which saves a training."""
    run, _ = exported("pool")
    cell = dataclasses.replace(run.cell, compressor=CompressorConfig("tokenpacker", 4))
    rng = np.random.default_rng(0)
    shapes = boxed_params(build_model(cell, run.prepared.vocab_rows(cell)))["compressor"]
    drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), nn.meta.unbox(shapes))
    return dataclasses.replace(run, cell=cell, params=run.params | {"compressor": drawn})


def test_a_run_with_another_compressor_is_its_parts(
    parts: LoadedRun,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run, out = parts, tmp_path / "out"
    export_run(run, out, None)
    names = follow(out, photo, monkeypatch)
    opened(transformers.AutoModelForCausalLM, out / "llm")
    opened(transformers.SiglipVisionModel, out / "tower")
    assert tree.sha256(tree.load(out / "compressor.safetensors")) == tree.sha256(run.params["compressor"])
    assert tree.sha256(load_whole(out / "llm")[1]) == tree.sha256(run.params["decoder"])
    assert names["compressor"].keys() == tree.flatten(run.params["compressor"]).keys()
    text = (out / "README.md").read_text()
    assert "compressor `tokenpacker`" in text
    assert "4 times" in text

    processor = transformers.AutoImageProcessor.from_pretrained(out / "tower", backend="pil")
    pixels = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = names["tower"](pixels, output_hidden_states=True).hidden_states
    weights = load_tower(run.prepared.path / "tower.safetensors", run.cell.tower.name)
    channels_last = jax.numpy.asarray(pixels.numpy().transpose(0, 2, 3, 1))
    wanted = tower_features(TOWERS[run.cell.tower.name], weights, channels_last, frozenset({"levels"}))
    assert "reads number 4 of its `hidden_states`; numbers 1, 2, 3, 4 side by" in text
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
    assert tree.sha256(load_whole(out)[1]) == tree.sha256(run.params["decoder"])
    wanted = answer_one(run, None, QUESTION).text + "\n"
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


@pytest.mark.parametrize(
    "name, said",
    [
        ("README.md", "has README.md already"),
        ("compressor.safetensors", "has compressor.safetensors already"),
        ("llm/tokenizer.json", "has llm/tokenizer.json already"),
        ("tower/pytorch_model.bin", "has tower/pytorch_model.bin already"),
        ("llm", "llm: is a file"),
        ("spec.json", "is a run"),
    ],
)
def test_parts_are_written_over_nothing(name: str, said: str, parts: LoadedRun, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        export_run(parts, tmp_path, None)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / name).read_text() == "mine"


def test_parts_that_fail_leave_nothing(
    parts: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    large = jax.tree.map(lambda leaf: leaf * 1e6, parts.params["compressor"])
    with pytest.raises(UserError, match=r"does not fit float16 .*; take bfloat16"):
        export_run(dataclasses.replace(parts, params=parts.params | {"compressor": large}), out, "float16")
    assert not out.exists()

    def full(_: LoadedRun) -> str:
        assert (out / "tower" / "model.safetensors").exists()
        raise OSError("full")

    monkeypatch.setattr(model_card, "of_parts", full)
    with pytest.raises(OSError, match="full"):
        export_run(parts, out, None)
    assert not out.exists()
    monkeypatch.undo()
    assert sorted(export_run(parts, out, None)) == sorted(path for path in out.rglob("*") if path.is_file())


def test_bad_use_is_one_line(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file, taken = str(runs("blind")), tmp_path / "file", tmp_path / "taken"
    file.write_text("x")
    taken.mkdir()
    (taken / "README.md").write_text("mine")
    (taken / "model.safetensors").write_text("mine")
    cases = [
        (["--out", run], f"{run}: is a run (it has spec.json)"),
        (["--out", str(taken)], "has README.md, model.safetensors already; remove them or name"),
        (["--out", str(file)], f"{file}: is a file"),
        (["--out", str(tmp_path / "new"), "--part", "tower"], "--part tower: goes with --model"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, said in cases:
        capsys.readouterr()
        assert main(["convert", "--run", run, *words]) == 2, words
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlmscale")]
        assert len(err) == 1
        assert said in err[0]
    assert sorted(tmp_path.rglob("*")) == before
