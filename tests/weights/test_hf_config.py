"""What a config.json is taken to mean, against what transformers takes it to mean."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.pretrained import Saved, refused, rewrite, saver, tensors_of
from vlmscale.errors import UserError
from vlmscale.models.sizes import CLIP_MEAN, SIZES, TOWERS, DecoderSize, TowerSize
from vlmscale.weights.hf_config import decoder_size, kind_of, llava_config, read_config, tower_size

HERE = Path("somewhere/config.json")
Config = dict[str, Any]
DECODERS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
TOWER_CONFIGS = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}


def their_decoder(config: Any) -> DecoderSize:
    """A row of our table from what a config object of transformers ended up with."""
    heads = config.num_attention_heads
    return DecoderSize(
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        mlp_width=config.intermediate_size,
        rope_theta=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
        family=config.model_type,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        context=config.max_position_embeddings,
    )


def check_tower(ours: TowerSize, theirs: Any) -> None:
    for mine, name in (
        ("image_size", "image_size"),
        ("patch_size", "patch_size"),
        ("width", "hidden_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        ("mlp_width", "intermediate_size"),
        ("norm_eps", "layer_norm_eps"),
    ):
        assert getattr(ours, mine) == getattr(theirs, name), name
    assert ours.activation == theirs.hidden_act.replace("pytorch_", "")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_key_value_heads": None},
        {"num_key_value_heads": None, "num_attention_heads": 16},
        {"num_key_value_heads": 8, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}},
        {"rope_parameters": {"rope_theta": 3e5}, "rope_theta": 7.0},
        {"rope_scaling": {"type": "default"}, "rope_theta": 7.0},
        {"rope_scaling": None, "rope_theta": 7.0, "torch_dtype": "float16", "tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}, "rope_parameters": {"rope_theta": 6.0}},
        {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", DECODERS)
def test_decoder_keys_mean_what_they_mean_to_transformers(family: str, given: Config) -> None:
    theirs = DECODERS[family].from_dict(json.loads(json.dumps(given)))
    assert decoder_size({"model_type": family} | given, HERE) == their_decoder(theirs)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("diff", [False, True], ids=["all keys", "only what differs"])
def test_what_transformers_saves_is_read_back(family: str, diff: bool) -> None:
    config = DECODERS[family](hidden_size=256, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=0.5)
    saved = config.to_diff_dict() if diff else config.to_dict()
    assert decoder_size(json.loads(json.dumps(saved)), HERE) == their_decoder(config)


@pytest.mark.parametrize("family", TOWER_CONFIGS)
@pytest.mark.parametrize("given", [{}, {"hidden_size": 96, "num_attention_heads": 3}, {"hidden_act": "gelu"}])
def test_tower_keys_mean_what_they_mean_to_transformers(family: str, given: Config) -> None:
    theirs = TOWER_CONFIGS[family](**given)
    for name in (family, f"{family}_vision_model"):
        check_tower(tower_size({"model_type": name} | given, HERE), theirs)
    check_tower(tower_size({"model_type": family, "vision_config": given}, HERE), theirs)


def test_an_empty_llava_is_that_of_transformers() -> None:
    theirs = transformers.LlavaConfig()
    ours = llava_config({"model_type": "llava"}, HERE)
    assert ours.decoder == their_decoder(theirs.text_config)
    check_tower(ours.tower, theirs.vision_config)
    assert ours.image_token_id == theirs.image_token_index
    assert ours.visual_tokens == theirs.image_seq_length == 576
    assert not ours.keep_class_token
    assert theirs.vision_feature_layer == -2
    assert ours.tower.select_layer == 23


@pytest.mark.parametrize("wrapper", [None, False, True])
@pytest.mark.parametrize("text", [None, False, True])
def test_a_llava_is_tied_when_transformers_ties_it(wrapper: bool | None, text: bool | None) -> None:
    config: Config = {"model_type": "llava", "text_config": {"model_type": "qwen2"}}
    if wrapper is not None:
        config["tie_word_embeddings"] = wrapper
    if text is not None:
        config["text_config"]["tie_word_embeddings"] = text
    theirs = transformers.LlavaConfig.from_dict(json.loads(json.dumps(config)))
    assert llava_config(config, HERE).decoder.tied_embeddings == theirs.tie_word_embeddings


LLAVA_15: Config = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
INTERLEAVE: Config = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 151646,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 152000,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}


def test_llava_15_of_the_hub() -> None:
    ours = llava_config(LLAVA_15, HERE)
    assert ours.decoder == replace(SIZES["vicuna-7b-v1.5"], vocab_size=32064)
    row = TOWERS["clip-vit-large-patch14-336"]
    assert ours.tower == replace(row, select_layer=23, levels=(23,))
    assert (ours.image_token_id, ours.visual_tokens, ours.keep_class_token) == (32000, 576, False)
    assert (ours.compressor, ours.tower.mean) == ("mlp", CLIP_MEAN)
    assert kind_of(LLAVA_15, HERE) == "llava"
    theirs = transformers.LlavaConfig.from_dict(json.loads(json.dumps(LLAVA_15)))
    assert ours.decoder == their_decoder(theirs.text_config)
    check_tower(ours.tower, theirs.vision_config)


def test_llava_interleave_of_the_hub() -> None:
    """Its tower was cut to 26 layers, all of which are run; the wrapper says nothing of tied embeddings."""
    ours = llava_config(INTERLEAVE, HERE)
    assert ours.decoder == replace(SIZES["qwen1.5-0.5b"], vocab_size=152000, tied_embeddings=True)
    row = TOWERS["siglip-so400m-patch14-384"]
    assert ours.tower == replace(row, num_layers=26, select_layer=26, levels=(26,))
    assert (ours.image_token_id, ours.visual_tokens, ours.keep_class_token) == (151646, 729, True)
    theirs = transformers.LlavaConfig.from_dict(json.loads(json.dumps(INTERLEAVE)))
    assert replace(ours.decoder, tied_embeddings=theirs.tie_word_embeddings) == their_decoder(
        theirs.text_config
    )
    check_tower(ours.tower, theirs.vision_config)


@pytest.mark.parametrize(
    "key, value, chosen",
    [
        ("vision_feature_layer", -1, 24),
        ("vision_feature_layer", -25, 0),
        ("vision_feature_layer", 0, 0),
        ("vision_feature_layer", 24, 24),
    ],
)
def test_layers_count_from_both_ends(key: str, value: int, chosen: int) -> None:
    assert llava_config(LLAVA_15 | {key: value}, HERE).tower.select_layer == chosen


def test_the_image_token_has_two_spellings_and_may_be_zero() -> None:
    rest = {key: value for key, value in LLAVA_15.items() if key != "image_token_index"}
    assert llava_config(rest | {"image_token_id": 7}, HERE).image_token_id == 7
    assert llava_config(rest | {"image_token_index": 0}, HERE).image_token_id == 0
    assert llava_config(rest, HERE).image_token_id == 32000


LLAMA = {"model_type": "llama"}
QWEN = {"model_type": "qwen2"}
BAD_DECODERS = [
    (LLAMA, {"model_type": "mistral"}, "mistral"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    (LLAMA, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}, "llama3"),
    (
        LLAMA,
        {"rope_scaling": {"type": "dynamic"}, "rope_parameters": {"rope_type": "default"}},
        "dynamic",
    ),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
    (LLAMA, {"rope_parameters": [1]}, "rope_parameters"),
    (LLAMA, {"rope_theta": "large"}, "rope_theta"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias"),
    (LLAMA, {"attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen3"}, {"attention_bias": True}, "attention_bias"),
    (QWEN, {"use_sliding_window": True}, "use_sliding_window"),
    (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
    (LLAMA, {"num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 60}, "num_key_value_heads"),
    (LLAMA, {"num_attention_heads": 7}, "num_attention_heads"),
    (LLAMA, {"hidden_size": 32, "num_attention_heads": 32}, "head_dim"),
    (LLAMA, {"num_key_value_heads": 0}, "num_key_value_heads"),
    (LLAMA, {"num_key_value_heads": "8"}, "num_key_value_heads"),
    (LLAMA, {"num_hidden_layers": -1}, "num_hidden_layers"),
    (LLAMA, {"hidden_size": 4096.0}, "hidden_size"),
    (LLAMA, {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    (LLAMA, {"compression_config": {"format": "pack"}}, "compression_config"),
]


@pytest.mark.parametrize("base, change, said", BAD_DECODERS, ids=lambda x: str(x)[:60])
def test_decoders_that_are_not_built_here(base: Config, change: Config, said: str) -> None:
    assert decoder_size(base, HERE)
    with pytest.raises(UserError) as caught:
        decoder_size(base | change, HERE)
    assert str(HERE) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


CLIP = {"model_type": "clip_vision_model"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_type": "siglip2_vision_model"}, "only the fixed resolutions"),
        ({"model_type": "dinov2"}, "dinov2"),
        ({"num_channels": 1}, "num_channels"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"image_size": [224, 224]}, "image_size"),
        ({"image_size": 16}, "patch_size"),
        ({"vision_config": [1]}, "vision_config"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ],
    ids=str,
)
def test_towers_that_are_not_built_here(change: Config, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        tower_size(CLIP | change, HERE)
    assert str(HERE) in str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"vision_feature_layer": 25}, "vision_feature_layer"),
        ({"vision_feature_layer": -26}, "vision_feature_layer"),
        ({"vision_feature_layer": True}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"text_config": {"model_type": "gemma"}}, "gemma"),
        ({"text_config": "vicuna"}, "text_config"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, "siglip2"),
        ({"vlmscale": {"compressor": "magic"}}, "magic"),
        ({"vlmscale": {"compressor": "quecc"}}, "quecc"),  # known, but a LLaVA directory has no place for it
        ({"vlmscale": {"visual_tokens": 0}}, "visual_tokens"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"text_config": LLAVA_15["text_config"] | {"quantization_config": {"bits": 4}}},
            "quantization_config",
        ),
    ],
    ids=lambda x: str(x)[:60],
)
def test_llavas_that_are_not_built_here(change: Config, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        llava_config(LLAVA_15 | change, HERE)
    assert str(HERE) in str(caught.value)


@pytest.mark.parametrize("name", ["siglip2", "siglip2_vision_model", "gpt2", None, ["llama"], {"a": 1}])
def test_unknown_families_are_named(name: Any) -> None:
    with pytest.raises(UserError, match="model_type") as caught:
        kind_of({"model_type": name}, HERE)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("\udcff", "is not JSON"),
        ("[" * 99_999, "not JSON"),
    ],
    ids=["cut", "list", "no text", "deep"],
)
def test_config_files_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=said) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_directory_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        read_config(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Each tiny model once."""
    return saver(tmp_path_factory)


