"""Loss while training: against tokens and against GPU-hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ttt_lit.record.schema import RunRecord
from ttt_lit.report.figure_style import SMALL, ArmStyle, axis_labels, label, one_axes, styles
from ttt_lit.report.labels import Mark, label_ends
from ttt_lit.report.scales import amount, limits
from ttt_lit.report.series import Point, evaluation_series, token_series
from ttt_lit.verdict.arm import Arm, gpu_hours
from ttt_lit.verdict.heldout import final_words, subset_words
from ttt_lit.verdict.study import FamilyStudy

Against = Literal["tokens", "gpu_hours"]
_CEILING = 0.5
"""Nats per token above the worst final loss at which the axis ends: runs from scratch begin far above."""


def series_figure(family: FamilyStudy, against: Against) -> Figure | str:
    """Evaluations on the fixed subset as lines, one per run; hollow marks are final losses on all held-out blocks.

    Token-matched arms without ablations. GPU-hours are those of the runs alone.
    """
    shown = [arm for arm in family.arms if not arm.variant and arm.share is None]
    looks, marks = styles(family.arms), []
    figure, axes = one_axes(4.4)
    drawn: list[Point] = []
    for arm in shown:
        points, ends = _draw_arm(axes, arm, looks[arm.name], against)
        drawn += points
        if ends:
            x, y = max(ends)
            marks.append(Mark(x=x, y=y, text=label(arm.name), colour=looks[arm.name].ink))
    if not marks:
        return "no run has evaluations or a final loss"
    if len(drawn) < 2:
        return "there is a single measurement, so there is nothing to compare"
    ceiling = max(mark.y for mark in marks) + _CEILING
    axes.set_ylim(*limits([min(loss, ceiling) for _, loss in drawn], margin=0.05))
    axes.set_xlim(0, 1.02 * max(x for x, _ in drawn) or 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
    x_label = "tokens trained in the run" if against == "tokens" else "compute GPU-hours of the run alone"
    axis_labels(axes, x_label, "held-out loss (nats per token)")
    _legend(figure, [record for arm in shown for record in arm.records])
    figure.draw_without_rendering()
    label_ends(figure, axes, marks)
    return figure


def _legend(figure: Figure, records: Sequence[RunRecord]) -> None:
    """How many blocks stand behind the lines and the marks."""
    line = Line2D([], [], color="0.35", linewidth=1.5, label=f"line: {subset_words(records)}")
    mark = Line2D(
        [],
        [],
        color="0.35",
        marker="o",
        markerfacecolor="white",
        linestyle="none",
        label=f"hollow: {final_words(records)}",
    )
    handles = [line, mark] if any(record.evaluations for record in records) else [mark]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)


def _draw_arm(axes: Axes, arm: Arm, look: ArmStyle, against: Against) -> tuple[list[Point], list[Point]]:
    """One line and one mark per run; returns all points and, per run, the last."""
    drawn: list[Point] = []
    ends: list[Point] = []
    for record in arm.records:
        series = token_series(record) if against == "tokens" else evaluation_series(record)
        final = _final(record, against)
        if series:
            axes.plot(*zip(*series, strict=True), color=look.colour, linestyle=look.dashes, linewidth=1.5, zorder=3)
        if final is not None:
            axes.plot(*final, look.marker, color=look.colour, markerfacecolor="white", markersize=6, zorder=4)
            series = [*series, final]
        drawn += series
        ends += series[-1:]
    return drawn, ends


def _final(record: RunRecord, against: Against) -> Point | None:
    validation = record.final()
    x = float(record.totals.tokens) if against == "tokens" else gpu_hours(record, "marginal")
    if validation is None or x is None or not math.isfinite(validation.nats_per_token):
        return None
    return x, validation.nats_per_token
