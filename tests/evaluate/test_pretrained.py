"""LLaVA directories as transformers saves them, answered as transformers answers."""

from __future__ import annotations

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

from tests.pretrained import DECODERS, LLAVAS, save_llava
from vlmscale.cli import main
from vlmscale.evaluate.generation import Sampling
from vlmscale.evaluate.pretrained import Pretrained, answer, open_pretrained
from vlmscale.models.sizes import DecoderSize
from vlmscale.sharding import make_mesh

PROMPT = "USER: <image>\nwhat is this thing? ASSISTANT:"
NEW = 24
Opened = Callable[[str], tuple[Path, Any, Any, Pretrained]]


def one_device(size: DecoderSize) -> jax.sharding.Mesh:
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
        return directory, model, processor, open_pretrained(directory, one_device)

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
    spread = open_pretrained(directory, lambda size: make_mesh(2, 2, 2))
    leaf = spread.params["decoder"]["layers_0"]["up"]["weight"]
    assert leaf.addressable_shards[0].data.size == leaf.size // 4
    assert answer(spread, [PROMPT] * 2, photos[:2], NEW) == answer(ours, [PROMPT] * 2, photos[:2], NEW)


def test_sampling_is_seeded_and_differs(opened: Opened, photos: list[Path]) -> None:
    _, _, _, ours = opened("clip-llama")

    def sampled(seed: int) -> list[int]:
        return answer(ours, [PROMPT], photos[:1], 12, Sampling(1.5, 0.95, seed))[0].token_ids

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
    from tests.pretrained import save_decoder

    model, tokenizer = save_decoder(name, tmp_path)
    inputs = tokenizer("what is this thing", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    wanted = out[0, inputs["input_ids"].shape[1] :].tolist()
    ours = open_pretrained(tmp_path, one_device)
    assert answer(ours, ["what is this thing"], [None], 12)[0].token_ids == wanted


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--prompt", "no placeholder", "--image", "PHOTO"],
            "the prompt has 0 <image> and there is one --image",
        ),
        (["--prompt", "<image> <image>", "--image", "PHOTO"], "the prompt has 2 <image>"),
        (["--prompt", "<image>"], "has 1 <image> and there is no --image"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "<image>", "--image", "absent.jpg"], "absent.jpg"),
        (["--prompt", "<image>", "--image", "PHOTO", "--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["--prompt", "<image>", "--image", "PHOTO", "--max-new-tokens", "9999"], "the model's context is"),
        (["--prompt", "<image>", "--image", "PHOTO", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "<image>", "--image", "PHOTO", "--top-p", "0"], "top_p=0.0"),
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
