"""lmms-eval asks our models through its own plug-in mechanism: the same answers and scores as ours."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.integration.tiny import LLAVA, lines, talk, train, write_llava
from tests.pretrained import save_llava
from vlmscale.cli import main
from vlmscale.data.images import decode_image
from vlmscale.data.templates import LAYOUTS, V1_SYSTEM
from vlmscale.errors import UserError
from vlmscale.evaluate.pretrained import answer, open_pretrained

if importlib.util.find_spec("lmms_eval") is None and os.environ.get("CI") != "true":
    pytest.skip("lmms-eval is not installed; `make test` installs it", allow_module_level=True)

import datasets
import lmms_eval

from vlmscale.evaluate import lmms

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path(lmms_eval.__file__).parent / "tasks"
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200)}
NAMES = tuple(COLOURS)
WORD = "\nAnswer the question using a single word or phrase."
COUNT = 36


class Made(NamedTuple):
    """A trained run with what it is asked, as our task files and as tasks of lmms-eval."""

    run: Path
    data: Path
    tasks: Path


def photo(number: int) -> Image.Image:
    """A picture of one colour, not square, with noise on it."""
    noise = np.random.default_rng(number).integers(-25, 25, (40, 52, 3))
    pixels = np.clip(np.array(COLOURS[NAMES[number % 3]]) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def questions(number: int) -> dict[str, tuple[str, str]]:
    """By task, what is asked of a picture and the true answer."""
    colour, other = NAMES[number % 3], NAMES[number // 3 % 3]
    return {
        "pope": (f"Is it {other}?", "yes" if colour == other else "no"),
        "gqa": ("Which colour?", colour if number % 5 else "purple"),  # so that the score is not 1
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Pictures are files for us and lie in a data set for lmms-eval; its own code puts the questions."""
    root = tmp_path_factory.mktemp("lmms")
    records = []
    (root / "images").mkdir()
    for number in range(COUNT):
        photo(number).save(root / "images" / f"{number}.png")
        for task, (question, truth) in questions(number).items():
            said = truth if truth != "purple" else NAMES[number % 3]
            asked = talk(f"<image>\n{question}{WORD}", said)
            records.append({"id": f"{task}{number}", "image": f"{number}.png", "conversations": asked})
    words = [*write_llava(root, records), "--config.compressor.name=pool"]
    words += ["--config.compressor.visual_tokens=4", "--config.data.image_mode=pad"]
    assert train(root / "run", *words, "--config.train.learning_rate=0.01", config=LLAVA, count=100) == 0

    data, tasks = root / "data", root / "tasks"
    data.mkdir()
    tasks.mkdir()
    for task in ("pope", "gqa"):
        ours, theirs = [], []
        for number in range(COUNT):
            question, truth = questions(number)[task]
            file = str(root / "images" / f"{number}.png")
            ours.append({"id": str(number), "image": file, "question": question, "answers": [truth]})
            theirs.append({"question_id": str(number), "image": file, "question": question, "answer": truth})
        (data / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ours))
        table = datasets.Dataset.from_list(theirs).cast_column("image", datasets.Image())
        config = f"include: {TASKS / task / task}.yaml\ntask: {task}_local\ndataset_name: null\n"
        if task == "pope":
            table.to_parquet(root / "pope.parquet")
            config += (
                f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {root / 'pope.parquet'}}}}}\n"
            )
        else:
            datasets.DatasetDict({"testdev": table}).save_to_disk(str(root / "gqa"))
            config += f"dataset_path: {root / 'gqa'}\ndataset_kwargs: {{load_from_disk: true}}\n"
            config += "process_docs: null\n"  # theirs fetches pictures from the hub
        (tasks / f"{task}_local.yaml").write_text(config)
    return Made(root / "run", data, tasks)


