"""A page as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ttt_lit.report.blocks import (
    SYMBOLS,
    Block,
    Cell,
    Code,
    Folded,
    Gallery,
    Grid,
    Heading,
    Listing,
    Mark,
    Page,
    Paragraph,
    Picture,
    Verdict,
)
from ttt_lit.report.style import CSS

_LONG = 28
"""Letters from which a cell of a wide table is given more room."""
_NUMBER_CLASS = ' class="number"'
# Phones show a table's rows as blocks, which would take the table's meaning from screen readers.
_ROLE = {name: f' role="{name}"' for name in ("table", "row", "columnheader", "rowheader", "cell")}
_NUMBER = re.compile(r"[+−–-]?(\d[\d,.]*)?[BMK%]?( \[.*\])?")


def html_page(page: Page, drawings: Mapping[str, str]) -> str:
    """The whole file. ``drawings``: the SVG file of every figure, by stem."""
    body = [
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="question">{escape(page.question)}</p>',
        *_blocks(page.blocks, drawings),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _blocks(blocks: Sequence[Block], drawings: Mapping[str, str]) -> list[str]:
    """Verdicts that follow each other stand in one grid."""
    writers: dict[type, Callable[[Any], str]] = {**_WRITERS, Gallery: lambda block: _gallery(block, drawings)}
    lines, inside = [], False
    for block in blocks:
        verdict = isinstance(block, Verdict)
        if verdict != inside:
            lines.append('<div class="verdicts">' if verdict else "</div>")
        inside = verdict
        lines.append(writers[type(block)](block))
    return [*lines, "</div>"] if inside else lines


def _heading(block: Heading) -> str:
    return f"<h{block.level}>{escape(block.text)}</h{block.level}>"


def _paragraph(block: Paragraph) -> str:
    return f"<p>{escape(block.text)}</p>"


def _listing(block: Listing) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"


def _code(block: Code) -> str:
    return f"<pre><code>{escape(block.text)}</code></pre>"


def _mark(mark: Mark) -> str:
    return f'<span class="mark {mark.state}"><span aria-hidden="true">{SYMBOLS[mark.state]}</span> {escape(mark.word)}</span>'


def _verdict(block: Verdict) -> str:
    title = f"<h2>{escape(block.family)}: {_mark(block.mark)}</h2>"
    budgets = "" if block.budgets is None else _grid(block.budgets)
    lines = [(name, (text,)) for name, text in block.lines]
    body = f"{_definitions(block.measured)}{budgets}{_definitions(lines)}"
    return f'<section class="verdict {block.mark.state}">{title}{body}</section>'


def _definitions(lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Each name once, with a paragraph per sentence; nothing where there is none."""
    items = "".join(
        f"<dt>{escape(name)}</dt>" + "".join(f"<dd>{escape(text)}</dd>" for text in texts) for name, texts in lines
    )
    return f"<dl>{items}</dl>" if items else ""


def _grid(block: Grid) -> str:
    columns = list(zip(*block.rows, strict=True)) or [()] * len(block.header)
    numeric = [bool(column) and not block.wide and _holds_numbers(column) for column in columns]
    head = "".join(
        f'<th scope="col"{_ROLE["columnheader"]}{_NUMBER_CLASS if number else ""}>{escape(name)}</th>'
        for name, number in zip(block.header, numeric, strict=True)
    )
    rows = "\n".join(_grid_row(block, row, numeric) for row in block.rows)
    kind = ' class="wide"' if block.wide else ""
    name = escape(block.caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table{kind}{_ROLE["table"]}>'
        f"<caption>{escape(block.caption)}</caption>"
        f"<thead><tr{_ROLE['row']}>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _grid_row(block: Grid, row: Sequence[Cell], numeric: Sequence[bool]) -> str:
    """``data-column`` names a cell where a phone shows it apart from its column."""
    first, *others = row
    names = [escape(name, quote=True) for name in block.header[1:]]
    kinds = [f' class="{_width(cell)}"' for cell in others] if block.wide else [_NUMBER_CLASS * n for n in numeric[1:]]
    cells = [
        f'<td{_ROLE["cell"]}{kind} data-column="{name}">{_cell(cell)}</td>'
        for cell, name, kind in zip(others, names, kinds, strict=True)
    ]
    return f'<tr{_ROLE["row"]}><th scope="row"{_ROLE["rowheader"]}>{_cell(first)}</th>{"".join(cells)}</tr>'


def _width(cell: Cell) -> str:
    if isinstance(cell, Mark):
        return "short"
    lines = cell.lines if isinstance(cell, Folded) else (cell,) if isinstance(cell, str) else cell
    longest = max(map(len, lines), default=0)
    return "long" if longest > _LONG else "short"


def _holds_numbers(column: Sequence[Cell]) -> bool:
    return all(isinstance(cell, str) and _NUMBER.fullmatch(cell) for cell in column)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Mark):
        return _mark(cell)
    if isinstance(cell, Folded):
        return f"<details><summary>{escape(cell.title)}</summary>{_cell(cell.lines)}</details>"
    if isinstance(cell, tuple):
        return "".join(f'<span class="line">{escape(line)}</span>' for line in cell)
    return escape(cell)


def _gallery(block: Gallery, drawings: Mapping[str, str]) -> str:
    pictures = (_picture(picture, drawings[picture.stem]) for picture in block.pictures)
    return '<div class="gallery">' + "\n".join(pictures) + "</div>"


def _picture(picture: Picture, svg: str) -> str:
    title = f'<p class="title">{escape(picture.title)}</p>'
    if isinstance(picture.figure, str):
        return f'<div class="absent">{title}<p>No figure: {escape(picture.figure)}.</p></div>'
    drawing = inline_svg(svg, picture.stem, picture.alt)
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<figure>{title}<div class="drawing">{drawing}</div>{caption}</figure>'


def inline_svg(svg: str, stem: str, alt: str) -> str:
    """An SVG file as an element of a page: no prologue, no metadata or name spaces, ids of its own, a text for those who cannot see it."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{stem}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{stem}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{stem}-\1)", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)


_WRITERS: dict[type, Callable[[Any], str]] = {
    Heading: _heading,
    Paragraph: _paragraph,
    Listing: _listing,
    Code: _code,
    Verdict: _verdict,
    Grid: _grid,
}
