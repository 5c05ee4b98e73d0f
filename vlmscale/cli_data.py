"""`vlmscale data ...`: make data sets, prepare LLaVA's, look at them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError
from vlmscale.terminal import add_command, progress_bar


def add_data(commands: Any) -> None:
    """Declare `vlmscale data` and what belongs to it."""
    about = "make, prepare and look at data sets"
    data = commands.add_parser("data", help=about, description=about).add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    _add_prepare(data)
    _add_stats(data)
    _add_task(data)
    scenes = add_command(
        data, "scenes", _data_scenes, "write the built-in data set", "vlmscale data scenes --out DIR"
    )
    scenes.add_argument("--out", type=Path, required=True)
    scenes.add_argument("--train", type=int, default=20_000, help="pictures (default %(default)s)")
    scenes.add_argument("--validation", type=int, default=200, help="pictures (default %(default)s)")
    scenes.add_argument("--test", type=int, default=400, help="pictures (default %(default)s)")
    scenes.add_argument("--seed", type=int, default=0)


def _add_prepare(data: Any) -> None:
    prepare = add_command(
        data,
        "prepare",
        _data_prepare,
        "LLaVA records and their images into one data set, checked and fast to read; "
        "run again, it goes on where it was stopped",
        "vlmscale data prepare --records llava_v1_5_mix665k.json --images playground/data --out data/mix665k",
    )
    prepare.add_argument(
        "--records", type=Path, required=True, nargs="+", metavar="FILE", help="LLaVA JSON, or JSON Lines"
    )
    prepare.add_argument(
        "--images", type=Path, metavar="DIR", help="what image paths in the records are relative to"
    )
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="the prepared data set")
    prepare.add_argument(
        "--validation", type=int, default=0, metavar="N", help="records held out for a validation loss"
    )
    prepare.add_argument("--seed", type=int, default=0, help="of which those are (default %(default)s)")
    prepare.add_argument("--workers", type=int, help="processes (default: one a core)")
    _add_tokens(prepare)


def _add_task(data: Any) -> None:
    task = add_command(
        data,
        "task",
        _data_task,
        "the official files of a benchmark into a task file for vlmscale evaluate",
        "vlmscale data task gqa --from testdev_balanced_questions.json --images gqa/images --out TASKS",
    )
    task.add_argument("name", metavar="NAME", help="benchmark such as gqa; docs/benchmarks.md has all")
    task.add_argument(
        "--from",
        type=Path,
        required=True,
        dest="source",
        metavar="PATH",
        help="the official file, or the directory of the official files",
    )
    task.add_argument(
        "--images", type=Path, metavar="DIR", help="the official pictures, where they lie apart"
    )
    task.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets NAME.jsonl")
    task.add_argument(
        "--circular",
        action="store_true",
        help="every question once for each rotation of its options (mmbench)",
    )


def _add_stats(data: Any) -> None:
    stats = add_command(
        data,
        "stats",
        _data_stats,
        "what a prepared data set holds: lengths, picture sizes, tasks, what was set aside",
        "vlmscale data stats data/mix665k --out figures",
    )
    stats.add_argument("directory", type=Path, metavar="DIR", help="of vlmscale data prepare")
    stats.add_argument("--split", default="train", help="(default %(default)s)")
    stats.add_argument("--out", type=Path, metavar="DIR", help="folder for the figure, as PNG and SVG")
    stats.add_argument(
        "--verify", action="store_true", help="read everything back and compare it with its hashes first"
    )
    stats.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    _add_tokens(stats)


def _add_tokens(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="with a tokenizer.json: lengths in tokens as well"
    )
    command.add_argument(
        "--template", choices=("plain", "v1", "chatml", "llama3"), help="for them (default v1)"
    )
    command.add_argument("--tokenization", choices=("inline", "llava"), help="(default inline)")
    command.add_argument(
        "--max-text-tokens", type=int, metavar="N", help="where a conversation is cut (default 2048)"
    )


def _data_prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.data.dataset import add_to_manifest, open_dataset
    from vlmscale.data.prepare import prepare_dataset
    from vlmscale.data.splits import QUARANTINE, describe
    from vlmscale.data.stats import token_statistics

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers}: must be above 0")
    template = _template(arguments)  # before anything that takes long
    out = arguments.out
    again = (out / "manifest.json").exists()
    manifest = prepare_dataset(
        arguments.records,
        arguments.images,
        out,
        validation=arguments.validation,
        seed=arguments.seed,
        workers=arguments.workers,
        progress=progress_bar(),
    )
    print(describe(manifest))
    if manifest["quarantined"]:
        print(f"set aside and why: {out / QUARANTINE}")
    if template is not None:
        datasets = [open_dataset(out, split) for split in manifest["records"]]
        tokens = {
            data.split: token_statistics(_lengths(data, template, arguments), template.name)
            for data in datasets
        }
        manifest = add_to_manifest(out, "tokens", tokens)
    said = "already prepared, and its sources are unchanged" if again else "written"
    size = sum(manifest["bytes"].values())
    print(f"{out}: {said}: {manifest['distinct_pictures']} distinct pictures, {size / 1e6:.1f} MB")
    print(f"next: vlmscale data stats {out}")
    return 0


def _data_stats(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.data.dataset import open_dataset, verify
    from vlmscale.data.stats import plot, summarise, table

    dataset, template = open_dataset(arguments.directory, arguments.split), _template(arguments)
    if arguments.verify:
        for split in dataset.manifest["records"]:
            count = verify(open_dataset(arguments.directory, split), progress_bar())
            print(f"{arguments.directory}: {count} records of {split} are as prepared", file=sys.stderr)
    lengths = None if template is None else _lengths(dataset, template, arguments)
    stats = summarise(dataset, lengths, "" if template is None else template.name)
    print(json.dumps(stats) if arguments.json else table(stats))
    for path in plot(stats, arguments.out) if arguments.out else []:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _data_task(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.evaluate.converters import convert

    report = convert(
        arguments.name, arguments.source, arguments.out, arguments.images, circular=arguments.circular
    )
    print("\n".join(report.lines()))
    return 0


def _template(arguments: argparse.Namespace) -> Any:
    """What makes tokens, if they were asked for."""
    from vlmscale.data.conversation import make_template
    from vlmscale.data.tokenizer import read_tokenizer

    if arguments.tokenizer is None:
        for option in ("template", "tokenization", "max_text_tokens"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} goes with --tokenizer DIR")
        return None
    arguments.max_text_tokens = 2048 if arguments.max_text_tokens is None else arguments.max_text_tokens
    if arguments.max_text_tokens < 1:
        raise UserError(f"--max-text-tokens={arguments.max_text_tokens}: must be above 0")
    name, mode = arguments.template or "v1", arguments.tokenization or "inline"
    return make_template(name, read_tokenizer(arguments.tokenizer), mode)


def _lengths(dataset: Any, template: Any, arguments: argparse.Namespace) -> Any:
    from vlmscale.data.lengths import lengths_file, lengths_of

    return lengths_of(dataset, template, arguments.max_text_tokens, lengths_file(dataset), progress_bar())


def _data_scenes(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmscale.data.scenes import export
    from vlmscale.records import make_directory

    make_directory(arguments.out)
    sizes = {"train": arguments.train, "validation": arguments.validation, "test": arguments.test}
    for split, count in sizes.items():
        if count < 1:
            raise UserError(f"--{split}={count}: must be above 0")
    for path in export(arguments.out, sizes, arguments.seed).values():
        print(f"wrote {path} (images below {arguments.out / 'images'})")
    out = arguments.out
    print(
        "train on it: vlmscale train --config configs/llava_tiny.py "
        f"--config.data.records={out}/train.json --config.data.images={out}/images --out RUN"
    )
    return 0
