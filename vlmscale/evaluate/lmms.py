"""A trained run, or a LLaVA directory, as a model of lmms-eval, which finds it by its entry point.

`lmms-eval --model vlmscale --model_args run=DIR` (docs/lmms-eval.md). lmms-eval brings the questions, the
pictures and the scores; the answers are ours, so a run says here what `vlmscale evaluate` files. This is the
only module that imports lmms-eval, and nothing imports this one.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image, ImageFile

from vlmscale.data.records import PLACEHOLDER
from vlmscale.data.templates import LAYOUTS, Layout
from vlmscale.errors import UserError

KEYS = ("run", "model", "template", "visual_tokens", "batch_size", "dtype")
DTYPES = ("float32", "bfloat16", "float16")
_TEMPLATES = tuple(name for name, layout in LAYOUTS.items() if layout.images != "alone")
_GREEDY = {  # requests that greedy decoding does not meet, and the values with which they ask for nothing
    "num_beams": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "num_return_sequences": 1,
}
_AT_ONCE = 2048  # requests whose pictures are in memory together
_LONGEST, _BATCH = 128, 8  # of a directory, where nothing else is asked for
_WRITTEN = ("1", "L", "LA", "P", "RGB", "RGBA")  # modes of pictures that a PNG holds as they are


def manifest() -> Any:
    """What lmms-eval reads from the entry point: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlmscale", simple_class_path=f"{__name__}.{VlmScale.__name__}")


@dataclass(frozen=True)
class Arguments:
    """What `--model_args` says.

    Attributes:
      path: of the run, or of the model's directory.
      is_run: which of the two.
      template: how a directory's prompts are laid out; "" for the one that its tokenizer fits.
      visual_tokens: of a picture; 0 to ask without pictures, None for the model's own.
      batch_size: questions that are answered together; None for the run's own.
      dtype: None for float32 on a CPU and bfloat16 elsewhere.
    """

    path: Path
    is_run: bool
    template: str = ""
    visual_tokens: int | None = None
    batch_size: int | None = None
    dtype: str | None = None


class Settings(NamedTuple):
    """What a request asks of the decoding."""

    max_new_tokens: int | None  # None: not said
    until: tuple[str, ...]


class Asked(NamedTuple):
    """One request with its pictures read.

    Attributes:
      name: its task, split and number, unique among those that are answered together.
      text: with a placeholder for each picture.
      images: encoded.
      settings: of the decoding.
    """

    name: str
    text: str
    images: tuple[bytes, ...]
    settings: Settings


class Reply(NamedTuple):
    """What the model said: its text, whole, and how many tokens that took."""

    text: str
    tokens: int


class Answering(Protocol):
    """A model that is loaded."""

    def answer(self, asked: Sequence[Asked]) -> list[Reply]:
        """What it says to each."""
        ...


