"""Tokenizers of the kinds that language models have, in small, trained on the spot."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

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

from vlmscale.data.records import PLACEHOLDER
from vlmscale.data.templates import LAYOUTS, V1_SYSTEM

STRUCTURE = sorted({token for layout in LAYOUTS.values() for token in (*layout.special, *layout.stops)})
# "US" is frequent enough for "▁USER" to be "▁US", "ER" and for "USER" to be one piece, as in Llama's.
LINES = [
    "US is a land. US, US and US; they are US",
    "USER",
    "USER: What is this? ASSISTANT: It's a red circle, isn't it.",
    "ASSISTANT: The answer is 12, 345 and 6789 . Two  spaces , and a new line !",
    "A photo of a llama; the llama looks left. What does it see?",
    V1_SYSTEM,
] * 20
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PREFIXES = ("first", "always", "normalizer")
_UNKNOWN = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _add(tokenizer: Tokenizer) -> Tokenizer:
    """With the structure tokens of all templates and an image token."""
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (*STRUCTURE, PLACEHOLDER)])
    return tokenizer


def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*LINES, "So.\nSo.\nSo.\n" * 50], trainer)  # ".\n" is a token, as in Qwen's
    return _add(tokenizer)


def sentencepiece_like(kind: str = "bpe", prefix: str = "first") -> Tokenizer:
    """As Llama's: "▁" for a space and in front, bytes for what is unknown, <s> in front.

    `prefix` is "first" for transformers' legacy=False and "always" for legacy=True, as transformers 5 reads a
    sentencepiece model, "normalizer" for the latter as tokenizer.json files of Llama 2 have it, or "never".
    """
    tokenizer = Tokenizer(
        models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>", fuse_unk=True)
    )
    words = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation()])
    tokenizer.train_from_iterator(LINES, _trainer(kind))
    data = json.loads(tokenizer.to_str())
    # The trainer knows no bytes that are no special tokens.
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in _UNKNOWN]
    data["model"]["byte_fallback"] = True
    if kind == "unigram":
        vocabulary = data["model"]["vocab"]
        vocabulary += [[piece, min(score for _, score in vocabulary)] for piece in _BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if prefix == "normalizer":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return _add(tokenizer)


def _trainer(kind: str) -> Any:
    if kind == "unigram":
        return trainers.UnigramTrainer(
            vocab_size=300, special_tokens=_UNKNOWN, unk_token="<unk>", show_progress=False
        )
    return trainers.BpeTrainer(vocab_size=520, special_tokens=[*_UNKNOWN, *_BYTES], show_progress=False)


def through(kind: str, text: str) -> str:
    """What encoding and decoding makes of a text: the tokenizer's own normalizer."""
    if kind == "byte-level":
        return unicodedata.normalize("NFC", text)
    return text.replace("▁", " ").removeprefix(" ")  # the space in front is taken for the prefix
