"""Our runner beside a loop that asks one item at a time, as LLaVA's evaluation scripts do.

    python benchmarks/evaluate.py                        # CPU, float32, smollm2-135m, V = 16
    python benchmarks/evaluate.py --llm toy-375k --items 128

One run with random weights (a single training step), exported as a Hugging Face LLaVA: the same weights in
both. Theirs is transformers' LlavaForConditionalGeneration in PyTorch, a picture and a prompt a call
(llava/eval/model_vqa_loader.py); ours is `vlmscale evaluate`'s own path. Both read and prepare pictures from
files, run the tower, generate greedily `--new` tokens and decode them. Loading and compilation are left out:
each is warmed up.
`same` is how many answers agree, `ratio` theirs over ours in items a second.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peer
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlmscale.cli import main as vlmscale
from vlmscale.evaluate.answers import Journal
from vlmscale.evaluate.asking import Pass, answer_all
from vlmscale.evaluate.items import Item, Task, prompt_of, text_tokens
from vlmscale.evaluate.loaded import LoadedRun, load_run
from vlmscale.evaluate.questions import Question

WORDS = ("number", "colour", "corner", "circles", "framed", "score", "blue", "green")


def make_run(folder: Path, options: argparse.Namespace) -> tuple[LoadedRun, Path]:
    """A run of one step, and its export."""
    words = [f"configs/scenes_tiny.py:{options.llm},{options.visual_tokens}", "--out", str(folder / "run")]
    small = {"train_images": 16, "validation_images": 2, "test_images": 2}
    words += [f"--config.data.{name}={count}" for name, count in small.items()]
    words += [f"--config.train.{word}" for word in ("steps=1", "warmup_steps=0", "batch_size=8")]
    if vlmscale(["train", "--config", *words]) or vlmscale(
        ["convert", "--run", str(folder / "run"), "--out", str(folder / "model")]
    ):
        raise SystemExit("the run could not be made")
    overrides = [f"--config.evaluate.batch_size={options.batch}"]
    return load_run(folder / "run", overrides=overrides), folder / "model"


def make_items(run: LoadedRun, folder: Path, options: argparse.Namespace) -> list[Item]:
    """Questions of `--text` tokens about pictures in files."""
    rng, items = np.random.default_rng(0), []
    for number in range(options.items):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)).save(path)
        said = ""
        while True:  # a word at a time, until it is as long as asked for
            longer = f"{said} {rng.choice(WORDS)}".strip()
            item = Item(Question(str(number), ("",), longer), f"<image>\n{longer}", 1, files=(path,))
            if text_tokens(prompt_of(item, run.prepared.template)) > options.text:
                break
            said, kept = longer, item
        items.append(kept)
    return items


def ours(run: LoadedRun, items: list[Item], folder: Path, new: int) -> list[str]:
    """All answers through the runner."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "answers.jsonl"
    journal = Journal(path, {item.id: "" for item in items})
    task = Task("speed", "speed", "test", "exact_match/1", tuple(items), new, "none")
    answer_all(
        run, [Pass(task, run.cell.compressor.visual_tokens, journal)], "test", lambda done, total: None
    )
    return [journal.said[item.id].text for item in items]


def pooled(visual_tokens: int) -> Any:
    """The pooling that transformers' LLaVA does not know, as the export's README puts it there."""
    side = int(visual_tokens**0.5)

    def pool(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        cells = int(args[0].shape[1] ** 0.5) // side
        return (args[0].unflatten(1, (side, cells, side, cells)).mean((2, 4)).flatten(1, 2),)

    return pool


def theirs(model: Any, processor: Any, items: list[Item], new: int) -> list[str]:
    """All answers, one item a call."""
    texts = []
    for item in items:
        prompt = f"<|user|><|image|>{item.question.question}<|assistant|>"
        inputs = processor(images=Image.open(item.files[0]).convert("RGB"), text=prompt, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )
        behind = out[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.decode(behind, skip_special_tokens=True).strip())
    return texts


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--visual-tokens", type=int, default=16)
    parser.add_argument("--text", type=int, default=40, help="text tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run, exported = make_run(folder, options)
        items = make_items(run, folder, options)
        processor = AutoProcessor.from_pretrained(exported, backend="pil")
        model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
        model.model.multi_modal_projector.register_forward_pre_hook(pooled(options.visual_tokens))
        run.prepared.template.__dict__[
            "stop_ids"
        ] = ()  # answers of full length, as random weights may end early
        said: dict[str, list[str]] = {}

        def our() -> None:
            said["ours"] = ours(run, items, folder, options.new)

        def their() -> None:
            said["theirs"] = theirs(model, processor, items, options.new)

        seconds = peer.in_turn({"ours": our, "theirs": their}, options.repeats)
        same = np.mean([a == b for a, b in zip(said["ours"], said["theirs"], strict=True)])
        lengths = [text_tokens(prompt_of(item, run.prepared.template)) for item in items]
        row = {
            "llm": options.llm,
            "V": options.visual_tokens,
            "batch": options.batch,
            "text tokens": float(np.mean(lengths)),
            "ours items/s": options.items / seconds["ours"],
            "theirs items/s": options.items / seconds["theirs"],
            "ratio": seconds["theirs"] / seconds["ours"],
            "same": f"{same:.1%}",
            "distinct answers": len(set(said["ours"])),
        }
        peer.show([row], options.json)


if __name__ == "__main__":
    main()
