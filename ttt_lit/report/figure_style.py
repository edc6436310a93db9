"""How arms look in every figure: one colour per role, the same in every family; arms of one role differ by marker and dashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from ttt_lit.record.schema import Role
from ttt_lit.report.drawing import BLUE, GREEN, PURPLE, SKY, VERMILION, new_figure, plain_axes
from ttt_lit.verdict.arm import Arm

COLOURS: dict[Role | None, str] = {
    "ttt_scratch": VERMILION,
    "fa_scratch": SKY,
    "fa_import": BLUE,
    "bridge": GREEN,
    "direct": PURPLE,
    "control": "#6E6E6E",
}
ROLE_NAMES: dict[Role | None, str] = {
    "ttt_scratch": "baseline",
    "fa_scratch": "FA from scratch",
    "fa_import": "FA imported",
    "bridge": "bridge",
    "direct": "direct",
    "control": "control",
}
_OTHER = "#000000"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_INK = 0.62
_MAX_LABEL = 26
WIDTH = 6.6
"""Inches. A phone 390 pixels wide shows a figure at about 0.77 pixels per point, so no text is smaller than ``SMALL``: 7 pixels there."""
FONT = 10.5
SMALL = 9.5


@dataclass(frozen=True, kw_only=True)
class ArmStyle:
    colour: str
    marker: str
    dashes: Any

    @property
    def ink(self) -> str:
        """The same colour, dark enough for text on white: at least 4.5 to 1."""
        red, green, blue = to_rgb(self.colour)
        return to_hex((_INK * red, _INK * green, _INK * blue))


def styles(arms: Sequence[Arm]) -> dict[str, ArmStyle]:
    """Arm name → its look. Arms of one experiment and variant (token-matched, shares of wall-clock) look alike."""
    found: dict[str, ArmStyle] = {}
    places: dict[Role | None, dict[tuple[str, str], int]] = {}
    for arm in arms:
        known = places.setdefault(arm.role, {})
        place = known.setdefault((arm.experiment, arm.variant), len(known))
        found[arm.name] = ArmStyle(
            colour=COLOURS.get(arm.role, _OTHER),
            marker=_MARKERS[place % len(_MARKERS)],
            dashes=_DASHES[place % len(_DASHES)],
        )
    return found


def label(name: str) -> str:
    """A name as a figure can show it: short, in letters that the font has, and never read as a formula."""
    known = "".join(letter if letter.isprintable() and ord(letter) < 0x250 else "?" for letter in name)
    short = known if len(known) <= _MAX_LABEL else known[: _MAX_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def one_axes(height: float, *, grid: str = "y", width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes in the page's style; height and width in inches."""
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    plain_axes(axes, grid=grid)
    axes.tick_params(labelsize=FONT)
    return figure, axes


def axis_labels(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
