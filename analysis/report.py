"""`write_report`: from a sweep's rows to one HTML page, the same in Markdown, figures and a JSON with all
digits.
"""

from __future__ import annotations

import hashlib
import html
import json
import platform
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis import plots, prose
from analysis.data import BUILT_IN, Dataset, load
from analysis.document import (
    Block,
    Bullets,
    Grid,
    Heading,
    Picture,
    Pictures,
    Small,
    Text,
    to_html,
    to_markdown,
)
from analysis.laws import LAWS
from analysis.record import dataset_record, study_record
from analysis.study import Study, study
from analysis.tables import cell_table, deploy_table, falling_table, law_table
from analysis.units import tokens

PAPER_ORIGIN = "arXiv 2411.03312"


class _Gallery:
    """Draws each figure once into both forms: inline SVG for the page, PNG beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def add(self, name: str, figure: Figure, caption: str) -> Picture:
        """Write `name`.png, return the picture with its SVG; a second one of that name gets a number."""
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "figure"
        unique, number = stem, 2
        while unique in self.names:
            unique, number = f"{stem}-{number}", number + 1
        self.names.append(unique)
        plots.to_png(figure, self.folder / f"{unique}.png")
        return Picture(unique, plots.to_svg(figure, unique, html.escape(caption, quote=True)), caption)


def write_report(source: Path | str, out: Path, *, bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Analyse `source` (see `data.load`) and write report.html, report.md, figures/*.png and analysis.json
    into `out`.

    Returns what analysis.json holds. The same data, bootstrap and seed give the same JSON, byte for byte.
    Raises DataError for data that cannot be read, ValueError for bootstrap < 1, OSError if `out` cannot be
    written.
    """
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}")
    dataset = load(source)
    published = dataset.source in BUILT_IN
    kind = "this data" if dataset.source.endswith(".csv") else "this sweep"
    origin = PAPER_ORIGIN if published else kind
    studies = [study(table, origin, bootstrap, seed) for table in dataset.tables]
    paper_sets = [] if published else [load(name) for name in BUILT_IN]
    paper = [study(item.tables[0], PAPER_ORIGIN, bootstrap, seed) for item in paper_sets]
    figures = Path(out) / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    gallery = _Gallery(figures)
    blocks = _blocks(dataset, studies, paper, gallery, bootstrap, seed)
    result = {
        "data": dataset_record(dataset),
        "bootstrap": bootstrap,
        "seed": seed,
        "versions": _versions(),
        "groups": [study_record(item) for item in studies],
        "paper": [study_record(item) for item in paper],
        "paper_data": [dataset_record(item) for item in paper_sets],
        "figures": [f"figures/{name}.png" for name in gallery.names],
    }
    title = "LLM size or visual tokens: what " + (f"{origin} published" if published else f"{kind} says")
    (Path(out) / "report.md").write_text(to_markdown(title, blocks), encoding="utf-8")
    text = json.dumps(result, indent=1, allow_nan=False)
    (Path(out) / "analysis.json").write_text(text + "\n", encoding="utf-8")
    # Last and by rename: where the page exists, the rest does too.
    page = Path(out) / ".report.html.tmp"
    page.write_text(to_html(title, blocks), encoding="utf-8")
    page.replace(Path(out) / "report.html")
    return result


def _versions() -> dict[str, str]:
    """Versions, and a hash of this package's code, which together fix every digit of the result."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "analysis_code_sha256": code.hexdigest(),
    }


def _blocks(
    dataset: Dataset, studies: list[Study], paper: list[Study], gallery: _Gallery, bootstrap: int, seed: int
) -> list[Block]:
    blocks: list[Block] = [Text(prose.summary(dataset, studies, paper), lead=True)]
    blocks += _cost_section(studies, paper, gallery)
    blocks += _law_section(studies, paper, gallery)
    blocks += [
        Heading("Does more help, without any law?"),
        Text("Neighbouring cells, one step apart along one axis; V = 0 (no image) is not counted."),
        falling_table([*studies, *paper]),
    ]
    blocks += _token_section(studies, paper, gallery)
    blocks += _deploy_section(studies, paper)
    blocks += [Heading("All cells"), cell_table(studies)]
    blocks += [Heading("What this data cannot tell"), Bullets(tuple(prose.limits(dataset, studies)))]
    blocks += [Heading("Reproduce"), _footer(dataset, bootstrap, seed)]
    return blocks


def _beside(item: Study, paper: list[Study]) -> list[Study]:
    """The study, and the paper's of the same group where there is one."""
    return [item, *(other for other in paper if item.table.group.split(" (")[0] == other.table.group)]


def _cost_section(studies: list[Study], paper: list[Study], gallery: _Gallery) -> list[Block]:
    pictures = []
    for item in studies:
        for one in _beside(item, paper):
            if one.table.n.size:
                pictures.append(_cost_picture(one, gallery))
    text = (
        "One curve an LLM size, one marker a token count; to the right costs more, lower is better. The "
        "grey trail joins the cells that no cheaper cell beats. The dashed orange line is the best that "
        "the fitted law promises for each cost inside the measured range; it is drawn only where the law "
        "is identified."
    )
    return [Heading("Error against inference cost"), Text(text), Pictures(tuple(pictures))]


