"""A downloaded LLaVA (or plain LLM) directory that answers prompts, taken literally."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from vlmscale.data.images import ImageError, decode_image
from vlmscale.data.processor import ImageProcessor, read_processor
from vlmscale.data.tokenizer import decode, encode_prompt, read_tokenizer
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import GREEDY, Sampling, answer_length, make_generate, pad_prompts
from vlmscale.models.sizes import DecoderSize, TowerSize
from vlmscale.models.vision import VisionTower
from vlmscale.models.vlm import VLM
from vlmscale.sharding import make_mesh
from vlmscale.weights.directory import Description, load_directory
from vlmscale.weights.hf_config import read_config
from vlmscale.weights.load import Report

_LENGTH_STEP = 64  # prompts are padded to multiples of this, so that few lengths are compiled


@dataclass(frozen=True)
class Answer:
    """What a model said: its text, and the new ids with the stop token, if there was one."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Pretrained:
    """A directory, loaded and ready to answer.

    Attributes:
      image_token: the placeholder in prompts; None for a model without a tower.
      stop_ids: tokens that end an answer.
    """

    directory: Path
    described: Description
    params: dict[str, Any]
    dtype: Any
    tokenizer: Tokenizer
    processor: ImageProcessor | None
    image_token: str | None
    stop_ids: tuple[int, ...]
    report: Report

    @property
    def visual_tokens(self) -> int:
        """Tokens an image takes; 0 for a model without a tower."""
        return self.described.llava.visual_tokens if self.described.llava else 0

    @property
    def decoder_size(self) -> DecoderSize:
        """The size of its LLM."""
        assert self.described.decoder is not None  # `load_directory` refused a bare tower
        return self.described.decoder


def inference_mesh(size: DecoderSize) -> jax.sharding.Mesh:
    """All devices on the tensor axis where the heads divide over them, else on fsdp."""
    devices = jax.device_count()
    divides = size.num_kv_heads % devices == 0
    return make_mesh(data=1, tensor=devices) if divides else make_mesh(data=1, fsdp=devices)