@pytest.mark.parametrize(
    "text, said",
    [(None, "No such file"), ("{", "is not JSON"), ("[]", "is not a JSON object"), ("{}", "model_type None")],
)
def test_a_wrong_config_json_is_named(
    text: str | None, said: str, saved: Saved, tmp_path: Path, capsys: Any
) -> None:
    out = Path(shutil.copytree(saved("llama-plain-untied")[0], tmp_path / "x"))
    (out / "config.json").unlink()
    if text is not None:
        (out / "config.json").write_text(text)
    line = refused(out, capsys)
    assert str(out / "config.json") in line
    assert said in line


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("llama-plain-untied", {"model_type": "gpt_neox"}, "gpt_neox"),
        ("llama-plain-untied", {"model_type": "siglip2"}, "fixed resolutions"),
        ("llama-plain-untied", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama-plain-untied", {"mlp_bias": True}, "mlp_bias"),
        ("llama-plain-untied", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama-plain-untied", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama-plain-untied", {"vocab_size": 321}, "tensor model.embed_tokens.weight has shape"),
        ("llama-plain-untied", {"num_hidden_layers": 2}, "model.layers.2."),
        ("llama-plain-untied", {"num_hidden_layers": 4}, "tensor model.layers.3."),
        ("qwen2-plain-tied", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2-plain-tied", {"model_type": "llama"}, "_proj.bias is unknown"),
        ("clip-llama", {"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ("clip-llama", {"vision_feature_layer": [-2, -3]}, "vision_feature_layer"),
        ("clip-llama", {"vision_feature_layer": 9}, "vision_feature_layer=9"),
        ("clip-llama", {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ("clip-llama", {"image_token_index": 319}, "image_token_index=319"),
        ("clip-llama", {"vision_config": {"model_type": "siglip2_vision_model"}}, "siglip2"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_config_that_asks_for_something_else(
    name: str, change: dict[str, Any], said: str, saved: Saved, tmp_path: Path, capsys: Any
) -> None:
    directory, _ = saved(name)
    assert said in refused(rewrite(directory, tmp_path / "x", tensors_of(directory), **change), capsys)
