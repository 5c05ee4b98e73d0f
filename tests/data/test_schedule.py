"""The plan of every epoch: what packing promises holds in all of them, and a resume needs none before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlmscale.data.packing import Plan, Shape
from vlmscale.data.plans import Plans
from vlmscale.data.schedule import Schedule

COUNT, BATCH = 1000, 16


def schedule(packing: str, weights: tuple[float, ...] = (1.0,)) -> Schedule:
    rng = np.random.default_rng(0)
    images = (rng.random(COUNT) < 0.7).astype(np.int32)
    sizes = rng.integers(5, 60, COUNT) + 8 * images
    usable = tuple(np.array_split(np.arange(COUNT), len(weights)))
    words = rng.integers(1, 99, COUNT)
    return Schedule(packing, Shape(1, 128, 4), sizes, images, words, usable, weights, BATCH, seed=3)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_every_batch_of_every_epoch_is_one_of_llavas_sampler(epoch: int) -> None:
    planned = schedule("modality_length")
    plan = planned(epoch)
    rows = [plan.row(index) for index in range(len(plan.row_offsets) - 1)]
    assert len(rows) == planned.rows(epoch) == -(-COUNT // BATCH) * BATCH
    assert sorted(np.concatenate(rows)) == list(range(COUNT))
    # An epoch is whole batches, so that those of the next are the sampler's too.
    batches = [np.concatenate(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
    mixed = [len(set(planned.images[batch] > 0)) > 1 for batch in batches]
    assert sum(mixed) <= 2, "what the sampler leaves over"
    falling = [(np.diff(planned.words[batch]) <= 0).all() for batch in batches]
    assert np.mean(falling) > 0.9


@pytest.mark.parametrize("packing", ["none", "modality_length", "pack"])
def test_rows_are_known_as_they_are_planned(packing: str) -> None:
    planned = schedule(packing, (1.0, 0.5, 1.7))
    for epoch in range(4):
        plan = planned(epoch)
        assert planned.rows(epoch) == (None if packing == "pack" else len(plan.row_offsets) - 1)
        assert sorted(plan.samples) == sorted(planned.chosen(epoch))


@pytest.mark.parametrize("packing", ["none", "modality_length"])
def test_a_late_epoch_is_found_without_the_plans_before(
    packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, made = schedule(packing), []
    whole = planned.rows(0)

    class Watched(Schedule):
        def __call__(self, epoch: int) -> Plan:
            made.append(epoch)
            return super().__call__(epoch)

    watched = Watched(**vars(replace(planned)))
    block = Plans(watched).block(5 * whole + 7)
    assert made == [5]
    np.testing.assert_array_equal(block[0], planned(5).row(7))
