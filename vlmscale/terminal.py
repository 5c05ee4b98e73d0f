"""What the commands share: how one is declared, and how long work shows where it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from vlmscale.errors import UserError

Command = Callable[[argparse.Namespace, list[str]], int]


def add_command(commands: Any, name: str, run: Command, about: str, example: str) -> argparse.ArgumentParser:
    """Declare a command: its name, what runs it, one line about it, and an example."""
    parser = commands.add_parser(name, help=about, description=about, epilog=f"example: {example}")
    parser.set_defaults(run=run)
    return parser


def progress_bar() -> Callable[[str, int, int], None]:
    """A bar on a terminal; elsewhere one plain line when a stage ends."""
    bars: dict[str, tqdm] = {}

    def show(text: str, done: int, total: int) -> None:
        stage = text.split(",")[0] if text.startswith("training") else text
        if not sys.stderr.isatty():
            if done == total:
                print(f"{text}: {done}/{total}", file=sys.stderr)
            return
        if stage not in bars:
            bars[stage] = tqdm(total=total, initial=done)
        bars[stage].set_description(text, refresh=False)
        bars[stage].update(done - bars[stage].n)
        if done == total:
            bars.pop(stage).close()

    return show


def tell(line: str) -> None:
    """Say something on the way; results alone go to stdout."""
    print(line, file=sys.stderr)


def counted(number: int, what: str) -> str:
    """Such as `1 cell`, `2 cells`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of an option such as `--batch 1,8`, in their order, each once.

    Raises:
      UserError: there are none, or one is not whole or not above 0.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"{option} is empty; give counts such as 1,16")
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise UserError(f"{option} {text}: {word!r} is no whole number above 0; give counts such as 1,16")
    return tuple(dict.fromkeys(map(int, words)))


def names(text: str, option: str) -> tuple[str, ...]:
    """The names of an option such as `--llm A,B`, in their order, each once.

    Raises:
      UserError: there are none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"{option} is empty; give names with commas between them")
    return tuple(dict.fromkeys(words))
