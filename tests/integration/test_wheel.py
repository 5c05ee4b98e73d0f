"""The wheel holds everything that a run needs, and no tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_wheel_is_complete(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    if importlib.util.find_spec("hatchling"):
        words.append("--no-build-isolation")
    done = subprocess.run([*words, str(ROOT)], capture_output=True, text=True, check=False, cwd=tmp_path)
    if done.returncode and "--no-build-isolation" not in words:
        pytest.skip(f"the build backend cannot be fetched here: {done.stderr.strip().splitlines()[-1:]}")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("vlmscale-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "vlmscale = vlmscale.cli:main" in archive.read(entry).decode()
    for package in ("vlmscale", "launch", "analysis"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= names
    configs = {f"vlmscale/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert configs
    assert configs <= names
    assert "vlmscale/assets/scenes-48.safetensors" in names
    papers = {f"analysis/paper_data/{path.name}" for path in (ROOT / "analysis/paper_data").glob("*.csv")}
    assert len(papers) >= 3
    assert papers <= names
    assert any(name.endswith("LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"vlmscale", "launch", "analysis"}
    assert not [name for name in names if "__pycache__" in name or "tests/" in name]
