"""The templates: how turns are laid out between a model's structure tokens, as a table.

Owns the texts and nothing that encodes them. A structure token is written by its string here and inserted by
its id; the same string inside a user's text stays ordinary text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmscale.data.tokenizer import ASSISTANT, END, USER

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATML_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Layout:
    """A conversation is `bos start`, then for every turn `question` Q `answer` `lead` A `end` `after`.

    Q and A are the user's texts. Supervised is all from `lead` to `end`: what a model has to say behind a
    prompt, which stops short of `lead`.

    Attributes:
      special: the structure tokens; wherever they stand in the fields they are tokens, not text.
      bos: the token in front of everything; text right behind it is the start of a text to the tokenizer.
        None: whatever the tokenizer itself puts in front, which may be nothing.
      stops: tokens other than `end` that end an answer, where a tokenizer has them.
      images: where pictures stand in a turn, if not where the placeholders are: "front", or "alone" for
        pictures in place of the whole question.
    """

    special: tuple[str, ...]
    question: str
    answer: str
    end: str
    bos: str | None = ""
    start: str = ""
    lead: str = ""
    after: str = ""
    stops: tuple[str, ...] = ()
    images: Literal["placeholder", "front", "alone"] = "placeholder"


# The system prompt of chatml is the one that Qwen2.5-VL's own chat template and LLaVA-NeXT's conversation
# for Qwen put in; Qwen2.5's, "You are Qwen, created by Alibaba Cloud. ...", would name a model that it may
# not be. Llama 3's chat template puts in none. All else follows these chat templates to the character.
LAYOUTS = {
    "toy": Layout(special=(USER, ASSISTANT, END), question=USER, answer=ASSISTANT, end=END, images="front"),
    "plain": Layout(special=(), bos=None, question="", answer="", end="\n", images="alone"),
    "v1": Layout(
        special=("<s>", "</s>"),
        bos="<s>",
        start=V1_SYSTEM + " ",
        question="USER: ",
        answer=" ASSISTANT:",
        lead=" ",
        end="</s>",
    ),
    "chatml": Layout(
        special=("<|im_start|>", "<|im_end|>"),
        start=f"<|im_start|>system\n{CHATML_SYSTEM}<|im_end|>\n",
        question="<|im_start|>user\n",
        answer="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        stops=("<|endoftext|>",),
    ),
    "llama3": Layout(
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        question="<|start_header_id|>user<|end_header_id|>\n\n",
        answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        stops=("<|end_of_text|>",),
    ),
}
TEMPLATES = tuple(LAYOUTS)