def ask(made: Made, model_args: str, out: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """lmms-eval's command line in a process of its own: answers by task in order, and its results."""
    names = [path.stem for path in sorted(made.tasks.glob("*.yaml"))]
    words = [sys.executable, "-m", "lmms_eval", "--model", "vlmscale", "--model_args", model_args]
    words += ["--tasks", ",".join(names), "--include_path", str(made.tasks)]
    words += ["--log_samples", "--output_path", str(out)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    env = os.environ | quiet | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    found = list(out.rglob("*_results.json"))
    assert found, f"{done.stdout}\n{done.stderr}"
    answers = {}
    for name in names:
        [file] = out.rglob(f"*_samples_{name}.jsonl")
        said = sorted(lines(file), key=lambda line: line["doc_id"])
        answers[name.removesuffix("_local")] = [line["filtered_resps"] for line in said]
    return answers, json.loads(found[0].read_text())["results"]


@pytest.mark.slow
def test_a_run_and_its_export_say_and_score_the_same_there_as_here(made: Made, tmp_path: Path) -> None:
    words = ["--run", str(made.run), "--tasks", "pope,gqa", "--data", str(made.data)]
    assert main(["evaluate", *words]) == 0
    ours = {task: lines(made.run / "answers" / f"{task}.jsonl") for task in ("pope", "gqa")}
    scores = {row["task"]: row["score"] for row in lines(made.run / "result.jsonl")}
    assert main(["convert", "--run", str(made.run), "--out", str(tmp_path / "model")]) == 0
    for model_args in (f"run={made.run},batch_size=5", f"model={tmp_path / 'model'},batch_size=5"):
        answers, results = ask(made, model_args, tmp_path / model_args.partition("=")[0])
        for task, filed in ours.items():
            assert answers[task] == [line["answer"] for line in filed]
            assert len(set(answers[task])) > 1, "a model that always says the same proves nothing"
        # POPE's two rules differ, ours being LLaVA's, but not where every answer is "yes" or "no".
        assert set(answers["pope"]) == {"yes", "no"}
        assert results["pope_local"]["pope_accuracy,none"] == pytest.approx(scores["pope"])
        assert results["gqa_local"]["exact_match,none"] == pytest.approx(scores["gqa"])
        assert 0 < scores["gqa"] < 1


class Docs(NamedTuple):
    """A split of a task: its documents, which are pictures or what stands in their place."""

    pictures: list[Any]

    def requests(self, text: str = f"Which colour?{WORD}", **settings: Any) -> list[Any]:
        """One request a document, as lmms-eval makes them."""
        show = lambda picture: picture if isinstance(picture, list) else [picture]  # noqa: E731
        asked = [(text, settings, show, place, "mine", "test") for place in range(len(self.pictures))]
        return [SimpleNamespace(args=args) for args in asked]


def opened(docs: Docs, **arguments: Any) -> lmms.VlmScale:
    """Our model, which knows the documents of task "mine"."""
    model = lmms.VlmScale(**arguments)
    model.task_dict["mine"] = {"test": docs.pictures}
    return model


@pytest.mark.slow
def test_a_request_says_how_long_an_answer_may_be_and_what_ends_it(made: Made) -> None:
    docs = Docs([photo(0), photo(1), photo(2)])
    model = opened(docs, run=made.run)
    said = [reply.text for reply in model.generate_until(docs.requests(max_new_tokens=16))]
    assert said == ["red", "green", "blue"]
    ended = model.generate_until(docs.requests(max_new_tokens=16, until=["ee", "\n\n", None]))
    assert [reply.text for reply in ended] == ["red", "gr", "blue"]
    short = model.generate_until(docs.requests(max_new_tokens=1, until="zz"))
    assert all(whole.startswith(reply.text) for whole, reply in zip(said, short, strict=True))
    assert [reply.token_counts.output_tokens for reply in short] == [1, 1, 1]
    mixed = docs.requests(max_new_tokens=1)[:1] + docs.requests(max_new_tokens=16)
    assert [reply.text for reply in model.generate_until(mixed)] == [short[0].text, *said]
    blind = opened(docs, run=made.run, visual_tokens=0)
    assert len({reply.text for reply in blind.generate_until(docs.requests(max_new_tokens=16))}) == 1


@pytest.mark.slow
def test_what_cannot_be_answered_is_named(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval's tasks set it
    (tmp_path / "cut.png").write_bytes((made.data.parent / "images" / "0.png").read_bytes()[:300])
    for picture, reason in (
        (Image.open(tmp_path / "cut.png"), "picture cannot be read"),
        ("film.mp4", "shows 'film.mp4'; vlmscale sees pictures alone"),
        (Image.new("RGB", (70000, 1)), "70000"),
    ):
        docs = Docs([photo(0), picture])
        with pytest.raises(UserError, match=f"^mine/test/1: .*{reason}"):
            opened(docs, run=made.run).generate_until(docs.requests())
    docs = Docs([photo(0)])
    model = opened(docs, run=made.run)
    for text, longest, reason in (
        ("<image> <image> Same?", 16, "shows <image> 2 times and has 1 pictures"),
        ("Which?", 5000, "5000 new ones exceed the LLM's"),
    ):
        with pytest.raises(UserError, match=f"^mine/test/0: .*{reason}"):
            model.generate_until(docs.requests(text, max_new_tokens=longest))
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match=r"^mine/test/0: .*answers generate_until alone"):
            ask(docs.requests())


@pytest.mark.slow
def test_a_downloaded_llava_reads_the_prompt_of_its_template(tmp_path: Path) -> None:
    path = tmp_path / "llava"
    save_llava("clip-llama", path)
    docs = Docs([photo(0), photo(1), []])
    model = opened(docs, model=path, template="v1", batch_size=2)
    said = [reply.text for reply in model.generate_until(docs.requests("What?", max_new_tokens=6))]
    text = f"{V1_SYSTEM} USER: {{}}What? ASSISTANT:"
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for number, file in enumerate(files):
        photo(number).save(file)
    prompts = [text.format(shown) for shown in ("<image>\n", "<image>\n", "")]
    wanted = answer(open_pretrained(path), prompts, [*files, None], 6)
    assert said == [one.text.strip() for one in wanted]
    assert len(set(said)) > 1
    blind = opened(docs, model=path, template="v1", visual_tokens=0)
    [unseen, *_] = blind.generate_until(docs.requests("What?", max_new_tokens=6))
    assert unseen.text == said[2]
    with pytest.raises(UserError, match=r"^mine/test/0: shows 2 pictures; a directory's model takes one"):
        opened(Docs([[photo(0), photo(1)]]), model=path, template="v1").generate_until(docs.requests()[:1])
    requests = docs.requests("What?", max_new_tokens=6)
    requests[1].args = ("word " * 3000, *requests[1].args[1:])
    with pytest.raises(UserError, match=r"^mine/test/1: .*more than the model's context"):
        model.generate_until(requests)
    with pytest.raises(UserError, match=r"its tokenizer is of no template .* \(toy, v1, chatml, llama3\)"):
        lmms.VlmScale(model=path)
    with pytest.raises(UserError, match=r"template=chatml: .* has a tokenizer without <\|im_start\|>"):
        lmms.VlmScale(model=path, template="chatml")


def test_templates_are_found_by_the_tokens_of_a_tokenizer() -> None:
    arguments = lmms.Arguments(Path("model"), False)
    for name in ("toy", "v1", "chatml", "llama3"):
        assert lmms.choose_template(arguments, {*LAYOUTS[name].special, "<s>", "</s>"}.__contains__) == name


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "name one of run=DIR"),
        ("run=a,model=b", "name one of run=DIR"),
        ("run", "run: must be NAME=VALUE"),
        ("run=a,run=b", "run: is there twice"),
        ("run=a,colour=red", "colour: is not known; the names are run, model, template"),
        ("run=a,template=v1", "template: goes with model=DIR"),
        ("model=a,template=plain", "template=plain: must be one of toy, v1, chatml, llama3"),
        ("model=a,visual_tokens=4", "visual_tokens: a directory's model has one count"),
        ("run=a,visual_tokens=-1", "visual_tokens=-1: must be a whole number, 0 or above"),
        ("run=a,batch_size=0", "batch_size=0: must be a whole number, 1 or above"),
        ("run=a,dtype=int8", "dtype=int8: must be one of float32"),
        ("run=nowhere", "nowhere/spec.json: not found; is this a run directory?"),
        ("model=nowhere", "nowhere: no such directory"),
    ],
)
def test_a_wrong_model_args_is_one_line(given: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        lmms.VlmScale.create_from_arg_string(given, {"batch_size": 1})
    assert "\n" not in str(caught.value)


def test_what_else_lmms_eval_says_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(lmms, "_prepare", seen.append)
    for size, text in ((1, "run=a"), ("auto", "run=a"), ("6", "run=1e5"), (6, "run=a,batch_size=1")):
        lmms.VlmScale.create_from_arg_string(text, {"batch_size": size, "device": None})
    assert [one.batch_size for one in seen] == [None, None, 6, 1]
    assert seen[2].path == Path("1e5")
    with pytest.raises(UserError, match="--device cuda:0: jax chooses the device"):
        lmms.VlmScale.create_from_arg_string("run=a", {"device": "cuda:0"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process answers on all devices"):
        lmms.VlmScale(run="a")


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"temperature": 0.0, "do_sample": True}, ""),
        ({"temperature": 0.2, "do_sample": False, "top_p": 0.9, "num_beams": 1}, ""),
        ({"until": [None, "", "\n"], "max_new_tokens": 3}, ""),
        ({"temperature": 0.2}, "temperature=0.2"),
        ({"do_sample": True}, "do_sample=True"),
        ({"num_beams": 3}, "num_beams=3"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"until": [3]}, "until=[3]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_requests_that_are_not_greedy_are_refused(asked: dict[str, Any], refused: str) -> None:
    if not refused:
        settings = lmms.read_settings("pope/test/3", asked)
        assert settings == ((3, ("\n",)) if "until" in asked else (None, ()))
        return
    with pytest.raises(UserError, match=f"^pope/test/3: asks for {re.escape(refused)}"):
        lmms.read_settings("pope/test/3", asked)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_a_picture_keeps_its_pixels_on_the_way(mode: str) -> None:
    picture = photo(1).convert(mode)
    np.testing.assert_array_equal(decode_image(lmms.encode_picture(picture)), picture.convert("RGB"))


def test_the_makefile_installs_the_version_that_the_extra_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [named] = [word for word in project["optional-dependencies"]["eval"] if word.startswith("lmms-eval")]
    assert f"--no-deps {named}\n" in (ROOT / "Makefile").read_text()
    assert named == f"lmms-eval=={version('lmms-eval')}"
    [entry] = entry_points(group="lmms_eval.models", name="vlmscale")
    assert entry.load() is lmms.manifest
    assert lmms.manifest().simple_class_path == "vlmscale.evaluate.lmms.VlmScale"