class VlmScale(lmms):
    """A model of vlmscale in lmms-eval.

    What `--model_args` says is checked at once; weights are read with the first request, because tasks that
    start processes of their own to read data must do so before jax runs.
    """

    is_simple = True

    def __init__(self, **given: Any) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "--model vlmscale: one process answers on all devices; start lmms-eval without a launcher"
            )
        self.arguments = read_arguments(given)
        self._open = _prepare(self.arguments)
        self._model: Answering | None = None

    @classmethod
    def create_from_arg_string(cls, arg_string: Any, additional_config: Any = None) -> VlmScale:
        """As lmms-eval calls it: `--model_args`, and what else its command line says of a model.

        Its `--batch_size 1` is its default, and means the run's own here; batch_size=1 in `--model_args` is
        taken at its word.
        """
        given = _pairs(arg_string)
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if more.get("device"):
            raise UserError(
                f"--device {more['device']}: jax chooses the device; set JAX_PLATFORMS=cpu or "
                "CUDA_VISIBLE_DEVICES instead"
            )
        size = str(more.get("batch_size", "1"))
        if size not in ("1", "auto"):
            given.setdefault("batch_size", size)
        return cls(**given)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Greedy answers to the requests, in their order.

        Raises:
          UserError: a request is not for greedy decoding, or cannot be answered: its picture cannot be read,
            it is too long, or it shows what is no picture.
        """
        names = _names(requests)
        settings = [
            read_settings(name, request.args[1]) for name, request in zip(names, requests, strict=True)
        ]
        if self._model is None:
            self._model = self._open()
        order = sorted(range(len(names)), key=lambda place: (len(requests[place].args[0]), place))
        out: list[Any] = [None] * len(names)
        for start in range(0, len(order), _AT_ONCE):
            places = order[start : start + _AT_ONCE]
            part = [self._read(requests[place], names[place], settings[place]) for place in places]
            for place, asked, reply in zip(places, part, self._model.answer(part), strict=True):
                text = cut(reply.text, asked.settings.until)
                out[place] = GenerationResult(text, TokenCounts(output_tokens=reply.tokens))
        return out

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refused."""
        raise UserError(f"{_names(requests)[0]}: asks for likelihoods; vlmscale answers generate_until alone")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refused."""
        raise UserError(f"{_names(requests)[0]}: has several rounds; vlmscale answers generate_until alone")

    def _read(self, request: Any, name: str, settings: Settings) -> Asked:
        """A request with its pictures."""
        context, _, doc_to_visual, place, task, split = request.args
        context = context.strip()
        try:
            with _whole_pictures():
                shown = doc_to_visual(self.task_dict[task][split][place])
                pictures = [encode_picture(picture) for picture in _flat(shown)]
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
            raise UserError(f"{name}: its picture cannot be read ({error})") from error
        except TypeError as error:
            raise UserError(f"{name}: {error}") from error
        marks = context.count(PLACEHOLDER)
        if marks not in (0, len(pictures)):
            raise UserError(f"{name}: shows {PLACEHOLDER} {marks} times and has {len(pictures)} pictures")
        if not marks:  # as `vlmscale evaluate` does for task files
            context = f"{PLACEHOLDER}\n" * len(pictures) + context
        return Asked(name, context, tuple(pictures), settings)


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """`--model_args`, checked.

    Raises:
      UserError: an unknown name, a wrong value, or two that exclude each other.
    """
    for name in given:
        if name not in KEYS:
            raise UserError(f"--model_args {name}: is not known; the names are {', '.join(KEYS)}")
    run, model = (str(given.get(name) or "") for name in ("run", "model"))
    if bool(run) == bool(model):
        raise UserError(
            "--model_args: name one of run=DIR, a trained run, and model=DIR, a Hugging Face directory"
        )
    template = str(given.get("template") or "")
    if template and run:
        raise UserError("--model_args template: goes with model=DIR; a run has its own")
    if template and template not in _TEMPLATES:
        raise UserError(f"--model_args template={template}: must be one of {', '.join(_TEMPLATES)}")
    dtype = given.get("dtype") or None
    if dtype and dtype not in DTYPES:
        raise UserError(f"--model_args dtype={dtype}: must be one of {', '.join(DTYPES)}")
    tokens = _whole(given, "visual_tokens", 0)
    if model and tokens:
        raise UserError("--model_args visual_tokens: a directory's model has one count, or 0 for no pictures")
    return Arguments(Path(run or model), bool(run), template, tokens, _whole(given, "batch_size", 1), dtype)


def read_settings(name: str, asked: Mapping[str, Any]) -> Settings:
    """What a request asks of the decoding.

    `do_sample: false` is greedy whatever the temperature, as in transformers, and so is temperature 0.

    Raises:
      UserError: it is not greedy, or cannot be understood.
    """
    inert: dict[str, Any] = dict(_GREEDY)
    temperature, sample = asked.get("temperature"), asked.get("do_sample")
    if sample is not False:  # of the two keys the one that asks for sampling; transformers samples at 1
        inert |= {"temperature": 0} if temperature is not None else {"do_sample": False}
    for key, value in inert.items():
        if asked.get(key) not in (None, value):
            raise UserError(
                f"{name}: asks for {key}={asked[key]}; vlmscale answers greedily: --gen_kwargs {key}={value}"
            )
    until = asked.get("until") or ()
    stops = [until] if isinstance(until, str) else list(until)
    if not all(stop is None or isinstance(stop, str) for stop in stops):
        raise UserError(f"{name}: asks for until={until!r}; it must be a text or a list of texts")
    longest = asked.get("max_new_tokens")
    if longest is not None and (int(longest) != longest or longest < 1):
        raise UserError(f"{name}: asks for max_new_tokens={longest}; it must be a whole number above 0")
    return Settings(longest and int(longest), tuple(stop for stop in stops if stop))


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of the strings that end it, without space around."""
    text = text.strip()
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))].strip()


