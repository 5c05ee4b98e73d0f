"""`vlmscale advise`: what to deploy for a budget. Heavy imports happen inside the command."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscale.errors import UserError
from vlmscale.terminal import add_command, names, whole_numbers

if TYPE_CHECKING:
    from analysis.latency import FittedLatency
    from vlmscale.cost.answer import Asked, Served
    from vlmscale.cost.menu import Image, Listed
    from vlmscale.cost.peak import Device

_TEXT_TOKENS = 50.0  # the paper's, where neither the command nor the analysis says
_HALF = 2  # bytes of a weight that is served, where no latency file says otherwise


def add_advise(commands: Any) -> None:
    """Declare it."""
    advise = add_command(
        commands,
        "advise",
        _advise,
        "the best LLM and number of visual tokens for a budget, with intervals, and the price of the others",
        "vlmscale advise --budget 5e12 --text-tokens 50 --gen-tokens 10 --law REPORT/analysis.json",
    )
    add = advise.add_argument
    add("--budget", required=True, metavar="C", help="FLOPs an answer such as 5e12, or time such as 40ms")
    add("--law", type=Path, required=True, metavar="FILE", help="analysis.json of vlmscale analyze")
    add("--group", metavar="NAME", help="task group (default: all)")
    add(
        "--text-tokens",
        type=float,
        metavar="Q",
        help="text tokens of the prompt (default: those of the analysis)",
    )
    add("--gen-tokens", type=float, default=1.0, metavar="G", help="tokens of an answer (default 1)")
    add(
        "--batch",
        type=float,
        default=1.0,
        metavar="B",
        help="answers at once (default 1); times are the batch's",
    )
    add(
        "--device",
        default="",
        metavar="NAME",
        help="such as h200: what its published rates take at least, in ms",
    )
    add("--latency", type=Path, metavar="FILE", help="what vlmscale bench latency wrote: times by its model")
    add(
        "--tower",
        default="",
        metavar="NAME",
        help="count this tower and --compressor (default: as the cells say)",
    )
    add("--compressor", default="", metavar="NAME[:OPTIONS]", help="with --tower")
    add("--llm", default="", metavar="NAMES", help="only these (default: those measured and their families)")
    add("--visual-tokens", default="", metavar="V", help="only these counts (default: those measured)")
    add("--top", type=int, default=5, metavar="K", help="how many picks (default 5)")
    add("--json", action="store_true", help="print one JSON object and nothing else on stdout")


@dataclass(frozen=True)
class _Price:
    """How an answer is charged: by a latency model, by a device's roofline (ms), or in FLOPs."""

    text_tokens: float
    gen_tokens: float
    batch: float
    timed: FittedLatency | None
    device: Device | None
    by_time: bool

    @property
    def unit(self) -> str:
        """Of budgets and costs."""
        return "ms" if self.by_time else "FLOP"

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return int(self.timed.itemsize) if self.timed else _HALF

    def shape(self, listed: Listed) -> Served:
        """Of an LLM; where its name is unknown that of a usual decoder."""
        from analysis.latency import usual
        from vlmscale.cost.answer import Served

        return listed.llm or Served(*(float(x) for x in usual(listed.n, self.itemsize)))

    def of(self, llm: Served, v: float, image: Image | None) -> float:
        """Cost of an answer (of a batch, where it is a time)."""
        from analysis.latency import Shape
        from vlmscale.cost.answer import answer_flops, roofline_ms

        if self.timed is not None:
            return float(self.timed.of(Shape(*llm), v))
        if self.by_time and self.device:
            return roofline_ms(llm, self._asked(v, image), self.device, self.itemsize)
        return answer_flops(llm, self._asked(v, image))

    def least_ms(self, llm: Served, v: float, image: Image | None) -> float | None:
        """What a batch takes at least on the device, beside a cost in FLOPs."""
        from vlmscale.cost.answer import roofline_ms

        if self.by_time or self.device is None:
            return None
        return roofline_ms(llm, self._asked(v, image), self.device, self.itemsize)

    def _asked(self, v: float, image: Image | None) -> Asked:
        from vlmscale.cost.answer import Asked

        flops, query = (image.flops, image.query_pass) if image else (0.0, False)
        prompt = self.text_tokens + v
        return Asked(prompt, self.gen_tokens, self.batch, flops, self.text_tokens if query else 0.0)

    def describe(self) -> str:
        """What an answer is, and how it is charged."""
        text = f"an answer, Q = {self.text_tokens:g} text tokens, {self.gen_tokens:g} decoded"
        if self.batch != 1:
            text += f", batches of {self.batch:g}"
        if self.timed:
            return f"{text}, timed on {self.timed.device} ({self.timed.dtype})"
        if self.device:
            what = "at least" if self.by_time else "times at least those"
            return f"{text}, {what} on {self.device.kind} (roofline; no program reaches it)"
        return text


