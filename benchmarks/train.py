"""A training step beside transformers' LLaVA in PyTorch: same weights, conversations and losses, same run.

    python benchmarks/train.py                                       # CPU, float32, scaled down; some minutes
    python benchmarks/train.py --decoder qwen1.5-0.5b --tower siglip-so400m-patch14-384 --row-length 2048 \
        --visual-tokens 729,144,16 --dtype bfloat16 --attention cudnn --remat block --loss-chunk 1024 \
        --compile --peers autocast,pure                              # one GPU

LLaVA's second stage: the tower is frozen, projector and LLM train; forward, backward and AdamW. Every way
trains on the same conversations, drawn as `benchmarks/packing.py` draws LLaVA's instruction mix, lengths
scaled to `--row-length`, half of the text to be predicted; token ids and pixels are random, and in memory
before the clock starts.

  theirs    `LlavaForConditionalGeneration` in LLaVA's own order (`group_by_modality_length` on 8 devices,
            of which this is one), batches of 16 padded to their longest: what ratios are to
  shuffled  theirs in random order
  sorted    theirs with like lengths in a batch, as transformers' `group_by_length` has it: hardly any padding
  packed    ours, as `data.packing=pack` lays it out: rows of `--row-length`, in about as many updates
  unpacked  ours, as `data.packing=none`: one conversation a row, rows as long as the longest of the mix

tokens/s counts real tokens, text and visual, not padding. A ratio is ours over theirs, above 1 is faster: of
medians over rounds in which all run in turn, and the least and the largest of a round. `mfu` is what those
conversations need as `vlmscale.cost` counts it (logits where something is predicted, no recomputation, no
padding), over the time and what a large matrix product was measured to reach.

Theirs is as fast as its users can have it: SDPA, fused AdamW, a tower without gradients that ends at the
layer which is read, `--compile` for torch.compile. With `--dtype bfloat16` both keep float32 masters and
compute in bfloat16, theirs under autocast; `--peers pure` casts all of theirs instead, its optimizer too.
Fewer visual tokens than patches are means over windows of patches, before the projector on both sides.

Before the clock starts losses are compared: those of four updates in a row on one batch, both sides
unpacked, and the means over an epoch's supervised tokens, ours packed. In float32 the exit code is 1 if any
is further apart than 1e-4.

Each row runs in a process of its own, so that the memory is its own: on a GPU the peak of either side, on a
CPU what our compiled step takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peer
import torch
from packing import LENGTH, instruction_mix

from vlmscale.config import Cell, CompressorConfig, DataConfig, LLMConfig, TowerConfig, TrainConfig
from vlmscale.cost.flops import decoder_flops, head_flops
from vlmscale.cost.image import image_flops, tower_passes
from vlmscale.data.conversation import IMAGE_MARK, Encoded, expand
from vlmscale.data.lengths import Lengths
from vlmscale.data.packing import choose_shape, group_by_modality_length, plan
from vlmscale.data.pipeline import Layout, fill
from vlmscale.data.sources import Picture
from vlmscale.models.decoder import REMAT
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize
from vlmscale.sharding import make_mesh, put_batch
from vlmscale.train.recipe import make_objective, make_optimizer, trained_parts, training_model
from vlmscale.train.state import first_state
from vlmscale.train.step import Knobs, make_train_step, normalise
from vlmscale.train.together import make_encode

# A 400M tower over 729 patches to a 0.5B LLM, each of four layers: parameters of tower, layers and embedding
# table stand as 400 to 308 to 156, rows of 256 positions to an image's 81 tokens as 2048 to 648.
SCALED = "scaled"
SIZES[SCALED] = DecoderSize(
    384, 4, 6, 6, 1056, rope_theta=1e6, norm_eps=1e-6, family="qwen2", vocab_size=9472, context=2048
)
TOWERS[SCALED] = TowerSize(126, 14, 432, 4, 6, 1614, select_layer=4, levels=(1, 2, 3, 4))

PAD, IMAGE, FIRST = 0, 1, 2  # ids of padding and of image slots, and the first that text has
POOL = 4096  # conversations that the timed ones are taken from, as LLaVA's order has them
BATCH, DEVICES = 16, 8  # conversations of a device's batch, and devices, in LLaVA's script
ANSWERS = 0.5  # share of a conversation's text that is to be predicted
RECIPE: dict[str, Any] = {"learning_rate": 1e-4, "beta2": 0.999, "weight_decay": 0.1, "clip_norm": 0.0}
RECIPE |= {"warmup_steps": 0, "final_rate": 1.0}  # a constant rate
STEPS, TOLERANCE = 4, 1e-4
SEED = 0


class Mix:
    """Conversations of LLaVA's instruction mix, with random ids and pixels: a `vlmscale.data` source."""

    def __init__(self, options: argparse.Namespace, visual_tokens: int) -> None:
        """Draw a pool, and choose the batches of it that are trained on."""
        self.visual_tokens, self.tower = visual_tokens, TOWERS[options.tower]
        self.vocab, self.side = SIZES[options.decoder].vocab_size, self.tower.image_size
        text, images = instruction_mix(POOL, SEED)
        text = np.maximum(text * options.row_length // LENGTH, 4)
        text = np.minimum(text, options.row_length - images * visual_tokens)
        supervised = np.maximum((ANSWERS * text).astype(np.int64), 1)
        self.lengths = Lengths(*(x.astype(np.int32) for x in (text, images, supervised, text * 0, text)))
        self.sizes = self.lengths.sizes(visual_tokens)
        self.batches = self._choose(options.batches)
        self.chosen = np.concatenate(self.batches)

    def _choose(self, count: int) -> list[np.ndarray]:
        """Batches of LLaVA's order with the mix's share of batches without pictures, in random order."""
        text, images = self.lengths.text, self.lengths.images
        order = group_by_modality_length(text, images > 0, BATCH, DEVICES, SEED, epoch=0)
        # Behind these are leftovers in no order; of LLaVA's 665k records they are next to none.
        whole = sum(-(-int(np.sum(images == has)) // (BATCH * DEVICES)) - 1 for has in (0, 1))
        every = order[: whole * BATCH * DEVICES].reshape(-1, BATCH)
        rng, seen = np.random.default_rng(SEED), images[every].mean(axis=1)
        blind = max(round(count * float(np.mean(images == 0))), 1)
        taken = [rng.choice(np.flatnonzero(seen == 1), count - blind, replace=False)]
        taken.append(rng.choice(np.flatnonzero(seen == 0), blind, replace=False))
        return [every[at] for at in rng.permutation(np.concatenate(taken))]

    def orders(self) -> dict[str, np.ndarray]:
        """Batches [n, B] of the same sample numbers in each of their orders."""
        rng, chosen = np.random.default_rng(SEED), self.chosen
        by_length = chosen[np.argsort(self.sizes[chosen], kind="stable")].reshape(-1, BATCH)
        shuffled = rng.permutation(chosen).reshape(-1, BATCH)
        return {"theirs": np.stack(self.batches), "shuffled": shuffled, "sorted": rng.permutation(by_length)}

    @property
    def blank(self) -> Picture:
        """Black."""
        return {"pixels": np.zeros((self.side, self.side, 3), np.uint8)}

    def __len__(self) -> int:
        return POOL

    def read(self, index: int) -> tuple[Encoded, list[Picture]]:
        """A token, the picture if there is one, the question, the answer."""
        rng, length = np.random.default_rng((SEED, index)), int(self.lengths.text[index])
        tokens = rng.integers(FIRST, self.vocab, length).astype(np.int32)
        supervised = np.arange(length) >= length - self.lengths.supervised[index]
        pictures = []
        if self.lengths.images[index]:
            tokens, supervised = np.insert(tokens, 1, IMAGE_MARK), np.insert(supervised, 1, False)
            pictures = [{"pixels": rng.integers(0, 256, (self.side, self.side, 3), np.uint8)}]
        return Encoded(tokens, supervised, tokens[:1]), pictures

    def flops(self, cell: Cell) -> float:
        """FLOPs that one epoch of the chosen conversations needs: backward is two forward passes."""
        size, chosen = SIZES[cell.llm.name], self.chosen
        lengths, targets = self.sizes[chosen], self.lengths.supervised[chosen]
        decoder = sum(decoder_flops(size, float(length), 0) for length in lengths)
        head = head_flops(size, self.vocab, float(targets.sum()))
        image = image_flops(cell, self.visual_tokens, 0, 0)
        per_image = tower_passes(cell) * image.tower + 3 * image.compressor
        return 3 * (decoder + head) + float(self.lengths.images[chosen].sum()) * per_image


@dataclass(frozen=True)
class Epoch:
    """Batches on the device; how many of their tokens are real, and how many positions they have.

    `targets` are the supervised tokens of each batch.
    """

    batches: list[dict[str, Any]]
    tokens: int
    positions: int
    targets: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return sum(values.nbytes for batch in self.batches for values in batch.values())


# --- theirs -------------------------------------------------------------------------------------------------


class Theirs:
    """Transformers' LLaVA and its optimizer."""

    def __init__(self, model: Any, options: argparse.Namespace, kind: str, train: TrainConfig) -> None:
        """Freeze the tower, cast what is to be cast; `kind` is of `--peers`."""
        self.device = next(model.parameters()).device.type
        self.autocast = options.dtype == "bfloat16" and kind == "autocast"
        dtype = peer.DTYPES[options.dtype][1]
        model.train().model.vision_tower.requires_grad_(False)
        # Not the whole modules: the angles of rotary positions stay float32, as where a model is loaded so.
        for parameter in (model.model.vision_tower if self.autocast else model).parameters():
            parameter.data = parameter.data.to(dtype)
        if options.checkpointing:
            model.gradient_checkpointing_enable()
        trained = [x for x in model.parameters() if x.requires_grad]
        groups = [
            {
                "params": [x for x in trained if (x.ndim > 1) == matrix],
                "weight_decay": matrix * train.weight_decay,
            }
            for matrix in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, train.learning_rate, (0.9, train.beta2), 1e-8, fused=True)
        torch._dynamo.config.capture_scalar_outputs = True  # else a check of theirs cuts the graph
        self.dtype, self.run = dtype, torch.compile(model) if options.compile else model

    def epoch(self, mix: Mix, batches: Iterable[np.ndarray]) -> Epoch:
        """These batches, each padded to its longest."""
        made = [self._batch(mix, samples) for samples in batches]
        positions = sum(batch["input_ids"].numel() for batch in made)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in made)
        return Epoch(made, tokens, positions, [int((batch["labels"] >= 0).sum()) for batch in made])

    def _batch(self, mix: Mix, samples: np.ndarray) -> dict[str, torch.Tensor]:
        shape = (len(samples), int(mix.sizes[samples].max()))
        ids, labels, mask = np.full(shape, PAD), np.full(shape, -100), np.zeros(shape, np.int64)
        shown = []
        for row, sample in enumerate(samples):
            encoded, pictures = mix.read(int(sample))
            tokens, _ = expand(encoded.tokens, mix.visual_tokens, IMAGE)
            answer = tokens[len(tokens) - int(encoded.supervised.sum()) :]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, len(tokens) - len(answer) : len(tokens)] = answer
            shown += [picture["pixels"] for picture in pictures]
        arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        batch = {name: torch.tensor(values, device=self.device) for name, values in arrays.items()}
        if shown:
            pixels = np.asarray(normalise(jnp.asarray(np.stack(shown)), mix.tower)).transpose(0, 3, 1, 2)
            batch["pixel_values"] = torch.tensor(pixels).to(self.device, self.dtype).contiguous()
        return batch

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean over the supervised tokens."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self.run(**batch, use_cache=False).loss

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One update; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, epoch: Epoch) -> None:
        """All updates of an epoch."""
        for batch in epoch.batches:
            self.step(batch)
        peer.torch_done(self.device)

    def memory(self, epochs: Sequence[Epoch]) -> int:
        """Bytes that updates of the first epoch take at most, data left out; 0 where it is not told."""
        if self.device == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats()
        self.train(epochs[0])
        return torch.cuda.max_memory_allocated() - sum(epoch.nbytes for epoch in epochs)

    @torch.no_grad()
    def mean_loss(self, epoch: Epoch) -> float:
        """The mean over all supervised tokens of an epoch."""
        losses = [float(self.loss(batch)) for batch in epoch.batches]
        return float(np.average(losses, weights=epoch.targets))


