"""The named size tables of decoders and towers: numbers alone, no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class DecoderSize:
    """One row of the decoder table.

    `family` is the `model_type` of Hugging Face: "llama" has no biases, "qwen2" (Qwen1.5 and Qwen2.5) has
    them in the projections to queries, keys and values, "qwen3" normalises queries and keys in each head.
    `head_dim` = 0 stands for width / num_heads. `vocab_size` = 0 stands for the vocabulary of the run's
    own tokenizer (the toy sizes).
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    family: str = "llama"
    head_dim: int = 0
    vocab_size: int = 0
    tied_embeddings: bool = True
    context: int = 2048

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.width // self.num_heads)

    @property
    def num_nonembedding_params(self) -> int:
        """Parameters of the layers and the final norm, without embedding table and head."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = 2 * self.width * (q_width + kv_width) + 3 * self.width * self.mlp_width + 2 * self.width
        if self.family == "qwen2":
            layer += q_width + 2 * kv_width
        if self.family == "qwen3":
            layer += 2 * self.head_dim
        return self.num_layers * layer + self.width

    def num_params(self, vocab_size: int | None = None) -> int:
        """All parameters; a tied embedding table counts once.

        Args:
          vocab_size: rows of the table; None for the size's own.
        """
        rows = self.vocab_size if vocab_size is None else vocab_size
        return self.num_nonembedding_params + (1 if self.tied_embeddings else 2) * rows * self.width


@dataclass(frozen=True)
class TowerSize:
    """One row of the tower table.

    `select_layer` is the hidden state that compressors read and `levels` are those that multi-level
    compressors concatenate: 0 is the input of the first block, i the output of block i - 1. `style` is
    "siglip", or "clip": a class token in front, patches without bias, a norm before the first block.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    select_layer: int
    levels: tuple[int, ...]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    norm_eps: float = 1e-6
    style: str = "siglip"
    activation: str = "gelu_tanh"

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that do not fill a patch (384 = 27 x 14 + 6) are cut off."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in all, a class token not among them."""
        return self.grid**2

    @property
    def class_tokens(self) -> int:
        """Tokens in front of the patches: 1 for CLIP, else 0."""
        return 1 if self.style == "clip" else 0

    def num_params(self, layer: int | None = None) -> int:
        """Parameters up to a hidden state; the final norm and a pooling head lie behind all of them.

        Args:
          layer: which; None for the selected one.
        """
        width, clip = self.width, self.style == "clip"
        block = 4 * width * (width + 1) + (2 * width + 1) * self.mlp_width + 5 * width
        positions = (self.class_tokens + self.num_patches) * width
        # Behind the patches' weights: the class token and a norm, or a bias.
        embedding = 3 * self.patch_size**2 * width + (3 if clip else 1) * width + positions
        return embedding + (self.select_layer if layer is None else layer) * block


_qwen2 = partial(
    DecoderSize, family="qwen2", rope_theta=1e6, norm_eps=1e-6, vocab_size=151_936, context=32_768
)
_qwen3 = partial(
    DecoderSize,
    family="qwen3",
    rope_theta=1e6,
    norm_eps=1e-6,
    head_dim=128,
    vocab_size=151_936,
    context=40_960,
)

