"""What a pass took inside the LLM: tokens of each layer, cache and FLOPs of a mean answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmscale.config import reducer_of
from vlmscale.cost import flops
from vlmscale.cost.image import ImageFlops, image_flops
from vlmscale.cost.reduced import ranking_flops, tokens_by_layer, two_pass_flops
from vlmscale.evaluate.answers import Said
from vlmscale.evaluate.asking import Pass
from vlmscale.evaluate.guided import CONSISTENCY
from vlmscale.evaluate.loaded import LoadedRun
from vlmscale.models.sizes import SIZES, DecoderSize
from vlmscale.reducers import ReducerSpec

Visual = Counter[tuple[int, tuple[int, ...]]]  # how often so many tokens of images, and so many behind cuts


class Spent(NamedTuple):
    """Means over the answers of a pass.

    Attributes:
      layers: tokens of the prompt in each layer of the run's LLM, where it was asked.
      kv_bytes: of the cache of the model whose answer it is.
      flops: of images, the LLM, and what stands in front of it.
    """

    layers: list[float]
    kv_bytes: float
    flops: float


class Prompts(NamedTuple):
    """Means over the items of a task.

    Attributes:
      text: tokens of text.
      images: how many.
      question: tokens of the question.
      ahead: tokens of text in front of the last image.
    """

    text: float
    images: float
    question: float
    ahead: float


def spent(run: LoadedRun, one: Pass, image: ImageFlops, prompts: Prompts) -> Spent:
    """That of a pass.

    Args:
      run: that answered.
      one: the task, and what was said.
      image: what an image costs in front of the run's LLM.
      prompts: what was asked.
    """
    cell, size, (text, images, *_) = run.cell, SIZES[run.cell.llm.name], prompts
    said = [answer for item in one.task.items if (answer := one.journal.said.get(item.id)) is not None]
    own = [answer for answer in said if not answer.exited]
    share = len(own) / len(said) if said else 1.0
    reducer = reducer_of(cell) if one.visual_tokens else None
    generated = _mean_tokens(answer.tokens for answer in own)
    if reducer is not None and reducer.appended:
        return _in_two_passes(run, own, image, prompts, reducer.appended)
    layers = _mean_layers(reducer, size, text, Counter((answer.visual_tokens, answer.kept) for answer in own))
    llm = flops.inference_flops(size, run.prepared.vocab_rows(cell), layers, generated)
    llm += ranking_flops(reducer, size, layers)
    seen = images * (image.tower + image.query_pass + share * image.compressor)
    kv_bytes = _cache(run, size, layers, generated)
    asked = [answer for answer in said if answer.guide_tokens]  # the guide; items without pictures are not
    if run.guide is None or not asked:
        return Spent(layers, kv_bytes, seen + llm)
    guided = len(asked) / len(said)
    front = _in_front(run, run.guide, one, asked, prompts._replace(images=images / guided))
    kv_bytes = share * kv_bytes + (1 - share) * front.kv_bytes
    return Spent(layers, kv_bytes, seen + guided * front.flops + share * llm)


def _in_front(run: LoadedRun, guide: LoadedRun, one: Pass, said: Sequence[Said], prompts: Prompts) -> Spent:
    """What the guide takes for an answer; the tower has run already."""
    text, images, question, *_ = prompts
    size, rows = SIZES[guide.cell.llm.name], guide.prepared.vocab_rows(guide.cell)
    visual: Visual = Counter((answer.visual_tokens, ()) for answer in said)
    steps = _mean_tokens(answer.guide_tokens for answer in said)
    layers = _mean_layers(None, size, text, visual)
    image = image_flops(guide.cell, one.visual_tokens, round(text), question)
    # It looks at its attention a second time: at that of the text behind the image, and of what it says.
    again = flops.score_flops(size, text, layers[0] - text, True)
    again += flops.score_flops(size, max(steps - 1, 0), layers[0], True)
    total = flops.inference_flops(size, rows, layers, steps) + size.num_layers * again
    if run.cell.reducer.exit_above < 1:
        few = _mean_layers(CONSISTENCY, size, text, visual)
        total += flops.inference_flops(size, rows, few, steps + 1)  # all of the answer is fed
    total += images * (image.compressor + image.query_pass)
    return Spent(layers, _cache(run, size, layers, steps), total)


def _in_two_passes(
    run: LoadedRun, said: Sequence[Said], image: ImageFlops, prompts: Prompts, appended: int
) -> Spent:
    """That of a model with compression tokens, with both passes of each answer."""
    size, added = SIZES[run.cell.llm.name], prompts.images * appended
    visual, generated = (
        _mean_tokens(getattr(one, name) for one in said) for name in ("visual_tokens", "tokens")
    )
    first, kept = prompts.ahead + visual + added, prompts.ahead + added
    second = prompts.text - prompts.ahead
    rows = run.prepared.vocab_rows(run.cell)
    llm = two_pass_flops(size, rows, first, kept, second, generated)
    cached = [kept + second] * size.num_layers
    return Spent(
        [first + second] * size.num_layers,
        _cache(run, size, cached, generated),
        prompts.images * sum(image) + llm,
    )


def _mean_tokens(counts: Iterable[int]) -> float:
    found = list(counts)
    return float(np.mean(found)) if found else 0.0


def _mean_layers(reducer: ReducerSpec | None, size: DecoderSize, text: float, visual: Visual) -> list[float]:
    """Mean tokens of prompts in each layer, by how many visual tokens they have, and keep."""
    if not visual:
        return [text] * size.num_layers
    each = [tokens_by_layer(reducer, size.num_layers, text, *tokens) for tokens in visual]
    mean: list[float] = np.average(np.array(each), axis=0, weights=list(visual.values())).tolist()
    return mean


def _cache(run: LoadedRun, size: DecoderSize, layers: list[float], generated: float) -> float:
    """Bytes of keys and values; the last generated token is not fed back."""
    tokens = sum(layers) + size.num_layers * max(generated - 1, 0)
    return 2.0 * run.dtype.itemsize * size.num_kv_heads * size.head_dim * tokens
