"""Which of our parameters is which tensor of a Hugging Face checkpoint: one table a family, read both ways.

Names with `{i}` stand for one a layer. A table says nothing about files (`checkpoint.py`) or devices
(`load.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """How a tensor is laid out in a checkpoint.

    `take(index, shape)` is the part of their tensor, which has that shape, that holds our part; `ours` turns
    that part into ours, given the index of our part; `theirs` turns a whole parameter of ours into their
    tensor, with zeros where a tensor holds other parameters too.
    """

    take: Callable[[Index, Shape], Index]
    ours: Callable[[np.ndarray, Index], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _patches_theirs(kernel: np.ndarray) -> np.ndarray:
    side = round((kernel.shape[0] / 3) ** 0.5)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _packed(third: int) -> Form:
    """One of the three projections that torch's `MultiheadAttention` stacks, kernel or bias."""

    def take(index: Index, shape: Shape) -> Index:
        start = shape[0] // 3 * third
        out = slice(start + index[-1].start, start + index[-1].stop)
        return (out, *index[:-1])

    def theirs(whole: np.ndarray) -> np.ndarray:
        parts = [np.zeros_like(whole.T)] * 3
        parts[third] = whole.T
        return np.concatenate(parts)

    return Form(take, lambda part, index: part.T, theirs)


FORMS: dict[str, Form] = {
    "same": Form(lambda index, shape: index, lambda part, index: part, lambda whole: whole),
    # torch's Linear is [out, in], flax's Dense [in, out].
    "transpose": Form(lambda index, shape: index[::-1], lambda part, index: part.T, lambda whole: whole.T),
    # A patch convolution [C, 3, p, p] is a Dense over (row, column, channel).
    "patches": Form(
        lambda index, shape: (index[1],),
        lambda part, index: part.transpose(2, 3, 1, 0).reshape(-1, part.shape[0])[index[0]],
        _patches_theirs,
    ),
    "packed_q": _packed(0),
    "packed_k": _packed(1),
}


@dataclass(frozen=True)
class Row:
    """One parameter: its path here, its name there.

    A row counts only where the model at hand has the parameter. A tensor of a row that does not count is
    an error in a checkpoint, unless the row is `spare`: then it is one that no requested output needs.
    """

    ours: str
    theirs: str
    form: str = "same"
    spare: bool = False


