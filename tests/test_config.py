"""Loading, refusing, identifying and finding configs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmscale.compressors import COMPRESSORS
from vlmscale.config import TEMPLATES, Cell, cell_id, from_dict, leaves, parse_mixture, to_dict
from vlmscale.data import templates
from vlmscale.errors import UserError
from vlmscale.loading import find_config, load_cell, load_sweep
from vlmscale.validation import evaluable_counts, validate

TINY = "configs/scenes_tiny.py"
# Fields that a result does not depend on; everything else is part of a cell's identity.
BYSTANDERS = {
    "data.images",
    "data.workers",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "train.accumulate",
    "train.attention",
    "train.batch_cells",
    "train.log_every",
    "train.loss_chunk",
    "train.heldout_every",
    "train.checkpoint_every",
    "train.keep",
    "train.profile",
    "train.remat",
    "evaluate.batch_size",
    "evaluate.blind",
    "evaluate.data",
    "evaluate.tasks",
    "evaluate.visual_tokens",
}
# Of fields that are read in order to tell what is the same.
OTHERS = {
    "compressor.name": "tokenpacker",
    "compressor.options": "placement=after",
    "evaluate.visual_tokens": (1, 4),
    "train.profile": (3, 5),
    "reducer.name": "fastv",
    "reducer.schedule": (1.0, 0.5),
}


def changed(key: str, value: Any) -> Cell:
    cell = Cell()
    part, name = key.split(".")
    setattr(getattr(cell, part), name, value)
    return cell


def other(key: str, value: Any) -> Any:
    if key in OTHERS:
        return OTHERS[key]
    return value + "-other" if isinstance(value, str) else value + 1


def test_a_config_takes_an_argument_and_overrides() -> None:
    words = ["--config.train.steps=77", "--config.train.learning_rate=0.5", "--config.data.seed=3"]
    cell = load_cell(f"{TINY}:toy-40k,4", words)
    assert (cell.llm.name, cell.compressor.visual_tokens) == ("toy-40k", 4)
    assert (cell.train.steps, cell.train.learning_rate, cell.data.seed) == (77, 0.5, 3)
    plain = load_cell(TINY, [])
    assert plain.train.steps == Cell().train.steps
    assert load_cell("configs/llava_tiny.py", ["--config.data.records=x.json"]).data.source == "llava"


@pytest.mark.parametrize(
    "word, said",
    [
        ("--config.train.step=3", "unknown config key train.step; the nearest is train.steps"),
        ("--config.trian.steps=3", "nearest is train.steps"),
        ("--config.compressor.tokens=3", "nearest is compressor"),
        ("--config.train=3", "unknown config key train;"),
        ("--config.train.steps", "an override reads --config.KEY=VALUE"),
        ("--train.steps=3", "an override reads --config.KEY=VALUE"),
    ],
)
def test_unknown_keys_name_the_nearest(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_cell(TINY, [word])


@pytest.mark.parametrize(
    "word", ["train.steps=many", "train.steps=1.5", "train.learning_rate=fast", "data.seed="]
)
def test_wrong_types_are_refused_on_one_line(word: str) -> None:
    with pytest.raises(UserError) as error:
        load_cell(TINY, [f"--config.{word}"])
    assert "\n" not in str(error.value)
    assert word.split("=")[0].split(".")[-1] in str(error.value)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("compressor.visual_tokens", 24, "pool on 8x8 patches gives 1, 4, 9, 16, 25, 36, 49, 64"),
        ("compressor.visual_tokens", -1, "gives 1, 4, 9, 16"),
        ("compressor.name", "pol", "nearest is pool .known: mlp, pool, m3, tokenpacker"),
        ("llm.name", "toy-135", "nearest is toy-135k"),
        ("tower.name", "scenes", "nearest is scenes-48"),
        ("data.source", "lava", "nearest is llava"),
        ("data.image_mode", "padding", "nearest is pad"),
        ("evaluate.history", "silver", "nearest is"),
        ("data.source", "llava", "data.source=llava needs --config.data.prepared=DIR"),
        ("data.records", "x.json", "only with --config.data.source=llava"),
        ("data.images", "pictures", "only with --config.data.source=llava"),
        ("data.vocab_size", 299, "at least 300"),
        ("train.batch_size", 0, "must be above 0"),
        ("train.learning_rate", -0.1, "must be above 0"),
        ("train.learning_rate", float("nan"), "must be above 0"),
        ("train.weight_decay", -1.0, "must not be negative"),
        ("train.warmup_steps", 2500, "below train.steps=2500"),
        ("train.warmup_steps", -1, "train.warmup_steps=-1"),
    ],
)
def test_impossible_cells_are_refused(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        validate(changed(key, value))
    assert "\n" not in str(error.value)


def test_a_blind_cell_is_possible() -> None:
    validate(changed("compressor.visual_tokens", 0))
    validate(Cell())


def test_the_id_changes_with_what_changes_the_result_and_with_nothing_else(
    tmp_path: Path,
) -> None:
    seen = {cell_id(Cell())}
    for key, value, metadata in leaves(Cell()):
        if metadata.keys() & {"content", "mixture", "run"}:
            continue
        identity = cell_id(changed(key, other(key, value)))
        if key in BYSTANDERS:
            assert identity == cell_id(Cell()), key
        else:
            assert identity not in seen, key
            seen.add(identity)
    assert {key for key, _, metadata in leaves(Cell()) if metadata.get("content")} == {
        "tower.checkpoint",
        "data.records",
        "data.tokenizer",
        "llm.checkpoint",
    }
    assert all(len(identity) == 12 and int(identity, 16) >= 0 for identity in seen)


@pytest.mark.parametrize("key", ["data.records", "tower.checkpoint"])
def test_files_count_by_content(key: str, tmp_path: Path) -> None:
    first, moved = tmp_path / "first.json", tmp_path / "elsewhere" / "second.json"
    first.write_text("[1]")
    identity = cell_id(changed(key, str(first)))
    assert identity != cell_id(Cell())
    moved.parent.mkdir()
    shutil.move(first, moved)
    assert cell_id(changed(key, str(moved))) == identity
    with pytest.raises(UserError, match=f"{key}=.*first.json: No such file"):
        cell_id(changed(key, str(first)))
    moved.write_text("[2]")
    assert cell_id(changed(key, str(moved))) != identity


def test_an_earlier_stage_counts_by_its_cell_trained_or_not(tmp_path: Path) -> None:
    for name, own in (("a", "1"), ("b", "2"), ("moved", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(json.dumps({"cell_id": own}))
    ids = {name: cell_id(changed("train.init_from", str(tmp_path / name))) for name in ("a", "b", "moved")}
    assert ids["a"] == ids["moved"] != ids["b"]
    assert cell_id(Cell()) not in ids.values()
    with pytest.raises(
        UserError, match=r"train\.init_from=.*nowhere: is no run \(no spec\.json\); train it first"
    ):
        cell_id(changed("train.init_from", str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("train.llm_rate", -0.5, "must not be negative"),
        ("train.seed", 2**32, r"must be below 2\*\*32"),
        ("train.order_seed", -2, "a seed, or -1"),
        ("train.beta2", 1.0, "a share from 0 to 1"),
        ("train.final_rate", 1.5, "a share from 0 to 1"),
        ("train.accumulate", 3, "must divide the 8 blocks"),
        ("train.loss_rows", 3, "must divide train.batch_size=8"),
        ("train.profile", (5, 3), "first and last step"),
        ("train.dtype", "float16", "unknown; the nearest is"),
        ("train.nonfinite", "go", "unknown; the nearest is"),
        ("train.remat", "all", "unknown; the nearest is"),
        ("train.attention", "flash", "unknown; the nearest is"),
        ("train.tower_rate", 0.1, r"set --config\.data\.features=computed"),
        ("llm.checkpoint", "somewhere", r"set --config\.data\.tokenizer=somewhere"),
    ],
)
def test_impossible_recipes_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        validate(changed(key, value))
    assert str(error.value).startswith(key)
    assert "\n" not in str(error.value)


def test_prepared_data_counts_by_its_manifest_and_weight(tmp_path: Path) -> None:
    for name, digest in (("a", "1"), ("b", "2"), ("moved", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"sha256": digest}))
    a, b, moved = (f"{tmp_path}/{name}" for name in ("a", "b", "moved"))
    values = [a, b, f"{a},{b}", f"{b},{a}", f"{a},{b}=0.5", f"{a}=2"]
    ids = [cell_id(changed("data.prepared", value)) for value in values]
    assert len({cell_id(Cell()), *ids}) == len(ids) + 1
    assert cell_id(changed("data.prepared", moved)) == cell_id(changed("data.prepared", f"{a}=1.0")) == ids[0]
    with pytest.raises(UserError, match=r"data\.prepared=.*nowhere: is no finished data set"):
        cell_id(changed("data.prepared", f"{tmp_path}/nowhere"))


def test_a_mixture_says_how_often_each_part_is_shown() -> None:
    assert parse_mixture("") == []
    assert parse_mixture("data/a, data/b=0.5") == [("data/a", 1.0), ("data/b", 0.5)]
    for word in ("a,", "a=0", "a=-1", "a=x", "=2", "a=inf", "a=nan"):
        with pytest.raises(UserError, match=r"data\.prepared: .*write DIR, or DIR=WEIGHT"):
            parse_mixture(word)


def test_a_data_set_twice_in_a_mixture_is_a_weight() -> None:
    with pytest.raises(UserError, match="a is named twice; write a=2"):
        parse_mixture("a,b,./a=0.5")


def test_templates_are_those_that_encode() -> None:
    assert TEMPLATES == templates.TEMPLATES


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"prepared": "d"}, "data.prepared are read only with --config.data.source=llava"),
        ({"source": "llava", "prepared": "d", "images": "i"}, "leave data.records and data.images away"),
        ({"template": "vicuna"}, "data.template=vicuna: unknown; the nearest is"),
        ({"template": "v1"}, "data.template=v1: needs --config.data.tokenizer=DIR"),
        ({"tokenizer": "d"}, "data.template=toy is for tokenizers trained here"),
        ({"tokenization": "llava"}, "data.template=toy is for tokenizers trained here"),
        ({"packing": "pack"}, "data.packing=pack needs --config.data.row_length"),
        ({"packing": "tight"}, "data.packing=tight: unknown"),
        ({"pack_rows": 2}, "goes with data.packing=pack"),
        ({"packing": "pack", "row_length": 64, "pack_rows": 3}, "must divide train.batch_size=8"),
        ({"packing": "pack", "row_length": 64, "pack_rows": 0}, "must divide train.batch_size=8"),
        ({"row_length": -1}, "data.row_length=-1: must not be negative"),
        ({"workers": -1}, "data.workers=-1: must not be negative"),
        ({"features": "none"}, "data.features=none: unknown"),
        ({"feature_dtype": "float16"}, "data.feature_dtype=float16: unknown"),
        ({"feature_dtype": "bfloat16", "features": "computed"}, "is of stored outputs"),
        ({"template": "v1", "tokenizer": "d", "vocab_size": 999}, "data.vocab_size=999: is that of data.tok"),
    ],
)
def test_data_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    cell = Cell()
    for name, value in changes.items():
        setattr(cell.data, name, value)
    with pytest.raises(UserError, match=said) as error:
        validate(cell)
    assert "\n" not in str(error.value)


def test_blind_cells_are_the_same_whatever_the_compressor() -> None:
    pool, packer = changed("compressor.visual_tokens", 0), changed("compressor.visual_tokens", 0)
    packer.compressor.name = "tokenpacker"
    assert cell_id(pool) == cell_id(packer)
    assert cell_id(changed("compressor.name", "tokenpacker")) != cell_id(Cell())


def test_ids_of_cells_are_those_of_earlier_versions() -> None:
    """Fields that were added later must not change them: finished sweeps would be trained again."""
    assert cell_id(load_cell(f"{TINY}:toy-14k,0", [])) == "5e53071ce3af"
    assert cell_id(load_cell(f"{TINY}:toy-14k,1", [])) == "8adf158a9ce0"


def test_options_count_by_what_they_say() -> None:
    def of(name: str, options: str) -> str:
        cell = changed("compressor.name", name)
        cell.compressor.options = options
        return cell_id(cell)

    assert of("pool", "placement=before") == cell_id(Cell()) != of("pool", "placement=after")
    assert of("prumerge", "count=adaptive,score=mean") == of("prumerge", " score=mean, count=adaptive,")
    assert of("prumerge", "count=adaptive,score=mean") != of("prumerge", "score=mean")


@pytest.mark.parametrize(
    "words, said",
    [
        ("options=placement=afer", "placement=afer: pool knows placement=before or after"),
        ("options=place=after", "pool has no option 'place'; the nearest is placement .known: placement"),
        ("options=placement", "placement=: pool knows"),
        ("options=placement=after,placement=after", "placement is given twice"),
        ("name=quecc options=placement=after", "quecc has no option 'placement'; that belongs to pool"),
        (
            "name=fastervlm options=score=class",
            "reads a class token, which this tower lacks; take score=mean",
        ),
        ("name=tokenpacker visual_tokens=9", "tokenpacker on 8x8 patches gives 1, 4, 16, 64"),
        ("name=m3 visual_tokens=-1", "m3 on 8x8 patches gives 1, 4, 9"),
        ("name=mqt visual_tokens=-4", "mqt on 8x8 patches gives 1, 4, 9"),
        ("name=vistog visual_tokens=65", "vistog on 8x8 patches gives 1 to 64"),
    ],
)
def test_impossible_compressors_are_refused(words: str, said: str) -> None:
    overrides = [f"--config.compressor.{word}" for word in words.split()]
    with pytest.raises(UserError, match=said) as error:
        load_cell(f"{TINY}:toy-14k,16", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, asked, said",
    [
        ("pool", "(1,4)", "one pool model gives one count, here 16; many are given by m3, mqt"),
        ("m3", "(1,9)", "9: this m3 gives 1, 4, 16"),
        ("mqt", "(1,17)", "17: this mqt gives 1 to 16"),
        ("mqt", "(0,)", "0: this mqt gives 1 to 16"),
        ("mqt", "(4,4)", "names a count twice"),
    ],
)
def test_counts_that_a_model_does_not_give_are_not_evaluated(name: str, asked: str, said: str) -> None:
    words = [f"--config.compressor.name={name}", f"--config.evaluate.visual_tokens={asked}"]
    with pytest.raises(UserError, match=said):
        load_cell(f"{TINY}:toy-14k,16", words)


def test_counts_of_one_model_are_asked_for_by_a_list() -> None:
    words = ["--config.compressor.name=mqt", "--config.evaluate.visual_tokens=(1,4,16)"]
    cell = load_cell(f"{TINY}:toy-14k,16", words)
    assert cell.evaluate.visual_tokens == (1, 4, 16)
    assert evaluable_counts(cell) == list(range(1, 17))
    blind = changed("compressor.visual_tokens", 0)
    blind.evaluate.visual_tokens = (1,)
    with pytest.raises(UserError, match="a blind model has no visual tokens"):
        validate(blind)


def test_the_comparison_has_every_method_and_option() -> None:
    sweep = load_sweep("configs/sweeps/compressor_comparison.py", ["--config.train.steps=60"])
    found = {cell.compressor.name for cell in sweep.cells}
    assert found == set(COMPRESSORS)
    assert {cell.llm.name for cell in sweep.cells} == {"toy-135k"}
    for name, method in COMPRESSORS.items():
        cells = [cell for cell in sweep.cells if cell.compressor.name == name and not cell.compressor.options]
        counts = {
            count
            for cell in cells
            for count in cell.evaluate.visual_tokens or (cell.compressor.visual_tokens,)
        }
        assert counts >= {1, 4, 16} & set(method.counts(8)), name
    assert sum(not cell.compressor.visual_tokens for cell in sweep.cells) == 1


def test_dicts_go_there_and_back_through_json() -> None:
    for key, value, _ in leaves(Cell()):
        cell = changed(key, other(key, value))
        back = from_dict(json.loads(json.dumps(to_dict(cell))))
        assert back == cell
        assert back != Cell()
        assert dataclasses.is_dataclass(back.train)


def test_shipped_configs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (TINY, "scenes_tiny.py", "configs/sweeps/demo.py"):
        assert find_config(name).is_file()
    with pytest.raises(UserError, match=r"config configs/nothing\.py: no such file"):
        find_config("configs/nothing.py")
    # A file of one's own of that name comes first.
    mine = tmp_path / TINY
    mine.parent.mkdir()
    mine.write_text("from vlmscale.config import Cell\ndef get_config(arg=''):\n    return Cell()\n")
    assert find_config(TINY).resolve() == mine
    assert load_cell(TINY, []) == Cell()


@pytest.mark.parametrize(
    "text, said",
    [
        ("def get_config(arg=''):\n    return 3\n", "must return a vlmscale.config.Cell, not int"),
        ("def get_config(arg=''):\n    return Cell()\n", "NameError|'Cell' is not defined"),
        ("import nothing_of_that_name\n", "nothing_of_that_name"),
        ("def get_config(:\n", "SyntaxError"),
        ("x = 1\n", "get_config"),
    ],
)
def test_faulty_config_files_are_a_users_error(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ml_collections keeps what an earlier config of the same process defined.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    path = tmp_path / "faulty.py"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_cell(str(path), [])


def test_the_demo_sweep_has_twenty_cells_and_takes_overrides() -> None:
    sweep = load_sweep("configs/sweeps/demo.py", ["--config.train.steps=60"])
    assert sweep.name == "demo"
    assert len({cell_id(cell) for cell in sweep.cells}) == 20
    assert {cell.train.steps for cell in sweep.cells} == {60}
    assert {cell.compressor.visual_tokens for cell in sweep.cells} == {0, 1, 4, 16, 64}


@pytest.mark.parametrize(
    "cells, said", [("[]", "has 0 cells"), ("[Cell(), Cell()]", "2 cells, 1 of them distinct")]
)
def test_sweeps_without_or_with_repeated_cells_are_refused(cells: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.py"
    path.write_text(
        "from vlmscale.config import Cell, Sweep\n"
        f"def get_sweep(overrides=()):\n    return Sweep('x', {cells})\n"
    )
    with pytest.raises(UserError, match=said):
        load_sweep(str(path), [])
    for text, fault in (
        ("x = 1\n", "defines get_sweep"),
        ("1 / 0\n", "sweep.py: ZeroDivisionError: division"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=fault):
            load_sweep(str(path), [])


def test_a_tokenizer_counts_by_all_its_files(tmp_path: Path) -> None:
    ids = []
    for name, files in (("a", {}), ("b", {"added_tokens.json": "{}"}), ("moved", {})):
        (tmp_path / name).mkdir()
        for file, text in ({"tokenizer.json": "{}", "README.md": name} | files).items():
            (tmp_path / name / file).write_text(text)
        ids.append(cell_id(changed("data.tokenizer", str(tmp_path / name))))
    assert ids[0] == ids[2] != ids[1]
    with pytest.raises(UserError, match=r"data\.tokenizer=.*none: has no tokenizer\.json"):
        cell_id(changed("data.tokenizer", str(tmp_path / "none")))
