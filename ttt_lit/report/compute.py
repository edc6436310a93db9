"""Figures of compute: quality against GPU-hours, GPU-hours to a target loss, speed, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.report.curves import evaluation_series
from ttt_lit.report.drawing import SMALL, Look, amount, label, legend_below, limits, looks, one_axes
from ttt_lit.report.tables import hours_to_reach, reached, target_arms
from ttt_lit.verdict.arm import Account, Arm
from ttt_lit.verdict.comparison import Differences, hours_to_target
from ttt_lit.verdict.study import FamilyStudy

ACCOUNT_NAMES: dict[Account, str] = {"marginal": "the run alone", "with_parents": "with every parent run"}
_LOG_FROM = 8.0
"""Largest over smallest value from which an axis is logarithmic."""
_SHADES = {"A": 1.0, "B0": 0.35, "B1": 0.5, "B2": 0.75, "C": 1.0}
Points = Mapping[str, tuple[float, float]]
"""Arm name → GPU-hours and final loss."""


def frontier_figure(family: FamilyStudy, account: Account, differences: Mapping[str, Differences]) -> Figure | str:
    """Final loss of every arm (ablations left out) against its GPU-hours, in one account.

    Bars are the confidence interval of the difference to the baseline, drawn at the arm's loss.
    """
    arms = {arm.name: arm for arm in family.arms if not arm.variant}
    known = {name: (arm.gpu_hours(account), arm.loss) for name, arm in arms.items()}
    points = {name: (x, y) for name, (x, y) in known.items() if x is not None and x > 0 and y is not None}
    if not points:
        return "no arm has both a final loss and known GPU-hours in this account"
    if len(points) < 2:
        return f"only {next(iter(points))} has both a final loss and known GPU-hours in this account, so there is nothing to compare"
    figure, axes = one_axes(
        4.1, f"compute GPU-hours, {ACCOUNT_NAMES[account]}", "final long-context loss (nats per token)"
    )
    look = looks(family.arms)
    for record in family.baseline.records if family.baseline else ():
        shift, series = trend_shift(record), evaluation_series(record, account)
        if series and shift is not None:
            moved = [(hours, loss + shift) for hours, loss in series]
            axes.plot(*zip(*moved, strict=True), color=look[family.baseline.name].colour, linewidth=1.2, alpha=0.55)  # type: ignore[union-attr]
    heights = [
        height for name in points for height in _draw_point(axes, arms[name], points[name], look[name], differences)
    ]
    axes.set_ylim(*limits(heights, margin=0.12))
    _hours_axis(axes, [hours for hours, _ in points.values()])
    _draw_shares(axes, arms, points, look)
    _draw_front(axes, points)
    legend_below(figure, {arms[name].experiment: look[name] for name in points}, lines=False)
    return figure


def _draw_point(
    axes: Axes, arm: Arm, point: tuple[float, float], look: Look, differences: Mapping[str, Differences]
) -> list[float]:
    """The mark and its interval; returns the losses that they reach."""
    matched, (hours, loss) = arm.share is None, point
    face, size = (look.colour, 7) if matched else ("white", 5)
    axes.plot(hours, loss, look.marker, color=look.colour, markersize=size, markerfacecolor=face, zorder=4)
    comparison = differences[arm.name]["ttt_scratch"]
    interval = comparison.interval if comparison else None
    if interval is None or not interval.bounded:
        return [loss]
    low, high = (loss + end - interval.estimate for end in (interval.low, interval.high))
    axes.vlines(hours, low, high, color=look.colour, linewidth=1.4, zorder=3)
    return [loss, low, high]


def _draw_shares(axes: Axes, arms: Mapping[str, Arm], points: Points, look: Mapping[str, Look]) -> None:
    """A line through the wall-clock shares of each experiment, each named."""
    shared = [name for name in points if arms[name].share is not None]
    for experiment in dict.fromkeys(arms[name].experiment for name in shared):
        names = sorted((name for name in shared if arms[name].experiment == experiment), key=lambda name: points[name])
        axes.plot(
            *zip(*map(points.__getitem__, names), strict=True), color=look[names[0]].colour, linewidth=1.2, zorder=2
        )
        for name in names:
            place = {"textcoords": "offset points", "fontsize": SMALL, "color": "0.2"}
            axes.annotate(f"at {arms[name].share:g}", points[name], (6, 6), **place)  # type: ignore[arg-type]


def _draw_front(axes: Axes, points: Points) -> None:
    """The Pareto front as a dotted staircase, its points ringed."""
    front = pareto(list(points.values()))
    (x, y), (right, top) = zip(*front, strict=True), (axes.get_xlim()[1], axes.get_ylim()[1])
    axes.step([*x, right], [*y, y[-1]], where="post", color="0.55", linewidth=1.0, linestyle=":", zorder=1)
    axes.vlines(x[0], y[0], top, color="0.55", linewidth=1.0, linestyle=":", zorder=1)
    axes.scatter(x, y, s=130, facecolors="none", edgecolors="0.35", linewidths=0.9, zorder=2)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, loss) pairs that no other beats in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def trend_shift(record: RunRecord) -> float | None:
    """What is added to a run's series so that its last value is the final loss: the two are of different blocks.

    None where there is no series or no final loss. The shape is that of the subset alone; the shift makes the ends comparable, no more.
    """
    series, final = evaluation_series(record), record.final()
    if not series or final is None or not math.isfinite(final.nats_per_token):
        return None
    return final.nats_per_token - series[-1][1]


def _hours_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the amounts differ much, numbers written out."""
    low, high = min(values), max(values)
    if high / low >= _LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{axes.get_xlabel()} (log scale)")
    else:
        room = 0.14 * max(high - low, 0.05 * high)
        axes.set_xlim(max(low - room, 0.0), high + room)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(amount))


