"""A downloaded LLaVA (or plain LLM) directory that answers prompts, taken literally.

What can be wrong with a prompt, a picture or a directory's files is found by `read_prompter` and
`make_request`, before `load_pretrained` reads weights for minutes; `answer_request` then computes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from vlmscale.compressors.features import tower_features
from vlmscale.data.images import ImageError, decode_image
from vlmscale.data.processor import ImageProcessor, read_processor
from vlmscale.data.tokenizer import decode, encode_prompt, read_tokenizer
from vlmscale.errors import UserError
from vlmscale.evaluate.generation import (
    GREEDY,
    Answer,
    Sampling,
    answer_length,
    check_prompt,
    make_generate,
    pad_prompts,
)
from vlmscale.models.sizes import DecoderSize, TowerSize
from vlmscale.models.vlm import VLM
from vlmscale.records import read_object
from vlmscale.sharding import make_mesh, place, replicated
from vlmscale.weights.checkpoint import open_checkpoint
from vlmscale.weights.directory import Description, Progress, describe, load_directory
from vlmscale.weights.hf_config import kind_of, read_config
from vlmscale.weights.load import Report

# Keys of generation_config.json that change greedy decoding too, and the values with which they do nothing.
_NOT_BUILT: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": None,
    "guidance_scale": 1.0,
    "stop_strings": None,
}
_LENGTH_STEP = 64  # prompts are padded to multiples of this, so that few lengths are compiled


@dataclass(frozen=True)
class Prompter:
    """All of a directory but its weights: how prompts and pictures become arrays, and answers text.

    Attributes:
      image_token: the placeholder in prompts; None for a model without a tower.
      stop_ids: tokens that end an answer.
      repetition_penalty: what the checkpoint asks for; 1 is none.
    """

    directory: Path
    described: Description
    tokenizer: Tokenizer
    processor: ImageProcessor | None
    image_token: str | None
    stop_ids: tuple[int, ...]
    repetition_penalty: float

    @property
    def visual_tokens(self) -> int:
        """Tokens an image takes; 0 for a model without a tower."""
        return self.described.llava.visual_tokens if self.described.llava else 0

    @property
    def decoder_size(self) -> DecoderSize:
        """The size of its LLM."""
        assert self.described.decoder is not None  # `read_prompter` refused a bare tower
        return self.described.decoder


@dataclass(frozen=True)
class Pretrained:
    """A directory, loaded and ready to answer."""

    prompter: Prompter
    params: dict[str, Any]
    dtype: Any
    attention: str
    report: Report


class Request(NamedTuple):
    """Prompts and pictures as arrays; `pixels` is None where there is no picture at all."""

    batch: dict[str, np.ndarray]  # tokens, image_slots, valid [B, T]
    pixels: np.ndarray | None  # [B, H, W, 3]
    max_new_tokens: int


def read_prompter(directory: Path) -> Prompter:
    """Read what a directory says of itself; quick, for no weights are read.

    Args:
      directory: with config.json, safetensors, tokenizer.json and, for a LLaVA, preprocessor_config.json.

    Raises:
      UserError: a file is missing or damaged, the model is not built here or is a bare tower, or its files
        contradict each other.
    """
    kind = kind_of(read_config(directory), directory / "config.json")  # the first thing that may be wrong
    if kind == "tower":
        raise UserError(f"{directory}: holds a vision tower alone; a language model is needed")
    with open_checkpoint(directory) as checkpoint:
        described = describe(checkpoint)
    tokenizer = read_tokenizer(directory)
    stop_ids, repetition_penalty = generation_settings(directory, described.config)
    processor, image_token = None, None
    if described.llava is not None:
        processor, side = read_processor(directory), described.llava.tower.image_size
        if processor.shape != (side, side):
            height, width = processor.shape
            raise UserError(
                f"{directory}: its image processor makes {width}x{height} pixels, but config.json describes "
                f"a tower of {side}x{side}; take the preprocessor_config.json of this checkpoint"
            )
        image_token = tokenizer.id_to_token(described.llava.image_token_id)
        if image_token is None:
            raise UserError(
                f"{directory}: config.json says image_token_index={described.llava.image_token_id}, "
                "but tokenizer.json has no such token"
            )
    return Prompter(directory, described, tokenizer, processor, image_token, stop_ids, repetition_penalty)


def inference_mesh(described: Description) -> Mesh:
    """All devices: as many on the tensor axis as the key heads divide over, the rest on fsdp.

    Fewer where all would leave a large parameter whole on every device, as 3 or 6 of them often do.
    """
    assert described.decoder is not None
    for count in range(jax.device_count(), 1, -1):
        tensor = math.gcd(described.decoder.num_kv_heads, count)
        mesh = make_mesh(1, count // tensor, tensor, jax.devices()[:count])
        with contextlib.suppress(UserError):
            place(described.boxed, mesh)
            return mesh
    return make_mesh(devices=jax.devices()[:1])


def load_pretrained(
    prompter: Prompter,
    mesh: Mesh | None = None,
    dtype: Any = None,
    attention: str = "xla",
    progress: Progress = lambda what, done, total: None,
) -> Pretrained:
    """Read the weights of a `LlavaForConditionalGeneration` or causal LM directory.

    Args:
      prompter: of the directory.
      mesh: where the parameters go; None for `inference_mesh`.
      dtype: of parameters and computation; None for float32 on a CPU and bfloat16 elsewhere.
      attention: backend of tower and prefill, see `vlmscale.attention`.
      progress: called with (what, done, total).

    Raises:
      UserError: a file or tensor is missing, damaged or unknown.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    mesh = mesh or inference_mesh(prompter.described)
    _, params, report = load_directory(prompter.directory, mesh, dtype, progress=progress)
    params = params if prompter.described.llava else {"decoder": params}
    return Pretrained(prompter, params, jnp.dtype(dtype), attention, report)


