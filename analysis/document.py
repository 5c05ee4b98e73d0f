"""A report as a list of blocks, and its two renderings: one self-contained HTML page, and Markdown.

Text in a block is plain; `link` is the only markup, and citations are the only links on the page.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

_LINK = re.compile(r"\[\[([^|\]]+)\|([^\]]+)\]\]")

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --fill: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .3rem; }
p, ul { margin: .45rem 0 .8rem; max-width: 76ch; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
.lead { font-size: 1.08rem; }
a { color: #0b5cad; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 20px;
  margin: .8rem 0 1.2rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 600px; }
.figures.wide { grid-template-columns: minmax(0, 1fr); }
.figures.wide svg { max-width: 1080px; }
figcaption { color: var(--soft); font-size: .86rem; margin-top: .35rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
.caption { color: var(--soft); font-size: .86rem; margin: .9rem 0 .3rem; }
.caption + .scroll { margin-top: 0; }
th, td { text-align: left; vertical-align: top; padding: .38rem .7rem; border-top: 1px solid var(--line); }
td { min-width: 4.2rem; }
td.wide { min-width: 15rem; }
thead th { background: var(--fill); vertical-align: bottom; border-top: 0; font-weight: 600; }
td.tight { white-space: nowrap; }
footer { color: var(--soft); font-size: .86rem; }
@media (max-width: 480px) {
  main { padding: 18px 14px 36px; }
  h1 { font-size: 1.4rem; }
  .lead { font-size: 1rem; }
}
@media print { .scroll { overflow: visible; } figure, table { break-inside: avoid; } }
""".strip()


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `lead` sets the summary apart."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Bullets:
    """A bulleted list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table: header, rows of text of the same length, and a caption."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """One figure: its file name without ending, the inline SVG, and the caption."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Figures side by side on a wide page, stacked on a narrow one; `wide` gives each the whole width."""

    items: tuple[Picture, ...]
    wide: bool = False


@dataclass(frozen=True)
class Small:
    """The reproduction footer: one line an item."""

    items: tuple[str, ...]


Block = Heading | Text | Bullets | Grid | Pictures | Small


def link(text: str, address: str) -> str:
    """Markup for a citation link inside a block's text."""
    return f"[[{text}|{address}]]"


def to_html(title: str, blocks: list[Block]) -> str:
    """The whole page: style and figures inline, nothing fetched."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: list[Block]) -> str:
    """The same report as Markdown; figures refer to `figures/NAME.png`."""
    return f"# {title}\n\n" + "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _inline(text: str) -> str:
    return _LINK.sub(r'<a href="\2">\1</a>', html.escape(text, quote=False))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text, lead):
            return f'<p class="lead">{_inline(text)}</p>' if lead else f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"
        case Grid():
            return _html_table(block)
        case Pictures(items, wide):
            figures = "\n".join(
                f"<figure>\n{item.svg}\n<figcaption>{_inline(item.caption)}</figcaption>\n</figure>"
                for item in items
            )
            return f'<div class="figures{" wide" if wide else ""}">\n{figures}\n</div>'
        case Small(items):
            return "<footer>\n" + "\n".join(f"<p>{_inline(item)}</p>" for item in items) + "\n</footer>"


def _html_table(grid: Grid) -> str:
    caption = f'<p class="caption">{_inline(grid.caption)}</p>\n' if grid.caption else ""
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in grid.header)
    rows = "\n".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in grid.rows)
    return (
        f'{caption}<div class="scroll" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _html_cell(text: str) -> str:
    kind = "wide" if len(text) > 44 and "\n" not in text else "tight"
    return f'<td class="{kind}">' + "<br>".join(_inline(line) for line in text.split("\n")) + "</td>"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Bullets(items) | Small(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Grid(header, rows, caption):
            lines = [f"{_plain(caption)}\n"] if caption else []
            lines += [_row(header), _row(tuple("---" for _ in header)), *(_row(row) for row in rows)]
            return "\n".join(lines)
        case Pictures(items):
            return "\n\n".join(f"![{_plain(item.caption)}](figures/{item.name}.png)" for item in items)


def _plain(text: str) -> str:
    return _LINK.sub(r"[\1](\2)", text)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|").replace("\n", "; ") for cell in cells) + " |"
