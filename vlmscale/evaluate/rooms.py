"""Answers with a reducer whose lengths depend on the prompts, by compiled programs of few sizes.

Of an adaptive one a program has a fixed number of places behind each cut. The first batch is answered with
room for all and says how many were needed; the next ones get as many, to the next sixteenth of all. Where a
prompt needs more, its batch is answered once more: what is said does not depend on the rooms. Of compression
tokens the prompts themselves say how long the two passes are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from vlmscale.evaluate.generation import make_generate
from vlmscale.evaluate.guided import Batch, Reply
from vlmscale.models.hiding import Passes
from vlmscale.models.vlm import VLM
from vlmscale.reducers import cut_layers
from vlmscale.sharding import to_host
from vlmscale.train.step import Params

_SIZES = 16  # of a room, up to all slots


@dataclass
class Fitting:
    """Answers prompts of one number of pictures.

    Attributes:
      model: with an adaptive reducer, in the "loop" layout.
      max_new_tokens, stop_ids: of `make_generate`.
      mesh: what batches lie on.
      rooms: what was enough so far; None before the first batch.
    """

    model: VLM
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    mesh: Mesh
    rooms: tuple[int, ...] | None = None

    def __call__(self, params: Params, batch: Batch) -> Reply:
        """Answer a prompt batch."""
        assert self.model.reducer is not None
        slots = batch["selected"].shape[0] // batch["tokens"].shape[0] * self.model.visual_tokens
        cuts = len(cut_layers(self.model.reducer, self.model.decoder_size.num_layers))
        whole = (slots,) * cuts
        ids, kept = self._answer(params, batch, self.rooms or whole)
        if (kept.max(0) > (self.rooms or whole)).any():
            # What a later cut keeps is known for sure only where the earlier ones had room.
            ids, kept = self._answer(params, batch, whole)
        most = np.maximum(kept.max(0), self.rooms or 0)
        self.rooms = wide_enough(most.tolist(), slots)
        return Reply(ids, np.zeros(len(ids), int), np.zeros(len(ids), bool), kept)

    def _answer(self, params: Params, batch: Batch, rooms: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        run = make_generate(self.model, self.max_new_tokens, self.stop_ids, rooms=rooms)
        ids, kept = run(params, batch)
        return to_host(ids, self.mesh), to_host(kept, self.mesh)


@dataclass(frozen=True)
class TwoPass:
    """Answers prompts in two passes, the first up to the compression tokens.

    Attributes:
      model: with compression tokens, in the "loop" layout.
      max_new_tokens, stop_ids: of `make_generate`.
      mesh: what batches lie on.
    """

    model: VLM
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    mesh: Mesh

    def __call__(self, params: Params, batch: Batch) -> Reply:
        """Answer a prompt batch."""
        slots, valid = (to_host(batch[name], self.mesh) for name in ("image_slots", "valid"))
        passes = Passes.of(slots, valid, self.model.visual_tokens, self.model.appended)
        run = make_generate(self.model, self.max_new_tokens, self.stop_ids, rooms=passes)
        return Reply.of(to_host(run(params, batch), self.mesh))


def wide_enough(needed: list[int], slots: int) -> tuple[int, ...]:
    """Rooms for so many tokens: whole sixteenths of the slots, none larger than the one before."""
    step = math.ceil(slots / _SIZES)
    rooms: list[int] = []
    for count in reversed(needed):
        room = min(max(math.ceil(count / step), 1) * step, slots)
        rooms.append(max([room, *rooms[-1:]]))
    return tuple(reversed(rooms))
