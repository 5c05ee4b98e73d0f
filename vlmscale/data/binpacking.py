"""Bin packing on a histogram: which kinds of samples fill a row, and how full rows can be at most.

A *kind* is a (size, image count) with the number of samples that have it; a *group* is a number of rows that
hold the same. Half a million samples are a few thousand kinds, so a search takes a second. `packing` says
which samples of a kind go where.

Three ways to rows. Best-fit decreasing leaves next to nothing where samples are small beside a row, but puts
small ones together, so that some rows hold ten times the images of others. Worst-fit decreasing gives all
about as many. Where only two or three samples fit (V = 576 in T = 2048), both pair the wrong ones and leave
8% or more; there rows are bought at prices: a row is the knapsack of greatest value, and what is bought too
fast becomes cheaper (multiplicative weights: Plotkin, Shmoys and Tardos, "Fast approximation algorithms for
fractional packing and covering problems", 1995).

Floats are added and multiplied one by one, never summed by numpy, whose order of summing depends on the
machine: the rows are the same wherever they are sought.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

# Groups that fill this share of their positions are good enough; else prices are tried, which takes seconds.
ENOUGH = 0.985
# Prices are for sizes rounded up to one of this many: fine enough, and a knapsack of half a millisecond.
STEPS = 512
# How fast a price falls in each pass: e^-RATE over all samples of a kind. Passes start with learned prices.
RATES = (4.0, 2.0, 1.0)
# Rows are opened at once for worst fit as if they could be filled so far.
FILLS = (0.998, 0.99)
# The linear program of the bound has sizes rounded to one of this many, and may take so many rounds.
BOUND_STEPS, BOUND_ROUNDS = 256, 100
# At most this share of a kind is bought at one price.
SHARE = 0.1
# All rows are bought that are worth this much of the best.
WORTH = 0.99

Content = tuple[tuple[int, int], ...]  # (kind, samples of it in a row), ...
Groups = tuple[tuple[int, Content], ...]  # (rows alike, what each holds), ...


class Kinds(NamedTuple):
    """Distinct (size, images), ascending, with how many samples have them: [k] int64 each."""

    size: np.ndarray
    images: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, sizes: np.ndarray, images: np.ndarray) -> tuple[Kinds, np.ndarray]:
        """The kinds of samples with these sizes and image counts, and the kind of each sample [n]."""
        base = int(images.max(initial=0)) + 1
        code = np.asarray(sizes, np.int64) * base + images
        code, kind, count = np.unique(code, return_inverse=True, return_counts=True)
        return cls(code // base, code % base, count.astype(np.int64)), kind


class Shape(NamedTuple):
    """A block: `rows` rows (G) of `length` positions (T) that together own `images` image slots (P)."""

    rows: int
    length: int
    images: int


class Rows(NamedTuple):
    """Groups of rows over *classes* of kinds: those of like image count whose sizes were rounded to the same.

    classes: [k] the class of each kind; images: for each group, the images in one of its rows.
    """

    groups: Groups
    classes: np.ndarray
    images: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(rows for rows, _ in self.groups)


def search(kinds: Kinds, shape: Shape) -> tuple[Rows, Blocks]:
    """Rows for all samples and blocks for all rows: of several ways that with fewest blocks.

    Sizes and image counts must be within the shape's limits.
    """
    free = _ways(kinds, shape.length, None)
    found = [rows for rows in free if max(rows.images, default=0) <= shape.images]
    if len(found) < len(free):
        found += _ways(kinds, shape.length, shape.images)
    return min(((rows, gather(rows, shape)) for rows in found), key=lambda pair: count_blocks(pair[1]))


def least_rows(kinds: Kinds, length: int) -> int:
    """The fewest rows that a search finds where image slots do not matter."""
    return min((rows.total for rows in _ways(kinds, length, None)), default=0)


def _ways(kinds: Kinds, length: int, images: int | None) -> tuple[Rows, ...]:
    """Rows by each way that can be of use, with `images` images in a row at most."""
    most = int((kinds.images * kinds.number).sum()) if images is None else images
    return _remembered(kinds.size.tobytes(), kinds.images.tobytes(), kinds.number.tobytes(), length, most)


@functools.lru_cache(maxsize=8)  # epochs of the same samples differ in who goes where alone
def _remembered(size: bytes, image: bytes, count: bytes, length: int, images: int) -> tuple[Rows, ...]:
    kinds = Kinds(*(np.frombuffer(column, np.int64) for column in (size, image, count)))
    total = int((kinds.size * kinds.number).sum())
    spread = [_fit(kinds, length, images, -int(-total // (fill * length))) for fill in FILLS]
    found = [_fit(kinds, length, images, 0), *spread]
    if total < ENOUGH * min(rows.total for rows in found) * length:
        found.append(_by_prices(kinds, length, images))
    return tuple(found)


def _rows(kinds: Kinds, groups: Groups, classes: np.ndarray) -> Rows:
    return Rows(groups, classes, tuple(sum(int(kinds.images[k]) * m for k, m in held) for _, held in groups))


# --- blocks -------------------------------------------------------------------------------------------------

Blocks = tuple[tuple[int, tuple[int, ...]], ...]  # (blocks alike, image counts of their rows), ...


def gather(rows: Rows, shape: Shape) -> Blocks:
    """Blocks of rows, told by their image counts; one of fewer than G rows is filled up with empty ones.

    The row with most images comes first, and then always the one with most that leaves room for as many of
    the poorest as the block still needs: so blocks are full of images as long as there are rows for that.
    """
    left = [0] * (shape.images + 1)  # rows by image count
    for images, (number, _) in zip(rows.images, rows.groups, strict=True):
        left[images] += number
    out: list[tuple[int, tuple[int, ...]]] = []
    while any(left):
        have = [images for images, number in enumerate(left) if number]
        members: list[int] = []
        room = shape.images
        for after in range(shape.rows - 1, -1, -1):
            free = [images for images in have if members.count(images) < left[images] and images <= room]
            if not free:
                break
            roomy = [images for images in free if images <= room - after * have[0]]
            members.append(max(roomy) if members and roomy else max(free))
            room -= members[-1]
        times = min(left[images] // members.count(images) for images in members)
        for images in members:
            left[images] -= times
        out.append((times, tuple(members)))
    return tuple(out)


def count_blocks(blocks: Blocks) -> int:
    """Number of blocks."""
    return sum(times for times, _ in blocks)


# --- best-fit decreasing ------------------------------------------------------------------------------------

_Open = tuple[int, int, tuple]  # (rows alike, image slots left, (kind, many, what was there before) or ())


def _fit(kinds: Kinds, length: int, images: int, spread: int) -> Rows:
    """Decreasing fit, all samples of a kind at once: the largest first.

    With `spread` 0 each goes into the fullest row that it fits (best fit). Else it goes into the emptiest of
    that many rows (worst fit), which gives all about as many images; best fit takes what then fits nowhere.
    """
    size, image, count = (column.tolist() for column in kinds)
    rooms: list[list[_Open]] = [[] for _ in range(length + 1)]  # by positions left
    rooms[length] = [(spread or sum(count), images, ())]
    order = sorted(range(len(size)), key=lambda kind: (-size[kind], -image[kind]))
    if spread:
        top = length
        for kind in order:
            room = top
            while count[kind] and room >= size[kind]:
                if rooms[room]:
                    count[kind] = _pour(rooms, room, kind, size[kind], image[kind], count[kind], most=1)
                room -= 1
            while top and not rooms[top]:
                top -= 1
        rooms[length].append((sum(count), images, ()))
    for kind in order:
        left = count[kind]
        for room in range(size[kind], length + 1):
            if not left:
                break
            if rooms[room]:
                left = _pour(rooms, room, kind, size[kind], image[kind], left, most=length)
    groups = tuple((rows, _flat(held)) for open_ in rooms for rows, _, held in open_ if held)
    return _rows(kinds, groups, np.arange(len(size)))


def _pour(rooms: list[list[_Open]], room: int, kind: int, size: int, image: int, left: int, most: int) -> int:
    """Puts up to `left` samples into the rows with `room` positions left; returns how many found no place."""
    stay = []
    for rows, slots, held in rooms[room]:
        fitting = min(room // size, most, slots // image if image else most)
        for many in (fitting, left % fitting) if fitting else ():
            taken = min(rows, left // many) if many else 0
            if taken:
                rooms[room - many * size].append((taken, slots - many * image, (kind, many, held)))
                rows, left = rows - taken, left - taken * many
        if rows:
            stay.append((rows, slots, held))
    rooms[room] = stay
    return left


def _flat(held: tuple) -> Content:
    out = []
    while held:
        kind, many, held = held
        out.append((kind, many))
    return tuple(out)


# --- prices -------------------------------------------------------------------------------------------------


def _by_prices(kinds: Kinds, length: int, images: int) -> Rows:
    """Rows bought at prices, in several passes: all but the last only learn where prices lie."""
    step = -(-length // STEPS)
    room = length // step
    # What is longer than room * step leaves less than a step, into which nothing goes.
    size = np.minimum(-(-kinds.size // step), room)
    base = int(kinds.images.max()) + 1
    code, classes = np.unique(size * base + kinds.images, return_inverse=True)
    count = np.zeros(len(code), np.int64)
    np.add.at(count, classes, kinds.number)
    rounded = Kinds(code // base, code % base, count)
    price = rounded.size / room
    for rate in RATES:
        groups, price = _buy(rounded, room, images, price, rate)
    return _rows(rounded, groups, classes)


def _buy(kinds: Kinds, room: int, images: int, price: np.ndarray, rate: float) -> tuple[Groups, np.ndarray]:
    """One pass: rows for all samples, and the prices when a fifth of the samples was left."""
    price, left, learned = price.copy(), kinds.number.copy(), price
    quota = np.maximum((kinds.number * SHARE).astype(np.int64), 1)
    groups: list[tuple[int, Content]] = []
    over = total = int(left.sum())
    while over:
        live = np.flatnonzero(left)  # ascending in size, as kinds are
        for members in _worthy(price[live], kinds.size[live], room):
            kind, many = _within(live, members, left, kinds.images, images)
            rows = max(int(np.minimum(left[kind] // many, quota[kind] // many).min()), 1)
            left[kind] -= rows * many
            over -= rows * int(many.sum())
            price[kind] *= np.maximum(1 - rate * rows * many / kinds.number[kind], 0.1)
            groups.append((rows, tuple(zip(kind.tolist(), many.tolist(), strict=True))))
        if over > total // 5:
            learned = price.copy()
    return tuple(groups), learned


def _worthy(price: np.ndarray, size: np.ndarray, room: int) -> list[dict[int, int]]:
    """Rows without a kind in common, each {kind: samples} worth `WORTH` of the best one at least."""
    value, last = _knapsack(price, size, room)
    worth = price + value[room - size]
    first = np.argsort(-worth, kind="stable")
    sizes, lasts, smallest = size.tolist(), last.tolist(), int(size[0])
    out: list[dict[int, int]] = []
    taken: set[int] = set()
    for kind in first[worth[first] >= WORTH * value[room]].tolist():
        members, at = {kind: 1}, room - sizes[kind]
        while at >= smallest:
            if (added := lasts[at]) < 0:
                at -= 1
                continue
            members[added] = members.get(added, 0) + 1
            at -= sizes[added]
        if taken.isdisjoint(members):
            taken.update(members)
            out.append(members)
    return out


def _knapsack(price: np.ndarray, size: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The greatest value in each room 0..room, kinds without limit, and the kind put in last there.

    price, size: [k], sizes ascending. Both results are [room + 1]; kind -1 is a position left empty.
    """
    value, last = np.zeros(room + 1), np.full(room + 1, -1, np.int64)
    fitting = np.searchsorted(size, np.arange(room + 1), side="right").tolist()
    best = 0.0
    for at in range(int(size[0]), room + 1):
        size_fitting = size[: fitting[at]]
        worth = value[at - size_fitting]
        worth += price[: fitting[at]]
        kind = int(worth.argmax())
        if worth[kind] > best:
            best, last[at] = float(worth[kind]), kind
        value[at] = best
    return value, last


