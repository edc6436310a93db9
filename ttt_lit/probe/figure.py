"""The picture of a probe: damage of the window by position, and what the context beyond it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ttt_lit.report.drawing import BLUE, GREEN, PURPLE, VERMILION, new_figure, plain_axes
from ttt_lit.verdict.formats import counted
from ttt_lit.verdict.gates import MAX_DELTA
from ttt_lit.verdict.own_part import MIN_CEILING


def picture(probe: Mapping[str, Any]) -> Figure:
    """Left: damage by position with the fewest and with the recommended sinks. Right: the ceilings with their intervals, and the gate."""
    figure = new_figure(11.0, 5.0)
    left, right = figure.subplots(1, 2)
    _positions(left, probe)
    _ceilings(right, probe)
    return figure


def _positions(axes: Axes, probe: Mapping[str, Any]) -> None:
    window, context = probe["window"], probe["data"]["context"]
    rows = [row for row in probe["damage"] if row["window"] == window]
    fewest, best = (
        next(row for row in rows if row["sink_tokens"] == probe["sinks"][which]) for which in ("fewest", "sink_tokens")
    )
    centres = [(bucket["start"] + bucket["stop"]) / 2 for bucket in probe["imported"]["buckets"]]
    for row, colour in [(fewest, VERMILION), *([(best, BLUE)] if best is not fewest else [])]:
        damage = np.array(row["curve"]) - np.array(row["imported_curve"])
        label = f"window {window:,}, {counted(row['sink_tokens'], 'sink')}"
        axes.plot(centres, damage, color=colour, marker="o", markersize=3, linewidth=1.8, label=label)
    axes.axhline(0, color="0.25", linestyle="--", linewidth=1.4, label="as imported")
    axes.axvline(window, color="0.5", linewidth=1.2, linestyle=":", label=f"end of the window: {window:,}")
    worth = probe["sinks"]["worth"]
    if worth is not None:
        axes.plot(
            [window, context],
            [worth] * 2,
            color=GREEN,
            linewidth=2.5,
            label=f"the lost context is worth at least {worth:.3f}",
        )
    axes.set_xlim(0, context)
    axes.set_xticks([context * part // 8 for part in range(9)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("token position in the block")
    axes.set_ylabel("loss − loss as imported (nats per token)")
    axes.set_title("Damage of the window, untrained", loc="left", fontsize=11)
    plain_axes(axes)
    _legend(axes)


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
        label="per token of the whole block, 95 % interval",
    )
    axes.axhline(MIN_CEILING, color=PURPLE, linewidth=1.4, label=f"twice the gate ({MIN_CEILING:g})")
    axes.axhline(MAX_DELTA, color=PURPLE, linewidth=1.4, linestyle=":", label=f"the gate ({MAX_DELTA:g})")
    axes.set_xscale("log", base=2)
    axes.set_xticks(windows)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(min(windows) / 1.3, max(windows) * 1.3)
    low, high = min(0.0, float(ends.min())), max(MIN_CEILING, float(ends.max()), *(row["beyond"] for row in rows))
    axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    axes.set_xlabel("window (tokens, log scale)")
    axes.set_ylabel("nats per token")
    axes.set_title("What context beyond the window is worth: the ceiling", loc="left", fontsize=11)
    plain_axes(axes)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers nothing."""
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
