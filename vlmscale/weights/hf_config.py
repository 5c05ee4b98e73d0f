"""Between the config.json of a Hugging Face directory and the rows of our size tables.

Both spellings of keys are read, that of transformers 4 and that of 5; what would change a number and is not
built here is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from vlmscale.errors import UserError
from vlmscale.models.sizes import CLIP_MEAN, CLIP_STD, DecoderSize, TowerSize, tower_levels
from vlmscale.records import read_object

Config = dict[str, Any]
LLAVA_COMPRESSORS = ("mlp", "pool")  # those that a LLaVA directory of ours may hold

# What transformers takes where a config.json leaves a key out (5.23, `LlamaConfig()` and so on).
_DECODER_DEFAULTS: Config = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_QWEN_DEFAULTS: Config = _DECODER_DEFAULTS | {
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "num_key_value_heads": 32,
}
DECODER_FAMILIES: dict[str, Config] = {
    "llama": _DECODER_DEFAULTS,
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS | {"head_dim": 128},
}
_TOWER_DEFAULTS: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "num_channels": 3,
}
TOWER_FAMILIES: dict[str, Config] = {
    "siglip": _TOWER_DEFAULTS | {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    "clip": _TOWER_DEFAULTS | {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
}
# What a LLaVA's config.json means by an empty `vision_config`: CLIP ViT-L/14 at 336 pixels.
_LLAVA_TOWER: Config = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}


@dataclass(frozen=True)
class LlavaConfig:
    """What the config.json of a LLaVA says.

    Attributes:
      tower: its `select_layer` is the hidden state that the projector reads.
      keep_class_token: whether that state's first token counts too ("full", not "default").
      visual_tokens: tokens an image takes.
      compressor: "mlp", or what vlmscale's own key names.
    """

    decoder: DecoderSize
    tower: TowerSize
    image_token_id: int
    keep_class_token: bool
    visual_tokens: int
    compressor: str = "mlp"


def read_config(directory: Path) -> Config:
    """The config.json of a directory.

    Raises:
      UserError: it is absent or no JSON object.
    """
    path = directory / "config.json"
    config = read_object(path) if directory.is_dir() else None
    if config is None:
        raise UserError(_absent(directory))
    return config


def _absent(directory: Path) -> str:
    if not directory.exists():
        return (
            f"{directory}: no such directory; download the model first, for example with "
            f"`hf download {directory} --local-dir DIR`, and name DIR"
        )
    if not directory.is_dir():
        return f"{directory}: is a file; name the directory that it is in"
    snapshots = sorted((directory / "snapshots").glob("*"))
    if snapshots:
        return f"{directory}: is the root of a download cache; name {snapshots[-1]}"
    return (
        f"{directory / 'config.json'}: No such file; name a directory that a model was downloaded or saved to"
    )


def kind_of(config: Config, where: Path) -> str:
    """ "llava", "decoder" or "tower".

    Raises:
      UserError: a model_type of another family.
    """
    name = config.get("model_type")
    if name == "llava":
        if "mm_vision_tower" in config:
            raise UserError(
                f"{where}: is of the original format; take the one that transformers loads (llava-hf/...)"
            )
        return "llava"
    if name in tuple(DECODER_FAMILIES):  # a tuple, since what a file holds may not be hashable
        return "decoder"
    if _tower_family(name):
        return "tower"
    known = ["llava", *DECODER_FAMILIES, *(f"{family}[_vision_model]" for family in TOWER_FAMILIES)]
    raise UserError(
        f"{where}: model_type {name!r} is not one that is built here ({', '.join(known)}){_hint(name)}"
    )


def decoder_size(config: Config, where: Path) -> DecoderSize:
    """The decoder that a config.json (or a `text_config`) describes.

    Raises:
      UserError: another family, or an option that would change its numbers and is not built here.
    """
    family = str(config.get("model_type", "llama"))
    if family not in DECODER_FAMILIES:
        raise UserError(f"{where}: decoder model_type {family!r} is not one of {', '.join(DECODER_FAMILIES)}")
    _refuse_quantised(config, where)
    values = DECODER_FAMILIES[family] | {key: value for key, value in config.items() if value is not None}
    _refuse(values, where, "hidden_act", ("silu",))
    _refuse(values, where, "mlp_bias", (False,))
    _refuse(values, where, "attention_bias", (True, False) if family == "qwen2" else (False,))
    _refuse(values, where, "use_sliding_window", (False,))
    if any(kind != "full_attention" for kind in values.get("layer_types", ())):
        _no(where, "layer_types", values["layer_types"])
    heads = _positive(values, where, "num_attention_heads")
    width = _positive(values, where, "hidden_size")
    # Without a default, and where it says null, there are as many as query heads.
    grouped = "num_key_value_heads" in values and config.get("num_key_value_heads", heads) is not None
    kv_heads = _positive(values, where, "num_key_value_heads") if grouped else heads
    _divides(where, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    if "head_dim" not in values:
        _divides(where, "hidden_size", width, "num_attention_heads", heads)
    head_dim = _positive({"head_dim": width // heads} | values, where, "head_dim")
    _divides(where, "head_dim", head_dim, "the halves that rotary embeddings turn", 2)
    return DecoderSize(
        width=width,
        num_layers=_positive(values, where, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_width=_positive(values, where, "intermediate_size"),
        rope_theta=_rope_theta(values, where),
        norm_eps=_number(values, where, "rms_norm_eps"),
        family=family,
        head_dim=head_dim,
        vocab_size=_positive(values, where, "vocab_size"),
        tied_embeddings=bool(values["tie_word_embeddings"]),
        context=_positive(values, where, "max_position_embeddings"),
    )


def tower_size(config: Config, where: Path) -> TowerSize:
    """The tower that a config.json (or its `vision_config`) describes.

    The selected layer is LLaVA's, the second last (`vision_feature_layer` -2), and the levels are those
    that TokenPacker and QueCC read from a CLIP of 24 layers (12, 16, 22, 23), at the same relative depths.

    Raises:
      UserError: another family, or an option that would change its numbers and is not built here.
    """
    _refuse_quantised(config, where)
    if "vision_config" in config:  # a whole CLIP or SigLIP, text half included
        config = {"model_type": config.get("model_type")} | _part(config, where, "vision_config")
    family = _tower_family(config.get("model_type"))
    if family is None:
        name = config.get("model_type")
        known = ", ".join(TOWER_FAMILIES)
        raise UserError(f"{where}: tower model_type {name!r} is not one of {known}{_hint(name)}")
    values = TOWER_FAMILIES[family] | {key: value for key, value in config.items() if value is not None}
    _refuse(values, where, "hidden_act", tuple(_ACTIVATIONS))
    _refuse(values, where, "num_channels", (3,))
    layers = _positive(values, where, "num_hidden_layers")
    clip = family == "clip"
    width = _positive(values, where, "hidden_size")
    heads = _positive(values, where, "num_attention_heads")
    _divides(where, "hidden_size", width, "num_attention_heads", heads)
    image, patch = (_positive(values, where, key) for key in ("image_size", "patch_size"))
    if patch > image:
        raise UserError(f"{where}: patch_size={patch}: an image of image_size={image} holds no such patch")
    return TowerSize(
        image_size=image,
        patch_size=patch,
        width=width,
        num_layers=layers,
        num_heads=heads,
        mlp_width=_positive(values, where, "intermediate_size"),
        select_layer=max(layers - 1, 0),
        levels=tower_levels(layers),
        mean=CLIP_MEAN if clip else (0.5, 0.5, 0.5),
        std=CLIP_STD if clip else (0.5, 0.5, 0.5),
        norm_eps=_number(values, where, "layer_norm_eps"),
        style=family,
        activation=_ACTIVATIONS[values["hidden_act"]],
    )


def llava_config(config: Config, where: Path) -> LlavaConfig:
    """What the config.json of a `LlavaForConditionalGeneration` describes.

    The wrapper and its text model may disagree on whether the head is tied: as in transformers, one that
    says so is enough.

    Raises:
      UserError: a part of another family, or an option that is not built here.
    """
    _refuse_quantised(config, where)
    decoder = decoder_size(_part(config, where, "text_config"), where)
    decoder = replace(
        decoder, tied_embeddings=decoder.tied_embeddings or bool(config.get("tie_word_embeddings"))
    )
    vision = _part(config, where, "vision_config") or _LLAVA_TOWER
    tower = tower_size({"model_type": "clip_vision_model"} | vision, where)
    _refuse(config, where, "projector_hidden_act", ("gelu",))
    _refuse(config, where, "multimodal_projector_bias", (True,))
    _refuse(config, where, "vision_feature_select_strategy", ("default", "full"))
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or isinstance(layer, bool):
        _no(where, "vision_feature_layer", layer)
    chosen = layer if layer >= 0 else tower.num_layers + 1 + layer
    if not 0 <= chosen <= tower.num_layers:
        raise UserError(f"{where}: vision_feature_layer={layer}: the tower has {tower.num_layers} layers")
    keep = config.get("vision_feature_select_strategy", "default") == "full"
    own = _part(config, where, "vlmscale")
    tokens = tower.num_patches + tower.class_tokens - (0 if keep else 1)
    if own.get("compressor", "mlp") not in LLAVA_COMPRESSORS:
        _no(where, "compressor", own["compressor"])
    ids = (config.get(key) for key in ("image_token_id", "image_token_index"))  # new and old spelling
    return LlavaConfig(
        decoder=decoder,
        tower=replace(tower, select_layer=chosen, levels=(chosen,)),
        image_token_id=next((int(number) for number in ids if isinstance(number, int)), 32000),
        keep_class_token=keep,
        visual_tokens=_positive({"visual_tokens": tokens} | own, where, "visual_tokens"),
        compressor=own.get("compressor", "mlp"),
    )


def decoder_config(size: DecoderSize, vocab_size: int) -> Config:
    """The config.json of a decoder, the inverse of `decoder_size`."""
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config: Config = {
        "architectures": [names[size.family]],
        "model_type": size.family,
        "vocab_size": vocab_size,
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": size.context,
        "rms_norm_eps": size.norm_eps,
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": size.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
        "tie_word_embeddings": size.tied_embeddings,
    }
    if size.family != "qwen2":
        config |= {"head_dim": size.head_dim, "attention_bias": False}
    return config


def tower_config(size: TowerSize, num_layers: int) -> Config:
    """The config.json of a tower with so many layers, the inverse of `tower_size`."""
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == size.activation)
    config: Config = {
        "architectures": ["CLIPVisionModel" if size.style == "clip" else "SiglipVisionModel"],
        "model_type": f"{size.style}_vision_model",
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": size.num_heads,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "num_channels": 3,
        "layer_norm_eps": size.norm_eps,
        "hidden_act": activation,
    }
    if size.style == "siglip":
        config["vision_use_head"] = False  # the pooling head is no part of a tower
    return config


def _tower_family(model_type: Any) -> str | None:
    for family in TOWER_FAMILIES:
        if model_type in (family, f"{family}_vision_model"):
            return family
    return None


def _hint(model_type: Any) -> str:
    naflex = str(model_type).startswith("siglip2")
    return "; of SigLIP 2 only the fixed resolutions are, whose model_type is siglip" if naflex else ""


def _rope_theta(values: Config, where: Path) -> float:
    for key in ("rope_scaling", "rope_parameters"):  # the first wins in transformers; neither may change much
        rope = _part(values, where, key)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            _no(where, key, rope)
        _refuse(rope, where, "partial_rotary_factor", (1.0,))
    _refuse(values, where, "partial_rotary_factor", (1.0,))
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return _number({"rope_theta": 10_000.0} | values | rope, where, "rope_theta")


def _part(values: Config, where: Path, key: str) -> Config:
    """An object inside a config.json; an empty one where there is none."""
    part = values.get(key)
    if part is not None and not isinstance(part, dict):
        raise UserError(f"{where}: {key}={part!r}: must be a JSON object")
    return part or {}


def _refuse_quantised(config: Config, where: Path) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise UserError(
                f"{where}: has a {key}: quantised checkpoints are not read, take the model as it was before"
            )


def _refuse(values: Config, where: Path, key: str, allowed: tuple[Any, ...]) -> None:
    if values.get(key, allowed[0]) not in allowed:
        _no(where, key, values[key])


def _no(where: Path, key: str, value: Any) -> NoReturn:
    raise UserError(f"{where}: {key}={value!r} is not built here; docs/checkpoints.md has what is")


def _positive(values: Config, where: Path, key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key}={value!r}: must be a whole number above 0")
    return value


def _number(values: Config, where: Path, key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{where}: {key}={value!r}: must be a number above 0")
    return float(value)


def _divides(where: Path, what: str, whole: int, by: str, parts: int) -> None:
    if whole % parts:
        raise UserError(f"{where}: {what}={whole} does not divide by {by} ({parts})")
