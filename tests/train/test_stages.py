"""LLaVA's two stages through the shipped configs and real commands, on checkpoints that transformers made."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from tests.data.small_tokenizers import byte_level
from tests.evaluate.asked import answers, items_of
from tests.integration.tiny import lines, picture, read, saved_steps
from tests.pretrained import assert_same, by_path, make_decoder, one_device, randomise
from vlmscale.cli import main
from vlmscale.config import Cell
from vlmscale.data.prepare import write_dataset
from vlmscale.data.records import Record, Turn
from vlmscale.evaluate.loaded import answer_one, load_run
from vlmscale.models.sizes import SIZES, TOWERS, DecoderSize, TowerSize
from vlmscale.train.checkpoint import Checkpoints
from vlmscale.train.prepared import Prepared
from vlmscale.train.recipe import make_objective, stages, training_model
from vlmscale.train.run import load_prepared
from vlmscale.train.state import Places, lay_out, load_decoder
from vlmscale.train.step import normalise
from vlmscale.train.together import read_together
from vlmscale.weights.directory import load_directory

TOWER = TowerSize(*(24, 6, 32, 4, 4, 48, 3, (1, 2, 3)), style="clip", activation="quick_gelu", norm_eps=1e-3)
VOCAB = 440  # rows of the embeddings, more than there are tokens
_row = DecoderSize(32, 3, 4, 4, 40, rope_theta=500.0, norm_eps=1e-3, vocab_size=VOCAB)
# Rows of the size table for models of tests.pretrained.
DECODERS = {
    "qwen2-plain-tied": replace(_row, family="qwen2"),
    "llama-plain-untied": replace(_row, tied_embeddings=False),
}
QWEN, LLAMA = DECODERS
PRETRAIN, FINETUNE = "configs/llava_pretrain.py", "configs/llava_finetune.py"
BATCH, GROUP, STEPS = 16, 4, 4  # rows of a batch, and of a mean in the loss
RATE, TOWER_RATE = 2e-3, 0.5
RECORDS, HELD_OUT = 40, 6
# The softmax of a tower does not see it, so that its gradient is rounding and Adam makes steps of that.
NO_GRADIENT = "attention/k/bias"
TOY = ("data.template=toy", "data.tokenization=inline")
FREE = "train.init_from="  # no earlier stage
Params = dict[str, Any]
Train = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOWERS, "tiny-clip", TOWER)
        for name, size in DECODERS.items():
            patch.setitem(SIZES, name, size)
        # Programs here run for less time than it takes to make them fast.
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def record(number: int, caption: bool) -> tuple[Record, list[bytes]]:
    """A caption, or a conversation of one to three turns, every fifth without a picture."""
    words = [f"word {word}" for word in np.random.default_rng(number).integers(0, 90, 12)]
    answers = [" ".join(words[: 1 + (number + place) % 6]) for place in range(3)]
    if caption:
        return Record(f"r{number}", ("a.jpg",), (Turn("<image>\nDescribe it.", answers[0]),)), [photo(number)]
    shown = number % 5 > 0
    turns = [Turn(f"What is {words[place]}?", answers[place]) for place in range(1 + number % 3)]
    turns[0] = Turn("<image>\n" * shown + turns[0].question, turns[0].answer)
    return Record(f"r{number}", ("a.jpg",) * shown, tuple(turns)), [photo(number)] * shown


def photo(number: int) -> bytes:
    return picture("JPEG", seed=number, side=30)


def make_tower() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=TOWER.width,
        intermediate_size=TOWER.mlp_width,
        num_hidden_layers=TOWER.num_layers,
        num_attention_heads=TOWER.num_heads,
        image_size=TOWER.image_size,
        patch_size=TOWER.patch_size,
        layer_norm_eps=TOWER.norm_eps,
    )
    return randomise(transformers.CLIPVisionModel(config))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the configs want: LLMs with their tokenizers, a tower, and the data of both stages."""
    root = tmp_path_factory.mktemp("downloads")
    for name in DECODERS:
        make_decoder(name, vocab_size=VOCAB).save_pretrained(root / name)
        byte_level().save(str(root / name / "tokenizer.json"))
    make_tower().save_pretrained(root / "tiny-clip")
    for name, caption in (("captions", True), ("talks", False)):
        made = [record(number, caption) for number in range(RECORDS + HELD_OUT)]
        write_dataset(root / name, {"train": made[:RECORDS], "validation": made[RECORDS:]})
    return root


