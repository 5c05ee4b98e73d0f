"""Published tokenizers against transformers, and vlmscale's own in transformers; all are made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from vlmscale.data.processor import read_processor
from vlmscale.data.tokenizer import (
    CONFIG,
    END,
    FILE,
    IMAGE,
    PAD,
    SPECIAL,
    decode,
    encode_prompt,
    leading_ids,
    load_tokenizer,
    read_tokenizer,
    tokenizer_files,
    train_tokenizer,
)
from vlmscale.errors import UserError

transformers = pytest.importorskip("transformers")

TEXTS = [
    "USER: What is this? ASSISTANT: It's a red circle, isn't it.",
    "The answer is 12, 345 and 6789 . Two  spaces , and\na new line !",
    "A photo of a llama; the llama looks left. What does it see?",
] * 20
PROMPTS = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "<image>",
    "<image><image> compare",
    "USER: <image> and <image>\n\nWhich? ASSISTANT: 12345",
    " leading and trailing ",
    "no picture at all",
    "",
    "ünïcödé 漢字 🙂 e\u0301 <image>🦙",
    "text </s><s> <|im_end|> special",
    "USER:<image>next  to  it , isn't it ?",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_like() -> Tokenizer:
    """Llama 2's tokenizer.json in small: "▁" by the normalizer, bytes for what is unknown, <s> in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    # Only three of them are special; the bytes are ordinary words of the vocabulary.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False)])
    return tokenizer


