"""Stages of every arm as bars over GPU-hours, with the two losses of every transition."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.report.figure_style import SMALL, ArmStyle, axis_labels, label, one_axes, styles
from ttt_lit.report.scales import amount
from ttt_lit.verdict.study import FamilyStudy

_ROW = 0.62
_SHADES = {"A": 1.0, "B0": 0.35, "B1": 0.5, "B2": 0.75, "C": 1.0}


def timeline_figure(family: FamilyStudy) -> Figure | str:
    """The first seed of every token-matched arm, parents of known cost in front, hatched."""
    shown = [arm for arm in family.arms if not arm.variant and arm.share is None and _has_spent(arm.records[0])]
    if not shown:
        return "no run has spent compute time on a stage"
    if sum(len(arm.records[0].stages) for arm in shown) < 2:
        return "a single stage has spent compute time, so there is nothing to compare"
    figure, axes = one_axes(1.0 + _ROW * len(shown), grid="x")
    looks = styles(family.arms)
    for row, arm in enumerate(shown):
        _draw_run(axes, row, arm.records[0], looks[arm.name])
    axes.set_yticks(range(len(shown)), [label(arm.name) for arm in shown], fontsize=SMALL)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
    axis_labels(axes, "compute GPU-hours")
    return figure


def _has_spent(run: RunRecord) -> bool:
    return any(stage.spent.gpu_seconds.get("compute") for stage in run.stages)


def _draw_run(axes: Axes, row: int, run: RunRecord, look: ArmStyle) -> None:
    hours = 0.0
    for parent in run.parents:
        width = (parent.gpu_seconds or 0.0) / 3600
        if width:
            axes.barh(row, width, left=hours, height=0.42, color="white", edgecolor="0.45", hatch="////", linewidth=0.8)
            hours += width
    texts = []
    for stage in run.stages:
        width = stage.spent.gpu_seconds.get("compute", 0.0) / 3600
        axes.barh(
            row, width, left=hours, height=0.42, color=look.colour, alpha=_SHADES.get(stage.name, 1.0),
            edgecolor="white", linewidth=1.0,
        )  # fmt: skip
        hours += width
        texts.append(f"{label(stage.name)}{_transition(stage)}")
    axes.text(0, row + 0.38, " · ".join(texts), fontsize=SMALL, va="center", ha="left", color="0.2")


def _transition(stage: Stage) -> str:
    proof = stage.transition
    if proof is None:
        return ""
    sign = "=" if proof.preserves and proof.held else "→" if not proof.preserves else "≠ (broken)"
    return f" [{proof.before:.3f} {sign} {proof.after:.3f}]"
