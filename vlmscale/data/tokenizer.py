"""The tokenizer of built-in and tiny runs: byte-level BPE trained on the run's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlmscale.errors import UserError

PAD, IMAGE, USER, ASSISTANT, END = "<|pad|>", "<|image|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, IMAGE, USER, ASSISTANT, END)


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
