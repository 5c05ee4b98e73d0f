"""A decoder as on paper: numpy, one prompt, a layer at a time, tokens dropped from lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmscale.models.sizes import DecoderSize

# (place of a query, place of a key) to whether it is seen.
Sees = Callable[[int, int], bool]
# (cut, attention [H, T, T] of the layer in front, places of the visual tokens) to those that stay.
Choose = Callable[[int, np.ndarray | None, list[int]], list[int]]


class Answered(NamedTuple):
    """Logits behind the prompt and each further token, how much each layer's cache holds, what cuts kept."""

    logits: list[np.ndarray]
    cached: list[int]
    kept: list[list[int]]


def norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotated(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """[T, H, D] with each pair (i, i + D/2) turned by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


class Naive:
    """The decoder with parameters of the "loop" layout."""

    def __init__(self, params: Any, size: DecoderSize) -> None:
        self.params, self.size = params, size

    def answer(
        self,
        x: np.ndarray,
        positions: Sequence[int],
        visual: Sequence[int],
        cuts: Sequence[int],
        choose: Choose,
        then: Sequence[int] = (),
        sees: Sees = lambda query, key: True,
    ) -> Answered:
        """Read a prompt, dropping at the cuts, and then a given answer token by token.

        Args:
          x: [T, D], embeddings of the prompt.
          positions: of its tokens.
          visual: places of its visual tokens.
          cuts: layers in front of which `choose` is asked.
          choose: says which visual tokens stay.
          then: ids of the answer.
          sees: what of the tokens in front a token of the prompt sees; what its end does not is forgotten.
        """
        size = self.size
        places, where = list(range(len(x))), np.array(positions)
        self.k: list[list[np.ndarray]] = [[] for _ in range(size.num_layers)]
        self.v: list[list[np.ndarray]] = [[] for _ in range(size.num_layers)]
        attention, kept = None, []
        x = np.asarray(x, np.float64)
        for layer in range(size.num_layers):
            if layer in cuts:
                there = [places.index(place) for place in visual if place in places]
                staying = {places[at] for at in choose(len(kept), attention, there)}
                kept.append(sorted(staying))
                index = [at for at, place in enumerate(places) if place not in visual or place in staying]
                places, x = [places[at] for at in index], x[index]
            x, attention = self.layer(layer, x, where[places], sees)
            left = [at for at, place in enumerate(places) if sees(len(where), place)]
            self.k[layer] = [self.k[layer][at] for at in left]
            self.v[layer] = [self.v[layer][at] for at in left]
        logits, following = [self.logits(x[-1])], max(positions) + 1
        for number, token in enumerate(then):
            y = np.asarray(self.params["embedding"][token], np.float64)[None]
            for layer in range(size.num_layers):
                y, _ = self.layer(layer, y, np.array([following + number]))
            logits.append(self.logits(y[0]))
        return Answered(logits, [len(stored) for stored in self.k], kept)

    def layer(
        self,
        number: int,
        x: np.ndarray,
        positions: np.ndarray,
        sees: Sees = lambda query, key: True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One layer behind what its cache holds; also the attention [H, T, S]."""
        size, p = self.size, self.params[f"layers_{number}"]

        def linear(name: str, x: np.ndarray) -> np.ndarray:
            y = x @ np.asarray(p[name]["weight"], np.float64).T
            return y + p[name]["bias"] if "bias" in p[name] else y

        def normed(name: str, x: np.ndarray) -> np.ndarray:
            return norm(x, np.asarray(p[name]["scale"], np.float64), size.norm_eps)

        h = normed("attention_norm", x)
        q, k, v = (linear(name, h).reshape(len(x), -1, size.head_dim) for name in "qkv")
        if size.family == "qwen3":
            q, k = normed("q_norm", q), normed("k_norm", k)
        q, k = rotated(q, positions, size.rope_theta), rotated(k, positions, size.rope_theta)
        self.k[number] += list(k)
        self.v[number] += list(v)
        keys, values = np.array(self.k[number]), np.array(self.v[number])
        before = len(keys) - len(x)
        attention, mixed = np.zeros((size.num_heads, len(x), len(keys))), np.zeros_like(q)
        for head in range(size.num_heads):
            shared = head // (size.num_heads // size.num_kv_heads)
            for row in range(len(x)):
                end = before + row + 1
                seen = [at for at in range(end) if before or sees(row, at)]
                scores = keys[seen, shared] @ q[row, head] / np.sqrt(size.head_dim)
                weights = np.exp(scores - scores.max())
                attention[head, row, seen] = weights / weights.sum()
                mixed[row, head] = attention[head, row, :end] @ values[:end, shared]
        x = x + linear("o", mixed.reshape(len(x), -1))
        h = normed("mlp_norm", x)
        gate = linear("gate", h)
        return x + linear("down", gate / (1 + np.exp(-gate)) * linear("up", h)), attention

    def logits(self, x: np.ndarray) -> np.ndarray:
        scale = np.asarray(self.params["final_norm"]["scale"], np.float64)
        table = self.params["embedding" if self.size.tied_embeddings else "head"]
        return norm(x, scale, self.size.norm_eps) @ np.asarray(table, np.float64).T


def best(scores: dict[int, float], count: int) -> list[int]:
    """The places of the highest scores, the earlier of equal ones."""
    return sorted(sorted(scores, key=lambda place: (-scores[place], place))[:count])