# --- ours ---------------------------------------------------------------------------------------------------


class Ours:
    """Our parts of a cell, its optimizer and its state."""

    def __init__(self, params: dict[str, Any], cell: Cell, mix: Mix) -> None:
        """Take the parameters over: they are no longer the caller's."""
        self.cell, self.mix, self.mesh = cell, mix, make_mesh(devices=jax.devices()[:1])
        self.optimizer = make_optimizer(cell.train)
        dtype = training_model(cell, mix.vocab).dtype
        self.frozen = {"tower": jax.tree.map(lambda x: x.astype(dtype), params.pop("tower"))}
        self.encode = make_encode([cell], self.frozen["tower"])
        self.begin(params)

    def begin(self, params: dict[str, Any]) -> None:
        """Start anew from these parameters."""
        self.knobs = Knobs(jnp.float32(self.cell.train.learning_rate), jnp.uint32(SEED))
        self.state = first_state(self.optimizer, params, self.mesh)

    def packed(self, row_length: int) -> tuple[Rows, Epoch, Epoch]:
        """Packed rows in about as many updates as LLaVA's batches are.

        Returns:
          The program; the epoch that is timed, whose last batch begins the next epoch as training's does;
          and the same with empty rows there.
        """
        mix, sizes, images = self.mix, self.mix.sizes, self.mix.lengths.images
        shape = choose_shape(sizes[mix.chosen], images[mix.chosen], row_length)
        layout = Layout.packed(shape, mix.lengths, mix.visual_tokens, pad_id=PAD, image_id=IMAGE)
        first, then = (plan(sizes, images, shape, SEED, epoch, mix.chosen) for epoch in (0, 1))
        blocks = [first.block(number) for number in range(first.blocks)]
        per_batch = max(round(len(blocks) / len(mix.batches)), 1)
        missing = -len(blocks) % per_batch
        rows = Rows(self, layout)
        timed = rows.epoch(blocks + [then.block(number) for number in range(missing)], per_batch)
        return rows, timed, rows.epoch(blocks + [[[]] * shape.rows] * missing, per_batch)

    def unpacked(self, order: np.ndarray) -> tuple[Rows, Epoch]:
        """A conversation a row, in batches [n, B] of sample numbers."""
        mix = self.mix
        layout = Layout.one_per_row(mix.lengths, mix.visual_tokens, pad_id=PAD, image_id=IMAGE)
        rows = Rows(self, layout)
        return rows, rows.epoch([[[number]] for number in order.flat], order.shape[1])


