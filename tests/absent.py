"""What a test needs and a machine may lack: skipped there, a failure in CI, which installs all of it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def refuse(why: str) -> NoReturn:
    """Skip with a reason; fail in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)