def _advise(arguments: argparse.Namespace, overrides: list[str]) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on a device
    from analysis.advice import advise, groups_of, measured_methods, read_record, show, show_methods
    from analysis.record import plain
    from analysis.values import DataError
    from vlmscale.cost.menu import Listed

    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be above 0")
    try:
        record = read_record(arguments.law)
        groups = groups_of(record, arguments.group)
        price, budget = _price(arguments, record)
        found, said = [], []
        for group in groups:
            candidates, remarks = _candidates(group, price, arguments)

            def off_menu(n: float, v: float, cells: Any = group["data"]["cells"]) -> float:
                listed = Listed("", n, None)
                return price.of(price.shape(listed), v, _image(listed, v, cells, price, arguments))

            advice = advise(group, candidates, budget, arguments.top, off_menu)
            method = arguments.compressor or _method(group["group"])
            found.append({**plain(advice), "method": method, "remarks": remarks})
            text = show(advice, budget, price.unit, price.describe() + (f", {method}" if method else ""))
            said += [text, *(f"  {line}" for line in remarks)]
        methods = measured_methods(record, _of_points(record, price), budget, arguments.top)
    except DataError as error:
        raise UserError(str(error)) from error
    if not groups:
        raise UserError(f"{arguments.law}: no task group has a cell with an image")
    if arguments.json:
        answer = {"text_tokens": price.text_tokens, "gen_tokens": price.gen_tokens, "batch": price.batch}
        head = {"budget": budget, "unit": price.unit, **answer, "cost": price.describe()}
        print(json.dumps({**head, "groups": found, "methods": [item._asdict() for item in methods]}))
        return 0
    if record["methods"]:
        said.append(show_methods(methods, price.unit))
    print("\n".join(said))
    return 0


def _price(arguments: argparse.Namespace, record: dict[str, Any]) -> tuple[_Price, float]:
    """How an answer is charged, and the budget in that unit."""
    from analysis.latency import read_latency
    from vlmscale.cost.peak import find_device

    budget, in_ms = _budget(arguments.budget)
    q = arguments.text_tokens
    if q is None:
        recorded = record["cost"].get("text_tokens")
        q = _TEXT_TOKENS if recorded is None else recorded
    for option, value, least in (
        ("--text-tokens", q, 0.0),
        ("--gen-tokens", arguments.gen_tokens, 0.0),
        ("--batch", arguments.batch, 1.0),
    ):
        if not least <= value < 1e9:
            raise UserError(f"{option} {value:g}: must be a number of at least {least:g}")
    timed = read_latency(arguments.latency, "shape") if arguments.latency else None
    device = find_device(arguments.device) if arguments.device else None
    if timed is not None:
        if not in_ms:
            raise UserError(f"--budget {arguments.budget}: with --latency it is a time, such as 40ms")
        if device is not None and device.kind != timed.device:
            raise UserError(
                f"--device {arguments.device}: {arguments.latency} was measured on {timed.device}"
            )
        if arguments.tower or arguments.compressor:
            raise UserError(
                f"--tower and --compressor: {arguments.latency} says what was timed; leave them out"
            )
        timed = replace(timed, text_tokens=q, gen_tokens=arguments.gen_tokens, batch=arguments.batch)
    elif in_ms and device is None:
        raise UserError(
            f"--budget {arguments.budget}: a time needs --latency FILE, or --device for a roofline"
        )
    elif device is None and arguments.batch != 1:
        raise UserError(f"--batch {arguments.batch:g}: FLOPs do not depend on it; give --device or --latency")
    if bool(arguments.tower) != bool(arguments.compressor):
        raise UserError("--tower and --compressor: an image needs both; give both, or neither")
    return _Price(q, arguments.gen_tokens, arguments.batch, timed, device, in_ms), budget


