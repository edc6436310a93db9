"""Loss while training: against tokens and against GPU-hours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from matplotlib.figure import Figure

from ttt_lit.experiment.page.figures.labels import Mark, label_ends
from ttt_lit.experiment.page.figures.scales import amount, limits
from ttt_lit.experiment.page.figures.style import axis_labels, label, one_axes, styles
from ttt_lit.experiment.page.series import Point, evaluation_series, token_series
from ttt_lit.experiment.record import RunRecord
from ttt_lit.experiment.study import FamilyStudy, gpu_hours

Against = Literal["tokens", "gpu_hours"]
_CEILING = 0.5
"""Nats per token above the worst final loss at which the axis ends: runs from scratch begin far above."""


def series_figure(family: FamilyStudy, against: Against) -> Figure | str:
    """Evaluations on the fixed subset as lines, one per run; hollow marks are final losses on all held-out blocks.

    Token-matched arms without ablations. GPU-hours are those of the runs alone.
    """
    read: Callable[[RunRecord], list[Point]] = token_series if against == "tokens" else evaluation_series
    arms = [arm for arm in family.arms if not arm.variant and arm.share is None]
    looks = styles(family.arms)
    figure, axes = one_axes(4.4)
    finals: list[float] = []
    drawn: list[float] = []
    right, marks = 0.0, []
    for arm in arms:
        look, ends = looks[arm.name], []
        for record in arm.records:
            series, final = read(record), _final(record, against)
            if series:
                axes.plot(*zip(*series, strict=True), color=look.colour, linestyle=look.dashes, linewidth=1.5, zorder=3)
            if final is not None:
                axes.plot(*final, look.marker, color=look.colour, markerfacecolor="white", markersize=6, zorder=4)
            drawn += [loss for _, loss in [*series, *([final] if final else [])]]
            ends += [final] if final is not None else series[-1:]
            right = max(right, *(x for x, _ in [*series, *ends]), 0.0)
        if ends:
            x, y = max(ends)
            finals.append(y)
            marks.append(Mark(x=x, y=y, text=label(arm.name), colour=look.colour))
    if not marks:
        return "no run has evaluations or a final loss"
    ceiling = max(finals) + _CEILING
    axes.set_ylim(*limits([min(y, ceiling) for y in drawn], margin=0.05))
    axes.set_xlim(0, right * 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
    x_label = "tokens trained in the run" if against == "tokens" else "compute GPU-hours of the run alone"
    axis_labels(axes, x_label, "held-out loss (nats per token)")
    figure.draw_without_rendering()
    label_ends(figure, axes, marks)
    return figure


def _final(record: RunRecord, against: Against) -> Point | None:
    validation = record.final()
    x = float(record.totals.tokens) if against == "tokens" else gpu_hours(record, "marginal")
    if validation is None or x is None or validation.nats_per_token != validation.nats_per_token:
        return None
    return x, validation.nats_per_token
