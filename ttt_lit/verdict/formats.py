"""Numbers as readers see them, on the page and in the terminal; a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ttt_lit.verdict.statistics import Change, Interval

NONE = "–"
GPU_HOURS = "GPU\N{NON-BREAKING HYPHEN}h"


def loss(value: float | None) -> str:
    """Nats per token or bits per byte."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4f}"


def change(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:+.4f}".replace("-", "−")


def interval(value: Interval | Change) -> tuple[str, str]:
    """Estimate, and the interval in brackets, or in its place that there is none."""
    if isinstance(value, Interval) and not value.bounded:
        return change(value.estimate), "(1 document: no interval)"
    return change(value.estimate), f"[{change(value.low)}, {change(value.high)}]"


def nats(value: Interval | Change) -> str:
    """``+0.0040 [−0.0021, +0.0101] nats per token``."""
    estimate, ends = interval(value)
    return f"{estimate} {ends} nats per token" if ends.startswith("[") else f"{estimate} nats per token {ends}"


def hours(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """``1 document``, ``22 documents``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def billions(value: float) -> str:
    """Tokens, short: 27.5B, 573K."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes, short: 115.6 GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:,.0f} bytes"


def seconds_as_hours(value: float | None) -> str:
    return hours(None if value is None else value / 3600)


def ranges(numbers: Sequence[int]) -> str:
    """``0–3, 7, 9–11``; no range stands for numbers between that are not meant."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in found)
