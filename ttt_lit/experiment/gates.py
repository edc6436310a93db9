"""The gates of the study: pass, fail, or insufficient evidence, each with the numbers and the reasons. See ``docs/decision.md``.

The primary gate is here, the secondary ones in ``stability.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ttt_lit.experiment.comparison import MAX_DELTA, Comparison, compare, flags, format_interval
from ttt_lit.experiment.findings import MIN_LEARNT
from ttt_lit.experiment.record import RunRecord
from ttt_lit.experiment.stability import (
    MAX_DECILE_RISE,
    MIN_LAST_THIRD,
    SPIKE_NATS,
    SPIKE_STEPS,
    SPIKE_WINDOW,
    convergence_gate,
    long_token_gate,
)
from ttt_lit.experiment.statistics import MIN_DOCUMENTS, RESAMPLES, Interval
from ttt_lit.experiment.study import Account, Arm, FamilyStudy
from ttt_lit.experiment.verdict import Gate, Outcome

__all__ = [
    "DEMO_CONTEXT",
    "DEMO_EVALUATION_TOKENS",
    "DEMO_TOKENS",
    "MAX_DECILE_RISE",
    "MAX_DELTA",
    "MIN_DOCUMENTS",
    "MIN_LAST_THIRD",
    "MIN_LEARNT",
    "MIN_SAVING",
    "MIN_SEEDS",
    "SHARES",
    "SHARE_TOLERANCE",
    "SPIKE_NATS",
    "SPIKE_STEPS",
    "SPIKE_WINDOW",
    "Gate",
    "Outcome",
    "convergence_gate",
    "flags",
    "long_token_gate",
    "primary_gate",
]

MIN_SAVING = 0.30
"""Share of the baseline's GPU-hours that a candidate must save."""
SHARES = (0.35, 0.5, 0.7, 1.0)
"""Budgets at which a candidate is run, as shares of the baseline's GPU-hours; all must be there."""
SHARE_TOLERANCE = 0.01
"""A stage limited by time ends up to two optimiser steps late, which is 1 % of a pilot of 525 steps in three stages. Without this, the
run planned at 0.7 could never show a saving of 0.30."""
MAX_SHARE = 1 - MIN_SAVING + SHARE_TOLERANCE
"""Measured share up to which a run counts as one that saves enough."""
MIN_SEEDS = 2
"""One training run says nothing about how much training runs differ."""
DEMO_EVALUATION_TOKENS = 1_000_000
"""30 blocks of 32K. Paired differences of documents scatter by some 0.03 nats, so fewer cannot resolve 0.01."""
DEMO_TOKENS = 100_000_000
"""Trained by the baseline: 0.4 % of the full schedule. A model that has seen less has hardly left the statistics of single tokens."""
DEMO_CONTEXT = 8_192
"""Tokens. The paper's short context; learning while reading is about what lies beyond it."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A wall-clock-matched arm against the baseline."""

    arm: Arm
    comparison: Comparison
    share: float | None
    """Measured GPU-hours as a share of the baseline's; None: not known."""

    @property
    def interval(self) -> Interval | None:
        return self.comparison.interval

    @property
    def holds(self) -> bool:
        return self.interval is not None and self.interval.high <= MAX_DELTA

    @property
    def violates(self) -> bool:
        return self.interval is not None and self.interval.low > MAX_DELTA