def target_figure(family: FamilyStudy) -> Figure | str:
    """GPU-hours until the target is reached under both accounts, mean over seeds: the run alone, its parents hatched in front."""
    target, arms = reached(family), target_arms(family)
    if target is None:
        return "the baseline has no evaluations on the fixed subset, so there is no target"
    if len(arms) < 2:
        return "only the baseline has evaluations on the fixed subset, so there is nothing to compare"
    alone, whole = ([hours_to_target(arm, target, account) for arm in arms] for account in ACCOUNT_NAMES)
    before = [0.0 if a is None or w is None else w - a for a, w in zip(alone, whole, strict=True)]
    texts = [" / ".join(dict.fromkeys(hours_to_reach(arm, target))) for arm in arms]  # once where both accounts agree
    figure, axes = _rows([label(arm.name) for arm in arms], "compute GPU-hours: parents hatched, then the run alone")
    for row, width in enumerate(before):
        _draw_parents(axes, row, width, height=0.62)
    return _bars(
        figure, axes, [each or 0.0 for each in alone], texts, [looks(family.arms)[arm.name] for arm in arms], before
    )


def speed_figure(family: FamilyStudy) -> Figure | str:
    """Seconds of compute per 1,000 tokens over all devices; the first seed of every token-matched arm."""
    measured = [
        (arm.name, stage.name, stage.throughput.seconds_per_1k_tokens)
        for arm in family.arms
        if not arm.variant and arm.share is None
        for stage in arm.records[0].stages
        if stage.throughput is not None
    ]
    if not measured:
        return "no stage has a measured speed"
    if len(measured) < 2:
        return "a single stage has a measured speed, so there is nothing to compare"
    figure, axes = _rows([f"{label(arm)}  {label(stage)}" for arm, stage, _ in measured], "seconds per 1,000 tokens")
    colours = [looks(family.arms)[arm] for arm, *_ in measured]
    return _bars(figure, axes, [each for *_, each in measured], [f"{each:.3g}" for *_, each in measured], colours)


def _rows(names: Sequence[str], x_label: str, *, height: float = 0.29) -> tuple[Figure, Axes]:
    """Axes with a row per name, the first on top."""
    figure, axes = one_axes(0.95 + height * len(names), x_label, grid="x")
    axes.set_yticks(range(len(names)), list(names), fontsize=SMALL)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(amount))
    return figure, axes


def _bars(
    figure: Figure,
    axes: Axes,
    values: Sequence[float],
    texts: Sequence[str],
    look: Sequence[Look],
    before: Sequence[float] = (),
) -> Figure:
    """Bars with their texts behind them, and room for these."""
    left = list(before) or [0.0] * len(values)
    bars = axes.barh(range(len(values)), values, left=left, height=0.62, color=[each.colour for each in look])
    for text in axes.bar_label(bars, list(texts), padding=4, fontsize=SMALL):
        text.set_in_layout(False)  # the axes leave room for it; counted twice, it would push the names out on the left
    longest = max(map(sum, zip(values, left, strict=True)))
    axes.set_xlim(0, (1.04 + 0.024 * max(map(len, texts))) * longest or 1.0)
    figure.set_layout_engine("constrained", w_pad=0.12)  # letters are a little wider in the file than in the layout
    return figure


def _draw_parents(axes: Axes, row: int, hours: float, *, height: float) -> None:
    if hours:
        axes.barh(row, hours, height=height, color="white", edgecolor="0.45", hatch="////", linewidth=0.8)


def timeline_figure(family: FamilyStudy) -> Figure | str:
    """Stages over GPU-hours: the first seed of every token-matched arm, parents of known cost in front, hatched."""
    runs = {arm.name: arm.records[0] for arm in family.arms if not arm.variant and arm.share is None}
    runs = {name: run for name, run in runs.items() if any(_hours(stage) for stage in run.stages)}
    if not runs:
        return "no run has spent compute time on a stage"
    if sum(len(run.stages) for run in runs.values()) < 2:
        return "a single stage has spent compute time, so there is nothing to compare"
    figure, axes = _rows([label(name) for name in runs], "compute GPU-hours", height=0.62)
    look = looks(family.arms)
    for row, (name, run) in enumerate(runs.items()):
        end = sum(parent.gpu_seconds or 0.0 for parent in run.parents) / 3600
        _draw_parents(axes, row, end, height=0.42)
        for stage in run.stages:
            shade = {"alpha": _SHADES.get(stage.name, 1.0), "edgecolor": "white"}
            axes.barh(row, _hours(stage), left=end, height=0.42, color=look[name].colour, **shade)  # type: ignore[arg-type]
            end += _hours(stage)
        stages = " · ".join(f"{label(stage.name)}{_transition(stage)}" for stage in run.stages)
        axes.text(0, row + 0.38, stages, fontsize=SMALL, va="center", ha="left", color="0.2")
    axes.set_xlim(left=0)
    return figure


def _hours(stage: Stage) -> float:
    return stage.spent.gpu_seconds.get("compute", 0.0) / 3600


def _transition(stage: Stage) -> str:
    proof = stage.transition
    if proof is None:
        return ""
    sign = "=" if proof.preserves and proof.held else "→" if not proof.preserves else "≠ (broken)"
    return f" [{proof.before:.3f} {sign} {proof.after:.3f}]"