def open_pretrained(directory: Path, **options: Any) -> Pretrained:
    """`load_pretrained` of `read_prompter`; `options` are those of the former."""
    return load_pretrained(read_prompter(directory), **options)


def generation_settings(directory: Path, config: dict[str, Any]) -> tuple[tuple[int, ...], float]:
    """What generation_config.json says of any decoding, greedy too: stop tokens and repetition penalty.

    Stop tokens are its `eos_token_id`, else that of config.json. How to sample (`do_sample`, `temperature`,
    `top_p`, `top_k`) is not read: that is asked for by hand.

    Raises:
      UserError: the file is no JSON object, or asks for what would change greedy decoding and is not built.
    """
    path = directory / "generation_config.json"
    settings = read_object(path) or {}
    for key, inert in _NOT_BUILT.items():
        if settings.get(key) not in (None, inert):
            raise UserError(f"{path}: {key}={settings[key]!r} is not built here; remove it to go without")
    penalty = settings.get("repetition_penalty") or 1.0
    stops: Any = ()
    for source in (settings, config, config.get("text_config") or {}):
        if source.get("eos_token_id") is not None:
            stops = source["eos_token_id"]
            break
    stops = stops if isinstance(stops, list | tuple) else [stops]
    if not all(type(token) is int for token in stops) or not isinstance(penalty, int | float):
        raise UserError(
            f"{path}: eos_token_id={stops} must be whole numbers and repetition_penalty={penalty} a number"
        )
    return tuple(stops), float(penalty)


def make_request(
    prompter: Prompter, prompts: Sequence[str], images: Sequence[Path | None], max_new_tokens: int
) -> Request:
    """Prompts of any lengths and their pictures as one batch.

    Args:
      prompter: of the model.
      prompts: taken literally, special tokens included; the image placeholder stands where the image is.
      images: a picture or None for each prompt.
      max_new_tokens: longest answer.

    Raises:
      UserError: placeholders and pictures do not match, a picture cannot be read, a token is beyond the
        vocabulary, or prompt and answer are longer than the model's context.
    """
    pairs = list(zip(prompts, images, strict=True))
    ids = [encode(prompter, prompt, image is not None) for prompt, image in pairs]
    longest, context = max(map(len, ids)), prompter.decoder_size.context
    if longest + max_new_tokens > context:
        raise UserError(
            f"the prompt has {longest} tokens and the answer up to {max_new_tokens}, more than the model's "
            f"context of {context}; shorten --prompt or lower --max-new-tokens"
        )
    image_id = prompter.described.llava.image_token_id if prompter.described.llava else -1
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, context - max_new_tokens)
    shown = any(image is not None for image in images)
    pixels = pixels_of(prompter, images) if shown else None
    return Request(pad_prompts(ids, image_id, 0, length), pixels, max_new_tokens)


