"""One value of a file: whether it is what it must be, and how it looks in a message that says it is not.

And the reading of a JSON file whole.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

LEAST, MOST = math.ulp(0.0), sys.float_info.max  # bounds of a number that is positive, and finite
MOST_TOKENS = 1e9
_LONGEST_NAME = 200
_LONGEST_SHOWN = 60


class DataError(Exception):
    """The data cannot be used: one line that names the file, the line and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
      DataError: it is absent or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def cut(text: str) -> str:
    """`text`, shortened where it is too long for a message."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def shown(value: object) -> str:
    """A value in a message: on one line and not long, whatever it is."""
    return cut(repr(value[:_LONGEST_SHOWN] if isinstance(value, str) else value))


def comparable(value: Any) -> Any:
    """A value of any type as one that can be compared, hashed and printed."""
    if value is None or (isinstance(value, str) and value.isprintable()):
        return value
    # NaN differs from itself: it becomes text, as lists do.
    if isinstance(value, (int, float)) and value == value:
        return value
    return json.dumps(value, sort_keys=True)


def to_name(value: object, key: str, where: str) -> str:
    """A name that can stand in a report: one line, nothing that cannot be printed; else DataError."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise DataError(f"{where}: {key} must be a name, got {shown(value)}")
    if len(value) > _LONGEST_NAME:
        raise DataError(f"{where}: {key} has {len(value)} characters; a name has at most {_LONGEST_NAME}")
    return value


def to_number(value: object, key: str, where: str, low: float = 0.0, high: float = MOST) -> float:
    """A number from `low` to `high`, also one written as text; else DataError."""
    if (type(value) is float or type(value) is int) and low <= value <= high:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise DataError(f"{where}: {key} must be a number, got {shown(value)}")
    try:
        if isinstance(value, str) and "_" in value:  # float() would take 1_5 for 15
            raise ValueError
        number = float(value)
    except ValueError:
        raise DataError(f"{where}: {key} must be a number, got {shown(value)}") from None
    except OverflowError:
        raise DataError(f"{where}: {key} must be finite, got a number of hundreds of digits") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: {key} must be finite, got {shown(value)}")
    if low <= number <= high:
        return number
    if low == LEAST and number <= 0:
        bounds = "positive"
    elif high <= 1:
        bounds = f"between {low:g} and {high:g}"
    else:
        bounds = f"at least {low:g}" if number < low else f"at most {high:g}"
    raise DataError(f"{where}: {key} must be {bounds}, got {shown(value)}")


def to_seed(value: object, where: str) -> int:
    """A whole number of at least 0; a row without a seed has seed 0."""
    number = 0.0 if value is None or value == "" else to_number(value, "seed", where)
    if not number.is_integer():
        raise DataError(f"{where}: seed must be a whole number, got {shown(value)}")
    return int(number)


def to_tokens(value: object, where: str) -> float:
    """A visual token count: 0 without an image, else at least 1."""
    number = to_number(value, "visual_tokens", where, high=MOST_TOKENS)
    if 0 < number < 1:
        raise DataError(f"{where}: visual_tokens must be 0 (no image) or at least 1, got {shown(value)}")
    return number
