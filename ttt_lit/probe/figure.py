"""The picture of a probe: what the window does to the loss by position, and what the context beyond it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ttt_lit.experiment.drawing import BLUE, GREEN, VERMILION, new_figure, plain_axes
from ttt_lit.experiment.gates import MAX_DELTA
from ttt_lit.experiment.own_part import MIN_CEILING


def picture(probe: Mapping[str, Any]) -> Figure:
    """Left: loss by position as imported, and in the window with no or fewest and with the recommended sinks. Right: the ceilings."""
    figure = new_figure(11.0, 4.6)
    left, right = figure.subplots(1, 2)
    _positions(left, probe)
    _ceilings(right, probe)
    return figure


def _positions(axes: Axes, probe: Mapping[str, Any]) -> None:
    window = probe["window"]
    rows = [row for row in probe["damage"] if row["window"] == window]
    fewest = min(rows, key=lambda row: row["sink_tokens"])
    best = next((row for row in rows if row["sink_tokens"] == probe["recommendation"]["sink_tokens"]), fewest)
    buckets = probe["imported"]["buckets"]
    centres = [(bucket["start"] + 1 + bucket["stop"]) / 2 for bucket in buckets]
    lines = [(fewest, VERMILION, "o"), *([(best, BLUE, "s")] if best is not fewest else [])]
    for row, colour, marker in lines:
        label = f"window {window:,}, sinks {row['sink_tokens']}"
        axes.plot(centres, row["curve"], color=colour, marker=marker, markersize=4, linewidth=2, label=label)
    axes.plot(
        centres, best["imported_curve"], color="0.25", linestyle="--", linewidth=1.6, label="as imported", zorder=3
    )
    axes.axvline(window, color="0.5", linewidth=1, linestyle=":", label="the window ends")
    _log_axis(axes, [bucket["start"] + 1 for bucket in buckets[1:]] + [buckets[-1]["stop"]])
    axes.set_xlabel("token position in the block (log scale)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("What the window does, untrained", loc="left", fontsize=11)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")


def _ceilings(axes: Axes, probe: Mapping[str, Any]) -> None:
    rows = probe["ceiling"]
    windows, nats = [row["window"] for row in rows], np.array([row["nats"] for row in rows])
    ends = np.array([[row[end] if row[end] is not None else row["nats"] for row in rows] for end in ("low", "high")])
    errors = np.abs(ends - nats)
    axes.plot(
        windows,
        [row["beyond"] for row in rows],
        color=GREEN,
        linestyle="--",
        marker="o",
        markerfacecolor="white",
        label="per token beyond window + stride",
    )
    axes.errorbar(
        windows,
        nats,
        yerr=errors,
        color=GREEN,
        marker="o",
        capsize=4,
        linewidth=2,
        label="per token of the block, 95 % interval",
    )
    axes.axhline(MIN_CEILING, color=VERMILION, linewidth=1.4, label=f"twice the gate ({MIN_CEILING:g})")
    axes.axhline(MAX_DELTA, color=VERMILION, linewidth=1, linestyle=":", label=f"the gate ({MAX_DELTA:g})")
    _log_axis(axes, windows)
    axes.set_xlim(min(windows) / 1.3, max(windows) * 1.3)
    axes.set_ylim(min(0.0, float(ends.min())) - 0.005, None)
    axes.set_xlabel("window (tokens, log scale)")
    axes.set_ylabel("nats per token")
    axes.set_title("What context beyond the window is worth: the ceiling", loc="left", fontsize=11)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")


def _log_axis(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    powers = [tick for tick in dict.fromkeys(ticks) if tick & (tick - 1) == 0] or ticks
    axes.set_xticks(powers)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