def primary_gate(
    family: FamilyStudy, experiment: str, variant: str, account: Account, *, resamples: int = RESAMPLES
) -> Gate:
    """Whether a candidate saves ``MIN_SAVING`` of the baseline's GPU-hours at a loss at most ``MAX_DELTA`` worse."""
    baseline, arms = family.baseline, family.shares(experiment, variant)
    points = [] if baseline is None else [_point(arm, baseline, account, resamples) for arm in arms.values()]
    blocking = [*_baseline_reasons(baseline, resamples), *_missing_shares(arms)]
    for point in points:
        blocking += point.comparison.reasons
    blocking += _evidence_reasons(baseline, list(arms.values()), account)
    usable = sorted((p for p in points if p.share is not None and p.interval is not None), key=lambda p: p.share or 0.0)
    blocking += _order_reasons(usable)
    best = next((point for point in usable if point.holds), None)
    reduction = None if best is None else 1 - (best.share or 0.0)
    outcome, reason = _decide(usable, reduction, _parents_share(arms.values(), baseline, account))
    if blocking:
        reasons = [*blocking, reason] if outcome == "insufficient" and usable else blocking
        outcome = "insufficient"
    else:
        reasons = [reason]
    return Gate(
        name="wall-clock saving",
        subject=f"{experiment} {variant}".strip(),
        account=account,
        outcome=outcome,
        numbers=tuple(_primary_numbers(baseline, points, reduction, account)),
        reasons=tuple(dict.fromkeys(reasons)),
        reduction=reduction,
        decided_by=None if best is None else best.arm.name,
    )


def _point(arm: Arm, baseline: Arm, account: Account, resamples: int) -> _Point:
    return _Point(
        arm=arm,
        comparison=compare(arm, baseline, resamples=resamples),
        share=_ratio(arm.gpu_hours(account), baseline.gpu_hours(account)),
    )


def _ratio(hours: float | None, of: float | None) -> float | None:
    return None if hours is None or of is None or of <= 0 or hours <= 0 else hours / of


def _decide(usable: Sequence[_Point], reduction: float | None, parents: float | None) -> tuple[Outcome, str]:
    """From points sorted by share, as if nothing else were in the way. ``parents``: what came before, as a share of the baseline."""
    if reduction is not None and 1 - reduction <= MAX_SHARE:
        return (
            "pass",
            f"saves {reduction:.1%} of the baseline's GPU-hours with the whole interval at or below {MAX_DELTA:g}",
        )
    within = [point for point in usable if point.share is not None and point.share <= MAX_SHARE]
    if not within:
        return _decide_outside(usable, parents)
    crossing = [point.arm.name for point in within if not point.violates]
    if crossing:
        return (
            "insufficient",
            f"the interval crosses {MAX_DELTA:g} for {', '.join(crossing)}; measure more documents or seeds",
        )
    return (
        "fail",
        f"every run within {MAX_SHARE:.2f} of the baseline's GPU-hours has its whole interval above {MAX_DELTA:g}",
    )


def _decide_outside(usable: Sequence[_Point], parents: float | None) -> tuple[Outcome, str]:
    """No run was cheap enough. That decides only where a cheaper one could not have held either."""
    if parents is not None and parents > MAX_SHARE:
        return (
            "fail",
            f"the parent runs alone cost {parents:.2f} of the baseline's GPU-hours, a saving allows {MAX_SHARE:.2f}",
        )
    if usable and usable[0].violates:
        return (
            "fail",
            f"{usable[0].arm.name}, the cheapest run, costs {usable[0].share:.2f} and still has its whole interval above {MAX_DELTA:g}",
        )
    return "insufficient", f"no run within {MAX_SHARE:.2f} of the baseline's GPU-hours; run a smaller share"


def _baseline_reasons(baseline: Arm | None, resamples: int) -> Iterator[str]:
    if baseline is None:
        yield "there is no baseline; finish one token-matched run of TTT-E2E from scratch"
        return
    yield from flags(baseline, resamples=resamples)
    seeds: dict[str, list[str]] = {}
    for record in baseline.records:
        for problem in _weak_baseline(record):
            seeds.setdefault(problem, []).append(str(record.seed))
    yield from (f"{baseline.name}, seed {', '.join(each)}: {problem}" for problem, each in seeds.items())
    if not baseline.gpu_hours("marginal"):
        yield f"the GPU-hours of {baseline.name} are not known"


def _weak_baseline(record: RunRecord) -> Iterator[str]:
    if record.start.source is not None or record.parents:
        yield "the baseline did not start from random weights"
    final, entropy = record.final(), record.unigram_entropy
    if entropy is None:
        yield "the unigram entropy is not known, so whether the baseline has learnt enough cannot be told"
    elif final is not None and not final.nats_per_token <= entropy - MIN_LEARNT:
        yield (
            f"the baseline has learnt too little: {final.nats_per_token:.3f} nats per token, unigram entropy {entropy:.3f}, "
            f"at least {MIN_LEARNT:g} nat below is needed"
        )
    yield from _demo_size(record)


