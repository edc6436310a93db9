"""Loss by token position of every arm, and its difference to a full-attention control."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ttt_lit.report.figure_style import axis_labels, label, one_axes, styles
from ttt_lit.report.labels import Mark, label_ends
from ttt_lit.report.scales import limits
from ttt_lit.report.series import Buckets, position_losses
from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.study import FamilyStudy


def positions_figure(family: FamilyStudy) -> Figure | str:
    """Bucket means of every token-matched arm's final validation in its headline setting."""
    curves = _curves(family)
    if not curves:
        return "no arm has a final validation with losses by position"
    if _too_few(curves):
        return "there is a single loss by position, so there is nothing to compare"
    return _draw(family, curves, "loss (nats per token)")


def position_differences_figure(family: FamilyStudy, control: Arm | None) -> Figure | str:
    """The same minus the control's; arms with other buckets than the control's are left out."""
    if control is None:
        return "there is no full-attention control"
    curves = _curves(family)
    reference = curves.pop(control.name, None)
    if reference is None:
        return f"the control {control.name} has no final validation with losses by position"
    differences = {
        name: [(start, stop, loss - other[2]) for (start, stop, loss), other in zip(curve, reference, strict=True)]
        for name, curve in curves.items()
        if [bucket[:2] for bucket in curve] == [bucket[:2] for bucket in reference]
    }
    if not differences:
        return "no other arm has losses in the same position buckets as the control"
    if _too_few(differences):
        return "there is a single difference by position, so there is nothing to compare"
    figure = _draw(family, differences, f"loss minus {label(control.name)} (nats per token)")
    figure.axes[0].axhline(0, color="0.35", linewidth=1.0, zorder=1)
    return figure


def _curves(family: FamilyStudy) -> dict[str, Buckets]:
    found = {arm.name: position_losses(arm) for arm in family.arms if not arm.variant and arm.share is None}
    return {name: curve for name, curve in found.items() if curve}


def _too_few(curves: dict[str, Buckets]) -> bool:
    return sum(map(len, curves.values())) < 2


def _draw(family: FamilyStudy, curves: dict[str, Buckets], y_label: str) -> Figure:
    figure, axes = one_axes(4.4)
    looks, marks = styles(family.arms), []
    for name, curve in curves.items():
        look = looks[name]
        x = [(start + 1 + stop) / 2 for start, stop, _ in curve]
        y = [loss for *_, loss in curve]
        axes.plot(x, y, color=look.colour, linestyle=look.dashes, linewidth=1.5, marker=look.marker, markersize=3)
        marks.append(Mark(x=x[-1], y=y[-1], text=label(name), colour=look.ink))
    axes.set_ylim(*limits([loss for curve in curves.values() for *_, loss in curve], margin=0.06))
    _position_axis(axes, max(stop for curve in curves.values() for _, stop, _ in curve))
    axis_labels(axes, "token position in the block (log scale)", y_label)
    figure.draw_without_rendering()
    label_ends(figure, axes, marks)
    return figure


def _position_axis(axes: Axes, context: int) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in range(int(math.log2(context)) + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}")
    )
