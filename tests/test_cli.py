"""The command line's own: what it does before any command."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmscale import cli


@pytest.mark.parametrize(
    "installed, device, alone",
    [
        (True, "", True),
        (True, "accel0", False),
        (True, "vfio/0", False),
        (True, "nvidia0", False),
        (True, "vfio/vfio", True),  # there on any machine
        (False, "", False),
    ],
)
def test_jax_looks_for_no_tpu_where_its_compiler_is_there_for_planning_alone(
    installed: bool, device: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: object() if installed else None)
    if device:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    assert cli.only_cpu_here(tmp_path) is alone
