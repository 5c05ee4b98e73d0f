"""Which samples share a row, and which rows a block: plans, as a function of (lengths, shape, seed, epoch).

A *block* is G rows of T positions that own P image slots together. A sample takes `sizes[i]` positions of one
row (text and visual tokens) and `images[i]` slots of its block. Blocks, not rows, own the slots, because few
samples fit into a row: with V = 576 and T = 2048 rows hold 2.5 images on average, so that 3 slots a row leave
16% of the tower's work to nobody, and 5 slots for two rows next to none.

Samples of one size and image count are alike, so rows are sought on the histogram (`binpacking`); here a
random permutation says which sample of a kind goes where. Nothing here reads files or tokens.

Everything random is raw output of PCG64, sorted: numpy promises those streams for good, while it may change
what `Generator.permutation` makes of them. So a plan is the same wherever it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from vlmscale.data.binpacking import Blocks, Kinds, Rows, Shape, count_blocks, least_rows, row_bound, search
from vlmscale.errors import UserError

__all__ = [
    "Plan",
    "Shape",
    "Utilization",
    "choose_images",
    "choose_shape",
    "compare_shapes",
    "epoch_samples",
    "group_by_modality_length",
    "one_per_row",
    "padded_share",
    "plan",
    "upper_bound",
]

# An image limit may cost this share of the rows, for slots that nobody uses cost the tower's work.
SPARED = 0.015


class Utilization(NamedTuple):
    """What of a plan is real, in 0..1: of its positions, and of its image slots (1 where there is none)."""

    positions: float
    slots: float


@dataclass(frozen=True)
class Plan:
    """Rows of sample numbers in the order of training; a block is `rows` (G) rows one behind the other.

    `samples`: [m] int64, row after row. `row_offsets`: [blocks * G + 1] int64, where each row begins in it;
    rows that fill up a block are empty.
    """

    samples: np.ndarray
    row_offsets: np.ndarray
    rows: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return (len(self.row_offsets) - 1) // self.rows

    def row(self, index: int) -> np.ndarray:
        """Sample numbers of a row, left to right."""
        return self.samples[self.row_offsets[index] : self.row_offsets[index + 1]]

    def block(self, index: int) -> list[np.ndarray]:
        """Sample numbers of each of the G rows of a block."""
        return [self.row(row) for row in range(index * self.rows, (index + 1) * self.rows)]

    def utilization(self, sizes: np.ndarray, images: np.ndarray, shape: Shape) -> Utilization:
        """The share of positions and of image slots that samples take; `sizes` and `images` as for `plan`."""
        positions = int(sizes[self.samples].sum()) / max(self.blocks * shape.rows * shape.length, 1)
        slots = self.blocks * shape.images
        return Utilization(positions, int(images[self.samples].sum()) / slots if slots else 1.0)


def plan(
    sizes: np.ndarray,
    images: np.ndarray,
    shape: Shape,
    seed: int,
    epoch: int,
    chosen: np.ndarray | None = None,
) -> Plan:
    """The packed plan of one epoch: every sample exactly once, in blocks whose limits hold.

    sizes: [n] positions that each sample takes, text and visual tokens; images: [n] image slots it takes.
    chosen: [m] the sample numbers of this epoch, of which some may be there several times (`epoch_samples`);
    all n once where None. Blocks come in random order and samples meet others in each epoch; rows stand in
    random order in their block, samples in their row. Some blocks may hold empty rows.

    Raises:
        UserError: a sample that no block can hold.
    """
    numbers = np.arange(len(sizes)) if chosen is None else np.asarray(chosen, np.int64)
    kinds, kind = Kinds.of(sizes[numbers], images[numbers])
    _check(kinds, kind, shape, numbers)
    rows, blocks = search(kinds, shape)
    row = _hand_out(rows, rows.classes[kind], _random(len(numbers), seed, epoch, 0))
    place = _place_rows(rows, blocks, shape.rows, seed, epoch)[row]
    order = _random(len(numbers), seed, epoch, 1)
    order = order[np.argsort(place[order], kind="stable")]
    filled = np.bincount(place, minlength=count_blocks(blocks) * shape.rows)
    return Plan(numbers[order], np.concatenate([[0], np.cumsum(filled)]).astype(np.int64), shape.rows)


def one_per_row(count: int, seed: int, epoch: int) -> Plan:
    """An unpacked plan: one sample a row and one row a block, in the order of Grain's global shuffle.

    It is bit for bit that epoch of `grain.MapDataset.source(...).seed(seed).shuffle().repeat(None)`.
    """
    import grain

    order = np.zeros(0, np.int64)
    if count:
        chain = grain.MapDataset.range(count).seed(seed).shuffle().repeat(None)
        order = np.asarray(chain.batch(count, batch_fn=np.array)[epoch], np.int64)
    return Plan(order, np.arange(count + 1), rows=1)


def choose_images(sizes: np.ndarray, images: np.ndarray, rows: int, length: int) -> int:
    """The smallest P with which blocks of `rows` rows need hardly more rows than without an image limit.

    At least 1, also where no sample has an image: without pictures a program would be another one.
    """
    kinds, _ = Kinds.of(sizes, images)
    least = -(-least_rows(kinds, length) // rows)
    limit = max(-(-int(images.sum()) // max(least, 1)), int(images.max(initial=1)), 1)
    while count_blocks(search(kinds, Shape(rows, length, limit))[1]) > (1 + SPARED) * least + 1:
        limit += max(1, limit // 50)
    return limit


def compare_shapes(
    sizes: np.ndarray, images: np.ndarray, length: int, rows: Sequence[int] = (1, 2, 4)
) -> dict[Shape, Utilization]:
    """What blocks of each number of rows would use, each with the slots that suit it (`choose_images`)."""
    kinds, _ = Kinds.of(sizes, images)
    out = {}
    for count in rows:
        shape = Shape(count, length, choose_images(sizes, images, count, length))
        blocks = max(count_blocks(search(kinds, shape)[1]), 1)
        slots = int(images.sum()) / (blocks * shape.images)
        out[shape] = Utilization(int(sizes.sum()) / (blocks * count * length), slots)
    return out


def choose_shape(
    sizes: np.ndarray, images: np.ndarray, length: int, rows: Sequence[int] = (1, 2, 4)
) -> Shape:
    """The shape whose positions and slots are used best (their product); of those within 0.5%, the first."""
    found = compare_shapes(sizes, images, length, rows)
    best = max(used.positions * used.slots for used in found.values())
    return next(shape for shape, used in found.items() if used.positions * used.slots >= 0.995 * best)


def upper_bound(sizes: np.ndarray, images: np.ndarray, shape: Shape) -> float:
    """A share of positions that no plan of these samples can go above, in 0..1.

    The samples need `binpacking.row_bound` rows whatever the images, hence a G-th of them blocks; and, as no
    block has more than P slots, a P-th of the images blocks. All positions of that many blocks count.
    """
    kinds, _ = Kinds.of(sizes, images)
    if not len(sizes):
        return 1.0
    by_images = -(-int(images.sum()) // shape.images) if shape.images else 0
    blocks = max(-(-row_bound(kinds, shape.length) // shape.rows), by_images)
    return int(sizes.sum()) / (blocks * shape.rows * shape.length)


# --- from kinds to samples ----------------------------------------------------------------------------------


def _check(kinds: Kinds, kind: np.ndarray, shape: Shape, numbers: np.ndarray) -> None:
    limits = ((kinds.size, 1, shape.length, "positions"), (kinds.images, 0, shape.images, "image slots"))
    for have, least, most, what in limits:
        bad = np.flatnonzero((have < least) | (have > most))
        if len(bad):
            sample = numbers[np.argmax(kind == bad[0])]
            raise UserError(
                f"sample {sample} takes {have[bad[0]]} {what}, but {least} to {most} can be packed:"
                " truncate it or choose a larger shape"
            )


def _random(count: int, *entropy: int) -> np.ndarray:
    """A random order of range(count), the same on every machine and with every numpy."""
    raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(np.asarray(raw, np.uint64), kind="stable")


def _hand_out(rows: Rows, kind: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The row of each sample [n]: those of a class go to its places in `order`."""
    starts = np.cumsum([0, *(times for times, _ in rows.groups)])
    places, classes = [], []
    for start, (times, held) in zip(starts.tolist(), rows.groups, strict=False):
        for member, many in held:
            places.append(np.repeat(np.arange(start, start + times), many))
            classes.append(np.full(times * many, member))
    if not places:
        return np.zeros(0, np.int64)
    by_class = np.argsort(np.concatenate(classes), kind="stable")
    row = np.empty(len(kind), np.int64)
    row[order[np.argsort(kind[order], kind="stable")]] = np.concatenate(places)[by_class]
    return row


