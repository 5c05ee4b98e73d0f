"""What a compressor is given: the tower's outputs, computed only where a method asks for them."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Features(NamedTuple):
    """Tower outputs of a batch of images.

    Attributes:
      selected: [B, P, C] the selected layer.
      levels: [B, P, L * C] several layers side by side along the channel, or None when not asked for.
    """

    selected: jax.Array
    levels: jax.Array | None = None
