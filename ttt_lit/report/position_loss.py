"""The position-loss picture of one run: does the loss keep falling along the context, and does the inner loop make it fall?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ttt_lit.metrics import Inner, position_buckets
from ttt_lit.report.drawing import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_figure, plain_axes, save_figure

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
_STYLES: dict[Inner, str] = {"on": "-", "off": (0, (4, 2))}  # type: ignore[dict-item]
# Points of the faint curve: single positions on the left, averages where several would fall on one pixel.
_FINE_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss at each position, as one stage's model has it on validation documents."""

    stage: str
    inner: Inner
    """Whether the inner loop was updating the fast weights."""
    losses: Sequence[float]
    """Nats per token at positions 0, 1, …; its length is the context."""


def save_position_figure(curves: Sequence[Curve], stem: Path, *, window: int | None = None) -> tuple[Path, Path]:
    """Draw the picture and write ``stem.png`` and ``stem.svg``, each replaced in one step.

    Parameters:
        curves: in the order of the legend; equal stages share a colour.
        stem: path without an ending.
        window: where a sliding window of this many tokens begins to lose sight of the first token; None draws no mark.
    """
    return save_figure(position_figure(curves, window=window), stem, salt="position_loss")


def position_figure(curves: Sequence[Curve], *, window: int | None = None) -> Figure:
    """The picture as a figure: bucket means as lines, finer bins faint behind them."""
    if not curves:
        raise ValueError("position figure: got no curve, expected at least one")
    figure = new_figure(9.0, 5.4)
    axes = figure.add_subplot()
    colours = {stage: _COLOURS[i % len(_COLOURS)] for i, stage in enumerate(dict.fromkeys(c.stage for c in curves))}
    means = [_draw(axes, curve, colours[curve.stage]) for curve in curves]
    _mark_window(axes, window, max(len(curve.losses) for curve in curves))
    _dress(axes, curves, np.concatenate(means))
    figure.legend(frameon=False, loc="outside lower center", ncols=min(3, len(colours)), handlelength=3.2)
    return figure


def _draw(axes: Axes, curve: Curve, colour: str) -> np.ndarray:
    """Draw one curve and return its bucket means."""
    losses = np.asarray(curve.losses, dtype=np.float64)
    axes.plot(*_bin(losses, _fine_bins(len(losses))), color=colour, alpha=0.22, linewidth=0.7, zorder=1)
    centres, means = _bin(losses, position_buckets(len(losses)))
    axes.plot(
        centres,
        means,
        color=colour,
        linestyle=_STYLES[curve.inner],
        linewidth=2.0,
        marker="o",
        markersize=3.5,
        markerfacecolor=colour if curve.inner == "on" else "white",
        label=f"{curve.stage}, inner loop {curve.inner}",
        zorder=3,
    )
    return means


def _bin(losses: np.ndarray, bins: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean position, counted from 1 because a logarithmic axis has no zero, and mean loss of each bin."""
    centres = np.array([(start + 1 + stop) / 2 for start, stop in bins])
    return centres, np.array([losses[start:stop].mean() for start, stop in bins])


def _fine_bins(context: int) -> list[tuple[int, int]]:
    edges = np.unique(np.geomspace(1, context + 1, _FINE_POINTS).round().astype(int)) - 1
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _mark_window(axes: Axes, window: int | None, context: int) -> None:
    if window is None or window >= context:
        return
    axes.axvline(window, color="0.35", linewidth=1.0, linestyle=":", zorder=2)
    axes.annotate(
        f"window: {window:,} tokens ",
        xy=(window, 0.02),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="bottom",
        color="0.35",
        fontsize=9,
    )


def _dress(axes: Axes, curves: Sequence[Curve], means: np.ndarray) -> None:
    """Axes, ticks and legend. Limits follow the bucket means: noise must not flatten the lines."""
    context = max(len(curve.losses) for curve in curves)
    axes.set_xscale("log", base=2)
    # The first bucket is one point: left of it there is only noise, stretched wide by the logarithm.
    first = min(position_buckets(len(curve.losses))[0][1] for curve in curves)
    axes.set_xlim(max(0.9, first / 3), context * 1.02)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in range(int(math.log2(context)) + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    finite = means[np.isfinite(means)]
    if finite.size:
        margin = 0.08 * max(float(np.ptp(finite)), 0.1)
        axes.set_ylim(finite.min() - 2 * margin, finite.max() + margin)
    axes.set_xlabel("token position in the block (log scale)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(
        "Validation loss by token position (lines: bucket means; faint: finer bins)", loc="left", fontsize=11
    )
    plain_axes(axes)
