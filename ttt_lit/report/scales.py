"""Limits and ticks of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

_LOG_FROM = 8.0
"""Largest over smallest value from which an axis is logarithmic."""


def limits(values: Sequence[float], *, margin: float = 0.12) -> tuple[float, float]:
    """Limits of a linear axis around finite values, with room for marks at both ends."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = margin * max(high - low, 0.01)
    return low - room, high + room


def compute_axis(axes: Axes, values: Sequence[float]) -> None:
    """The x axis for positive amounts: logarithmic where they differ much, numbers written out."""
    low, high = min(values), max(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    if high / low >= _LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        return
    room = 0.14 * max(high - low, 0.05 * high)
    axes.set_xlim(max(low - room, 0.0), high + room)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def amount(value: float) -> str:
    """1.2B, 35M, 1,450, 0.05: for ticks."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
