"""The gates of the study: pass, fail, or insufficient evidence, each with the numbers and the reasons. See ``docs/decision.md``.

The primary gate is here, what keeps it from deciding in ``evidence.py``, the secondary gates in ``stability.py``. Standard library only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ttt_lit.verdict.arm import ACCOUNTS, Account, Arm
from ttt_lit.verdict.comparison import MAX_DELTA, Comparison, compare, flags, hours_ratio
from ttt_lit.verdict.evidence import (
    DEMO_CONTEXT,
    DEMO_EVALUATION_TOKENS,
    DEMO_TOKENS,
    MIN_SEEDS,
    SHARES,
    baseline_reasons,
    evidence_reasons,
    missing_shares,
)
from ttt_lit.verdict.findings import MIN_LEARNT
from ttt_lit.verdict.formats import counted, nats
from ttt_lit.verdict.gate import Gate, Outcome
from ttt_lit.verdict.own_part import is_required, own_part_gate
from ttt_lit.verdict.stability import (
    MAX_DECILE_RISE,
    MAX_LAST_RISE,
    MIN_LAST_THIRD,
    SPIKE_NATS,
    SPIKE_STEPS,
    SPIKE_WINDOW,
    convergence_gate,
    long_token_gate,
)
from ttt_lit.verdict.statistics import MIN_DOCUMENTS, RESAMPLES, Interval
from ttt_lit.verdict.study import FamilyStudy

__all__ = [
    "DEMO_CONTEXT",
    "DEMO_EVALUATION_TOKENS",
    "DEMO_TOKENS",
    "MAX_DECILE_RISE",
    "MAX_DELTA",
    "MAX_LAST_RISE",
    "MAX_SHARE",
    "MIN_FAILING_SHARE",
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
    "CandidateGates",
    "Gate",
    "Outcome",
    "convergence_gate",
    "flags",
    "judge_candidates",
    "long_token_gate",
    "primary_gate",
]

MIN_SAVING = 0.30
"""Share of the baseline's GPU-hours that a candidate must save."""
SHARE_TOLERANCE = 0.01
"""A stage limited by time ends up to two optimiser steps late, which is 1 % of a pilot of 525 steps in three stages. Without this, the
run planned at 0.7 could never show a saving of 0.30."""
MAX_SHARE = 1 - MIN_SAVING + SHARE_TOLERANCE
"""Measured share up to which a run counts as one that saves enough."""
MIN_FAILING_SHARE = 1 - MIN_SAVING - SHARE_TOLERANCE
"""Measured share from which a run that is worse shows that no cheaper one would save enough: below, a dearer one still might."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A wall-clock-matched arm against the baseline."""

    arm: Arm
    comparison: Comparison
    share: float | None
    """Measured GPU-hours as a share of the baseline's; None: not known."""
    finished: bool
    """Whether both runs are; before, the share says little."""

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
    points = [] if baseline is None else [_point(family, arm, baseline, account, resamples) for arm in arms.values()]
    blocking = [*baseline_reasons(baseline, resamples), *missing_shares(arms)]
    for point in points:
        blocking += point.comparison.reasons
    blocking += evidence_reasons(baseline, list(arms.values()), account)
    usable = sorted((p for p in points if p.share is not None and p.interval is not None), key=_share)
    blocking += _order_reasons(usable)
    best = next((point for point in usable if point.holds), None)
    reduction = None if best is None else 1 - _share(best)
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
        numbers=(
            *_baseline_numbers(baseline, account),
            *_matched_numbers(family, family.matched(experiment, variant), account, resamples),
            *_saving_numbers(points, reduction),
        ),
        reasons=tuple(dict.fromkeys(reasons)),
        reduction=reduction,
        decided_by=None if best is None else best.arm.name,
    )


def _point(family: FamilyStudy, arm: Arm, baseline: Arm, account: Account, resamples: int) -> _Point:
    return _Point(
        arm=arm,
        comparison=compare(arm, baseline, resamples=resamples, ceiling=family.ceiling.ceiling),
        share=hours_ratio(arm, baseline, account),
        finished=arm.finished and baseline.finished,
    )


def _decide(usable: Sequence[_Point], reduction: float | None, parents: float | None) -> tuple[Outcome, str]:
    """From points sorted by share, as if nothing else were in the way. ``parents``: what came before, as a share of the baseline."""
    if reduction is not None and 1 - reduction <= MAX_SHARE:
        tolerated = f", within the tolerance of {SHARE_TOLERANCE:.0%}," if reduction < MIN_SAVING else ""
        return (
            "pass",
            f"saves {reduction:.1%} of the baseline's GPU-hours{tolerated} with the whole interval at or below {MAX_DELTA:g}",
        )
    if parents is not None and parents > MAX_SHARE:
        return (
            "fail",
            f"the parent runs alone cost {parents:.2f} of the baseline's GPU-hours, a saving allows {MAX_SHARE:.2f}",
        )
    # More of the same training is not worse (``_order_reasons`` watches over that), so a run that is worse speaks for all cheaper ones.
    worse = list(itertools.takewhile(lambda point: point.violates, usable))
    reached = 0.0 if not worse else _share(worse[-1])
    if reached >= MIN_FAILING_SHARE:
        return (
            "fail",
            f"{worse[-1].arm.name} costs {reached:.3f} of the baseline's GPU-hours and still has its whole interval above {MAX_DELTA:g}",
        )
    crossing = [point for point in usable if _share(point) <= MAX_SHARE and not point.violates]
    if crossing:
        names = ", ".join(point.arm.name for point in crossing)
        return (
            "insufficient",
            f"the interval crosses {MAX_DELTA:g} for {names}; measure more documents or seeds",
        )
    if not worse:
        return "insufficient", f"no run within {MAX_SHARE:.2f} of the baseline's GPU-hours; run a smaller share"
    return (
        "insufficient",
        f"no run between {reached:.3f} of the baseline's GPU-hours, where the loss is worse, and {MAX_SHARE:.2f}; run one there",
    )


