"""Claims whose entries are objects of a bucket.

An entry is written under the condition that no object has its name, which the store decides for one caller.
Renewing writes it once more; its age is the difference of two times of the store's.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from launch.claims import ClaimStore
from vlmscale.bucket import ABSENT, Bucket

_NAME = re.compile(r"(\d+)\.json")


class BucketClaims(ClaimStore):
    """Entries as objects below an address."""

    def __init__(self, bucket: Bucket) -> None:
        """Entries of `bucket`, which is the folder of claims."""
        self.bucket = bucket

    def last(self) -> int:
        """As `ClaimStore`."""
        found = map(_NAME.fullmatch, self.bucket.entries())
        return max((int(match[1]) for match in found if match), default=0)

    def read(self, number: int) -> dict[str, Any]:
        """As `ClaimStore`."""
        entry: dict[str, Any] = json.loads(self.bucket.read(_name(number)))
        return entry

    def create(self, number: int, entry: dict[str, Any]) -> bool:
        """As `ClaimStore`."""
        entry = entry | {"written": uuid.uuid4().hex}
        try:
            self.bucket.write(_name(number), (json.dumps(entry) + "\n").encode(), ABSENT)
        except FileExistsError:
            # A request whose answer was lost is made again, and then it is our own entry that exists.
            return self.read(number).get("written") == entry["written"]
        return True

    def renew(self, number: int) -> None:
        """As `ClaimStore`."""
        self.bucket.write(_name(number), self.bucket.read(_name(number)))

    def age_s(self, number: int) -> float:
        """As `ClaimStore`; a little less where this machine's counting is behind the store's."""
        entry = self.bucket.look(_name(number))
        if entry is None:
            raise FileNotFoundError(f"{self.bucket.address}/{_name(number)}")
        return max(0.0, self.bucket.now() - entry.updated)


def _name(number: int) -> str:
    return f"{number:06d}.json"
