"""The tokenizers of runs: byte-level BPE trained on a run's own text, or that of a published checkpoint.

A published tokenizer is its tokenizer.json, read with the settings that transformers adds from the files
beside it (5.23: tokenization_utils_base.py, tokenization_utils_tokenizers.py), so that the ids are the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from vlmscale.content import TOKENIZER_FILES
from vlmscale.errors import UserError
from vlmscale.records import read_object

PAD, IMAGE, USER, ASSISTANT, END = "<|pad|>", "<|image|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, IMAGE, USER, ASSISTANT, END)
FILE, CONFIG, _MAP, _ADDED = TOKENIZER_FILES  # the last two are of files made before transformers 5
# Qwen's, Llama 3.1's and Llama 3's stand behind those that are made for the purpose.
_PADS = (PAD, "<unk>", "<pad>", "<|endoftext|>", "<|finetune_right_pad_id|>", "<|end_of_text|>", "</s>")
_FORCE_CLEAN = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the texts; digits stay single, so that numbers are read digit by digit.

    Args:
      texts: the run's questions and answers.
      vocab_size: upper bound, special tokens and the 256 bytes included.

    Returns:
      A tokenizer that can encode any text; special strings inside a text are ordinary text to it,
      because the special tokens are only ever inserted by id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json that `train_tokenizer` made."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of one of the special tokens.

    Raises:
      UserError: a foreign tokenizer without it.
    """
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"the tokenizer has no {token}; it was not made by vlmscale")
    return number


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, with the ids that transformers' TokenizersBackend gives.

    tokenizer.json decides the ids, the post-processor included: as in transformers 5, add_bos_token,
    add_eos_token, legacy and add_prefix_space of tokenizer_config.json change nothing. From
    tokenizer_config.json, or where that lists no added tokens from special_tokens_map.json and
    added_tokens.json, come tokens that tokenizer.json lacks, at the end of the vocabulary. Truncation and
    padding of the file are switched off, as a call of a transformers tokenizer does.

    AutoTokenizer does the same for LLaVA (model type llava in config.json), and equally for Qwen's own files.
    Where it builds a class of transformers 5 from the vocabulary and merges (LlamaTokenizer for a Llama
    directory), its ids differ if the normalizer or pre-tokenizer of tokenizer.json is not that of the class:
    for Llama 2's file, after a special token in the text and for text that starts with a space.

    Raises:
      UserError: tokenizer.json is missing or damaged, or a setting is not supported; it names the file and
        the key.
    """
    path = directory / FILE
    if not path.is_file():
        others = [n for n in ("tokenizer.model", "vocab.json", "tekken.json") if (directory / n).is_file()]
        folder = str(directory)
        raise UserError(
            f"{folder} has no {FILE}{', only ' + others[0] if others else ''}: make it with transformers, "
            f"AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own for this
        raise UserError(f"{path} is not a tokenizer ({' '.join(str(error).split())[:120]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_object(directory / CONFIG) or {}
    _refuse(directory / CONFIG, config, bpe=isinstance(tokenizer.model, models.BPE))
    _add_tokens(tokenizer, directory, config)
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str, image_token: str | None, visual_tokens: int) -> list[int]:
    """Ids of a prompt in which every `image_token` stands for `visual_tokens` of its ids.

    As transformers' LlavaProcessor does it: the placeholder's text is repeated, then all is tokenized with
    the special tokens of the post-processor, such as BOS. One placeholder for each picture.

    Args:
      tokenizer: of `read_tokenizer`, so that special tokens inside a text are recognised.
      text: the prompt, with nothing but the image's placeholders still to be filled in.
      image_token: the placeholder's text, "<image>" in LLaVA's checkpoints; None or empty for a language
        model alone, and then the text is tokenized as it is.
      visual_tokens: embeddings that the model puts in place of one picture, 1 or more if it has an
        `image_token`.

    Raises:
      UserError: `image_token` is no added token of the tokenizer.
      ValueError: `visual_tokens` is below 1, or the tokenizer takes special tokens for ordinary text.
    """
    if tokenizer.encode_special_tokens:
        raise ValueError("this tokenizer takes special tokens for ordinary text: use one of read_tokenizer")
    if not image_token:
        return list(tokenizer.encode(text).ids)
    if visual_tokens < 1:
        raise ValueError(f"a picture must have 1 visual token or more, not {visual_tokens}")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if image_token not in added:
        known = ", ".join(sorted(added)[:8]) or "none"
        raise UserError(
            f"image token {image_token!r} is not an added token of the tokenizer (it has {known}): "
            "set the one that the checkpoint was trained with"
        )
    ids: list[int] = tokenizer.encode(text.replace(image_token, image_token * visual_tokens)).ids
    return ids


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text of ids without the special tokens, as transformers' decode(skip_special_tokens=True).

    Ids that no token has, such as those of an embedding table padded to a round number, add nothing.
    """
    text: str = tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)
    return text


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Content of the files, by name, with which transformers' AutoTokenizer loads `train_tokenizer`'s result.

    The ids of a text are identical, and LlavaProcessor finds the image token. One thing differs: a special
    string inside a text, which is ordinary text here, becomes its one id there, as LlavaProcessor needs it.
    The config.json beside them must not be of model type qwen2: for that, transformers 5 makes any file a
    Qwen2Tokenizer, whose pre-tokenizer splits text in another way. (llava, llama and qwen3 are tested.)

    Raises:
      UserError: the tokenizer was not made by vlmscale.
    """
    for token in SPECIAL:
        special_id(tokenizer, token)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both know
        "pad_token": PAD,
        "eos_token": END,
        "bos_token": None,
        "extra_special_tokens": {"image_token": IMAGE},
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }
    return {FILE: tokenizer.to_str(pretty=True) + "\n", CONFIG: json.dumps(config, indent=2) + "\n"}


def text_tokenizers(tokenizer: Tokenizer, structure: Collection[str]) -> tuple[Tokenizer, Tokenizer]:
    """Two copies to which special strings, and those of `structure`, are ordinary text.

    The first is for the start of a text, the second for what follows a special token. They differ where the
    tokenizer puts its prefix "▁" in front of a text's first word alone (Metaspace with prepend_scheme
    "first": Llama and Vicuna with legacy=False); otherwise they are one object.
    """
    data = json.loads(tokenizer.to_str())
    # Offsets are those of whole tokens, leading spaces included, if no post-processor trims them.
    data.update(truncation=None, padding=None, post_processor=None)
    for token in data["added_tokens"]:
        token["special"] |= token["content"] in structure
    if data["model"]["type"] == "Unigram":  # finds every piece of its vocabulary in a text, "</s>" as well
        special = {token["content"] for token in data["added_tokens"] if token["special"]}
        vocabulary = data["model"]["vocab"]
        hidden = {piece for piece, _ in vocabulary if piece in special}
        data["model"]["vocab"] = [["" if piece in hidden else piece, score] for piece, score in vocabulary]
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in hidden]
    at_start = behind = _plain(data)
    if _first_word_alone(data["pre_tokenizer"]):
        behind = _plain(data)
    return at_start, behind


def _plain(data: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_word_alone(node: Any) -> bool:
    """Whether a pre-tokenizer gives a prefix to a text's first word alone; if so, it is made to give none."""
    if not isinstance(node, dict):
        return False
    first = node.get("prepend_scheme") == "first"
    if first:
        node["prepend_scheme"] = "never"
    return any([first, *map(_first_word_alone, node.get("pretokenizers", []))])