def open_pretrained(
    directory: Path,
    mesh: Callable[[DecoderSize], jax.sharding.Mesh] = inference_mesh,
    dtype: Any = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Pretrained:
    """Load a `LlavaForConditionalGeneration` or causal LM directory as it is.

    Args:
      directory: with config.json, safetensors, tokenizer.json and, for a LLaVA, preprocessor_config.json.
      mesh: makes the mesh from the LLM's size.
      dtype: of parameters and computation; None for float32 on a CPU and bfloat16 elsewhere.
      progress: called with (what, done, total).

    Raises:
      UserError: a file or tensor is missing, damaged or unknown, or the directory holds a bare tower.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    text = read_config(directory)
    tokenizer = read_tokenizer(directory)
    processor = read_processor(directory) if text.get("model_type") == "llava" else None
    described, params, report = load_directory(directory, mesh, dtype, progress=progress)
    image_token = None
    if described.llava is None:
        params = {"decoder": params}
    else:
        image_token = tokenizer.id_to_token(described.llava.image_token_id)
        if image_token is None:
            raise UserError(
                f"{directory}: config.json says image_token_index={described.llava.image_token_id}, "
                "but tokenizer.json has no such token"
            )
    return Pretrained(
        directory,
        described,
        params,
        dtype,
        tokenizer,
        processor,
        image_token,
        stop_ids(directory, described.config),
        report,
    )


def stop_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: `eos_token_id` of generation_config.json, else of config.json.

    Raises:
      UserError: the file is no JSON.
    """
    path = directory / "generation_config.json"
    sources = [config, config.get("text_config") or {}]
    if path.exists():
        try:
            sources.insert(0, json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path}: is no JSON ({error})") from error
    for source in sources:
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def answer(
    model: Pretrained,
    prompts: Sequence[str],
    images: Sequence[Path | None],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> list[Answer]:
    """Answers to prompts of any lengths, in one batch.

    Args:
      model: what `open_pretrained` gave.
      prompts: taken literally, special tokens included; the image placeholder stands where the image is.
      images: a picture or None for each prompt.
      max_new_tokens: longest answer.
      sampling: greedy unless told otherwise.

    Raises:
      UserError: placeholders and pictures do not match, a picture cannot be read, or prompt and answer are
        longer than the model's context.
    """
    ids = [encode(model, prompt, image is not None) for prompt, image in zip(prompts, images, strict=True)]
    longest, context = max(map(len, ids)), model.decoder_size.context
    if longest + max_new_tokens > context:
        raise UserError(
            f"the prompt has {longest} tokens and the answer up to {max_new_tokens}: the model's context is "
            f"{context}"
        )
    image_id = model.described.llava.image_token_id if model.described.llava else -1
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, context - max_new_tokens)
    batch: dict[str, Any] = pad_prompts(ids, image_id, 0, length)
    shown = any(image is not None for image in images)
    if shown:
        batch["selected"] = select(model, pixels_of(model, images))
    vlm = VLM(
        model.decoder_size,
        model.decoder_size.vocab_size,
        model.described.llava.compressor if model.described.llava else "mlp",
        model.visual_tokens if shown else 0,
        dtype=model.dtype,
        layout="loop",
    )
    behind_tower = {name: model.params[name] for name in ("decoder", "compressor") if name in model.params}
    generate = make_generate(vlm, max_new_tokens, model.stop_ids, sampling)
    rows = np.asarray(generate(behind_tower, batch)).tolist()
    new = [row[: answer_length(row, model.stop_ids)] for row in rows]
    return [Answer(decode(model.tokenizer, row), row) for row in new]


def encode(model: Pretrained, prompt: str, has_image: bool) -> list[int]:
    """Ids of a prompt with the placeholder spread to as many image tokens as an image takes.

    Raises:
      UserError: not exactly one placeholder for an image, or one without an image.
    """
    if not prompt:
        raise UserError("--prompt is empty")
    if has_image and model.image_token is None:
        raise UserError(f"{model.directory}: the model has no vision tower; leave --image away")
    places = prompt.count(model.image_token) if model.image_token else 0
    if places != int(has_image):
        raise UserError(
            f"the prompt has {places} {model.image_token} and there is "
            f"{'one' if has_image else 'no'} --image: they must match"
        )
    return encode_prompt(model.tokenizer, prompt, model.image_token or "", model.visual_tokens)


def pixels_of(model: Pretrained, images: Sequence[Path | None]) -> np.ndarray:
    """Pictures as the checkpoint's own processor makes them: float32 [B, H, W, 3]; zeros for None.

    Raises:
      UserError: a picture that cannot be read.
    """
    assert model.processor is not None
    made: list[np.ndarray | None] = []
    for image in images:
        try:
            decoded = None if image is None else decode_image(image, target=model.processor.target)
        except (ImageError, OSError) as error:
            raise UserError(f"{image}: {error}") from error
        made.append(None if decoded is None else model.processor(decoded))
    shape = next(pixels.shape for pixels in made if pixels is not None)
    return np.stack([np.zeros(shape, np.float32) if pixels is None else pixels for pixels in made])


def select(model: Pretrained, pixels: np.ndarray) -> jax.Array:
    """The hidden state that the projector reads: [B, H, W, 3] to [B, tokens, C]."""
    llava = model.described.llava
    assert llava is not None
    hidden = _hidden(llava.tower, model.dtype, model.params["tower"], jnp.asarray(pixels))
    return hidden if llava.keep_class_token else hidden[:, 1:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(size: TowerSize, dtype: Any, params: dict[str, Any], pixels: jax.Array) -> jax.Array:
    layer = size.select_layer
    return VisionTower(size, dtype).apply({"params": params}, pixels, (layer,)).hidden[layer]