@dataclass(frozen=True)
class Table:
    """The rows of a family, and what else its checkpoints may hold.

    Attributes:
      rows: the parameters.
      spellings: (pattern, replacement) pairs that lead from other spellings of a name to that of the rows.
      ignored: patterns of tensors that are no parameters of the model: buffers, other heads, the text half.
    """

    rows: tuple[Row, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def canonical(self, name: str) -> str:
        """A tensor's name in the spelling of the rows."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def row_of(self, path: str) -> tuple[Row, int | None] | None:
        """The row of one of our paths, and the layer (None: there is none, or all are stacked)."""
        for row in self.rows:
            if "{i}" not in row.ours:
                if path == row.ours:
                    return row, None
                continue
            match = re.fullmatch(re.escape(row.ours).replace(r"\{i\}", "(?:_?([0-9]+))?"), path)
            if match:
                return row, int(match[1]) if match[1] else None
        return None

    def claims(self, name: str) -> Row | None:
        """The row that a tensor of this (canonical) name belongs to, in whatever layer."""
        for row in self.rows:
            if re.fullmatch(re.escape(row.theirs).replace(r"\{i\}", "[0-9]+"), name):
                return row
        return None

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this (canonical) name may be there without being a parameter."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def under(self, ours: str, theirs: str) -> Table:
        """The same table for a part of a larger model: paths and names get these prefixes.

        Patterns that start with ^ speak of the start of the part's own names.
        """

        def behind(pattern: str) -> str:
            return f"^{re.escape(theirs)}{pattern[1:]}" if pattern.startswith("^") else pattern

        rows = tuple(replace(row, ours=ours + row.ours, theirs=theirs + row.theirs) for row in self.rows)
        spellings = tuple(
            (behind(pattern), theirs + replacement if pattern.startswith("^") else replacement)
            for pattern, replacement in self.spellings
        )
        return Table(rows, spellings, tuple(map(behind, self.ignored)))


def join(tables: Iterable[Table], spellings: tuple[tuple[str, str], ...] = ()) -> Table:
    """One table of several parts; `spellings` of the whole come before those of the parts."""
    parts = list(tables)
    return Table(
        tuple(row for part in parts for row in part.rows),
        spellings + tuple(pair for part in parts for pair in part.spellings),
        tuple(pattern for part in parts for pattern in part.ignored),
    )


def _decoder() -> tuple[Row, ...]:
    layer = "model.layers.{i}."
    rows = [
        Row("embedding", "model.embed_tokens.weight"),
        Row("final_norm/scale", "model.norm.weight"),
        Row("head", "lm_head.weight", spare=True),  # often stored although it is tied to the embedding
        Row("layers{i}/attention_norm/scale", layer + "input_layernorm.weight"),
        Row("layers{i}/mlp_norm/scale", layer + "post_attention_layernorm.weight"),
    ]
    for name in ("q", "k", "v", "o"):
        rows.append(Row(f"layers{{i}}/{name}/weight", f"{layer}self_attn.{name}_proj.weight"))
    for name in ("q", "k", "v"):
        rows.append(Row(f"layers{{i}}/{name}/bias", f"{layer}self_attn.{name}_proj.bias"))
    for name in ("q_norm", "k_norm"):
        rows.append(Row(f"layers{{i}}/{name}/scale", f"{layer}self_attn.{name}.weight"))
    for name in ("gate", "up", "down"):
        rows.append(Row(f"layers{{i}}/{name}/weight", f"{layer}mlp.{name}_proj.weight"))
    return tuple(rows)


def _tower(style_rows: tuple[Row, ...]) -> tuple[Row, ...]:
    block, layer = "block{i}/", "encoder.layers.{i}."
    rows = [
        Row("patch_embedding/kernel", "embeddings.patch_embedding.weight", "patches"),
        Row("position_embedding", "embeddings.position_embedding.weight"),
        *style_rows,
    ]
    for ours, theirs in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        rows.append(Row(f"{block}{ours}/scale", f"{layer}{theirs}.weight", spare=True))
        rows.append(Row(f"{block}{ours}/bias", f"{layer}{theirs}.bias", spare=True))
    names = [(f"attention/{name}", f"self_attn.{name}_proj") for name in ("q", "k", "v")]
    names += [("attention/o", "self_attn.out_proj"), ("mlp/up", "mlp.fc1"), ("mlp/down", "mlp.fc2")]
    for ours, theirs in names:
        rows.append(Row(f"{block}{ours}/kernel", f"{layer}{theirs}.weight", "transpose", spare=True))
        rows.append(Row(f"{block}{ours}/bias", f"{layer}{theirs}.bias", spare=True))
    return tuple(rows)


def _probe() -> tuple[Row, ...]:
    """What the attention of SigLIP's pooling probe reads; the rest of that head no output needs."""
    rows = [
        Row("head/final_norm/scale", "post_layernorm.weight", spare=True),
        Row("head/final_norm/bias", "post_layernorm.bias", spare=True),
        Row("head/probe", "head.probe", spare=True),
    ]
    for name in ("q", "k"):
        for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
            packed = f"head.attention.in_proj_{theirs}"
            rows.append(Row(f"head/attention/{name}/{ours}", packed, f"packed_{name}", spare=True))
    return tuple(rows)


# Old files hold the rotary frequencies and the position numbers, which are computed.
_BUFFERS = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")
# The other half of a two-tower checkpoint, and what follows the last hidden state.
_BESIDE_TOWER = (
    r"^text_model\.",
    r"^logit_scale$",
    r"^logit_bias$",
    r"^visual_projection\.",
    r"^text_projection\.",
    r"^post_layernorm\.",
    r"^head\.",
)
_TOWER_SPELLING = ((r"^vision_model\.", ""),)

DECODER = Table(_decoder(), ignored=_BUFFERS)  # Llama, Qwen2 and Qwen3 name their tensors alike
SIGLIP = Table(
    _tower((Row("patch_embedding/bias", "embeddings.patch_embedding.bias"),)) + _probe(),
    _TOWER_SPELLING,
    _BUFFERS + _BESIDE_TOWER,
)
CLIP = Table(
    _tower(
        (
            Row("class_embedding", "embeddings.class_embedding"),
            Row("pre_norm/scale", "pre_layrnorm.weight"),  # so spelt
            Row("pre_norm/bias", "pre_layrnorm.bias"),
        )
    ),
    _TOWER_SPELLING,
    _BUFFERS + _BESIDE_TOWER,
)
PROJECTOR = Table(
    (
        Row("up/kernel", "linear_1.weight", "transpose"),
        Row("up/bias", "linear_1.bias"),
        Row("down/kernel", "linear_2.weight", "transpose"),
        Row("down/bias", "linear_2.bias"),
    )
)
TOWERS = {"siglip": SIGLIP, "clip": CLIP}


def llava(style: str) -> Table:
    """The table of a whole LLaVA with a tower of this style, as `LlavaForConditionalGeneration` saves it.

    Also read: the names that transformers 4.52 to 4.56 use in memory (`model.language_model.layers`), and
    towers with the `vision_model.` that older files have.
    """
    return join(
        (
            DECODER.under("decoder/", "language_model."),
            TOWERS[style].under("tower/", "vision_tower."),
            PROJECTOR.under("compressor/", "multi_modal_projector."),
            Table((), ignored=(r"^image_newline$",)),
        ),
        (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        ),
    )
