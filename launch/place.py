"""Where the directory of a sweep lies, for those who work on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from launch.claims import Claim, ClaimStore, FileClaims
from launch.outcome import CLAIMS

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Place:
    """On a disk that all of them share: what one writes is there for the others.

    `launch.mirror.Mirror` does what is a matter of course here.
    """

    shared = True

    def claims(self, folder: Path) -> ClaimStore:
        """The claims on the cohort of a folder."""
        return FileClaims(folder / CLAIMS)

    def data(self, folder: Path) -> Path:
        """The data of the sweep that a cohort's or a cell's folder is of."""
        return folder.parent.parent / "data"

    def fetch(self, places: Sequence[Path]) -> None:
        """Bring what others have written in these folders."""

    def refresh(self, runs: Sequence[Path]) -> None:
        """Bring the states of cells, and what asks for them to be stopped."""

    def again(self) -> None:
        """Bring what has changed of all that was asked for when the directory was opened."""

    def send(self, places: Sequence[Path], claim: Claim | None) -> None:
        """Give to others what was written in these folders, by who holds the claim on them.

        Raises:
          LostError: another has taken it over.
          OSError: it cannot be sent.
        """

    @contextmanager
    def kept(self, places: Sequence[Path], claim: Claim) -> Iterator[None]:
        """Send now and then while the block runs."""
        yield

    def look(self, runs: Sequence[Path], *, now: bool = False) -> None:
        """Bring what asks the holder of these cells to stop, unless that was done a moment ago."""

    def each(self, make: Callable[[_Item], _Made], items: Iterable[_Item]) -> list[_Made]:
        """What `make`, which asks for one thing, returns for each."""
        return [make(item) for item in items]


SHARED = Place()
