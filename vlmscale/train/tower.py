"""The demo's vision tower: sigmoid contrastive loss plus captioning, as SigLIP 2 trains (arXiv 2502.14786).

The caption transcribes the layout, each word predicted from the patches of its place, so that patches keep
what stands where. Both heads are thrown away; the tower is written as safetensors and frozen ever after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlmscale.data import scenes
from vlmscale.data.images import preprocess
from vlmscale.data.tokenizer import END, special_id, train_tokenizer
from vlmscale.layers import init_params
from vlmscale.models.decoder import Decoder
from vlmscale.models.sizes import SIZES, TOWERS, TowerSize
from vlmscale.models.vision import AttentionPool, VisionTower
from vlmscale.weights import tree

NAME = "scenes-48"
Losses = dict[str, jax.Array]


@dataclass(frozen=True)
class Recipe:
    """How the shipped tower was trained."""

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    pictures: int = 30_000
    contrastive_weight: float = 0.1
    seed: int = 1_000_003  # far from the seeds of data sets, so that towers are not trained on their pictures


class Captioner(nn.Module):
    """Captions of the whole, read off the mean patch, and of places, each read off the patches there.

    As in LocCa (arXiv 2403.19596), which SigLIP 2 builds on, captions are tied to places, and all words
    are predicted in parallel.
    """

    size: TowerSize
    vocabulary: int

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Last hidden state [B, P, C] to logits [B, words, vocabulary], words as in `scenes.layout`."""
        x = nn.LayerNorm(self.size.norm_eps, name="norm")(patches)
        rows, _, width = x.shape
        side, cells = self.size.grid, 4
        step = side // cells
        region = x.reshape(rows, cells, step, cells, step, width).swapaxes(2, 3)
        region = region.reshape(rows, cells * cells, step * step * width)
        # Plain linear heads: what a word needs, combinations such as "framed red" included, has to be in the
        # patches themselves, where it survives pooling.
        whole = nn.Dense(4 * self.vocabulary, name="whole")(x.mean(1))
        objects = nn.Dense(3 * self.vocabulary, name="objects")(region)
        parts = [
            whole.reshape(rows, 4, self.vocabulary),
            objects.reshape(rows, cells * cells * 3, self.vocabulary),
            nn.Dense(self.vocabulary, name="characters")(x),
        ]
        return jnp.concatenate(parts, axis=1)