def _budget(text: str) -> tuple[float, bool]:
    """(the number, whether it is in milliseconds)."""
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(ms)?\s*", text)
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not 0 < value < math.inf:
        raise UserError(f"--budget {text}: must be FLOPs such as 5e12, or a time such as 40ms")
    return value, found[2] is not None


def _candidates(
    group: dict[str, Any], price: _Price, arguments: argparse.Namespace
) -> tuple[list[Any], list[str]]:
    """The menu of a task group with its costs, and what a reader should know about them."""
    from analysis.advice import Candidate
    from vlmscale.cost.menu import list_llms

    data = group["data"]
    wanted = names(arguments.llm, "--llm") if arguments.llm else ()
    llms = list_llms(data["cells"], data["origin"], wanted, price.itemsize)
    counts: list[float] = sorted({cell["v"] for cell in data["cells"]})
    if arguments.visual_tokens:
        counts = [float(v) for v in whole_numbers(arguments.visual_tokens, "--visual-tokens")]
    found, imageless = [], set()
    for listed in llms:
        for v in counts:
            image = _image(listed, v, data["cells"], price, arguments)
            imageless |= {v} if image is None else set()
            asked = price.shape(listed), v, image
            cost, least = price.of(*asked), price.least_ms(*asked)
            found.append(Candidate(listed.name, listed.n, v, cost, least))
    unknown = [listed.name for listed in llms if listed.llm is None]
    remarks = []
    if unknown:
        remarks.append(
            f"{', '.join(unknown)}: not in vlmscale's table; charged as decoders of usual proportions"
        )
    if price.timed is not None:
        low, high = price.timed.sizes
        beyond = [listed.name for listed in llms if not low * 0.99 <= listed.n <= high * 1.01]
        if beyond:
            remarks.append(f"{', '.join(beyond)}: beyond the LLMs of {arguments.latency}; times extrapolated")
    if price.timed is not None and price.timed.images is None:
        remarks.append("the vision tower and the compressor are not in the times")
    elif price.timed is None and imageless:
        which = "the" if len(imageless) == len(counts) else "some"
        remarks.append(
            f"{which} cells name no FLOPs of a vision tower, which then are not in the cost; give --tower"
        )
    return found, remarks


def _method(group: str) -> str:
    """The compressor that a group is of, as its name says: "ocr (pool)", or ""."""
    found = re.search(r"\((.*)\)$", group)
    return found[1] if found else ""


def _image(
    listed: Listed, v: float, cells: list[dict[str, Any]], price: _Price, arguments: argparse.Namespace
) -> Image | None:
    """What an image costs before the LLM: as asked, or as the cells say."""
    from vlmscale.cost.menu import chosen_image, measured_image

    if not arguments.tower:
        return measured_image(cells, v)
    return chosen_image(arguments.tower, arguments.compressor, listed, round(v), price.text_tokens)


def _of_points(record: dict[str, Any], price: _Price) -> Callable[[str, dict[str, Any]], float | None]:
    """The cost of an answer at a measured point of a method."""
    from vlmscale.cost.menu import Image, list_llms

    data = record["data"]
    sizes = {item["llm_name"]: item["n"] for item in record["methods"]}

    def of(name: str, point: dict[str, Any]) -> float | None:
        cells = [{"llm_name": name, "n": sizes[name]}]
        listed = list_llms(cells, data["origin"], (), price.itemsize)[0]
        flops = (point["tower_flops"] or 0.0) + (point["compressor_flops"] or 0.0)
        return price.of(price.shape(listed), point["v"], Image(flops, bool(point["query_flops"])))

    return of