def _cost_picture(item: Study, gallery: _Gallery) -> Picture:
    blind = " Dashed horizontal lines: the same LLMs without an image." if item.table.blind else ""
    caption = (
        f"{item.table.group}, {item.origin}: error against LLM prefill FLOPs at Q = {tokens(item.q)}.{blind}"
    )
    name = f"{item.table.group}-cost" + ("-paper" if item.origin == PAPER_ORIGIN else "")
    return gallery.add(name, plots.cost_figure(item), caption)


def _law_section(studies: list[Study], paper: list[Study], gallery: _Gallery) -> list[Block]:
    formulas = "; ".join(f"{law.name}: {law.formula}" for law in LAWS.values())
    blocks: list[Block] = [
        Heading("Laws"),
        Text(
            f"{formulas}. N in billions of parameters, fitted by least squares on the error itself. The "
            "ratio is the coefficient of ln N over that of ln V. A ratio is given only if the "
            "95% bootstrap intervals of both coefficients and of the ratio are positive and finite."
        ),
    ]
    for item in studies:
        both = _beside(item, paper)
        blocks.append(Heading(item.table.group, 3))
        blocks.append(Text(prose.choice_of_law(item)))
        if any(one.fits for one in both):
            blocks.append(law_table(both))
        blocks.append(Pictures(tuple(_law_picture(one, gallery) for one in both if one.table.n.size)))
        notes = [note for one in both for note in prose.quality_notes(one)]
        if notes:
            blocks.append(Bullets(tuple(notes)))
    return blocks


def _law_picture(item: Study, gallery: _Gallery) -> Picture:
    what = (
        f"the {item.best.law.name} law and its 95% bootstrap band"
        if item.best and item.best.converged
        else "no law could be fitted"
    )
    name = f"{item.table.group}-law" + ("-paper" if item.origin == PAPER_ORIGIN else "")
    caption = f"{item.table.group}, {item.origin}: error against visual tokens; markers are cells; {what}."
    return gallery.add(name, plots.law_figure(item), caption)


def _token_section(studies: list[Study], paper: list[Study], gallery: _Gallery) -> list[Block]:
    text = (
        "At a fixed cost 2N(Q + V), the law's best V is Q / (ratio - 1), whatever the budget, as long as "
        "it lies inside the measured V; Q is the number of text tokens. Bands are 95% bootstrap intervals."
    )
    blocks: list[Block] = [Heading("How many visual tokens: V*(Q)"), Text(text)]
    pictures = []
    for name, group, title in (("tokens", studies, studies[0].origin), ("tokens-paper", paper, PAPER_ORIGIN)):
        figure = plots.tokens_figure(group, title) if group else None
        if figure is not None:
            pictures.append(
                gallery.add(name, figure, f"Best number of visual tokens against text tokens, {title}.")
            )
    if pictures:
        blocks.append(Pictures(tuple(pictures)))
    blocks.append(Bullets(tuple(prose.token_statement(item) for item in [*studies, *paper])))
    return blocks


def _deploy_section(studies: list[Study], paper: list[Study]) -> list[Block]:
    text = (
        "Three budgets inside the measured range of costs. The measured cell is the one of least error "
        "within the budget, so its error is a little flattering; the law's pick is its best among the "
        "measured LLMs and token counts, and the last columns are what it would choose with LLMs of any "
        "size. One residual sd tells how flat the optimum is: any V in that range is as good as this data "
        "can tell."
    )
    grids: list[Grid] = [
        deploy_table(one) for item in studies for one in _beside(item, paper) if one.deployments
    ]
    if not grids:
        return [
            Heading("What to deploy at three budgets"),
            Text("No complete cell with an image, so no advice."),
        ]
    return [Heading("What to deploy at three budgets"), Text(text), *grids]


def _footer(dataset: Dataset, bootstrap: int, seed: int) -> Small:
    versions = _versions()
    origin = [f"Data: {dataset.source}, {prose.plural(dataset.rows, 'row')}, sha256 {dataset.sha256}."]
    for label, values in (
        ("vlmscale", dataset.versions),
        ("commit", dataset.commits),
        ("device", dataset.devices),
    ):
        if values:
            origin.append(f"Rows written by {label}: {', '.join(values)}.")
    return Small(
        (
            *origin,
            f"Bootstrap: {bootstrap} resamples of the residuals, seed {seed}.",
            "Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
            f"Published numbers: {prose.PAPER}, from its released scaling_law_code/values.py; their known "
            "defects are in analysis/paper_data/README.md.",
            f"Again: python -m analysis DATA --out DIR --bootstrap {bootstrap} --seed {seed}",
        )
    )