class Rows:
    """The program of one layout of rows."""

    def __init__(self, ours: Ours, layout: Layout) -> None:
        """Nothing is compiled yet."""
        cell = ours.cell
        self.ours, self.layout = ours, layout
        self.compiled: Any = None
        self.objective = make_objective(cell, training_model(cell, ours.mix.vocab, layout.shape.rows))
        step = make_train_step(self.objective, ours.optimizer, trained_parts(cell))
        self.jitted = jax.jit(step, donate_argnums=0)

    def epoch(self, blocks: Sequence[Any], per_batch: int) -> Epoch:
        """Batches of so many blocks of rows of sample numbers."""
        starts = range(0, len(blocks), per_batch)
        made = [fill(self.ours.mix, self.layout, blocks[start : start + per_batch]) for start in starts]
        return Epoch(
            [put_batch(batch, self.ours.mesh) for batch in made],
            sum(int((batch["segment_ids"] > 0).sum()) for batch in made),
            sum(batch["tokens"].size for batch in made),
            [int(batch["target_mask"].sum()) for batch in made],
        )

    def step(self, batch: dict[str, Any]) -> jax.Array:
        """One update; the loss before it."""
        ours = self.ours
        arguments = (ours.state, ours.frozen, ours.encode(batch), ours.knobs)
        if self.compiled is None:
            self.compiled = self.jitted.lower(*arguments).compile()
        ours.state, metrics = self.compiled(*arguments)
        return metrics["loss"]

    def train(self, epoch: Epoch) -> None:
        """All updates of an epoch."""
        for batch in epoch.batches:
            self.step(batch)
        jax.block_until_ready(self.ours.state)

    def mean_loss(self, epoch: Epoch) -> float:
        """The mean over all supervised tokens of an epoch."""

        @jax.jit
        def total(params: dict[str, Any], batch: dict[str, Any]) -> jax.Array:
            return self.objective(params, batch, batch["target_mask"].astype(jnp.float32))

        params = self.ours.state.params
        return sum(float(total(params, self.ours.encode(x))) for x in epoch.batches) / sum(epoch.targets)

    def memory(self, epoch: Epoch) -> int:
        """Bytes that an update takes at most, data left out; to be called before any other has run.

        Of a CPU, which does not say, what the compiled step takes: state and all that it makes on the way.
        """
        ours = self.ours
        ours.knobs = ours.knobs._replace(learning_rate=jnp.float32(0))
        jax.block_until_ready(self.step(epoch.batches[0]))
        used = jax.devices()[0].memory_stats()
        ours.begin(ours.state.params)  # as they were
        if used:
            return int(used["peak_bytes_in_use"]) - 2 * epoch.nbytes
        found = self.compiled.memory_analysis()
        step = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        return step - found.alias_size_in_bytes + peer.params_bytes(ours.frozen)