def answer(
    model: Pretrained,
    prompts: Sequence[str],
    images: Sequence[Path | None],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[Answer]:
    """`answer_request` of `make_request`."""
    request = make_request(model.prompter, prompts, images, max_new_tokens)
    return answer_request(model, request, sampling, seed)


def answer_request(
    model: Pretrained, request: Request, sampling: Sampling = GREEDY, seed: int = 0
) -> list[Answer]:
    """Answers to all prompts of a request.

    Args:
      model: loaded.
      request: made with its prompter.
      sampling: greedy unless told otherwise; a repetition penalty of 1 gives way to the checkpoint's own.
      seed: of sampling, below 2**32.
    """
    prompter = model.prompter
    batch: dict[str, Any] = dict(request.batch)
    if request.pixels is not None:
        batch["selected"] = select(model, request.pixels)
    size, llava = prompter.decoder_size, prompter.described.llava
    vlm = VLM(
        size,
        size.vocab_size,
        llava.compressor if llava else "mlp",
        prompter.visual_tokens if request.pixels is not None else 0,
        dtype=model.dtype,
        layout="loop",
        attention=model.attention,
    )
    if sampling.repetition_penalty == 1:
        sampling = replace(sampling, repetition_penalty=prompter.repetition_penalty)
    behind_tower = {name: model.params[name] for name in ("decoder", "compressor") if name in model.params}
    generate = make_generate(vlm, request.max_new_tokens, prompter.stop_ids, sampling)
    with computing(model):
        made = generate(behind_tower, batch, np.uint32(seed))
        rows = np.asarray(jax.device_put(made, replicated(mesh_of(model)))).tolist()  # to every process
    new = [row[: answer_length(row, prompter.stop_ids)] for row in rows]
    return [Answer(decode(prompter.tokenizer, row), row) for row in new]


def mesh_of(model: Pretrained) -> Mesh:
    """The mesh that the parameters lie on."""
    mesh: Mesh = jax.tree.leaves(model.params)[0].sharding.mesh
    return mesh


@contextlib.contextmanager
def computing(model: Pretrained) -> Iterator[None]:
    """The model's mesh in force, and float32 meaning float32: GPUs and TPUs would round products to less."""
    exact = jnp.dtype(model.dtype) == jnp.float32
    with jax.set_mesh(mesh_of(model)), jax.default_matmul_precision("highest" if exact else "default"):
        yield


def encode(prompter: Prompter, prompt: str, has_image: bool) -> list[int]:
    """Ids of a prompt with the placeholder spread to as many image tokens as an image takes.

    Raises:
      UserError: not exactly one placeholder for an image, one without an image, no text at all, or a token
        that the model has no embedding for.
    """
    check_prompt(prompt)
    token, size = prompter.image_token, prompter.decoder_size
    if has_image and token is None:
        raise UserError(f"{prompter.directory}: the model has no vision tower; leave --image away")
    places = prompt.count(token) if token else 0
    if places != int(has_image):
        advice = f"put one {token} where the picture belongs" if has_image else "name one, or take it out"
        there = "one" if has_image else "no"
        raise UserError(f"--prompt has {places} {token} and there is {there} --image: {advice}")
    ids = encode_prompt(prompter.tokenizer, prompt, token, prompter.visual_tokens)
    if not ids:
        raise UserError("--prompt has no tokens")
    image_id = prompter.described.llava.image_token_id if prompter.described.llava else -1
    beyond = next((number for number in ids if number >= size.vocab_size and number != image_id), None)
    if beyond is not None:
        name = prompter.tokenizer.id_to_token(beyond)
        raise UserError(
            f"{prompter.directory}: token {name!r} of tokenizer.json has id {beyond}, but the model has "
            f"embeddings for {size.vocab_size} tokens alone"
        )
    return ids


def pixels_of(prompter: Prompter, images: Sequence[Path | None]) -> np.ndarray:
    """Pictures as the checkpoint's own processor makes them: float32 [B, H, W, 3]; zeros for None.

    Raises:
      UserError: a picture that cannot be read.
    """
    processor = prompter.processor
    assert processor is not None
    made = np.zeros((len(images), *processor.shape, 3), np.float32)
    for row, image in enumerate(images):
        if image is None:
            continue
        try:
            made[row] = processor(decode_image(image, target=processor.target))
        except (ImageError, OSError) as error:
            raise UserError(f"{image}: {error}") from error
    return made


def select(model: Pretrained, pixels: np.ndarray) -> jax.Array:
    """The hidden state that the projector reads: [B, H, W, 3] to [B, tokens, C]."""
    llava = model.prompter.described.llava
    assert llava is not None
    with computing(model):
        hidden = _hidden(llava.tower, model.dtype, model.attention, model.params["tower"], pixels)
    return hidden if llava.keep_class_token else hidden[:, 1:]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _hidden(
    size: TowerSize, dtype: Any, attention: str, params: dict[str, Any], pixels: jax.Array
) -> jax.Array:
    made = tower_features(size, params, pixels, frozenset(), dtype, attention, every_token=True)
    return made["selected"]
