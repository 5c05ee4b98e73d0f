"""The Python of the docs runs as it is printed."""

from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from tests.integration.tiny import SCENES, lines, train
from tests.pretrained import save_llava
from vlmscale.cli import main
from vlmscale.compressors import COMPRESSORS, Features, Method, check_count, make_compressor
from vlmscale.compressors.grid import square_divisors
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.errors import UserError
from vlmscale.validation import validate

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


def test_the_compressor_of_the_guide_is_one_file_and_one_entry(tmp_path: Path, monkeypatch: Any) -> None:
    module, entry = re.findall(r"```python\n(.*?)```", (DOCS / "add-a-compressor.md").read_text(), re.S)
    added = types.ModuleType("vlmscale.compressors.max_pool")
    monkeypatch.setitem(sys.modules, added.__name__, added)
    exec(module, vars(added))
    try:
        scope = {"Method": Method, "square_divisors": square_divisors}
        exec(entry, scope)
        COMPRESSORS.update(scope["COMPRESSORS"])
        _use_the_added_method(tmp_path)
    finally:
        del COMPRESSORS["max_pool"]


def _use_the_added_method(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    compressor = make_compressor("max_pool", 4, 12, {"add_mean": "yes"})
    tokens, params = compressor.init_with_output(jax.random.key(0), Features(x), None)
    windows = x.reshape(2, 2, 2, 2, 2, 8).swapaxes(2, 3).reshape(2, 4, 4, 8)
    layers = jax.tree.map(np.asarray, jax.tree.leaves(params))
    assert tokens[0].shape == (2, 4, 12)
    assert sum(leaf.size for leaf in layers) == 8 * 12 + 12 + 12 * 12 + 12
    pooled = Features(windows.max(2) + windows.mean(2))
    alone, _ = make_compressor("mlp", 4, 12).apply(params, pooled, None)
    np.testing.assert_allclose(tokens[0], alone, atol=1e-5)
    words = ["--config.compressor.name=max_pool", "--config.compressor.options=add_mean=yes"]
    assert train(tmp_path / "run", *words, config=SCENES, count=4) == 0
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    rows = lines(tmp_path / "run" / "result.jsonl")
    assert {row["compressor"] for row in rows} == {"max_pool:add_mean=yes"}
    assert all(row["compressor_flops"] > 0 for row in rows)
    with pytest.raises(UserError, match="max_pool on 8x8 patches gives 1, 4, 16, 64"):
        check_count("max_pool", 9, 8)


def test_the_data_examples_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 0, 0)).save(picture, "JPEG")
    shown = Record("a", ("red.jpg",), (Turn("<image>\nWhich colour?", "Red."),))
    told = Record("b", (), (Turn("Say yes.", "Yes."),))
    write_dataset(tmp_path / "data" / "mix", {"train": [(shown, [picture.getvalue()]), (told, [])]})
    for block in blocks[:3]:
        exec(block, {})
    out = capsys.readouterr().out
    assert "(30, 40, 3)" in out
    assert "(2, 224, 224, 3)" in out
    assert "2 a ('red.jpg',)" in out
    scope: dict[str, Any] = {}
    exec(blocks[3], scope)
    validate(scope["get_config"]("data/mix"))
