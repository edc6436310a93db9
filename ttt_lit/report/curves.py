"""Losses as curves: by token position, in training and on the page alike, and while training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ttt_lit.record.measured import Document, EvaluationPoint, Validation
from ttt_lit.record.schema import RunRecord
from ttt_lit.report.drawing import PALETTE, Look, amount, label, legend_below, limits, looks, one_axes
from ttt_lit.verdict.arm import Account, Arm, gpu_hours
from ttt_lit.verdict.statistics import paired_difference
from ttt_lit.verdict.study import FamilyStudy

Against = Literal["tokens", "gpu_hours"]
Point = tuple[float, float]
"""GPU-hours or tokens, and nats per token."""
Buckets = Sequence[tuple[int, int, float]]
"""First position, one past the last, and nats per token."""
_CEILING = 0.5
"""Nats per token above the worst final loss at which the axis ends: runs from scratch begin far above."""
_TENTHS = 10
_RESAMPLES = 1_000


@dataclass(frozen=True)
class Curve:
    """Mean losses by position, or differences of them."""

    name: str
    buckets: Buckets
    look: Look
    intervals: Sequence[tuple[float, float]] = ()
    """95% intervals of the mean of each tenth of the positions; empty: not known."""


def position_figure(curves: Sequence[Curve], y_label: str, *, window: int | None = None) -> Figure:
    """Bucket means as lines, intervals as bands; ``window``: where a sliding window begins to lose sight of the first token."""
    if not curves:
        raise ValueError("position figure: got no curve, expected at least one")
    figure, axes = one_axes(4.0, "token position in the block (log scale)", y_label)
    context = max(stop for curve in curves for _, stop, _ in curve.buckets)
    for curve in curves:
        _draw(axes, curve)
    if window is not None and window < context:
        axes.axvline(window, color="0.35", linewidth=1.0, linestyle=":", zorder=1)
        place = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "bottom", "color": "0.35"}
        axes.annotate(f"window: {window:,} tokens ", (window, 0.02), **place)  # type: ignore[arg-type]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in range(int(math.log2(context)) + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    # Limits follow the means: a wide interval must not flatten the lines.
    axes.set_ylim(*limits([loss for curve in curves for *_, loss in curve.buckets], margin=0.08))
    legend_below(figure, {curve.name: curve.look for curve in curves}, lines=True)
    return figure


def _draw(axes: Axes, curve: Curve) -> None:
    """Positions are counted from 1: a logarithmic axis has no zero."""
    look, context = curve.look, curve.buckets[-1][1]
    middles = [(start + 1 + stop) / 2 for start, stop, _ in curve.buckets]
    axes.plot(
        middles, [loss for *_, loss in curve.buckets], color=look.colour, linestyle=look.dashes, linewidth=1.7,
        marker=look.marker, markersize=4, markerfacecolor=look.face, label=label(curve.name), zorder=3,
    )  # fmt: skip
    if curve.intervals:
        tenths = [context * (place + 0.5) / _TENTHS for place in range(_TENTHS)]
        low, high = zip(*curve.intervals, strict=True)
        axes.fill_between(tenths, low, high, color=look.colour, alpha=0.16, linewidth=0)


def intervals(
    ours: Sequence[Sequence[Document]], theirs: Sequence[Sequence[Document]] = ()
) -> list[tuple[float, float]]:
    """Per tenth of the positions, the interval of the mean over documents and seeds, paired where there is another.

    Empty where tenths are missing or not finite, where the two were not measured on the same blocks, or on one document alone.
    """
    tables = [{each.id: each.deciles for each in run} for run in (*ours, *theirs)]
    rows = [row for table in tables for row in table.values()]
    if not rows or any(table.keys() != tables[0].keys() for table in tables):
        return []
    if not all(len(row) == _TENTHS and all(map(math.isfinite, row)) for row in rows):
        return []
    sources = {each.id: each.source for run in ours for each in run}
    zero = [{each: [0.0] * _TENTHS for each in tables[0]} for _ in ours]
    found = []
    for tenth in range(_TENTHS):
        a, b = (
            [{k: v[tenth] for k, v in t.items()} for t in of]
            for of in (tables[: len(ours)], tables[len(ours) :] or zero)
        )
        interval = paired_difference(a, b, documents=sources, resamples=_RESAMPLES)
        found.append((interval.low, interval.high))
    return found if all(math.isfinite(low) for low, _ in found) else []


def stages_figure(stages: Mapping[str, Sequence[Validation]], *, window: int | None) -> Figure:
    """The picture of one run in training: stage → its validations, as the record has them; solid with the inner loop, dashed without."""
    colours = dict(zip(stages, itertools.cycle(PALETTE), strict=False))
    curves = []
    for stage, each in ((stage, each) for stage, measured in stages.items() for each in measured):
        look = Look(colours[stage], dashes="-" if each.inner == "on" else (0, (4, 2)))
        buckets = [(bucket.start, bucket.stop, bucket.nats_per_token) for bucket in each.buckets]
        curves.append(Curve(f"{stage}, inner loop {each.inner}", buckets, look, intervals([each.documents])))
    return position_figure(curves, "validation loss (nats per token)", window=window)


def positions_figure(family: FamilyStudy) -> Figure | str:
    """Bucket means of every token-matched arm's final validation in its headline setting."""
    buckets, look = _positions(family), looks(family.arms)
    if not buckets:
        return "no arm has a final validation with losses by position"
    return _compared([Curve(name, buckets[name], look[name]) for name in buckets], "loss")


