"""One kind of table for the terminal, Markdown and HTML: a cell is formatted once."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as Grid

_STATES = {
    **dict.fromkeys(("pass", "scale up"), ("good", "✓")),
    **dict.fromkeys(("fail", "no"), ("bad", "✗")),
    **dict.fromkeys(("insufficient", "not yet"), ("open", "?")),
}
_NUMBER = re.compile(r"[+−–-]?(\d[\d,.]*)?([eE][+-]\d+)?[BMK%]?")
_SPECIAL = re.compile(r"([\\`*\[\]|~$])")
_UNBOUNDED = 10_000
"""Columns where the output is no terminal: a file has one line per row."""


class Mark(str):
    """An outcome or a verdict, shown with a symbol and a colour: never by colour alone."""

    @property
    def state(self) -> str:
        return _STATES[self][0]

    @property
    def symbol(self) -> str:
        return _STATES[self][1]


class Folded(tuple[str, ...]):
    """Lines that HTML shows on demand and in print."""


Cell = str | tuple[str, ...]
"""One line, a mark, or several lines."""
Rows = tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its header; columns of numbers are aligned to the right."""

    title: str
    header: tuple[str, ...]
    rows: Rows
    wide: bool = False
    """Cells hold sentences: HTML gives them room."""

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether all its cells are numbers or dashes."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.header)
        return [bool(column) and all(isinstance(c, str) and _NUMBER.fullmatch(c) for c in column) for column in columns]

    def text(self) -> str:
        """For a terminal: as wide as it is, or else as the cells need."""
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        for name, number in zip(self.header, self.numeric, strict=True):
            grid.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            grid.add_row(*(_shown(cell, " ") for cell in row))
        width = shutil.get_terminal_size((_UNBOUNDED, 0)).columns if sys.stdout.isatty() else _UNBOUNDED
        file = io.StringIO()
        Console(file=file, width=width, color_system=None, markup=False, highlight=False, emoji=False).print(grid)
        return "\n".join([self.title, *(line.rstrip() for line in file.getvalue().splitlines())])

    def markdown(self) -> str:
        """The title and a pipe table."""
        rows: list[Iterable[str]] = [map(plain, self.header), ["---"] * len(self.header)]
        rows += ((_shown(cell, "<br>", plain) for cell in row) for row in self.rows)
        return "\n".join([f"{plain(self.title)}:", "", *(f"| {' | '.join(row)} |" for row in rows)])


def _shown(cell: Cell, separator: str, write: Callable[[str], str] = str) -> str:
    if isinstance(cell, Mark):
        return f"{cell.symbol} {write(cell)}"
    return write(cell) if isinstance(cell, str) else separator.join(map(write, cell))


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", one_line)