def _within(
    live: np.ndarray, members: dict[int, int], left: np.ndarray, image: np.ndarray, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """The kinds of a row and how many of each, cut to what is left and to `images` image slots."""
    kinds, many = [], []
    for kind, wanted in zip(live[list(members)].tolist(), members.values(), strict=True):
        taken = min(wanted, int(left[kind]))
        if image[kind]:
            taken = min(taken, images // int(image[kind]))
            images -= taken * int(image[kind])
        if taken:
            kinds.append(kind)
            many.append(taken)
    return np.array(kinds), np.array(many)


# --- how few rows could do ----------------------------------------------------------------------------------


def row_bound(kinds: Kinds, length: int) -> int:
    """A number of rows that no way of packing can go below.

    Any prices by size that are not negative prove one (Farley, "A note on bounding a class of linear
    programming problems", 1990): where no row can hold more than worth z, samples that are together worth w
    need w / z rows. z is found exactly, by a knapsack over the true sizes. Good prices are the duals of the
    linear program over all rows, here for sizes rounded down and up, with straight lines between: how they
    were found does not matter for the proof. At unit prices it is the number of positions over the length.
    """
    size, at = np.unique(kinds.size, return_inverse=True)
    number = np.bincount(at, kinds.number)
    step = -(-length // BOUND_STEPS)
    room = length // step
    bound = float(size @ number) / length
    for rounded in (size // step, np.minimum(-(-size // step), room)):
        classes, at = np.unique(rounded, return_inverse=True)
        some = classes > 0
        price = _dual_prices(classes[some], np.bincount(at, number)[some], room)
        price = np.interp(size, [0, *classes[some] * step], [0, *price])
        value, _ = _knapsack(price, size, length)
        bound = max(bound, float(price @ number) / value[length])
    return math.ceil(bound * (1 - 1e-9))


def _dual_prices(size: np.ndarray, number: np.ndarray, room: int) -> np.ndarray:
    """Prices [k] at which no row is worth more than 1 and all samples together nearly as much as they can be.

    Column generation (Gilmore and Gomory, 1961): the linear program of the rows known so far tells prices,
    and the rows worth most at these, or at some nearby, join.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csc_matrix

    rng = np.random.default_rng(0)
    rows: list[dict[int, int]] = [{kind: int(room // each)} for kind, each in enumerate(size)]
    price = kept = size / room
    proven, needed = 0.0, math.inf
    for _ in range(BOUND_ROUNDS):
        best = _knapsack(price, size, room)[0][room]
        if price @ number / best > proven:
            proven, kept = price @ number / best, price / best
        if needed - proven < 3e-4 * needed:
            break
        for near in (price, *(price * rng.uniform(0.97, 1, len(size)) for _ in range(6))):
            rows += _worthy(near, size, room)
        column = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        kind = np.concatenate([list(row) for row in rows])
        many = np.concatenate([list(row.values()) for row in rows])
        held = csc_matrix((-many, (kind, column)), (len(size), len(rows)))
        found = linprog(np.ones(len(rows)), A_ub=held, b_ub=-number, method="highs")
        needed = found.fun
        # Halfway to the best prices so far: duals of a program with few rows jump.
        price = np.maximum(0.5 * kept - 0.5 * found.ineqlin.marginals, 0)
    return kept
