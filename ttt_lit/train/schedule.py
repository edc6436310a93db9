"""Learning rates as pure functions of the share of a stage's budget that is spent.

The share, not the step, is the clock: a run that stops after N GPU-hours ends its cosine when its time ends, and a run
of N tokens gets the ordinary schedule over steps. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """Linear warm-up from zero to the peak, then half a cosine down to a share of the peak."""

    warmup_share: float = 0.0
    """Share of the stage's budget over which the rate rises from zero; a stage has 0.1 unless it says otherwise."""
    final_lr_ratio: float = 0.01
    """Final rate as a share of the peak, reached when the budget is spent."""

    def __post_init__(self) -> None:
        _check_unit("LRSchedule.warmup_share", self.warmup_share, below_one=True)
        _check_unit("LRSchedule.final_lr_ratio", self.final_lr_ratio)

    def factor(self, fraction: float) -> float:
        """Share of the peak rate for the step that starts with ``fraction`` of the stage's budget spent.

        With warm-up the first step of a stage has rate zero, as in the reference schedule. Above 1 (a time budget can
        be overrun by a step) the final value holds.
        """
        fraction = _checked_fraction(fraction)
        if fraction < self.warmup_share:
            return fraction / self.warmup_share
        progress = (fraction - self.warmup_share) / (1.0 - self.warmup_share)
        return self.final_lr_ratio + (1.0 - self.final_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def lr(self, peak: float, fraction: float) -> float:
        """Learning rate for a group whose peak is ``peak``."""
        return peak * self.factor(fraction)


@dataclass(frozen=True, kw_only=True)
class InnerLRSchedule:
    """Linear warm-up of the inner learning rate, then constant."""

    warmup_share: float = 0.0
    """Share of the stage's budget over which the inner rate rises."""
    initial_ratio: float = 0.0
    """Inner rate at the start of the warm-up, as a share of the target."""

    def __post_init__(self) -> None:
        _check_unit("InnerLRSchedule.warmup_share", self.warmup_share)
        _check_unit("InnerLRSchedule.initial_ratio", self.initial_ratio)

    def lr(self, target: float, fraction: float) -> float:
        """Inner learning rate with ``fraction`` of the stage's budget spent.

        The reference counts the step that is being taken: with ``fraction = (step + 1) / steps`` this is its
        ``init + (target - init) · min(1, (step + 1) / warmup_steps)``.
        """
        fraction = _checked_fraction(fraction)
        progress = 1.0 if self.warmup_share == 0.0 else min(1.0, fraction / self.warmup_share)
        return target * (self.initial_ratio + (1.0 - self.initial_ratio) * progress)


def _checked_fraction(fraction: float) -> float:
    if not fraction >= 0.0:
        raise ValueError(f"learning-rate schedule: got spent fraction {fraction}, expected a number of at least 0")
    return min(fraction, 1.0)


def _check_unit(name: str, value: float, *, below_one: bool = False) -> None:
    if not (0.0 <= value < 1.0 or (value == 1.0 and not below_one)):
        raise ValueError(f"{name}: got {value}, expected a share from 0 to {'below 1' if below_one else '1'}")