def _place_rows(rows: Rows, blocks: Blocks, per_block: int, seed: int, epoch: int) -> np.ndarray:
    """Where each row stands in the plan [rows]: rows of like image count, and then blocks, are shuffled."""
    images = np.repeat(np.asarray(rows.images, np.int64), [times for times, _ in rows.groups])
    count = count_blocks(blocks)
    start, wanted, seats = 0, [], []
    for times, members in blocks:
        for slot, number in enumerate(members):
            wanted.append(np.full(times, number))
            seats.append(np.arange(start, start + times) * per_block + slot)
        start += times
    if not seats:
        return np.zeros(0, np.int64)
    order = _random(len(images), seed, epoch, 2)
    order = order[np.argsort(images[order], kind="stable")]
    place = np.empty(len(images), np.int64)
    place[order] = np.concatenate(seats)[np.argsort(np.concatenate(wanted), kind="stable")]
    # Whole blocks move, and the rows of each: a random key a row, sorted within its block's new place.
    block = _random(count, seed, epoch, 3)[place // per_block]
    slots = np.argsort(_random(count * per_block, seed, epoch, 4).reshape(count, per_block), axis=1)
    return block * per_block + slots[block, place % per_block]


# --- mixtures -----------------------------------------------------------------------------------------------


def epoch_samples(counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Sample numbers of one epoch of a mixture of data sets that lie one behind the other.

    counts: how many samples each has; weights: how often an epoch shows each of them: 1 once, 2 twice, 0.5 a
    half now and the other half in the next epoch. Each data set goes through permutation after permutation of
    its samples, so none is shown again before all were. A weight is read as the fraction nearest to it with a
    denominator up to 1,000, so that three thirds are one.
    """
    chosen = [np.zeros(0, np.int64)]
    for source, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        if not 0 <= weight < float("inf"):
            raise UserError(f"weight {weight} of data set {source + 1}: it must be 0 or more")
        share = Fraction(weight).limit_denominator(1000) * count
        at, end = int(share * epoch), int(share * (epoch + 1))
        while at < end:
            lap, first = divmod(at, count)
            last = min(first + end - at, count)
            chosen.append(sum(counts[:source]) + _random(count, seed, source, lap, 5)[first:last])
            at += last - first
    return np.concatenate(chosen)


# --- LLaVA's own sampler ------------------------------------------------------------------------------------


def group_by_modality_length(
    words: np.ndarray, has_image: np.ndarray, batch: int, world: int, seed: int, epoch: int
) -> np.ndarray:
    """The order in which LLaVA shows samples with `group_by_modality_length`: [n] sample numbers.

    words: [n] whitespace words of all turns; has_image: [n] bool; batch: samples of a device's batch; world:
    devices times steps of gradient accumulation. Each `batch` samples one behind the other are one device's
    batch, and each `world` such batches one update: of one modality, except the last, which holds the last of
    both. Permutations are ours, all else is as there, so the last of each modality is left over even if full.

    Source: llava/train/llava_trainer.py of haotian-liu/LLaVA, `get_modality_length_grouped_indices`.
    """
    parts = [np.flatnonzero(has_image), np.flatnonzero(~np.asarray(has_image, bool))]
    orders = [
        part[_length_grouped(words[part], batch, world, _random(len(part), seed, epoch, 6 + which))]
        for which, part in enumerate(parts)
    ]
    if not all(len(part) for part in parts):
        return np.concatenate(orders)
    mega = batch * world
    units = [[order[at : at + mega] for at in range(0, len(order), mega)] for order in orders]
    whole = [unit for order in units for unit in order[:-1]]
    tail = np.sort(np.concatenate([order[-1] for order in units]))
    return np.concatenate([*(whole[at] for at in _random(len(whole), seed, epoch, 8)), tail])


def _length_grouped(words: np.ndarray, batch: int, world: int, order: np.ndarray) -> np.ndarray:
    """One modality: megabatches of `order`, each by falling length, dealt to `world` batches."""
    out = []
    for at in range(0, len(order), batch * world):
        mega = order[at : at + batch * world]
        mega = mega[np.argsort(-words[mega].astype(np.int64), kind="stable")]
        out += _even_chunks(mega.tolist(), words, world)
    return np.array([index for chunk in out for index in chunk], np.int64)


def _even_chunks(mega: list[int], words: np.ndarray, world: int) -> list[list[int]]:
    """Every `world`-th where it does not come out even; else each to the lightest batch that is not full."""
    if len(mega) % world:
        return [mega[start::world] for start in range(world)]
    chunks: list[list[int]] = [[] for _ in range(world)]
    weights = [0.0] * world
    for index in mega:
        lightest = weights.index(min(weights))
        chunks[lightest].append(index)
        full = len(chunks[lightest]) == len(mega) // world
        weights[lightest] = float("inf") if full else weights[lightest] + int(words[index])
    return chunks


def padded_share(order: np.ndarray, sizes: np.ndarray, batch: int) -> float:
    """The real share of positions where each `batch` samples of `order` are padded to their longest."""
    ordered = sizes[order]
    starts = np.arange(0, len(ordered), batch)
    rows = np.diff([*starts, len(ordered)])
    return int(ordered.sum()) / max(int((np.maximum.reduceat(ordered, starts) * rows).sum()), 1)
