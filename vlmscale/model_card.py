"""The README.md of an exported run: what it is, and how to use it, here and in transformers."""

from __future__ import annotations

import math
from typing import Any

from vlmscale.compressors import COMPRESSORS, label, parse_options, spoken
from vlmscale.config import Cell
from vlmscale.data.tokenizer import ASSISTANT, IMAGE, USER
from vlmscale.evaluate.loaded import LoadedRun
from vlmscale.models.sizes import SIZES, TOWERS
from vlmscale.validation import evaluable_counts

_HEAD = """\
# A model trained with vlmscale

{what}

A prompt is `{prompt}`, where only the question has spaces. Run what follows in this directory.
"""
_VLMSCALE = """
```bash
vlmscale generate --model . {picture}--max-new-tokens {longest} --prompt '{prompt}'
```
"""
_LLAVA = """
With transformers 5 (in 4, `use_fast=False` stands for `backend="pil"`; pictures were prepared with Pillow):

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".", backend="pil")
{pool}
picture = Image.open("PHOTO.jpg").convert("RGB")
inputs = processor(images=picture, text="{prompt}", return_tensors="pt")
ids = model.generate(**inputs, do_sample=False, max_new_tokens={longest})
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```

The processor repeats `{image}` once for each of the picture's tokens. Without a picture leave it away.
"""
_POOL = """

def pool(module, args):
    x = args[0].unflatten(1, ({grid}, {window}, {grid}, {window}))
    return (x.mean((2, 4)).flatten(1, 2),)


# The LLaVA of transformers does not know the pooling that stands before the projector.
model.model.multi_modal_projector.register_forward_pre_hook(pool)
"""
_LLM = """
With transformers:

```python
from transformers import AutoModelForCausalLM, {tokenizer}

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = {tokenizer}.from_pretrained(".")
inputs = tokenizer("{prompt}", return_tensors="pt")
ids = model.generate(**inputs, do_sample=False, max_new_tokens={longest})
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```
"""
_PARTS = """
No model of transformers has this compressor, so there are three parts:

```python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, {tokenizer}, {tower}

llm = AutoModelForCausalLM.from_pretrained("llm")
tokenizer = {tokenizer}.from_pretrained("llm")
tower = {tower}.from_pretrained("tower")
compressor = load_file("compressor.safetensors")
```

- `llm`: a prompt holds `{image}` {tokens} times{fewer}; the compressor's output takes the place of its
  embeddings{fused}.{asked}
- `tower`: the compressor reads number {selected} of its `hidden_states`{less}{needs}.
- `compressor.safetensors`: parameters as {module} names them, each `kernel` as
  [inputs, outputs]. `vlmscale generate --run` answers with the run that this was made from.
"""
_ASKED = """
- The compressor reads the question too: the last hidden state of `llm`, behind its final norm, at the last
  token of the conversation's first question, which is run by itself, without template and answer."""
_NEEDS = {  # the fields of `Features`, for a reader who has the tower in transformers
    "levels": "numbers {levels} side by side along the channel",
    "keys": "the keys of layer {behind}, all heads side by side, before they are scaled",
    "class_query": "the first token's query in layer {behind}",
    "class_attention": "the attention of the first token in layer {block}, mean over heads",
    "mean_attention": "the attention that each patch receives in layer {block}, mean over heads and queries",
    "probe_attention": "the attention of the pooling head's probe, mean over heads",
    "stack": "all of them up to there",
    "tower": "and it runs through layers 0 to {block} with their own parameters",
}


def _fill(run: LoadedRun, template: str, **values: Any) -> str:
    cell = run.cell
    tokens = cell.compressor.visual_tokens
    prompt = f"{USER}{IMAGE if tokens else ''}What is this?{ASSISTANT}"
    known = {"image": IMAGE, "tokens": tokens, "prompt": prompt, "longest": cell.evaluate.max_new_tokens}
    # transformers 5 would make the run's tokenizer beside a Qwen2 a Qwen2Tokenizer, whose ids differ.
    own = SIZES[cell.llm.name].family == "qwen2"
    known["tokenizer"] = "PreTrainedTokenizerFast" if own else "AutoTokenizer"
    return template.format(**known | values)


def _head(run: LoadedRun, kind: str) -> str:
    cell = run.cell
    what = f"{kind}: LLM `{cell.llm.name}`"
    if cell.compressor.visual_tokens:
        name, options = cell.compressor.name, parse_options(cell.compressor.name, cell.compressor.options)
        what += f", vision tower `{cell.tower.name}`, compressor `{label(name, options)}`. "
        what += f"A picture takes {_counts(cell)} tokens."
    else:
        what += ", trained without pictures."
    return _fill(run, _HEAD, what=what)


def _counts(cell: Cell) -> str:
    """How many tokens a picture takes, in words."""
    compressor = cell.compressor
    if COMPRESSORS[compressor.name].adaptive(parse_options(compressor.name, compressor.options)):
        return f"up to {compressor.visual_tokens}"
    known = evaluable_counts(cell)
    return f"{compressor.visual_tokens} (or fewer: {spoken(known)})" if len(known) > 1 else str(known[0])


def of_llm(run: LoadedRun) -> str:
    """For a run without pictures."""
    return _head(run, "A language model") + _fill(run, _VLMSCALE, picture="") + _fill(run, _LLM)


def of_llava(run: LoadedRun) -> str:
    """For a `LlavaForConditionalGeneration`, with the hook that pools where that is its compressor."""
    pool = ""
    if run.cell.compressor.name == "pool":
        grid = math.isqrt(run.cell.compressor.visual_tokens)
        pool = _POOL.format(grid=grid, window=TOWERS[run.cell.tower.name].grid // grid)
    text = _head(run, "A LLaVA") + _fill(run, _VLMSCALE, picture="--image PHOTO.jpg ")
    return text + _fill(run, _LLAVA, pool=pool)


def of_parts(run: LoadedRun) -> str:
    """For LLM, tower and compressor apart."""
    size, compressor = TOWERS[run.cell.tower.name], run.cell.compressor
    clip, block = size.style == "clip", size.select_layer - 1
    method = COMPRESSORS[compressor.name]
    needs = method.needs(size, parse_options(compressor.name, compressor.options))
    about = {"levels": ", ".join(map(str, size.levels)), "behind": min(block + 1, size.num_layers - 1)}
    return _head(run, "The parts of a vision-language model") + _fill(
        run,
        _PARTS,
        tower="CLIPVisionModel" if clip else "SiglipVisionModel",
        selected=size.select_layer,
        less=", without the first token" if clip else "",
        needs="".join(f"; {_NEEDS[need].format(block=block, **about)}" for need in sorted(needs)),
        module=f"{COMPRESSORS[compressor.name].build.__module__.replace('.', '/')}.py",
        fewer="" if _counts(run.cell) == str(compressor.visual_tokens) else " at most",
        asked=_ASKED if method.text == "query" else "",
        fused=", and it rewrites those of the prompt's text, before the LLM reads them"
        if method.text == "fusion"
        else "",
    )
