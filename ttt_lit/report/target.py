"""GPU-hours to the target loss, as the figure and the table of them show it."""

from __future__ import annotations

from dataclasses import dataclass

from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.comparison import hours_to_target, reached_at_once
from ttt_lit.verdict.formats import hours
from ttt_lit.verdict.study import FamilyStudy

UPPER_BOUND = "≤"
"""Before hours that are an upper bound."""


@dataclass(frozen=True, kw_only=True)
class TargetHours:
    """Of one arm, mean over seeds."""

    alone: float | None
    """None: a seed never reached it, or its hours are not known."""
    with_parents: float | None
    timed: bool
    """Whether the GPU-hours of every seed are known."""
    bound: bool
    """A seed was at the target at its first evaluation: the hours are an upper bound."""

    @property
    def texts(self) -> tuple[str, str]:
        """One per account."""
        if self.alone is None:
            missing = "not reached" if self.timed else "not known"
            return missing, missing
        return self._text(self.alone), "not known" if self.with_parents is None else self._text(self.with_parents)

    def _text(self, value: float) -> str:
        return f"{UPPER_BOUND} {hours(value)}" if self.bound else hours(value)


def target_arms(family: FamilyStudy) -> list[Arm]:
    """The arms that have a series; ablations left out."""
    return [arm for arm in family.arms if not arm.variant and any(record.evaluations for record in arm.records)]


def hours_to_reach(arm: Arm, target: float) -> TargetHours:
    return TargetHours(
        alone=hours_to_target(arm, target, "marginal"),
        with_parents=hours_to_target(arm, target, "with_parents"),
        timed=arm.gpu_hours("marginal") is not None,
        bound=any(reached_at_once(record, target) for record in arm.records),
    )