# Columns: width, layers, heads, kv heads, MLP width; from the config.json of the checkpoint that is named (of
# Qwen2.5 the base models). Toy sizes are named by total parameters with the demo's tokenizer, embeddings
# (tied) counted once.
SIZES: dict[str, DecoderSize] = {
    "toy-14k": DecoderSize(width=16, num_layers=2, num_heads=1, num_kv_heads=1, mlp_width=48),
    "toy-40k": DecoderSize(width=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=96),
    "toy-135k": DecoderSize(width=64, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=192),
    "toy-375k": DecoderSize(width=96, num_layers=3, num_heads=3, num_kv_heads=3, mlp_width=256),
    "qwen1.5-0.5b": _qwen2(1024, 24, 16, 16, 2816),
    "qwen1.5-1.8b": _qwen2(2048, 24, 16, 16, 5504, tied_embeddings=False),
    "qwen1.5-4b": _qwen2(2560, 40, 20, 20, 6912, rope_theta=5_000_000, tied_embeddings=False),
    "qwen1.5-7b": _qwen2(4096, 32, 32, 32, 11008, tied_embeddings=False),
    "qwen1.5-14b": _qwen2(5120, 40, 40, 40, 13696, vocab_size=152_064, tied_embeddings=False),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, context=131_072),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, vocab_size=152_064, tied_embeddings=False, context=131_072),
    "qwen2.5-14b": _qwen2(
        5120, 48, 40, 8, 13824, norm_eps=1e-5, vocab_size=152_064, tied_embeddings=False, context=131_072
    ),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288, tied_embeddings=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408, tied_embeddings=False),
    "vicuna-7b-v1.5": DecoderSize(
        4096, 32, 32, 32, 11008, vocab_size=32_000, tied_embeddings=False, context=4_096
    ),
    "vicuna-13b-v1.5": DecoderSize(
        5120, 40, 40, 40, 13824, vocab_size=32_000, tied_embeddings=False, context=4_096
    ),
    "smollm2-135m": DecoderSize(576, 30, 9, 3, 1536, rope_theta=100_000, vocab_size=49_152, context=8_192),
    "smollm2-360m": DecoderSize(960, 32, 15, 5, 2560, rope_theta=100_000, vocab_size=49_152, context=8_192),
    "smollm2-1.7b": DecoderSize(2048, 24, 32, 32, 8192, rope_theta=130_000, vocab_size=49_152, context=8_192),
}


def tower_levels(num_layers: int) -> tuple[int, ...]:
    """What multi-level compressors read: (12, 16, 22, 23) of 24, half, two thirds, third and second last."""
    levels = (round(num_layers / 2), round(num_layers * 2 / 3), num_layers - 2, num_layers - 1)
    return tuple(max(level, 1) for level in levels)


def _siglip(
    image: int, patch: int, width: int, layers: int, heads: int, mlp: int, **options: Any
) -> TowerSize:
    """A tower that is read as LLaVA reads one: its second last hidden state."""
    levels = tower_levels(layers)
    return TowerSize(image, patch, width, layers, heads, mlp, layers - 1, levels, **options)


_clip = partial(_siglip, style="clip", activation="quick_gelu", norm_eps=1e-5, mean=CLIP_MEAN, std=CLIP_STD)

# Columns: image size, patch size, width, layers, heads, MLP width. SigLIP 2 is SigLIP with other weights.
TOWERS: dict[str, TowerSize] = {
    # The demo's tower; its weights ship with the package (`vlmscale tower` reproduces them).
    "scenes-48": TowerSize(48, 6, 64, 4, 2, 192, select_layer=4, levels=(1, 2, 3, 4)),
    "clip-vit-large-patch14-336": _clip(336, 14, 1024, 24, 16, 4096),
    "clip-vit-large-patch14": _clip(224, 14, 1024, 24, 16, 4096),
    "siglip-so400m-patch14-384": _siglip(384, 14, 1152, 27, 16, 4304),
    "siglip-base-patch16-224": _siglip(224, 16, 768, 12, 12, 3072),
    "siglip-large-patch16-384": _siglip(384, 16, 1024, 24, 16, 4096),
    "siglip2-so400m-patch14-384": _siglip(384, 14, 1152, 27, 16, 4304),
    "siglip2-so400m-patch16-384": _siglip(384, 16, 1152, 27, 16, 4304),
    "siglip2-base-patch16-224": _siglip(224, 16, 768, 12, 12, 3072),
    "siglip2-large-patch16-384": _siglip(384, 16, 1024, 24, 16, 4096),
}
