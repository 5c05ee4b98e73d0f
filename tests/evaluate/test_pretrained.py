"""LLaVA directories as transformers saves them, answered as transformers answers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.pretrained import DECODERS, LLAVAS, save_decoder, save_llava
from vlmscale.cli import main
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import Sampling
from vlmscale.evaluate.pretrained import (
    Pretrained,
    answer,
    generation_settings,
    inference_mesh,
    make_request,
    open_pretrained,
    read_prompter,
)
from vlmscale.models.sizes import DecoderSize
from vlmscale.sharding import make_mesh
from vlmscale.weights import tables
from vlmscale.weights.directory import Description, abstract_decoder

PROMPT = "USER: <image>\nwhat is this thing? ASSISTANT:"
NEW = 24
Opened = Callable[[str], tuple[Path, Any, Any, Pretrained]]


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noisy gradients of odd sizes, as JPEG."""
    rng, made = np.random.default_rng(0), []
    for number, (height, width) in enumerate(((97, 61), (60, 131), (64, 64))):
        slope = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 55, height)[:, None, None]
        pixels = np.clip(slope + rng.normal(0, 25, (height, width, 3)) * (number + 1), 0, 255)
        made.append(tmp_path_factory.mktemp("photos") / f"{number}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(made[-1])
    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Each tiny LLaVA once: directory, their model, their processor, ours."""

    @functools.cache
    def of(name: str) -> tuple[Path, Any, Any, Pretrained]:
        directory = tmp_path_factory.mktemp(name)
        model = save_llava(name, directory)
        processor = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
        return directory, model, processor, open_pretrained(directory, mesh=one_device())

    return of


def reference(
    model: Any, processor: Any, prompts: list[str], photos: list[Path], new: int
) -> list[list[int]]:
    """Ids of each answer, one prompt at a time, and cut behind the stop token."""
    said = []
    for prompt, photo in zip(prompts, photos, strict=True):
        inputs = processor(images=Image.open(photo), text=prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=new)
        said.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return said


@pytest.mark.parametrize("name", LLAVAS)
def test_answers_are_those_of_transformers(name: str, opened: Opened, photos: list[Path]) -> None:
    """Three pictures behind prompts of different lengths in one batch, token for token, and their text."""
    _, model, processor, ours = opened(name)
    prompts = [PROMPT, "<image> so? ASSISTANT:", "USER: a longer one, with <image> in the middle.\n\nYes? A:"]
    wanted = reference(model, processor, prompts, photos, NEW)
    said = answer(ours, prompts, photos, NEW)
    assert [row.token_ids for row in said] == wanted
    assert [row.text for row in said] == processor.batch_decode(wanted, skip_special_tokens=True)
    assert len({tuple(row) for row in wanted}) == 3, "answers that are all the same would show little"


def test_the_picture_and_its_place_matter(opened: Opened, photos: list[Path]) -> None:
    _, _, _, ours = opened("clip-llama")
    first, second = answer(ours, [PROMPT, PROMPT], photos[:2], NEW)
    moved = answer(ours, ["USER: what is this thing? <image>\nASSISTANT:"], photos[:1], NEW)[0]
    assert first != second
    assert first != moved


def test_an_answer_does_not_depend_on_the_batch(opened: Opened, photos: list[Path]) -> None:
    _, _, _, ours = opened("clip-llama")
    together = answer(ours, [PROMPT, "no picture here", PROMPT], [photos[0], None, photos[1]], NEW)
    assert together[0] == answer(ours, [PROMPT], [photos[0]], NEW)[0]
    assert together[1] == answer(ours, ["no picture here"], [None], NEW)[0]


def test_on_eight_devices_the_answer_is_the_same(opened: Opened, photos: list[Path]) -> None:
    directory, _, _, ours = opened("siglip-qwen2")
    spread = open_pretrained(directory, mesh=make_mesh(2, 2, 2))
    leaf = spread.params["decoder"]["layers_0"]["up"]["weight"]
    assert leaf.addressable_shards[0].data.size == leaf.size // 4
    assert answer(spread, [PROMPT] * 2, photos[:2], NEW) == answer(ours, [PROMPT] * 2, photos[:2], NEW)


def test_sampling_is_seeded_and_differs(opened: Opened, photos: list[Path]) -> None:
    _, _, _, ours = opened("clip-llama")

    def sampled(seed: int) -> list[int]:
        return answer(ours, [PROMPT], photos[:1], 12, Sampling(1.5, 0.95), seed)[0].token_ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_the_command_prints_text_and_ids(opened: Opened, photos: list[Path], capsys: Any) -> None:
    """With \\n spelt as two characters, which is what a shell's double quotes leave."""
    directory, _, _, ours = opened("siglip-qwen2")
    escaped = PROMPT.replace("\n", "\\n")
    words = ["generate", "--model", str(directory), "--image", str(photos[0]), "--prompt", escaped]
    assert main([*words, "--max-new-tokens", str(NEW), "--json"]) == 0
    out, err = capsys.readouterr()
    wanted = answer(ours, [PROMPT], photos[:1], NEW)[0]
    assert json.loads(out) == {"prompt": PROMPT, "text": wanted.text, "token_ids": wanted.token_ids}
    assert "loaded" in err
    assert "not needed" in err
    assert main([*words, "--max-new-tokens", str(NEW)]) == 0
    assert capsys.readouterr().out == wanted.text + "\n"


@pytest.mark.parametrize("name", DECODERS)
def test_a_plain_language_model_answers_too(name: str, tmp_path: Path) -> None:
    model, tokenizer = save_decoder(name, tmp_path)
    inputs = tokenizer("what is this thing", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    wanted = out[0, inputs["input_ids"].shape[1] :].tolist()
    ours = open_pretrained(tmp_path, mesh=one_device())
    assert answer(ours, ["what is this thing"], [None], 12)[0].token_ids == wanted


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--prompt", "no placeholder", "--image", "PHOTO"],
            "--prompt has 0 <image> and there is one --image",
        ),
        (["--prompt", "<image> <image>", "--image", "PHOTO"], "--prompt has 2 <image>"),
        (["--prompt", "<image>"], "has 1 <image> and there is no --image"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "<image>", "--image", "absent.jpg"], "absent.jpg"),
        (["--prompt", "<image>", "--image", "PHOTO", "--max-new-tokens", "0"], "--max-new-tokens=0"),
        (
            ["--prompt", "<image>", "--image", "PHOTO", "--max-new-tokens", "9999"],
            "more than the model's context",
        ),
        (["--prompt", "<image>", "--image", "PHOTO", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "<image>", "--image", "PHOTO", "--temperature", "1e-40"], "temperature=1e-40"),
        (["--prompt", "<image>", "--image", "PHOTO", "--top-p", "0", "--temperature", "1"], "top_p=0.0"),
        (["--prompt", "<image>", "--image", "PHOTO", "--seed", "-1", "--temperature", "1"], "--seed=-1"),
        (["--prompt", "<image>", "--image", "PHOTO", "--seed", "1"], "--temperature above 0"),
        (["--prompt", "<image> \udcff", "--image", "PHOTO"], "--prompt is not UTF-8"),
        (["--prompt", "<image>", "--image", "PHOTO", "--attention", "cudnn"], "--attention cudnn: "),
    ],
)
def test_bad_use_is_one_line(
    words: list[str], said: str, opened: Opened, photos: list[Path], capsys: Any
) -> None:
    directory, *_ = opened("clip-llama")
    words = [str(photos[0]) if word == "PHOTO" else word for word in words]
    assert main(["generate", "--model", str(directory), *words]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlmscale")]
    assert len(err) == 1
    assert said in err[0]


@pytest.mark.parametrize("penalty", [1.3, 3.0, 0.8])
def test_a_checkpoints_repetition_penalty_holds_for_greedy_answers_too(
    penalty: float, tmp_path: Path
) -> None:
    model, tokenizer = save_decoder("qwen2-grouped-untied", tmp_path)
    model.generation_config.repetition_penalty = penalty
    model.generation_config.save_pretrained(tmp_path)
    inputs = tokenizer("what is this thing", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    ours = open_pretrained(tmp_path, mesh=one_device())
    assert ours.prompter.repetition_penalty == penalty
    said = answer(ours, ["what is this thing"], [None], 24)[0].token_ids
    assert said == out[0, inputs["input_ids"].shape[1] :].tolist()
    free = dataclasses.replace(ours, prompter=dataclasses.replace(ours.prompter, repetition_penalty=1.0))
    assert answer(free, ["what is this thing"], [None], 24)[0].token_ids != said


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 is not built here"),
        ({"num_beams": 4}, "num_beams=4 is not built here"),
        ({"eos_token_id": "<end>"}, "eos_token_id=['<end>'] must be whole numbers"),
        ([], "is not a JSON object"),
    ],
)
def test_settings_that_change_greedy_answers_are_never_ignored(
    settings: Any, said: str, tmp_path: Path, capsys: Any
) -> None:
    save_decoder("qwen2-plain-tied", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "generation_config.json" in err


def test_several_stop_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    save_decoder("qwen2-plain-tied", tmp_path)
    assert generation_settings(tmp_path, {})[0] == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert generation_settings(tmp_path, {"eos_token_id": 3})[0] == (7, 9)
    (tmp_path / "generation_config.json").unlink()
    assert generation_settings(tmp_path, {"text_config": {"eos_token_id": 3}})[0] == (3,)


@pytest.mark.parametrize("heads, tensor", [(32, 8), (2, 2), (3, 1), (4, 4)])
def test_the_mesh_takes_as_many_devices_for_heads_as_divide(heads: int, tensor: int) -> None:
    assert inference_mesh(described(64, heads)).shape == {"data": 1, "fsdp": 8 // tensor, "tensor": tensor}


def test_devices_that_do_not_divide_stay_idle(monkeypatch: Any) -> None:
    """Six devices leave a table of 2048 x 1024 whole on each, four do not."""
    large = described(1024, 1, vocab_size=2048)
    monkeypatch.setattr(jax, "device_count", lambda: 7)
    assert inference_mesh(large).size == 4
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert inference_mesh(large).size == 1


def described(width: int, heads: int, vocab_size: int = 64) -> Description:
    size = DecoderSize(width, 1, heads, heads, 8, head_dim=8, vocab_size=vocab_size)
    boxed = abstract_decoder(size, vocab_size, "loop")
    return Description("decoder", {}, size, None, None, tables.DECODER, boxed)


def test_what_contradicts_itself_is_refused_before_weights_are_read(
    tmp_path: Path, photos: list[Path]
) -> None:
    save_llava("clip-llama", tmp_path)
    request = functools.partial(make_request, max_new_tokens=4)
    prompter = read_prompter(tmp_path)
    small = dataclasses.replace(prompter.described.decoder, vocab_size=290)
    text = dataclasses.replace(prompter, described=dataclasses.replace(prompter.described, decoder=small))
    last = prompter.tokenizer.id_to_token(295)
    with pytest.raises(UserError, match=r"has id 29.*embeddings for 290 tokens"):
        request(text, [last], [None])
    (tmp_path / "model.safetensors").write_bytes(b"")
    for words, images, said in (
        (["<image>"], [tmp_path / "absent.jpg"], "absent.jpg"),
        (["no"], [photos[0]], "put one <image> where the picture belongs"),
        ([" \n"], [None], "--prompt is empty"),
    ):
        with pytest.raises(UserError, match=said):
            request(prompter, words, images)


def test_a_processor_for_another_tower_is_refused(tmp_path: Path) -> None:
    save_llava("clip-llama", tmp_path)
    other = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    nested = tmp_path / "processor_config.json"
    config = json.loads(nested.read_text())
    nested.write_text(json.dumps(config | {"image_processor": json.loads(other.to_json_string())}))
    with pytest.raises(UserError, match=r"makes 224x224 pixels, but config.json describes a tower of 60x60"):
        read_prompter(tmp_path)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: (path / "snapshots" / "abc").mkdir(parents=True), "name .*snapshots/abc"),
        (
            lambda path: (
                path.mkdir(),
                (path / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "clip"}'),
            ),
            "original format; take the one",
        ),
    ],
)
def test_directories_that_are_none_are_told_apart(make: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        read_prompter(tmp_path / "model")
