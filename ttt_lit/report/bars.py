"""Two bar charts: GPU-hours to a target loss, and seconds per 1,000 tokens of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_lit.report.figure_style import SMALL, ArmStyle, axis_labels, label, one_axes, styles
from ttt_lit.report.scales import amount
from ttt_lit.report.target import hours_to_reach, target_arms
from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.comparison import target_loss
from ttt_lit.verdict.study import FamilyStudy

_ROW = 0.29
_LETTER = 0.024
"""Room for a letter behind the longest bar, as a share of it."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    name: str
    value: float | None
    """None: there is no bar, the text says why."""
    before: float = 0.0
    """Drawn hatched in front of the bar."""
    text: str
    look: ArmStyle

    @property
    def end(self) -> float:
        return 0.0 if self.value is None else self.before + self.value


def target_figure(family: FamilyStudy) -> Figure | str:
    """GPU-hours until the target is reached under both accounts, mean over seeds: the run alone, its parents hatched in front."""
    target = None if family.baseline is None else target_loss(family.baseline)
    if target is None:
        return "the baseline has no evaluations on the fixed subset, so there is no target"
    looks = styles(family.arms)
    arms = target_arms(family)
    if len(arms) < 2:
        return "only the baseline has evaluations on the fixed subset, so there is nothing to compare"
    rows = [_target_row(arm, target, looks[arm.name]) for arm in arms]
    return _bars(rows, "compute GPU-hours: parents hatched, then the run alone")


def _target_row(arm: Arm, target: float, look: ArmStyle) -> _Row:
    found = hours_to_reach(arm, target)
    alone, whole = found.alone, found.with_parents
    before = 0.0 if alone is None or whole is None else whole - alone
    text = " / ".join(dict.fromkeys(found.texts))  # once where both accounts are the same
    return _Row(name=label(arm.name), value=alone, before=before, text=text, look=look)


def speed_figure(family: FamilyStudy) -> Figure | str:
    """Seconds of compute per 1,000 tokens over all devices; the first seed of every token-matched arm."""
    looks = styles(family.arms)
    rows: list[_Row] = []
    for arm in family.arms:
        if arm.variant or arm.share is not None:
            continue
        measured = [(stage.name, stage.throughput) for stage in arm.records[0].stages if stage.throughput is not None]
        for place, (stage, speed) in enumerate(measured):
            seconds = speed.seconds_per_1k_tokens
            name = label(stage) if place else f"{label(arm.name)}  {label(stage)}"
            rows.append(_Row(name=name, value=seconds, text=f"{seconds:.3g}", look=looks[arm.name]))
    if not rows:
        return "no stage has a measured speed"
    if len(rows) < 2:
        return "a single stage has a measured speed, so there is nothing to compare"
    return _bars(rows, "seconds per 1,000 tokens")


def _bars(rows: Sequence[_Row], x_label: str) -> Figure:
    figure, axes = one_axes(0.95 + _ROW * len(rows), grid="x")
    for place, row in enumerate(rows):
        if row.before:
            axes.barh(place, row.before, height=0.62, color="white", edgecolor="0.45", hatch="////", linewidth=0.8)
        axes.barh(place, row.value or 0.0, left=row.before, height=0.62, color=row.look.colour)
        _value(axes, row, place)
    _dress(axes, rows)
    axis_labels(axes, x_label)
    # Letters are a little wider at the resolution of the file than at that of the layout.
    figure.set_layout_engine("constrained", w_pad=0.12)
    return figure


def _value(axes: Axes, row: _Row, place: int) -> None:
    text = axes.annotate(
        row.text, (row.end, place), (4, 0), textcoords="offset points", va="center", fontsize=SMALL,
        color="0.15" if row.value is not None else "0.4", style="normal" if row.value is not None else "italic",
    )  # fmt: skip
    # The axes leave room for it; counted twice, it would push the names of the arms out on the left.
    text.set_in_layout(False)


def _dress(axes: Axes, rows: Sequence[_Row]) -> None:
    longest, letters = max(row.end for row in rows), max(len(row.text) for row in rows)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=SMALL)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, (1.04 + _LETTER * letters) * longest or 1.0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
