"""Direct labels that do not cover each other: beside points, and in a column at the right end of lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, blended_transform_factory

from ttt_lit.report.figure_style import SMALL

_RADII = (7.0, 14.0, 24.0, 36.0, 50.0, 66.0, 84.0, 104.0)
"""Points between a mark and its label, tried in this order."""
_DIRECTIONS = 16
_PAD = 1.5
_SPACING = 4.0
"""Pixels between the points by which a line is known to be in the way."""
_MAX_SAMPLES = 500
_LINE_GAP = 1.25
"""Distance of the baselines of two labels in a column, in font sizes."""


Line = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something in data coordinates that wants a label."""

    x: float
    y: float
    text: str
    colour: str
    size: float = SMALL


def label_points(figure: Figure, axes: Axes, marks: Sequence[Mark], lines: Sequence[Line]) -> None:
    """Label every mark; limits and scales must be final. Labels cover neither labels nor marks, and lines only where they must.

    Parameters:
        lines: what else is drawn, in data coordinates: curves, error bars.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    pixels = figure.dpi / 72
    fixed = axes.transData.transform([(mark.x, mark.y) for mark in marks]) if marks else np.empty((0, 2))
    soft = np.concatenate(
        [np.empty((0, 2)), *(_samples(axes.transData.transform(line)) for line in lines if len(line))]
    )
    taken: list[Bbox] = []
    for mark, point in zip(marks, fixed, strict=True):
        drawn = axes.annotate(
            mark.text,
            (mark.x, mark.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=mark.size,
            color=mark.colour,
        )
        extent = drawn.get_window_extent()
        size = np.array([extent.width, extent.height])
        box, offset = min(
            ((Bbox.from_bounds(*(point + move * pixels - size / 2), *size), move) for move in _moves(size / pixels)),
            key=lambda each: _cost(each[0], math.hypot(*each[1]), frame, taken, fixed, soft),
        )
        taken.append(box)
        drawn.set_position(tuple(offset))
        _leader(axes, point, box, mark.colour)


def _moves(size: np.ndarray) -> Iterator[np.ndarray]:
    """Offsets of a label's centre, in points, on ellipses around the mark."""
    for radius in _RADII:
        for step in range(_DIRECTIONS):
            angle = 2 * math.pi * step / _DIRECTIONS
            yield np.array([math.cos(angle), math.sin(angle)]) * (size / 2 + radius)


def _cost(box: Bbox, distance: float, frame: Bbox, taken: Sequence[Bbox], fixed: np.ndarray, soft: np.ndarray) -> float:
    padded = box.padded(_PAD)
    outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
    covered = sum(padded.overlaps(other) for other in taken)
    return 1e5 * outside + 1e4 * covered + 1e3 * _inside(box.padded(5), fixed) + 30 * _inside(padded, soft) + distance


def _samples(line: np.ndarray) -> np.ndarray:
    """Points on a line in pixels, close enough for no label to slip between two of them."""
    pieces = [line[:1]]
    for start, stop in zip(line[:-1], line[1:], strict=True):
        steps = min(int(math.hypot(*(stop - start)) / _SPACING) + 1, _MAX_SAMPLES)
        pieces.append(start + (stop - start) * np.linspace(0, 1, steps + 1)[1:, None])
    return np.concatenate(pieces)


def _inside(box: Bbox, points: np.ndarray) -> int:
    x, y = points[:, 0], points[:, 1]
    return int(((box.x0 <= x) & (x <= box.x1) & (box.y0 <= y) & (y <= box.y1)).sum())


def _leader(axes: Axes, point: np.ndarray, box: Bbox, colour: str) -> None:
    """A thin line from the mark to its label where the two are apart."""
    near = np.array([np.clip(point[0], box.x0, box.x1), np.clip(point[1], box.y0, box.y1)])
    if math.hypot(*(near - point)) > 12 * axes.figure.dpi / 72:
        ends = axes.transData.inverted().transform([point, near])
        axes.plot(ends[:, 0], ends[:, 1], color=colour, linewidth=0.6, alpha=0.7, scalex=False, scaley=False)


def label_ends(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Label lines in a column right of the axes, each joined to its line's end by a thin line; limits must be final."""
    if not marks:
        return
    ordered = sorted(marks, key=lambda mark: (mark.y, mark.text))
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / figure.dpi * 72
    gap = _LINE_GAP * max(mark.size for mark in marks) / height
    places = spread([min(max((mark.y - low) / (high - low), 0.0), 1.0) for mark in ordered], gap)
    column = blended_transform_factory(axes.transAxes, axes.transAxes)
    for mark, place in zip(ordered, places, strict=True):
        axes.annotate(
            mark.text,
            xy=(mark.x, mark.y),
            xycoords="data",
            xytext=(1.04, place),
            textcoords=column,
            va="center",
            fontsize=mark.size,
            color=mark.colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": mark.colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1},
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Sorted places in 0 … 1 moved as little as needed to lie at least ``gap`` apart; what is too long for that is centred."""
    groups = [(place, 1) for place in wanted]  # centre of a run of touching labels, and their number
    index = 0
    while index + 1 < len(groups):
        (left, many), (right, more) = groups[index], groups[index + 1]
        if _inside_frame(right, more, gap) - _inside_frame(left, many, gap) >= gap * (many + more) / 2 - 1e-12:
            index += 1
            continue
        groups[index : index + 2] = [((left * many + right * more) / (many + more), many + more)]
        index = max(0, index - 1)
    return [
        _inside_frame(centre, number, gap) + gap * (place - (number - 1) / 2)
        for centre, number in groups
        for place in range(number)
    ]


def _inside_frame(centre: float, number: int, gap: float) -> float:
    """The centre of a run of touching labels, moved so that the whole run lies in 0 … 1 if it fits."""
    reach = gap * (number - 1) / 2
    return min(max(centre, reach), 1 - reach) if 2 * reach <= 1 else 0.5
