"""`vlmscale evaluate`, `score` and `generate`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.terminal import add_command, progress_bar, tell

DTYPES = ("float32", "bfloat16", "float16")


def add_evaluate(commands: Any) -> None:
    """Declare what answers questions, and what scores answers."""
    _add_evaluate(commands)
    _add_score(commands)
    _add_generate(commands)


def add_distributed(command: Any) -> None:
    """Declare how a command joins other processes."""
    command.add_argument(
        "--distributed",
        default="",
        metavar="auto | HOST:PORT,COUNT,INDEX",
        help="one of several processes: as Slurm or a TPU pod says, or by the coordinator's address",
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "answer and score a run's own questions, or benchmarks; --config.evaluate.KEY=VALUE and "
        "--config.reducer.KEY=VALUE override",
        "vlmscale evaluate --run RUN --tasks gqa,pope --data TASKS --blind",
    )
    evaluate.add_argument("--run", type=Path, required=True, dest="run_dir", metavar="DIR")
    evaluate.add_argument(
        "--tasks",
        default="",
        help="comma-separated names, or reasoning, ocr, general for a group of benchmarks (default: all of "
        "the run's own data)",
    )
    evaluate.add_argument(
        "--data", type=Path, metavar="DIR", help="directory of task files NAME.jsonl (vlmscale data task)"
    )
    evaluate.add_argument(
        "--blind", action="store_true", help="ask every question once more without its picture"
    )
    evaluate.add_argument(
        "--visual-tokens",
        default="",
        help="counts such as 1,4,16, of a compressor that gives many (m3, mqt); rows of others stay",
    )
    evaluate.add_argument(
        "--llava-answers", action="store_true", help="write answers in LLaVA's format too: *.llava.jsonl"
    )
    evaluate.add_argument("--dtype", choices=DTYPES, help="default float32 on CPU, else bfloat16")
    add_distributed(evaluate)
    evaluate.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    evaluate.set_defaults(takes_config=True)


def _add_score(commands: Any) -> None:
    score = add_command(
        commands,
        "score",
        _score,
        "score existing answers without any model",
        "vlmscale score --task gqa --items gqa.jsonl --answers answers.jsonl",
    )
    score.add_argument(
        "--task", required=True, help="a benchmark such as gqa; of any other name: exact match"
    )
    score.add_argument(
        "--items", type=Path, required=True, metavar="FILE", help="task file; id and answers are enough"
    )
    score.add_argument(
        "--answers", type=Path, required=True, metavar="FILE", help='lines {"id", "answer"}, or LLaVA\'s'
    )
    score.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def _add_generate(commands: Any) -> None:
    generate = add_command(
        commands,
        "generate",
        _generate,
        "answer a prompt about an image, with a trained run or a downloaded LLaVA",
        'vlmscale generate --model llava-1.5-7b-hf --image PHOTO.jpg --prompt "USER: <image>\\n'
        'What is this? ASSISTANT:" --max-new-tokens 32',
    )
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="a trained run")
    source.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face directory, LLaVA or LLM")
    generate.add_argument("--image", type=Path, help="a picture; without one the question is asked blind")
    generate.add_argument(
        "--prompt",
        required=True,
        help="a question for --run; for --model the whole text, taken literally but for \\n",
    )
    generate.add_argument("--max-new-tokens", type=int, help="longest answer (default 32; --run: its own)")
    generate.add_argument(
        "--visual-tokens",
        type=int,
        help="tokens of the image, of a --run whose compressor gives many counts (m3, mqt)",
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-p", type=float, help="nucleus to sample from (default all)")
    generate.add_argument("--seed", type=int, help="of sampling (default 0)")
    generate.add_argument("--dtype", choices=DTYPES, help="default float32 on CPU, else bfloat16 (--model)")
    generate.add_argument(
        "--attention",
        choices=("xla", "cudnn", "splash"),
        default="xla",
        help="backend of tower and prefill (--model): xla anywhere (default), cudnn GPU, splash TPU",
    )
    generate.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.distributed import leader, start
    from vlmscale.train.run import exclusive, keep_programs

    start(arguments.distributed)
    from vlmscale.evaluate.items import words
    from vlmscale.evaluate.loaded import load_run
    from vlmscale.evaluate.runner import Asked, evaluate
    from vlmscale.records import Status

    keep_programs()
    bar = progress_bar()
    tasks = words(arguments.tasks)
    try:
        counts = [int(word) for word in arguments.visual_tokens.split(",") if word]
    except ValueError:
        raise UserError(f"--visual-tokens {arguments.visual_tokens}: counts such as 1,4,16") from None
    asked = Asked(tasks, arguments.data, counts, arguments.blind, arguments.llava_answers)
    path = arguments.run_dir
    run = load_run(path, arguments.dtype, overrides)

    def show(done: int, total: int) -> None:
        if leader():
            bar("answering", done, total)

    with exclusive(path, wait=False) if leader() else contextlib.nullcontext():
        rows = evaluate(run, asked, show, tell)
    if not leader():
        return 0
    other = tasks or counts or arguments.data is not None
    if not other and not any(word.startswith("--config.reducer.") for word in overrides):
        # Else what the config asks for may be missing.
        Status(path).update(state="done")
    if arguments.json:
        print(json.dumps({"run": str(path), "rows": [json.loads(row.to_json()) for row in rows]}))
        return 0
    numbers = " ".join(f"{name:>7}" for name in ("score", "stderr", "chance", "blind"))
    if rows[0].reducer:
        print(f"reducer {rows[0].reducer}: {rows[0].tokens_per_layer:.4g} prompt tokens a layer in the mean")
    print(f"{'task':14} {'group':12} {'V':>6} {numbers} {'items':>6}")
    for row in rows:
        failed = f"  {row.n_failed} not answered, counted as wrong" if row.n_failed else ""
        print(
            f"{row.task:14} {row.task_group:12} {row.visual_tokens:6.4g} {row.score:7.3f} {row.stderr:7.3f} "
            f"{_number(row.chance)} {_number(row.blind_score)} {row.n_items:6d}{failed}"
        )
    print(f"wrote {path / 'result.jsonl'} and {path / 'answers'}")
    return 0


def _number(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.3f}"


def _score(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.evaluate.questions import read_answers, read_questions
    from vlmscale.evaluate.tasks import BENCHMARKS, rule_of, score

    questions = read_questions(arguments.items, asked=False)
    answers = read_answers(arguments.answers)
    try:
        rule = rule_of(arguments.task, questions)
        scored = score(arguments.task, rule, questions, answers)
    except UserError as error:
        raise UserError(f"{arguments.items}, {arguments.answers}: {error}") from error
    if rule != arguments.task:
        tell(f"{arguments.task}: no benchmark of this name ({', '.join(BENCHMARKS)}): scored by {rule}")
    missing = f"{scored.n_missing} not answered, counted as wrong" if scored.n_missing else ""
    if missing:
        tell(f"{scored.n_missing} of {scored.n_items} items have no answer: counted as wrong")
    summary = scored.summary
    if arguments.json:
        print(
            json.dumps(
                {
                    "task": scored.task,
                    "score": summary.score,
                    "stderr": summary.stderr,
                    "n_items": scored.n_items,
                    "n_missing": scored.n_missing,
                    "n_counted": summary.counted,
                    "metric": scored.metric,
                    "score_raw": summary.raw,
                    "chance": scored.chance,
                    "scorer": scored.scorer,
                    "details": summary.details,
                }
            )
        )
        return 0
    chance = "" if scored.chance is None else f", chance {scored.chance:.4f}"
    print(
        f"{scored.task}: {scored.metric} {summary.score:.4f} +- {summary.stderr:.4f}{chance}, "
        f"{scored.n_items} items" + (missing and f", {missing}")
    )
    for name, value in summary.details.items():
        print(f"  {name:30} {value:10.4f}")
    return 0


def _generate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.evaluate.generation import Sampling

    longest = arguments.max_new_tokens
    if longest is not None and longest < 1:
        raise UserError(f"--max-new-tokens={longest}: must be above 0")
    sampled = arguments.seed is not None or arguments.top_p is not None
    if sampled and arguments.temperature == 0:
        raise UserError("--seed and --top-p go with --temperature above 0; without it answers are greedy")
    seed = arguments.seed or 0
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed}: must be 0 or above and below 2**32")
    sampling = Sampling(arguments.temperature, 1.0 if arguments.top_p is None else arguments.top_p)
    if arguments.model:
        if arguments.visual_tokens is not None:
            raise UserError("--visual-tokens goes with --run; a downloaded model has one count")
        return _generate_pretrained(arguments, sampling, seed)
    from vlmscale.evaluate.loaded import answer_one, load_run

    if arguments.dtype or arguments.attention != "xla":
        raise UserError("--dtype and --attention go with --model; a run answers in float32")
    run = load_run(arguments.run_dir, "float32")
    said = answer_one(
        run, arguments.image, arguments.prompt, longest, sampling, seed, arguments.visual_tokens
    )
    _show_answer(arguments, arguments.prompt, said)
    return 0


def _show_answer(arguments: argparse.Namespace, prompt: str, said: Any) -> None:
    if arguments.json:
        print(json.dumps({"prompt": prompt, "text": said.text, "token_ids": said.token_ids}))
    else:
        print(said.text)


def _generate_pretrained(arguments: argparse.Namespace, sampling: Any, seed: int) -> int:
    import jax

    from vlmscale.evaluate.pretrained import (
        answer_request,
        load_pretrained,
        make_request,
        mesh_of,
        read_prompter,
    )

    prompt = arguments.prompt.replace("\\n", "\n")  # a shell's double quotes leave the two characters
    prompter = read_prompter(arguments.model)
    request = make_request(prompter, [prompt], [arguments.image], arguments.max_new_tokens or 32)
    model = load_pretrained(
        prompter, dtype=arguments.dtype, attention=arguments.attention, progress=progress_bar()
    )
    print(f"{arguments.model}: {model.report}", file=sys.stderr)
    used = mesh_of(model).size
    if used < jax.device_count():
        print(
            f"uses {used} of {jax.device_count()} devices: it does not divide over all",
            file=sys.stderr,
        )
    try:
        said = answer_request(model, request, sampling, seed)[0]
    except ValueError as error:  # of the attention backend: another platform or dtype than it needs
        if arguments.attention == "xla":
            raise
        raise UserError(f"--attention {arguments.attention}: {error}") from error
    _show_answer(arguments, prompt, said)
    return 0
