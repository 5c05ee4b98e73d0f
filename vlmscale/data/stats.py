"""What a prepared data set holds: counts, lengths, picture sizes and mixes, as a dict, a table and a figure.

All but the token lengths comes from the index and the manifest, so no record is read and no picture decoded.
The dict is plain JSON with the histograms in it: table and figure are drawn from it alone.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)

from vlmscale.data.assemble import PICTURES
from vlmscale.data.dataset import Dataset
from vlmscale.data.lengths import Lengths
from vlmscale.errors import UserError

FIGURES = ("stats.png", "stats.svg")
MODALITIES = ("text alone", "one image", "several images")
_MOST_BINS = 40
_MANY = 6  # turns and images a record from here on share one bar
_NAMED = 9  # tasks and folders of table and figure; the rest is one line
_WIDTH = 80  # columns of a terminal
_BLUE, _ORANGE, _DARK, _GREY = "#0072B2", "#D55E00", "#333333", "#777777"
_STYLE = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "vlmscale",
}
_ASPECTS = {0.25: "1:4", 0.5: "1:2", 1.0: "1:1", 2.0: "2:1", 4.0: "4:1"}
_FINE_ASPECTS = {2 / 3: "2:3", 3 / 2: "3:2"}  # where there is room


def summarise(dataset: Dataset, lengths: Lengths | None = None, template: str = "") -> dict[str, Any]:
    """Statistics of one split, ready for JSON.

    Args:
      dataset: of `open_dataset`.
      lengths: of the same split, if its tokens are known.
      template: what `lengths` was measured with, for the headings.

    Returns:
      Counts: `records`, `pictures`, `images_shown`, `modality`, `tasks`, `disk` (bytes); of all splits
      together `folders` (files that records name), `formats`, `modes`, `quarantined`, `duplicate_ids`.
      Spreads (see `spread`) over records of `images`, `turns`, `words`, and over distinct pictures of
      `width`, `height` (pixels), `megapixels`, `aspect` (width over height), `bytes` (encoded). `tokens`, of
      `lengths`: see `token_statistics`.
      `histograms`, each with `edges` [b + 1] and `counts` [b].

    Raises:
      UserError: `lengths` belongs to another data set, or a file of the data set is damaged.
    """
    index, manifest = dataset.index, dataset.manifest
    images = np.diff(index.image_offsets)
    if lengths is not None and len(lengths.text) != len(images):
        raise UserError(
            f"{dataset.path}: {len(images)} records in {dataset.split}, and token lengths of "
            f"{len(lengths.text)}: measure them again"
        )
    width, height = index.picture_width.astype(np.int64), index.picture_height.astype(np.int64)
    columns = {
        "images": images,
        "turns": index.turns,
        "words": index.words,
        "width": width,
        "height": height,
        "megapixels": width * height / 1e6,
        "aspect": width / height,
        "bytes": index.picture_bytes,
    }
    kinds = np.bincount(np.minimum(images, 2), minlength=3)
    tasks = np.bincount(index.task, minlength=len(manifest["tasks"]))
    named = {name: int(count) for name, count in zip(manifest["tasks"], tasks, strict=True) if count}
    stats: dict[str, Any] = {
        "name": dataset.path.resolve().name,
        "split": dataset.split,
        "records": len(images),
        "pictures": len(width),
        "images_shown": len(index.picture),
        "disk": manifest["bytes"][dataset.split],
        "modality": {name: int(count) for name, count in zip(MODALITIES, kinds, strict=True)},
        "tasks": _by_count(named),
        "folders": _folders(dataset.path),
        "formats": _by_count(manifest["formats"]),
        "modes": _by_count(manifest["modes"]),
        "quarantined": _by_count(manifest["quarantined"]),
        "duplicate_ids": manifest["duplicate_ids"],
        **{name: spread(values) for name, values in columns.items()},
        "histograms": {
            "words": _histogram(index.words, _whole_edges(index.words)),
            "turns": _histogram(np.minimum(index.turns, _MANY), np.arange(1, _MANY + 2)),
            "images": _histogram(np.minimum(images, _MANY), np.arange(_MANY + 2)),
            "megapixels": _histogram(columns["megapixels"], _log_edges(columns["megapixels"])),
            "aspect": _histogram(columns["aspect"], _log_edges(columns["aspect"])),
        },
    }
    if lengths is not None:
        stats["tokens"] = token_statistics(lengths, template)
        edges = _whole_edges(lengths.text)
        stats["histograms"]["text_tokens"] = _histogram(lengths.text, edges)
        stats["histograms"]["supervised_tokens"] = _histogram(lengths.supervised, edges)
    return stats


def token_statistics(lengths: Lengths, template: str) -> dict[str, Any]:
    """Spreads of the tokens of each record, as the manifest keeps them.

    Returns:
      `template`; `text` (all but images), `supervised` and `query` (spreads); `unsupervised`, the number of
      records that have nothing to learn from; `cut`, of those whose tail was cut off.
    """
    return {
        "template": template,
        "text": spread(lengths.text),
        "supervised": spread(lengths.supervised),
        "query": spread(lengths.query),
        "unsupervised": int(np.count_nonzero(lengths.supervised == 0)),
        "cut": int(np.count_nonzero(lengths.text < lengths.whole)),
    }


def spread(values: np.ndarray) -> dict[str, float] | None:
    """Least, percentiles, mean, most and total of [n] numbers; None where there are none."""
    if not len(values):
        return None
    low, p5, median, p95, high = (float(x) for x in np.percentile(values, (0, 5, 50, 95, 100)))
    mean, total = float(np.mean(values, dtype=np.float64)), float(np.sum(values, dtype=np.float64))
    return {"least": low, "p5": p5, "median": median, "mean": mean, "p95": p95, "most": high, "total": total}


def table(stats: Mapping[str, Any]) -> str:
    """The statistics as text of at most 80 columns."""
    size = f" ({_size(stats['bytes']['total'])})" if stats["bytes"] else ""
    heads = ("least", "5%", "median", "mean", "95%", "most")
    lines = [
        f"{stats['name']}, split {stats['split']}: {stats['records']:,} records, "
        f"{_size(stats['disk'])} on disk",
        f"{stats['pictures']:,} distinct pictures{size}, shown {stats['images_shown']:,} times",
        "",
        f"{'':21}" + "".join(f"{head:>9}" for head in heads),
    ]
    rows = [("images a record", "images", 1.0), ("turns a record", "turns", 1.0), ("words", "words", 1.0)]
    lines += [_row(heading, stats[key], unit) for heading, key, unit in rows]
    if "tokens" in stats:
        tokens, name = stats["tokens"], stats["tokens"]["template"]
        lines += [_row(f"text tokens ({name})", tokens["text"]), _row("supervised", tokens["supervised"])]
    rows = [
        ("width, pixels", "width", 1.0),
        ("height, pixels", "height", 1.0),
        ("megapixels", "megapixels", 1.0),
        ("width / height", "aspect", 1.0),
        ("kilobytes a picture", "bytes", 1e3),
    ]
    lines += [_row(heading, stats[key], unit) for heading, key, unit in rows if stats[key]]
    lines += _block("modality", stats["modality"])
    lines += _block("tasks", _shortened(stats["tasks"], "no task named") if any(stats["tasks"]) else {})
    lines += _block("picture files named, all splits", _shortened(stats["folders"], "in no folder"))
    lines += _block("formats, all splits", stats["formats"])
    lines += _block("modes, all splits", stats["modes"])
    lines += _block("quarantined, all splits", stats["quarantined"])
    lines.append("")
    if "tokens" in stats:
        text, supervised = (stats["tokens"][key]["total"] for key in ("text", "supervised"))
        lines += [
            f"text tokens in all: {text:,.0f}, {100 * supervised / text:.1f}% of them supervised",
            f"records that are cut: {stats['tokens']['cut']:,}; without a supervised token: "
            f"{stats['tokens']['unsupervised']:,}",
        ]
    lines.append(f"records whose id was seen before: {stats['duplicate_ids']:,}")
    return "\n".join(lines)


def plot(stats: Mapping[str, Any], out: Path) -> list[Path]:
    """One figure of small multiples, written as PNG and SVG.

    Args:
      stats: of `summarise`, or its JSON read back.
      out: the folder; it is made where it is missing.

    Returns:
      The two files.

    Raises:
      UserError: `out` cannot be written.
    """
    paths = [out / name for name in FIGURES]
    with rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(hspace=0.07, wspace=0.05)
        figure = Figure(figsize=(7.6, 8.2), layout=layout)
        axes = figure.subplots(3, 2)
        figure.suptitle(
            _plain(f"{stats['name']}, {stats['split']}: {stats['records']:,} records"),
            x=0.01,
            ha="left",
            fontsize=12,
        )
        _lengths(axes[0, 0], stats)
        _few(axes[0, 1], stats["histograms"]["turns"], 1, "Turns a record")
        _few(axes[1, 0], stats["histograms"]["images"], 0, "Images a record")
        _mix(axes[1, 1], stats)
        _megapixels(axes[2, 0], stats)
        _aspect(axes[2, 1], stats)
        try:
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(paths[0], dpi=150, metadata={"Software": None})
            figure.savefig(paths[1], metadata={"Date": None})
        except OSError as error:
            raise UserError(f"{out}: the figure cannot be written ({error.strerror or error})") from None
    return paths


def _folders(path: Path) -> dict[str, int]:
    """How many picture files the records name in each first folder: what LLaVA's mix tells its parts by."""
    file = path / PICTURES
    try:
        with np.load(file, allow_pickle=False) as saved:
            names = json.loads(saved["names"].tobytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy it again, or prepare anew") from None
    return _by_count(Counter(name.split("/", 1)[0] if "/" in name else "" for name in names))


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _whole_edges(values: np.ndarray) -> np.ndarray:
    """Edges for whole numbers, evenly apart on a log scale where that is more than 1; 0 counts as 1."""
    most = int(values.max(initial=1))
    return np.unique(np.round(np.geomspace(1, most + 1, _bins(values) + 1)))


def _log_edges(values: np.ndarray) -> np.ndarray:
    """Edges evenly apart on a log scale, at least a factor of 2 in all."""
    if not len(values):
        return np.array([1.0, 2.0])
    low, high = float(values.min()), float(values.max())
    stretch = max(1.0, (2 * low / high) ** 0.5)
    # A hair wider than the values, so that rounding leaves none outside.
    return np.geomspace(low / stretch * (1 - 1e-9), high * stretch * (1 + 1e-9), _bins(values) + 1)


def _bins(values: np.ndarray) -> int:
    """Fewer for small sets (Rice's rule), whose fine histograms would be noise."""
    return int(np.clip(2 * len(values) ** (1 / 3), 6, _MOST_BINS))


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, list[float]]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"edges": [float(x) for x in edges], "counts": [int(x) for x in counts]}


