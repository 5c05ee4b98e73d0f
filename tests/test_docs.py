"""The Python of docs/checkpoints.md runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.pretrained import save_llava

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_loading_example_runs(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "checkpoints.md").read_text(), re.S)
    assert len(blocks) == 1
    save_llava("clip-llama", tmp_path / "llava-1.5-7b-hf")
    monkeypatch.chdir(tmp_path)
    exec(blocks[0], {})
    out = capsys.readouterr().out
    assert "loaded 71 parameters" in out
    assert "DecoderSize(width=32" in out
