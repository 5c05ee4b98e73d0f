"""The shipped recipes as they resolve, the paper's grid, and the commands of docs/reproduce.md."""

from __future__ import annotations

import io
import json
import math
import re
import runpy
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from launch.state import open_sweep
from tests.data.llava_files import encoded, shown, write_files, write_records
from tests.data.small_tokenizers import byte_level
from vlmscale.cli import _parser, main
from vlmscale.config import Cell, cell_id, leaves
from vlmscale.data.packing import Shape
from vlmscale.data.schedule import Schedule
from vlmscale.errors import UserError
from vlmscale.loading import load_cell, load_sweep
from vlmscale.train.recipe import make_schedule
from vlmscale.train.run import open_run

DOCS = Path(__file__).resolve().parent.parent / "docs"
PRETRAIN, FINETUNE = "configs/llava_pretrain.py", "configs/llava_finetune.py"
GRID = "configs/sweeps/paper_grid.py"
CELL = "qwen1.5-0.5b,16,pool"
COMMON = """
tower.name=clip-vit-large-patch14-336
tower.checkpoint=clip-vit-large-patch14-336
data.source=llava
data.tokenization=llava
data.max_text_tokens=2048
data.features=computed
data.workers=8
train.weight_decay=0.0
train.clip_norm=0.0
train.final_rate=0.0
train.beta2=0.999
train.checkpoint_every=500
evaluate.max_new_tokens=64
evaluate.batch_size=32
evaluate.history=gold
"""
# What is not the default: LLaVA v1.5's own model in stage 1, and a cell of the grid in stage 2.
GOLDEN = {
    PRETRAIN: """
compressor.name=mlp
compressor.visual_tokens=576
llm.name=vicuna-7b-v1.5
llm.checkpoint=vicuna-7b-v1.5
data.prepared=data/llava_pretrain
data.tokenizer=vicuna-7b-v1.5
data.template=plain
data.image_mode=crop
train.steps=2173
train.batch_size=256
train.learning_rate=0.001
train.warmup_steps=66
train.llm_rate=0.0
""",
    f"{FINETUNE}:{CELL}": """
llm.name=qwen1.5-0.5b
llm.checkpoint=qwen1.5-0.5b
data.prepared=data/llava_instruct
data.tokenizer=qwen1.5-0.5b
data.template=chatml
data.image_mode=pad
data.row_length=2048
data.packing=modality_length
train.steps=5183
train.batch_size=128
train.learning_rate=2e-05
train.warmup_steps=156
train.init_from=runs/pretrain-qwen1.5-0.5b-16-pool
""",
}


def changed(cell: Cell) -> set[str]:
    default = {name: value for name, value, _ in leaves(Cell())}
    return {f"{name}={value}" for name, value, _ in leaves(cell) if value != default[name]}


@pytest.mark.parametrize("spec", GOLDEN)
def test_a_recipe_resolves_to_these_numbers(spec: str) -> None:
    assert changed(load_cell(spec, [])) == set((COMMON + GOLDEN[spec]).split())


@pytest.mark.parametrize(
    "config, records, whole, batch", [(PRETRAIN, 558_128, 2_181, 256), (FINETUNE, 665_298, 5_198, 128)]
)
def test_steps_are_one_epoch_without_what_is_held_out(
    config: str, records: int, whole: int, batch: int
) -> None:
    """LLaVA's own numbers of steps are those of all records."""
    cell = load_cell(config, [])
    assert math.ceil(records / batch) == whole
    assert cell.train.steps == math.ceil((records - 2_000) / batch)
    assert cell.train.warmup_steps == math.ceil(0.03 * cell.train.steps)
    numbers = np.arange(records - 2_000)
    lengths = (numbers, numbers, numbers)
    schedule = Schedule(cell.data.packing, Shape(1, 8, 1), *lengths, (numbers,), (1.0,), batch, 0)
    assert math.ceil(schedule.rows(0) / batch) == cell.train.steps


