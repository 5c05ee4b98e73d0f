"""Samples as the pipeline reads them: a conversation in tokens and its pictures as arrays, by number.

Owns how prepared data sets are read in training: which pictures belong to a conversation that was cut, and
how a picture's bytes or stored tower outputs become arrays. How samples are laid out is `pipeline.py`'s
business.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np

from vlmscale.data.conversation import IMAGE_MARK, Encoded, Template
from vlmscale.data.dataset import Dataset
from vlmscale.data.images import ImageError, open_image, tower_pixels
from vlmscale.data.lengths import Limits
from vlmscale.data.store import Store
from vlmscale.errors import UserError

Picture = dict[str, np.ndarray]


class Source(Protocol):
    """Samples by number. Picklable, as it is sent to worker processes; files open when they are read."""

    @property
    def blank(self) -> Picture:
        """What stands where there is no picture: zeros, shaped as one; {} of a blind model."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Encoded, list[Picture]]:
        """A conversation, cut to where it must end, and a picture for each of its image marks, in order.

        Raises:
          UserError: it is damaged; one line that names the record.
        """


class PictureReader(Protocol):
    """From a record's pictures to arrays."""

    @property
    def blank(self) -> Picture:
        """As `Source.blank`."""

    def read(self, dataset: Dataset, index: int, files: Sequence[bytes]) -> list[Picture]:
        """The first pictures of record `index`, one for each of `files`, their encoded bytes.

        Raises:
          ImageError: one cannot be decoded.
        """


@dataclass(frozen=True)
class Pixels:
    """Pictures as the tower reads them before they are normalised: "pixels", uint8 [S, S, 3].

    Attributes:
      image_size: S, in pixels.
      mean, std: the tower's, one number a channel; the device normalises (`images.normalise` says how).
      mode: of `images.MODES`.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str

    @property
    def blank(self) -> Picture:
        """Black."""
        return {"pixels": np.zeros((self.image_size, self.image_size, 3), np.uint8)}

    def read(self, dataset: Dataset, index: int, files: Sequence[bytes]) -> list[Picture]:
        """Decode and resize.

        Raises:
          ImageError: a picture cannot be decoded.
        """
        return self.decode(files)

    def decode(self, files: Sequence[bytes]) -> list[Picture]:
        """The same of encoded pictures that belong to no record.

        Raises:
          ImageError: a picture cannot be decoded.
        """
        return [{"pixels": self._pixels(data)} for data in files]

    def _pixels(self, data: bytes) -> np.ndarray:
        image = open_image(data, target=self.image_size)
        return tower_pixels(image, self.image_size, self.mean, self.std, self.mode)


@dataclass(frozen=True)
class Stored:
    """Pictures as tower outputs that were stored before.

    Attributes:
      store: by number of the data set's distinct pictures.
      names: of the arrays that are read.
    """

    store: Store
    names: tuple[str, ...]

    @property
    def blank(self) -> Picture:
        """Zeros."""
        specs = {name: self.store.arrays[name] for name in self.names}
        return {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}

    def read(self, dataset: Dataset, index: int, files: Sequence[bytes]) -> list[Picture]:
        """Look up what is stored.

        Raises:
          UserError: the store is damaged.
        """
        first = int(dataset.index.image_offsets[index])
        shown = dataset.index.picture[first : first + len(files)]
        rows = [self.store[int(picture)] for picture in shown]
        return [{name: row[name] for name in self.names} for row in rows]


@dataclass(frozen=True)
class DatasetSource:
    """The samples of a prepared data set.

    Attributes:
      dataset: the records.
      template: makes tokens of turns.
      pictures: makes arrays of pictures; None for a blind model.
      limits: where conversations are cut.
    """

    dataset: Dataset
    template: Template
    pictures: PictureReader | None
    limits: Limits

    @property
    def blank(self) -> Picture:
        """As `Source.blank`."""
        return {} if self.pictures is None else self.pictures.blank

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Encoded, list[Picture]]:
        """As `Source.read`.

        Raises:
          UserError: the record or one of its pictures is damaged.
        """
        record, files = self.dataset.read(index)
        encoded = self.limits.cut(self.template.encode(record.turns))
        if self.pictures is None:
            return encoded, []
        shown = files[: np.count_nonzero(encoded.tokens == IMAGE_MARK)]
        try:
            return encoded, self.pictures.read(self.dataset, index, shown)
        except ImageError as error:
            names = ", ".join(record.images)
            raise UserError(
                f"{self.dataset.path}: record {record.id}: picture {names}: {error}; prepare the data again"
            ) from None


@dataclass(frozen=True)
class Joined:
    """Several sources one behind the other, as a mixture numbers them; all have the same `blank`."""

    parts: tuple[Source, ...]

    @property
    def blank(self) -> Picture:
        """As `Source.blank`."""
        return self.parts[0].blank

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, index: int) -> tuple[Encoded, list[Picture]]:
        """As `Source.read`."""
        starts = [0, *accumulate(map(len, self.parts))]
        part = bisect_right(starts, index) - 1
        return self.parts[part].read(index - starts[part])
