"""The TPU compiler's word on real cells, on a machine that has no TPU."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from vlmscale.cli import main
from vlmscale.errors import UserError
from vlmscale.loading import load_cell
from vlmscale.plan import compiled
from vlmscale.plan.compiled import Compiled, Request, compile_request
from vlmscale.plan.fit import find_fit, lengths_of
from vlmscale.plan.memory import predict

GIB = 2**30
REAL = "configs/llava_finetune.py:qwen1.5-1.8b,144,tokenpacker"
SMALL = ["configs/scenes_tiny.py:toy-375k,16", "--config.train.batch_size=64"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vlmscale" / "plans"


@pytest.mark.aot
@pytest.mark.usefixtures("libtpu")
def test_a_small_cell_is_compiled_once(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", *SMALL, "--topology", "v5e-8", "--json"]
    assert main(words) == 0
    [row] = json.loads(capsys.readouterr().out)["plans"]
    assert row["fits"]
    assert (math.prod(row["mesh"]), row["limit_gib"]) == (8, 15.75)
    assert 0 < row["used_gib"] < 1
    assert {name: part["by"] for name, part in row["programs"].items()} == dict.fromkeys(
        ("train", "tower", "generate"), "compiler"
    )
    assert len(list(cache.glob("*.json"))) == 3
    monkeypatch.setattr(compiled.subprocess, "run", None)  # what is asked again is known
    assert main([*words, "--config.train.seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["used_gib"] == row["used_gib"]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_a_real_cell_fits_and_one_too_large_is_refused_with_the_compilers_figure(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaVA's second stage of 1.8B: splash attention, weights and moments over 16 chips; not on one."""
    cell = load_cell(REAL, ["--config.mesh.fsdp=16"])

    def ask(request: Request) -> Compiled:
        """The step is compiled, as what is large; the small cell has the other programs compiled."""
        return compile_request(request, cache) if request.program == "train" else predict(request)

    fit = find_fit(cell, compiled.find_slice("v5e-16"), lengths_of(cell), ask)
    assert fit is not None
    assert fit.fits
    assert fit.changes == ("train.attention=splash",)
    told, guess = fit.train.told, predict(fit.train.request)
    assert told.arguments == pytest.approx(guess.arguments, rel=1e-3)  # but for the tiles of small arrays
    # Where there is room the compiler gathers more of what fsdp splits ahead of time than it would need.
    assert told.needed > 0.9 * guess.needed
    # The state alone is 12 bytes of each of 1.84e9 parameters.
    assert 1.84e9 * 12 / 16 < told.arguments < told.needed < 15.75 * GIB
    words = ["plan", REAL, "--json", "--topology", "v5e-1", "--config.train.batch_size=1"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    [row] = json.loads(out)["plans"]
    assert not row["fits"]
    assert row["used_gib"] > row["limit_gib"] > 15
    assert row["programs"]["train"]["by"] == "compiler"
    assert "not all fit" in err


def test_without_the_compiler_it_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.util, "find_spec", lambda name: None)
    assert main(["plan", *SMALL, "--topology", "v5e-8"]) == 2
    err = capsys.readouterr().err.strip()
    assert err.endswith("pip install 'vlmscale[tpu]'")
    assert "\n" not in err


