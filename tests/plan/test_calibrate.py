"""Steps timed on this machine, and the roofline that is calibrated with them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from vlmscale.cli import main
from vlmscale.cli_bench import _steps
from vlmscale.config import Cell, CompressorConfig, LLMConfig, TrainConfig
from vlmscale.errors import UserError
from vlmscale.plan import calibrate
from vlmscale.plan.calibrate import Timed, compare, place_here
from vlmscale.plan.roofline import Efficiencies, read_calibration
from vlmscale.plan.slices import find_slice

TINY = "configs/scenes_tiny.py:toy-14k,4"


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that need not be measured."""
    monkeypatch.setattr(calibrate, "ceilings", lambda: (1e11, 1e10))


@pytest.mark.usefixtures("ceilings")
def test_steps_are_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "here.json"
    words = ["bench", "step", TINY, f"{TINY[:-1]}16", "--steps", "1", "--length", "64", "--out", str(out)]
    assert main([*words, "--config.train.batch_size=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    first, second = found["cells"]
    assert (first["visual_tokens"], second["visual_tokens"], first["length"]) == (4, 16, 64)
    assert first["measured_s"] > 0 < first["compiler_bytes"]
    assert found["devices"] == jax.device_count()
    assert set(read_calibration(out)) == {jax.devices()[0].device_kind}
    assert _steps(found).count("toy-14k") == 2


@pytest.mark.usefixtures("ceilings")
@pytest.mark.parametrize(
    "words, told",
    [
        (["--length", "5"], "leaves no text"),
        (["--steps", "0"], "--steps=0"),
        (["--config.mesh.tensor=3"], "an axis can have 1, 2, 4, 8"),
        (["--config.train.batch_size=7"], "must be a multiple of the 8 devices"),
    ],
)
def test_what_cannot_be_timed(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", TINY, *words]) == 2
    assert told in capsys.readouterr().err


def timed(seconds: float) -> Timed:
    recipe = TrainConfig(batch_size=16, attention="splash", dtype="bfloat16")
    cell = Cell(compressor=CompressorConfig("pool", 16), llm=LLMConfig("qwen1.5-0.5b"), train=recipe)
    return Timed(cell, (16, 1, 1), 2048, seconds, 1, None, 2**30)


def test_the_calibrated_roofline_says_what_was_timed() -> None:
    place = find_slice("v5e-16")
    [assumed] = compare([timed(1.0)], place, Efficiencies())
    for factor in (1.0, 3.0):
        one = timed(assumed["predicted_s"] * factor)
        shares = calibrate.calibrate(one, place)
        assert getattr(shares, assumed["bound"]) == pytest.approx(
            getattr(Efficiencies(), assumed["bound"]) / factor
        )
        [row] = compare([one], place, shares)
        assert row["predicted_s"] == pytest.approx(one.seconds)
    assert calibrate.calibrate(timed(1e-9), place).products == 1.0  # no device beats its own peak


def test_this_machine_is_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ceilings", lambda: (8e11, 8e10))
    place = place_here()
    assert place.devices == jax.device_count()
    assert place.generation.device.flops * place.devices == pytest.approx(8e11)
    assert place.hosts == 1

    class Unknown:
        device_kind, platform = "Wonder 9", "gpu"

    monkeypatch.setattr(calibrate.jax, "devices", lambda: [Unknown()])
    with pytest.raises(UserError, match="Wonder 9"):
        place_here()
    Unknown.device_kind = "NVIDIA H200"
    assert place_here().name == "h200-1"


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", "{"),
        '{"efficiencies": {"x": {"products": 2.0}}}',
        '{"efficiencies": {"x": {"speed": 0.5}}}',
    ],
)
def test_a_calibration_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(
        UserError, match=r"^\S*calibration\.json: no such file; `vlmscale bench step --out FILE`"
    ):
        read_calibration(path)
    path.write_text(text)
    with pytest.raises(UserError, match=r"calibration\.json"):
        read_calibration(path)
