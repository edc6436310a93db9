"""A page as Markdown, with its figures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ttt_lit.report.blocks import (
    SYMBOLS,
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

_SPECIAL = re.compile(r"([\\`*\[\]|~$])")


def markdown_page(page: Page, *, figures: str) -> str:
    """The whole file; ``figures``: folder of the PNG files, relative to it."""
    writers: dict[type, Callable[[Any], str]] = {**_WRITERS, Gallery: lambda block: _gallery(block, figures)}
    blocks = [f"# {plain(page.title)}", plain(page.question), *(writers[type(block)](block) for block in page.blocks)]
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    one_line = " ".join(text.split())
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        one_line = one_line.replace(sign, entity)
    return _SPECIAL.sub(r"\\\1", one_line)


def _heading(block: Heading) -> str:
    return f"{'#' * block.level} {plain(block.text)}"


def _paragraph(block: Paragraph) -> str:
    return plain(block.text)


def _listing(block: Listing) -> str:
    return "\n".join(f"- {plain(item)}" for item in block.items)


def _code(block: Code) -> str:
    """A fence longer than any that the text holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
    return f"{fence}\n{block.text}\n{fence}"


def _mark(mark: Mark) -> str:
    return f"{SYMBOLS[mark.state]} {plain(mark.word)}"


def _verdict(block: Verdict) -> str:
    title = f"**{plain(block.family)}: {_mark(block.mark)}**"
    measured = [f"- {plain(name)}. {' '.join(map(plain, texts))}" for name, texts in block.measured]
    lines = [f"- {plain(name)}: {plain(text)}" for name, text in block.lines]
    budgets = [] if block.budgets is None else [_grid(block.budgets)]
    return "\n\n".join([title, *(["\n".join(measured)] if measured else []), *budgets, "\n".join(lines)])


def _grid(block: Grid) -> str:
    header = [plain(name) for name in block.header]
    rows = [[_cell(cell) for cell in row] for row in block.rows]
    lines = [_row(header), _row(["---"] * len(header)), *(_row(row) for row in rows)]
    return "\n".join([f"{plain(block.caption)}:", "", *lines])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Mark):
        return _mark(cell)
    if isinstance(cell, Folded):
        return _cell(cell.lines)
    return "<br>".join(map(plain, cell)) if isinstance(cell, tuple) else plain(cell)


def _gallery(block: Gallery, figures: str) -> str:
    return "\n\n".join(_picture(picture, figures) for picture in block.pictures)


def _picture(picture: Picture, figures: str) -> str:
    if isinstance(picture.figure, str):
        return f"{plain(picture.title)}: no figure, {plain(picture.figure)}."
    return f"![{plain(picture.alt)}]({figures}/{picture.stem}.png)\n\n{plain(picture.title)}. {plain(picture.caption)}"


_WRITERS: dict[type, Callable[[Any], str]] = {
    Heading: _heading,
    Paragraph: _paragraph,
    Listing: _listing,
    Code: _code,
    Verdict: _verdict,
    Grid: _grid,
}
