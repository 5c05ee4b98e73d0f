"""Choices of a method's own, written "key=value,key=value" in a config: how they are read and shown."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Protocol

from vlmscale.errors import UserError

Options = Mapping[str, str]


class HasOptions(Protocol):
    """A row of a table of methods."""

    @property
    def options(self) -> Mapping[str, tuple[str, ...]]:
        """Name to allowed values, the default first."""


def parse(part: str, methods: Mapping[str, HasOptions], name: str, text: str) -> dict[str, str]:
    """The options of a method; those that say the default are left out.

    Args:
      part: of the config, "compressor" or "reducer".
      methods: the table.
      name: of the method.
      text: what the config says.

    Raises:
      UserError: naming the method, the option or the value and what works.
    """
    if name not in methods:  # of a run that a version with more methods trained, say
        raise UserError(f"{part}.name={name}: unknown here (known: {', '.join(methods)})")
    known, chosen = methods[name].options, {}
    for word in filter(None, (piece.strip() for piece in text.split(","))):
        key, _, value = word.partition("=")
        if key not in known:
            owners = [other for other, method in methods.items() if key in method.options]
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]} (known: {', '.join(known)})" if near else "it has none"
            hint = f"that belongs to {', '.join(owners)}" if owners else hint
            raise UserError(f"{part}.options: {name} has no option {key!r}; {hint}")
        if value not in known[key]:
            raise UserError(f"{part}.options: {key}={value}: {name} knows {key}={' or '.join(known[key])}")
        if key in chosen:
            raise UserError(f"{part}.options: {key} is given twice")
        chosen[key] = value
    return {key: chosen[key] for key in sorted(chosen) if chosen[key] != known[key][0]}


def label(name: str, options: Options) -> str:
    """What records call a method: its name, and the options that are not the default."""
    return name + "".join(f":{key}={value}" for key, value in options.items())