def _row(heading: str, values: Mapping[str, float], unit: float = 1.0) -> str:
    numbers = (values[key] / unit for key in ("least", "p5", "median", "mean", "p95", "most"))
    return f"{heading:21.21}" + "".join(f"{_number(x):>9}" for x in numbers)


def _number(value: float) -> str:
    """Three significant digits, or all of a whole number: 0.307, 52.4, 1,204."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _size(count: float) -> str:
    """Bytes with three significant digits: 17.9 GB."""
    steps = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((step for step in steps if count >= step[0]), steps[-1])
    return f"{_number(count / unit)} {name}"


def _shortened(counts: Mapping[str, int], unnamed: str) -> dict[str, int]:
    """The largest, the sum of the rest, and those without a name."""
    items = [(name, count) for name, count in counts.items() if name]
    shown, rest = dict(items[:_NAMED]), items[_NAMED:]
    if rest:
        shown[f"{len(rest)} more"] = sum(count for _, count in rest)
    return shown | ({unnamed: counts[""]} if "" in counts else {})


def _block(heading: str, counts: Mapping[str, int]) -> list[str]:
    """A heading and a line for each count with its share and a bar; nothing where nothing was counted."""
    total = sum(counts.values())
    if not total:
        return []
    lines = ["", heading]
    for name, count in counts.items():
        bar = "#" * round(26 * count / total)
        lines.append(f"  {name:31.31} {count:>9,} {100 * count / total:5.1f}%  {bar}".rstrip()[:_WIDTH])
    return lines


def _plain(text: str) -> str:
    """`text` with nothing that matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def _shares(histogram: Mapping[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """(edges [b + 1], percent of all [b])."""
    counts = np.array(histogram["counts"], np.float64)
    return np.array(histogram["edges"]), 100 * counts / max(counts.sum(), 1.0)


def _percent(axes: Axes, label: str = "") -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
    axes.set_ylabel(label)
    axes.grid(False, axis="x")


def _median(axes: Axes, value: float) -> None:
    """A line at the median, with its number beside the top of the panel."""
    axes.axvline(value, color=_DARK, lw=1, ls=(0, (4, 2)))
    axes.annotate(
        f"median {_number(value)}",
        (value, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        color=_DARK,
        fontsize=9,
    )


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if _decades(axes) < 2 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _decades(axes: Axes) -> float:
    low, high = axes.get_xlim()
    return float(np.log10(high / low))


def _lengths(axes: Axes, stats: Mapping[str, Any]) -> None:
    """Text tokens and supervised ones where they are known, else words; in percent a doubling of length."""
    drawn = [("words", stats["words"], "words", _BLUE)]
    axes.set_title("Words a record")
    if "tokens" in stats:
        tokens = stats["tokens"]
        axes.set_title(_plain(f"Tokens a record ({tokens['template']})"))
        drawn = [
            ("text_tokens", tokens["text"], "text", _BLUE),
            ("supervised_tokens", tokens["supervised"], "supervised", _ORANGE),
        ]
    first = float("inf")
    for key, values, name, colour in drawn:
        edges, shares = _shares(stats["histograms"][key])
        heights = shares / np.log2(edges[1:] / edges[:-1])
        label = f"{name}, median {_number(values['median'])}"
        axes.stairs(heights, edges, fill=True, alpha=0.25, color=colour)
        axes.stairs(heights, edges, color=colour, lw=1.3, label=label)
        axes.axvline(values["median"], 0, 0.78, color=colour, lw=1, ls=(0, (4, 2)))
        filled = edges[np.flatnonzero(shares)]
        first = min(first, float(filled.min(initial=edges[-1])))
    axes.legend(loc="upper left", fontsize=8.5, handlelength=1.2, borderaxespad=0.2)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # leaves room for the legend
    axes.set_xlim(first, edges[-1])
    _log_axis(axes)
    _percent(axes, "records per doubling of length")


def _few(axes: Axes, histogram: Mapping[str, list[float]], first: int, title: str) -> None:
    """Bars for small whole numbers; the last one holds all above."""
    _, shares = _shares(histogram)
    shares = shares[: max(4, int(np.flatnonzero(shares).max(initial=0)) + 1)]
    numbers = np.arange(first, first + len(shares))
    bars = axes.bar(numbers, shares, color=_BLUE, width=0.75)
    axes.bar_label(bars, [f"{x:.1f}%" if x else "" for x in shares], fontsize=8.5, color=_DARK, padding=1)
    axes.set_xticks(numbers, [f"{x}+" if x == _MANY else str(x) for x in numbers])
    axes.set_title(title)
    axes.set_ylim(0, shares.max(initial=1) * 1.12)
    _percent(axes, "records")


def _mix(axes: Axes, stats: Mapping[str, Any]) -> None:
    """Records by task; where none names its task, picture files by folder."""
    by_task = any(stats["tasks"]) or not stats["folders"]
    axes.set_title("Tasks" if by_task else "Picture files by folder")
    if by_task and not any(stats["tasks"]):
        return _nothing(axes, "no record names its task")
    names = _shortened(stats["tasks"], "no task named")
    if not by_task:
        names = _shortened(stats["folders"], "in no folder")
    shares = 100 * np.array(list(names.values())) / sum(names.values())
    places = np.arange(len(shares))
    bars = axes.barh(places, shares, color=_BLUE, height=0.75)
    axes.bar_label(bars, [f"{x:.1f}%" for x in shares], fontsize=8.5, color=_DARK, padding=2)
    axes.set_yticks(places, [_plain(name if len(name) <= 22 else name[:21] + "…") for name in names])
    axes.set_ylim(max(len(shares), 5) - 0.5, -0.5)
    axes.set_xlim(0, shares.max() * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}%"))
    axes.grid(False, axis="y")
    return None


def _megapixels(axes: Axes, stats: Mapping[str, Any]) -> None:
    axes.set_title("Picture size, megapixels")
    if not stats["pictures"]:
        return _nothing(axes, "no pictures")
    edges, shares = _shares(stats["histograms"]["megapixels"])
    axes.stairs(shares, edges, fill=True, color=_BLUE)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, shares.max() * 1.15)  # leaves room for the label
    _median(axes, stats["megapixels"]["median"])
    _log_axis(axes)
    _percent(axes, "distinct pictures")
    return None


def _aspect(axes: Axes, stats: Mapping[str, Any]) -> None:
    axes.set_title("Picture shape, width : height")
    if not stats["pictures"]:
        return _nothing(axes, "no pictures")
    edges, shares = _shares(stats["histograms"]["aspect"])
    axes.stairs(shares, edges, fill=True, color=_BLUE)
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    ticks = _ASPECTS | (_FINE_ASPECTS if _decades(axes) < 1.2 else {})
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FixedFormatter(list(ticks.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    _percent(axes, "distinct pictures")
    return None


def _nothing(axes: Axes, text: str) -> None:
    """A panel that says why it is empty."""
    axes.set_axis_off()
    axes.text(0.0, 0.9, text, color=_GREY, transform=axes.transAxes, va="top")