def position_differences_figure(family: FamilyStudy, control: Arm | None) -> Figure | str:
    """The same minus the control's; arms with other buckets than the control's are left out."""
    if control is None:
        return "there is no full-attention control"
    buckets, look = _positions(family), looks(family.arms)
    reference = buckets.pop(control.name, None)
    if reference is None:
        return f"the control {control.name} has no final validation with losses by position"
    edges = [bucket[:2] for bucket in reference]
    curves = [
        Curve(
            arm.name,
            [(*edge, a - b) for edge, (*_, a), (*_, b) in zip(edges, buckets[arm.name], reference, strict=True)],
            look[arm.name],
            _paired(arm, control),
        )
        for arm in family.arms
        if arm.name in buckets and [bucket[:2] for bucket in buckets[arm.name]] == edges
    ]
    if not curves:
        return "no other arm has losses in the same position buckets as the control"
    figure = _compared(curves, f"loss minus {label(control.name)}")
    if isinstance(figure, Figure):
        figure.axes[0].axhline(0, color="0.35", linewidth=1.0, zorder=1)
    return figure


def _compared(curves: Sequence[Curve], what: str) -> Figure | str:
    if sum(len(curve.buckets) for curve in curves) < 2:
        return f"there is a single {what} by position, so there is nothing to compare"
    return position_figure(curves, f"{what} (nats per token)")


def _paired(arm: Arm, control: Arm) -> list[tuple[float, float]]:
    ours, theirs = (
        {seed: final.documents for seed, final in zip(each.seeds, each.finals(), strict=True) if final}
        for each in (arm, control)
    )
    common = sorted(ours.keys() & theirs.keys())
    return intervals([ours[seed] for seed in common], [theirs[seed] for seed in common]) if common else []


def _positions(family: FamilyStudy) -> dict[str, Buckets]:
    found = {arm.name: position_losses(arm) for arm in family.arms if not arm.variant and arm.share is None}
    return {name: buckets for name, buckets in found.items() if buckets}


def position_losses(arm: Arm) -> Buckets:
    """Final losses by position bucket in the headline setting, mean over seeds; empty where a seed has none, or other buckets."""
    runs = [final.buckets if final else [] for final in arm.finals()]
    edges = [[(bucket.start, bucket.stop) for bucket in run] for run in runs]
    if not edges or not edges[0] or any(each != edges[0] for each in edges):
        return []
    means = [sum(bucket.nats_per_token for bucket in same) / len(runs) for same in zip(*runs, strict=True)]
    if not all(map(math.isfinite, means)):
        return []
    return [(start, stop, mean) for (start, stop), mean in zip(edges[0], means, strict=True)]


def series_figure(family: FamilyStudy, against: Against) -> Figure | str:
    """Evaluations on the fixed subset as lines, one per run; hollow marks are final losses on all held-out blocks.

    Token-matched arms without ablations. GPU-hours are those of the runs alone.
    """
    x_label = "tokens trained in the run" if against == "tokens" else "compute GPU-hours of the run alone"
    figure, axes = one_axes(3.9, x_label, "held-out loss (nats per token)")
    look, shown = looks(family.arms), {}
    drawn: list[Point] = []
    ends: list[float] = []
    for arm in (arm for arm in family.arms if not arm.variant and arm.share is None):
        points = [point for record in arm.records for point in _draw_run(axes, record, look[arm.name], against)]
        drawn += points
        if points:
            shown[arm.name] = look[arm.name]
            ends.append(max(points)[1])
    if not drawn:
        return "no run has evaluations or a final loss"
    if len(drawn) < 2:
        return "there is a single measurement, so there is nothing to compare"
    axes.set_ylim(*limits([min(loss, max(ends) + _CEILING) for _, loss in drawn], margin=0.05))
    axes.set_xlim(0, 1.02 * max(x for x, _ in drawn) or 1.0)
    axes.xaxis.set_major_formatter(FuncFormatter(amount))
    legend_below(figure, shown, lines=True)
    return figure


def _draw_run(axes: Axes, record: RunRecord, look: Look, against: Against) -> list[Point]:
    """A line and a mark; returns their points."""
    series = token_series(record) if against == "tokens" else evaluation_series(record)
    if series:
        axes.plot(*zip(*series, strict=True), color=look.colour, linestyle=look.dashes, linewidth=1.5, zorder=3)
    final, x = record.final(), float(record.totals.tokens) if against == "tokens" else gpu_hours(record, "marginal")
    if final is None or x is None or not math.isfinite(final.nats_per_token):
        return series
    axes.plot(x, final.nats_per_token, look.marker, color=look.colour, markerfacecolor="white", markersize=6, zorder=4)
    return [*series, (x, final.nats_per_token)]


def evaluation_series(record: RunRecord, account: Account = "marginal") -> list[Point]:
    """(GPU-hours, loss) of the evaluations on the fixed subset, in the headline setting; empty if a parent's cost is missing."""
    parents = [parent.gpu_seconds for parent in record.parents] if account == "with_parents" else []
    if None in parents:
        return []
    before = sum(seconds or 0.0 for seconds in parents)
    return [((before + point.gpu_seconds) / 3600, loss) for point, loss in _evaluations(record)]


def token_series(record: RunRecord) -> list[Point]:
    """(tokens, loss) of the same evaluations."""
    return [(float(point.tokens), loss) for point, loss in _evaluations(record)]


def _evaluations(record: RunRecord) -> Iterator[tuple[EvaluationPoint, float]]:
    for point in record.evaluations:
        loss = point.inner_on if record.headline == "on" else point.inner_off
        if loss is not None and math.isfinite(loss):
            yield point, loss