@pytest.mark.parametrize("config", [PRETRAIN, FINETUNE])
def test_the_learning_rate_is_that_of_transformers_trainer(config: str) -> None:
    train = load_cell(config, []).train
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    theirs = transformers.get_cosine_schedule_with_warmup(adam, train.warmup_steps, train.steps).lr_lambdas[0]
    ours = make_schedule(train)
    for step in (0, 1, train.warmup_steps - 1, train.warmup_steps, train.steps // 2, train.steps - 1):
        assert float(ours(step)) == pytest.approx(theirs(step), abs=1e-6)
    assert float(ours(train.steps - 1)) < 1e-5


def test_choices_that_the_pages_offer_are_valid() -> None:
    for config, rows in ((PRETRAIN, 32), (FINETUNE, 16)):
        words = [f"--config.train.loss_rows={rows}", "--config.train.accumulate=4"]
        assert load_cell(config, words).train.loss_rows == rows
    assert load_cell(f"{FINETUNE}:{CELL}", ["--config.train.profile=(100,105)"]).train.profile == (100, 105)
    tower = ["--config.train.tower_rate=0.1"]
    assert load_cell(f"{FINETUNE}:{CELL}", tower).train.tower_rate == 0.1


def test_templates_follow_llm_and_method() -> None:
    found = {
        spec: load_cell(spec, []).data.template
        for spec in (
            *(f"{FINETUNE}:vicuna-13b-v1.5,576,mlp", f"{FINETUNE}:smollm2-135m,4,pool"),
            *(f"{PRETRAIN}:qwen1.5-7b,16,tokenpacker", f"{PRETRAIN}:vicuna-7b-v1.5,16,quecc"),
        )
    }
    assert list(found.values()) == ["v1", "chatml", "plain", "v1"]


@pytest.mark.parametrize("config", [PRETRAIN, FINETUNE])
@pytest.mark.parametrize(
    "arg, said",
    [
        ("qwen1.5-0.5b", "the argument is LLM,VISUAL_TOKENS,COMPRESSOR such as"),
        ("qwen1.5-0.5b,many,pool", "the argument is LLM,VISUAL_TOKENS,COMPRESSOR such as"),
        ("qwen1.5-0.5b,16,", "the argument is LLM,VISUAL_TOKENS,COMPRESSOR such as"),
        ("qwen1.5-0.6b,16,pool", "llm.name=qwen1.5-0.6b: unknown; the nearest is qwen1.5-0.5b"),
        ("qwen1.5-0.5b,7,pool", "compressor.visual_tokens=7: pool on 24x24 patches gives"),
        ("qwen1.5-0.5b,16,pools", "compressor.name=pools: unknown; the nearest is pool"),
    ],
)
def test_an_argument_that_is_wrong_is_one_line(config: str, arg: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_cell(f"{config}:{arg}", [])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the names that a cell id reads: contents do not matter to it."""
    monkeypatch.chdir(tmp_path)
    for name in ("0.5b", "1.8b", "4b", "7b", "14b"):
        write_files(tmp_path / f"qwen1.5-{name}", dict.fromkeys(("config.json", "tokenizer.json"), b"{}"))
    write_files(tmp_path / "clip-vit-large-patch14-336", {"config.json": b"{}"})
    for name in ("llava_pretrain", "llava_instruct"):
        write_files(tmp_path / "data" / name, {"manifest.json": json.dumps({"sha256": name}).encode()})
    return tmp_path


def test_the_grid_is_the_papers_and_a_larger_llm(here: Path) -> None:
    sweep = load_sweep(GRID, [])
    cells = {(cell.llm.name, cell.compressor.visual_tokens) for cell in sweep.cells}
    sizes = tuple(f"qwen1.5-{size}" for size in ("0.5b", "1.8b", "4b", "7b", "14b"))
    assert cells == {(llm, count) for llm in sizes for count in (1, 4, 16, 36, 64, 144, 576)}
    assert sweep.name == "paper_grid_pretrain"
    assert {cell.llm.checkpoint for cell in sweep.cells} == set(sizes)
    shared = {json.dumps([cell.data.__dict__, cell.tower.__dict__]) for cell in sweep.cells}
    assert len(shared) == 1, "a sweep's cells share data and tower"
    assert {cell.train.llm_rate for cell in sweep.cells} == {0.0}


def test_a_part_of_the_grid_is_chosen_by_keys(here: Path) -> None:
    words = ["llm.name=qwen1.5-1.8b,qwen1.5-7b", "compressor.visual_tokens=16,576", "compressor.name=pool"]
    cells = load_sweep(GRID, [f"--config.{word}" for word in [*words, "train.seed=3"]]).cells
    assert [(cell.llm.name, cell.compressor.visual_tokens) for cell in cells] == [
        *(("qwen1.5-1.8b", 16), ("qwen1.5-1.8b", 576), ("qwen1.5-7b", 16), ("qwen1.5-7b", 576))
    ]
    assert {(cell.compressor.name, cell.train.seed, cell.data.tokenizer) for cell in cells} == {
        ("pool", 3, "qwen1.5-1.8b")
    }


def finished_stage_1(out: Path, *overrides: str) -> None:
    """The directory of a sweep of stage 1, as far as the next stage looks at it."""
    for cell in open_sweep(load_sweep(GRID, overrides), out):
        open_run(cell.cell, cell.path, out / "data", "paper_grid_pretrain")
        (cell.path / "done.json").write_text(json.dumps({"params_sha256": cell.id}))


def test_stage_2_of_the_grid_goes_on_from_the_cell_alike(here: Path) -> None:
    part = ["--config.llm.name=qwen1.5-0.5b,qwen1.5-4b", "--config.compressor.visual_tokens=1,64"]
    finished_stage_1(here / "first", *part)
    cells = load_sweep(GRID, [f"--config.train.init_from={here / 'first'}", *part]).cells
    assert len({cell_id(cell) for cell in cells}) == 4
    for cell in cells:
        earlier = json.loads((Path(cell.train.init_from) / "spec.json").read_text())["config"]
        assert earlier["llm"]["name"] == cell.llm.name
        assert earlier["compressor"]["visual_tokens"] == cell.compressor.visual_tokens
        assert (earlier["train"]["llm_rate"], cell.train.llm_rate) == (0.0, 1.0)
        assert cell.data.prepared == "data/llava_instruct"


def test_stage_2_without_its_stage_1_is_one_line(here: Path, capsys: Any) -> None:
    one = ["--config.llm.name=qwen1.5-0.5b", "--config.compressor.visual_tokens=16"]
    finished_stage_1(here / "first", *one)
    behind = "--config.train.init_from=first"
    for words, said in (
        ([behind, "--config.llm.name=qwen1.5-4b"], "first: has no cell of qwen1.5-4b, tokenpacker, 1 visual"),
        (
            [behind, *one, "--config.train.seed=1"],
            "has no cell of qwen1.5-0.5b, tokenpacker, 16 visual tokens",
        ),
        ([behind, *one, "--config.compressor.name=pool"], "has no cell of qwen1.5-0.5b, pool, 16 visual"),
        (["--config.train.init_from=second", *one], "second/sweep.json: not found"),
    ):
        with pytest.raises(UserError) as error:
            load_sweep(GRID, words)
        assert said in str(error.value)
    next((here / "first").glob("cells/*/done.json")).unlink()
    assert load_sweep(GRID, [behind, *one]).cells  # on Slurm it may be queued behind; elsewhere:
    assert main(["sweep", "run", GRID, "--out", str(here / "out"), behind, *one]) == 2
    assert "is no run that was trained to its end (no done.json)" in capsys.readouterr().err


def commands(text: str) -> list[list[str]]:
    """The words of the `vlmscale` commands of a text; a variable of the shell is 1, or the example cell."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        for part in re.findall(r"(?<![\w/.-])vlmscale [a-z][^&|;#`]*", line):
            part = re.sub(r"\$\w+", "1", part.replace("$cell", CELL))
            if part.count('"') % 2:  # the end of a string that the command stands in
                part = part.replace('"', "")
            found.append([word for word in shlex.split(part)[1:] if word != "do"])
    return found


def blocks(text: str) -> str:
    """The shell of a page."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))


def indented(path: str) -> str:
    """The shell of a config's docstring."""
    text = runpy.run_path(path)["__doc__"]
    return "\n".join(line for line in text.splitlines() if line.startswith("    ") or line.endswith("\\"))


ROOT = DOCS.parent
SHELL = [blocks((DOCS / "reproduce.md").read_text())] + [
    indented(str(ROOT / path)) for path in (PRETRAIN, FINETUNE, GRID)
]


@pytest.mark.parametrize("words", [words for text in SHELL for words in commands(text)], ids=" ".join)
def test_commands_of_the_pages_are_understood(words: list[str], here: Path) -> None:
    overrides = [word for word in words if word.startswith("--config.")]
    if words[0] == "analyze":
        from analysis.__main__ import main as analyze

        with pytest.raises(SystemExit) as ended:  # of its parser: all options are known
            analyze([*words[1:], "--help"])
        assert ended.value.code == 0
        return
    arguments = _parser().parse_args([word for word in words if word not in overrides])
    assert not overrides or arguments.takes_config
    if words[0] == "train":
        load_cell(arguments.config, overrides)
    if words[:2] == ["sweep", "run"]:
        earlier = [word for word in overrides if "init_from" in word]
        rest = [word for word in overrides if word not in earlier]
        for word in earlier:
            finished_stage_1(here / word.partition("=")[2], *rest)
        load_sweep(arguments.sweep, overrides)


def test_there_are_commands_to_look_at() -> None:
    found = [words for text in SHELL for words in commands(text)]
    assert {words[0] for words in found} == {"data", "train", "evaluate", "generate", "sweep", "analyze"}
    assert len(found) > 20


def test_the_packed_rows_of_the_page_are_worked_out_from_a_prepared_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's Python as it stands, on a set that the page's command prepared."""
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "reproduce.md").read_text(), re.S)
    write_files(tmp_path / "images", {"a.jpg": encoded("JPEG")})
    records = [shown(f"{number}", "a.jpg", text=f"What? {number}") for number in range(200)]
    write_records(tmp_path / "mix.json", records)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    prepare = [
        "data",
        "prepare",
        "--records",
        "mix.json",
        "--images",
        "images",
        "--out",
        "data/llava_instruct",
    ]
    tokens = ["--tokenizer", ".", "--template", "chatml", "--tokenization", "llava"]
    assert main([*prepare, "--validation", "2", "--workers", "1", *tokens]) == 0
    with redirect_stdout(io.StringIO()) as out:
        exec(block, {})
    found = [dict(re.findall(r"([\w.]+)=(\d+)", line)) for line in out.getvalue().splitlines()]
    assert [int(line["V"]) for line in found] == [1, 4, 16, 36, 64, 144, 576]
    measured: Any = json.loads((tmp_path / "data/llava_instruct/manifest.json").read_text())
    mean = measured["tokens"]["train"]["text"]["mean"]
    for line in found:
        rows = 198 * (mean + 0.94 * int(line["V"])) / (2048 * 0.98)
        batch = int(line["train.batch_size"])
        assert batch == 16 or (batch % 16 == 0 and abs(batch - 128 * rows / 198) <= 8)
        assert int(line["train.steps"]) == math.ceil(rows / batch)
    assert batch == 32, "rows of 576 tokens each and little text"