@pytest.mark.parametrize(
    "told",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds available "
        "HBM (15.75G).",
    ],
)
def test_what_the_compiler_says_of_too_little_memory_is_read(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"RESOURCE_EXHAUSTED: {told}"

    class Program:
        def compile(self, **options: object) -> None:
            raise RuntimeError(said)

    monkeypatch.setattr(compiled, "lower_request", lambda request: Program())
    request = Request("train", compiled.from_dict(_cell()), "v5e-8", (8, 1, 1), 128)
    found = compiled.measure(request, compiled.find_slice("v5e-8"))
    assert (found.needed, found.limit) == (round(20.5 * GIB), round(15.75 * GIB))
    said = "INTERNAL: something else"
    with pytest.raises(RuntimeError, match="something else"):
        compiled.measure(request, compiled.find_slice("v5e-8"))


def _cell() -> dict[str, object]:
    from vlmscale.config import Cell, to_dict

    return to_dict(Cell())


@pytest.mark.parametrize(
    "code, told", [(2, "the last line"), (1, "code 1: the last line"), (-9, "--workers 1")]
)
def test_a_compilation_that_fails(
    code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        returncode, stdout, stderr = code, "", "Traceback\nthe last line"

    monkeypatch.setattr(compiled.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiled.metadata, "version", lambda name: "1")
    monkeypatch.setattr(compiled.subprocess, "run", lambda *words, **options: Done)
    request = Request("train", compiled.from_dict(_cell()), "v5e-8", (8, 1, 1), 128)
    with pytest.raises(UserError, match=told):
        compile_request(request, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("needed, efforts", [(14, ["fast"]), (15, ["fast", "full"]), (17, ["fast", "full"])])
def test_what_fills_a_device_is_compiled_with_full_effort(
    needed: int, efforts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Done:
        returncode, stderr = 0, ""

        def __init__(self, told: str) -> None:
            asked.append(json.loads(told)["effort"])
            more = len(asked) - 1  # what full effort finds
            self.stdout = json.dumps(asdict(Compiled(1, 0, 0, 0, (needed + more) * GIB, 16 * GIB, 1.0)))

    monkeypatch.setattr(compiled.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiled.metadata, "version", lambda name: "1")
    monkeypatch.setattr(compiled.subprocess, "run", lambda *words, **options: Done(options["input"]))
    request = Request("train", compiled.from_dict(_cell()), "v5e-8", (8, 1, 1), 128)
    found = compile_request(request, tmp_path, "fast")
    assert asked == efforts
    assert found.needed == (needed + len(efforts) - 1) * GIB
    assert compile_request(request, tmp_path, "fast") == found, "from the cache"
    assert asked == efforts
    compile_request(request, tmp_path)
    assert asked == ["fast", "full"], "fast answers are none with full effort"
    assert compiled.known(request, tmp_path, "fast") == compiled.known(request, tmp_path)


def test_decoding_with_split_weights_is_compiled_with_full_effort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    efforts: list[str] = []

    def answer(request: Request, cache: Path, effort: str) -> Compiled:
        efforts.append(effort)
        return Compiled(1, 0, 0, 0, GIB, 16 * GIB, 1.0)

    monkeypatch.setattr(compiled, "needs_libtpu", lambda: None)
    monkeypatch.setattr(compiled, "_compile", answer)
    monkeypatch.setattr(compiled.metadata, "version", lambda name: "1")
    cell = compiled.from_dict(_cell())
    for program, mesh in (("generate", (4, 2, 1)), ("generate", (8, 1, 1)), ("train", (4, 2, 1))):
        compile_request(Request(program, cell, "v5e-8", mesh, 128), tmp_path, "fast")
    assert efforts == ["full", "fast", "fast"]


def test_every_cell_of_a_sweep_has_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells of one shape ask the compiler for one program."""
    asked = []

    def answer(request: Request, cache: Path, effort: str) -> Compiled:
        assert effort == "full"
        asked.append((request.program, request.topology))
        return Compiled(0, 0, 0, 0, GIB, 16 * GIB, 1.0)

    monkeypatch.setattr(compiled.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiled.metadata, "version", lambda name: "1")
    monkeypatch.setattr(compiled, "compile_request", answer)
    sweep = tmp_path / "mine.py"
    sweep.write_text(
        "from dataclasses import replace\n"
        "from vlmscale.config import Sweep\n"
        "from vlmscale.loading import load_cell\n"
        "def get_sweep(overrides=()):\n"
        "    cell = load_cell('configs/scenes_tiny.py:toy-14k,4', overrides)\n"
        "    other = replace(cell, train=replace(cell.train, seed=1))\n"
        "    return Sweep('mine', [cell, other])\n"
    )
    words = ["plan", str(sweep), "--topology", "v5e-8", "--topology", "v6e-8", "--json"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["plans"]
    assert [row["topology"] for row in rows] == ["v5e-8", "v6e-8"] * 2
    # Cells that differ in their seeds share their programs.
    assert sorted(asked) == [(x, y) for x in ("generate", "tower", "train") for y in ("v5e-8", "v6e-8")]
    assert main(["plan", str(tmp_path / "none.py"), "--topology", "v5e-8"]) == 2