def leading_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer itself puts in front of a text: BOS, where it has one."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    return tuple(encoding.ids[: mask.index(0)] if 0 in mask else ())


def padding_id(tokenizer: Tokenizer) -> int:
    """Id for padding: the tokenizer's own of its family, <unk> for Llama and Vicuna, as LLaVA has it.

    0 if it has none of them; padding is masked everywhere, so no number depends on the choice.
    """
    return next((number for name in _PADS if (number := tokenizer.token_to_id(name)) is not None), 0)


def image_id(tokenizer: Tokenizer) -> int:
    """Id that stands in image slots: the tokenizer's image token, or that of padding where it has none."""
    number = tokenizer.token_to_id(IMAGE)
    number = tokenizer.token_to_id("<image>") if number is None else number
    return padding_id(tokenizer) if number is None else number


def line_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of all tokens whose text ends with a newline: "\n" itself, and often ".\n" and the like."""
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    texts = tokenizer.decode_batch([[number] for number in range(count)], skip_special_tokens=True)
    return tuple(number for number, text in enumerate(texts) if text.endswith("\n"))


def _refuse(path: Path, config: dict[str, Any], *, bpe: bool) -> None:
    """Raises for settings that change ids or texts in transformers and that are not followed here."""
    if config.get("split_special_tokens"):
        raise UserError(
            f"{path}: key split_special_tokens is true, and then no image token works: set it to false"
        )
    if config.get(_FORCE_CLEAN):
        raise UserError(f"{path}: key {_FORCE_CLEAN} is not supported: set it to false")
    if config.get("clean_up_tokenization_spaces") and not bpe:  # transformers passes it by for BPE
        raise UserError(
            f"{path}: key clean_up_tokenization_spaces is true, which is supported for BPE tokenizers only, "
            "where it has no effect: set it to false"
        )


def _add_tokens(tokenizer: Tokenizer, directory: Path, config: dict[str, Any]) -> None:
    """Adds the tokens that the files beside tokenizer.json name; what is there already keeps its id."""
    listed = config.get("added_tokens_decoder")
    source = directory / (CONFIG if listed is not None else _ADDED)
    names = dict(config)
    if listed is None:
        names.update(read_object(directory / _MAP) or {})
        special = set(_special_names(names))
        added = read_object(source) or {}
        listed = {
            number: {"content": token, "special": token in special, "normalized": token not in special}
            for token, number in added.items()
        }
    for number, token in sorted(_numbered(source, listed).items()):
        tokenizer.add_tokens([token])
        actual = tokenizer.token_to_id(token.content)
        if actual != number:
            raise UserError(
                f"{source}: token {token.content!r} has id {number}, and {actual} by {FILE}: "
                "the files are of different tokenizers, copy them again"
            )
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for name in _special_names(names):
        if name not in present:
            tokenizer.add_tokens([AddedToken(name, special=True)])


def _numbered(source: Path, listed: Any) -> dict[int, AddedToken]:
    """Added tokens by id, from {"32000": {"content": "<image>", "special": true, ...}, ...}."""
    try:
        tokens = {}
        for number, token in listed.items():
            fields = {key: value for key, value in token.items() if key not in ("content", "__type")}
            tokens[int(number)] = AddedToken(token["content"], **fields)
        return tokens
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: the added tokens are damaged ({error!r}): copy the file again") from None


def _special_names(config: dict[str, Any]) -> list[str]:
    """Texts of the special tokens that a config names: bos_token and the like first, then the extra ones."""
    first = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    others = [key for key in config if key.endswith("_token") and key not in first]
    values = [config.get(key) for key in (*first, *others)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values += extra.values() if isinstance(extra, dict) else extra
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))