# --- both ---------------------------------------------------------------------------------------------------


def cell_of(options: argparse.Namespace, visual_tokens: int) -> Cell:
    """The config of our side."""
    whole = visual_tokens == TOWERS[options.tower].num_patches
    return Cell(
        tower=TowerConfig(name=options.tower),
        compressor=CompressorConfig("mlp" if whole else "pool", visual_tokens),
        llm=LLMConfig(name=options.decoder),
        data=DataConfig(features="computed"),
        train=TrainConfig(
            **RECIPE,
            **{name: getattr(options, name) for name in ("dtype", "remat", "attention", "loss_chunk")},
        ),
    )


def measure(options: argparse.Namespace, visual_tokens: int, kind: str) -> dict[str, Any]:
    """One row: a number of visual tokens, and how theirs computes."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    size, tower = SIZES[options.decoder], TOWERS[options.tower]
    cell, mix = cell_of(options, visual_tokens), Mix(options, visual_tokens)
    model, params = peer.both_llavas(size, tower, visual_tokens, IMAGE, device)
    theirs, ours = Theirs(model, options, kind, cell.train), Ours(params, cell, mix)
    orders = mix.orders()
    with jax.set_mesh(ours.mesh):
        rows, full, exact = ours.packed(options.row_length)
        ways: dict[str, tuple[Any, Epoch]] = {
            name: (theirs, theirs.epoch(mix, order)) for name, order in orders.items()
        }
        means = theirs.mean_loss(ways["theirs"][1]), rows.mean_loss(exact)
        memory = {"packed": rows.memory(full)}
        ways |= {"packed": (rows, full), "unpacked": ours.unpacked(orders["shuffled"])}
        losses = [
            [float(side.step(epoch.batches[0])) for _ in range(STEPS)]
            for side, epoch in (ways["shuffled"], ways["unpacked"])
        ]
        memory["theirs"] = theirs.memory([ways[name][1] for name in orders])
        ways = {name: ways[name] for name in options.ways.split(",")}
        runs: dict[str, Callable[[], object]] = {
            name: partial(side.train, epoch) for name, (side, epoch) in ways.items()
        }
        seconds = peer.rounds(runs, options.repeats)
    per_token = mix.flops(cell) / float(mix.sizes[mix.chosen].sum())
    ceiling = peer.ceilings(options.dtype)["flops"]
    rates = {name: np.array([epoch.tokens / s for s in seconds[name]]) for name, (_, epoch) in ways.items()}
    found: dict[str, Any] = {"visual_tokens": visual_tokens, "peer": kind, "ways": {}}
    for name, (_, epoch) in ways.items():
        rate, ratios = float(np.median(rates[name])), rates[name] / rates["theirs"]
        found["ways"][name] = {
            "tokens/s": rate,
            "ratio": rate / float(np.median(rates["theirs"])),
            "least": float(ratios.min()),
            "most": float(ratios.max()),
            "padding": 1 - epoch.tokens / epoch.positions,
            "updates": len(epoch.batches),
            "s/update": epoch.tokens / rate / len(epoch.batches),
            "mfu": rate * per_token / ceiling,
            "GiB": used / 2**30 if (used := memory.get(name)) else None,
        }
    both = {"losses": losses, "means": means}
    return found | both | {"apart": {name: apart(*values) for name, values in both.items()}}


def apart(theirs: Any, ours: Any) -> float:
    """The largest relative difference."""
    return float(np.max(np.abs(np.asarray(ours) / np.asarray(theirs) - 1)))


def table(found: dict[str, Any]) -> str:
    """A row's measurements as text."""
    names = ("tokens/s", "ratio", "least", "most", "padding", "updates", "s/update", "mfu", "GiB")
    differ = ", ".join(f"{what} {value:.1e}" for what, value in found["apart"].items())
    lines = [f"V={found['visual_tokens']}, theirs {found['peer']}; relative difference of {differ}"]
    lines.append(" " * 10 + "".join(f"{name:>10}" for name in names))
    for way, values in found["ways"].items():
        cells = ("-" if values[name] is None else f"{values[name]:.4g}" for name in names)
        lines.append(f"{way:10}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", choices=SIZES, default=SCALED, metavar="NAME")
    parser.add_argument("--tower", choices=TOWERS, default=SCALED, metavar="NAME")
    parser.add_argument("--visual-tokens", default="", help="counts, squares; the tower's patches if empty")
    parser.add_argument("--row-length", type=int, default=256, help="positions; the mix is scaled to it")
    parser.add_argument("--batches", type=int, default=16, help=f"of {BATCH} conversations that are timed")
    parser.add_argument("--ways", default="theirs,shuffled,sorted,packed,unpacked", help="what is timed")
    parser.add_argument("--peers", default="autocast", help="with bfloat16: autocast, pure or both")
    parser.add_argument("--compile", action="store_true", help="theirs through torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="of theirs, to save memory")
    parser.add_argument("--remat", choices=REMAT, default="dots", help="of ours")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="of ours")
    parser.add_argument("--loss-chunk", type=int, default=256, help="of ours")
    parser.add_argument("--dtype", choices=peer.DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    counts = options.visual_tokens or str(TOWERS[options.tower].num_patches)
    options.visual_tokens = [int(count) for count in counts.split(",")]
    if options.batches < 2 or max(options.visual_tokens) + 8 > options.row_length:
        parser.error("at least 2 batches, with and without pictures, and rows with room behind a picture")
    return options


def main() -> int:
    """Measure each row in a process of its own, show it; returns the exit code."""
    options, rows = parse(), []
    kinds = options.peers.split(",") if options.dtype == "bfloat16" else ["float32"]
    pairs = [(count, kind) for count in options.visual_tokens for kind in kinds]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for found in pool.map(partial(measure, options), *zip(*pairs, strict=True)):
            rows.append(found)
            if not options.json:
                print(table(found), flush=True)
    if options.json:
        print(json.dumps({"options": vars(options), "rows": rows}))
    differ = any(value > TOLERANCE for found in rows for value in found["apart"].values())
    return int(options.dtype == "float32" and differ)


if __name__ == "__main__":
    raise SystemExit(main())