def _share(point: _Point) -> float:
    """Of a usable point, whose share is known."""
    return point.share or 0.0


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


def _baseline_numbers(baseline: Arm | None, account: Account) -> Iterator[tuple[str, str]]:
    if baseline is not None:
        loss, hours = baseline.loss, baseline.gpu_hours(account)
        yield "baseline loss", "not known" if loss is None else f"{loss:.4f} nats per token"
        yield "baseline GPU-hours", "not known" if hours is None else f"{hours:.4g} h"


def _matched_numbers(
    family: FamilyStudy, arm: Arm | None, account: Account, resamples: int
) -> Iterator[tuple[str, str]]:
    """What the same number of tokens gives; it decides nothing here, but is what most runs can show first."""
    if arm is not None and family.baseline is not None:
        point = _point(family, arm, family.baseline, account, resamples)
        yield f"{arm.name} − baseline, same number of tokens", _difference(point)


def _saving_numbers(points: Sequence[_Point], reduction: float | None) -> Iterator[tuple[str, str]]:
    if points:
        none = f"none shown, since no budget has its whole interval at or below {MAX_DELTA:g}"
        saved = f"{reduction:.3f} of the baseline's GPU-hours" if reduction is not None and reduction > 0 else None
        dearer = f"none, since what holds costs {1 - (reduction or 0):.2f} of the baseline's GPU-hours"
        yield "saving", none if reduction is None else saved or dearer
    for point in points:
        yield f"{point.arm.name} − baseline", _difference(point)


def _difference(point: _Point) -> str:
    if point.interval is None:
        return "not measured"
    share = (
        f"{point.share:.3f} of its GPU-hours" if point.share is not None and point.finished else "GPU-hours not known"
    )
    parts = (point.comparison.of_ceiling, share, counted(point.interval.seeds, "seed"))
    return f"{nats(point.interval)} ({', '.join(filter(None, parts))})"


@dataclass(frozen=True, kw_only=True)
class CandidateGates:
    """A candidate with its gates."""

    experiment: str
    variant: str
    marginal: Gate
    with_parents: Gate
    secondary: tuple[Gate, ...]
    """Of the arm that decided the primary gate, else of the token-matched one; empty: there is neither."""
    own_part: Gate | None
    """TTT's own part in that arm's loss; None: there is no such arm."""
    own_part_required: bool
    """Whether ceiling and baseline leave it open that a model without memory passes."""

    @property
    def name(self) -> str:
        return self.marginal.subject

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (self.marginal, self.with_parents, *self.secondary, *self._own_part)

    @property
    def open(self) -> list[Gate]:
        """Secondary gates that did not pass, TTT's own part among them where it is required, and wherever it failed."""
        counts = self.own_part_required or (self.own_part is not None and self.own_part.outcome == "fail")
        needed = (*self.secondary, *(self._own_part if counts else ()))
        return [gate for gate in needed if gate.outcome != "pass"]

    @property
    def _own_part(self) -> tuple[Gate, ...]:
        return () if self.own_part is None else (self.own_part,)


def judge_candidates(family: FamilyStudy, *, resamples: int = RESAMPLES) -> list[CandidateGates]:
    """Every conversion of a family with all its gates."""
    return [_judge(family, *candidate, resamples) for candidate in family.candidates]


def _judge(family: FamilyStudy, experiment: str, variant: str, resamples: int) -> CandidateGates:
    marginal, with_parents = (
        primary_gate(family, experiment, variant, account, resamples=resamples) for account in ACCOUNTS
    )
    by_name = {arm.name: arm for arm in family.shares(experiment, variant).values()}
    arm = by_name.get(marginal.decided_by or "") or family.matched(experiment, variant)
    secondary = (
        () if arm is None else (convergence_gate(arm, resamples=resamples), long_token_gate(arm, resamples=resamples))
    )
    return CandidateGates(
        experiment=experiment,
        variant=variant,
        marginal=marginal,
        with_parents=with_parents,
        secondary=secondary,
        own_part=None if arm is None else own_part_gate(family, experiment, variant, arm, resamples=resamples),
        own_part_required=arm is None or is_required(family, arm, resamples=resamples),
    )
