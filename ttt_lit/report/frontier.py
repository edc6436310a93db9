"""Quality against compute: who reaches which loss for how many GPU-hours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_lit.record.schema import RunRecord
from ttt_lit.report.figure_style import ArmStyle, axis_labels, label, one_axes, styles
from ttt_lit.report.labels import Line, Mark, label_points
from ttt_lit.report.scales import compute_axis, limits
from ttt_lit.report.series import evaluation_series
from ttt_lit.verdict.arm import Account, Arm
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.study import FamilyStudy

ACCOUNT_NAMES: dict[Account, str] = {"marginal": "the run alone", "with_parents": "with every parent run"}


@dataclass(frozen=True, kw_only=True)
class _Point:
    arm: Arm
    hours: float
    loss: float


def frontier_figure(family: FamilyStudy, account: Account, differences: Mapping[str, Differences]) -> Figure | str:
    """Final loss of every arm (ablations left out) against its GPU-hours, in one account.

    Bars are the confidence interval of the difference to the baseline, drawn at the arm's loss.
    """
    arms = [arm for arm in family.arms if not arm.variant]
    points = _points(arms, account)
    if not points:
        return "no arm has both a final loss and known GPU-hours in this account"
    if len(points) < 2:
        return f"only {points[0].arm.name} has both a final loss and known GPU-hours in this account, so there is nothing to compare"
    figure, axes = one_axes(4.6)
    looks = styles(family.arms)
    trend = _draw_trend(axes, family, account, looks)
    shares = _draw_shares(axes, points, looks)
    bars = [_draw_point(axes, point, looks[point.arm.name], differences) for point in points]
    lowest, highest = limits([*(point.loss for point in points), *(y for bar in bars for _, y in bar)])
    axes.set_ylim(lowest, highest)
    compute_axis(axes, [point.hours for point in points])
    scale = " (log scale)" if axes.get_xscale() == "log" else ""
    axis_labels(axes, f"compute GPU-hours, {ACCOUNT_NAMES[account]}{scale}", "final long-context loss (nats per token)")
    front = _draw_front(axes, points)
    marks = [_mark(point, looks[point.arm.name]) for point in points]
    label_points(figure, axes, marks, [*bars, *trend, *shares, front])
    return figure


def _points(arms: Sequence[Arm], account: Account) -> list[_Point]:
    known = ((arm, arm.gpu_hours(account), arm.loss) for arm in arms)
    return [
        _Point(arm=arm, hours=hours, loss=loss)
        for arm, hours, loss in known
        if hours is not None and hours > 0 and loss is not None
    ]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, loss) pairs that no other beats in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def _draw_front(axes: Axes, points: Sequence[_Point]) -> Line:
    """The front as a dotted staircase, its points ringed."""
    front = pareto([(point.hours, point.loss) for point in points])
    x, y = zip(*front, strict=True)
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    corners = [(x[0], top)]
    for cost, loss in front:
        corners += [(cost, corners[-1][1]), (cost, loss)]
    corners.append((right, y[-1]))
    axes.plot(*zip(*corners, strict=True), color="0.55", linewidth=1.0, linestyle=":", zorder=1)
    axes.scatter(x, y, s=130, facecolors="none", edgecolors="0.35", linewidths=0.9, zorder=2)
    return corners


def _draw_trend(axes: Axes, family: FamilyStudy, account: Account, looks: Mapping[str, ArmStyle]) -> list[Line]:
    """The baseline's loss while it trained, moved to the level of its final loss."""
    drawn: list[Line] = []
    for record in family.baseline.records if family.baseline else ():
        shift, series = trend_shift(record), evaluation_series(record, account)
        if series and family.baseline and shift is not None:
            moved = [(hours, loss + shift) for hours, loss in series]
            axes.plot(*zip(*moved, strict=True), color=looks[family.baseline.name].colour, linewidth=1.2, alpha=0.55)
            drawn.append(moved)
    return drawn


def trend_shift(record: RunRecord) -> float | None:
    """What is added to a run's series so that its last value is the final loss: the two are of different blocks.

    None where there is no series or no final loss. The shape is that of the subset alone; the shift makes the ends comparable, no more.
    """
    series, final = evaluation_series(record), record.final()
    if not series or final is None or not math.isfinite(final.nats_per_token):
        return None
    return final.nats_per_token - series[-1][1]


def _draw_shares(axes: Axes, points: Sequence[_Point], looks: Mapping[str, ArmStyle]) -> list[Line]:
    """A line through the wall-clock shares of each arm."""
    drawn: list[Line] = []
    for experiment in dict.fromkeys(point.arm.experiment for point in points):
        shares = sorted(
            (point.hours, point.loss, point.arm.name)
            for point in points
            if point.arm.experiment == experiment and point.arm.share is not None
        )
        if len(shares) > 1:
            x, y, names = zip(*shares, strict=True)
            axes.plot(x, y, color=looks[names[0]].colour, linewidth=1.2, linestyle="-", zorder=2)
            drawn.append(list(zip(x, y, strict=True)))
    return drawn


def _draw_point(axes: Axes, point: _Point, look: ArmStyle, differences: Mapping[str, Differences]) -> Line:
    """The mark and its interval; returns the interval's line."""
    matched = point.arm.share is None
    axes.plot(
        point.hours, point.loss, look.marker, color=look.colour, markersize=7 if matched else 5,
        markerfacecolor=look.colour if matched else "white", zorder=4,
    )  # fmt: skip
    comparison = differences[point.arm.name]["ttt_scratch"]
    interval = comparison.interval if comparison else None
    if interval is None or not interval.bounded:
        return []
    low, high = (point.loss + end - interval.estimate for end in (interval.low, interval.high))
    axes.vlines(point.hours, low, high, color=look.colour, linewidth=1.4, zorder=3)
    return [(point.hours, low), (point.hours, high)]


def _mark(point: _Point, look: ArmStyle) -> Mark:
    share = point.arm.share
    text = label(point.arm.name) if share is None else f"at {share:g}"
    return Mark(x=point.hours, y=point.loss, text=text, colour=look.ink)