def _demo_size(record: RunRecord) -> Iterator[str]:
    final = record.final()
    if final is not None and final.tokens < DEMO_EVALUATION_TOKENS:
        yield f"demo size: {final.tokens:,} evaluation tokens, at least {DEMO_EVALUATION_TOKENS:,} are needed"
    if record.totals.tokens < DEMO_TOKENS:
        yield f"demo size: {record.totals.tokens:,} training tokens, at least {DEMO_TOKENS:,} are needed"
    if final is not None and final.context < DEMO_CONTEXT:
        yield f"demo size: a long context of {final.context:,} tokens, at least {DEMO_CONTEXT:,} are needed"
    if final is not None and len(final.documents) < MIN_DOCUMENTS:
        yield f"demo size: {len(final.documents)} documents, an interval needs at least {MIN_DOCUMENTS}"


def _missing_shares(arms: dict[float, Arm]) -> Iterator[str]:
    if not arms:
        yield "there are no wall-clock-matched runs; run the candidate at " + ", ".join(f"{s:g}" for s in SHARES)
        return
    for share in SHARES:
        if share not in arms:
            yield f"no run at {share:g} of the baseline's GPU-hours"


def _evidence_reasons(baseline: Arm | None, arms: Sequence[Arm], account: Account) -> Iterator[str]:
    single = [arm.name for arm in ([] if baseline is None else [baseline]) + list(arms) if len(arm.seeds) < MIN_SEEDS]
    if single:
        yield f"a single seed: {', '.join(single)}; run at least {MIN_SEEDS}"
    if baseline is not None:
        devices = {record.environment.device for arm in (baseline, *arms) for record in arm.records}
        if len(devices) > 1:
            yield f"GPU-hours of different devices: {', '.join(sorted(devices))}; run all on the same"
    for arm in arms:
        if arm.gpu_hours("marginal") is None:
            yield f"the GPU-hours of {arm.name} are not known"
    if account == "with_parents":
        unknown = {p.name for arm in arms for record in arm.records for p in record.parents if p.gpu_seconds is None}
        if unknown:
            yield f"the cost of parents is not known: {', '.join(sorted(unknown))}"


def _order_reasons(usable: Sequence[_Point]) -> Iterator[str]:
    """More of the same training should not be worse; where it is, something other than the budget decides."""
    for index, small in enumerate(usable):
        for large in usable[index + 1 :]:
            if small.holds and large.violates:
                yield f"{small.arm.name} holds while {large.arm.name} with more GPU-hours does not; find out why before either is believed"


def _parents_share(arms: Iterable[Arm], baseline: Arm | None, account: Account) -> float | None:
    """The smallest cost of the parent runs among the arms, as a share of the baseline; None under ``marginal`` or where not known."""
    if baseline is None or account == "marginal":
        return None
    hours = baseline.gpu_hours(account)
    both = [(arm.gpu_hours(account), arm.gpu_hours("marginal")) for arm in arms]
    costs = [whole - own for whole, own in both if whole is not None and own is not None]
    return min(costs) / hours if costs and hours else None


def _primary_numbers(
    baseline: Arm | None, points: Sequence[_Point], reduction: float | None, account: Account
) -> Iterator[tuple[str, str]]:
    yield "reduction", "none of the runs holds" if reduction is None else f"{reduction:.3f} of the baseline's GPU-hours"
    if baseline is not None:
        loss, hours = baseline.loss, baseline.gpu_hours(account)
        yield "baseline loss", "not known" if loss is None else f"{loss:.4f} nats per token"
        yield "baseline GPU-hours", "not known" if hours is None else f"{hours:.4g} h"
    for point in points:
        share = "share not known" if point.share is None else f"share {point.share:.3f}"
        delta = "not measured" if point.interval is None else format_interval(point.interval)
        seeds = "" if point.interval is None else f", {point.interval.seeds} seeds"
        yield f"{point.arm.name} − baseline", f"{delta} ({share}{seeds})"