def qwen_like() -> Tokenizer:
    """Qwen 2's tokenizer.json in small: bytes, one digit a piece, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    return tokenizer


MAKE = {"llama": llama_like, "qwen": qwen_like}
NAMED = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}


def save(directory: Path, kind: str, config: dict[str, Any], /, **files: Any) -> Path:
    """A directory as on a hub: tokenizer.json, tokenizer_config.json, and other files by their stem."""
    MAKE[kind]().save(str(directory / FILE))
    (directory / CONFIG).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    for stem, data in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(data))
    return directory


def llava_processor(tokenizer: Any, image_token: str = "<image>") -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return transformers.LlavaProcessor(
        CLIPImageProcessorPil(size=28, crop_size=28),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=image_token,
    )


def llava_ids(processor: Any, text: str, image_token: str = "<image>") -> list[int]:
    """Ids of LlavaProcessor for pictures of 28 x 28 in patches of 14: 4 visual tokens each."""
    pictures = [np.zeros((30, 40, 3), np.uint8)] * text.count(image_token)
    return [int(number) for number in processor(images=pictures or None, text=text)["input_ids"][0]]


def check_equal(directory: Path, theirs: Any = None) -> None:
    ours = read_tokenizer(directory)
    theirs = theirs or transformers.AutoTokenizer.from_pretrained(directory)
    processor = llava_processor(theirs)
    assert len(theirs) == ours.get_vocab_size()
    for text in PROMPTS:
        ids = encode_prompt(ours, text, "<image>", 4)
        assert ids == llava_ids(processor, text), text
        assert [ours.id_to_token(i) for i in ids].count("<image>") == 4 * text.count("<image>")
        assert decode(ours, ids) == theirs.decode(ids, skip_special_tokens=True)
    every = list(range(ours.get_vocab_size() + 5))  # the last of them are in no vocabulary
    assert decode(ours, every) == theirs.decode(every, skip_special_tokens=True)
    assert decode(ours, np.array(every[-9:])) == theirs.decode(every[-9:], skip_special_tokens=True)


@pytest.mark.parametrize("kind", MAKE)
def test_equal_to_a_saved_llava_processor(kind: str, tmp_path: Path) -> None:
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=MAKE[kind](), **NAMED[kind], extra_special_tokens={"image_token": "<image>"}
    )
    llava_processor(wrapped).save_pretrained(tmp_path)
    check_equal(tmp_path)
    assert read_processor(tmp_path).shape == (28, 28)  # from processor_config.json, all that is written now
    assert (encode_prompt(read_tokenizer(tmp_path), "x", "<image>", 1)[0] == 1) == (kind == "llama")


def added(content: str, special: bool = True) -> dict[str, Any]:
    return {"content": content, "special": special, "normalized": False, "lstrip": False, "rstrip": False}


OLD = {"add_bos_token": True, "add_eos_token": True, "legacy": False, "add_prefix_space": None}
HUB: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no settings": ("llama", {}, {}),
    "clean_up true": ("llama", {**NAMED["llama"], "clean_up_tokenization_spaces": True}, {}),
    "clean_up false": ("qwen", {**NAMED["qwen"], "clean_up_tokenization_spaces": False}, {}),
    "add_bos_token, legacy": ("llama", {**NAMED["llama"], **OLD}, {}),
    "add_bos_token false": ("llama", {**NAMED["llama"], "add_bos_token": False}, {}),
    "add_bos_token, qwen": ("qwen", {**NAMED["qwen"], **OLD, "bos_token": "<|endoftext|>"}, {}),
    "a new pad token": ("llama", {**NAMED["llama"], "pad_token": "<pad>"}, {}),
    "old style tokens": ("llama", {"pad_token": {"__type": "AddedToken", **added("<pad>")}}, {}),
    "additional tokens": ("qwen", {"additional_special_tokens": ["<|im_end|>", "<new>"]}, {}),
    "extra tokens": ("qwen", {"extra_special_tokens": ["<new>", "<newer>"], "eos_token": "<eos>"}, {}),
    "named tokens": ("qwen", {"image_token": "<image>", "video_token": "<video>"}, {}),
    "special_tokens_map": (
        "llama",
        NAMED["llama"],
        {"special_tokens_map": {"pad_token": added("<pad>"), "additional_special_tokens": ["<new>"]}},
    ),
    "added_tokens.json": ("qwen", NAMED["qwen"], {"added_tokens": {"<new>": 324, "<newer>": 325}}),
    "llava-hf": (
        "llama",
        {
            **NAMED["llama"],
            **OLD,
            "tokenizer_class": "LlamaTokenizer",
            "pad_token": "<pad>",
            "processor_class": "LlavaProcessor",
            "added_tokens_decoder": {
                **{str(i): added(t) for i, t in enumerate(("<unk>", "<s>", "</s>"))},
                "420": added("<image>"),
                "421": added("<pad>"),
            },
        },
        {"config": {"model_type": "llava"}},
    ),
    "not special": (
        "qwen",
        {
            "added_tokens_decoder": {
                "323": added("<image>", special=False),
                "324": added("<x>", special=False),
            }
        },
        {},
    ),
    "qwen2": (
        "qwen",
        {**NAMED["qwen"], "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "errors": "replace"},
        {"config": {"model_type": "qwen2"}},
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_settings_beside_tokenizer_json_have_the_effect_of_transformers(name: str, tmp_path: Path) -> None:
    kind, config, files = HUB[name]
    check_equal(save(tmp_path, kind, config, **files))


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    save(tmp_path, "qwen", NAMED["qwen"])
    tokenizer = Tokenizer.from_file(str(tmp_path / FILE))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / FILE))
    ours, theirs = read_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[0])["input_ids"] == ours.encode(TEXTS[0]).ids
    assert theirs("a")["input_ids"] == ours.encode("a").ids


def own() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def write_own(directory: Path, **config: Any) -> Path:
    files = tokenizer_files(own())
    assert set(files) == {FILE, CONFIG}
    files[CONFIG] = json.dumps({**json.loads(files[CONFIG]), **config})
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize("model_type", [None, "llava", "llama", "qwen3"])
def test_own_tokenizer_in_transformers(model_type: str | None, tmp_path: Path) -> None:
    theirs_path = write_own(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = own(), transformers.AutoTokenizer.from_pretrained(theirs_path)
    assert len(theirs) == ours.get_vocab_size()
    assert (theirs.pad_token, theirs.eos_token, theirs.bos_token) == (PAD, END, None)
    assert theirs.image_token_id == ours.token_to_id(IMAGE)
    assert theirs.convert_tokens_to_ids(list(SPECIAL)) == [ours.token_to_id(token) for token in SPECIAL]
    for text in [*TEXTS[:3], *PROMPTS]:
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == decode(ours, ids) == text
    assert load_tokenizer(tmp_path / FILE).encode(IMAGE).ids == ours.encode(IMAGE).ids  # still ordinary text


def test_own_tokenizer_in_llava_processor(tmp_path: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(write_own(tmp_path))
    processor, ours = llava_processor(theirs), read_tokenizer(tmp_path)
    assert processor.image_token == IMAGE
    for text in (f"<|user|>{IMAGE}\nWhat is this?<|end|><|assistant|>", f"{IMAGE} {IMAGE}", "none 123"):
        ids = llava_ids(processor, text, IMAGE)
        assert encode_prompt(ours, text, IMAGE, 4) == ids
        assert [ours.id_to_token(i) for i in ids].count(IMAGE) == 4 * text.count(IMAGE)
    processor.save_pretrained(tmp_path / "again")
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "again").image_token == IMAGE


def test_tokenizer_files_of_a_foreign_tokenizer() -> None:
    with pytest.raises(UserError, match=r"has no <\|pad\|>; it was not made by vlmscale"):
        tokenizer_files(qwen_like())


@pytest.mark.parametrize("image_token", [None, ""])
def test_a_language_model_alone_has_no_image_token(image_token: str | None) -> None:
    tokenizer = llama_like()
    for text in ("USER: hello", "<image> is a token like all others"):
        assert encode_prompt(tokenizer, text, image_token, 0) == tokenizer.encode(text).ids


def test_encode_prompt_errors() -> None:
    with pytest.raises(UserError) as caught:
        encode_prompt(qwen_like(), "x", "<img>", 4)
    assert str(caught.value).startswith(
        "image token '<img>' is not an added token of the tokenizer (it has <image>"
    )
    with pytest.raises(UserError, match="is not an added token"):
        encode_prompt(qwen_like(), "x", "a", 4)  # of the vocabulary, but no added token
    with pytest.raises(ValueError, match="1 visual token or more, not 0"):
        encode_prompt(qwen_like(), "x", "<image>", 0)
    with pytest.raises(ValueError, match="takes special tokens for ordinary text"):
        encode_prompt(own(), "x", IMAGE, 4)


def test_a_missing_tokenizer_json_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json: make it with transformers, AutoTokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_tokenizer(tmp_path)
    assert f"{tmp_path} has no tokenizer.json, only tokenizer.model: make it with" in str(caught.value)
    assert f"from_pretrained('{tmp_path}').save_pretrained('{tmp_path}')" in str(caught.value)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"split_special_tokens": True}, "key split_special_tokens is true"),
    ({"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}, "is not supported"),
    (
        {"added_tokens_decoder": {"9999": added("<new>")}},
        "token '<new>' has id 9999, and 324 by tokenizer.json",
    ),
    ({"added_tokens_decoder": {"323": added("<|im_end|>")}}, "token '<|im_end|>' has id 323, and 322 by"),
    ({"added_tokens_decoder": {"x": added("<new>")}}, "the added tokens are damaged"),
    ({"added_tokens_decoder": {"324": "<new>"}}, "the added tokens are damaged"),
    ({"added_tokens_decoder": {"324": {"special": True}}}, "the added tokens are damaged"),
    ({"added_tokens_decoder": []}, "the added tokens are damaged"),
]


@pytest.mark.parametrize("config, message", ERRORS)
def test_what_is_not_supported_names_the_file(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_tokenizer(save(tmp_path, "qwen", config))
    assert str(caught.value).startswith(f"{tmp_path / CONFIG}: ")
    assert message in str(caught.value)


def test_clean_up_of_other_models_than_bpe(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / FILE))
    (tmp_path / CONFIG).write_text('{"clean_up_tokenization_spaces": true}')
    with pytest.raises(
        UserError, match="key clean_up_tokenization_spaces is true, which is supported for BPE"
    ):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [FILE, CONFIG, "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b""])
def test_damaged_files(name: str, text: bytes, tmp_path: Path) -> None:
    save(tmp_path, "qwen", {})
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name} is not ")
    assert "\n" not in str(caught.value)


def test_leading_ids_are_what_the_tokenizer_puts_in_front() -> None:
    llama = llama_like()
    assert leading_ids(llama) == (1,)
    llama.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert leading_ids(llama) == (1, 2)
    assert leading_ids(qwen_like()) == leading_ids(own()) == ()
    assert leading_ids(Tokenizer(models.BPE())) == ()  # no word in its vocabulary
