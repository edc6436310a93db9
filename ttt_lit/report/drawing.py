"""House style of all figures, how arms look in them, and how they are written: the same figure gives the same bytes.

No display and none of matplotlib's global figure state, so figures can be drawn inside training.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ttt_lit.record.codec import write_atomic
from ttt_lit.record.schema import Role
from ttt_lit.verdict.arm import Arm

# Okabe and Ito's palette: told apart by colour-blind readers too. Its yellow is left out, being too light for a line.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, SKY, ORANGE = "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
COLOURS: dict[Role | None, str] = {
    "ttt_scratch": VERMILION,
    "fa_scratch": SKY,
    "fa_import": BLUE,
    "bridge": GREEN,
    "direct": PURPLE,
    "control": "#6E6E6E",
}
WIDTH = 6.6
"""Inches. A phone 390 pixels wide shows a figure at about 0.77 pixels per point, so no text is smaller than ``SMALL``: 7 pixels there."""
FONT, SMALL = 10.5, 9.5
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MAX_LABEL = 26
_LEGEND_ROW = 0.2
_DPI = 150


@dataclass(frozen=True)
class Look:
    """Of one arm, in every figure."""

    colour: str
    marker: str = "o"
    dashes: Any = "-"

    @property
    def face(self) -> str:
        """Of the markers: hollow on a dashed line."""
        return self.colour if self.dashes == "-" else "white"


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """Arm name → its look: a colour per role; its arms differ by marker and dashes, but not those of one experiment and variant."""
    found: dict[str, Look] = {}
    places: dict[Role | None, dict[tuple[str, str], int]] = {}
    for arm in arms:
        known = places.setdefault(arm.role, {})
        place = known.setdefault((arm.experiment, arm.variant), len(known))
        marker, dashes = _MARKERS[place % len(_MARKERS)], _DASHES[place % len(_DASHES)]
        found[arm.name] = Look(COLOURS.get(arm.role, "#000000"), marker, dashes)
    return found


def label(name: str) -> str:
    """A name as a figure can show it: short, in letters that the font has, and never read as a formula."""
    known = "".join(letter if letter.isprintable() and ord(letter) < 0x250 else "?" for letter in name)
    short = known if len(known) <= _MAX_LABEL else known[: _MAX_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def amount(value: float, _: object = None) -> str:
    """1.2B, 35M, 1,450, 0.05: for ticks."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def limits(values: Sequence[float], *, margin: float) -> tuple[float, float]:
    """Limits of a linear axis around the finite values, with room for marks at both ends."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    room = margin * max(max(finite) - min(finite), 0.01)
    return min(finite) - room, max(finite) + room


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, width × height in inches, that belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def one_axes(height: float, x_label: str, y_label: str = "", *, grid: str = "y") -> tuple[Figure, Axes]:
    """A figure of the page, with one pair of axes; height in inches."""
    figure = new_figure(WIDTH, height)
    axes = figure.add_subplot()
    plain_axes(axes, grid=grid)
    axes.tick_params(labelsize=FONT)
    axes.set_xlabel(x_label, fontsize=FONT)
    axes.set_ylabel(y_label, fontsize=FONT)
    return figure, axes


def plain_axes(axes: Axes, *, grid: str = "y") -> None:
    """A light grid along one axis ("x", "y" or "both") behind the data, and no frame above and on the right."""
    axes.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, shown: Mapping[str, Look], *, lines: bool) -> None:
    """Names with their looks under the axes, in as many columns as fit; the figure grows by the rows."""
    names = {label(name): look for name, look in shown.items()}
    columns = max(1, min(3, int(WIDTH * 72 / (0.55 * SMALL * max(map(len, names)) + 46))))
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, label=name, **_stroke(look, lines))
        for name, look in names.items()
    ]
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * math.ceil(len(handles) / columns))
    options: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "handlelength": 3.0 if lines else 1.0}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **options)


def _stroke(look: Look, lines: bool) -> dict[str, Any]:
    return {"linestyle": look.dashes, "markerfacecolor": look.face} if lines else {"linestyle": "none"}


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def save_figure(figure: Figure, stem: Path) -> str:
    """Write ``stem.png`` and ``stem.svg``, each replaced in one step. Returns the SVG, in which text stays text."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not once per file
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem.name}):  # ids do not depend on the time
        figure.savefig(buffer, format="svg", dpi=_DPI, metadata={"Date": None})
    write_atomic(stem.with_name(f"{stem.name}.png"), png_bytes(figure))
    write_atomic(stem.with_name(f"{stem.name}.svg"), buffer.getvalue())
    return buffer.getvalue()
