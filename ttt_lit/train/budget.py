"""A run's budget and its split over stages: exactly N tokens, or N GPU-hours. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

# Shares come from YAML as decimal fractions; three times 0.3333333333333333 is meant to be the whole.
_SHARE_TOLERANCE = Fraction(1, 10**9)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may consume: exactly one of the two."""

    tokens: int | None = None
    """Training tokens over all stages and ranks; whole optimiser steps."""
    gpu_hours: float | None = None
    """Compute device-hours over all stages; validation, checkpoints and compilation are not counted."""

    def __post_init__(self) -> None:
        _exactly_one("Budget", tokens=self.tokens, gpu_hours=self.gpu_hours)


@dataclass(frozen=True, kw_only=True)
class StageBudget:
    """What one stage may consume: exactly one of the two."""

    steps: int | None = None
    """Optimiser steps."""
    seconds: float | None = None
    """Compute device-seconds."""

    def __post_init__(self) -> None:
        _exactly_one("StageBudget", steps=self.steps, seconds=self.seconds)

    def fraction(self, *, optimizer_steps: int, compute_seconds: float) -> float:
        """Share of this budget that is spent."""
        if self.steps is not None:
            return optimizer_steps / self.steps
        assert self.seconds is not None
        return compute_seconds / self.seconds


def split_budget(budget: Budget, *, tokens_per_step: int, shares: Mapping[str, float | None]) -> dict[str, StageBudget]:
    """A budget per stage, in the order of ``shares``. A share of None takes the remainder (at most one stage)."""
    if budget.tokens is not None:
        steps = allocate_steps(budget.tokens, tokens_per_step, shares)
        return {stage: StageBudget(steps=count) for stage, count in steps.items()}
    assert budget.gpu_hours is not None
    seconds = Fraction(budget.gpu_hours) * 3600
    return {stage: StageBudget(seconds=float(share * seconds)) for stage, share in _resolve_shares(shares).items()}


def allocate_steps(total_tokens: int, tokens_per_step: int, shares: Mapping[str, float | None]) -> dict[str, int]:
    """Whole optimiser steps per stage that together consume exactly ``total_tokens`` (largest-remainder rounding).

    Raises:
        ValueError: the total is not a multiple of ``tokens_per_step``, the shares do not sum to 1, or a stage would get
            no step.
    """
    if tokens_per_step < 1 or total_tokens < 1:
        raise ValueError(
            f"budget: got {total_tokens} tokens and {tokens_per_step} tokens per step, expected both at least 1"
        )
    total, rest = divmod(total_tokens, tokens_per_step)
    if rest:
        below, above = total * tokens_per_step, (total + 1) * tokens_per_step
        nearest = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"budget: {total_tokens} tokens are not whole optimiser steps of {tokens_per_step} tokens; use {nearest}"
        )
    exact = {stage: share * total for stage, share in _resolve_shares(shares).items()}
    steps = {stage: int(wanted) for stage, wanted in exact.items()}
    # Ties go to the earlier stage (sorted is stable), so the split is the same on every machine.
    by_remainder = sorted(exact, key=lambda stage: steps[stage] - exact[stage])
    for stage in by_remainder[: total - sum(steps.values())]:
        steps[stage] += 1
    empty = [stage for stage, count in steps.items() if count == 0]
    if empty:
        raise ValueError(
            f"budget: stage {', '.join(empty)} gets no optimiser step out of {total}; "
            "raise its share or the budget, or disable it"
        )
    return steps


def _resolve_shares(shares: Mapping[str, float | None]) -> dict[str, Fraction]:
    """Exact shares that sum to 1; the decimal number as written counts, not its binary neighbour."""
    if not shares:
        raise ValueError("budget: got no stage to spend it on, expected at least one")
    open_stages = [stage for stage, share in shares.items() if share is None]
    if len(open_stages) > 1:
        raise ValueError(
            f"budget: stages {', '.join(open_stages)} have no share, expected at most one (it takes the rest)"
        )
    fixed: dict[str, Fraction] = {}
    for stage, share in shares.items():
        if share is None:
            continue
        if not 0 < share <= 1:
            raise ValueError(f"budget: stage {stage} has share {share}, expected more than 0 and at most 1")
        fixed[stage] = Fraction(repr(float(share)))
    rest = 1 - sum(fixed.values(), Fraction())
    if rest < -_SHARE_TOLERANCE:
        raise ValueError(f"budget: the shares of {', '.join(fixed)} sum to {float(1 - rest):g}, expected at most 1")
    if open_stages:
        if rest <= _SHARE_TOLERANCE:
            raise ValueError(
                f"budget: nothing is left for stage {open_stages[0]}; lower the other shares or disable it"
            )
        fixed[open_stages[0]] = rest
    elif rest > _SHARE_TOLERANCE:
        raise ValueError(
            f"budget: the shares of {', '.join(fixed)} sum to {float(1 - rest):g}, expected 1; "
            "set one share to null to take the rest"
        )
    whole = sum(fixed.values(), Fraction())
    return {stage: fixed[stage] / whole for stage in shares}


def _exactly_one(owner: str, **fields: float | None) -> None:
    given = {name: value for name, value in fields.items() if value is not None}
    names = " and ".join(fields)
    if len(given) != 1:
        raise ValueError(
            f"{owner}: got {' and '.join(given) or 'neither'}, expected exactly one of {names}; set the other to null"
        )
    ((name, value),) = given.items()
    # A comparison written so that NaN fails it, and infinity too.
    if not 0 < value < float("inf"):
        raise ValueError(f"{owner}.{name}: got {value}, expected a positive finite number")
