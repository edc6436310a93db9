"""Two bar charts: GPU-hours to a target loss, and seconds per 1,000 tokens of every stage."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_lit.experiment.comparison import hours_to_target, target_loss
from ttt_lit.experiment.formats import hours as hours_text
from ttt_lit.experiment.page.figures.scales import amount
from ttt_lit.experiment.page.figures.style import FONT, ArmStyle, axis_labels, label, one_axes, styles
from ttt_lit.experiment.study import FamilyStudy

_ROW = 0.27


def target_figure(family: FamilyStudy) -> Figure | str:
    """GPU-hours of the runs alone until the target is reached, mean over seeds; arms that have evaluations."""
    target = None if family.baseline is None else target_loss(family.baseline)
    if target is None:
        return "the baseline has no evaluations on the fixed subset, so there is no target"
    looks = styles(family.arms)
    rows: list[tuple[str, float | None, str, ArmStyle]] = []
    for arm in family.arms:
        if arm.variant or not any(record.evaluations for record in arm.records):
            continue
        reached = hours_to_target(arm, target, "marginal")
        text = "not reached" if reached is None else hours_text(reached)
        rows.append((label(arm.name), reached, text, looks[arm.name]))
    if not rows:
        return "no run has evaluations on the fixed subset"
    return _bars(rows, "compute GPU-hours of the run alone")


def speed_figure(family: FamilyStudy) -> Figure | str:
    """Seconds of compute per 1,000 tokens over all devices; the first seed of every token-matched arm."""
    looks = styles(family.arms)
    rows: list[tuple[str, float | None, str, ArmStyle]] = []
    for arm in family.arms:
        if arm.variant or arm.share is not None:
            continue
        measured = [(stage.name, stage.throughput) for stage in arm.records[0].stages if stage.throughput is not None]
        for place, (stage, speed) in enumerate(measured):
            seconds = speed.seconds_per_1k_tokens
            name = label(stage) if place else f"{label(arm.name)}  {label(stage)}"
            rows.append((name, seconds, f"{seconds:.3g}", looks[arm.name]))
    if not rows:
        return "no stage has a measured speed"
    return _bars(rows, "seconds per 1,000 tokens")


def _bars(rows: list[tuple[str, float | None, str, ArmStyle]], x_label: str) -> Figure:
    figure, axes = one_axes(0.9 + _ROW * len(rows), grid="x")
    for place, (_, value, text, look) in enumerate(rows):
        axes.barh(place, value or 0.0, height=0.62, color=look.colour)
        axes.annotate(
            text, (value or 0.0, place), (4, 0), textcoords="offset points", va="center", fontsize=FONT - 1,
            color="0.15" if value is not None else "0.4", style="normal" if value is not None else "italic",
        )  # fmt: skip
    _dress(axes, [name for name, *_ in rows], max((value or 0.0) for _, value, *_ in rows))
    axis_labels(axes, x_label)
    return figure


def _dress(axes: Axes, names: list[str], longest: float) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=FONT - 1)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * longest or 1.0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
