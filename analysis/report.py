"""`write_report`: from a sweep's rows to one HTML page, the same in Markdown, figures and a JSON with all
digits.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from analysis import figures, plots, prose
from analysis.claims import claims
from analysis.cost import FlopsCost
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
from analysis.limits import limits, limits_of_methods
from analysis.record import analysis_record, to_json, versions
from analysis.study import PAPER_ORIGIN, Analysis, Options, Study, analyze
from analysis.tables import (
    cell_table,
    comparison_table,
    deploy_table,
    design_table,
    falling_table,
    law_table,
    method_table,
    multiplier_table,
    task_table,
)

METHODS = "Methods compared"
_MOST_SLOPES = 8  # tables of slopes a task, where methods are compared without a law
_MOST_ROWS = 500  # of the table of cells


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

    def of(
        self, study: Study, name: str, draw: Callable[[Study], Figure | None], caption: str
    ) -> list[Picture]:
        """The figure of one study as a list, empty where there is nothing to draw."""
        figure = draw(study)
        if figure is None:
            return []
        suffix = "-paper" if study.origin == PAPER_ORIGIN else ""
        text = f"{study.table.group}, {study.origin}: {caption}"
        return [self.add(f"{study.table.group}-{name}{suffix}", figure, text)]


def write_report(
    source: Path | str | Sequence[Path | str], out: Path, options: Options | None = None
) -> dict[str, Any]:
    """Analyse `source` (one or several, see `data.load`) and write report.html, report.md, figures/*.png and
    analysis.json into `out`.

    Returns what analysis.json holds. The same data and options give the same JSON, byte for byte.
    Raises DataError for data that cannot be read, ValueError for options that make no sense, OSError if `out`
    cannot be written.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    return report_of(analyze(sources, options or Options(), beside_paper=True), out)


def report_of(analysis: Analysis, out: Path) -> dict[str, Any]:
    """Write the report of an analysis that is there already; see `write_report`."""
    folder = Path(out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    gallery = _Gallery(folder)
    blocks = _blocks(analysis, gallery)
    result = analysis_record(analysis)
    origin = analysis.studies[0].origin
    title = (
        ("LLM size or visual tokens" if analysis.told else "Methods compared")
        + ": what "
        + (f"{origin} published" if analysis.published else f"{origin} says")
    )
    (Path(out) / "report.md").write_text(to_markdown(title, blocks), encoding="utf-8")
    (Path(out) / "analysis.json").write_text(to_json(result), encoding="utf-8")
    # Last and by rename: where the page exists, the rest does too.
    page = Path(out) / ".report.html.tmp"
    page.write_text(to_html(title, blocks), encoding="utf-8")
    page.replace(Path(out) / "report.html")
    return result


def _blocks(analysis: Analysis, gallery: _Gallery) -> list[Block]:
    studies, paper = list(analysis.told), list(analysis.paper)
    blocks = _methods_section(analysis, gallery)
    if studies:
        blocks += [Text(prose.summary(analysis.dataset, studies, paper), lead=True)]
        blocks += _law_blocks(analysis, studies, paper, gallery)
    elif len(analysis.studies) <= _MOST_SLOPES:
        blocks += _task_section(list(analysis.studies), gallery)
    notes = [*analysis.dataset.warnings, *limits(analysis.dataset, studies)]
    notes += limits_of_methods(analysis.comparisons) if analysis.comparisons else []
    blocks += [Heading("What this data cannot tell"), Bullets(tuple(dict.fromkeys(notes)))]
    return [*blocks, Heading("Reproduce"), _footer(analysis)]


def _methods_section(analysis: Analysis, gallery: _Gallery) -> list[Block]:
    """The methods beside each other: what a report on several compressors begins with."""
    if not analysis.comparisons:
        return []
    several = len(analysis.comparisons) > 1
    lead = " ".join(prose.methods_summary(item) for item in analysis.comparisons)
    reason = prose.no_law(list(analysis.studies))
    blocks: list[Block] = [Text(lead, lead=True), *([Text(reason)] if reason else []), Heading(METHODS)]
    blocks.append(
        Text(
            "Error is 1 - the plain mean score over the tasks, in the table also of each group of tasks; "
            "intervals are 95% from the sampling noise of the test items, where rows count them. FLOPs are "
            "those of one whole answer: vision tower, compressor, LLM, and a first pass over the query where "
            "a method makes one. V that is not whole is the mean count of a method whose count depends on "
            "the picture. Pareto-best: no point with as few tokens (by V) or FLOPs (by FLOPs) has as low an "
            "error."
        )
    )
    for item in analysis.comparisons:
        name = f"methods-{item.llm_name}" if several else "methods"
        caption = (
            f"{item.llm_name}: error against visual tokens and against inference FLOPs, a line a method in "
            "order of V. In a shaded column all points have the V of its tick and stand side by side. "
            "Vertical lines: 95% intervals. Rings: Pareto-best in that panel."
        )
        picture = gallery.add(name, plots.methods_figure(item), caption)
        blocks += [Pictures((picture,), wide=True), comparison_table(item)]
    return blocks


def _law_blocks(
    analysis: Analysis, studies: list[Study], paper: list[Study], gallery: _Gallery
) -> list[Block]:
    """All that follows from laws, and what the cells say without one."""
    blocks: list[Block] = []
    blocks += claims(studies) if analysis.published and studies[0].options.loss == "raw" else []
    blocks += _cost_section(studies, paper, gallery)
    blocks += _law_section(studies, paper, gallery)
    blocks += _ratio_section(studies, paper, gallery)
    blocks += [
        Heading("Does more help, without any law?"),
        Text("Neighbouring cells, one step apart along one axis; V = 0 (no image) is not counted."),
        falling_table([*studies, *paper]),
    ]
    blocks += _token_section(studies, paper, gallery)
    blocks += _deploy_section(studies, paper)
    blocks += _task_section(studies, gallery)
    blocks += _design_section(studies, gallery)
    return [*blocks, Heading("All cells"), _cells(studies)]


def _cells(studies: list[Study]) -> Block:
    count = max(study.table.n.size for study in studies)
    if count > _MOST_ROWS:
        return Text(f"{count} cells: too many for a page; they are in analysis.json.")
    return cell_table(studies)


def _beside(item: Study, paper: list[Study]) -> list[Study]:
    """The study, and the paper's of the same group where there is one."""
    return [item, *(other for other in paper if item.table.group.split(" (")[0] == other.table.group)]


def _both(studies: list[Study], paper: list[Study]) -> list[Study]:
    """Every study with cells, each followed by the paper's of the same group."""
    return [one for item in studies for one in _beside(item, paper) if one.table.n.size]


def _cost_section(studies: list[Study], paper: list[Study], gallery: _Gallery) -> list[Block]:
    pictures: list[Picture] = []
    for one in _both(studies, paper):
        blind = " Dashed horizontal lines: the same LLMs without an image." if one.table.blind else ""
        pictures += gallery.of(one, "cost", plots.cost_figure, f"error against {one.cost.describe()}.{blind}")
    text = (
        "One curve an LLM size, one marker a token count; to the right costs more, lower is better. The "
        "grey trail joins the cells that no cheaper cell beats. The dashed orange line is the best that the "
        "fitted law promises for each cost inside the measured range; it is drawn only where the law is "
        "identified."
    )
    return (
        [Heading("Error against inference cost"), Text(text), Pictures(tuple(pictures))] if pictures else []
    )


_FITTED = {
    "raw": "the error itself, by least squares",
    "log": "the logarithm of the error, by least squares",
    "huber": "the logarithm of the error, with Huber's loss",
    "binomial": "the error itself, by least squares with binomial weights and extra variance",
}


def _law_section(studies: list[Study], paper: list[Study], gallery: _Gallery) -> list[Block]:
    formulas = tuple(f"{law.name}: {law.formula}" for law in LAWS.values())
    blocks: list[Block] = [
        Heading("Laws"),
        Bullets(formulas),
        Text(
            "Y is the error, N in billions of parameters, V the visual tokens; fitted to "
            f"{_FITTED[studies[0].options.loss]}. The ratio is that of the local slopes along ln N and ln V "
            "at the centre of the cells (a/b, alpha/beta), and is given only if both slopes and the ratio "
            "have positive, finite 95% intervals."
        ),
    ]
    for item in studies:
        blocks += [Heading(item.table.group, 3), Text(prose.choice_of_law(item))]
        both = _beside(item, paper)
        blocks += [law_table(one) for one in both if one.laws]
        pictures: list[Picture] = []
        for one in both:
            if one.table.n.size:
                pictures += gallery.of(one, "law", plots.law_figure, _law_caption(one))
        pictures += _diagnostics(item, gallery)
        blocks.append(Pictures(tuple(pictures)))
        notes = [note for one in both for note in prose.quality_notes(one)] + [prose.single_index(item)]
        blocks.append(Bullets(tuple(note for note in notes if note)))
    return [block for block in blocks if not (isinstance(block, (Bullets, Pictures)) and not block.items)]


def _law_caption(study: Study) -> str:
    drawn = study.best is not None and study.best.fit.converged
    name = study.best.fit.law.name if study.best is not None else ""
    what = f"the {name} law and its 95% bootstrap band" if drawn else "no law could be fitted"
    return f"error against visual tokens; markers are cells; {what}."


def _diagnostics(study: Study, gallery: _Gallery) -> list[Picture]:
    pictures = gallery.of(
        study, "residuals", figures.residual_figure, "what the chosen law leaves of each cell."
    )
    return pictures + gallery.of(
        study,
        "normal",
        figures.normal_figure,
        "residuals against a normal distribution, with its 95% envelope.",
    )


def _ratio_section(studies: list[Study], paper: list[Study], gallery: _Gallery) -> list[Block]:
    known = [one for one in _both(studies, paper) if one.methods]
    if not known:
        return []
    text = (
        "Intervals of one law by every method. Profile F and the bootstraps take the cells as independent; "
        "the mixed-effects interval takes the LLMs (and token counts) as a sample, and is the one to quote "
        "for a new family of LLMs."
    )
    blocks: list[Block] = [Heading("How sure is the ratio"), Text(text)]
    for study in known:
        blocks.append(method_table(study))
    pictures: list[Picture] = []
    for study in known:
        pictures += gallery.of(
            study, "ratio", figures.ratio_figure, "how much worse the fit gets when the ratio is held."
        )
        pictures += gallery.of(
            study,
            "ridge",
            figures.ridge_figure,
            "the best exponents for each floor D that one may assume, and their ratio.",
        )
    return [*blocks, Pictures(tuple(pictures))] if pictures else blocks


def _token_section(studies: list[Study], paper: list[Study], gallery: _Gallery) -> list[Block]:
    text = (
        "At a fixed cost 2N(Q + V), the best V of a law of one index is Q / (ratio - 1), whatever the "
        "budget, as long as it lies inside the measured V. Q stands for all that is charged besides the "
        "visual tokens, in prefill tokens. Bands are 95% bootstrap intervals."
    )
    blocks: list[Block] = [Heading("How many visual tokens: V*(Q)"), Text(text)]
    pictures: list[Picture] = []
    for name, group in (("tokens", studies), ("tokens-paper", paper)):
        figure = plots.tokens_figure(group, group[0].origin) if group else None
        if figure is not None:
            caption = f"Best number of visual tokens against text tokens, {group[0].origin}."
            pictures.append(gallery.add(name, figure, caption))
    for study in _both(studies, paper):
        pictures += gallery.of(
            study,
            "choice",
            figures.choice_figure,
            "V* of the resamples, and the V that are practically as good.",
        )
    if pictures:
        blocks.append(Pictures(tuple(pictures)))
    blocks.append(Bullets(tuple(prose.token_statement(item) for item in [*studies, *paper])))
    return blocks + [multiplier_table(study) for study in studies if study.multiplier]


def _deploy_section(studies: list[Study], paper: list[Study]) -> list[Block]:
    text = (
        "Budgets inside the measured range of costs, unless you named your own. The measured cell is the "
        "one of least error within the budget, so its error is a little flattering; the law's pick is its "
        "best among the measured LLMs and token counts, and the last columns are what it would choose with "
        "LLMs of any size. One residual sd tells how flat the optimum is: any V in that range is as good as "
        "this data can tell."
    )
    grids: list[Grid] = [deploy_table(one) for one in _both(studies, paper) if one.deployments]
    heading = Heading("What to deploy for a budget")
    return (
        [heading, Text(text), *grids]
        if grids
        else [heading, Text("No complete cell with an image, so no advice.")]
    )


def _task_section(studies: list[Study], gallery: _Gallery) -> list[Block]:
    several = [study for study in studies if study.pooled is not None and len(study.pooled.tasks) > 1]
    if not several:
        return []
    text = (
        "Fall of error per unit of ln N and ln V, task by task, before any average. Partial pooling draws "
        "each slope towards the mean as far as its own uncertainty, against the spread between tasks, "
        "allows."
    )
    caption = "slopes of each task, alone and pooled."
    blocks = _tables_then_pictures(several, task_table, gallery, "tasks", figures.forest_figure, caption)
    return [Heading("Task by task"), Text(text), *blocks]


def _tables_then_pictures(
    studies: list[Study],
    table: Callable[[Study], Grid],
    gallery: _Gallery,
    name: str,
    draw: Callable[[Study], Figure | None],
    caption: str,
) -> list[Block]:
    """A table a study, then the figures of those that have one."""
    pictures = [picture for study in studies for picture in gallery.of(study, name, draw, caption)]
    grids: list[Block] = [table(study) for study in studies]
    return [*grids, Pictures(tuple(pictures))] if pictures else grids


def _design_section(studies: list[Study], gallery: _Gallery) -> list[Block]:
    planned = [study for study in studies if study.design is not None]
    if not planned:
        return []
    text = (
        "What one more cell would take off the uncertainties, linearised at the fit, ranked by gain in "
        "sd(ln ratio) per training cost. Besides: a cell without an image (V = 0) for every LLM, an LLM "
        "larger than any measured, and a second seed of some cells tell what no cell of this grid can."
    )
    caption = "how much one more cell takes off sd(ln ratio)."
    blocks = _tables_then_pictures(planned, design_table, gallery, "design", figures.design_figure, caption)
    return [Heading("What to run next"), Text(text), *blocks]


def _words(options: Options) -> str:
    """The options of the command that were not left at their defaults, and those that fix the digits."""
    words = [f"--bootstrap {options.bootstrap} --seed {options.seed}"]
    if options.laws != tuple(LAWS):
        words += [f"--law {name}" for name in options.laws]
    if options.loss != "raw":
        words.append(f"--loss {options.loss}")
    if options.latency:
        words.append("--cost latency" + (f" --latency {options.timed.source}" if options.timed else ""))
    names = {"fixed_flops": "tower-flops", "flops_per_token": "token-flops"}
    usual = FlopsCost(math.nan)
    for item in fields(FlopsCost):
        value = getattr(options.cost, item.name)
        if value != getattr(usual, item.name) and not (isinstance(value, float) and math.isnan(value)):
            name = names.get(item.name, item.name.replace("_", "-"))
            words.append(f"--{name}" if value is True else f"--{name} {value:g}")
    return " ".join(words + [f"--budget {value:g}" for value in options.budgets])


def _footer(analysis: Analysis) -> Small:
    dataset, options = analysis.dataset, analysis.studies[0].options
    origin = [f"Data: {dataset.source}, {prose.plural(dataset.rows, 'row')}, sha256 {dataset.sha256}."]
    for label, values in (
        ("vlmscale", dataset.versions),
        ("commit", dataset.commits),
        ("device", dataset.devices),
    ):
        if values:
            origin.append(f"Rows written by {label}: {', '.join(values)}.")
    known = {**versions(), "matplotlib": matplotlib.__version__}
    return Small(
        (
            *origin,
            f"Bootstrap: {options.bootstrap} resamples, seed {options.seed}; loss: {options.loss}.",
            "Versions: " + ", ".join(f"{name} {value}" for name, value in known.items()) + ".",
            f"Published numbers: {prose.PAPER}, from its released scaling_law_code/values.py; their known "
            "defects are in analysis/paper_data/README.md.",
            f"Again: python -m analysis DATA --out DIR {_words(options)}",
        )
    )