class TowerTrainer(nn.Module):
    """Tower, pooling head, text encoder and captioner; returns both losses."""

    size: TowerSize
    text_vocabulary: int

    def setup(self) -> None:
        """Declare the parts."""
        self.tower = VisionTower(self.size)
        self.pool = AttentionPool(self.size)
        self.captioner = Captioner(self.size, len(scenes.LAYOUT_WORDS))
        self.text = Decoder(SIZES["toy-40k"], self.text_vocabulary)
        self.text_head = nn.Dense(self.size.width)
        self.log_scale = self.param("log_scale", lambda _: jnp.log(jnp.float32(10.0)))
        self.bias = self.param("bias", lambda _: jnp.float32(-10.0))

    def __call__(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Losses of a batch of pixels [B, S, S, 3], text [B, T], text_length [B] and layout [B, words]."""
        layer = self.size.num_layers
        patches = self.tower(batch["pixels"], (layer,)).hidden[layer]
        image = _unit(self.pool(patches))
        rows, length = batch["text"].shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        hidden = self.text(self.text.embed(batch["text"]), positions, jnp.ones((rows, length), jnp.int32))
        last = jnp.take_along_axis(hidden, (batch["text_length"] - 1)[:, None, None], axis=1)[:, 0]
        logits = image @ _unit(self.text_head(last)).T * jnp.exp(self.log_scale) + self.bias
        signs = 2 * jnp.eye(rows) - 1
        contrastive = -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / rows
        words = self.captioner(patches)
        caption = optax.softmax_cross_entropy_with_integer_labels(words, batch["layout"]).mean()
        right = jnp.mean(jnp.argmax(words, -1) == batch["layout"])
        return {"contrastive": contrastive, "caption": caption, "caption_accuracy": right}


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _data(recipe: Recipe) -> tuple[dict[str, np.ndarray], int]:
    """Pictures (uint8), caption ids and layout ids; and the size of the caption vocabulary."""
    drawn, _ = scenes.build("train", recipe.pictures, recipe.seed)
    captions = [scenes.caption(scene) for scene in drawn]
    tokenizer = train_tokenizer(captions[:4000], 400)
    end = special_id(tokenizer, END)
    ids = [[*encoded.ids, end] for encoded in tokenizer.encode_batch(captions)]
    text = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, values in enumerate(ids):
        text[row, : len(values)] = values
    number = {word: index for index, word in enumerate(scenes.LAYOUT_WORDS)}
    data = {
        "images": np.stack([scenes.draw(scene) for scene in drawn]),
        "text": text,
        "text_length": np.array([len(values) for values in ids], np.int32),
        "layout": np.array([[number[word] for word in scenes.layout(scene)] for scene in drawn], np.int32),
    }
    return data, tokenizer.get_vocab_size()


def _centre(params: Any, size: TowerSize, pixels: np.ndarray) -> Any:
    """Take the mean patch off the last hidden state, by the last bias.

    Most of what patches have in common says nothing about the picture; left in, it drowns what a mean over
    many patches still tells.
    """
    layer = size.num_layers
    mean = VisionTower(size).apply({"params": params}, pixels, (layer,)).hidden[layer].mean((0, 1))
    last = dict(params[f"block_{layer - 1}"])
    down = dict(last["mlp"]["down"])
    last["mlp"] = dict(last["mlp"]) | {"down": down | {"bias": down["bias"] - mean}}
    return dict(params) | {f"block_{layer - 1}": last}


def train_tower(out: Path, steps: int | None, progress: Callable[[int, int, str], None]) -> dict[str, float]:
    """Train the tower of the demo and write it to `out`.

    Args:
      out: safetensors file.
      steps: fewer steps for a trial; None for the recipe's.
      progress: called with (step, steps, text).

    Returns:
      The last losses.
    """
    recipe = Recipe() if steps is None else Recipe(steps=steps, warmup_steps=min(100, steps // 10))
    size = TOWERS[NAME]
    data, vocabulary = _data(recipe)
    trainer = TowerTrainer(size, vocabulary)
    peak = recipe.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, recipe.warmup_steps, recipe.steps, 0.01 * peak)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay)
    )

    @jax.jit
    def step(
        state: tuple[Any, Any], batch: dict[str, jax.Array]
    ) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
        def loss(params: Any) -> tuple[jax.Array, Losses]:
            losses = trainer.apply({"params": params}, batch)
            return losses["caption"] + recipe.contrastive_weight * losses["contrastive"], losses

        grads, losses = jax.grad(loss, has_aux=True)(state[0])
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), losses

    rng = np.random.default_rng(recipe.seed)

    def batch() -> dict[str, np.ndarray]:
        rows = rng.integers(0, recipe.pictures, recipe.batch_size)
        chosen = {name: data[name][rows] for name in ("text", "text_length", "layout")}
        pixels = [
            preprocess(data["images"][row], size.image_size, size.mean, size.std, "resize") for row in rows
        ]
        return chosen | {"pixels": np.stack(pixels)}

    params = jax.jit(lambda b: init_params(trainer, jax.random.key(recipe.seed), b))(batch())
    state, losses = (params, optimizer.init(params)), {}
    for index in range(recipe.steps):
        state, losses = step(state, batch())
        if index % 50 == 49 or index + 1 == recipe.steps:
            text = ", ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
            progress(index + 1, recipe.steps, text)
    centred = _centre(state[0]["tower"], size, batch()["pixels"])
    tree.save(out, centred, {"name": NAME})
    return {name: float(value) for name, value in losses.items()}
