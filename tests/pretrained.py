"""Tiny random models made with transformers, saved as a user would find them on disk."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlmscale.cli import main
from vlmscale.models.sizes import DecoderSize
from vlmscale.sharding import make_mesh
from vlmscale.weights.checkpoint import open_checkpoint, write_checkpoint
from vlmscale.weights.directory import load_directory
from vlmscale.weights.load import Report

Arrays = dict[str, np.ndarray]
Saved = Callable[[str], tuple[Path, Any]]

VOCAB = 61
# Neither theta nor eps is a default of either side, so that a forgotten one shows.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped-tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-plain-untied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2-plain-tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-grouped-untied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen3-grouped-tied": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "qwen3-grouped-untied": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
    ),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random biases and norm scales too: at 0 and 1, where they start, a missing one would not show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if scale else 0.0, 0.2 if scale else 0.15)
    return model.eval()


def make_decoder(name: str, **changes: Any) -> torch.nn.Module:
    """A tiny decoder of the table above."""
    family, options = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(**(COMMON | options | changes))
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config))


def load_decoder(
    directory: Path, layout: str = "scan", mesh: jax.sharding.Mesh | None = None
) -> tuple[DecoderSize, dict[str, Any], Report]:
    """A directory's decoder through the real reader: size, parameters, report."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    described, params, report = load_directory(directory, mesh, layout=layout)
    assert described.decoder is not None
    return described.decoder, params, report


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE as Qwen's, trained on a few lines, with an image token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: what is this thing? ASSISTANT: a longer one, so yes"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        extra_special_tokens={"image_token": "<image>"},
    )


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "layer_norm_eps": 1e-3,
}
# Tower, decoder, the layer that is read, whether CLIP's class token is kept, whether the head is tied.
LLAVAS: dict[str, tuple[str, str, int, str, bool]] = {
    "clip-llama": ("CLIP", "llama-plain-untied", -2, "default", False),
    "siglip-qwen2": ("Siglip", "qwen2-plain-tied", -1, "full", True),
    "clip-qwen3-class-token": ("CLIP", "qwen3-grouped-untied", 1, "full", False),
}


def make_llava(name: str) -> transformers.LlavaForConditionalGeneration:
    """A tiny LLaVA of the table above; 60 pixels hold 4 x 4 patches of 14 and a rest."""
    tower, decoder, layer, strategy, tied = LLAVAS[name]
    family, options = DECODERS[decoder]
    vocab = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 512}
    text = getattr(transformers, f"{family}Config")(**(COMMON | options | vocab))
    vision = getattr(transformers, f"{tower}VisionConfig")(**_TOWER, image_size=60)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    return randomise(transformers.LlavaForConditionalGeneration(config))


def save_llava(name: str, directory: Path) -> transformers.LlavaForConditionalGeneration:
    """A whole directory: weights, tokenizer, image processor, generation config."""
    model = make_llava(name)
    tower, _, _, strategy, _ = LLAVAS[name]
    square = {"height": 60, "width": 60}
    images = (
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size=square)
        if tower == "CLIP"
        else transformers.SiglipImageProcessorPil(size=square)
    )
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower == "CLIP"),
        image_token="<image>",
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def save_decoder(name: str, directory: Path) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerFast]:
    """A decoder with a tokenizer beside it."""
    model, tokenizer = make_decoder(name, vocab_size=320, eos_token_id=1), make_tokenizer()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer


TOWERS = ("CLIP", "Siglip")


def save_tower(name: str, directory: Path, text: bool = False) -> torch.nn.Module:
    """A bare vision tower, or the whole two-tower model that it is half of."""
    vision = getattr(transformers, f"{name}VisionConfig")(**_TOWER, image_size=60)
    if text:
        ids = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = getattr(transformers, f"{name}Config")(
            vision_config=vision.to_dict(), text_config=ids | sizes
        )
        model = getattr(transformers, f"{name}Model")(config)
    else:
        model = getattr(transformers, f"{name}VisionModel")(vision)
    model = randomise(model)
    model.save_pretrained(directory)
    return model


def saver(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """What saves a tiny model of either table once: its directory, tokenizer and all, and their model."""

    @functools.cache
    def of(name: str) -> tuple[Path, Any]:
        directory = tmp_path_factory.mktemp(name)
        if name in LLAVAS:
            return directory, save_llava(name, directory)
        return directory, save_decoder(name, directory)[0]

    return of


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device."""
    return make_mesh(devices=jax.devices()[:1])


def tensors_of(directory: Path) -> Arrays:
    """All tensors of a directory, by their names."""
    with open_checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def rewrite(source: Path, out: Path, tensors: Arrays, **config: Any) -> Path:
    """The directory with other tensors, and with changes to its config.json."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    write_checkpoint(out, tensors.items())
    changed = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(changed))
    return out


def refused(directory: Path, capsys: Any) -> str:
    """What the command says of a directory."""
    capsys.readouterr()
    code = main(["generate", "--model", str(directory), "--prompt", "what", "--max-new-tokens", "2"])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    said = [line for line in err.splitlines() if line.startswith("vlmscale generate:")]
    assert len(said) == 1
    assert [line for line in err.splitlines() if line not in said and "loading parameters" not in line] == []
    assert str(directory) in said[0]
    return said[0]


def by_path(params: Any) -> Arrays:
    """Parameters by path, on the host."""
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def assert_same(ours: Any, theirs: Any) -> None:
    """The same paths, and the same bits at each."""
    ours, theirs = by_path(ours), by_path(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert ours[path].dtype == value.dtype, path
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


def opened(model_class: Any, directory: Path) -> Any:
    """What transformers makes of a directory, with nothing missing and nothing left over."""
    model, info = model_class.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def load_whole(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Description and parameters of a directory, all blocks of its tower among them."""
    described, params, _ = load_directory(directory, one_device(), whole_tower=True)
    return described, params


def same(ones: Any, others: Any) -> None:
    """Equal state dicts: names, types, bits."""
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name


def save_photo(path: Path) -> Path:
    """A noisy gradient that is not square."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, 131)[None, :, None] + np.linspace(0, 55, 60)[:, None, None]
    pixels = np.clip(slope + rng.normal(0, 25, (60, 131, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path
