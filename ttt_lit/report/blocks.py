"""What a page is made of. Built once, written twice: as HTML and as Markdown. Texts are plain; writers escape them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from matplotlib.figure import Figure

State = Literal["good", "bad", "open", "note"]
"""What a mark says: passed, failed, not enough evidence, or mind this."""
SYMBOLS: dict[State, str] = {"good": "✓", "bad": "✗", "open": "?", "note": "!"}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A word with a symbol and a colour: never by colour alone."""

    state: State
    word: str


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Several lines behind a title; HTML shows them on demand and in print."""

    title: str
    lines: tuple[str, ...]


Cell = str | Mark | Folded | tuple[str, ...]
"""One line, a mark, folded lines, or several lines."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    level: Literal[2, 3]
    text: str


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    text: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    text: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table. The first cell of a row is its header; columns are aligned by what they hold."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    wide: bool = False
    """Cells hold sentences: columns get room for them."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One family's answer: what was measured, at which budgets, and what follows."""

    family: str
    mark: Mark
    measured: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Label and sentences."""
    budgets: Grid | None = None
    lines: tuple[tuple[str, str], ...]
    """Label and sentence."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, or in its place the sentence that says why there is none."""

    stem: str
    """File name without an ending; unique on the page."""
    title: str
    caption: str
    alt: str
    figure: Figure | str


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures that stand side by side where there is room."""

    pictures: tuple[Picture, ...]


Block = Heading | Paragraph | Listing | Code | Verdict | Grid | Gallery


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    question: str
    blocks: tuple[Block, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for block in self.blocks if isinstance(block, Gallery) for picture in block.pictures]