def command(downloads: Path, config: str, *more: str, llm: str = QWEN, model: str = "16,mlp") -> list[str]:
    """`vlmscale train` of a shipped config, with what is large made small."""
    given = [
        f"llm.checkpoint={downloads / llm}",
        f"data.tokenizer={downloads / llm}",
        f"data.prepared={downloads / ('captions' if config == PRETRAIN else 'talks')}",
        f"tower.checkpoint={downloads / 'tiny-clip'}",
        *("tower.name=tiny-clip", "data.max_text_tokens=256", "data.workers=0", "evaluate.max_new_tokens=6"),
        *(f"train.batch_size={BATCH}", f"train.steps={STEPS}", "train.warmup_steps=1"),
        *("train.checkpoint_every=1", f"train.keep={STEPS}", f"train.learning_rate={RATE}"),
        *(() if config == PRETRAIN else ("data.row_length=160", f"train.loss_rows={GROUP}")),
        *more,
    ]
    return ["train", "--config", f"{config}:{llm},{model}", *(f"--config.{word}" for word in given)]


@pytest.fixture(scope="module")
def train(downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs the command once for each set of words and gives the run's directory."""

    @functools.cache
    def run(config: str, *more: str, llm: str = QWEN) -> Path:
        out = tmp_path_factory.mktemp("stage") / "run"
        assert main([*command(downloads, config, *more, llm=llm), "--out", str(out)]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def first(train: Train) -> Path:
    """A run of stage 1."""
    return train(PRETRAIN)


@pytest.fixture(scope="module")
def second(train: Train, first: Path) -> Path:
    """A run of stage 2 behind it."""
    return train(FINETUNE, f"train.init_from={first}")


@pytest.fixture(scope="module")
def tower_stage(train: Train, first: Path) -> Path:
    """A run of stage 2 in which the tower trains too."""
    return train(FINETUNE, f"train.init_from={first}", f"train.tower_rate={TOWER_RATE}")


def opened(run: Path) -> tuple[Cell, Prepared, Places]:
    """A run's config, data, and where its parameters would live on one device."""
    cell, prepared = load_prepared(run)
    model = training_model(cell, prepared.vocab_rows(cell))
    return cell, prepared, lay_out(cell, model, one_device(), prepared.tower(cell), jnp.float32)


def saved(run: Path, step: int) -> Params:
    """What a checkpoint has of the parts that train."""
    wanted = {"params": opened(run)[2].trained}
    return Checkpoints(run / "checkpoints", read_only=True).restore(step, wanted)["params"]


def on_disk(run: Path, item: str) -> set[str]:
    """The parts that an item of the last checkpoint holds arrays of, as Orbax lists them."""
    listed = read(run / "checkpoints" / str(STEPS) / item / "_METADATA")["tree_metadata"]
    return {
        part for part in ("compressor", "decoder", "tower") if any(f"'{part}'" in name for name in listed)
    }


def test_stage_1_trains_the_compressor_alone(first: Path, downloads: Path) -> None:
    used = load_run(first).params
    _, theirs, _ = load_directory(downloads / QWEN, one_device())
    assert_same(used["decoder"], theirs)
    assert_same(used["compressor"], saved(first, STEPS)["compressor"])
    # The warm-up begins at a rate of 0: behind the first step the parameters are those of the start.
    before, after = (by_path(saved(first, step)) for step in (1, STEPS))
    assert all((before[path] != after[path]).any() for path in before)
    assert saved_steps(first) == [1, 2, 3, 4]
    assert on_disk(first, "params") == on_disk(first, "opt_state") == {"compressor"}
    step = first / "checkpoints" / str(STEPS)
    nbytes = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    assert nbytes < sum(leaf.nbytes for leaf in jax.tree.leaves(theirs))


def test_stage_2_goes_on_from_stage_1_and_from_the_checkpoint(
    first: Path, second: Path, downloads: Path
) -> None:
    before, after = saved(second, 1), saved(second, STEPS)
    assert_same(before["compressor"], saved(first, STEPS)["compressor"])
    _, theirs, _ = load_directory(downloads / QWEN, one_device(), layout="scan")
    assert_same(before["decoder"], theirs)
    moved = by_path(after)
    assert all((moved[path] != value).any() for path, value in by_path(before).items())
    assert on_disk(second, "params") == on_disk(second, "opt_state") == {"compressor", "decoder"}


@pytest.mark.parametrize("which, stage_steps", [("first", [STEPS]), ("second", [STEPS, STEPS])])
def test_runs_of_both_stages_are_evaluated_and_asked(
    which: str, stage_steps: list[int], tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    run = request.getfixturevalue(which)
    assert main(["evaluate", "--run", str(run)]) == 0
    found = lines(run / "result.jsonl")
    assert [row["stage_steps"] for row in found] == [stage_steps]
    assert found[0]["n_items"] >= HELD_OUT
    assert found[0]["n_total"] == SIZES[QWEN].num_params()
    logged = [line["heldout_loss"] for line in lines(run / "metrics.jsonl") if "heldout_loss" in line]
    assert found[0]["heldout_loss"] == logged[-1]
    (tmp_path / "photo.jpg").write_bytes(photo(0))
    capsys.readouterr()
    asked = ["--image", str(tmp_path / "photo.jpg"), "--prompt", "What is it?"]
    assert main(["generate", "--run", str(run), *asked, "--json"]) == 0
    assert 1 <= len(json.loads(capsys.readouterr().out)["token_ids"]) <= 6


def make_reference(name: str, compressor: Params, image: int) -> Any:
    """The same model in transformers: the checkpoints' weights, and this projector."""
    decoder, tower = make_decoder(name, vocab_size=VOCAB), make_tower()
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image,
        tie_word_embeddings=DECODERS[name].tied_embeddings,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    ours, theirs = by_path(compressor), model.model.multi_modal_projector
    with torch.no_grad():
        for layer, at in ((theirs.linear_1, "up"), (theirs.linear_2, "down")):
            layer.weight.copy_(torch.tensor(ours[f"{at}/kernel"].T))
            layer.bias.copy_(torch.tensor(ours[f"{at}/bias"]))
    return model.train()


def batches_of(cell: Cell, prepared: Prepared, count: int) -> list[dict[str, np.ndarray]]:
    """What the run read first."""
    reading = read_together(prepared, "train", [cell], training=True)
    with reading.training(cell.train.batch_size, 0, 0, (0, 1)) as stream:
        return [next(stream) for _ in range(count)]


def micro_batches(batch: dict[str, np.ndarray], image: int) -> Iterator[dict[str, torch.Tensor]]:
    """A batch as LLaVA's devices get it: `GROUP` rows each, with labels of the answers alone."""
    shown = batch["image_slots"].max(axis=1) > 0
    labels = np.full(batch["tokens"].shape, -100)
    row, number = np.nonzero(batch["target_mask"])
    labels[row, batch["target_positions"][row, number] + 1] = batch["target_ids"][row, number]
    pixels = np.asarray(normalise(batch["pixels"], TOWER)).transpose(0, 3, 1, 2)
    for start in range(0, BATCH, GROUP):
        part = slice(start, start + GROUP)
        given = {
            "input_ids": np.where(batch["image_slots"][part] > 0, image, batch["tokens"][part]),
            "attention_mask": batch["segment_ids"][part] > 0,
            "labels": labels[part],
        }
        if (given["labels"] == -100).all():  # rows that fill up the last batch of an epoch
            continue
        if shown[part].any():
            given["pixel_values"] = pixels[part][shown[part]]
        yield {name: torch.tensor(x if x.dtype == np.float32 else x.astype(int)) for name, x in given.items()}


def backward(model: Any, batch: dict[str, np.ndarray], image: int) -> float:
    """LLaVA's loss, the mean over devices of the mean over each one's tokens, and its gradient."""
    parts = list(micro_batches(batch, image))
    losses = [model(**part, use_cache=False).loss / len(parts) for part in parts]
    for loss in losses:
        loss.backward()
    return float(sum(loss.item() for loss in losses))


def as_ours(model: Any, out: Path, layout: str) -> dict[str, np.ndarray]:
    """Parameters of their model under our names."""
    model.save_pretrained(out)
    return by_path(load_directory(out, one_device(), layout=layout)[1])


@pytest.mark.parametrize("case", ["second", "tower_stage", "untied"])
def test_steps_are_those_of_transformers_and_torch(
    case: str, train: Train, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Losses of four steps of the command, and the parameters behind them."""
    name = LLAMA if case == "untied" else QWEN
    run = train(FINETUNE, FREE, llm=name) if case == "untied" else request.getfixturevalue(case)
    cell, prepared, _ = opened(run)
    image = prepared.template.image
    model = make_reference(name, saved(run, 1)["compressor"], image)
    tower = set(model.model.vision_tower.parameters())
    groups = [
        {"params": [p for p in model.parameters() if p not in tower], "lr": RATE},
        {"params": list(tower), "lr": RATE * cell.train.tower_rate},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(adam, 1, STEPS)
    start, losses = as_ours(model, tmp_path / "start", "loop"), []
    for batch in batches_of(cell, prepared, STEPS):
        losses.append(backward(model, batch, image))
        adam.step()
        schedule.step()
        adam.zero_grad()
    np.testing.assert_allclose([line["loss"] for line in lines(run / "metrics.jsonl")], losses, rtol=1e-5)
    assert max(losses[:2]) > losses[-1] + 0.1, "steps that change nothing would show little"
    used = load_run(run)
    ours, theirs = by_path(used.params | {"tower": used.tower}), as_ours(model, tmp_path / "end", "loop")
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        if path.endswith(NO_GRADIENT):
            continue
        moved, apart = np.linalg.norm(value - start[path]), np.linalg.norm(ours[path] - value)
        assert apart <= 1e-3 * moved, path
        assert moved > 0 or (not cell.train.tower_rate and path.startswith("tower/")), path


def test_a_tower_that_trains_has_torchs_gradient(tower_stage: Path, tmp_path: Path) -> None:
    cell, prepared, _ = opened(tower_stage)
    objective = make_objective(cell, training_model(cell, prepared.vocab_rows(cell)))
    [batch] = batches_of(cell, prepared, 1)
    params = saved(tower_stage, 1)
    weights = objective.weights(batch["target_mask"])
    ours = by_path(jax.jit(jax.grad(lambda params: objective(params, batch, weights)))(params))
    model = make_reference(QWEN, params["compressor"], prepared.template.image)
    backward(model, batch, prepared.template.image)
    for parameter in model.parameters():
        grad = parameter.grad
        parameter.data = torch.zeros_like(parameter) if grad is None else grad
    theirs = as_ours(model, tmp_path, "scan")
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        if path.endswith(NO_GRADIENT):
            assert np.abs([value, ours[path]]).max() < 1e-7, path
            continue
        assert np.linalg.norm(ours[path] - value) <= 1e-5 * np.linalg.norm(value), path


def test_a_trained_tower_is_the_one_that_answers(tower_stage: Path, tmp_path: Path) -> None:
    """With any other in its place something else is said."""
    run = load_run(tower_stage)
    assert_same(run.tower, saved(tower_stage, STEPS)["tower"])
    items = items_of(run.prepared.datasets["validation"], "gold")
    (tmp_path / "photo.jpg").write_bytes(photo(0))
    texts, replies = [], []
    for scale in (1.0, 0.0, -3.0, 10.0, -100.0):
        other = replace(run, tower=jax.tree.map(lambda leaf, scale=scale: leaf * scale, run.tower))
        said = answers(other, items, "validation", 16, tmp_path / str(scale))
        texts.append([one.text for one in said])
        asked = [item.question.question for item in items[:8]]
        replies.append([answer_one(other, tmp_path / "photo.jpg", what).token_ids for what in asked])
    assert any(said != texts[0] for said in texts)
    assert any(said != replies[0] for said in replies)


def nothing(*_: object) -> None:
    return None


def test_a_stage_behind_a_trained_tower_keeps_it(train: Train, tower_stage: Path) -> None:
    run = train(FINETUNE, f"train.init_from={tower_stage}")
    used, before = load_run(run), saved(tower_stage, STEPS)
    assert_same(used.tower, before["tower"])
    assert on_disk(run, "params") == {"compressor", "decoder"}
    cell, prepared, _ = opened(run)
    objective = make_objective(cell, training_model(cell, prepared.vocab_rows(cell)))
    [batch] = batches_of(cell, prepared, 1)
    weights = objective.weights(batch["target_mask"])
    loss = jax.jit(lambda params: objective(params, batch, weights))
    logged = lines(run / "metrics.jsonl")[0]["loss"]
    assert float(loss(before)) == pytest.approx(logged, rel=1e-5)
    other = float(loss(before | {"tower": prepared.tower(cell)}))
    assert other != pytest.approx(logged, rel=1e-4), "the tower that it was given would do as well"
    assert [stage.train.steps for stage in stages(cell)] == [STEPS] * 3


NO_RUN = "is no run that was trained to its end (no done.json)"


@pytest.mark.parametrize(
    "config, model, more, said",
    [
        (PRETRAIN, "16,mlp", ["train.compressor_rate=0"], "nothing trains: train.llm_rate is 0, and so are"),
        (FINETUNE, "16,mlp", ["train.tower_rate=1", "data.features=stored"], "set --config.data.features="),
        (PRETRAIN, "16,mlp", ["data.tokenizer="], "data.template=plain: needs --config.data.tokenizer=DIR"),
        (PRETRAIN, "16,mlp", ["data.tokenizer=", *TOY], "its embeddings are of its own tokens; set --config"),
        (PRETRAIN, "16,mlp", ["data.tokenizer=HERE/tiny-clip"], "tiny-clip: has no tokenizer.json"),
        (PRETRAIN, "16,mlp", ["llm.checkpoint=HERE/tiny-clip"], "holds a vision tower alone"),
        (PRETRAIN, "16,mlp", ["llm.checkpoint=HERE/none"], "none: No such file"),
        (PRETRAIN, "16,mlp", ["llm.checkpoint=CHANGED"], f"norm_eps is 0.01, but llm.name={QWEN} has 0.001"),
        (PRETRAIN, "16,mlp", [f"llm.checkpoint=HERE/{LLAMA}"], f"has qwen2; it fits llm.name={LLAMA}"),
        (FINETUNE, "16,mlp", ["train.init_from=UNFINISHED"], NO_RUN),
        (FINETUNE, "16,mlp", [], f"train.init_from=runs/pretrain-{QWEN}-16-mlp: {NO_RUN}"),
        (FINETUNE, "16,pool", ["train.init_from=FIRST"], "has compressor.name=mlp, this config pool"),
        (FINETUNE, "16,mlp", ["train.init_from=FIRST", "llm.checkpoint="], "began with llm.checkpoint="),
        (FINETUNE, "16,mlp", ["train.init_from=TOWER", "data.features=stored"], "trained its tower; set"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    config: str,
    model: str,
    more: list[str],
    said: str,
    downloads: Path,
    first: Path,
    tower_stage: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    changed = shutil.copytree(downloads / QWEN, tmp_path / "changed")
    described = read(changed / "config.json") | {"rms_norm_eps": 0.01}
    (changed / "config.json").write_text(json.dumps(described))
    unfinished = shutil.copytree(first, tmp_path / "unfinished")
    (unfinished / "done.json").unlink()
    places = {"HERE": downloads, "CHANGED": changed, "FIRST": first, "TOWER": tower_stage}
    words = more
    for name, place in (places | {"UNFINISHED": unfinished}).items():
        words = [word.replace(f"={name}", f"={place}") for word in words]
    capsys.readouterr()
    assert main([*command(downloads, config, *words, model=model), "--out", str(tmp_path / "run")]) == 2
    lines_of = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlmscale train: ")]
    assert len(lines_of) == 1
    assert said in lines_of[0]
    assert not (tmp_path / "run" / "done.json").exists()


def test_the_llm_may_be_that_of_a_llava(first: Path, downloads: Path, tmp_path: Path) -> None:
    make_reference(QWEN, saved(first, STEPS)["compressor"], 5).save_pretrained(tmp_path)
    cell, _, places = opened(first)
    cell.llm.checkpoint = str(tmp_path)
    ours, _ = load_decoder(cell, flatten_dict(places.frozen["decoder"], sep="/"))
    assert_same(ours, load_directory(downloads / QWEN, one_device(), layout="scan")[1])