def encode_picture(picture: Any) -> bytes:
    """A picture that a task gives, as a PNG with the same pixels.

    Raises:
      TypeError: it is no picture.
    """
    if not isinstance(picture, Image.Image):
        what = f"{picture!r:.60}" if isinstance(picture, str) else type(picture).__name__
        raise TypeError(f"shows {what}; vlmscale sees pictures alone, no video or sound")
    file = io.BytesIO()
    whole = picture if picture.mode in _WRITTEN else picture.convert("RGB")
    whole.save(file, "PNG", compress_level=1)
    return file.getvalue()


def wrap(layout: Layout, image_token: str, text: str) -> str:
    """A question as the whole text that a directory's model reads.

    Args:
      layout: of `LAYOUTS`, without `bos` where the tokenizer puts that in front.
      image_token: stands where a picture is shown.
      text: the question, with placeholders.
    """
    if layout.images == "front":
        text = image_token * text.count(PLACEHOLDER) + text.replace(PLACEHOLDER, "").strip()
    else:
        text = text.replace(PLACEHOLDER, image_token)
    return f"{layout.bos or ''}{layout.start}{layout.question}{text}{layout.answer}"


@contextlib.contextmanager
def _whole_pictures() -> Iterator[None]:
    """Pillow refuses a file that is cut off; lmms-eval lets it fill what is missing with grey, unsaid."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _pairs(text: Any) -> dict[str, Any]:
    """`run=DIR,batch_size=8` as a mapping; values stay texts, for a directory may be called 1e5."""
    if isinstance(text, Mapping):
        return dict(text)
    words = [word.strip() for word in str(text or "").split(",") if word.strip()]
    pairs = [word.partition("=") for word in words]
    for word, (name, sign, _) in zip(words, pairs, strict=True):
        if not sign or not name:
            raise UserError(f"--model_args {word}: must be NAME=VALUE; the names are {', '.join(KEYS)}")
    repeated = [name for name, times in Counter(name for name, _, _ in pairs).items() if times > 1]
    if repeated:
        raise UserError(f"--model_args {repeated[0]}: is there twice")
    return {name: value for name, _, value in pairs}


def _whole(given: Mapping[str, Any], name: str, least: int) -> int | None:
    """A whole number, or None where it is not given."""
    value = given.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < least:
        raise UserError(f"--model_args {name}={value}: must be a whole number, {least} or above")
    return int(value)


def _names(requests: Sequence[Any]) -> list[str]:
    """What each request is called in messages; a document that is asked again gets a number."""
    names, taken = [], Counter[str]()
    for request in requests:
        place, task, split = request.args[-3:]
        name = f"{task}/{split}/{place}"
        taken[name] += 1
        names.append(name if taken[name] == 1 else f"{name}~{taken[name]}")
    return names


def _flat(shown: Any) -> list[Any]:
    """The pictures of a document: a task gives a list, a list in a list, one picture or none."""
    if shown is None:
        return []
    return [one for part in shown for one in _flat(part)] if isinstance(shown, list | tuple) else [shown]


def _prepare(arguments: Arguments) -> Callable[[], Answering]:
    """Check what is named, and return what loads it.

    Raises:
      UserError: it cannot be used.
    """
    return _prepare_run(arguments) if arguments.is_run else _prepare_directory(arguments)


def _prepare_run(arguments: Arguments) -> Callable[[], Answering]:
    from vlmscale.train.run import load_prepared
    from vlmscale.validation import check_evaluable

    cell, _ = load_prepared(arguments.path)
    if not (arguments.path / "done.json").exists():
        raise UserError(
            f"{arguments.path}: training is not finished (no done.json); run `vlmscale train` again"
        )
    if arguments.visual_tokens:
        check_evaluable(cell, "--model_args visual_tokens", [arguments.visual_tokens])
    return lambda: TrainedRun(arguments)


def _prepare_directory(arguments: Arguments) -> Callable[[], Answering]:
    from vlmscale.data.tokenizer import leading_ids, read_tokenizer
    from vlmscale.terminal import tell
    from vlmscale.weights.hf_config import read_config

    read_config(arguments.path)  # the first thing that may be wrong
    tokenizer = read_tokenizer(arguments.path)
    chosen = choose_template(arguments, lambda token: tokenizer.token_to_id(token) is not None)
    tell(f"{arguments.path}: prompts are laid out as {chosen}")
    layout = LAYOUTS[chosen]
    if layout.bos and (leading_ids(tokenizer) or tokenizer.token_to_id(layout.bos) is None):
        layout = replace(layout, bos="")  # the tokenizer puts its own in front, or has none
    return lambda: Directory(arguments, layout)


def choose_template(arguments: Arguments, known: Callable[[str], bool]) -> str:
    """The template of a directory: the one asked for, else the one whose tokens its tokenizer has.

    Raises:
      UserError: the tokenizer lacks tokens of a prompt, or those of every template.
    """
    chosen = arguments.template
    if chosen:
        layout = LAYOUTS[chosen]
        prompt = layout.start + layout.question + layout.answer
        for token in layout.special:
            if token in prompt and not known(token):
                raise UserError(
                    f"--model_args template={chosen}: {arguments.path} has a tokenizer without {token}"
                )
        return chosen
    fitting = [name for name in _TEMPLATES if all(map(known, LAYOUTS[name].special))]
    if not fitting:
        raise UserError(
            f"{arguments.path}: its tokenizer is of no template that is known here; choose one with "
            f"--model_args model=...,template=NAME ({', '.join(_TEMPLATES)})"
        )
    # A tokenizer may have Llama's <s> beside the tokens of another layout.
    return next((name for name in fitting if name != "v1"), fitting[0])


def _default_dtype(arguments: Arguments) -> str:
    """What computes, unless told otherwise."""
    import jax

    return arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


class TrainedRun:
    """A run that answers as `vlmscale evaluate` lets it answer."""

    def __init__(self, arguments: Arguments) -> None:
        from vlmscale.evaluate.loaded import load_run
        from vlmscale.train.run import keep_programs

        keep_programs()
        run = load_run(arguments.path, _default_dtype(arguments))
        size = arguments.batch_size or run.cell.evaluate.batch_size
        config = replace(run.cell.evaluate, batch_size=size)
        self.run = replace(run, cell=replace(run.cell, evaluate=config))
        own = run.cell.compressor.visual_tokens
        self.visual_tokens = own if arguments.visual_tokens is None else arguments.visual_tokens

    def answer(self, asked: Sequence[Asked]) -> list[Reply]:
        """What the run says to each.

        Raises:
          UserError: one of them cannot be answered.
        """
        from vlmscale.evaluate.answers import Journal
        from vlmscale.evaluate.asking import Pass, answer_all
        from vlmscale.evaluate.items import Item, Task
        from vlmscale.evaluate.questions import Question
        from vlmscale.terminal import progress_bar

        bar, split = progress_bar(), self.run.prepared.eval_split
        parts: dict[int, list[Item]] = {}
        for one in asked:
            item = Item(Question(one.name, ()), one.text, len(one.images), files=one.images)
            longest = one.settings.max_new_tokens or self.run.cell.evaluate.max_new_tokens
            parts.setdefault(longest, []).append(item)
        with tempfile.TemporaryDirectory(prefix="vlmscale-lmms-") as folder:
            passes = []
            for longest, items in parts.items():
                task = Task(str(longest), "", split, "", tuple(items), longest, "")
                journal = Journal(Path(folder) / f"{longest}.jsonl", {item.id: "" for item in items})
                passes.append(Pass(task, self.visual_tokens, journal))
            failed = answer_all(self.run, passes, split, lambda done, total: bar("answering", done, total))
        for (_, _, name), reason in failed.items():
            more = f" (and {len(failed) - 1} more were not answered)" if len(failed) > 1 else ""
            raise UserError(f"{name}: {reason}{more}")
        said = {name: words for one in passes for name, words in one.journal.said.items()}
        return [Reply(said[one.name].text, said[one.name].tokens) for one in asked]


class Directory:
    """A LLaVA, or an LLM, of a Hugging Face directory."""

    def __init__(self, arguments: Arguments, layout: Layout) -> None:
        from vlmscale.evaluate.pretrained import load_pretrained, read_prompter
        from vlmscale.terminal import progress_bar
        from vlmscale.train.run import keep_programs

        keep_programs()
        prompter, dtype = read_prompter(arguments.path), _default_dtype(arguments)
        self.model = load_pretrained(prompter, dtype=dtype, progress=progress_bar())
        self.layout = layout
        self.size, self.blind = arguments.batch_size or _BATCH, arguments.visual_tokens == 0

    def answer(self, asked: Sequence[Asked]) -> list[Reply]:
        """What the model says to each.

        Raises:
          UserError: one of them cannot be answered.
        """
        from vlmscale.terminal import progress_bar

        bar, done = progress_bar(), 0
        groups: dict[tuple[int, bool], list[Asked]] = {}
        for one in asked:
            longest, shown = one.settings.max_new_tokens or _LONGEST, bool(one.images) and not self.blind
            groups.setdefault((longest, shown), []).append(one)
        said: dict[str, Reply] = {}
        for (longest, _), those in groups.items():
            for start in range(0, len(those), self.size):
                part = those[start : start + self.size]
                for one, answer in zip(part, self._answers(part, longest), strict=False):
                    said[one.name] = Reply(answer.text, len(answer.token_ids))
                done += len(part)
                bar("answering", done, len(asked))
        return [said[one.name] for one in asked]

    def _answers(self, part: Sequence[Asked], longest: int) -> list[Any]:
        """Answers to one batch; what it lacks to the full size repeats the first, and comes last."""
        from vlmscale.evaluate.pretrained import answer_request, make_request

        prompter = self.model.prompter
        with tempfile.TemporaryDirectory(prefix="vlmscale-lmms-") as folder:
            rows = [self._prompt(one, Path(folder) / f"{place}.png") for place, one in enumerate(part)]
            prompts, images = zip(*rows, *[rows[0]] * (self.size - len(part)), strict=True)
            try:
                request = make_request(prompter, prompts, images, longest)
            except UserError:
                for one, (prompt, image) in zip(part, rows, strict=True):  # which of them it is
                    try:
                        make_request(prompter, [prompt], [image], longest)
                    except UserError as error:
                        raise UserError(f"{one.name}: {error}") from error
                raise
        return answer_request(self.model, request)

    def _prompt(self, one: Asked, file: Path) -> tuple[str, Path | None]:
        """The text that the model reads, and where its picture is."""
        token, text = self.model.prompter.image_token or "", one.text
        if self.blind or not one.images:
            return wrap(self.layout, token, text.replace(PLACEHOLDER, "").strip()), None
        if not token:
            raise UserError(
                f"{one.name}: shows a picture, and the model has no vision tower; "
                "--model_args visual_tokens=0 asks without"
            )
        if len(one.images) > 1:
            raise UserError(
                f"{one.name}: shows {len(one.images)} pictures; a directory's model takes one here, "
                "a run any number"
            )
        file.write_bytes(one.images[0])
        return wrap(self.layout, token, text), file
