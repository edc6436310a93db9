"""House style of all figures, and how they are written: the same figure gives the same bytes.

No display and none of matplotlib's global figure state, so figures can be drawn inside training.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too. Its yellow is left out, being too light for a line.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, SKY, ORANGE = "#CC79A7", "#56B4E9", "#E69F00"

_DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, width × height in inches, that belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes, *, grid: str = "y") -> None:
    """A light grid along one axis ("x", "y" or "both") behind the data, and no frame above and on the right."""
    axes.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def svg_text(figure: Figure, *, salt: str) -> str:
    """The figure as SVG: text stays text, and ids depend on ``salt`` and not on the time."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=_DPI, metadata={"Date": None})
    return buffer.getvalue()


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def save_figure(figure: Figure, stem: Path, *, salt: str) -> tuple[Path, Path]:
    """Write ``stem.png`` and ``stem.svg``, each replaced in one step; the folder is made where it does not exist."""
    png, svg = (stem.with_name(stem.name + ending) for ending in (".png", ".svg"))
    replace_file(png, png_bytes(figure))
    replace_file(svg, svg_text(figure, salt=salt).encode("utf-8"))
    return png, svg


def replace_file(path: Path, content: bytes) -> None:
    """Write in one step: a reader sees the old file or the new one. The folder is made where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
